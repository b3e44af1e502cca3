"""Fingerprints of trees of arrays: the same on any devices, in any layout, and on the host.

A checkpoint carries one for each of its parts, taken of the state that is saved, so that a restored
state can be held to it: whatever went wrong between the two, on disk or by hand, is found. A
checksum of files would be of one layout of files, and blind to what came before them.
"""

import hashlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import UInt32

_BLOCK = 1 << 16  # elements that are mixed at once; they fit the cache


def fingerprint(tree: Any) -> str:
    """Returns a hash over the paths, shapes, dtypes and bits of a tree's arrays.

    Each array is summed up by 32 bits: the sum, modulo 2^32, of its elements' bits mixed with their
    position. As the mixing is a permutation, a change of any one element always shows; other
    changes go unseen once in 2^32. The sum is of integers, so it does not depend on the order in
    which parts are added: every host sums up its own, and they add theirs.

    Args:
      tree: `jax.Array`s, whatever their layout over devices, on all hosts together where they lie
        on several; or numpy arrays. Kinds of containers do not count, only the names and numbers
        that lead to a leaf.
    """
    leaves = by_path(tree)
    sums = [_sum_here(leaf) for leaf in leaves.values()]
    spread = [isinstance(x, jax.Array) and not x.is_fully_addressable for x in leaves.values()]
    if any(spread):
        of_hosts = multihost_utils.process_allgather(np.array(sums, np.uint32))
        added = np.sum(of_hosts, axis=0, dtype=np.uint64)
        sums = [int(a) % 2**32 if s else x for a, s, x in zip(added, spread, sums, strict=True)]
    lines = [
        f"{path} {tuple(leaf.shape)} {leaf.dtype} {total:08x}\n"
        for (path, leaf), total in zip(leaves.items(), sums, strict=True)
    ]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by the names and numbers that lead to them, joined by "/"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_of(key): leaf for key, leaf in leaves}


def path_of(key: tuple[Any, ...]) -> str:
    """Returns the path of a leaf, of the keys that `jax.tree_util` gives of it."""
    return jax.tree_util.keystr(key, simple=True, separator="/")


def _sum_here(array: Any) -> int:
    """Sums up an array, or of one on several hosts the parts that no other host sums up."""
    if not isinstance(array, jax.Array):
        return _sum(np.asarray(array), None)
    total = 0
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            part = np.asarray(shard.data)
            whole = part.shape == array.shape
            total += _sum(part, None if whole else _positions(array.shape, shard.index))
    return total % 2**32


def _positions(shape: tuple[int, ...], index: tuple[slice, ...]) -> UInt32[np.ndarray, " _"]:
    """The row-major positions, modulo 2^32, in an array of a shape of the elements of a part."""
    at = np.zeros(1, np.uint64)
    for size, part in zip(shape, index, strict=True):
        at = (at[:, None] * np.uint64(size) + np.arange(size, dtype=np.uint64)[part]).reshape(-1)
    return at.astype(np.uint32)


def _sum(array: np.ndarray, positions: UInt32[np.ndarray, " _"] | None) -> int:
    """Sums up a part; its positions are those of a whole array where none are given."""
    flat = np.ascontiguousarray(array).reshape(-1)
    words = max(flat.dtype.itemsize // 4, 1)  # two of a number of 8 bytes
    bits = flat.view(f"u{min(flat.dtype.itemsize, 4)}")
    total = 0
    for begin in range(0, len(bits), _BLOCK):
        x = bits[begin : begin + _BLOCK].astype(np.uint32)
        at = np.arange(begin, begin + len(x))
        if positions is not None:
            at = positions[at // words] * np.uint32(words) + (at % words).astype(np.uint32)
        total += int(_mixed(x, at.astype(np.uint32)).sum(dtype=np.uint64))
    return total % 2**32


def _mixed(
    bits: UInt32[np.ndarray, " n"], position: UInt32[np.ndarray, " n"]
) -> UInt32[np.ndarray, " n"]:
    """Mixes elements with their positions; for one position it is a permutation of 32 bits."""
    x = bits + position * np.uint32(0x9E3779B9)
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
