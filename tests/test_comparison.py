"""The comparison of runs, with a program that is quick: its SDRi follows from name and seed."""

import concurrent.futures
import importlib.util
import json
import os
import re
import shutil
import sys
import threading

import jax
import numpy as np
import pytest

from tests.tiny import CONFIGS
from uss_jax.cli.config import load_config
from uss_jax.errors import UserError
from uss_jax.training.settings import separator_settings

LAUNCH = CONFIGS.parent / "launch"

# Takes the words of `uss-jax train` and of `uss-jax evaluate pairs`.
PROGRAM = """
import json, os, pathlib, sys
words = sys.argv[1:]
after = lambda word: words[words.index(word) + 1]
if words[0] == "train":
    leaves = dict(w.removeprefix("--config.").split("=") for w in words if "--config." in w)
    workdir = pathlib.Path(after("--workdir"))
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / "starts", "a") as starts:
        print(len(os.sched_getaffinity(0)), file=starts)
    if os.environ.get("FAIL") == workdir.name:
        sys.exit(3)
    assert os.environ.get("HALF", "0") == leaves["seed"]
    best = float(leaves["gain"]) + float(leaves["seed"]) / 10
    (workdir / "made").write_text(json.dumps([after("--config"), best]))
    lines = [{"step": n, "eval/sdri": best * n / 20} for n in (10, 20)] + [{"step": 20}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
else:
    assert "LAUNCHED" not in os.environ and words[1] == "pairs" and "--recordings" in words
    _, best = json.loads((pathlib.Path(after("--model")) / "made").read_text())
    assert ("seed-1" in after("--model")) == ("HALF" in os.environ)
    best += 1 if after("--data") == "easy" else 0
    rows = [("oracle", "all", best, 1.0, 8), ("oracle", "music", 9.0, 9.0, 2)]
    rows += [("half the mixture", "all", 3.01, -0.001, 8), ("the mixture", "all", 0.0, 0.0, 8)]
    if after("--data") == "easy":
        rows += [("class average", "all", best - 1, 0.5, 6)]
        rows += [("16 recordings", "all", 1.0, 0.0, 8)] if best > 5 else []
    rows = [dict(zip(("query", "group", "sdri", "si_sdri", "pairs"), row)) for row in rows]
    text = json.dumps({"rows": rows, "how": {"data": after("--data")}})
    pathlib.Path(after("--out")).write_text(text)
"""


@pytest.fixture
def comparison(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(LAUNCH))
    spec = importlib.util.spec_from_file_location("comparison", LAUNCH / "comparison.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Trained by `launch`, evaluated by the plain command.
    monkeypatch.setattr(module, "TRAIN", [sys.executable, str(tmp_path / "program.py")])
    monkeypatch.setattr(sys.modules["scaling_study"], "_ending", threading.Event())
    return module


@pytest.fixture
def study(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    content = {
        "config": "configs/demo.py",
        "launch": ["env", "LAUNCHED=1", sys.executable, str(tmp_path / "program.py")],
        "grid": {
            "asked": {"own": {"gain": 2}, "other": {"gain": 4, "config": "configs/bandsplit.py"}},
            "seed": {"0": {"seed": 0}, "1": {"seed": 1, "HALF": 1}},
        },
        "pairs": {"easy": "easy", "hard": "hard"},
        "evaluate": ["--recordings", "1"],
    }
    path = tmp_path / "study.json"
    path.write_text(json.dumps(content))
    return path


def test_seeds_become_one_row_and_a_stopped_comparison_goes_on(
    comparison, study, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    monkeypatch.setenv("FAIL", "asked-own_seed-1")
    with pytest.raises(UserError, match=r"1 of 4 runs failed: asked-own_seed-1; see above"):
        comparison.run(study, out, 1)
    told = capsys.readouterr()
    assert "asked-own_seed-1: training ended with status 3" in told.err
    assert (out / "curves.png").exists()
    # Of the runs that did not fail.
    assert (out / "table.md").read_text() in told.out
    assert "| own | 1 | 8 | 3.00 / 1.00 | 3.01 / 0.00 | 2.00 / 0.50 (6 pairs) |" in told.out
    assert "| other | 2 | 8 | 5.05 ± 0.07 / 1.00 |" in told.out
    monkeypatch.delenv("FAIL")
    said = comparison.run(study, out, 2)
    assert (out / "table.md").read_text() in said
    easy, hard = re.findall(r"SDRi in dB, (?:easy|hard)\n\n((?:\|.*\n)+)", said)
    assert easy.splitlines() == [
        "| asked | seeds | pairs | oracle | half the mixture | class average | 16 recordings |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| own | 2 | 8 | 3.05 ± 0.07 / 1.00 | 3.01 ± 0.00 / 0.00 | 2.05 ± 0.07 / 0.50 (6 pairs) "
        "|  |",
        "| other | 2 | 8 | 5.05 ± 0.07 / 1.00 | 3.01 ± 0.00 / 0.00 | 4.05 ± 0.07 / 0.50 (6 pairs) "
        "| 1.00 / 0.00 (n = 1) |",
    ]
    assert hard.splitlines()[2] == "| own | 2 | 8 | 2.05 ± 0.07 / 1.00 | 3.01 ± 0.00 / 0.00 |"
    starts = {path.parent.name: path.read_text().split() for path in out.glob("*/starts")}
    assert {name: len(times) for name, times in starts.items()} == {
        "asked-own_seed-0": 1,
        "asked-own_seed-1": 2,
        "asked-other_seed-0": 1,
        "asked-other_seed-1": 1,
    }
    whole = len(os.sched_getaffinity(0))
    assert starts["asked-own_seed-0"] == [str(whole)]  # of the first, which ran one at a time
    assert starts["asked-own_seed-1"][1] in {str(whole // 2), str(whole - whole // 2)}
    config, _ = json.loads((out / "asked-other_seed-0" / "made").read_text())
    assert config == "configs/bandsplit.py"
    assert (out / "curves.png").stat().st_size > 5000


def test_runs_at_a_time_share_the_cores(comparison, study, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison.os, "sched_getaffinity", lambda process: {0, 1})
    given = []
    monkeypatch.setattr(comparison, "train", lambda *words: given.append(words[-1]))
    monkeypatch.setattr(comparison, "evaluate", lambda *words: given.append(words[-1]))
    failed = comparison.run_all(comparison.read_study(study, {"pairs", "evaluate"}), tmp_path, 2)
    assert failed == []
    assert len(given) == 8
    assert set(map(frozenset, given)) == {frozenset({0}), frozenset({1})}
    given.clear()
    comparison.run_all(comparison.read_study(study, {"pairs", "evaluate"}), tmp_path, 1)
    assert given == [None] * 8


def _edited(study, **changed):
    study.write_text(json.dumps({**json.loads(study.read_text()), **changed}))


@pytest.mark.parametrize(
    "changed",
    [
        {"set": {"schedule.learning_rate": 0.1}},
        {"config": "configs/quickstart.py"},
        {"evaluate": ["--recordings", "4"]},
        {"pairs": {"easy": "hard"}},
    ],
)
def test_an_edited_study_is_refused_before_it_trains(comparison, study, tmp_path, changed):
    out = tmp_path / "out"
    comparison.run(study, out, 1)
    table = (out / "table.md").read_bytes()
    _edited(study, **changed)
    with pytest.raises(UserError, match="give another --out"):
        comparison.run(study, out, 1)
    assert (out / "table.md").read_bytes() == table
    assert all(len(path.read_text().split()) == 1 for path in out.glob("*/starts"))


def test_an_edited_config_file_is_another_study(comparison, study, tmp_path):
    """Though its name stays, and the runs of before keep no copy of what was in it."""
    shutil.copytree(LAUNCH.parent / "configs", tmp_path / "configs")
    config, out = tmp_path / "configs/quickstart.py", tmp_path / "out"
    _edited(study, config=str(config))
    comparison.run(study, out, 1)
    config.write_text(config.read_text() + "\n# a remark\n")
    comparison.run(study, out, 1)
    (record,) = out.glob("asked-own_seed-0/run.json")
    before = json.loads(record.read_text())
    record.write_text(json.dumps({k: v for k, v in before.items() if k != "content"}))
    comparison.run(study, out, 1)  # of before there was this key
    record.write_text(json.dumps(before))
    text = config.read_text().replace("config.global_batch = 6", "config.global_batch = 5")
    assert text != config.read_text()
    config.write_text(text)
    with pytest.raises(UserError, match="give another --out"):
        comparison.run(study, out, 1)


def test_the_environment_and_more_points_or_pairs_are_no_other_study(comparison, study, tmp_path):
    out = tmp_path / "out"
    comparison.run(study, out, 1)
    content = json.loads(study.read_text())
    content["grid"]["asked"]["more"] = {"gain": 6}
    _edited(
        study,
        set={"JAX_NUM_CPU_DEVICES": 1},
        grid=content["grid"],
        pairs={**content["pairs"], "more": "hard"},
    )
    assert "| more | 2 |" in comparison.run(study, out, 1)
    # Results of before there was a record are taken as they are, and settings of a run that has
    # not reported yet may change.
    for record in out.glob("*/run.json"):
        record.unlink()
    _edited(study, set={"schedule.learning_rate": 0.1})
    comparison.run(study, out, 1)
    (out / "asked-new_seed-0").mkdir()
    (out / "asked-new_seed-0" / "run.json").write_text("{}")
    content["grid"]["asked"]["new"] = {"gain": 6}
    _edited(study, grid=content["grid"])
    assert "| new | 2 |" in comparison.run(study, out, 1)


def test_what_ends_the_comparison_ends_its_trainings(comparison, study, tmp_path, monkeypatch):
    def wait(futures):
        while not (tmp_path / "ready").exists():
            assert not any(future.done() for future in futures)
        raise SystemExit(143)

    (tmp_path / "program.py").write_text(
        "import pathlib, signal, sys, time\n"
        f"place = pathlib.Path({str(tmp_path)!r})\n"
        "def save(*_): (place / 'saved').touch(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "(place / 'ready').touch()\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(concurrent.futures, "as_completed", wait)
    with pytest.raises(SystemExit, match="143"):
        comparison.run(study, tmp_path / "out", 1)
    assert (tmp_path / "saved").exists()
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_a_command_that_cannot_be_started_is_said(comparison, study, tmp_path, capsys):
    _edited(study, launch=[str(tmp_path / "none")])
    with pytest.raises(UserError, match="4 of 4 runs failed"):
        comparison.run(study, tmp_path / "out", 1)
    assert "none cannot be started (No such file or directory)" in capsys.readouterr().err


def test_curves_are_the_mean_of_the_seeds_and_their_range(comparison, study, tmp_path):
    comparison.run(study, tmp_path / "out", 1)
    points = [{"asked": "own", "seed": "0"}, {"asked": "own", "seed": "1"}]
    (of_row,) = comparison.curves(tmp_path / "out", points).values()
    wanted = [[10, 1.025, 1.0, 1.05], [20, 2.05, 2.0, 2.1]]
    np.testing.assert_allclose(of_row["eval/sdri"], wanted)


def test_curves_may_be_over_minutes(comparison, study, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(comparison, "draw", lambda rows, path, over: drawn.append((over, rows)))
    comparison.run(study, tmp_path / "out", 1)
    for seed in "01":  # a step takes 6 s, but for a slow report
        lines = "".join(f'{{"step": {s}, "step_seconds": {t}}}\n' for s, t in ((1, 6), (2, 6)))
        with open(tmp_path / "out" / f"asked-own_seed-{seed}" / "metrics.jsonl", "a") as file:
            file.write(lines + ('{"step": 3, "step_seconds": 60}\n' if seed == "1" else ""))
    _edited(study, curves="minutes")
    comparison.run(study, tmp_path / "out", 1)
    assert [over for over, _ in drawn] == ["steps", "minutes"]
    np.testing.assert_allclose(drawn[1][1]["asked-own"]["eval/sdri"][:, 0], [1, 2])
    _edited(study, curves="hours")
    with pytest.raises(UserError, match="curves is 'hours', expected 'steps' or 'minutes'"):
        comparison.run(study, tmp_path / "out", 1)


def test_curves_leave_out_runs_without_results(comparison, study, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(comparison, "draw", lambda rows, path, over: drawn.append(rows))
    monkeypatch.setenv("FAIL", "asked-own_seed-1")
    broken = tmp_path / "out" / "asked-own_seed-1" / "metrics.jsonl"
    broken.parent.mkdir(parents=True)
    broken.write_text('{"step": 10, "eval/sdri": 9.0}\n{"step": 2')
    with pytest.raises(UserError, match="1 of 4 runs failed"):
        comparison.run(study, tmp_path / "out", 1)
    (rows,) = drawn
    np.testing.assert_allclose(
        rows["asked-own"]["eval/sdri"], [[10, 1.0, 1.0, 1.0], [20, 2.0, 2.0, 2.0]]
    )


def test_pairs_below_the_home_folder_are_the_same_again(comparison, tmp_path):
    study = {"pairs": {"easy": "~/easy"}}
    results = comparison.results_of(tmp_path, "easy")
    results.parent.mkdir()
    results.write_text(json.dumps({"how": {"data": os.path.expanduser("~/easy")}}))
    comparison.require_same_pairs(study, tmp_path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"pairs": None}, "pairs must be an object from a name to a folder"),
        ({"pairs": {}}, "pairs must be an object from a name to a folder"),
        ({"pairs": ["a"]}, "pairs must be an object from a name to a folder"),
        ({"pairs": {"a": 3}}, "pairs must be an object from a name to a folder"),
        ({"evaluate": "--recordings 1"}, "evaluate must be a list of words"),
        ({"config": 3}, "config must be the name of a file"),
        ({"grid": []}, "grid an object"),
        ({"grid": {"a": [1]}}, "grid.a must be an object of objects"),
        ({"set": 3}, "set must be an object, launch a list"),
        ({"launch": "true"}, "set must be an object, launch a list"),
    ],
)
def test_what_is_no_comparison_is_said(comparison, study, tmp_path, changed, said):
    study.write_text(json.dumps({**json.loads(study.read_text()), **changed}))
    with pytest.raises(UserError, match=said):
        comparison.run(study, tmp_path / "out", 1)


def test_pairs_may_have_any_name(comparison, study, tmp_path):
    pairs = {"metrics": "easy", "a/b": "hard"}
    study.write_text(json.dumps({**json.loads(study.read_text()), "pairs": pairs}))
    said = comparison.run(study, tmp_path / "out", 1)
    assert "SDRi / SI-SDRi in dB, a/b" in said
    assert "3.05" in said


@pytest.mark.parametrize(
    "name",
    [
        *("asked.json", "words.json"),
        *("separators.json", "separators_long.json", "separators_hour.json"),
    ],
)
def test_the_studies_that_come_along_are_valid(comparison, name, monkeypatch):
    study = comparison.checked(LAUNCH / name)
    for _, leaves in comparison.runs_of(study):
        words = [
            f"--config.{key}={tuple(value) if isinstance(value, list) else value}"
            for key, value in leaves.items()
            if not key.isupper() and key != "config"
        ]
        config = load_config(str(CONFIGS.parent / leaves.get("config", study["config"])), words)
        assert config.seed == leaves["seed"]
        monkeypatch.setattr(jax, "device_count", lambda: 1)
        separator_settings(config)
