"""Another suite costs its file and one row of SUITES."""

import dataclasses
import importlib
import inspect
import json
import sys

import pytest

from tests.tiny import write_separator
from uss_jax.cli.main import main
from uss_jax.evaluation import suites
from uss_jax.evaluation.suite import Option, Published, Suite

FILE = """
def run(model, data, out, *, level, twice, kind):
    results = {"rows": [{"query": "class average", "sdri": level * (1.0 + twice)}]}
    return {**results, "how": {"level": level, "kind": kind}}, f"toy: {data} at {level} dB"
"""
ROW = Suite(
    "toy",
    "level of toys",
    data="box of toys",
    options=(
        Option("--level", "level of a toy", "natural", metavar="N"),
        Option("--twice", "count it twice", "switch", only_with="--level"),
        Option("--kind", "kind of toy", default="duck", choices=("duck", "bear")),
    ),
    example="uss-jax evaluate toy --model runs/a --data box",
    published=Published("Toys", "sdri", "SDRi, dB", 7.0, options="--level 4"),
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    write_separator(tmp_path / "soft", "soft")
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "toy.py").write_text(FILE)
    monkeypatch.setattr(suites, "__path__", [*suites.__path__, str(tmp_path / "suites")])
    monkeypatch.setitem(suites.SUITES, ROW.name, ROW)
    yield tmp_path
    sys.modules.pop("uss_jax.evaluation.suites.toy", None)
    vars(suites).pop("toy", None)


def _evaluate(place, *more):
    out = place / "results.json"
    words = ["evaluate", "toy", "--model", place / "soft", "--data", "box", "--out", out, *more]
    return main(list(map(str, words)))


def test_a_suite_of_the_detector_alone_always_computes_at_highest(place, capsys, monkeypatch):
    row = dataclasses.replace(ROW, detector_only=True)
    monkeypatch.setitem(suites.SUITES, ROW.name, row)
    assert _evaluate(place, "--level", "3", "--precision", "default") == 0
    assert "--precision default: no effect, the detector" in capsys.readouterr().out
    assert json.loads((place / "results.json").read_text())["how"]["precision"] == "highest"
    assert suites.SUITES["planted"].detector_only


def test_a_row_and_a_file_are_a_suite(place, capsys):
    assert _evaluate(place, "--level", "3", "--twice") == 0
    out = place / "results.json"
    assert capsys.readouterr().out == f"toy: box at 3 dB\n\n{out}: all metrics\n"
    results = json.loads(out.read_text())
    assert results["suite"] == "toy"
    assert results["how"]["kind"] == "duck"
    assert results["how"]["precision"] == "highest"
    assert main(["compare", str(place)]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Toys"))
    assert row.split()[-3:] == ["6.00", "7.00", "-"]


def test_a_row_is_in_the_help(place, capsys):
    for words, said in (
        (["evaluate", "--help"], ["toy", "level of toys"]),
        (
            ["evaluate", "toy", "--help"],
            ["Level of toys.", "box of toys", "--level N", ROW.example],
        ),
    ):
        with pytest.raises(SystemExit) as exited:
            main(words)
        assert exited.value.code == 0
        printed = capsys.readouterr().out
        assert all(word in printed for word in said)


def test_an_option_without_the_one_it_belongs_to_is_refused(place, capsys):
    assert _evaluate(place, "--twice") == 1
    said = "uss-jax: --twice has no effect without --level; leave it out\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("words", [["--kind", "cow"], ["--level", "-1"], ["--lev", "1"]])
def test_values_of_options_are_checked_by_the_command_line(place, words):
    with pytest.raises(SystemExit) as exited:
        _evaluate(place, *words)
    assert exited.value.code == 2


def test_every_row_has_a_module_that_takes_its_options():
    for name, suite in suites.SUITES.items():
        run = importlib.import_module(f"uss_jax.evaluation.suites.{name}").run
        keywords = [
            key
            for key, of in inspect.signature(run).parameters.items()
            if of.kind is of.KEYWORD_ONLY
        ]
        assert sorted(keywords) == sorted(option.name for option in suite.options)
