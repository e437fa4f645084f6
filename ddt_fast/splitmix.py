"""SplitMix64 (Steele, Lea, Flood 2014): hashes that no library version and no machine changes."""

import numpy as np
from numpy.typing import NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 divided by the golden ratio."""


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash every number to 64 bits that look random; different numbers have different hashes."""
    values = values + GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
