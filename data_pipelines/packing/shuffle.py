"""A random order of 0 ... n - 1 that takes no memory: any place of it is computed by itself.

A Feistel network permutes the numbers of an even count of bits, whatever its round function is; a result that is not
below n is permuted again until it is, which stays a permutation of those below n.
"""

import hashlib

import numpy as np
from jaxtyping import Int64, UInt64

ROUNDS = 6


def permute(places: Int64[np.ndarray, "k"], size: int, seed: str) -> Int64[np.ndarray, "k"]:
    """What stands at these places (each below `size`) of the order of 0 ... size - 1 that `seed` gives."""
    half = max((size - 1).bit_length() + 1, 2) // 2
    keys = np.frombuffer(hashlib.sha256(seed.encode()).digest()[: 4 * ROUNDS], "<u4").astype(np.uint64)
    values = places.astype(np.uint64)
    left = np.arange(len(values))
    while len(left):
        values[left] = _feistel(values[left], half, keys)
        left = left[values[left] >= size]
    return values.astype(np.int64)


def _feistel(values: UInt64[np.ndarray, "k"], half: int, keys: UInt64[np.ndarray, "rounds"]) -> UInt64[np.ndarray, "k"]:
    """A permutation of the numbers of 2 * half bits."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    high, low = values >> bits, values & mask
    for key in keys[:, None]:
        high, low = low, high ^ (_mix(low, key) & mask)
    return high << bits | low


def _mix(values: UInt64[np.ndarray, "k"], key: UInt64[np.ndarray, "1"]) -> UInt64[np.ndarray, "k"]:
    """A hash of 64 bits: splitmix64's finaliser (Steele, Lea, Flood 2014)."""
    mixed = values + (key + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return mixed ^ mixed >> np.uint64(31)
