"""Encoders by name: a frozen image model with its preprocessing and a digest of its weights.

`catalogue` is plain data, so listing it imports nothing heavy; `sources` finds the published weights of an entry,
`checkpoints` reads a file of them, `names` and `weights` bring its tensors into a model, and `loading` gives one
`Encoder`: a callable from a normalised float batch to features. What this package does not know: files of images,
batches, feature files.
"""

from protoprune.encoders.catalogue import CATALOGUE
from protoprune.encoders.checkpoints import read_state
from protoprune.encoders.loading import Encoder, digest, load_encoder
from protoprune.encoders.weights import load_weights, unprefixed

__all__ = ["CATALOGUE", "Encoder", "digest", "load_encoder", "load_weights", "read_state", "unprefixed"]
