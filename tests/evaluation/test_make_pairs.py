import csv
import hashlib

import numpy as np
import pytest
import soundfile

from tests.tiny import RATE, SEGMENT, noise, tone, write_records, write_tagger
from uss_jax.bundles.model import Model
from uss_jax.cli.main import main
from uss_jax.data.chosen import Chosen
from uss_jax.data.index import load_index
from uss_jax.data.orders import BalancedOrder
from uss_jax.data.reader import ClipReader
from uss_jax.errors import UserError
from uss_jax.evaluation import make_pairs
from uss_jax.evaluation.clips import anchors_of_clips
from uss_jax.evaluation.make_pairs import (
    draw_pairs,
    mixed_pairs,
    within_full_scale,
)
from uss_jax.ontology import load_ontology

QUICK_COMPILATION = True

SPEECH, DOG, BARK, PIANO = (load_ontology().resolve(n) for n in ("Speech", "Dog", "Bark", "Piano"))
_CSR = ("label_row", "label_class")
CLIPS = [
    ("speech.wav", tone(200, 1.0), [SPEECH]),
    ("dog.wav", noise(1, 0.3), [DOG]),  # shorter than a segment
    ("bark.wav", noise(2, 1.2), [BARK, DOG]),
    ("piano.wav", tone(1000, 0.9), [PIANO]),
    ("both.wav", tone(3000, 0.7), [PIANO, SPEECH]),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("pairs")
    write_records(place / "records", "test", CLIPS)
    write_tagger(place / "tagger")
    return place


def _make(place, out, *more):
    words = ["--records", place / "records", "--sed", place / "tagger", "--out", out]
    words += ["--per-class", "4", *more]
    return main(["make-pairs", *map(str, words)])


def _manifest(folder):
    with open(folder / "manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def made(place):
    assert _make(place, place / "made") == 0
    return place / "made"


def test_every_class_has_as_many_pairs(made):
    counts = {}
    for row in _manifest(made):
        counts[int(row["class_index"])] = counts.get(int(row["class_index"]), 0) + 1
    assert counts == {SPEECH: 4, DOG: 4, BARK: 4, PIANO: 4}
    assert len(list(made.glob("class_id=*/*.source.wav"))) == 16
    assert len(list(made.glob("class_id=*/*.mixture.wav"))) == 16


def test_sources_are_the_anchors_that_the_detector_finds(place, made):
    index = load_index(place / "records", "test")
    reader, model = ClipReader(place / "records", index), Model(place / "tagger")
    ids = [id.decode() for id in index.ids]
    for row in _manifest(made):
        record, label = ids.index(row["id"]), int(row["class_index"])
        chosen = Chosen(np.array([record]), np.array([label]))
        anchors = anchors_of_clips(reader, chosen, model.sed, SEGMENT)
        assert anchors.begin_sample[0] == int(row["begin_sample"])
        source, rate = soundfile.read(made / f"{row['file']}.source.wav", dtype="float32")
        assert (len(source), rate) == (SEGMENT, RATE)
        begin, length = int(anchors.begin_sample[0]), int(anchors.samples[0])
        np.testing.assert_array_equal(
            source[:length], reader.read(record)[begin : begin + length] / np.float32(32768)
        )
        assert not source[length:].any()


def test_mixtures_add_another_sound_at_the_same_energy(made):
    for row in _manifest(made):
        source, _ = soundfile.read(made / f"{row['file']}.source.wav", dtype="float32")
        mixture, _ = soundfile.read(made / f"{row['file']}.mixture.wav", dtype="float32")
        other = mixture - source
        # Float32 rounding of the sum.
        assert np.mean(other**2) == pytest.approx(np.mean(source**2), rel=1e-4)


def test_partners_share_no_label_nor_branch(made):
    labels = {id: labels for id, _, labels in CLIPS}
    for row in _manifest(made):
        assert int(row["partner_class_index"]) in labels[row["partner_id"]]
        for label in labels[row["id"]]:
            assert not load_ontology().relatives(label) & set(labels[row["partner_id"]])


def test_the_reference_s_partner_is_the_next_item_of_its_batch(place, tmp_path, monkeypatch):
    monkeypatch.setattr(make_pairs, "_REFERENCE_BATCH", 8)
    assert _make(place, tmp_path / "out", "--pairing", "reference") == 0
    order = BalancedOrder(*(load_index(place / "records", "test").__dict__[n] for n in _CSR), 0)
    wanted = 4 * order.round_length
    records, classes = order.draw(np.arange(wanted + 8))
    ids = [id for id, _, _ in CLIPS]
    drawn = [(ids[record], int(label)) for record, label in zip(records, classes, strict=True)]
    expected = []
    for at in range(wanted):
        batch, place_in_batch = divmod(at, 8)
        partner = drawn[8 * batch + (place_in_batch + 1) % 8]
        expected.append((drawn[at][1], drawn[at][0], *partner))
    found = [
        (int(r["class_index"]), r["id"], r["partner_id"], int(r["partner_class_index"]))
        for r in _manifest(tmp_path / "out")
    ]
    assert found == sorted(expected, key=lambda row: row[0])  # silent ones too


def test_checksums_are_of_the_samples(made):
    row = _manifest(made)[0]
    for what in ("source", "mixture"):
        samples, _ = soundfile.read(made / f"{row['file']}.{what}.wav", dtype="float32")
        assert hashlib.sha256(samples.tobytes()).hexdigest() == row[f"{what}_sha256"]


def test_the_same_seed_gives_the_same_pairs(place, made, tmp_path):
    assert _make(place, tmp_path / "again") == 0
    assert _make(place, tmp_path / "other", "--seed", "1") == 0
    assert _manifest(tmp_path / "again") == _manifest(made)
    assert _manifest(tmp_path / "other") != _manifest(made)


def test_groups_are_kept(place, tmp_path):
    (tmp_path / "groups.csv").write_text("file,group\ndog.wav,rare\n")
    assert _make(place, tmp_path / "out", "--groups", tmp_path / "groups.csv") == 0
    rows = _manifest(tmp_path / "out")
    assert all((row["group"] == "rare") == (row["id"] == "dog.wav") for row in rows)
    assert any(row["group"] for row in rows)


def test_pairs_are_replaced_only_when_told(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert _make(place, out) == 0
    (out / "mark").touch()
    assert _make(place, out) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "mark").exists()
    assert _make(place, out, "--overwrite") == 0
    assert not (out / "mark").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    assert _make(place, tmp_path / "mine", "--overwrite") == 1  # not a folder of pairs
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_silent_anchors_and_lonely_clips_are_left_out(place, tmp_path, capsys):
    clips = [
        ("a", tone(200, 1.0), [SPEECH]),
        ("b", tone(300, 1.0, amplitude=1e-4), [PIANO]),
        ("c", tone(400, 1.0), [PIANO, SPEECH]),
    ]
    write_records(tmp_path / "records", "test", clips)
    words = ["--records", tmp_path / "records", "--sed", place / "tagger", "--per-class", "2"]
    assert main(["make-pairs", *map(str, words), "--out", str(tmp_path / "out")]) == 1
    assert "every anchor of the split is silent" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    published = ["--out", str(tmp_path / "published"), "--pairing", "reference"]
    assert main(["make-pairs", *map(str, words), *published]) == 0
    assert "4 pairs of 2 classes" in capsys.readouterr().out

    clips[1] = ("b", tone(300, 1.0), [PIANO])
    write_records(tmp_path / "records", "test", clips)
    assert main(["make-pairs", *map(str, words), "--out", str(tmp_path / "out")]) == 0
    assert (
        "2 pairs of 2 classes\n2 clips left out: the split has no clip" in capsys.readouterr().out
    )


def test_a_split_of_one_branch_makes_no_mixture(tmp_path):
    index = write_records(tmp_path, "test", CLIPS[1:3])
    with pytest.raises(UserError, match="no two clips of the split have unrelated classes"):
        draw_pairs(index, 2, 0)


def test_gains_stay_within_a_fiftieth_and_fifty():
    loud, quiet = np.full((1, 100), 0.5, np.float32), np.full((1, 100), 1e-4, np.float32)
    np.testing.assert_allclose(mixed_pairs(loud, quiet), loud + 50 * quiet, rtol=1e-6)
    np.testing.assert_allclose(mixed_pairs(quiet, loud), quiet + 0.02 * loud, rtol=1e-6)


def test_records_of_another_rate_are_refused(place, tmp_path, capsys):
    write_records(tmp_path / "records", "test", CLIPS)
    (tmp_path / "records" / "metadata.json").write_text(
        '{"sample_rate": 16000, "encoding": "pcm_s16le"}'
    )
    words = ["--records", tmp_path / "records", "--sed", place / "tagger", "--out", tmp_path / "o"]
    assert main(["make-pairs", *map(str, words)]) == 1
    assert "prepare records with --sample-rate 8000" in capsys.readouterr().err


def test_a_mixture_too_loud_for_any_reader_is_scaled_with_its_source():
    source = np.float32([[0.5, -0.25], [0.5, 0.1]])
    mixture = np.float32([[0.5, -20.0], [9.0, 0.1]])
    scaled, mixed = within_full_scale(source, mixture)
    np.testing.assert_allclose(scaled, [[0.025, -0.0125], [0.5, 0.1]])
    np.testing.assert_allclose(mixed, [[0.025, -1.0], [9.0, 0.1]])
