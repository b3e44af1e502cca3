"""Fingerprints of trees of arrays: the same on any devices, in any layout, and on the host.

A checkpoint carries one for each of its parts, taken on the devices while the state is saved, so
that a restored state can be held to it: whatever went wrong between the two, in copying, on disk or
by hand, is found. A checksum of files would be of one layout of files, and blind to what came
before them.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped, UInt32

_BLOCK = 1 << 16  # elements that the host mixes at once; they fit the cache
_FETCHED = 1 << 20  # elements of a small array


def fingerprint(tree: Any) -> str:
    """Returns a hash over the paths, shapes, dtypes and bits of a tree's arrays.

    Each array is summed up by 32 bits: the sum, modulo 2^32, of its elements' bits mixed with their
    position. As the mixing is a permutation, a change of any one element always shows; other
    changes go unseen once in 2^32. The sum is of integers, so it does not depend on the order in
    which devices add.

    Args:
      tree: `jax.Array`s, which stay on their devices, whatever their layout over these; or numpy
        arrays. Kinds of containers do not count, only the names and numbers that lead to a leaf.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # Small arrays are copied: to compile a program for each of their shapes takes longer.
    fetched = jax.device_get([x if _is_small(x) else None for _, x in leaves])
    words = [
        _on_device(x) if isinstance(x, jax.Array) and copy is None else _on_host(copy)
        for (_, x), copy in zip(leaves, fetched, strict=True)
    ]
    lines = []
    for (key, leaf), word in zip(leaves, jax.device_get(words), strict=True):
        path = jax.tree_util.keystr(key, simple=True, separator="/")
        lines.append(f"{path} {tuple(leaf.shape)} {leaf.dtype} {int(word):08x}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _is_small(array: Any) -> bool:
    if isinstance(array, jax.Array):
        return array.is_fully_replicated and array.size <= _FETCHED
    return True


def _mixed(bits: Any, position: Any, word: Callable[[int], Any]) -> Any:
    """Mixes elements with their positions; for one position it is a permutation of 32 bits."""
    x = bits + position * word(0x9E3779B9)
    x = (x ^ (x >> word(16))) * word(0x7FEB352D)
    x = (x ^ (x >> word(15))) * word(0x846CA68B)
    return x ^ (x >> word(16))


@jax.jit
def _on_device(array: Shaped[jax.Array, "..."]) -> UInt32[jax.Array, ""]:
    if array.dtype == jnp.bool:
        array = array.astype(jnp.uint8)
    width = min(array.dtype.itemsize, 4)
    bits = jax.lax.bitcast_convert_type(array, f"uint{8 * width}").astype(jnp.uint32)
    # Row-major positions from each axis by itself: a reshape would gather what is sharded.
    position, stride = jnp.uint32(0), 1
    for axis in reversed(range(bits.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position = position + along * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(_mixed(bits, position, jnp.uint32), dtype=jnp.uint32)


def _on_host(array: Shaped[np.ndarray, "..."]) -> np.uint32:
    flat = np.ascontiguousarray(array).reshape(-1)
    bits = flat.view(f"u{min(flat.dtype.itemsize, 4)}")
    total = 0
    for begin in range(0, len(bits), _BLOCK):
        block = bits[begin : begin + _BLOCK].astype(np.uint32)
        position = np.arange(begin, begin + len(block)).astype(np.uint32)
        total += int(_mixed(block, position, np.uint32).sum(dtype=np.uint64))
    return np.uint32(total % 2**32)
