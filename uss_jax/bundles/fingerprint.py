"""Fingerprints of trees of arrays, independent of devices and layout.

A checkpoint holds one for each part of the saved state, against which a restored state is checked:
this finds any change in between, on disk or by hand. Checksums of files would depend on the layout
of the files, and miss errors made before they were written.
"""

import hashlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import UInt32

_BLOCK = 1 << 16  # elements mixed at once; they fit into the cache


def fingerprint(tree: Any) -> str:
    """Returns a hash of the paths, shapes, dtypes and bits of a tree's arrays.

    Each array is reduced to 32 bits: the sum, modulo 2^32, of its elements' bits mixed with their
    positions. The mixing is a permutation, so a change of any one element is always detected; other
    changes are missed with probability 2^-32. An integer sum does not depend on the order of its
    terms, so each host sums its own shards, and the hosts add up their sums.

    Args:
      tree: numpy arrays, or `jax.Array`s in any layout; if they span several hosts, all hosts must
        call this function. Container types do not matter, only the keys and indices of each leaf.
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
    """Maps the path of each leaf, its keys and indices joined by "/", to the leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_of(key): leaf for key, leaf in leaves}


def path_of(key: tuple[Any, ...]) -> str:
    """Returns the path of a leaf from its `jax.tree_util` key path."""
    return jax.tree_util.keystr(key, simple=True, separator="/")


def _sum_here(array: Any) -> int:
    """Returns the sum of an array, or this host's share of it: one replica of each shard."""
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
    """Returns the row-major positions, modulo 2^32, of a part's elements in the whole array."""
    at = np.zeros(1, np.uint64)
    for size, part in zip(shape, index, strict=True):
        at = (at[:, None] * np.uint64(size) + np.arange(size, dtype=np.uint64)[part]).reshape(-1)
    return at.astype(np.uint32)


def _sum(array: np.ndarray, positions: UInt32[np.ndarray, " _"] | None) -> int:
    """Returns the sum of a part at `positions`, or of a whole array if None."""
    flat = np.ascontiguousarray(array).reshape(-1)
    words = max(flat.dtype.itemsize // 4, 1)  # 8-byte elements are two words
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
    """Mixes bits with their positions; a permutation of 32-bit words at any fixed position."""
    x = bits + position * np.uint32(0x9E3779B9)
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
