"""Folders of shards, on disk or in a bucket (gs://, s3://, ...). The only importer of fsspec.

fsspec rather than etils.epath: it requests a byte range of an object in one call, and many ranges
concurrently. epath opens an object and seeks, which reads whole blocks ahead and needs one handle
per thread.
"""

import contextlib
import io
import os
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from uss_jax.disk.atomic import replacing
from uss_jax.disk.opening import at_once
from uss_jax.errors import UserError

_OPEN_FILES = 512  # the usual limit per process is 1024
_READ_AHEAD = 1 << 20


class Range(NamedTuple):
    """A byte range of a file that starts at `offset`, and the buffers that it fills in turn."""

    name: str
    offset: int
    buffers: list[UInt8[np.ndarray, " _"]]

    @property
    def size(self) -> int:
        """Length, in bytes."""
        return sum(map(len, self.buffers))


@runtime_checkable
class Folder(Protocol):
    """A folder of files.

    Failures are OSErrors with a readable `strerror`. `str()` of a folder is its path.
    """

    def sizes(self) -> dict[str, int]:
        """Maps the name of each file directly in the folder to its size, in bytes."""
        ...

    def size(self, name: str) -> int:
        """Returns the size of a file, in bytes."""
        ...

    def stamp(self, name: str) -> str:
        """Returns a string that changes when the file does."""
        ...

    def open(self, name: str) -> io.IOBase:
        """Opens a file for reading."""
        ...

    def read_into(self, ranges: Sequence[Range]) -> list[int | OSError]:
        """Fills the buffers of each range. Thread-safe.

        Returns:
          For each range, the number of bytes read (fewer where the file ends), or the error.
        """
        ...

    def replacing(self, name: str) -> contextlib.AbstractContextManager[pathlib.Path]:
        """Yields a local path to write; `name` is replaced atomically when the block succeeds."""
        ...

    def remove(self, name: str) -> None:
        """Removes a subfolder, if it exists."""
        ...

    def close(self) -> None:
        """Closes open files; reading opens them again."""
        ...


def open_folder(path: str | os.PathLike) -> Folder:
    """Opens the folder at a path, or at a URL such as gs://bucket/records.

    Raises:
      UserError: no installed package can read this kind of URL.
    """
    return BucketFolder(os.fspath(path)) if "://" in os.fspath(path) else DiskFolder(path)


def split_path(path: str | os.PathLike) -> tuple[str, str]:
    """Splits a path or URL into (folder, name)."""
    folder, _, name = os.fspath(path).rpartition("/")
    return folder or ("/" if os.fspath(path).startswith("/") else "."), name


def versions_below(path: str | os.PathLike) -> str:
    """Returns a hint for an error message if records lie one or two folders below, else ""."""
    if "://" in os.fspath(path):
        return ""
    found = [
        folder.parent
        for pattern in ("*/metadata.json", "*/*/metadata.json")
        for folder in sorted(pathlib.Path(path).glob(pattern))
    ]
    return f"; did you mean {found[-1]}?" if found else ""


class DiskFolder:
    """A local folder; files stay open between reads."""

    def __init__(self, path: str | os.PathLike):
        self._path = pathlib.Path(path)
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return str(self._path)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self._path}  # another process opens its own files

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])

    def sizes(self) -> dict[str, int]:
        with os.scandir(self._path) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

    def size(self, name: str) -> int:
        return (self._path / name).stat().st_size

    def stamp(self, name: str) -> str:
        status = (self._path / name).stat()
        return f"{status.st_size} {status.st_mtime_ns}"

    def open(self, name: str) -> io.IOBase:
        return open(self._path / name, "rb", buffering=_READ_AHEAD, opener=at_once)

    def read_into(self, ranges: Sequence[Range]) -> list[int | OSError]:
        return [self._read_one(some) for some in ranges]

    def _read_one(self, some: Range) -> int | OSError:
        try:
            descriptor, keep = self._descriptor(some.name)
            try:
                # Reads directly into the buffers, with the GIL released.
                return os.preadv(descriptor, some.buffers, some.offset)
            finally:
                if not keep:
                    os.close(descriptor)
        except OSError as error:
            return error

    def _descriptor(self, name: str) -> tuple[int, bool]:
        """Returns a file descriptor, and whether it stays open for the next read."""
        with self._lock:
            if name in self._descriptors:
                return self._descriptors[name], True
            descriptor = os.open(self._path / name, os.O_RDONLY)
            keep = len(self._descriptors) < _OPEN_FILES
            if keep:
                self._descriptors[name] = descriptor
            return descriptor, keep

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[pathlib.Path]:
        with replacing(self._path / name) as temporary:
            temporary.parent.mkdir(exist_ok=True)
            yield temporary

    def remove(self, name: str) -> None:
        shutil.rmtree(self._path / name, ignore_errors=True)

    def close(self) -> None:
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def __del__(self) -> None:
        self.close()


class BucketFolder:
    """A folder of an object store; every read requests exactly the bytes it needs."""

    def __init__(self, url: str):
        import fsspec

        self._url = url.rstrip("/")
        try:
            self._files, self._path = fsspec.url_to_fs(self._url)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"{url} cannot be opened ({error}); install the fsspec package for it, such as "
                "gcsfs for gs:// or s3fs for s3://"
            ) from None

    def __str__(self) -> str:
        return self._url

    def sizes(self) -> dict[str, int]:
        with self._as_os_errors():
            listed = self._files.ls(self._path, detail=True)
        return {
            entry["name"].rpartition("/")[2]: int(entry["size"])
            for entry in listed
            if entry["type"] == "file"
        }

    def size(self, name: str) -> int:
        with self._as_os_errors():
            return int(self._files.size(f"{self._path}/{name}"))

    def stamp(self, name: str) -> str:
        with self._as_os_errors():
            return str(self._files.ukey(f"{self._path}/{name}"))

    def open(self, name: str) -> io.IOBase:
        with self._as_os_errors():
            return self._files.open(f"{self._path}/{name}", "rb", block_size=8 * _READ_AHEAD)

    def read_into(self, ranges: Sequence[Range]) -> list[int | OSError]:
        # Stores with an asynchronous client (GCS, S3, HTTP) get all requests concurrently.
        found = self._files.cat_ranges(
            [f"{self._path}/{some.name}" for some in ranges],
            [some.offset for some in ranges],
            [some.offset + some.size for some in ranges],
            on_error="return",
        )
        return [
            _as_os_error(data) if isinstance(data, Exception) else _scatter(data, some.buffers)
            for data, some in zip(found, ranges, strict=True)
        ]

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[pathlib.Path]:
        with tempfile.TemporaryDirectory() as temporary:
            path = pathlib.Path(temporary) / split_path(name)[1]
            yield path
            try:
                with self._as_os_errors():
                    self._files.put_file(os.fspath(path), f"{self._path}/{name}")
            except OSError as error:
                raise UserError(
                    f"{self._url}/{name} could not be written ({error.strerror or error}); check "
                    "that the bucket exists and is writable"
                ) from error

    def remove(self, name: str) -> None:
        with contextlib.suppress(OSError), self._as_os_errors():
            self._files.rm(f"{self._path}/{name}", recursive=True)

    def close(self) -> None:
        pass

    @contextlib.contextmanager
    def _as_os_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise _as_os_error(error) from error


def _as_os_error(error: Exception) -> OSError:
    """Converts a store's own exception to an OSError with a `strerror`."""
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(2, "No such file or directory", str(error))
    return error if isinstance(error, OSError) else OSError(5, f"{type(error).__name__}: {error}")


def _scatter(data: bytes, buffers: Sequence[UInt8[np.ndarray, " _"]]) -> int:
    """Copies bytes into buffers, one after the other; returns the number copied."""
    found, at = np.frombuffer(data, np.uint8), 0
    for buffer in buffers:
        piece = found[at : at + len(buffer)]
        buffer[: len(piece)] = piece
        at += len(piece)
    return at
