"""Images x encoder -> feature file; and vectors that somebody has already.

engine     an encoder made ready on a device, and the Protocol of encoders
ahead      work in halves, the first of them done ahead of its turn
pipeline   `embed`: decode, batch, encode, commit, resume
earlier    what earlier runs left, and may be used again
importing  vectors from elsewhere -> feature file
"""
