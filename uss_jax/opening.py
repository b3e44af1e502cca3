"""Opening files that people name: nothing that is read waits for ever or never ends."""

import errno
import os
import stat


def at_once(path: str | os.PathLike, flags: int) -> int:
    """Opens a file to read it, as the `opener` of `open`.

    A pipe may be named too, such as a shell's `<(find sounds)`; one that nobody writes to is empty,
    where opening it would otherwise wait for a writer.

    Raises:
      OSError: there is no such file, it may not be read, or it is a device, which may have no end.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    try:
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISCHR(kind) or stat.S_ISBLK(kind):
            raise OSError(errno.EINVAL, "it is a device, no file", os.fspath(path))
        os.set_blocking(descriptor, True)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
