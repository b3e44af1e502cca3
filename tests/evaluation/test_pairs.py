import json

import numpy as np
import pytest
import soundfile

from tests.tiny import RATE, SEGMENT, noise, tone, write_records, write_separator
from uss_jax.audio.files import write_wav
from uss_jax.cli.main import main
from uss_jax.data.tfrecord import ClipReader, load_index
from uss_jax.errors import UserError
from uss_jax.evaluation.pairs import (
    AVERAGE,
    BATCH_SIZE,
    HALF,
    MIXTURE,
    ORACLE,
    SHUFFLED,
    class_averages,
    evaluate_pairs,
    find_pairs,
    unrelated_pairs,
)
from uss_jax.ontology import load_ontology
from uss_jax.separation.queries import read_bank
from uss_jax.training.model import Model

SPEECH, DOG, BARK, PIANO = (load_ontology().resolve(n) for n in ("Speech", "Dog", "Bark", "Piano"))
SOURCES = {SPEECH: lambda i: tone(200 + 50 * i, 0.5), DOG: lambda i: noise(i, 0.5)}
SOURCES[PIANO] = lambda i: tone(1000 + 100 * i, 0.5)


def _sdr(reference, estimate):
    reference, estimate = reference.astype(np.float64), estimate.astype(np.float64)
    return 10 * np.log10(np.mean(reference**2) / np.mean((estimate - reference) ** 2))


def _write_pairs(folder, per_class=3):
    for label, source in SOURCES.items():
        (folder / f"class_id={label}").mkdir(parents=True)
        for i in range(per_class):
            other = tone(2000 + 300 * i, 0.5)
            other *= np.sqrt(np.mean(source(i) ** 2) / np.mean(other**2))
            stem = folder / f"class_id={label}" / f"{i}."
            write_wav(f"{stem}source.wav", source(i)[None], RATE)
            write_wav(f"{stem}mixture.wav", (source(i) + other)[None], RATE)
    rows = ["file,group", *(f"class_id={DOG}/{i},rare" for i in range(per_class))]
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("evaluate")
    _write_pairs(place / "pairs")
    for kind in ("one_hot", "soft", "embedding"):
        write_separator(place / kind, kind)
    clips = [
        ("a", tone(220, 0.8), [SPEECH]),
        ("b", tone(260, 1.2), [SPEECH]),
        ("c", noise(50, 1.0), [DOG, BARK]),
        ("quiet", 1e-4 * noise(51, 1.0), [DOG]),
    ]
    write_records(place / "records", "train", clips)
    return place


def _evaluate(place, kind, out, *more):
    words = ["pairs", "--model", place / kind, "--data", place / "pairs", "--out", out, *more]
    return main(["evaluate", *map(str, words)])


@pytest.mark.parametrize("kind", ["one_hot", "soft", "embedding"])
def test_figures_are_those_of_the_estimates(place, kind):
    model, pairs = Model(place / kind), find_pairs(place / "pairs")
    figures, rows = evaluate_pairs(model, pairs)
    assert list(figures) == [ORACLE, SHUFFLED, HALF, MIXTURE]
    for at, pair in enumerate(pairs):
        source, _ = soundfile.read(pair.source, dtype="float32")
        mixture, _ = soundfile.read(pair.mixture, dtype="float32")
        label = np.full(BATCH_SIZE, pair.class_index, np.int32)
        condition = model.condition(np.tile(source, (BATCH_SIZE, 1)), label)
        np.testing.assert_allclose(rows[ORACLE].conditions[at], condition[0], atol=1e-6)
        estimate = np.asarray(model.separate(np.tile(mixture, (BATCH_SIZE, 1)), condition))[0]
        improvement = _sdr(source, estimate) - _sdr(source, mixture)
        assert figures[ORACLE]["sdri"][at] == pytest.approx(improvement, abs=1e-3)
        assert figures[HALF]["sdri"][at] == pytest.approx(
            _sdr(source, mixture / 2) - _sdr(source, mixture), abs=1e-3
        )
        assert figures[MIXTURE]["sdri"][at] == pytest.approx(0, abs=1e-6)


def test_shuffled_queries_are_of_unrelated_classes(place):
    pairs = find_pairs(place / "pairs")
    _, rows = evaluate_pairs(Model(place / "one_hot"), pairs)
    asked = rows[SHUFFLED].conditions.argmax(axis=1)
    for pair, label in zip(pairs, asked.tolist(), strict=True):
        assert label in set(SOURCES) - {pair.class_index}


def test_a_query_of_the_same_sound_is_no_shuffled_one():
    # The first and third source are one clip with two labels; Bark is below Dog.
    classes, digests = [SPEECH, SPEECH, PIANO, DOG, BARK], ["x", "y", "x", "z", "w"]
    for _ in range(2):
        chosen = unrelated_pairs(classes, digests)
        assert {classes[at] for at in chosen[:3]} <= {DOG, BARK}
        assert {classes[at] for at in chosen[3:]} <= {SPEECH, PIANO}
    assert unrelated_pairs([DOG, BARK], ["x", "y"]).tolist() == [-1, -1]


def test_class_averages_are_means_over_the_anchors_of_clips(place):
    model = Model(place / "embedding")
    index = load_index(place / "records", "train")
    reader = ClipReader(place / "records", index)
    averages = class_averages(model, reader, [SPEECH, DOG, PIANO])
    assert set(averages) == {SPEECH, DOG}
    # The quiet clip does not count, and clip "c" is two segments long: its anchor is one of many.
    alone = class_averages(model, reader, [BARK])[BARK]
    np.testing.assert_allclose(averages[DOG], alone, atol=1e-5)


def test_results_hold_every_row_group_and_class(place, tmp_path, capsys):
    out = tmp_path / "results.json"
    bank = tmp_path / "bank.npz"
    assert (
        _evaluate(place, "embedding", out, "--train-records", place / "records", "--bank", bank)
        == 0
    )
    printed = capsys.readouterr().out
    results = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert results["suite"] == "pairs"
    assert results["condition"] == "embedding"
    assert results["baseline_sdri"] == pytest.approx(3.01, abs=0.05)  # nearly orthogonal tones
    rows = {(row["query"], row["group"]): row for row in results["rows"]}
    assert {group for _, group in rows} == {"all", "rare"}
    assert rows[ORACLE, "all"]["pairs"] == 9
    assert rows[AVERAGE, "all"]["pairs"] == 6  # no training clip of a piano
    assert rows[AVERAGE, "all"]["classes"]["number"] == 2
    assert rows[ORACLE, "rare"]["pairs"] == 3
    medians = rows[ORACLE, "all"]["classes"]["medians"]
    assert results["sdri"] == pytest.approx(np.mean([m["sdri"] for m in medians.values()]))
    assert set(medians) == {"Speech", "Dog", "Piano"}
    for word in (ORACLE, AVERAGE, SHUFFLED, HALF, MIXTURE, "rare"):
        assert word in printed

    stored = read_bank(bank, Model(place / "embedding"))
    assert stored.name == ("Speech", "Dog")
    assert stored.kind == "embedding"
    with pytest.raises(UserError, match="another query net"):
        read_bank(bank, Model(write_separator(tmp_path / "other", "embedding", seed=5)))
    with pytest.raises(UserError, match="conditions of width 527"):
        read_bank(bank, Model(place / "soft"))


def test_examples_are_the_quantiles(place, tmp_path):
    assert (
        _evaluate(
            place, "soft", tmp_path / "r.json", "--examples", "1", "--out-dir", tmp_path / "out"
        )
        == 0
    )
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    stem = names[0].removesuffix(".png")
    assert names == [f"{stem}.png", *(f"{stem}_{w}.wav" for w in ("estimate", "mixture", "target"))]
    assert (tmp_path / "out" / names[0]).read_bytes().startswith(b"\x89PNG")
    figures, _ = evaluate_pairs(Model(place / "soft"), find_pairs(place / "pairs"))
    target, _ = soundfile.read(tmp_path / "out" / f"{stem}_target.wav", dtype="float32")
    estimate, rate = soundfile.read(tmp_path / "out" / f"{stem}_estimate.wav", dtype="float32")
    mixture, _ = soundfile.read(tmp_path / "out" / f"{stem}_mixture.wav", dtype="float32")
    assert (rate, len(target)) == (RATE, SEGMENT)
    improvement = _sdr(target, estimate) - _sdr(target, mixture)
    assert improvement == pytest.approx(np.median(figures[ORACLE]["sdri"]), abs=1e-3)


def test_pairs_at_another_rate_are_resampled(place, tmp_path):
    folder = tmp_path / "pairs" / f"class_id={DOG}"
    folder.mkdir(parents=True)
    waveform = np.random.default_rng(0).standard_normal(16000) / 10
    for name in ("1_source.wav", "1_mixture.wav"):
        soundfile.write(folder / name, waveform, 32000)
    figures, _ = evaluate_pairs(Model(place / "soft"), find_pairs(tmp_path / "pairs"))
    assert np.isfinite(figures[ORACLE]["sdr"]).all()
    assert SHUFFLED not in figures  # there is no pair of another class


def _folder(tmp_path, *names, seconds=0.5):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_wav(tmp_path / name, tone(300, seconds)[None], RATE)
    return tmp_path


def test_folders_that_hold_no_pairs_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no pairs"):
        find_pairs(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not named class_id=K"):
        find_pairs(_folder(tmp_path / "a", "class_id=527/1mixture.wav"))
    with pytest.raises(UserError, match=r"expected 1source\.wav"):
        find_pairs(_folder(tmp_path / "b", "class_id=3/1mixture.wav"))


def test_pairs_of_unequal_length_are_refused(place, tmp_path):
    _folder(tmp_path, "class_id=3/1mixture.wav", "class_id=3/1source.wav")
    _folder(tmp_path, "class_id=4/1mixture.wav", "class_id=4/1source.wav", seconds=0.4)
    with pytest.raises(UserError, match=r"4/1mixture.wav lasts 0.4 s, the pairs before 0.5 s"):
        evaluate_pairs(Model(place / "soft"), find_pairs(tmp_path))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bank", "b.npz"], "give --train-records too"),
        (["--bank", "b", "--train-records", "r"], "something.npz"),
        (["--examples", "2"], "needs --out-dir"),
        (["--out", "nowhere/r.json"], "make it first"),
        (["--train-records", "nowhere"], "metadata.json does not exist"),
        (["--model", "nowhere"], "is not a bundle"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything(place, tmp_path, words, said, capsys):
    assert _evaluate(place, "soft", tmp_path / "r.json", *words) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
