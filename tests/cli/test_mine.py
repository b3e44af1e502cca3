import numpy as np
import pytest

from tests import tiny
from uss_jax.anchors.table import read_header
from uss_jax.bundles.bundle import write_bundle
from uss_jax.bundles.nets import fields_of
from uss_jax.cli.main import main
from uss_jax.models.tagging import as_detector


def _tagger(path, bias):
    """A tagger whose probabilities a bias of the last layer moves."""
    variables = tiny.tagger_variables()
    variables["params"]["fc_audioset"]["bias"] += np.float32(bias)
    model = {"model": fields_of(as_detector(tiny.TAGGER))}
    config = {"kind": "tagger", "sample_rate": tiny.RATE, "segment_seconds": tiny.SEGMENT_SECONDS}
    write_bundle(path, {**config, "sed": model}, {"sed": variables})
    return str(path)


def test_the_rule_reaches_the_table(tmp_path):
    clips = [(f"tone{i}", tiny.tone(300 + 150 * i, 1.5), [i]) for i in range(2)]
    tiny.write_records(tmp_path / "records", "train", clips)
    words = ["mine", "--records", tmp_path / "records", "--out", tmp_path / "t.npz", "--batch", 1]
    words = [str(word) for word in words]
    tagger = tiny.write_tagger(tmp_path / "htsat", net=tiny.ONE_BLOCK)
    assert main([*words, "--sed", str(tagger), "--rule", "htsat"]) == 0
    assert read_header(tmp_path / "t.npz")["rule"] == "htsat"


@pytest.mark.parametrize(("bias", "told"), [(0, False), (-5.5, True)])
def test_scores_no_better_than_chance_are_told(tmp_path, capsys, bias, told):
    clips = [(f"tone{i}", tiny.tone(300 + 150 * i, 0.8), [i]) for i in range(3)]
    tiny.write_records(tmp_path / "records", "train", clips)
    words = ["mine", "--records", str(tmp_path / "records"), "--out", str(tmp_path / "t.npz")]
    assert main([*words, "--batch", "8", "--sed", _tagger(tmp_path / "tagger", bias)]) == 0
    said = capsys.readouterr()
    assert "median score 0." in said.out
    assert ("the anchors are little better than random ones" in said.err) == told
