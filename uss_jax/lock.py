"""A folder in which one process works at a time."""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
import time
from collections.abc import Iterator

from uss_jax.errors import UserError

LOCK = ".lock"  # its name
# File systems that know no locks.
_UNKNOWN = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def only_one(folder: str | os.PathLike, remedy: str) -> Iterator[None]:
    """Holds a folder's lock; the operating system gives it back when the process ends, however.

    A POSIX lock of a record, not `flock`: children do not inherit it, so that workers that outlive
    a killed run do not keep it, and NFS passes it on to other machines. It does not part threads of
    one process. Where the file system has no locks, none is held.

    Args:
      folder: that exists.
      remedy: what to do when another process has it, for the message.

    Raises:
      UserError: another process has it; names the process. Or something else has the lock's name.
    """
    path = pathlib.Path(folder) / LOCK
    # Never removed: who opened it before would then hold the lock of a file that nobody sees.
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file, where the lock would be; remove it")
    with open(path, "a+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                holder = file.read(200).strip() or "another process"
                raise UserError(f"{folder} is in use by {holder}; {remedy}") from None
            if error.errno not in _UNKNOWN:
                raise
        else:
            file.truncate(0)
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
            file.flush()
        yield
