"""Set up before JAX looks for devices: eight CPU devices, and a precision for every test."""

import contextlib
import os
import pathlib
import shutil
import signal
import tempfile

import jax
import pytest

from tests.golden import ways
from uss_jax.cli import compiling

jax.config.update("jax_num_cpu_devices", 8)

# Machines are shared: how long something takes says nothing of the code. Standard error then holds
# no line about a program that compiled for seconds, and no example is too slow.
compiling._PATIENCE_SECONDS = 3600.0
with contextlib.suppress(ModuleNotFoundError):  # golden tests run without it
    import hypothesis

    hypothesis.settings.register_profile("shared machine", deadline=None)
    hypothesis.settings.load_profile("shared machine")

GOLDEN = pathlib.Path(__file__).parent / "golden"


def pytest_addoption(parser):
    parser.addoption(
        "--at",
        choices=ways.WAYS,
        default="highest",
        help="how golden tests compute: the precision of float32 products, or nets in bfloat16",
    )


def _share_programs(config):
    """Keeps compiled programs for all workers and processes of this session.

    Many tests start the same run several times, and a start is mostly compilation.
    """
    if hasattr(config, "workerinput") or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="uss-jax-programs-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def pytest_configure(config):
    _share_programs(config)
    # A shell's background job ignores Ctrl-C, and so would every process that a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Of nets that tests call without saying a precision. The package itself never relies on it:
    # tests/devices/test_precision.py sets another one.
    way = ways.choose(config.getoption("--at"))
    jax.config.update("jax_default_matmul_precision", way.precision)


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_file(request):
    """Unoptimised programs for a file with QUICK_COMPILATION, its fixtures included.

    Compiled programs of other files only fill the memory.
    """
    _compile_quickly(getattr(request.module, "QUICK_COMPILATION", False))
    yield
    _compile_quickly(False)
    jax.clear_caches()


@pytest.fixture
def quick_compilation():
    """Unoptimised programs: for whole runs of a few steps, which would mostly compile."""
    _compile_quickly(True)
    yield
    _compile_quickly(False)


def _compile_quickly(quick):
    jax.config.update("jax_disable_most_optimizations", quick)


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    """The folder of reference numbers (see tests/golden/README.md)."""
    return GOLDEN
