"""Runs that stop and go on, through `uss-jax train` and `train-tagger`."""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.tiny import (
    CONFIGS,
    noise,
    tagger_variables,
    train_words,
    write_place,
    write_records,
    write_tagger,
)
from uss_jax.bundles.bundle import read_bundle
from uss_jax.bundles.checkpoints import Checkpoints, latest_step, save_tree
from uss_jax.cli.main import main
from uss_jax.training import records

QUICK_COMPILATION = True
OPEN = {"anchors.source": "random", "query.kind": "one_hot"}  # needs no other net


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("train"))


@pytest.fixture
def interrupt(monkeypatch):
    """Makes the next runs end as by Ctrl-C when they ask for a batch after so many."""

    def after(count):
        def batches(*args, _read=records.batches, **kwargs):
            yield from itertools.islice(_read(*args, **kwargs), count)
            raise KeyboardInterrupt

        monkeypatch.setattr(records, "batches", batches)

    return after


def _state(workdir, step):
    with Checkpoints(workdir / "checkpoints", keep=None) as checkpoints:
        items = checkpoints.items(step)
        return {item: checkpoints.read(step, item) for item in items}, checkpoints.position(step)


def _lines(workdir):
    """The metrics, less those that a clock gives."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    clocks = ("items_per_second", "step_seconds", "input_wait_share")
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines]


def _require_same_run(found, wanted, steps):
    np.testing.assert_equal(_lines(found), _lines(wanted))  # a skipped step's loss is no number
    assert [line["step"] for line in _lines(found)] == list(range(1, steps + 1))
    (state, position), (wanted_state, wanted_position) = (_state(w, steps) for w in (found, wanted))
    assert position == wanted_position
    assert jax.tree.structure(state) == jax.tree.structure(wanted_state)
    jax.tree.map(np.testing.assert_array_equal, state, wanted_state)


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """Workdir of a separator's run of four steps."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert main(train_words("resunet30.py", place, workdir)) == 0
    return workdir


@pytest.mark.long
@pytest.mark.parametrize("config", ["resunet30.py", "tagger_cnn14.py"])
def test_an_interrupted_run_goes_on_bit_exactly(
    place, whole, tmp_path, interrupt, monkeypatch, config, capsys
):
    words = train_words(config, place, tmp_path / "broken")
    if config != "resunet30.py":
        whole = tmp_path / "whole"
        assert main(train_words(config, place, whole)) == 0
    with monkeypatch.context():
        interrupt(3)
        assert main(words) == 130
    assert latest_step(tmp_path / "broken" / "checkpoints") == 2
    assert [line["step"] for line in _lines(tmp_path / "broken")] == [1, 2, 3]
    monkeypatch.undo()
    assert main(words) == 0
    assert "resuming after step 2" in capsys.readouterr().out
    _require_same_run(tmp_path / "broken", whole, steps=4)


def test_a_finished_run_has_nothing_to_do(place, whole, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    before = (workdir / "metrics.jsonl").read_bytes()
    assert main(train_words("resunet30.py", place, workdir)) == 0
    assert "resuming after step 4" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("config", "changed", "said"),
    [
        ("resunet30.py", {"separator.channels": (4, 6)}, "separator.channels=[4, 4], not [4, 6]"),
        ("resunet30.py", {"separator.hop_samples": 32}, "separator.hop_samples=64, not 32"),
        ("resunet30.py", {"query.kind": "one_hot"}, "query.kind=soft, not one_hot"),
        ("resunet30.py", {"mixing.order": "conflict_free"}, "mixing.order=reference, not conflict"),
        ("resunet30.py", {"data.order": "uniform"}, "data.order=balanced, not uniform"),
        ("resunet30.py", {"anchors.source": "random"}, "sed={...}, not None"),
        ("resunet30.py", {"seed": 5}, "--config.seed=1234 or start in a new workdir"),
        ("resunet30.py", {"global_batch": 16}, "--config.global_batch=8 or start in a new workdir"),
        ("tagger_cnn14.py", {}, "kind=separator, not tagger"),
    ],
)
def test_a_run_goes_on_only_as_it_was_started(place, whole, capsys, config, changed, said):
    written = lambda: {  # noqa: E731
        path: path.stat().st_mtime_ns
        for path in whole.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    before = written()
    assert main(train_words(config, place, whole, {**changed, "total_steps": 6})) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert before == written()


def _break_newest(workdir):
    """Changes the parameters of the newest checkpoint; returns its folder.

    A single byte would not do: of nodes that were written again, orbax's files keep the old ones.
    """
    step = workdir / "checkpoints" / str(latest_step(workdir / "checkpoints"))
    for data in step.glob("params/ocdbt.process_0/d/*"):
        damaged = bytearray(data.read_bytes())
        damaged[::64] = bytes(byte ^ 0xFF for byte in damaged[::64])
        data.write_bytes(damaged)
    return step


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(place, whole, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    words = train_words("resunet30.py", place, workdir)
    step = _break_newest(workdir)
    assert main([*words, "--config.damaged_checkpoint=stop"]) == 1
    assert f"{step} is damaged (" in capsys.readouterr().err
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"; it was moved to {workdir / 'checkpoints-damaged' / '4'}" in said
    assert "resuming after step 2" in said
    _require_same_run(workdir, whole, steps=4)


@pytest.mark.long
def test_a_run_with_adaptors_goes_on_from_the_checkpoint_before_a_damaged_one(
    place, tmp_path, capsys
):
    """Its query net trains, so that the damaged checkpoint is not read for it either."""
    changed = {"query.adaptor_width": 6, "query.adaptor_hidden": 8, "total_steps": 2}
    changed["anchors.source"] = "random"
    words = train_words("resunet30.py", place, tmp_path, {**changed, "checkpoint_every_steps": 1})
    assert main(words) == 0
    saved, _ = _state(tmp_path, 2)
    _break_newest(tmp_path)
    assert main(words) == 0
    assert "resuming after step 1" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, _state(tmp_path, 2)[0], saved)


def test_without_a_whole_checkpoint_a_run_begins_anew_only_when_told_again(
    place, whole, tmp_path, interrupt, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    words = train_words("resunet30.py", place, workdir)
    shutil.rmtree(workdir / "checkpoints" / "2")
    _break_newest(workdir)
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "there is none before it" in error
    assert "Run the same command again to start from step 0" in error
    assert error.count("\n") == 1
    interrupt(0)
    assert main(words) == 130
    assert "resuming" not in capsys.readouterr().out


def test_metrics_that_a_power_cut_left_are_mended(place, whole, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    metrics, ledger = workdir / "metrics.jsonl", workdir / "throughput.json"
    lines = metrics.read_bytes().splitlines(keepends=True)
    foreign = [b"[]\n", b"3\n", b'{"loss": 1}\n', b'{"step": "x"}\n', b"\xff\xfe\n", b"[" * 9999]
    metrics.write_bytes(b"".join([*lines[:2], *foreign, b"\n", *lines[2:], b'{"step": 4, "lo']))
    ledger.write_bytes(ledger.read_bytes()[:20])
    assert main(train_words("resunet30.py", place, workdir)) == 0
    assert "throughput.json is damaged" in capsys.readouterr().out
    assert metrics.read_bytes() == b"".join(lines)
    assert (workdir / "throughput.json.damaged").stat().st_size == 20


def test_a_frozen_net_that_is_gone_is_said(place, whole, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "frozen" / "query")
    assert main(train_words("resunet30.py", place, workdir)) == 1
    assert "holds no parameters of its query" in capsys.readouterr().err


def test_changed_frozen_nets_are_refused(place, whole, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    save_tree(workdir / "frozen" / "sed", tagger_variables(seed=7))
    assert main(train_words("resunet30.py", place, workdir)) == 1
    assert "folder `frozen` are not those that this run was started with" in capsys.readouterr().err


def test_changed_records_are_refused(whole, place, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    write_records(tmp_path / "records", "train", [("other", noise(9, 1.0), [3])])
    changed = {"data.records": tmp_path / "records", "total_steps": 6}
    assert main(train_words("resunet30.py", place, workdir, changed)) == 1
    assert "the records have changed since this run was started" in capsys.readouterr().err


def test_a_resumed_run_needs_its_source_bundles_no_longer(
    whole, place, tmp_path, interrupt, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    interrupt(0)
    changed = {"sed_bundle": "nowhere", "query_bundle": "", "total_steps": 6}
    assert main(train_words("resunet30.py", place, workdir, changed)) == 130
    assert "resuming after step 4" in capsys.readouterr().out


def test_before_the_first_checkpoint_a_start_is_a_fresh_one(place, tmp_path, interrupt):
    write_tagger(tmp_path / "other", seed=7)
    interrupt(0)
    for changed, seed in (({}, 0), ({"sed_bundle": tmp_path / "other", "seed": 5}, 7)):
        assert main(train_words("resunet30.py", place, tmp_path / "run", changed)) == 130
        frozen = read_bundle(tmp_path / "run").variables("sed")
        jax.tree.map(np.testing.assert_array_equal, frozen, tagger_variables(seed))


# `uss-jax`, but the loss of every seventh step is no number.
PROGRAM = """
import sys
import jax.numpy as jnp
from uss_jax.cli.config import load_config
from uss_jax.cli.main import main
from uss_jax.training import separation_step

def update(state, grads, statistics, metrics, *more, _update=separation_step.update):
    loss = jnp.where(state.step % 7 == 3, jnp.nan, metrics["loss"])
    return _update(state, grads, statistics, {**metrics, "loss": loss}, *more)

separation_step.update = update
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def start(start, tmp_path):
    """Starts the program with these words; its processes share compiled programs."""
    environment = {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
    }
    return lambda words: start(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=CONFIGS.parent,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _count_lines(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _wait(process, condition):
    while not condition() and process.poll() is None:
        time.sleep(0.002)


def _is_held(process):
    """Returns whether all threads of a process are stopped."""
    states = []
    for stat in Path(f"/proc/{process.pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # the thread has ended
            states.append(stat.read_text().rpartition(")")[2].split()[0])
    return set(states) == {"T"}


def _stop_while(process, condition):
    """Holds the process while the condition is true."""
    while process.poll() is None:
        _wait(process, condition)
        process.send_signal(signal.SIGSTOP)
        _wait(process, lambda: _is_held(process))  # a thread may still end a call
        if condition():
            break
        process.send_signal(signal.SIGCONT)


@pytest.mark.long
def test_a_killed_run_goes_on_bit_exactly(place, tmp_path, start):
    """Kills in a checkpoint's writing and at any moment; USS_JAX_KILL_SEED repeats a choice.

    With anchors of a table, a worker process, a moving average, and steps that are skipped.
    USS_JAX_KILLS asks for more kills than CI has time for, at other moments each time.
    """
    kills = int(os.environ.get("USS_JAX_KILLS", 2))
    chosen = random.randrange(1000) if "USS_JAX_KILLS" in os.environ else 0
    seed = int(os.environ.get("USS_JAX_KILL_SEED", chosen))
    moments = random.Random(seed)
    table = tmp_path / "anchors.npz"
    mining = ["mine", "--records", place / "records", "--sed", place / "tagger", "--out", table]
    assert main([*map(str, mining), "--clip-seconds", "1.2"]) == 0
    changed = {"anchors.source": "table", "anchors.table": table, "query.kind": "one_hot"}
    steps = 20 * kills
    changed |= {"total_steps": steps, "checkpoint_every_steps": 2, "keep_checkpoints": 2}
    changed |= {"ema_decay": 0.9, "data.workers": 1}
    command = lambda name: train_words("resunet30.py", place, tmp_path / name, changed)  # noqa: E731
    killed = tmp_path / "killed"
    half_written = lambda: list((killed / "checkpoints").glob("*tmp*"))  # noqa: E731
    lines, whole = 0, None
    for in_writing in itertools.islice(itertools.cycle((True, False)), kills):
        lines = moments.randrange(lines + 1, lines + 15)
        process = start(command("killed"))
        _wait(process, lambda lines=lines: _count_lines(killed) >= lines)
        if in_writing:
            _stop_while(process, half_written)
        else:
            time.sleep(moments.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        assert half_written() or not in_writing
        whole = whole or start(command("whole"))  # compiled by now
        print(f"seed {seed}: killed after {_count_lines(killed)} reports, {half_written()}")
    for process in (whole, start(command("killed"))):
        error = process.communicate()[1]
        assert process.returncode == 0, error
    _require_same_run(killed, tmp_path / "whole", steps=steps)
    assert _lines(killed)[-1]["skipped_steps"] == len(range(3, steps, 7))
    kept = sorted(int(p.name) for p in (killed / "checkpoints").iterdir())
    assert kept == [steps - 2, steps]


def test_a_run_goes_on_at_another_precision_and_says_so(place, tmp_path, capsys):
    config, run_folder = "resunet30.py", tmp_path / "run"
    changed = {**OPEN, "precision": "highest", "total_steps": 1}
    assert main(train_words(config, place, run_folder, changed)) == 0
    assert json.loads((run_folder / "config.json").read_text())["training"]["precision"]
    capsys.readouterr()
    assert main(train_words(config, place, run_folder, {**changed, "total_steps": 2})) == 0
    assert "config.precision" not in capsys.readouterr().out
    assert main(train_words(config, place, run_folder, {**OPEN, "total_steps": 3})) == 0
    said = "config.precision is default from here on; up to here it was highest"
    assert said in capsys.readouterr().out


def test_a_run_from_before_there_were_these_fields_goes_on(place, whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    saved = json.loads((run / "config.json").read_text())
    for section, key in (("separator", "condition_norm"), ("query", "one_class_share")):
        assert saved[section].pop(key) == saved["training"][section].pop(key) == 0
    (run / "config.json").write_text(json.dumps(saved))
    assert main(train_words("resunet30.py", place, run, {"total_steps": 5})) == 0
    assert "resuming after step 4" in capsys.readouterr().out
    saved["query"]["one_class_share"] = 0.5
    (run / "config.json").write_text(json.dumps(saved))
    assert main(train_words("resunet30.py", place, run, {"total_steps": 6})) == 1
    assert "started with query.one_class_share=0.5, not 0.0" in capsys.readouterr().err


def test_runs_and_configs_from_before_there_was_a_precision_go_on(
    place, tmp_path, capsys, monkeypatch
):
    words = train_words("resunet30.py", place, tmp_path / "run", {**OPEN, "total_steps": 1})
    config = tmp_path / "own.py"  # as somebody may have written it
    config.write_text(
        f"import runpy\nget_config = runpy.run_path({str(CONFIGS / 'resunet30.py')!r})"
        "['get_config']\nbefore = get_config\n"
        "def get_config():\n    config = before()\n    del config.precision\n    return config\n"
    )
    words[words.index("--config") + 1] = str(config)
    assert main(words) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert "precision" not in saved["training"]
    words = train_words("resunet30.py", place, tmp_path / "run", {**OPEN, "total_steps": 2})
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "resuming after step 1" in said
    assert "config.precision" not in said
