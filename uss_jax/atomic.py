"""Files and folders that appear whole or not at all, also when the power fails."""

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Iterator

from uss_jax.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Temporary files and folders of blocks that have not ended.
_unfinished: set[pathlib.Path] = set()


@contextlib.contextmanager
def replacing(path: str | os.PathLike, flush: bool = True) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path`; it takes `path`'s place when the block succeeds.

    When the block fails, the temporary file goes and what was at `path` stays as it was. An
    operating system's refusal (no space, no permission, no such folder) becomes a UserError.

    Args:
      path: of the file to write.
      flush: whether the file must be whole after a power cut too, see `move`.
    """
    path = pathlib.Path(path)
    # Writers choose their format by the suffix.
    with _temporary(path, f".{path.stem}.{os.getpid()}{path.suffix}") as temporary:
        yield temporary
        if flush:
            move(temporary, path)
        else:
            os.replace(temporary, path)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a path beside `path`, of no folder yet; what the block makes there takes its place.

    As `replacing`; a folder that is at `path` is removed just before.
    """
    path = pathlib.Path(path)
    with _temporary(path, f".{path.name}.{os.getpid()}") as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        move(temporary, path)


@contextlib.contextmanager
def _temporary(path: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
    """Yields a path beside another, which is gone in the end; its name keeps two runs apart."""
    temporary = path.with_name(name)
    _unfinished.add(temporary)
    try:
        yield temporary
    except OSError as error:
        if is_full(error):
            raise UserError(full(path)) from error
        raise UserError(
            f"{path} could not be written ({error.strerror or error}); choose a folder that "
            "exists, may be written to and has space left"
        ) from error
    finally:
        _remove(temporary)
        _unfinished.discard(temporary)


def is_full(error: Exception) -> bool:
    """Whether an error says that the disk is full, or the user's share of it."""
    said = str(error)  # libraries have their own kinds of errors, and keep these words
    return getattr(error, "errno", None) in _FULL or any(os.strerror(x) in said for x in _FULL)


def full(path: str | os.PathLike | None) -> str:
    """The sentence for a full disk."""
    return (
        f"no space is left to write {path or 'a file'}; free some and give the same command again"
    )


def remove_unfinished() -> None:
    """Removes all that is half written, for a process that ends without ending its blocks."""
    for temporary in list(_unfinished):
        _remove(temporary)


def _remove(path: pathlib.Path) -> None:
    try:
        path.unlink()
    except FileNotFoundError:
        pass
    except OSError:  # a folder, or a name that cannot be one
        shutil.rmtree(path, ignore_errors=True)


def move(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Moves a file, or a folder with all below it, once its bytes are on the disk.

    File systems may put a new name on the disk before the bytes behind it: after a power cut the
    name would then lead to an empty file. So the bytes are flushed first, and the new name after
    them; when this returns, both are there to stay.
    """
    if os.path.isdir(source):
        flush_below(source)
    else:
        flush(source)
    os.replace(source, target)
    flush(pathlib.Path(target).parent)


def flush_below(folder: str | os.PathLike) -> None:
    """Flushes all files and folders below a folder, and itself."""
    for inner, _, names in os.walk(folder):
        for name in names:
            flush(os.path.join(inner, name))
        flush(inner)


def flush(path: str | os.PathLike) -> None:
    """Has the disk keep the bytes of a file, or the names in a folder, before it returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems keep names by themselves and refuse to be told to.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)
