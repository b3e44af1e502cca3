"""Two processes of two devices train as one process of four, and one of them writes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.tiny import CONFIGS, train_words, write_pairs, write_place
from uss_jax.errors import UserError
from uss_jax.training.checkpoints import Checkpoints, latest_step
from uss_jax.training.hosts import ENVIRONMENT, join_hosts
from uss_jax.training.throughput import read_ledger

LIGHT = {"anchors.source": "random", "query.kind": "one_hot"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts `uss-jax` words on four devices of so many processes, which compile once."""
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
    }

    def start(words, hosts):
        return subprocess.Popen(
            ["bash", "launch/local.sh", str(hosts), *words],
            cwd=CONFIGS.parent,
            env={**environment, "JAX_NUM_CPU_DEVICES": str(4 // hosts)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def _printed(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def _metrics(workdir, name="loss"):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return np.array([[line["step"], line[name]] for line in lines if name in line])


@pytest.mark.long
def test_two_hosts_train_as_one_and_one_goes_on_alone(place, start, tmp_path):
    write_pairs(tmp_path / "pairs", [3, 3, 3, 7, 9])
    changed = {**LIGHT, "eval.pairs": tmp_path / "pairs", "eval.every_steps": 2}
    words = lambda name, steps: train_words(  # noqa: E731
        "resunet30.py", place, tmp_path / name, {**changed, "total_steps": steps}
    )
    _printed(start(words("one", 4), hosts=1))
    assert _printed(start(words("two", 2), hosts=2)).count("on 4 devices") == 1
    assert read_ledger(tmp_path / "two")[0]["hosts"] == 2
    assert len(list((tmp_path / "two").glob("events.*"))) == 1
    _printed(start(words("two", 4), hosts=1))

    # Sums in another order, in float32.
    np.testing.assert_allclose(_metrics(tmp_path / "two"), _metrics(tmp_path / "one"), rtol=1e-4)
    sdri = [_metrics(tmp_path / name, "eval/sdri") for name in ("two", "one")]
    np.testing.assert_allclose(*sdri, atol=1e-3)
    assert sdri[0][:, 0].tolist() == [2, 4]
    params = []
    for name in ("one", "two"):
        with Checkpoints(tmp_path / name / "checkpoints", keep=None) as checkpoints:
            params.append(checkpoints.read(4, "params"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *params)


@pytest.mark.long
def test_sigterm_to_one_host_stops_all_after_the_same_step_saved(place, start, tmp_path):
    """The host that does not write gets it."""
    changed = {**LIGHT, "total_steps": 100_000, "checkpoint_every_steps": 100_000}
    workdir = tmp_path / "run"
    started = start(train_words("resunet30.py", place, workdir, changed), hosts=2)
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and started.poll() is None:
        time.sleep(0.02)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    assert len(children) == 2, started.communicate()[1]
    os.kill(int(children[-1]), signal.SIGTERM)
    err = started.communicate(timeout=300)[1]
    assert started.returncode == 143, err
    stopped = re.findall(r"^uss-jax: stopped by SIGTERM and saved after step (\d+)", err, re.M)
    assert stopped == [str(latest_step(workdir / "checkpoints"))] * 2
    assert int(_metrics(workdir)[-1, 0]) == int(stopped[0])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"processes": 2, "process": 0}, "--coordinator is missing"),
        ({"coordinator": "a:1", "process": 0}, "--processes is missing"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "--process 2 is not between 0 and"),
        ({"coordinator": "a", "processes": 2, "process": 1}, "--coordinator a has no port"),
        ({"coordinator": "a:1", "processes": "two", "process": 1}, "must be whole numbers"),
    ],
)
def test_processes_that_cannot_meet_are_told_why(monkeypatch, given, said):
    if "two" not in given.values():
        with pytest.raises(UserError, match=said):
            join_hosts(**given)
    for name, value in given.items():
        monkeypatch.setenv(ENVIRONMENT[name], str(value))
    with pytest.raises(UserError, match=said):
        join_hosts()


SLURM = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "16"}
EXPLICIT = dict(zip(ENVIRONMENT.values(), ("a:1", "2", "1"), strict=True))
TO_A = {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1}


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, None),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({"SLURM_NTASKS": "16"}, None),  # of the job, in which no step has been started
        (SLURM, {"cluster_detection_method": "slurm"}),
        (EXPLICIT, {**TO_A, "cluster_detection_method": "deactivate"}),
        ({**SLURM, **EXPLICIT}, {**TO_A, "cluster_detection_method": "deactivate"}),
    ],
)
def test_what_the_environment_says_is_heeded(monkeypatch, environment, wanted):
    called = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: called.append(arguments))
    monkeypatch.setattr("uss_jax.training.hosts.glob.glob", lambda pattern: [])
    for name in (*ENVIRONMENT.values(), *SLURM):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    join_hosts()
    assert called == ([] if wanted is None else [wanted])


@pytest.mark.parametrize(
    ("tasks_per_node", "more", "devices"),
    [
        ("1(x4)", {}, "all"),
        ("1", {}, "all"),
        ("8(x4)", {}, "0"),
        ("1(x2),2", {}, "0"),
        ("1(x4)", {"JAX_LOCAL_DEVICE_IDS": "0"}, "0"),
    ],
)
def test_a_task_alone_on_its_node_has_all_its_gpus(monkeypatch, tasks_per_node, more, devices):
    flags = {}
    monkeypatch.setattr(
        type(jax.config), "update", lambda _, name, value: flags.update({name: value})
    )

    def initialize(cluster_detection_method):  # as jax does it
        jax.config.update("jax_cuda_visible_devices", "0")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for name in ENVIRONMENT.values():
        monkeypatch.delenv(name, raising=False)
    for name, value in {**SLURM, "SLURM_STEP_TASKS_PER_NODE": tasks_per_node, **more}.items():
        monkeypatch.setenv(name, value)
    join_hosts()
    assert flags["jax_cuda_visible_devices"] == devices


def test_the_flags_of_visible_devices_exist():
    for platform in ("cuda", "rocm"):
        jax.config.update(f"jax_{platform}_visible_devices", "all")  # the default
