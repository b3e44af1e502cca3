"""Fingerprints of trees of arrays: the same on any devices, in any layout, and on the host.

A checkpoint carries one for each of its parts, taken on the devices while the state is saved, so
that a restored state can be held to it: whatever went wrong between the two, in copying, on disk or
by hand, is found. A checksum of files would be of one layout of files, and blind to what came
before them.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Shaped, UInt32

_BLOCK = 1 << 16  # elements that the host mixes at once; they fit the cache
_FETCHED = 1 << 20  # elements of a small array


def fingerprint(tree: Any) -> str:
    """Returns a hash over the paths, shapes, dtypes and bits of a tree's arrays.

    Each array is summed up by 32 bits: the sum, modulo 2^32, of its elements' bits mixed with their
    position. As the mixing is a permutation, a change of any one element always shows; other
    changes go unseen once in 2^32. The sum is of integers, so it does not depend on the order in
    which parts are added: every device sums its own, and hosts add up theirs.

    Args:
      tree: `jax.Array`s, whatever their layout over devices, on all hosts together where they lie
        on several; or numpy arrays. Kinds of containers do not count, only the names and numbers
        that lead to a leaf.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    parts = [_parts(leaf) for _, leaf in leaves]
    # Small arrays are copied: to compile a program for each of their shapes takes longer.
    sums = [[_on_host(x) for x in some] for some in jax.device_get([p.small for p in parts])]
    large = [[_on_device(*part) for part in p.large] for p in parts]
    words = [sum(map(int, a + b)) % 2**32 for a, b in zip(sums, jax.device_get(large), strict=True)]
    spread = [isinstance(x, jax.Array) and not x.is_fully_addressable for _, x in leaves]
    if any(spread):
        of_hosts = multihost_utils.process_allgather(np.array(words, np.uint32))
        added = np.sum(of_hosts, axis=0, dtype=np.uint64) % 2**32
        words = np.where(spread, added, words).tolist()
    lines = []
    for (key, leaf), word in zip(leaves, words, strict=True):
        path = jax.tree_util.keystr(key, simple=True, separator="/")
        lines.append(f"{path} {tuple(leaf.shape)} {leaf.dtype} {word:08x}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


class _Parts(NamedTuple):
    """What of an array this host sums up: all of it, or the parts that no other host counts.

    Attributes:
      small: whole arrays, to be copied to the host.
      large: arguments of `_on_device`.
    """

    small: list[Any]
    large: list[tuple[jax.Array, np.ndarray, tuple[int, ...]]]


def _parts(array: Any) -> _Parts:
    if not isinstance(array, jax.Array):
        return _Parts([array], [])
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    if array.is_fully_replicated and array.size <= _FETCHED:
        return _Parts([shard.data for shard in shards], [])
    # Each on its own device, without collectives: on CPUs, several of these at once can deadlock.
    starts = [np.array([s.start or 0 for s in shard.index], np.uint32) for shard in shards]
    return _Parts([], [(x.data, at, array.shape) for x, at in zip(shards, starts, strict=True)])


def _mixed(bits: Any, position: Any, word: Callable[[int], Any]) -> Any:
    """Mixes elements with their positions; for one position it is a permutation of 32 bits."""
    x = bits + position * word(0x9E3779B9)
    x = (x ^ (x >> word(16))) * word(0x7FEB352D)
    x = (x ^ (x >> word(15))) * word(0x846CA68B)
    return x ^ (x >> word(16))


@functools.partial(jax.jit, static_argnames="shape")
def _on_device(
    part: Shaped[jax.Array, "..."], start: UInt32[Any, " axes"], shape: tuple[int, ...]
) -> UInt32[jax.Array, ""]:
    """Sums up a part of an array of a shape, which begins at the indices `start`."""
    if part.dtype == jnp.bool:
        part = part.astype(jnp.uint8)
    width = min(part.dtype.itemsize, 4)
    bits = jax.lax.bitcast_convert_type(part, f"uint{8 * width}").astype(jnp.uint32)
    halves = part.dtype.itemsize // width  # of 8 bytes, which become another axis
    position, stride = jnp.uint32(0), 1
    if halves > 1:
        position, stride = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, part.ndim), halves
    for axis in reversed(range(part.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) + start[axis]
        position = position + along * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return jnp.sum(_mixed(bits, position, jnp.uint32), dtype=jnp.uint32)


def _on_host(array: Any) -> np.uint32:
    """Sums up a whole array."""
    flat = np.ascontiguousarray(array).reshape(-1)
    bits = flat.view(f"u{min(flat.dtype.itemsize, 4)}")
    total = 0
    for begin in range(0, len(bits), _BLOCK):
        block = bits[begin : begin + _BLOCK].astype(np.uint32)
        position = np.arange(begin, begin + len(block)).astype(np.uint32)
        total += int(_mixed(block, position, np.uint32).sum(dtype=np.uint64))
    return np.uint32(total % 2**32)
