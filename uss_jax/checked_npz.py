"""Arrays from .npz files that others may have written: sizes, types and shapes are checked first.

Nothing is unpickled, and no array is allocated before its member of the archive was found to have
the size, type and shape that were declared. Memory: the arrays that are asked for take at most
INFLATION times the bytes of the file.
"""

import dataclasses
import io
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np

INFLATION = 32
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# What zipfile and numpy raise on archives that are damaged or not of their kind.
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
    """What an array must be.

    Attributes:
      dtype: such as "u4"; "U" and "S" stand for texts and bytes of any width.
      shape: a letter or a number for each axis; axes of the same letter, in all columns of a file,
        have the same length. "" is a scalar, "r k" a matrix.
      optional: the file may be without it.
    """

    dtype: str
    shape: str = ""
    optional: bool = False


def read_npz(file: io.IOBase, columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
    """Reads the declared arrays of an .npz file; other members are left unread.

    Args:
      file: opened to be read, seekable.
      columns: name and kind of each array.

    Raises:
      ValueError: it is no .npz file, is damaged, or an array is missing or of another kind.
      OSError: reading failed.
    """
    try:
        return _read(file, columns)
    except OSError:
        raise
    except _DAMAGE as error:
        # Their texts may hold parts of the file.
        words = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(words) from error


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
            f"claims {total:,} bytes of arrays in a file of {file_size:,}, more than {INFLATION} "
            "times as many"
        )
    for name, member in members.items():
        stored = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if member.compress_type not in stored or member.flag_bits & 1:
            raise ValueError(f"has the array {name!r} encrypted or packed in an unknown way")


def _check_header(
    stream: io.IOBase, name: str, size: int, column: Column, lengths: dict[str, int]
) -> None:
    """Compares an array's header with what was declared and with the bytes that are there."""
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"has the array {name!r} in the format {version}")
    shape, _, dtype = _HEADERS[version](stream)
    if dtype.hasobject or not _same_kind(dtype, column.dtype):
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
    # Items of no bytes would let a shape of any size through.
    sound = min(shape, default=0) >= 0 and (dtype.itemsize or not math.prod(shape))
    if not sound or math.prod(shape) * dtype.itemsize != bytes_there:
        raise ValueError(f"has {bytes_there} bytes for the array {name!r} of shape {shape}")


def _same_kind(dtype: np.dtype, expected: str) -> bool:
    if expected in ("U", "S"):
        return dtype.kind == expected and dtype.isnative and dtype.names is None
    return dtype == np.dtype(expected)
