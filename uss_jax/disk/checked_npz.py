"""Reads arrays from untrusted .npz files: sizes, types and shapes are checked first.

Nothing is unpickled, and an array is only allocated once its archive member is known to have the
declared size, type and shape. Memory: the requested arrays take at most INFLATION times the bytes
of the file.
"""

import contextlib
import dataclasses
import io
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping

import numpy as np

from uss_jax.disk.checked_json import shown
from uss_jax.disk.opening import at_once

INFLATION = 32
# Number of bytes of a header's length, by version of the format; and a header as numpy writes it.
# Numpy itself takes more, but guesses what a damaged header meant, and warns. What is well formed
# but not allowed, objects and negative lengths, is refused by name afterwards.
_LENGTHS = {(1, 0): 2, (2, 0): 4}
_LONGEST_HEADER = 10_000
_NUMBER = rb"-?(?:0|[1-9][0-9]{0,18})"
_HEADER = re.compile(
    rb"\{'descr': '(?P<type>[<>|=]?[biufSUO][0-9]{0,9})', 'fortran_order': (?:True|False), "
    rb"'shape': \((?P<shape>|%s,|%s(?:, %s)+)\), \} *\n?" % ((_NUMBER,) * 3)
)
# Exceptions of zipfile and numpy for damaged or invalid archives.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    KeyError,
    TypeError,
    ValueError,
    OverflowError,
    NotImplementedError,
    RecursionError,
    MemoryError,
)


@dataclasses.dataclass(frozen=True)
class Column:
    """The declared type and shape of an array.

    Attributes:
      dtype: NumPy dtype, such as "u4"; "U" and "S" stand for strings and bytes of any width.
      shape: a letter or a number for each axis; axes with the same letter, in all columns of a
        file, have the same length. "" is a scalar, "r k" a matrix.
      optional: whether the array may be missing.
    """

    dtype: str
    shape: str = ""
    optional: bool = False


def read_npz(file: io.IOBase, columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
    """Reads the declared arrays of an .npz file; other members are left unread.

    Args:
      file: binary file open for reading, seekable.
      columns: declaration of each array, by name.

    Raises:
      ValueError: the file is not an .npz file or is damaged, or an array is missing or not as
        declared.
      OSError: reading failed.
    """
    with _damage_said():
        return _read(file, columns)


def map_npy(
    path: str | os.PathLike, name: str, column: Column, lengths: Mapping[str, int]
) -> np.ndarray:
    """Maps the array of an .npy file into memory, read-only.

    Args:
      path: the file.
      name: name of the array, for messages.
      column: its declaration.
      lengths: length of each axis, by its letter.

    Raises:
      ValueError: the file is not an .npy file or is damaged, or its array is not as declared.
      OSError: reading failed.
    """
    with _damage_said(), open(path, "rb", opener=at_once) as file:
        size = os.fstat(file.fileno()).st_size
        _check_header(file, name, size, column, dict(lengths))
        return np.lib.format.open_memmap(path, mode="r")


@contextlib.contextmanager
def _damage_said() -> Iterator[None]:
    """Raises a ValueError in place of what zipfile and numpy raise for damaged files."""
    try:
        yield
    except OSError:
        raise
    except _DAMAGE as error:
        # Truncated, as their messages may quote the file's contents.
        words = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(words) from error


def names_in_npz(file: io.IOBase) -> set[str]:
    """Returns the names of the arrays in an .npz file; raises a ValueError for other files."""
    with _damage_said(), zipfile.ZipFile(file) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def _read(file: io.IOBase, columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
    size = file.seek(0, 2)
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        wanted = {}
        for name, column in columns.items():
            if f"{name}.npy" in members:
                wanted[name] = members[f"{name}.npy"]
            elif not column.optional:
                raise ValueError(f"has no array {name!r}")
        _check_sizes(wanted, size)
        lengths: dict[str, int] = {}
        arrays = {}
        for name, member in wanted.items():
            with archive.open(member) as stream:
                _check_header(stream, name, member.file_size, columns[name], lengths)
            with archive.open(member) as stream:
                arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
    return arrays


def _check_sizes(members: Mapping[str, zipfile.ZipInfo], file_size: int) -> None:
    total = sum(member.file_size for member in members.values())
    if total > INFLATION * file_size:
        raise ValueError(
            f"declares {total:,} bytes of arrays in a file of {file_size:,} bytes, more than "
            f"{INFLATION} times its size"
        )
    for name, member in members.items():
        stored = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if member.compress_type not in stored or member.flag_bits & 1:
            raise ValueError(
                f"has the array {name!r} encrypted or compressed in an unsupported way"
            )


def _check_header(
    stream: io.IOBase, name: str, size: int, column: Column, lengths: dict[str, int]
) -> None:
    """Checks an array's header against its declaration and the size of its archive member."""
    shape, dtype = _read_header(stream, name)
    if not _same_kind(dtype, column.dtype):
        raise ValueError(f"has the array {name!r} of type {dtype}, expected {column.dtype}")
    axes = column.shape.split()
    fits = len(shape) == len(axes) and all(
        lengths.setdefault(axis, length) == length if axis.isalpha() else length == int(axis)
        for axis, length in zip(axes, shape, strict=False)
    )
    if not fits:
        known = " ".join(f"{axis}={lengths[axis]}" for axis in axes if axis in lengths)
        raise ValueError(
            f"has the array {name!r} of shape {shape}, expected [{column.shape}]"
            + (f" with {known}" if known else "")
        )
    bytes_there = size - stream.tell()
    # With zero-byte items, a shape of any size would pass.
    sound = min(shape, default=0) >= 0 and (dtype.itemsize or not math.prod(shape))
    if not sound or math.prod(shape) * dtype.itemsize != bytes_there:
        raise ValueError(
            f"has {bytes_there} bytes for the array {name!r}, which do not match its shape {shape}"
        )


def _read_header(stream: io.IOBase, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Reads an array's header; returns its shape and type."""
    version = np.lib.format.read_magic(stream)
    if version not in _LENGTHS:
        raise ValueError(f"has the array {name!r} in the unsupported .npy format {version}")
    length = int.from_bytes(stream.read(_LENGTHS[version]), "little")
    header = stream.read(length) if length <= _LONGEST_HEADER else b""
    found = _HEADER.fullmatch(header)
    text = shown(header.decode("latin-1").strip())
    if len(header) != length or not found:
        raise ValueError(
            f"has the array {name!r} with the header {text}, which is not one of numbers or texts"
        )
    shape = tuple(int(axis) for axis in found["shape"].split(b",") if axis.strip())
    return shape, np.dtype(found["type"].decode())


def _same_kind(dtype: np.dtype, expected: str) -> bool:
    if expected in ("U", "S"):
        return dtype.kind == expected and dtype.isnative and dtype.names is None
    return dtype == np.dtype(expected)
