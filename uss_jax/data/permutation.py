"""Keyed hashes and pseudo-random permutations, as pure functions of their arguments.

Shape letter: n indexes or positions.
"""

import numpy as np
from jaxtyping import Float, Integer, UInt64

_GOLDEN = 0x9E3779B97F4A7C15
# Each round moves an index with probability 1/2: after 40 rounds, 2**-40 of them never moved.
_ROUND_KEYS = np.arange(1, 41, dtype=np.uint64) * np.uint64(_GOLDEN)
# Purposes of a key, hashed into it so that no two uses share one.
PLACES, CLIPS, LABELS = 1, 2, 3
ANCHORS, JITTER, ARRANGEMENTS = 4, 5, 6
ASKED, OTHERS, WEIGHTS = 7, 8, 9
TEMPLATES, BY_TEXT = 10, 11


def scramble(x: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Scrambles 64 bits (the finaliser of SplitMix64, doi.org/10.1145/2660193.2660195)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_key(seed: int, *parts: int | np.ndarray) -> UInt64[np.ndarray, " n"]:
    """Hashes the seed and all parts to 64 bits."""
    key = np.array([seed % 2**64], np.uint64)
    for part in parts:
        key = scramble((key + np.uint64(_GOLDEN)) ^ scramble(np.atleast_1d(part).astype(np.uint64)))
    return key


def uniform(
    seed: int, purpose: int, positions: Integer[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Returns a pseudo-random number in [0, 1) for each position."""
    key = hash_key(seed, purpose, positions)
    return (key >> np.uint64(11)) * 2.0**-53


def permute(
    index: Integer[np.ndarray, " n"],
    size: int | Integer[np.ndarray, " n"],
    key: UInt64[np.ndarray, "_"],
    inverse: bool = False,
) -> UInt64[np.ndarray, " n"]:
    """Maps `index` through a keyed pseudo-random permutation of 0..size-1.

    A swap-or-not shuffle (Hoang, Morris, Rogaway 2012, arxiv.org/abs/1208.1176): each round pairs
    x with (offset - x) mod size and swaps the pair if a hash of it says so. It permutes ranges of
    any size, at the same cost for 3 clips and 3 million.

    Args:
      index: indexes to map, below `size`.
      size: length of the permuted range; one for all or one per index.
      key: selects the permutation; one for all or one per index.
      inverse: apply the inverse permutation.
    """
    x = index.astype(np.uint64)
    size = np.broadcast_to(size, x.shape).astype(np.uint64)
    for round_key in _ROUND_KEYS[::-1] if inverse else _ROUND_KEYS:
        round_key = scramble(key + round_key)
        offset = round_key % size
        partner = np.where(offset >= x, offset - x, offset + size - x)
        swap = scramble(round_key ^ np.maximum(x, partner)) & np.uint64(1)
        x = np.where(swap, partner, x)
    return x
