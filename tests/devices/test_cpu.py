import os
import platform
import subprocess
import sys

import pytest

_SCRIPT = """
import resource
import threading
import numpy as np
from uss_jax.devices.memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def work():
    for _ in range(20):
        np.ones(48 << 20, np.uint8)

keep_freed_memory()
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
        if not name.startswith(("MALLOC_", "JAX_PLATFORMS"))
    }
    # numpy's own request for huge pages would hide how often pages are asked for.
    alone = {**others, "NUMPY_MADVISE_HUGEPAGE": "0", **environment}
    ran = subprocess.run(
        [sys.executable, "-c", _SCRIPT], env=alone, capture_output=True, text=True, check=True
    )
    # Another thread takes 20 times 48 MB, 12,288 pages each.
    assert (int(ran.stdout) < 20_000) == kept, ran.stdout
