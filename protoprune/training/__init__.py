"""Training: labelled examples, models, one loop, and the recorder that turns training into a training record.

examples     image folder or feature file -> labelled arrays
models       head, small CNN, ResNet-18, timm models
loop         one training run, in which only the subset differs from another one's
heads        whole ensembles of heads at once
per_example  what is kept of an example at a moment
recording    training runs -> training record (HDF5)
"""
