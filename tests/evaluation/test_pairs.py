import csv
import json
import shutil

import jax
import numpy as np
import pytest
import soundfile

from tests.tiny import RATE, SEGMENT, noise, tone, write_records, write_separator
from uss_jax.audio.files import write_wav
from uss_jax.bundles.model import Model
from uss_jax.cli.main import main
from uss_jax.data.index import load_index
from uss_jax.data.reader import ClipReader
from uss_jax.devices.mesh import make_mesh
from uss_jax.errors import UserError
from uss_jax.evaluation import scoring
from uss_jax.evaluation.averages import class_averages, file_averages
from uss_jax.evaluation.pairs import find_pairs, sources_by_class
from uss_jax.evaluation.run import sibling
from uss_jax.evaluation.scoring import (
    AVERAGE,
    CLASS,
    HALF,
    IDENTITY,
    MIXTURE,
    ORACLE,
    SHUFFLED,
    score,
    unrelated_items,
)
from uss_jax.evaluation.summary import bootstrap_interval
from uss_jax.ontology import load_ontology
from uss_jax.separation.banks import read_bank

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
    figures, rows = score(model, pairs)
    asked = [ORACLE, CLASS] if kind == "soft" else [ORACLE]
    assert list(figures) == [*asked, SHUFFLED, IDENTITY, HALF, MIXTURE]
    for at, pair in enumerate(pairs):
        source, _ = soundfile.read(pair.source, dtype="float32")
        mixture, _ = soundfile.read(pair.mixture, dtype="float32")
        condition = model.condition(source[None], np.array([pair.class_index], np.int32))
        np.testing.assert_allclose(rows[ORACLE].conditions[at], condition[0], atol=1e-6)
        estimate = np.asarray(model.separate(mixture[None], condition))[0]
        alone = np.asarray(model.separate(source[None], condition))[0]
        assert figures[IDENTITY]["sdr"][at] == pytest.approx(_sdr(source, alone), abs=1e-3)
        assert figures[ORACLE]["level"][at] == pytest.approx(
            10 * np.log10(np.mean(estimate**2) / np.mean(mixture**2)), abs=1e-3
        )
        improvement = _sdr(source, estimate) - _sdr(source, mixture)
        assert figures[ORACLE]["sdri"][at] == pytest.approx(improvement, abs=1e-3)
        assert figures[HALF]["sdri"][at] == pytest.approx(
            _sdr(source, mixture / 2) - _sdr(source, mixture), abs=1e-3
        )
        assert figures[MIXTURE]["sdri"][at] == pytest.approx(0, abs=1e-6)


def test_a_class_vector_is_the_probability_of_the_class_in_the_mixture(place):
    model, pairs = Model(place / "soft"), find_pairs(place / "pairs")
    figures, rows = score(model, pairs)
    mixture, _ = soundfile.read(pairs[0].mixture, dtype="float32")
    condition = np.zeros(527, np.float32)
    label = pairs[0].class_index
    condition[label] = model.tagger(mixture[None])["clipwise"][0, label]
    np.testing.assert_allclose(rows[CLASS].conditions[0], condition, atol=1e-6)
    source, _ = soundfile.read(pairs[0].source, dtype="float32")
    estimate = np.asarray(model.separate(mixture[None], condition[None]))[0]
    assert figures[CLASS]["sdr"][0] == pytest.approx(_sdr(source, estimate), abs=1e-3)


def test_oracle_only_asks_once_and_says_the_same(place, tmp_path, monkeypatch):
    asked = []
    measure = scoring._measure
    monkeypatch.setattr(scoring, "_measure", lambda *a, **k: asked.append(1) or measure(*a, **k))
    assert _evaluate(place, "soft", tmp_path / "all.json") == 0
    in_all_ways = len(asked)
    assert _evaluate(place, "soft", tmp_path / "one.json", "--oracle-only") == 0
    assert in_all_ways == 4 * (len(asked) - in_all_ways)  # oracle, class, shuffled, target alone
    every, one = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("all", "one"))
    kept = [row for row in every["rows"] if row["query"] in (ORACLE, HALF, MIXTURE)]
    assert kept
    assert one["rows"] == kept
    assert one["identity_sdr"] is None
    assert one["leakage"] is None


def test_one_device_gives_the_same_figures_as_eight(place, monkeypatch):
    model, pairs = Model(place / "soft"), find_pairs(place / "pairs")
    assert jax.device_count() == 8
    eight, _ = score(model, pairs)
    monkeypatch.setattr(scoring, "make_mesh", lambda: make_mesh(jax.devices()[:1]))
    one, _ = score(model, pairs)
    for row in one:
        for figure in one[row]:
            np.testing.assert_allclose(one[row][figure], eight[row][figure], atol=1e-4)


def test_a_stopped_run_goes_on_and_gives_the_same(place, tmp_path, monkeypatch):
    model, pairs = Model(place / "soft"), find_pairs(place / "pairs")
    whole, _ = score(model, pairs)
    measured, unfinished = [], tmp_path / "unfinished"
    real = scoring._score_batch

    def stopping(*arguments):
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(1)
        return real(*arguments)

    monkeypatch.setattr(scoring, "_score_batch", stopping)
    with pytest.raises(KeyboardInterrupt):
        score(model, pairs, unfinished=unfinished)
    with unfinished.open("a") as file:
        file.write("[1, {")  # as a kill in the middle of a line would
    monkeypatch.setattr(scoring, "_score_batch", lambda *a: (measured.append(2), real(*a))[1])
    again, _ = score(model, pairs, unfinished=unfinished)
    assert measured == [1, 2]  # nine pairs are two batches of eight devices
    assert not unfinished.exists()
    for row in whole:
        for figure in whole[row]:
            np.testing.assert_array_equal(again[row][figure], whole[row][figure])


def test_what_another_model_has_left_is_not_used(place, tmp_path):
    unfinished = tmp_path / "unfinished"
    unfinished.write_text('{"run": "of another"}\n[0, {}]\n')
    pairs = find_pairs(place / "pairs")
    figures, _ = score(Model(place / "soft"), pairs, unfinished=unfinished)
    assert np.isfinite(figures[ORACLE]["sdr"]).all()


def test_silent_targets_are_left_out_and_counted(place, tmp_path, capsys):
    """Also where they are all of a class, and where files of averages are silent."""
    folder = tmp_path / "pairs"
    shutil.copytree(place / "pairs", folder)
    silence = np.zeros((1, RATE // 2), np.float32)
    for label, name in ((SPEECH, "1"), (DOG, "9"), (BARK, "0")):
        (folder / f"class_id={label}").mkdir(exist_ok=True)
        write_wav(folder / f"class_id={label}/{name}.source.wav", silence, RATE)
        write_wav(folder / f"class_id={label}/{name}.mixture.wav", noise(1, 0.5)[None], RATE)
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept, ignore=shutil.ignore_patterns("9.*", f"class_id={BARK}"))
    for path in (kept / f"class_id={SPEECH}").glob("1.*"):
        path.unlink()
    results = {}
    for data in (folder, kept):
        out = str(tmp_path / f"{data.name}.json")
        words = ["--model", place / "soft", "--train-pairs", data, "--out", out]
        words += ["--examples", "2", "--out-dir", tmp_path / f"examples_{data.name}"]
        assert main(["evaluate", "pairs", "--data", str(data), *map(str, words)]) == 0
        results[data.name] = json.loads((tmp_path / f"{data.name}.json").read_text())
    assert "left out: 3 with a silent target" in capsys.readouterr().out
    assert "left out: 3" in (tmp_path / "pairs.md").read_text()
    assert results["pairs"].pop("silent_targets") == 3
    assert results["kept"].pop("silent_targets") == 0
    for key in ("sdr", "sdri"):
        assert results["pairs"][key] == pytest.approx(results["kept"][key], abs=1e-3), key
    unshuffled = [[r for r in of["rows"] if r["query"] != SHUFFLED] for of in results.values()]
    for one, other in zip(*unshuffled, strict=True):
        assert one["pairs"] == other["pairs"]
        assert one["classes"]["number"] == other["classes"]["number"]
        assert one["plain_mean"] == pytest.approx(other["plain_mean"], abs=1e-3)
    assert len(list((tmp_path / "examples_pairs").glob("*.png"))) == 2


@pytest.mark.parametrize("partner", ["²", "٣", "999", "-1", "9" * 5000, "x"])
def test_a_partner_that_is_no_class_is_refused(place, tmp_path, partner):
    shutil.copytree(place / "pairs", tmp_path / "pairs")
    rows = f"file,partner_class_index\nclass_id={DOG}/1,{partner}\n"
    (tmp_path / "pairs/manifest.csv").write_text(rows)
    with pytest.raises(
        UserError, match="partner_class_index of class_id=74/1 is not a class index from 0"
    ):
        find_pairs(tmp_path / "pairs")


def test_nothing_but_silent_targets_is_refused(place, tmp_path, capsys):
    (tmp_path / "pairs/class_id=0").mkdir(parents=True)
    write_wav(tmp_path / "pairs/class_id=0/0.source.wav", 0 * noise(0, 0.5)[None], RATE)
    write_wav(tmp_path / "pairs/class_id=0/0.mixture.wav", noise(0, 0.5)[None], RATE)
    words = ["--model", place / "soft", "--data", tmp_path / "pairs", "--out", tmp_path / "r.json"]
    assert main(["evaluate", "pairs", *map(str, words)]) == 1
    assert "every source is silent" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["results", "results.csv", "run.v1", ".json"])
def test_results_are_json_so_that_no_file_beside_takes_their_place(place, tmp_path, out, capsys):
    assert _evaluate(place, "soft", tmp_path / out) == 1
    assert "give a file name that ends in .json" in capsys.readouterr().err


def test_files_beside_results_keep_the_whole_name():
    assert str(sibling("runs/v1.2.json", ".csv")) == "runs/v1.2.csv"


def test_averages_of_files_are_per_file_then_over_files(place, tmp_path):
    model = Model(place / "embedding")
    short, long = noise(7, 0.3), noise(8, 1.0)  # a segment is half a second
    long[: SEGMENT // 2] = 0
    for name, waveform in (("a", short), ("b", long)):
        write_wav(tmp_path / f"{name}.wav", waveform[None], RATE)
    files = {"Dog": [tmp_path / "a.wav", tmp_path / "b.wav"]}
    segments = np.stack([np.resize(short, SEGMENT), long[:SEGMENT], long[SEGMENT:]])
    vectors = np.asarray(model.condition(segments, np.zeros(3, np.int32)))
    expected = (vectors[0] + (vectors[1] + vectors[2]) / 2) / 2
    found = file_averages(model, files, without_silence=False)["Dog"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    without = file_averages(model, files, without_silence=True)["Dog"]
    assert np.abs(without - expected).max() > 1e-4
    assert file_averages(Model(place / "one_hot"), files, without_silence=False) == {}


def test_shuffled_queries_are_of_unrelated_classes(place):
    pairs = find_pairs(place / "pairs")
    _, rows = score(Model(place / "one_hot"), pairs)
    asked = rows[SHUFFLED].conditions.argmax(axis=1)
    for pair, label in zip(pairs, asked.tolist(), strict=True):
        assert label in set(SOURCES) - {pair.class_index}


def test_a_query_of_the_same_sound_is_no_shuffled_one():
    # The first and third source are one clip with two labels; Bark is below Dog.
    classes, digests = [SPEECH, SPEECH, PIANO, DOG, BARK], ["x", "y", "x", "z", "w"]
    for _ in range(2):
        chosen = unrelated_items(classes, digests)
        assert {classes[at] for at in chosen[:3]} <= {DOG, BARK}
        assert {classes[at] for at in chosen[3:]} <= {SPEECH, PIANO}
    assert unrelated_items([DOG, BARK], ["x", "y"]).tolist() == [-1, -1]


def test_a_shuffled_query_asks_for_nothing_that_is_in_the_mixture():
    classes, digests = [SPEECH, DOG, PIANO], ["x", "y", "z"]
    assert unrelated_items(classes, digests, [BARK, None, DOG]).tolist()[::2] == [2, 0]
    assert unrelated_items(["bass", "drums", "bass"], digests).tolist()[::2] == [1, 1]


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
    assert results["leakage"] == rows[SHUFFLED, "all"]["level"]
    assert results["identity_sdr"] == rows[IDENTITY, "all"]["sdr"]
    low, high = results["intervals"]["sdri"]
    assert low <= results["sdri"] <= high
    with open(tmp_path / "results.csv", newline="") as file:
        lines = {line["class"]: line for line in csv.DictReader(file)}
    assert set(lines) == {"Speech", "Dog", "Piano"}
    assert lines["Dog"]["branch"] == "Animal"
    assert float(lines["Dog"]["oracle: sdri"]) == pytest.approx(medians["Dog"]["sdri"], abs=1e-4)
    assert lines["Piano"]["class average: sdri"] == ""
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "| oracle |" in (tmp_path / "results.md").read_text()
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
    figures, _ = score(Model(place / "soft"), find_pairs(place / "pairs"))
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
    figures, _ = score(Model(place / "soft"), find_pairs(tmp_path / "pairs"))
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


def test_pairs_may_differ_in_length_and_subtype(place, tmp_path):
    _folder(tmp_path, "class_id=3/1mixture.wav", "class_id=3/1source.wav")
    folder = tmp_path / "class_id=4"
    folder.mkdir()
    source, other = tone(300, 0.4), noise(3, 0.41)
    soundfile.write(folder / "1.source.wav", source, RATE, subtype="PCM_16")
    soundfile.write(folder / "1.mixture.wav", source + other[: len(source)], RATE, "PCM_24")
    soundfile.write(folder / "2.source.wav", source, RATE, subtype="DOUBLE")
    longer = other.copy()
    longer[: len(source)] += source
    soundfile.write(folder / "2.mixture.wav", longer, RATE, subtype="FLOAT")
    figures, _ = score(Model(place / "soft"), find_pairs(tmp_path))
    assert figures[MIXTURE]["sdr"].shape == (3,)
    # The same but for the rounding of 16 bits.
    assert figures[ORACLE]["sdr"][1] == pytest.approx(figures[ORACLE]["sdr"][2], abs=0.05)


def test_a_source_of_another_length_than_its_mixture_is_refused(place, tmp_path):
    _folder(tmp_path, "class_id=3/1mixture.wav")
    _folder(tmp_path, "class_id=3/1source.wav", seconds=0.4)
    with pytest.raises(UserError, match=r"1mixture.wav lasts 0.5 s, 1source.wav 0.4 s"):
        score(Model(place / "soft"), find_pairs(tmp_path))


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, inside = np.random.default_rng(0), 0
    classes = np.repeat(np.arange(4), 40)
    for _ in range(60):
        low, high = bootstrap_interval(rng.standard_normal(160), classes)
        inside += low <= 0 <= high
    assert inside >= 51  # 57 of 60 expected


def test_averages_over_the_sources_of_other_pairs(place, tmp_path):
    out = tmp_path / "r.json"
    assert _evaluate(place, "soft", out, "--train-pairs", place / "pairs") == 0
    rows = {(row["query"], row["group"]): row for row in json.loads(out.read_text())["rows"]}
    assert rows[AVERAGE, "all"]["pairs"] == 9
    assert set(sources_by_class(place / "pairs")) == {"Speech", "Dog", "Piano"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bank", "b.npz"], "give --train-records or --train-pairs too"),
        (["--train-pairs", "p", "--train-records", "r"], "give one"),
        (["--oracle-only", "--train-pairs", "p"], "leave out --train-records and --train-pairs"),
        (["--bank", "b", "--train-records", "r"], "must end in .npz"),
        (["--examples", "2"], "needs --out-dir"),
        (["--out", "nowhere/r.json"], "create it first"),
        (["--train-records", "nowhere"], "metadata.json does not exist"),
        (["--model", "nowhere"], "is not a bundle"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything(place, tmp_path, words, said, capsys):
    assert _evaluate(place, "soft", tmp_path / "r.json", *words) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
