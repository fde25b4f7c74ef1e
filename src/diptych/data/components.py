"""Which pixels of a mask hang together."""

import numpy as np
from jaxtyping import Bool, Int64


def connected_components(mask: Bool[np.ndarray, "h w"]) -> Int64[np.ndarray, "h w"]:
    """Return the number of each pixel's component, 1, 2, ... in the order of their last pixels, 0 outside; diagonal neighbours count.

    Every pixel takes the largest label around it, then the label of the pixel which that label names, until nothing changes. So labels
    travel in jumps, and long thin components take few rounds.
    """
    label = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        framed = np.pad(label, 1)
        rows = np.maximum(np.maximum(framed[:-2], framed[1:-1]), framed[2:])
        largest = np.where(mask, np.maximum(np.maximum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:]), 0)
        jumped = np.append(0, largest)[largest]
        if (jumped == label).all():
            break
        label = jumped
    return np.searchsorted(np.append(0, np.unique(label[mask])), label)
