"""What training commands say when a run is done; the runs themselves are replaced."""

import pytest

from uss_jax.cli.main import main
from uss_jax.training import train_separator, train_tagger


@pytest.fixture(autouse=True)
def trained(monkeypatch):
    monkeypatch.setattr(train_separator, "train_separator", lambda config, workdir: None)
    monkeypatch.setattr(train_tagger, "train_tagger", lambda config, workdir: None)


@pytest.mark.parametrize(
    ("config", "asking"),
    [
        ("resunet30:condition=soft", "--classes NAME"),
        ("resunet30:condition=embedding", "--query EXAMPLES"),
    ],
)
def test_a_trained_separator_says_how_it_is_used(config, asking, capsys):
    assert main(["train", "--config", config, "--workdir", "runs/x"]) == 0
    said = capsys.readouterr().out
    assert f"`uss-jax separate AUDIO --model runs/x {asking} --out DIR`" in said
    assert "`uss-jax evaluate pairs --model runs/x --data PAIRS --out RESULTS.json`" in said
    assert said.count("\n") == 1


def test_a_trained_tagger_says_how_it_is_used(capsys):
    words = ["train-tagger", "--config", "quickstart:part=tagger", "--workdir", "runs/tagger"]
    assert main(words) == 0
    said = capsys.readouterr().out
    for part in ("sed", "query"):
        assert f"--config.{part}_bundle=runs/tagger --config.{part}_net=cnn14" in said
    assert "`uss-jax mine ... --sed runs/tagger`" in said
    assert said.count("\n") == 1
