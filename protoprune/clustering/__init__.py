"""Vectors -> groups.

prototypes  k-means with faiss or torch, its cache, and the distance of every image to its centroid
partition   groups small enough to look at all pairs
buckets     rows by group
vectors     features a slice at a time, unit length
"""
