"""Settings of a process that computes on a CPU."""

import contextlib
import ctypes
import importlib.util
import os

# Parameters of mallopt (glibc's malloc.h) -> values.
_KEEP = {
    -8: 1,  # M_ARENA_MAX: threads share freed memory
    -4: 0,  # M_MMAP_MAX: large blocks come from the heap too
    -1: -1,  # M_TRIM_THRESHOLD: the heap never shrinks
}
_LEVEL = "xla_backend_optimization_level"
_PLUGINS = "jax_plugins", "libtpu"


def tune_for_cpu() -> None:
    """Keeps freed memory and compiles sooner, unless JAX may find an accelerator.

    Call before JAX initialises devices: it reads XLA_FLAGS then, and its threads choose arenas.
    """
    _keep_freed_memory()
    compile_sooner()


def _keep_freed_memory() -> None:
    """Makes a process that computes on a CPU keep freed memory, unless MALLOC_* is set.

    XLA allocates every feature map anew. glibc returns blocks of this size to the kernel, which
    zeroes and maps them again page by page: up to 45 % of a training step, 15 % of a separation.
    The cost is that the process stays at its peak size. No effect with another C library.
    """
    if _may_have_accelerator() or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # the C library is not glibc
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in _KEEP.items():
            mallopt(parameter, value)


def compile_sooner() -> None:
    """Leaves out LLVM's last level of optimisation on a CPU.

    XLA_FLAGS that say a level, or name a file, are left as they are. The last level takes a
    third of the compilation of a training step, mostly for the random draws, and no program here is
    faster for it.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if flags and not flags.startswith("-"):  # the name of a file with flags
        return
    if _LEVEL not in flags and not _may_have_accelerator():
        os.environ["XLA_FLAGS"] = f"{flags} --{_LEVEL}=2".lstrip()


def _may_have_accelerator() -> bool:
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms != "cpu"
    return any(importlib.util.find_spec(name) for name in _PLUGINS)
