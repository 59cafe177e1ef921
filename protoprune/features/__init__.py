"""Features on disk, one row an image.

opening      `open_features`: whatever holds features, wherever it is; `merge`
featurefile  one HDF5 file
featureset   a folder of them, one a shard, read as one
remoteset    such a folder on an object store
current      does a row still belong to the image that is there now?
hdf5, seals  how an HDF5 file is written, resumed, and known to be whole
"""
