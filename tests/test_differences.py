"""README's table "Where it differs": each row has a switch, or says why it has none."""

import pathlib
import re
import shlex

import pytest

from tests.tiny import CONFIGS
from uss_jax.cli.config import load_config
from uss_jax.cli.main import COMMANDS, build_parser

README = pathlib.Path(__file__).parents[1] / "README.md"
# What a command asks for besides.
REQUIRED = {
    "separate": "in.wav --model M --out O",
    "mine": "--records R --sed S --out T.npz",
    "make-pairs": "--records R --sed S --out O",
    "evaluate": "--model M --data D",
}


def _rows() -> list[list[str]]:
    """The cells of the table's rows, without its headings."""
    section = README.read_text().split("## Where it differs")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if not row[0].startswith("**")]


def _switches() -> list[str]:
    """The words of each switch: a command, and what to set."""
    codes = [code for row in _rows() for code in re.findall("`([^`]+)`", row[2])]
    return [code for code in codes if code.split()[0] in COMMANDS and " " in code]


def _in_bash(words: str) -> shlex.shlex:
    lexer = shlex.shlex(words, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return lexer


def _leaf(config, key):
    for part in key.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize("row", _rows(), ids=lambda row: row[0][:40])
def test_every_difference_has_a_switch_or_a_reason(row):
    assert len(row) == 3
    assert all(row)
    assert re.match("none: .", row[2]) or any(f"`{s}`" in row[2] for s in _switches())


@pytest.mark.parametrize("words", _switches())
def test_every_switch_sets_something(words):
    first, *rest = shlex.split(words)
    assert [first, *rest] == list(_in_bash(words))  # else bash takes a bracket for its own
    if first in ("train", "train-tagger"):
        option, name, *rest = rest
        assert option == "--config"
        before, after = (load_config(str(CONFIGS / f"{name}.py"), words) for words in ([], rest))
        for word in rest:
            key = word.removeprefix("--config.").partition("=")[0]
            assert _leaf(before, key) != _leaf(after, key)
        return
    parser = build_parser(first)
    suite = [rest.pop(0)] if first == "evaluate" else []
    words = [*suite, *REQUIRED[first].split()]
    before, after = (vars(parser.parse_args([*words, *more])) for more in ([], rest))
    assert before.keys() == after.keys()
    for word in rest:
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            assert before[name] != after[name]


def test_there_are_switches():
    assert len(_switches()) >= 10
