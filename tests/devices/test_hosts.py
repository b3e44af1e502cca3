"""Two processes of two devices train as one process of four, and one of them writes."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tests.tiny import CONFIGS, train_words, write_pairs, write_place
from uss_jax.bundles.checkpoints import Checkpoints, latest_step
from uss_jax.cli.main import main
from uss_jax.devices import hosts
from uss_jax.devices.hosts import ENVIRONMENT, StopNotice, join_hosts, require_same
from uss_jax.errors import UserError
from uss_jax.training.throughput import read_ledger

LIGHT = {"anchors.source": "random", "query.kind": "one_hot"}
# In place of Python: `uss-jax` with short limits after a loss; test_watch is about the limits.
PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m uss_jax.cli.main" ]; then
    shift 2
    exec "{python}" -c '
from uss_jax.cli.main import command
from uss_jax.devices import watch

watch._SUSPECT_SECONDS, watch._BEAT_SECONDS, watch._GRACE_SECONDS = 8.0, 0.5, 4.0
command()
' "$@"
fi
exec "{python}" "$@"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start(start, cache, tmp_path):
    """Starts `uss-jax` words on so many processes that share the devices and compile once."""
    python = tmp_path / "python"
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    environment = {
        **os.environ,
        "PYTHON": str(python),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
    }
    return lambda words, hosts, devices=4: start(
        ["bash", "launch/local.sh", str(hosts), *words],
        cwd=CONFIGS.parent,
        env={**environment, "JAX_NUM_CPU_DEVICES": str(devices // hosts)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _printed(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def _metrics(workdir, name="loss"):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return np.array([[line["step"], line[name]] for line in lines if name in line])


def _params(workdir, step):
    with Checkpoints(workdir / "checkpoints", keep=None) as checkpoints:
        return checkpoints.read(step, "params")


def _distance(one, other):
    squares = jax.tree.map(lambda a, b: np.sum(np.square(a - b)), one, other)
    return np.sqrt(sum(jax.tree.leaves(squares)))


def _wait(started, condition):
    while not condition() and started.poll() is None:
        time.sleep(0.02)


def _hosts(started):
    """The process ids of what launch/local.sh has started."""
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    assert len(children) == 2, started.communicate()[1]
    return [int(child) for child in children]


@pytest.mark.long
def test_two_hosts_train_as_one_and_one_goes_on_alone(place, start, tmp_path):
    """Also where half of the items are asked with means of classes, which one host computes."""
    write_pairs(tmp_path / "pairs", [3, 3, 3, 7, 9])
    mining = ["mine", "--records", place / "records", "--sed", place / "tagger", "--query"]
    mining += [place / "tagger", "--out", tmp_path / "anchors.npz", "--clip-seconds", "1.0"]
    assert main(list(map(str, mining))) == 0
    changed = {"anchors.source": "table", "anchors.table": tmp_path / "anchors.npz"}
    changed |= {"query.table": tmp_path / "anchors.conditions"}
    changed |= {"query.source.own": 0.5, "query.source.mean": 0.5}
    changed |= {"eval.pairs": tmp_path / "pairs", "eval.every_steps": 2}
    changed["schedule.learning_rate"] = 1e-2  # of which the warm-up takes a thousandth
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
    norms = [_metrics(tmp_path / name, "grad_norm") for name in ("two", "one")]
    np.testing.assert_allclose(*norms, rtol=1e-3)
    sdri = [_metrics(tmp_path / name, "eval/sdri") for name in ("two", "one")]
    np.testing.assert_allclose(*sdri, atol=1e-3)
    assert sdri[0][:, 0].tolist() == [2, 4]
    early, one, two = (
        _params(tmp_path / name, step) for name, step in (("one", 2), ("one", 4), ("two", 4))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one, two)
    # A gradient that is zero but for rounding moves its parameter anywhere: few, all by the rate.
    assert _distance(one, two) < 0.1 * _distance(one, early)


@pytest.mark.long
def test_a_host_with_another_config_ends_both_before_they_wait(place, start, tmp_path):
    """A word among its options, which the other lacks; nothing is written."""
    python = tmp_path / "python"
    other = 'if [ "$JAX_PROCESS_ID" = 1 ]; then set -- "$@" --config.mixing.order=reference; fi'
    lines = python.read_text().replace("    shift 2\n", f"    shift 2\n    {other}\n")
    assert other in lines
    python.write_text(lines)
    workdir = tmp_path / "run"
    changed = {**LIGHT, "mixing.order": "conflict_free"}
    err = start(train_words("resunet30.py", place, workdir, changed), hosts=2).communicate(
        timeout=300
    )[1]
    assert "host 1 has other values than host 0 of: config; give all hosts the same" in err
    assert not workdir.exists()


@pytest.mark.long
def test_sigterm_to_one_host_stops_all_after_the_same_step_saved(place, start, tmp_path):
    """The host that does not write gets it, most likely in an evaluation."""
    write_pairs(tmp_path / "pairs", range(48))
    changed = {**LIGHT, "total_steps": 100_000, "checkpoint_every_steps": 100_000}
    changed |= {"eval.pairs": tmp_path / "pairs", "eval.every_steps": 1, "eval.queries": ()}
    workdir = tmp_path / "run"
    started = start(train_words("resunet30.py", place, workdir, changed), hosts=2, devices=2)
    metrics = workdir / "metrics.jsonl"
    _wait(started, lambda: metrics.exists() and metrics.stat().st_size)
    os.kill(_hosts(started)[1], signal.SIGTERM)
    err = started.communicate(timeout=300)[1]
    assert started.returncode == 143, err
    stopped = re.findall(r"^uss-jax: stopped by SIGTERM and saved after step (\d+)", err, re.M)
    assert stopped == [str(latest_step(workdir / "checkpoints"))] * 2
    assert int(_metrics(workdir)[-1, 0]) == int(stopped[0])


def test_hosts_agree_on_a_stop_at_any_of_their_questions(monkeypatch):
    """As JAX tells them: once, at a number that each of them reaches."""
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    asked = []
    sync = lambda number: asked.append(number) or number == 3  # noqa: E731
    monkeypatch.setattr(hosts.multihost_utils, "reached_preemption_sync_point", sync)
    with StopNotice() as notice:
        assert [notice.heard() for _ in range(5)] == [False, False, True, True, True]
    assert asked == [1, 2, 3, 4, 5]


@pytest.mark.long
@pytest.mark.parametrize(("lost", "saved"), [(0, True), (1, True), (0, False)])
def test_a_killed_host_ends_the_other_which_tells_of_the_last_checkpoint(
    place, start, tmp_path, lost, saved
):
    """In steps and checkpoints, or while the step compiles. The other way to hang: test_watch.

    One device each: after a loss, the devices of one process may get out of step with each other,
    and gloo, which serves CPUs only, then aborts the process.
    """
    changed = {**LIGHT, "total_steps": 100_000, "checkpoint_every_steps": 1 if saved else 100_000}
    workdir = tmp_path / "run"
    started = start(train_words("resunet30.py", place, workdir, changed), hosts=2, devices=2)
    seen = workdir / "checkpoints" / "1" if saved else workdir / "config.json"
    _wait(started, seen.exists)
    os.kill(_hosts(started)[lost], signal.SIGKILL)
    err = started.communicate(timeout=300)[1]
    told = [line for line in err.splitlines() if line.startswith("uss-jax:")]
    step = latest_step(workdir / "checkpoints")
    assert (step is None) == (not saved)
    then = f"the last checkpoint is step {step}: the same command resumes from there"
    if step is None:
        then = "there is no checkpoint yet: the same command starts from the beginning"
    assert len(told) == 1, err
    assert re.fullmatch(rf"uss-jax: host {lost} \(.+\) was lost: .*; {then}", told[0]), err
    assert not re.search("Traceback|Check failure", err)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"processes": 2, "process": 0}, "--coordinator is missing"),
        ({"coordinator": "a:1", "process": 0}, "--processes is missing"),
        (
            {"coordinator": "a:1", "processes": 2, "process": 2},
            "--process 2: expected at least 0, below",
        ),
        ({"coordinator": "a", "processes": 2, "process": 1}, "--coordinator a has no port"),
        ({"coordinator": "a:1", "processes": "two", "process": 1}, "must be whole numbers"),
    ],
)
def test_processes_that_cannot_meet_are_told_why(monkeypatch, given, said):
    if "two" not in given.values():
        with pytest.raises(UserError, match=said), join_hosts(**given):
            pass
    for name, value in given.items():
        monkeypatch.setenv(ENVIRONMENT[name], str(value))
    with pytest.raises(UserError, match=said), join_hosts():
        pass


EXPLICIT = dict(zip(ENVIRONMENT.values(), ("a:1", "2", "0"), strict=True))
# The first task of the second of two nodes, both with eight GPUs.
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_GPUS_ON_NODE": "8",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
}
TASK_A_GPU = {
    **SLURM,
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}


def test_a_host_with_other_values_is_said(monkeypatch):
    about = {"version": "1", "seed": 3, "config": {"schedule": {"learning_rate": 0.1}}}
    require_same(about)  # of one host
    sent = []
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(
        "uss_jax.devices.hosts.multihost_utils.process_allgather",
        lambda digests: sent.append(digests) or np.stack([sent[0], sent[0], digests]),
    )
    require_same(about)
    require_same(dict(reversed(about.items())))
    other = {**about, "seed": 4, "config": {"schedule": {"learning_rate": 0.2}}}
    with pytest.raises(UserError, match=r"^host 2 has other values than host 0 of: config, seed;"):
        require_same(other)


@pytest.fixture
def initialized(monkeypatch):
    """What JAX is told of the hosts by an environment."""
    called = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: called.append(arguments))
    monkeypatch.setattr("uss_jax.devices.hosts.glob.glob", lambda pattern: [])
    monkeypatch.setattr(
        "uss_jax.devices.hosts.Relay",
        lambda address: SimpleNamespace(address=address, close=lambda: None),
    )
    monkeypatch.setattr("uss_jax.devices.hosts.Watch", lambda *about: contextlib.nullcontext())

    def initialized(environment):
        for name in (*ENVIRONMENT.values(), *SLURM, "JAX_LOCAL_DEVICE_IDS", "JAX_COORDINATOR_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with join_hosts():
            pass
        return called.pop() if called else None

    return initialized


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({**SLURM}, ("node07:61441", 2, 1)),
        ({**SLURM, "SLURM_STEP_NODELIST": "a1,a2"}, ("a1:61441", 2, 1)),
        ({**SLURM, "SLURM_STEP_NODELIST": "r[2-3]-n[4,9],b"}, ("r2-n4:61441", 2, 1)),
        ({**SLURM, "JAX_COORDINATOR_PORT": "99"}, ("node07:99", 2, 1)),
        (EXPLICIT, ("a:1", 2, 0)),
        ({**SLURM, **EXPLICIT}, ("a:1", 2, 0)),
    ],
)
def test_what_the_environment_says_is_heeded(initialized, environment, wanted):
    told = initialized(environment)
    keys = ("coordinator_address", "num_processes", "process_id")
    assert tuple(told[key] for key in keys) == wanted
    assert told["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**SLURM, "SLURM_NTASKS": "1"},
        {"SLURM_NTASKS": "16"},  # of the job, in which no step has been started
    ],
)
def test_a_process_that_nothing_names_others_to_is_alone(initialized, environment):
    assert initialized(environment) is None


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        (SLURM, None),  # a task a node: all that it sees
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2,1"}, None),
        (TASK_A_GPU, [3]),
        ({**TASK_A_GPU, "SLURM_STEP_TASKS_PER_NODE": "2,4"}, [6, 7]),
        ({**TASK_A_GPU, "CUDA_VISIBLE_DEVICES": "3"}, None),  # bound to its task by SLURM
        ({**TASK_A_GPU, "JAX_LOCAL_DEVICE_IDS": "5"}, None),  # JAX reads it
        ({**TASK_A_GPU, "CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": ""}, [3]),
    ],
)
def test_tasks_of_slurm_share_all_gpus_of_their_node(initialized, environment, gpus):
    assert initialized(environment).get("local_device_ids") == gpus


def test_tasks_that_cannot_share_the_gpus_of_a_node_are_told_so(initialized):
    with pytest.raises(UserError, match="3 tasks cannot share 8 GPUs of a node evenly"):
        initialized({**TASK_A_GPU, "SLURM_STEP_TASKS_PER_NODE": "3(x2)"})
