"""The ablation configs: each is built and takes a step, shrunk; and all are listed."""

import functools
import json
import math
import re
import runpy

import pytest

from tests.tiny import CONFIGS, train_words, write_place
from uss_jax.bundles.nets import build_separator
from uss_jax.cli.config import load_config
from uss_jax.cli.main import main
from uss_jax.errors import UserError
from uss_jax.models.bandsplit import mel_bands
from uss_jax.training.asking import MINED, SOURCES, check_shares

pytestmark = pytest.mark.usefixtures("one_device")

_MODULE = runpy.run_path(str(CONFIGS / "ablations.py"))
ABLATIONS, BAND_SPLIT = _MODULE["ABLATIONS"], _MODULE["BAND_SPLIT"]
_SHRUNK = 8  # times in time
_SAME = {"condition": "query", "asked": "query"}  # kinds of ablations that change the same
# These need mined conditions; tests/training/test_asking.py takes steps with all sources.
_MINED = [f"asked={source}" for source in MINED]


def _groups():
    """The ablations, no two of one kind together: what each changes is in some run of several."""
    groups = []
    for name, changes in ABLATIONS.items():
        kind = _SAME.get(name.split("=")[0], name.split("=")[0])
        if changes and name not in _MINED:
            group = next((group for group in groups if kind not in group), None)
            if group is None:
                groups.append(group := {})
            group[kind] = name
    return [list(group.values()) for group in groups]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("ablations"))


def _shrunk(names):
    """The changes of several ablations, those of sizes in proportion to a small net and clip."""
    leaves = {"anchors.source": "random", "data.split": "train"}
    leaves |= {"segment_seconds": 2.0, "separator.channels": (32,), "separator.blocks_per_level": 1}
    if not any(name.startswith(("condition=", "query=", "asked=")) for name in names):
        leaves["query.kind"] = "one_hot"  # without a tagging net there is less to compile
    for name in names:
        leaves |= {k: v for k, v in ABLATIONS[name].items() if k != "data.split"}
    leaves["segment_seconds"] /= _SHRUNK
    leaves["separator.channels"] = (leaves["separator.channels"][0] // 8,)
    small = {"separator.n_fft": 32, "separator.hop_samples": 16, "data.clip_seconds": 10 / _SHRUNK}
    return leaves | small | {"total_steps": 1, "checkpoint_every_steps": 1}


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("names", _groups(), ids="+".join)
def test_ablations_take_a_step(place, tmp_path, names, capsys):
    leaves = _shrunk(names)
    words = train_words("ablations.py", place, tmp_path / "run", leaves)
    assert main(words) == 0, capsys.readouterr().err
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert math.isfinite(json.loads(line)["loss"])
    training = json.loads((tmp_path / "run" / "config.json").read_text())["training"]
    for leaf in (leaf for name in names for leaf in ABLATIONS[name]):
        found = functools.reduce(lambda section, key: section[key], leaf.split("."), training)
        assert found == (list(leaves[leaf]) if isinstance(found, list) else leaves[leaf])


def test_every_ablation_takes_a_step():
    stepped = [name for names in _groups() for name in names]
    assert sorted(stepped + _MINED) == sorted(n for n, changes in ABLATIONS.items() if changes)
    assert {f"asked={source}" for source in SOURCES} <= ABLATIONS.keys()
    for name in ABLATIONS:
        if name.startswith("asked="):
            check_shares(load_config(f"ablations:{name}", []).query.source.to_dict(), mined=True)


# The stereo net takes a step in tests/models/test_separator.py, other sizes do there and here.
@pytest.mark.usefixtures("quick_compilation")
def test_ablations_of_the_band_split_net_take_a_step(place, tmp_path, capsys):
    leaves = {"data.split": "train", "query.kind": "one_hot", "anchors.source": "random"}
    leaves |= {"total_steps": 1, "separator.layers": 1, "separator.bands": (16,) * 4}
    leaves |= {f"separator.{name}": 8 for name in ("width", "head_width", "hidden_width")}
    for name in ("bandsplit_condition=added", "bandsplit_span=all"):
        leaves |= BAND_SPLIT[name]
    words = train_words("ablations.py:net=bandsplit", place, tmp_path / "run", leaves)
    words = [word for word in words if not word.startswith("--config.separator.channels")]
    assert main(words) == 0, capsys.readouterr().err
    separator = json.loads((tmp_path / "run" / "config.json").read_text())["separator"]
    assert separator["condition_added"]
    assert separator["time_span"] == 0


@pytest.mark.parametrize("name", BAND_SPLIT)
def test_ablations_of_the_band_split_net_are_other_nets(name):
    config = load_config(f"ablations:{name}", [])
    base = load_config("ablations:net=bandsplit", [])
    net, plain = (
        build_separator({**c.separator.to_dict(), "condition_width": 527}) for c in (config, base)
    )
    assert (net == plain) == (name == "net=bandsplit")
    assert sum(net.bands) == net.n_fft // 2
    if name.startswith("bandsplit_bands="):
        assert len(net.bands) == int(name.partition("=")[2])
        assert net.bands in [mel_bands(count, 2048, 32000) for count in (30, 120)]
    assert (config.mixing.pan > 0) == (net.audio_channels == 2)


def test_every_ablation_is_listed():
    text = (CONFIGS / "README.md").read_text().partition("\n## Ablations")[2]
    table = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    every = ABLATIONS | BAND_SPLIT
    listed = [name for name in re.findall(r"`([^`]*)`", table) if name in every]
    assert sorted(listed) == sorted(every)


def test_an_ablation_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="expected one of condition=one_hot"):
        load_config(str(CONFIGS / "ablations.py:depth=90"), [])
