"""Set up before JAX looks for devices: eight CPU devices, and a precision for every test."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile

import jax
import pytest

from tests.golden import ways
from uss_jax.cli import compiling
from uss_jax.devices import cpu
from uss_jax.devices.mesh import make_mesh

jax.config.update("jax_num_cpu_devices", 8)
cpu.compile_sooner()  # as every command does

# Machines are shared: how long something takes says nothing of the code. Standard error then holds
# no line about a program that compiled for seconds, and no example is too slow.
compiling._PATIENCE_SECONDS = 3600.0
with contextlib.suppress(ModuleNotFoundError):  # golden tests run without it
    import hypothesis

    # The same examples each time, and no record of them in the checkout.
    hypothesis.settings.register_profile(
        "shared machine", deadline=None, derandomize=True, database=None
    )
    hypothesis.settings.load_profile("shared machine")

GOLDEN = pathlib.Path(__file__).parent / "golden"
# The files that take longest: begun first, so that no process is left alone with one at the end.
LONGEST = (
    *("training/test_run", "devices/test_mesh", "devices/test_hosts", "devices/test_watch"),
    *("training/test_separation_step_golden", "separation/test_golden_inference"),
    *("training/test_starting", "models/test_separator", "training/test_texts"),
    *("tests/test_ablations", "devices/test_precision", "training/test_asking"),
    *("training/test_either_tagging_net", "training/test_learning"),
)
# A process that holds more forgets the programs of the files before.
_MOST_BYTES = 2.5e9


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
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def pytest_configure(config):
    _share_programs(config)
    # A shell's background job ignores Ctrl-C, and so would every process that a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Of nets that tests call without saying a precision. The package itself never relies on it:
    # tests/devices/test_precision.py sets another one.
    way = ways.choose(config.getoption("--at"))
    jax.config.update("jax_default_matmul_precision", way.precision)


def pytest_collection_modifyitems(items):
    rank = {name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(f"{item.path.parent.name}/{item.path.stem}", len(rank)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Unoptimised programs for a file with QUICK_COMPILATION, fixtures of any scope included."""
    quick = getattr(item.module, "QUICK_COMPILATION", False)
    if quick != jax.config.values["jax_disable_most_optimizations"]:
        jax.clear_caches()
    _compile_quickly(quick)


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_file(request):
    """Forgets programs of functions that were replaced, or that fill the memory."""
    yield
    tests = [item for item in request.session.items if item.path == request.path]
    fixtures = {name for test in tests for name in test.fixturenames}
    golden = any(test.get_closest_marker("golden") for test in tests)
    if golden or fixtures & {"quick_compilation", "monkeypatch"} or _bytes_used() > _MOST_BYTES:
        jax.clear_caches()


def _bytes_used():
    """The memory that this process holds."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def quick_compilation():
    """Unoptimised programs: for whole runs of a few steps, which would mostly compile."""
    was = jax.config.values["jax_disable_most_optimizations"]
    _compile_quickly(True)
    yield
    _compile_quickly(was)


def _compile_quickly(quick):
    jax.config.update("jax_disable_most_optimizations", quick)


@pytest.fixture(scope="module")
def one_device():
    """Training in this process on one device of the eight: there is less to compile."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("separator", "tagger"):  # by name: golden tests run without their packages
            name = f"uss_jax.training.train_{kind}.make_mesh"
            patch.setattr(name, lambda: make_mesh(jax.devices()[:1]))
        yield


@pytest.fixture
def start():
    """Starts processes, as Popen does, in sessions of their own; none outlives the test."""
    with contextlib.ExitStack() as ends:

        def popen(words, **options):
            process = subprocess.Popen(words, start_new_session=True, **options)
            ends.enter_context(process)  # closes its pipes
            ends.callback(_end, process)
            return process

        yield popen


def _end(process):
    with contextlib.suppress(ProcessLookupError):  # nothing is left of it
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    """The folder of reference numbers (see tests/golden/README.md)."""
    return GOLDEN
