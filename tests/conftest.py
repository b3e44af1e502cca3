"""Set up before jax is imported: eight CPU devices and full float32 precision for every test."""

import pathlib

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")

# Machines are shared: how long an example takes says nothing of the code.
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_file():
    """Compiled programs of other files only fill the memory."""
    yield
    jax.clear_caches()


@pytest.fixture
def quick_compilation():
    """Unoptimised programs: for whole runs of a few steps, which would mostly compile."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    """The folder of reference numbers (see tests/golden/README.md)."""
    return GOLDEN
