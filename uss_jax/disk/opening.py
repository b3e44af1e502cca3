"""Opens files named by users, without blocking on pipes or reading devices without end."""

import errno
import os
import stat


def absence(path: str | os.PathLike) -> str:
    """Returns what to say of a path at which nothing was found.

    It is "does not exist", or names the target of a symbolic link, which `ls` shows.
    """
    try:
        return f"is a link to {os.readlink(path)}, which does not exist"
    except (OSError, ValueError):  # not a link; no path at all, as with a zero byte
        return "does not exist"


def at_once(path: str | os.PathLike, flags: int) -> int:
    """Opens a file for reading; use as the `opener` of `open`.

    Also opens pipes, such as a shell's `<(find sounds)`; a pipe without a writer reads as empty,
    where a plain `open` would wait for one.

    Raises:
      OSError: the file does not exist, is not readable, or is a device, which may be endless.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    try:
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISCHR(kind) or stat.S_ISBLK(kind):
            raise OSError(errno.EINVAL, "it is a device, not a file", os.fspath(path))
        os.set_blocking(descriptor, True)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
