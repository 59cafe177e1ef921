"""Features that may only be read in slices, as those of a file or a set are read fast."""

import numpy as np


class Counted:
    """Features that are read in slices, and count how often each row is."""

    def __init__(self, x: np.ndarray):
        self.x, self.shape, self.dtype = x, x.shape, x.dtype
        self.reads = np.zeros(len(x), int)

    def __getitem__(self, rows: slice) -> np.ndarray:
        assert isinstance(rows, slice)
        self.reads[rows] += 1
        return self.x[rows]
