"""The bundle `yamnet` by name, where a tagger's bundle is expected, at another sampling rate."""

import json

import numpy as np
import pytest

from tests.tiny import RATE, noise, tone, train_words, write_records
from uss_jax.audio.files import write_wav
from uss_jax.bundles.model import Model
from uss_jax.cli.main import main
from uss_jax.ontology import load_ontology

QUICK_COMPILATION = True
pytestmark = pytest.mark.usefixtures("one_device")

MAN, SPEECH, BEEP, NOISE = (
    load_ontology().resolve(name)
    for name in ("Male speech, man speaking", "Speech", "Beep, bleep", "White noise")
)
UNKNOWN = 'the net yamnet has no output for "Male speech, man speaking" (below Speech)'


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("yamnet")
    clips = [(f"beep{i}", tone(800 + 100 * i, 1.3), [BEEP]) for i in range(4)]
    clips += [(f"noise{i}", noise(i, 1.3), [NOISE]) for i in range(3)]
    clips += [("man", tone(150, 1.3), [MAN, SPEECH])]
    write_records(place / "records", "train", clips)
    return place


def test_it_mines_anchors_and_names_the_classes_that_it_cannot_tell(place, capsys):
    words = ["--records", place / "records", "--sed", "yamnet", "--out", place / "anchors.npz"]
    assert main(["mine", *map(str, words)]) == 0
    out, err = capsys.readouterr()
    assert "anchors of 9 labels of 8 clips" in out
    assert f"{UNKNOWN}: their probability is always 0; the anchors of these labels" in err


def test_tagging_is_evaluated_over_the_classes_that_it_can_tell(place, capsys):
    words = ["--model", "yamnet", "--data", place / "records", "--split", "train"]
    assert main(["evaluate", "tagging", *map(str, words), "--out", str(place / "t.json")]) == 0
    out, _ = capsys.readouterr()
    assert "left out, since the net has no output for them: Male speech, man speaking\n" in out
    results = json.loads((place / "t.json").read_text())
    for row in results["rows"]:
        assert row["classes"]["unknown"] == ["Male speech, man speaking"]
        assert set(row["classes"]["average_precision"]) == {"Speech", "Beep, bleep", "White noise"}
        assert row["classes"]["without_positive"] == 527 - 4
        assert row["map"] > 0.6


@pytest.mark.long
@pytest.mark.parametrize("config", ["resunet30.py:condition=soft", "quickstart.py:part=separator"])
def test_a_separator_is_trained_and_asked_with_it(place, tmp_path, capsys, config):
    changed = {"sed_bundle": "yamnet", "query_bundle": "yamnet", "total_steps": 2}
    if "quickstart" in config:  # with its own choices: table, other speeds, class vectors
        words = ["--records", place / "records", "--sed", "yamnet", "--out", tmp_path / "table.npz"]
        assert main(["mine", *map(str, words)]) == 0
        changed |= {"anchors.table": tmp_path / "table.npz", "segment_seconds": 2.0}
        changed["data.clip_seconds"] = 2.0
    assert main(train_words(config, place, tmp_path / "run", changed)) == 0
    said = capsys.readouterr()
    assert f"{UNKNOWN}: their probability is always 0; the anchors" in said.out + said.err
    model = Model(tmp_path / "run")
    assert (
        model.sample_rate == model.sed.module.sample_rate == model.tagger.module.sample_rate == RATE
    )
    assert (model.sed.module.patch_hop_frames, model.tagger.module.patch_hop_frames) == (24, 48)
    recording = tmp_path / "beep.wav"
    write_wav(recording, tone(900, 2.0)[None], RATE)
    ask = ["separate", str(recording), "--model", str(tmp_path / "run"), "--out", str(tmp_path)]
    assert main([*ask, "--classes", "Male speech, man speaking"]) == 1
    assert UNKNOWN in capsys.readouterr().err
    assert main([*ask, "--classes", "Beep, bleep", "--threshold", "0"]) == 0
    assert np.isfinite(json.loads((tmp_path / "beep" / "report.json").read_text())["seconds"])
    if "quickstart" in config:
        assert json.loads((tmp_path / "run/config.json").read_text())["query"]["kind"] == (
            "class_vectors"
        )
        assert main([*ask, "--levels", "1", "--threshold", "0.01", "--overwrite"]) == 0
        assert (tmp_path / "beep/level=1/Sounds of things.wav").is_file()
