"""`uss-jax query`, and what separates with its banks, with either family of tagging nets."""

import re

import numpy as np
import pytest
import soundfile

from tests import tiny
from uss_jax.bundles.bundle import write_bundle
from uss_jax.bundles.nets import fields_of
from uss_jax.cli.main import main
from uss_jax.models.resunet import ResUNet

QUICK_COMPILATION = True


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two bundles, examples of two sounds, a recording and records."""
    place = tmp_path_factory.mktemp("query")
    tiny.write_separator(place / "cnn14", "embedding")
    separator = ResUNet(n_fft=128, hop_samples=64, channels=(4, 4), condition_width=527)
    model = {"model": fields_of(tiny.ONE_BLOCK)}
    config = {
        "kind": "separator",
        "sample_rate": tiny.RATE,
        "segment_seconds": tiny.SEGMENT_SECONDS,
        "separator": fields_of(separator),
        "query": {"kind": "soft", **model},
        "sed": model,
    }
    tagger = tiny.tagger_variables(net=tiny.ONE_BLOCK)
    variables = tiny.random_variables(separator, (1, 1, 640), (1, 527))
    write_bundle(place / "htsat", config, {"separator": variables, "query": tagger, "sed": tagger})
    for name, waveform in (("bell", tiny.tone(900, 1)), ("wind", tiny.noise(0, 0.7))):
        (place / name).mkdir()
        soundfile.write(place / name / "example.wav", waveform, tiny.RATE)
    soundfile.write(place / "street.wav", tiny.noise(1, 1.3) + tiny.tone(900, 1.3), tiny.RATE)
    clips = [(f"clip{at}", tiny.noise(at, 1.0), [at]) for at in range(3)]
    tiny.write_records(place / "records", "train", clips)
    return place


@pytest.fixture(params=["cnn14", "htsat"])
def net(request):
    return request.param


def test_a_bank_is_made_listed_and_used(place, net, tmp_path, capsys):
    bank = str(tmp_path / "bank.npz")
    model = ["--model", str(place / net)]
    assert main(["query", "make", bank, str(place / "bell"), str(place / "wind"), *model]) == 0
    assert main(["query", "list", bank]) == 0
    said = capsys.readouterr().out
    assert "2 vectors of width" in said
    assert said.endswith("  bell\n  wind\n")
    (hash,) = re.findall(r"query net ([0-9a-f]{64})", said)
    for of in (bank, str(place / net)):  # whichever is asked names the same net
        assert main(["inspect", of]) == 0
        assert f"query net {hash}" in capsys.readouterr().out
    words = ["separate", str(place / "street.wav"), *model, "--out", str(tmp_path / "out")]
    assert main([*words, "--query", bank, "--classes", "Bell"]) == 0
    assert main([*words, "--query", str(place / "bell"), "--overwrite"]) == 0
    with np.load(bank) as stored:
        assert stored["vectors"].shape[0] == 2
        assert np.abs(np.diff(stored["vectors"], axis=0)).max() > 1e-4


def test_what_is_wrong_with_a_bank_is_said(place, tmp_path, capsys):
    bank = str(tmp_path / "bank.npz")
    model = ["--model", str(place / "cnn14")]
    make = ["query", "make", bank, str(place / "bell"), *model]
    assert main(make) == 0
    assert main(make) == 1
    assert "give --overwrite" in capsys.readouterr().err
    assert main([*make[:3], str(place / "bell"), str(place / "bell"), *model, "--overwrite"]) == 1
    assert 'two examples are called "bell"' in capsys.readouterr().err
    assert main(["query", "make", str(tmp_path / "bank.txt"), str(place / "bell"), *model]) == 1
    assert "must end in .npz" in capsys.readouterr().err
    words = ["separate", str(place / "street.wav"), "--out", str(tmp_path / "out")]
    assert main([*words, "--query", bank, "--model", str(place / "htsat")]) == 1
    assert "takes conditions of width 527" in capsys.readouterr().err
    assert main([*words, "--query", bank, "--classes", "horn", *model]) == 1
    assert 'no vector called "horn"; it has bell' in capsys.readouterr().err
    (tmp_path / "bad.npz").write_bytes(b"no bank")
    assert main(["query", "list", str(tmp_path / "bad.npz")]) == 1
    assert "cannot be read as a query bank" in capsys.readouterr().err


def test_levels_classes_and_mining_with_htsat(place, tmp_path):
    words = ["separate", str(place / "street.wav"), "--model", str(place / "htsat")]
    words += ["--threshold", "0.0", "--out"]
    assert main([*words, str(tmp_path / "levels"), "--levels", "1"]) == 0
    assert len(list((tmp_path / "levels/street/level=1").iterdir())) == 7
    assert main([*words, str(tmp_path / "classes"), "--classes", "Dog"]) == 0
    table = str(tmp_path / "anchors.npz")
    mine = ["mine", "--records", str(place / "records"), "--split", "train", "--out", table]
    assert main([*mine, "--sed", str(place / "htsat"), "--candidates", "1"]) == 0
    with np.load(table) as stored:
        assert stored["begin_sample"].shape == (3, 1)


def test_what_is_advised_are_options_that_the_command_has(place, tmp_path, capsys):
    model = ["--model", str(tiny.write_separator(tmp_path / "one_hot", "one_hot"))]
    bank = str(tmp_path / "bank.npz")
    assert main(["query", "make", bank, str(place / "bell"), *model]) == 1
    assert "takes classes, not recordings; give --text instead of fold" in capsys.readouterr().err
    assert main(["query", "make", bank, "--text", "xyzzy plugh", *model]) == 1
    assert "in other words, in English, or give --text NAME" in capsys.readouterr().err
    words = ["separate", str(place / "street.wav"), *model, "--query", str(place / "bell")]
    assert main(words) == 1
    assert "give --classes instead of --query" in capsys.readouterr().err
