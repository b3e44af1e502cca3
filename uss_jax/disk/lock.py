"""Locks a folder for one process at a time."""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
import time
from collections.abc import Iterator

from uss_jax.errors import UserError

LOCK = ".lock"  # file name


class InUse(UserError):
    """Another process holds the lock."""


# Errors of file systems without locks.
_UNKNOWN = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def in_turn(folder: str | os.PathLike) -> Iterator[None]:
    """Waits until no other process is in such a block of the same folder, for short work.

    The folder itself is locked, which leaves no file behind. On a file system without such locks,
    none is held.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def only_one(folder: str | os.PathLike, remedy: str) -> Iterator[None]:
    """Holds a folder's lock, which the operating system releases whenever the process ends.

    A POSIX record lock rather than `flock`: children do not inherit it, so workers that outlive a
    killed run do not keep it, and NFS shares it between machines. It does not exclude threads of
    the same process. On a file system without locks, none is held.

    Args:
      folder: an existing folder.
      remedy: advice for the error message if another process holds the lock.

    Raises:
      FileNotFoundError: the folder is gone, as where another process has just finished the work.
      InUse: another process holds the lock; the message names it.
      UserError: the lock's path is not a file, or the file cannot be written to.
    """
    path = pathlib.Path(folder) / LOCK
    # Never removed: a process that already has it open would then lock a deleted file.
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is where the lock file must be, but is not a file; remove it")
    try:
        file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115, closed below
    except OSError as error:
        if not path.parent.exists():
            raise
        raise UserError(
            f"{path} cannot be opened for writing ({error.strerror}); if another user has made it, "
            "ask for write permission, or choose another folder"
        ) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                holder = file.read(200).strip() or "another process"
                raise InUse(f"{folder} is in use by {holder}; {remedy}") from None
            if error.errno not in _UNKNOWN:
                raise
        else:
            file.truncate(0)
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
            file.flush()
        yield
