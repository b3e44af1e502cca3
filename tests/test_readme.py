"""Commands in the READMEs are ones that the program takes."""

import pathlib
import re
import shlex

import jax
import pytest

from uss_jax.cli.config import load_config
from uss_jax.cli.main import COMMANDS, build_parser
from uss_jax.training.settings import separator_settings

ROOT = pathlib.Path(__file__).parents[1]
# What stands for more words, or for a variable of the shell.
_BLANKS = {" ...": "", "${split}": "train", "$split": "train", "$name": "sources=2"}


def _commands():
    for path in ("README.md", "configs/README.md", "launch/README.md", "tests/README.md"):
        text = re.sub(r"\\\n\s*", " ", (ROOT / path).read_text())
        for line in map(str.strip, text.splitlines()):
            if re.match(r"uss-jax [a-z-]+ \S", line):
                for blank, word in _BLANKS.items():
                    line = line.replace(blank, word)
                yield line


@pytest.mark.parametrize("line", list(_commands()))
def test_commands_of_the_readmes_are_taken(line, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    command, *words = shlex.split(line, comments=True)[1:]
    assert command in COMMANDS
    overrides = [word for word in words if word.startswith("--config.")]
    rest = [word for word in words if word not in overrides]
    if command.startswith("train") and "--config" not in rest:
        rest += ["--config", "resunet30", "--workdir", "run"]
    args = build_parser(command).parse_args(rest)
    if command.startswith("train"):
        config = load_config(args.config, overrides)
        if command == "train":
            separator_settings(config)


def test_the_config_for_thousands_of_clips_takes_the_words_of_the_small_one(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    small = "uss-jax train --config quickstart:part=separator --workdir runs/separator"
    (line,) = (line for line in _commands() if line.startswith(small))
    words = [word for word in shlex.split(line) if word.startswith("--config.")]
    said = (ROOT / "README.md").read_text().split("For thousands of clips")[1]
    config, *keys = re.findall("`([a-z0-9_.:]+=[^`]+)`", said.split("YAMNet finds")[0])
    assert "query.kind=class_vectors" in keys
    separator_settings(load_config(config, words + [f"--config.{key}" for key in keys]))


def test_there_are_commands_to_test():
    assert len(list(_commands())) > 15
