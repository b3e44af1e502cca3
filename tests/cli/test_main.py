import argparse
import os
import subprocess
import sys

import pytest

import uss_jax
from uss_jax.cli import main as cli
from uss_jax.cli.arguments import path
from uss_jax.errors import UserError

# Arguments of free text that name no file.
WORDS = {
    "prepare": {"--name", "--version", "--split", "beam_options"},
    "mine": {"--split", "--show"},
    "captions": {"--split", "--feature"},
    "query make": {"--text"},
    "make-pairs": {"--split"},
    "evaluate pairs": {"--split"},
    "evaluate tagging": {"--split"},
    "evaluate planted": {"--split"},
    "separate": {"--classes", "--without", "--text"},
    "export": {"--licence", "--split"},
    "train": {"--coordinator"},
    "train-tagger": {"--coordinator"},
}
HEAVY = ("jax", "flax", "numpy", "orbax.checkpoint", "grain", "torch", "soundfile")


def test_too_little_memory_is_said_and_other_errors_are_not(monkeypatch, capsys):
    def raising(text):
        def run(args):
            raise RuntimeError(text)

        monkeypatch.setattr("uss_jax.cli.inspect.run", run)

    raising("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore")
    assert cli.main(["inspect", "demo"]) == 1
    said = capsys.readouterr().err
    assert "uss-jax: the device has too little memory for this; take another one (JAX_" in said
    assert said.count("\n") == 1
    raising("INTERNAL: something else")
    with pytest.raises(RuntimeError, match="something else"):
        cli.main(["inspect", "demo"])


@pytest.mark.parametrize("words", [[], *([name] for name in cli.COMMANDS)])
def test_help_answers_without_heavy_imports(words):
    script = (
        "import sys\nfrom uss_jax.cli.main import main\n"
        f"try:\n    main({[*words, '--help']})\n"
        "except SystemExit as error:\n    assert not error.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == "[]\n"
    for said in ("usage: uss-jax", "example:\n  uss-jax") if words else cli.COMMANDS:
        assert said in ran.stdout


def _text_arguments(parser, command):
    """Yields command and argument for each whose value is neither chosen nor counted."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from _text_arguments(below, f"{command} {name}")
        elif action.nargs != 0 and not action.choices and action.type in (None, path):
            yield command, action


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_tilde_in_a_path_is_the_home_folder(command, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for words, action in _text_arguments(cli.build_parser(command), command):
        name = action.option_strings[-1] if action.option_strings else action.dest
        if name in WORDS.get(words, ()):
            assert action.type is None, (words, name)
        else:
            assert action.type is not None, (words, name, "is a path, or belongs into WORDS")
            assert action.type("~/x") == "/home/me/x"
            assert action.type("gs://lab/~/x") == "gs://lab/~/x"


@pytest.mark.parametrize(
    ("words", "status", "out", "err"),
    [
        (["--version"], 0, f"uss-jax {uss_jax.__version__}\n", ""),
        (["separat"], 2, "", "invalid choice: 'separat'"),
        ([], 2, "", "required: COMMAND"),
        (["train-tagger"], 2, "", "required: --config, --workdir"),
        (["train", "--config", "x", "--workdir", "y", "--steps", "3"], 2, "", "--steps"),
        (["inspect", "x", "--config.seed=3"], 2, "", "unrecognized arguments: --config.seed=3"),
        (["query", "list", "x", "--config.a"], 2, "", "unrecognized arguments: --config.a"),
    ],
)
def test_wrong_words_end_with_status_2_and_the_usage(words, status, out, err, capsys):
    with pytest.raises(SystemExit) as exited:
        cli.main(words)
    assert exited.value.code == status
    printed = capsys.readouterr()
    assert printed.out == out
    assert err in printed.err


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (None, 0, ""),
        (UserError("it is so; do this"), 1, "uss-jax: it is so; do this\n"),
        (KeyboardInterrupt(), 130, "uss-jax: interrupted\n"),
    ],
)
def test_status_is_0_only_on_success(monkeypatch, capsys, raised, status, said):
    def run(args):
        assert args.config_overrides == ["--config.a=1"]
        if raised is not None:
            raise raised

    monkeypatch.setattr("uss_jax.cli.train.run", run)
    words = ["train", "--config", "c", "--config.a=1", "--workdir", "w"]
    assert cli.main(words) == status
    assert capsys.readouterr().err == said


def test_options_of_a_pipeline_may_begin_as_keys_of_a_config_do(monkeypatch):
    given = []
    monkeypatch.setattr("uss_jax.cli.prepare.run", lambda args: given.extend(args.beam_options))
    words = ["--audio=a", "--labels=l", "--out=o", "--name=n", "--version=1.0.0", "--split=s"]
    assert cli.main(["prepare", *words, "--engine", "beam", "--", "--config.file=x"]) == 0
    assert given == ["--config.file=x"]


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    def run(args):
        raise ZeroDivisionError

    monkeypatch.setattr("uss_jax.cli.train.run", run)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "--config", "c", "--workdir", "w"])


def test_a_reader_that_stops_reading_is_no_error():
    read, write = os.pipe()
    os.close(read)
    script = "import sys; from uss_jax.cli import main, index\n"
    script += "index.run = lambda args: print('x' * 100000)\nsys.exit(main.main(['index', '.']))"
    ran = subprocess.run([sys.executable, "-c", script], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (ran.returncode, ran.stderr) == (141, b"")


def test_a_name_that_is_too_long_is_a_sentence(capsys):
    assert cli.main(["inspect", "x" * 5000]) == 1
    assert "xxx... is too long for a file name; give a shorter one" in capsys.readouterr().err
