"""Permutations that stay what they are.

They come from integer hashing written out here, not from a library's generator, whose numbers may
change from one release to the next: a run that is resumed years later goes on in the same order.
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Int64
from numpy import ndarray


@lru_cache(maxsize=1024)
def shuffled(count: int, seed: int) -> Int64[ndarray, " count"]:
    """A permutation of `count` numbers that is a function of the seed on every machine.

    The order of splitmix64's outputs (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195).
    """
    x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    order = np.argsort(x ^ (x >> np.uint64(31)), kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order
