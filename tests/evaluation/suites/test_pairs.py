import csv
import json
import shutil

import numpy as np
import pytest
import soundfile

from tests.evaluation.tones import DOG, evaluate_pairs, sdr, write_tones
from tests.tiny import RATE, SEGMENT, noise, write_separator
from uss_jax.audio.files import write_wav
from uss_jax.bundles.model import Model
from uss_jax.cli.main import main
from uss_jax.errors import UserError
from uss_jax.evaluation import scoring
from uss_jax.evaluation.averages import file_vectors
from uss_jax.evaluation.rows import AVERAGE, HALF, IDENTITY, MIXTURE, ORACLE, SHUFFLED, Drawn
from uss_jax.evaluation.scoring import score
from uss_jax.evaluation.suites.pairs import find_pairs, sources_by_class
from uss_jax.separation.banks import Bank, read_bank, write_bank

QUICK_COMPILATION = True


def test_oracle_only_asks_once_and_says_the_same(place, tmp_path, monkeypatch):
    asked = []
    measure = scoring._measure
    monkeypatch.setattr(scoring, "_measure", lambda *a, **k: asked.append(1) or measure(*a, **k))
    assert evaluate_pairs(place, "soft", tmp_path / "all.json") == 0
    in_all_ways = len(asked)
    assert evaluate_pairs(place, "soft", tmp_path / "one.json", "--oracle-only") == 0
    assert in_all_ways == 4 * (len(asked) - in_all_ways)  # oracle, class, shuffled, target alone
    every, one = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("all", "one"))
    kept = [row for row in every["rows"] if row["query"] in (ORACLE, HALF, MIXTURE)]
    assert kept
    assert one["rows"] == kept
    assert one["identity_sdr"] is None
    assert one["leakage"] is None


@pytest.mark.parametrize("partner", ["²", "٣", "999", "-1", "9" * 5000, "x"])
def test_a_partner_that_is_no_class_is_refused(place, tmp_path, partner):
    shutil.copytree(place / "pairs", tmp_path / "pairs")
    rows = f"file,partner_class_index\nclass_id={DOG}/1,{partner}\n"
    (tmp_path / "pairs/manifest.csv").write_text(rows)
    with pytest.raises(
        UserError, match="partner_class_index of class_id=74/1 is not a class index from 0"
    ):
        find_pairs(tmp_path / "pairs")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", 'has no column "file"'),
        (f"\nfile,group\nclass_id={DOG}/1,rare\n", 'has no column "file"'),
        (f"class_id={DOG}/1,rare\n", 'has no column "file"'),
        (f"file,group\nclass_id={DOG}/1,rare,rarer\n", "line 2: expected 2 fields"),
        (f"file,group\nclass_id={DOG}/1\n", "line 2: expected 2 fields"),
    ],
)
def test_a_manifest_that_would_lose_groups_is_refused(place, tmp_path, content, said):
    shutil.copytree(place / "pairs", tmp_path / "pairs")
    (tmp_path / "pairs/manifest.csv").write_text(content)
    with pytest.raises(UserError, match=said):
        find_pairs(tmp_path / "pairs")


def test_a_manifest_that_a_spreadsheet_has_saved_keeps_its_groups(place, tmp_path):
    shutil.copytree(place / "pairs", tmp_path / "pairs")
    rows = f"file,group\r\nclass_id={DOG}/1,rare\r\n"
    (tmp_path / "pairs/manifest.csv").write_text(rows, encoding="utf-8-sig")
    grouped = [pair for pair in find_pairs(tmp_path / "pairs") if pair.group]
    assert [(pair.class_index, pair.mixture.name[0]) for pair in grouped] == [(DOG, "1")]


def test_nothing_but_silent_targets_is_refused(place, tmp_path, capsys):
    (tmp_path / "pairs/class_id=0").mkdir(parents=True)
    write_wav(tmp_path / "pairs/class_id=0/0.source.wav", 0 * noise(0, 0.5)[None], RATE)
    write_wav(tmp_path / "pairs/class_id=0/0.mixture.wav", noise(0, 0.5)[None], RATE)
    words = ["--model", place / "soft", "--data", tmp_path / "pairs", "--out", tmp_path / "r.json"]
    assert main(["evaluate", "pairs", *map(str, words)]) == 1
    assert "every source is silent" in capsys.readouterr().err


def test_results_hold_every_row_group_and_class(place, tmp_path, capsys):
    out = tmp_path / "results.json"
    bank = tmp_path / "bank.npz"
    words = ["--train-records", place / "records", "--bank", bank]
    assert evaluate_pairs(place, "embedding", out, *words) == 0
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
    with pytest.raises(UserError, match="takes the kind class_vectors"):
        read_bank(bank, Model(place / "class_vectors"))


def test_examples_are_the_quantiles(place, tmp_path):
    words = ["--examples", "1", "--out-dir", tmp_path / "out"]
    assert evaluate_pairs(place, "soft", tmp_path / "r.json", *words) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    stem = names[0].removesuffix(".png")
    assert names == [f"{stem}.png", *(f"{stem}_{w}.wav" for w in ("estimate", "mixture", "target"))]
    assert (tmp_path / "out" / names[0]).read_bytes().startswith(b"\x89PNG")
    figures, _ = score(Model(place / "soft"), find_pairs(place / "pairs"))
    target, _ = soundfile.read(tmp_path / "out" / f"{stem}_target.wav", dtype="float32")
    estimate, rate = soundfile.read(tmp_path / "out" / f"{stem}_estimate.wav", dtype="float32")
    mixture, _ = soundfile.read(tmp_path / "out" / f"{stem}_mixture.wav", dtype="float32")
    assert (rate, len(target)) == (RATE, SEGMENT)
    improvement = sdr(target, estimate) - sdr(target, mixture)
    assert improvement == pytest.approx(np.median(figures[ORACLE]["sdri"]), abs=1e-3)


def test_folders_that_hold_no_pairs_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no pairs"):
        find_pairs(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not named class_id=K"):
        find_pairs(write_tones(tmp_path / "a", "class_id=527/1mixture.wav"))
    with pytest.raises(UserError, match=r"expected 1source\.wav"):
        find_pairs(write_tones(tmp_path / "b", "class_id=3/1mixture.wav"))


def test_averages_over_the_sources_of_other_pairs(place, tmp_path):
    out = tmp_path / "r.json"
    assert evaluate_pairs(place, "soft", out, "--train-pairs", place / "pairs") == 0
    rows = {(row["query"], row["group"]): row for row in json.loads(out.read_text())["rows"]}
    assert rows[AVERAGE, "all"]["pairs"] == 9
    assert set(sources_by_class(place / "pairs")) == {"Speech", "Dog", "Piano"}


def test_a_few_training_recordings_are_queries_of_their_own(place, tmp_path, capsys):
    out, model = tmp_path / "r.json", Model(place / "soft")
    words = ["--train-pairs", place / "pairs", "--recordings"]
    assert evaluate_pairs(place, "soft", out, *words, "3,1,50") == 0
    assert "no row of 50 recordings: no class" in capsys.readouterr().out
    results = json.loads(out.read_text())
    assert results["how"]["recordings"] == [3, 1, 50]
    rows = {row["query"]: row for row in results["rows"] if row["group"] == "all"}
    names = list(rows)
    at = names.index(AVERAGE)
    assert names[at : at + 3] == [AVERAGE, "3 recordings", "1 recording"]
    # Three recordings are all that a class has.
    assert rows["1 recording"]["pairs"] == rows["3 recordings"]["pairs"] == 9
    for figure in ("sdri", "si_sdri"):
        assert rows["3 recordings"][figure] == pytest.approx(rows[AVERAGE][figure], abs=1e-3)
    assert rows["1 recording"]["sdri"] != rows[AVERAGE]["sdri"]
    vectors = file_vectors(model, sources_by_class(place / "pairs"), without_silence=False)
    labels = [pair.label for pair in find_pairs(place / "pairs")]
    drawn = Drawn(vectors, (1, 2)).rows(labels, np.arange(9) != 4, 527)
    assert [row.exists.sum() for row in drawn] == [8, 8]
    for at, label in enumerate(labels):
        if at != 4:
            among = (vectors[label] == drawn[0].conditions[at]).all(axis=1)
            assert among.sum() == 1
            rest = 2 * drawn[1].conditions[at] - vectors[label][among][0]
            assert np.isclose(vectors[label], rest, atol=1e-6).all(axis=1).any()
    with pytest.raises(SystemExit):
        evaluate_pairs(place, "soft", out, *words, "1,1")
    assert "expected different numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--recordings", "1"], "give --train-records or --train-pairs too"),
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
    assert evaluate_pairs(place, "soft", tmp_path / "r.json", *words) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_source_and_mixture_are_of_the_same_channel(tmp_path):
    """In the mean of this mixture's channels, its source would cancel."""
    source = np.stack([noise(0, 0.5), -noise(0, 0.5)])
    mixture = source + np.stack([noise(1, 0.5), noise(1, 0.5)])
    folder = tmp_path / "class_id=3"
    folder.mkdir()
    write_wav(folder / "1source.wav", source, RATE)
    write_wav(folder / "1mixture.wav", mixture, RATE)
    (pair,) = find_pairs(tmp_path)
    np.testing.assert_array_equal(pair.read("source", RATE), source[0])
    np.testing.assert_array_equal(pair.read("mixture", RATE), mixture[0])
    write_wav(folder / "1source.wav", source[1:], RATE)  # which has nothing to choose
    np.testing.assert_array_equal(pair.read("source", RATE), source[1])
    np.testing.assert_allclose(pair.read("mixture", RATE), noise(1, 0.5), atol=1e-6)


@pytest.mark.parametrize("kind", ["one_hot", "text"])
def test_conditions_that_are_not_made_of_recordings_have_no_average_of_pairs(
    place, kind, tmp_path, capsys
):
    words = ["--train-pairs", place / "pairs", "--bank", tmp_path / "b.npz", "--recordings", "1"]
    assert evaluate_pairs(place, kind, tmp_path / "r.json", *words) == 1
    said = f"{kind} ({kind}) are not made of any; leave it out"
    assert f"--train-pairs averages conditions of recordings, and those of {place}/{said}" in (
        capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_a_bank_of_nothing_is_refused_before_the_work(place, tmp_path, capsys):
    write_tones(tmp_path / "other", "class_id=9/1source.wav", "class_id=9/1mixture.wav")
    bank = tmp_path / "b.npz"
    words = ["--model", place / "soft", "--data", tmp_path / "other", "--out", tmp_path / "r.json"]
    words += ["--train-records", place / "records", "--bank", bank]
    assert main(["evaluate", "pairs", *map(str, words)]) == 1
    assert f"--bank {bank} would be empty: {place}/records has no sound of" in (
        capsys.readouterr().err
    )
    assert not bank.exists()


def test_only_a_bank_of_the_same_command_is_replaced(place, tmp_path, capsys):
    """Else `query make` has perhaps made it, of recordings that nobody has any more."""
    bank, words = tmp_path / "b.npz", ("--train-pairs", place / "pairs", "--bank")
    for how in ("averaged over example recordings", f"averaged over {place}/records", "nothing"):
        write_bank(bank, Bank(("Dog",), np.ones((1, 527), np.float32), "soft", "hash", how))
        stored = bank.read_bytes()
        assert evaluate_pairs(place, "soft", tmp_path / "r.json", *words, bank) == 1
        said = capsys.readouterr().err
        assert f"b.npz exists and is not a bank averaged over {place}/pairs; give --bank an" in said
        assert bank.read_bytes() == stored
    bank.write_bytes(b"no bank")
    assert evaluate_pairs(place, "soft", tmp_path / "r.json", *words, bank) == 1
    assert "exists and is not a bank" in capsys.readouterr().err
    bank.unlink()
    for _ in range(2):  # as after a stop
        assert evaluate_pairs(place, "soft", tmp_path / "r.json", *words, bank) == 0
    assert read_bank(bank, Model(place / "soft")).name == ("Speech", "Dog", "Piano")
