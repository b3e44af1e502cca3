"""What `uss-jax train --dry-run` says."""

import re

import pytest

from tests.tiny import RATE, tagger_variables, train_words, write_place, write_separator
from uss_jax.bundles.bundle import read_bundle, write_bundle
from uss_jax.bundles.nets import layout
from uss_jax.cli.main import main
from uss_jax.models.resunet import ResUNet
from uss_jax.training.state import parameter_count


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("train"))


@pytest.mark.long
def test_a_dry_run_says_what_a_run_would_need_and_writes_nothing(
    place, tmp_path, capsys, quick_compilation
):
    changed = {"data.records": "", "sed_bundle": place / "tagger", "query_bundle": place / "tagger"}
    changed["init_from"] = write_separator(tmp_path / "first", "soft")
    words = train_words("resunet30.py", place, tmp_path / "run", changed)
    del words[words.index("--workdir") : words.index("--workdir") + 2]
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    separator = parameter_count(
        layout(ResUNet(n_fft=128, hop_samples=64, channels=(4, 4)))["params"]
    )
    tagger = parameter_count(tagger_variables()["params"])
    for part in (
        "mesh: 8 x cpu along data",
        f"{separator / 1e6:.2f} M trained, {2 * tagger / 1e6:.2f} M frozen",
        "8 items, 1 per device",
        f"starting from {tmp_path / 'first'}: ",
        "no upper bound on the speed: the peak FLOP/s of cpu is not known (devices/cost.py lists",
    ):
        assert part in said
    assert re.search(r"memory per device: 0\.\d+ GB", said)
    (read,) = re.findall("input: (.*) MB per step", said)
    assert float(read) == pytest.approx(8 * (2 * RATE + 3 * 4 + 2) / 1e6, rel=1e-3)
    assert not (tmp_path / "run").exists()

    assert main(words) == 1
    assert "--workdir is missing" in capsys.readouterr().err


@pytest.mark.long
def test_a_dry_run_with_mined_conditions_leaves_the_query_net_out_of_the_step(
    place, tmp_path, capsys, quick_compilation
):
    def said(**changed):
        leaves = {"data.records": "", "anchors.source": "table", "query.kind": "soft", **changed}
        words = train_words("resunet30.py", place, tmp_path / "run", leaves)
        assert main([*words, "--dry-run"]) == 0
        out = capsys.readouterr().out
        read, flops = (
            float(re.search(pattern, out)[1])
            for pattern in (r"input: (.*) MB per step", r"operations: (\S+) TFLOP per step")
        )
        return read, flops

    online, mined = said(), said(**{"query.table": "anchors.conditions"})
    assert mined[0] - online[0] == pytest.approx(8 * 527 * 4 / 1e6, rel=1e-2)
    masked = {"query.source.own": 0.5, "query.source.masked": 0.5}
    both = said(**{"query.table": "anchors.conditions", **masked})
    assert both[0] - mined[0] == pytest.approx(8 / 1e6, abs=2e-6)
    assert mined[1] < online[1]
    assert both[1] == pytest.approx(online[1], rel=1e-3)


def test_a_dry_run_refuses_the_bundles_that_a_run_refuses(place, tmp_path, capsys):
    config = {k: v for k, v in read_bundle(place / "tagger").config.items() if k != "hashes"}
    for part, other in (("sed", "query"), ("query", "sed")):
        alone = {name: of for name, of in config.items() if name != other}
        write_bundle(tmp_path / part, alone, {part: tagger_variables()})
    by_names = write_separator(tmp_path / "by_names", "one_hot")
    for changed, said in (
        ({"sed_bundle": tmp_path / "query"}, "query has no sed; it is a tagger bundle"),
        ({"query_bundle": tmp_path / "sed"}, "sed has no query; it is a tagger bundle"),
        ({"query_bundle": by_names}, "has no tagging net: its conditions are one_hot"),
        (
            {"sed_bundle": tmp_path / "query", "anchors.source": "table"},
            "query has no sed; it is a tagger bundle",
        ),
        ({"init_from": tmp_path / "nowhere"}, "nowhere is not a bundle or workdir"),
        ({"init_from": by_names}, "by_names differs from this run: query.kind=one_hot, not soft"),
        ({"sed_net": "htsat"}, "sed_bundle holds the net cnn14, config.sed_net is htsat"),
        ({"sample_rate": 16000}, "config.sed_bundle is a net for 8000 Hz, config.sample_rate is"),
    ):
        words = train_words("resunet30.py", place, tmp_path / "run", changed)
        del words[words.index("--workdir") : words.index("--workdir") + 2]
        assert main([*words, "--dry-run"]) == 1
        assert said in capsys.readouterr().err
