"""The ablation configs: each is built and takes a step, shrunk; and all are listed."""

import json
import re
import runpy

import jax
import pytest

import uss_jax.train
from tests.tiny import CONFIGS, train_words, write_place
from uss_jax.cli.config import load_config
from uss_jax.cli.main import main
from uss_jax.errors import UserError
from uss_jax.training.mesh import make_mesh

ABLATIONS = runpy.run_path(str(CONFIGS / "ablations.py"))["ABLATIONS"]
_SHRUNK = 8  # times in time
# Between two others of its kind: what is built is no other program, only another size.
_BETWEEN = ("segment=1", "segment=4", "segment=6", "segment=8", "sources=3", "width=1.5")
STEPPED = [name for name, changes in ABLATIONS.items() if changes and name not in _BETWEEN]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("ablations"))


def _shrunk(name):
    """What makes a step of an ablation small and keeps what it is about."""
    config = load_config(str(CONFIGS / f"ablations.py:{name}"), [])
    leaves = {
        "total_steps": 1,
        "checkpoint_every_steps": 1,
        "segment_seconds": config.segment_seconds / _SHRUNK,
        "data.clip_seconds": config.data.clip_seconds / _SHRUNK,
        "separator.n_fft": 32,
        "separator.hop_samples": 32,
        "separator.channels": (config.separator.channels[0] // 8,),
        "separator.blocks_per_level": config.separator.blocks_per_level,
    }
    if name.split("=")[0] not in ("condition", "query", "anchors"):
        # Without the frozen nets there is less to compile.
        leaves |= {"anchors.source": "random", "query.kind": "one_hot"}
    return leaves


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", STEPPED)
def test_an_ablation_takes_a_step(place, tmp_path, name, capsys, monkeypatch):
    # One device: less to compile than for eight.
    monkeypatch.setattr(uss_jax.train, "make_mesh", lambda: make_mesh(jax.devices()[:1]))
    words = train_words(f"ablations.py:{name}", place, tmp_path / "run", _shrunk(name))
    assert main(words) == 0, capsys.readouterr().err
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] > 0
    training = json.loads((tmp_path / "run" / "config.json").read_text())["training"]
    for leaf, value in ABLATIONS[name].items():
        if leaf in _shrunk(name) or leaf == "data.split":
            continue  # changed in proportion, or of records that are not here
        section, _, key = leaf.rpartition(".")
        assert (training[section] if section else training)[key] == value


def test_every_ablation_is_listed():
    text = (CONFIGS / "README.md").read_text().partition("\n## Ablations")[2]
    table = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    listed = [name for name in re.findall(r"`([^`]*)`", table) if name in ABLATIONS]
    assert sorted(listed) == sorted(ABLATIONS)


def test_an_ablation_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="expected one of condition=one_hot"):
        load_config(str(CONFIGS / "ablations.py:depth=90"), [])
