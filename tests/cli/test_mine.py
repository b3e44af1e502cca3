import json

import numpy as np
import pytest

from tests import tiny
from uss_jax.anchors.table import read_header, read_table
from uss_jax.bundles.bundle import write_bundle
from uss_jax.bundles.model import Model
from uss_jax.bundles.nets import fields_of
from uss_jax.cli.main import main
from uss_jax.data.chosen import Chosen
from uss_jax.evaluation.clips import anchors_of_clips, open_clips
from uss_jax.models.tagging import as_detector

QUICK_COMPILATION = True


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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        *(
            (["--show", "a", option, value], f"{option} has no effect with --show, which mines")
            for option, value in (
                *(("--candidates", "4"), ("--clip-seconds", "2"), ("--min-dbfs", "-60")),
                *(("--rule", "uss"), ("--batch", "16"), ("--threads", "4")),
                *(("--host", "0"), ("--hosts", "1"), ("--query", "b")),
            )
        ),
        (["--show", "a", "--picture", "{here}"], "exists; remove it or give another --picture"),
        (["--host", "1"], "--host 1 is not between 0 and 0"),
    ],
)
def test_options_that_do_not_suit_each_other_are_said_before_anything(
    tmp_path, capsys, words, said
):
    words = [word.format(here=tmp_path) for word in words]
    required = ["--records", "nowhere", "--sed", "nothing", "--out", str(tmp_path / "t.npz")]
    assert main(["mine", *required, *words]) == 1
    assert said in capsys.readouterr().err


def test_clips_are_not_cut_to_less_than_a_segment(tmp_path, capsys):
    tiny.write_records(tmp_path / "records", "train", [("a", tiny.tone(300, 0.8), [0])])
    tagger = tiny.write_tagger(tmp_path / "tagger")
    words = ["mine", "--records", tmp_path / "records", "--sed", tagger, "--out"]
    words += [tmp_path / "t.npz", "--clip-seconds", 0.25]
    assert main([str(word) for word in words]) == 1
    said = "--clip-seconds 0.25 is less than an anchor; give at least 0.5, or shorter anchors"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "t.npz").exists()


def test_a_table_of_another_segment_length_names_the_detector(tmp_path, capsys):
    tiny.write_records(tmp_path / "records", "train", [("a$_$", tiny.tone(300, 1.2), [0])])
    tagger = tiny.write_tagger(tmp_path / "tagger")
    words = ["mine", "--records", tmp_path / "records", "--sed", tagger]
    words = [str(word) for word in (*words, "--out", tmp_path / "t.npz")]
    assert main([*words, "--batch", "1"]) == 0
    config = json.loads((tagger / "config.json").read_text())
    (tagger / "config.json").write_text(json.dumps({**config, "segment_seconds": 1.0}))
    capsys.readouterr()
    assert main([*words, "--show", "a$_$"]) == 1
    said = f"t.npz has anchors of 4000 samples, {tagger} asks for 8000; give the --sed and --seg"
    assert said in capsys.readouterr().err
    assert main([*words, "--show", "a$_$", "--segment-seconds", "0.5"]) == 0


def test_anchors_have_the_length_that_is_asked_for(tmp_path):
    clips = [(f"tone{i}", tiny.tone(300 + 150 * i, 1.5), [i]) for i in range(2)]
    tiny.write_records(tmp_path / "records", "train", clips)
    tagger = tiny.write_tagger(tmp_path / "tagger")
    words = ["mine", "--records", tmp_path / "records", "--sed", tagger, "--out"]
    words += [tmp_path / "t.npz", "--batch", 1, "--candidates", 3, "--segment-seconds", 0.25]
    assert main([str(word) for word in words]) == 0
    samples = tiny.RATE // 4
    assert read_header(tmp_path / "t.npz")["segment_samples"] == samples
    reader, model = open_clips(tmp_path / "records", "train", Model(tagger))
    table = read_table(tmp_path / "t.npz", reader.index, samples)
    chosen = Chosen(np.arange(2), np.arange(2))
    found = anchors_of_clips(reader, chosen, model.sed, samples, min_dbfs=-60.0)
    np.testing.assert_array_equal(table.begin_sample[:, 0], found.begin_sample)
