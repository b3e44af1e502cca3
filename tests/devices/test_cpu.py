import os
import platform
import subprocess
import sys

import pytest

from uss_jax.devices import cpu

_SCRIPT = """
import ctypes
import resource
import threading
import numpy as np
from uss_jax.devices.cpu import tune_for_cpu

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def work():
    for _ in range(20):
        np.ones(48 << 20, np.uint8)

# Huge pages, as this machine or numpy may ask for, would hide how often pages are asked for.
PR_SET_THP_DISABLE = 41
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
tune_for_cpu()
work()
before = faults()
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="without effect elsewhere")
@pytest.mark.parametrize(
    ("environment", "kept"),
    [
        ({}, True),
        ({"JAX_PLATFORMS": "cpu"}, True),
        ({"JAX_PLATFORMS": "cuda"}, False),
        ({"MALLOC_ARENA_MAX": "4"}, False),
    ],
)
def test_memory_is_kept_on_a_cpu_unless_somebody_has_chosen(environment, kept):
    others = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_TUNABLES", "JAX_PLATFORMS"))
    }
    alone = {**others, **environment}
    ran = subprocess.run(
        [sys.executable, "-c", _SCRIPT], env=alone, capture_output=True, text=True, check=True
    )
    # Another thread takes 20 times 48 MB, 12,288 pages each.
    assert (int(ran.stdout) < 20_000) == kept, ran.stdout


@pytest.mark.parametrize(
    ("flags", "platforms", "wanted"),
    [
        ("", "cpu", "--xla_backend_optimization_level=2"),
        ("--xla_dump_to=a", "cpu", "--xla_dump_to=a --xla_backend_optimization_level=2"),
        ("--xla_backend_optimization_level=3", "cpu", "--xla_backend_optimization_level=3"),
        ("flags.txt", "cpu", "flags.txt"),
        ("", "cuda", ""),
    ],
)
def test_compilation_leaves_out_the_last_level_on_a_cpu(flags, platforms, wanted, monkeypatch):
    monkeypatch.setattr(cpu, "_keep_freed_memory", lambda: None)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setenv("XLA_FLAGS", flags)
    cpu.tune_for_cpu()
    assert os.environ["XLA_FLAGS"] == wanted
