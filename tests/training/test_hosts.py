"""Two processes of two devices train as one process of four, and one of them writes."""

import json
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.tiny import CONFIGS, train_words, write_place
from uss_jax.training.checkpoints import Checkpoints

SCRIPT = """
import sys
import jax
devices, address, hosts, host, *words = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", int(devices))
jax.config.update("jax_disable_most_optimizations", True)
if int(hosts) > 1:
    jax.distributed.initialize(address, int(hosts), int(host))
from uss_jax.cli.main import main
sys.exit(main(words))
"""


def _run(words, hosts):
    """What each host prints, less what the collectives' library does."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(4 // hosts), address, str(hosts), str(host), *words],
            cwd=CONFIGS.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(hosts)
    ]
    ended = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * hosts, "\n".join(
        err for _, err in ended
    )
    return [[line for line in out.splitlines() if "Gloo" not in line] for out, _ in ended]


def _metrics(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return np.array([[line["step"], line["loss"]] for line in lines])


@pytest.mark.long
def test_two_hosts_train_as_one_and_one_goes_on_alone(tmp_path):
    place = write_place(tmp_path / "place")
    light = {"anchors.source": "random", "query.kind": "one_hot"}
    words = lambda name, steps: train_words(  # noqa: E731
        "resunet30.py", place, tmp_path / name, {**light, "total_steps": steps}
    )
    _run(words("one", 4), hosts=1)
    first, second = _run(words("two", 2), hosts=2)
    assert any("on 4 devices" in line for line in first)
    assert second == []
    assert len(list((tmp_path / "two").glob("events.*"))) == 1
    _run(words("two", 4), hosts=1)

    # Sums in another order, in float32.
    np.testing.assert_allclose(_metrics(tmp_path / "two"), _metrics(tmp_path / "one"), rtol=1e-4)
    params = []
    for name in ("one", "two"):
        with Checkpoints(tmp_path / name / "checkpoints", keep=None) as checkpoints:
            params.append(checkpoints.read(4, "params"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *params)
