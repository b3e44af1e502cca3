"""The comparison of runs, with a program that is quick: its SDRi follows from name and seed."""

import importlib.util
import json
import os
import re
import sys

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
    best = float(leaves["gain"]) + float(leaves["seed"]) / 10
    (workdir / "made").write_text(json.dumps([after("--config"), best]))
    lines = [{"step": n, "eval/sdri": best * n / 20} for n in (10, 20)] + [{"step": 20}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
else:
    assert words[1] == "pairs" and "--recordings" in words
    _, best = json.loads((pathlib.Path(after("--model")) / "made").read_text())
    best += 1 if after("--data") == "easy" else 0
    rows = [("oracle", "all", best), ("oracle", "music", 9.0), ("half the mixture", "all", 3.0)]
    rows += [("class average", "all", best - 1)] if after("--data") == "easy" else []
    rows = [dict(zip(("query", "group", "sdri"), row)) for row in rows]
    pathlib.Path(after("--out")).write_text(json.dumps({"rows": rows}))
"""


@pytest.fixture
def comparison(monkeypatch):
    monkeypatch.syspath_prepend(str(LAUNCH))
    spec = importlib.util.spec_from_file_location("comparison", LAUNCH / "comparison.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def study(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    content = {
        "config": "configs/demo.py",
        "launch": [sys.executable, str(tmp_path / "program.py")],
        "grid": {
            "asked": {"own": {"gain": 2}, "other": {"gain": 4, "config": "configs/bandsplit.py"}},
            "seed": {"0": {"seed": 0}, "1": {"seed": 1}},
        },
        "pairs": {"easy": "easy", "hard": "hard"},
        "evaluate": ["--recordings", "1"],
    }
    path = tmp_path / "study.json"
    path.write_text(json.dumps(content))
    return path


def test_seeds_become_one_row_and_a_stopped_comparison_goes_on(
    comparison, study, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    monkeypatch.setenv("FAIL", "asked-other_seed-1")
    with pytest.raises(UserError, match="asked-other_seed-1: training ended with status 3"):
        comparison.run(study, out, 1)
    assert not (out / "table.md").exists()
    monkeypatch.delenv("FAIL")
    said = comparison.run(study, out, 2)
    assert (out / "table.md").read_text() in said
    easy, hard = re.findall(r"SDRi in dB, (?:easy|hard)\n\n((?:\|.*\n)+)", said)
    assert easy.splitlines() == [
        "| asked | seeds | oracle | class average |",
        "| --- | --- | --- | --- |",
        "| own | 2 | 3.05 ± 0.07 | 2.05 ± 0.07 |",
        "| other | 2 | 5.05 ± 0.07 | 4.05 ± 0.07 |",
    ]
    assert hard.splitlines()[2] == "| own | 2 | 2.05 ± 0.07 |"
    starts = {path.parent.name: path.read_text().split() for path in out.glob("*/starts")}
    assert {name: len(times) for name, times in starts.items()} == {
        "asked-own_seed-0": 1,
        "asked-own_seed-1": 1,
        "asked-other_seed-0": 1,
        "asked-other_seed-1": 2,
    }
    whole = len(os.sched_getaffinity(0))
    assert starts["asked-own_seed-0"] == [str(whole)]  # of the first, which ran one at a time
    assert starts["asked-other_seed-1"][1] in {str(whole // 2), str(whole - whole // 2)}
    config, _ = json.loads((out / "asked-other_seed-0" / "made").read_text())
    assert config == "configs/bandsplit.py"
    assert (out / "curves.png").stat().st_size > 5000


def test_runs_at_a_time_share_the_cores(comparison, study, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison.os, "sched_getaffinity", lambda process: {0, 1})
    given = []
    monkeypatch.setattr(comparison, "train", lambda *words: given.append(words[-1]))
    monkeypatch.setattr(comparison, "evaluate", lambda *words: given.append(words[-1]))
    points = comparison.run_all(comparison.read_study(study, {"pairs", "evaluate"}), tmp_path, 2)
    assert len(points) == 4
    assert len(given) == 8
    assert set(map(frozenset, given)) == {frozenset({0}), frozenset({1})}
    given.clear()
    comparison.run_all(comparison.read_study(study, {"pairs", "evaluate"}), tmp_path, 1)
    assert given == [None] * 8


def test_curves_are_the_mean_of_the_seeds_and_their_range(comparison, study, tmp_path):
    comparison.run(study, tmp_path / "out", 1)
    points = [{"asked": "own", "seed": "0"}, {"asked": "own", "seed": "1"}]
    (of_row,) = comparison.curves(tmp_path / "out", points).values()
    wanted = [[10, 1.025, 1.0, 1.05], [20, 2.05, 2.0, 2.1]]
    np.testing.assert_allclose(of_row["eval/sdri"], wanted)


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
    assert "SDRi in dB, a/b" in said
    assert "3.05" in said


@pytest.mark.parametrize("name", ["asked.json", "separators.json", "words.json"])
def test_the_studies_that_come_along_are_valid(comparison, name, monkeypatch):
    study = comparison.read_study(LAUNCH / name, {"pairs", "evaluate"})
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
