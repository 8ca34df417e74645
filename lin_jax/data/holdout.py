"""Which documents are held out for validation where a source has no split for it."""

import numpy as np


def held_out(documents: int, fraction: float) -> np.ndarray:
    """Which of at least two documents are held out, bool [documents]: spread evenly, and some but not all."""
    count = min(max(round(documents * fraction), 1), documents - 1)
    mask = np.zeros(documents, bool)
    mask[(2 * np.arange(count) + 1) * documents // (2 * count)] = True
    return mask
