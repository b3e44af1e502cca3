"""FSDKaggle2018, FSD50K and Slakh2100: their imitations, scored and recomputed."""

import csv
import json

import numpy as np
import pytest
import soundfile

from tests.evaluation.suites import imitations
from tests.tiny import write_separator
from uss_jax.bundles.model import Model
from uss_jax.cli.main import main
from uss_jax.errors import UserError
from uss_jax.evaluation.scoring import AVERAGE, CLASS, ORACLE
from uss_jax.evaluation.suites import fsd50k, fsdkaggle2018, mixing, slakh2100
from uss_jax.evaluation.suites.mixing import Recording, class_index_of, mixed_neighbours
from uss_jax.ontology import load_ontology

SAMPLES = 2 * imitations.RATE


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("suites")
    for kind in ("soft", "embedding"):
        write_separator(place / kind, kind)
    for suite in ("fsdkaggle2018", "fsd50k", "slakh2100"):
        getattr(imitations, suite)(place / suite)
    return place


def _evaluate(place, suite, kind, out, *more):
    words = ["evaluate", suite, "--model", place / kind, "--data", place / suite, "--out", out]
    assert main([str(word) for word in [*words, *more]]) == 0
    return json.loads(out.read_text())


def _sdr(reference, estimate):
    reference, estimate = reference.astype(np.float64), estimate.astype(np.float64)
    return 10 * np.log10(np.mean(reference**2) / np.mean((estimate - reference) ** 2))


def _recomputed(model, pairs, averages):
    """Row -> mean over classes of the median SDRi, from (label, source, mixture), one at a time."""
    gains = {ORACLE: {}, AVERAGE: {}}
    for label, source, mixture in pairs:
        oracle = np.asarray(model.condition(source[None], np.zeros(1, np.int32)))[0]
        for row, condition in ((ORACLE, oracle), (AVERAGE, averages[label])):
            estimate = np.asarray(model.separate(mixture[None], condition[None]))[0]
            gain = _sdr(source, estimate) - _sdr(source, mixture)
            gains[row].setdefault(label, []).append(gain)
    return {row: np.mean([np.median(v) for v in of.values()]) for row, of in gains.items()}


def _averages(model, sources):
    """Label -> mean over (label, source) of the mean over half-second segments."""
    vectors = {}
    for label, source in sources:
        segments = source.reshape(-1, model.segment_samples)
        found = np.asarray(model.condition(segments, np.zeros(len(segments), np.int32)))
        vectors.setdefault(label, []).append(found.mean(axis=0))
    return {label: np.mean(of, axis=0) for label, of in vectors.items()}


def _rows(results):
    return {row["query"]: row for row in results["rows"] if row["group"] == "all"}


def _read(path):
    return np.resize(soundfile.read(path, dtype="float32")[0], SAMPLES)


def _published(audio, names, count):
    """The reference's pairs of (file, label) rows, in the order in which it makes them."""
    random = np.random.RandomState(1234)
    counts, pairs = dict.fromkeys((label for _, label in names), 0), []
    while min(counts.values()) < count:
        for i in random.permutation(len(names)):
            (name, label), (other, other_label) = names[i], names[(i + 1) % len(names)]
            if label != other_label and counts[label] < count:
                a, b = (_read(audio / n) for n in (name, other))
                ratio = (np.mean(a**2) / max(np.mean(b**2), 1e-10)) ** 0.5
                pairs.append((label, a, a + b * np.clip(ratio, 0.02, 50)))
                counts[label] += 1
    return pairs


def _kaggle(folder, split, count):
    name = {"train": "train_post_competition", "test": "test_post_competition_scoring_clips"}[split]
    lines = (folder / "FSDKaggle2018.meta" / f"{name}.csv").read_text().splitlines()[1:]
    names = [line.split(",")[:2] for line in lines]
    return _published(folder / f"FSDKaggle2018.audio_{split}", names, count)


def _fsd50k(folder, split, count):
    part = {"train": "dev", "test": "eval"}[split]
    with open(folder / "FSD50K.ground_truth" / f"{part}.csv", newline="") as file:
        names = [(f"{r['fname']}.wav", r["labels"].split(",")[0]) for r in csv.DictReader(file)]
    return _published(folder / f"FSD50K.{part}_audio", names, count)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("suite", "transcribed"), [(fsdkaggle2018, _kaggle), (fsd50k, _fsd50k)])
def test_pairs_are_the_published_ones_sample_by_sample(
    place, monkeypatch, suite, transcribed, split
):
    monkeypatch.setattr(mixing, "PER_CLASS", 5)
    folder = place / suite.__name__.split(".")[-1]
    expected = transcribed(folder, split, 5)
    items = suite.items(folder, split)
    assert [item.label for item in items] == [label for label, _, _ in expected]
    for item, (_, source, mixture) in zip(items, expected, strict=True):
        np.testing.assert_array_equal(item.read("source", imitations.RATE), source)
        np.testing.assert_allclose(item.read("mixture", imitations.RATE), mixture, atol=1e-6)


def test_fsdkaggle2018(place, tmp_path, monkeypatch):
    monkeypatch.setattr(mixing, "PER_CLASS", 4)
    results = _evaluate(place, "fsdkaggle2018", "soft", tmp_path / "r.json")
    model, folder = Model(place / "soft"), place / "fsdkaggle2018"
    train, test = (_kaggle(folder, split, 4) for split in ("train", "test"))
    averages = _averages(model, [(label, source) for label, source, _ in train])
    expected = _recomputed(model, test, averages)
    rows = _rows(results)
    for row in (ORACLE, AVERAGE):
        assert rows[row]["pairs"] == 16
        assert rows[row]["sdri"] == pytest.approx(expected[row], abs=2e-3)
    assert rows[CLASS]["classes"]["number"] == 4
    assert results["baseline_sdri"] == pytest.approx(
        3.01, abs=0.5
    )  # real sounds, nearly orthogonal
    assert not list(tmp_path.glob(".*"))


def test_a_hundred_mixtures_of_each_class_are_drawn(place):
    items = fsdkaggle2018.items(place / "fsdkaggle2018", "test")
    assert len(items) == 400
    assert len({item.name for item in items}) == 400


def test_fsd50k_asks_for_the_first_label_or_for_all(place, tmp_path, monkeypatch):
    monkeypatch.setattr(mixing, "PER_CLASS", 2)
    results = _evaluate(place, "fsd50k", "embedding", tmp_path / "r.json")
    assert set(results["classes"]["medians"]) == set(imitations.SOUNDS)
    model = Model(place / "embedding")
    made = {}
    for split in ("train", "test"):
        made[split] = []
        for item in fsd50k.items(place / "fsd50k", split):
            a, b = _read(item.source), _read(item.other)
            made[split].append((item.label, a, a + b * np.sqrt(np.mean(a**2) / np.mean(b**2))))
    averages = _averages(model, [(label, source) for label, source, _ in made["train"]])
    expected = _recomputed(model, made["test"], averages)
    for row in (ORACLE, AVERAGE):
        assert _rows(results)[row]["sdri"] == pytest.approx(expected[row], abs=2e-3)

    items = fsd50k.items(place / "fsd50k", "test", all_labels=True)
    labels = {*imitations.SOUNDS, "Dog", "Animal", "Keyboard_(musical)"}
    assert {item.label for item in items} == labels
    for item in items:
        related = load_ontology().relatives(item.class_index)
        assert item.other_class_index not in related


def test_slakh2100(place, tmp_path):
    results = _evaluate(place, "slakh2100", "embedding", tmp_path / "r.json")
    # Of the flute four windows peak above 0.1, ten are too few; the lost stem has no file.
    assert set(results["classes"]["medians"]) == {"the_grand.nkm", "cello_ensemble.nkm"}
    model, made = Model(place / "embedding"), {}
    for split in ("train", "test"):
        made[split] = []
        for track in sorted((place / "slakh2100" / split).iterdir()):
            mixture, _ = soundfile.read(track / "mix.flac", dtype="float32")
            for stem, label in (("S00", "the_grand.nkm"), ("S01", "cello_ensemble.nkm")):
                source, _ = soundfile.read(track / "stems" / f"{stem}.flac", dtype="float32")
                for begin in range(0, len(source), SAMPLES):
                    window = source[begin : begin + SAMPLES]
                    if np.abs(window).max() > 0.1:
                        made[split].append((label, window, mixture[begin : begin + SAMPLES]))
    averages = _averages(model, [(label, source) for label, source, _ in made["train"]])
    expected = _recomputed(model, made["test"], averages)
    rows = _rows(results)
    assert rows[ORACLE]["pairs"] == len(made["test"])
    for row in (ORACLE, AVERAGE):
        assert rows[row]["sdri"] == pytest.approx(expected[row], abs=2e-3)
    by_instrument = slakh2100.items(place / "slakh2100", "test", by="instrument")
    classes = {item.label: item.class_index for item in by_instrument}
    assert classes == {"Acoustic Grand Piano": None, "Cello": load_ontology().resolve("Cello")}


def test_what_is_missing_is_named(place, tmp_path):
    with pytest.raises(UserError, match=r"FSDKaggle2018 lacks 2 of its 2 files: .*post_comp"):
        fsdkaggle2018.items(tmp_path, "train")
    with pytest.raises(UserError, match="FSD50K lacks 2 of its 2 files"):
        fsd50k.items(tmp_path, "test")
    with pytest.raises(UserError, match="Slakh2100 lacks"):
        slakh2100.items(tmp_path, "test")
    copied = imitations.fsd50k(tmp_path / "fsd50k")
    (copied / "FSD50K.eval_audio" / "1002.wav").unlink()
    with pytest.raises(UserError, match=r"FSD50K lacks 1 of its 8 files: .*1002\.wav"):
        fsd50k.items(copied, "test")


def test_a_data_set_of_one_class_makes_no_mixture(tmp_path):
    same = [Recording(tmp_path / str(n), ("Dog",), (74,)) for n in range(3)]
    with pytest.raises(UserError, match="all recordings are of one class"):
        mixed_neighbours(same)


def test_labels_of_freesound_s_sets_are_audioset_s_classes():
    for label, name in {
        "Gunshot_or_gunfire": "Gunshot, gunfire",
        "Violin_or_fiddle": "Violin, fiddle",
        "Burping_or_eructation": "Burping, eructation",
        "Hi-hat": "Hi-hat",
        "Drawer_open_or_close": "Drawer open or close",
    }.items():
        assert class_index_of(label) == load_ontology().resolve(name)
    assert class_index_of("the_grand.nkm") is None
