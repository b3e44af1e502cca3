"""Atomic writes of files and folders, safe against power cuts."""

import contextlib
import errno
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator

from uss_jax.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Hosts that share a disk may have equal process ids: that of a container is 1.
_HOST = secrets.token_hex(4)
# Temporary files and folders of `with` blocks still running, and those of `until_exit`.
_unfinished: set[pathlib.Path] = set()
# Folders made for them that did not exist before, the deepest first.
_new_folders: list[pathlib.Path] = []


def owner() -> str:
    """Returns a name of this process, unlike that of any other on any host."""
    return f"{os.getpid()}-{_HOST}"


@contextlib.contextmanager
def replacing(path: str | os.PathLike, flush: bool = True) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path`, which replaces `path` when the block succeeds.

    When the block fails, the temporary file is removed and `path` is left unchanged.

    Args:
      path: file to write.
      flush: whether the file must also survive a power cut, see `move`.

    Raises:
      UserError: in place of an OSError (no space, no permission, no such folder).
    """
    path = pathlib.Path(path)
    # Keeps the suffix, from which some writers choose their format.
    with _temporary(path, f".{path.stem}.{owner()}{path.suffix}") as temporary:
        yield temporary
        if flush:
            move(temporary, path)
        else:
            os.replace(temporary, path)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields an unused path beside `path`; the folder that the block makes there replaces `path`.

    Like `replacing`, but an old folder at `path` is removed just before the replacement. Folders
    above it are made, and removed again when the block fails.
    """
    path = pathlib.Path(path)
    new = [above for above in path.parents if not os.path.lexists(above)]
    _new_folders[:0] = new
    try:
        with _temporary(path, f".{path.name}.{owner()}") as temporary:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if path.is_dir():
                shutil.rmtree(path)
            move(temporary, path)
    except BaseException:
        _remove_empty(new)
        raise
    finally:
        for above in new:
            _new_folders.remove(above)


@contextlib.contextmanager
def _temporary(path: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
    """Yields the path `name` beside `path` and removes it on exit.

    `name` must hold `owner`, so that concurrent runs do not collide.
    """
    temporary = path.with_name(name)
    _unfinished.add(temporary)
    try:
        yield temporary
    except OSError as error:
        if is_full(error):
            raise UserError(full(path)) from error
        raise UserError(
            f"{path} could not be written ({error.strerror or error}); choose a folder that "
            "exists, is writable and has free space"
        ) from error
    finally:
        _remove(temporary)
        _unfinished.discard(temporary)


def is_full(error: Exception) -> bool:
    """Returns whether an error, or what it was raised from, is a full disk or exceeded quota."""
    return stems_from(error, _FULL)


def stems_from(error: Exception, numbers: Collection[int]) -> bool:
    """Returns whether an error, or what it was raised from, has one of these `errno`."""
    said = str(error)  # libraries raise their own exception types, but keep this text
    if getattr(error, "errno", None) in numbers or any(os.strerror(x) in said for x in numbers):
        return True
    return isinstance(error.__cause__, Exception) and stems_from(error.__cause__, numbers)


def full(path: str | os.PathLike | None) -> str:
    """Returns the error message for a full disk."""
    return f"no space is left to write {path or 'a file'}; free some and run the same command again"


def remove_unfinished() -> None:
    """Removes all temporary files, for a process that exits without leaving its `with` blocks."""
    for temporary in list(_unfinished):
        _remove(temporary)
    _remove_empty(list(_new_folders))


def until_exit(path: str | os.PathLike) -> Callable[[], None]:
    """Has `remove_unfinished` remove a temporary file; returns what removes it before that."""
    path = pathlib.Path(path)
    _unfinished.add(path)

    def remove() -> None:
        _remove(path)
        _unfinished.discard(path)

    return remove


def _remove_empty(folders: Iterable[pathlib.Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # something else is in it
            folder.rmdir()


def _remove(path: pathlib.Path) -> None:
    try:
        path.unlink()
    except FileNotFoundError:
        pass
    except OSError:  # a folder, or an invalid name
        shutil.rmtree(path, ignore_errors=True)


def move(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Moves a file or a folder durably: on return, its bytes and its new name are on disk.

    File systems may write a new name to disk before the file's bytes, and a power cut would then
    leave an empty file. So the bytes are flushed first, and the name after them.
    """
    if os.path.isdir(source):
        flush_below(source)
    else:
        flush(source)
    os.replace(source, target)
    flush(pathlib.Path(target).parent)


def flush_below(folder: str | os.PathLike) -> None:
    """Flushes a folder and everything below it to disk."""
    for inner, _, names in os.walk(folder):
        for name in names:
            flush(os.path.join(inner, name))
        flush(inner)


def flush(path: str | os.PathLike) -> None:
    """Flushes the bytes of a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems persist names by themselves and reject fsync of a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)
