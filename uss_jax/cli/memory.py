"""Memory of a process that computes on a CPU."""

import contextlib
import ctypes
import importlib.util
import os

# Of glibc's malloc.h: parameters of mallopt and what they are set to.
_KEEP = {
    -8: 1,  # M_ARENA_MAX: what one thread frees, another takes
    -4: 0,  # M_MMAP_MAX: large blocks too come from what is kept
    -1: -1,  # M_TRIM_THRESHOLD: nothing goes back
}
_PLUGINS = "jax_plugins", "libtpu"


def keep_freed_memory() -> None:
    """Has a process that computes on a CPU keep the memory it frees, unless MALLOC_* is set.

    XLA allocates every feature map anew. glibc gives blocks of this size back to the kernel, which
    hands them out again zeroed and page by page: up to 45 % of a training step, 15 % of a
    separation. The process then stays as large as it ever was. Without effect with another C
    library or where JAX may find an accelerator. To be called before JAX looks for devices, whose
    threads choose their arenas then.
    """
    if _may_have_accelerator() or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in _KEEP.items():
            mallopt(parameter, value)


def _may_have_accelerator() -> bool:
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms != "cpu"
    return any(importlib.util.find_spec(name) for name in _PLUGINS)
