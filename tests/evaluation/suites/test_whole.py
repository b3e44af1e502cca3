"""MUSDB18-HQ and Voicebank-Demand: their imitations, scored and recomputed."""

import json
import shutil
import sys
import types

import numpy as np
import pytest
import soundfile

from tests import tiny
from tests.evaluation.suites import imitations
from tests.tiny import RATE, write_separator
from uss_jax.audio.files import read_mono, resample
from uss_jax.bundles.model import Model
from uss_jax.cli.main import main
from uss_jax.errors import UserError
from uss_jax.evaluation.scoring import AVERAGE, HALF, MIXTURE, ORACLE
from uss_jax.evaluation.suites import musdb18, speech, voicebank_demand
from uss_jax.evaluation.suites import whole as recordings
from uss_jax.evaluation.suites.speech import speech_figures
from uss_jax.separation.queries import Vectors, recording_vector, remove_silence
from uss_jax.separation.recordings import Separator

# museval and pesq come from another time of numpy and of setuptools.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("suites")
    for kind in ("soft", "one_hot"):
        write_separator(place / kind, kind)
    imitations.musdb18(place / "musdb18")
    imitations.voicebank_demand(place / "voicebank_demand")
    return place


def _evaluate(place, suite, out, *more, kind="soft"):
    words = ["evaluate", suite, "--model", place / kind, "--data", place / suite, "--out", out]
    return main([str(word) for word in [*words, *more]])


def _average(model, files):
    waveforms = [remove_silence(read_mono(file, RATE), RATE) for file in files]
    return np.mean([recording_vector(model, waveform) for waveform in waveforms], axis=0)


def _median(reference, estimate, rate):
    """The median over windows, silent ones left out; [channels, samples]."""
    values = []
    for begin in range(0, reference.shape[1], rate):
        a, b = (x[:, begin : begin + rate].astype(np.float64) for x in (reference, estimate))
        if a.sum(axis=0).any() and b.sum(axis=0).any():
            values.append(10 * np.log10(np.sum(a**2) / np.sum((b - a) ** 2)))
    return np.median(values)


def test_the_sdr_is_museval_s(place, monkeypatch):
    # museval asks for ffmpeg, by these, to read containers that are not read here.
    for name in ("musdb", "stempeg"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    museval = pytest.importorskip("museval")
    song = place / "musdb18" / "test" / "c"
    source, rate = soundfile.read(song / "vocals.wav")  # its first second is silent
    mixture, _ = soundfile.read(song / "mixture.wav")
    source, mixture = (side[: int(3.7 * rate)].astype(np.float32) for side in (source, mixture))
    for reference, estimate in ((source, mixture), (mixture, source)):
        sdr = museval.evaluate(reference[None], estimate[None], win=rate, hop=rate)[0]
        assert np.isnan(sdr[0, 0])
        ours = musdb18.median_sdr(reference.T, estimate.T, rate)
        assert ours == pytest.approx(np.nanmedian(sdr), abs=1e-6)
    assert np.isnan(musdb18.median_sdr(source.T, 0 * source.T, rate))


def test_musdb18(place, tmp_path, capsys):
    assert _evaluate(place, "musdb18", tmp_path / "r.json", "--legacy") == 0
    assert "drums sdr" in capsys.readouterr().out
    results = json.loads((tmp_path / "r.json").read_text())
    rows = {row["query"]: row for row in results["rows"]}
    assert set(rows) == {ORACLE, AVERAGE, HALF, MIXTURE}
    model, folder = Model(place / "soft"), place / "musdb18"
    for stem in musdb18.STEMS:
        average = _average(model, [folder / "train" / "a" / f"{stem}.wav"])
        found = {name: [] for name in ("oracle", "average", "mixture")}
        for song in ("b", "c"):
            mixture = soundfile.read(folder / "test" / song / "mixture.wav", dtype="float32")[0].T
            source = soundfile.read(folder / "test" / song / f"{stem}.wav", dtype="float32")[0].T
            vectors = {
                "oracle": recording_vector(model, source.mean(axis=0)),
                "average": average,
            }
            estimates = Separator(model).separate(mixture, RATE, Vectors(vectors))
            for name, estimate in estimates.items():
                found[name].append(_median(source, estimate, RATE))
            found["mixture"].append(_median(source, mixture, RATE))
        gain = np.median(np.array(found["average"]) - np.array(found["mixture"]))
        expected = {name: np.median(values) for name, values in found.items()}
        # Conditions of other batches differ in the last bits.
        assert rows[ORACLE]["stems"][stem]["sdr"] == pytest.approx(expected["oracle"], abs=1e-3)
        assert rows[AVERAGE]["stems"][stem]["sdr"] == pytest.approx(expected["average"], abs=1e-3)
        assert rows[AVERAGE]["stems"][stem]["sdri"] == pytest.approx(gain, abs=1e-3)
        assert rows[MIXTURE]["stems"][stem]["sdr"] == pytest.approx(expected["mixture"], abs=1e-3)
        assert abs(rows[ORACLE]["stems"][stem]["legacy_sdr"] - expected["oracle"]) > 0.1
    assert rows[MIXTURE]["sdri"] == pytest.approx(0, abs=1e-6)
    assert rows[MIXTURE].get("legacy_sdri") is None


def _in_blocks(model, mixture, condition):
    """The reference's separation of one channel: blocks of a segment, the last padded."""
    size, blocks = model.segment_samples, []
    for begin in range(0, len(mixture), size):
        block = np.pad(mixture[begin : begin + size], (0, max(begin + size - len(mixture), 0)))
        blocks.append(np.asarray(model.separate(block[None], condition[None]))[0])
    return np.concatenate(blocks)[: len(mixture)]


def test_musdb18_s_legacy_figures_are_the_published_rule(place, tmp_path):
    # Files as one channel at the model's rate; the estimate taken for the reference.
    assert _evaluate(place, "musdb18", tmp_path / "r.json", "--legacy") == 0
    results = json.loads((tmp_path / "r.json").read_text())
    row = next(row for row in results["rows"] if row["query"] == AVERAGE)
    model, folder = Model(place / "soft"), place / "musdb18"
    of_stems = {"legacy_sdr": [], "legacy_sdri": []}
    for stem in musdb18.STEMS:
        average = _average(model, [folder / "train" / "a" / f"{stem}.wav"])
        sdrs, sdris = [], []
        for song in ("b", "c"):
            mixture, source = (
                read_mono(folder / "test" / song / f"{name}.wav", RATE)
                for name in ("mixture", stem)
            )
            estimate = _in_blocks(model, mixture, average)
            sdr = _median(estimate[None], source[None], RATE)
            sdrs.append(sdr)
            sdris.append(sdr - _median(estimate[None], mixture[None], RATE))
        for name, values in (("legacy_sdr", sdrs), ("legacy_sdri", sdris)):
            expected = np.nanmedian(values)
            assert row["stems"][stem][name] == pytest.approx(expected, abs=2e-3)
            of_stems[name].append(expected)
    for name, values in of_stems.items():
        assert row[name] == pytest.approx(np.nanmean(values), abs=2e-3)


def test_a_stopped_run_goes_on(place, tmp_path, monkeypatch):
    model, scored = Model(place / "soft"), []
    averages = musdb18.stem_averages(model, place / "musdb18")
    real = musdb18._score_song

    def counting(model, song, *rest):
        scored.append(song.name)
        if scored == ["b", "c"]:
            raise KeyboardInterrupt
        return real(model, song, *rest)

    monkeypatch.setattr(musdb18, "_score_song", counting)
    words = (model, place / "musdb18", averages, tmp_path / "unfinished")
    with pytest.raises(KeyboardInterrupt):
        musdb18.score_songs(*words, legacy=False)
    rows = musdb18.score_songs(*words, legacy=False)
    assert scored == ["b", "c", "c"]
    assert len(rows) == 4
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("blocks", ["windows", "reference"])
def test_voicebank_s_figures_are_of_the_published_samples(place, tmp_path, monkeypatch, blocks):
    # Files as one channel at the model's rate, separated there, both sides resampled for figures.
    heard = []

    def figures(clean, estimate):
        heard.append((clean, estimate))
        return {name: float(len(heard)) for name in ("pesq", "ssnr", "csig", "cbak", "covl")}

    monkeypatch.setattr(voicebank_demand, "speech_figures", figures)
    monkeypatch.setattr(voicebank_demand, "require_package", lambda *_: None)
    assert _evaluate(place, "voicebank_demand", tmp_path / "r.json", "--blocks", blocks) == 0
    model, folder = Model(place / "soft"), place / "voicebank_demand"
    average = _average(model, sorted((folder / "clean_trainset_28spk_wav").glob("*.wav")))
    files = sorted((folder / "clean_testset_wav").glob("*.wav"))
    rows = (ORACLE, AVERAGE, HALF, MIXTURE)
    assert len(heard) == len(rows) * len(files)
    for at, clean in enumerate(files):
        source = read_mono(clean, RATE)
        noisy = read_mono(folder / "noisy_testset_wav" / clean.name, RATE)
        if blocks == "reference":
            estimate = _in_blocks(model, noisy, average)
        else:
            vectors = Vectors({"speech": average})
            estimate = Separator(model).separate(noisy[None], RATE, vectors)["speech"][0]
        found = dict(zip(rows, heard[len(rows) * at :], strict=False))
        for row, expected in ((AVERAGE, estimate), (HALF, noisy / 2), (MIXTURE, noisy)):
            np.testing.assert_array_equal(found[row][0], resample(source, RATE, 16000))
            np.testing.assert_allclose(found[row][1], resample(expected, RATE, 16000), atol=1e-5)


def test_voicebank_demand(place, tmp_path):
    pesq = pytest.importorskip("pesq")
    assert _evaluate(place, "voicebank_demand", tmp_path / "r.json") == 0
    rows = {row["query"]: row for row in json.loads((tmp_path / "r.json").read_text())["rows"]}
    folder, expected = place / "voicebank_demand", []
    for clean in sorted((folder / "clean_testset_wav").glob("*.wav")):
        files = (clean, folder / "noisy_testset_wav" / clean.name)
        source, noisy = (resample(read_mono(file, RATE), RATE, 16000) for file in files)
        expected.append(speech_figures(source, noisy))
        sides = (side.astype(np.float64) for side in (source, noisy))
        assert expected[-1]["pesq"] == pytest.approx(pesq.pesq(16000, *sides, "wb"), abs=1e-6)
    for figure in ("pesq", "ssnr", "csig", "cbak", "covl"):
        values = [sentence[figure] for sentence in expected]
        assert rows[MIXTURE][figure] == pytest.approx(np.median(values), abs=1e-6)
        assert rows[MIXTURE][f"{figure}_mean"] == pytest.approx(np.mean(values), abs=1e-6)
    assert rows[MIXTURE]["pesq_gain"] == 0
    assert "| oracle |" in (tmp_path / "r.md").read_text()


def test_a_silent_stem_is_left_out_and_counted(place, tmp_path, capsys):
    folder = tmp_path / "musdb18"
    shutil.copytree(place / "musdb18", folder)
    bass, rate = soundfile.read(folder / "test/b/bass.wav")
    soundfile.write(folder / "test/b/bass.wav", 0 * bass, rate)
    words = ["--model", place / "soft", "--data", folder, "--out", tmp_path / "r.json"]
    assert main(["evaluate", "musdb18", *map(str, words)]) == 0
    assert "left out: 1 with a silent target" in capsys.readouterr().out
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["silent_targets"] == 1
    (mixture,) = [row for row in results["rows"] if row["query"] == MIXTURE]
    one = soundfile.read(folder / "test/c/bass.wav", dtype="float32")[0].T
    whole = soundfile.read(folder / "test/c/mixture.wav", dtype="float32")[0].T
    assert mixture["stems"]["bass"]["sdr"] == pytest.approx(_median(one, whole, rate), abs=1e-3)


def test_a_silent_sentence_is_left_out_and_counted(monkeypatch):
    monkeypatch.setattr(speech, "require_package", lambda *words: None)
    silent = speech_figures(np.zeros(16000), tiny.noise(0, 2))
    assert np.isnan(list(silent.values())).all()
    good = dict.fromkeys(silent, 2.0)
    sentences = [{row: of for row in (ORACLE, MIXTURE)} for of in (good, silent, good)]
    rows = voicebank_demand._summary(sentences)
    assert [row["pesq"] for row in rows] == [2.0, 2.0]
    assert [row["silent"] for row in rows] == [1, 1]


def test_the_paper_s_name_of_the_training_set_is_taken_too(place, tmp_path):
    folder = imitations.voicebank_demand(tmp_path, train="clean_trainset_wav")
    assert set(voicebank_demand.speech_average(Model(place / "soft"), folder)) == {"Speech"}


def test_what_is_missing_is_named(place, tmp_path, capsys):
    with pytest.raises(UserError, match="MUSDB18-HQ lacks 1 of its 1 file: "):
        musdb18.songs(tmp_path, "test")
    with pytest.raises(UserError, match="Voicebank-Demand lacks"):
        voicebank_demand.sentences(tmp_path)
    (imitations.musdb18(tmp_path) / "test" / "b" / "bass.wav").unlink()
    with pytest.raises(UserError, match=r"MUSDB18-HQ lacks 1 of its 10 files: .*b/bass\.wav"):
        musdb18.songs(tmp_path, "test")
    assert _evaluate(place, "musdb18", tmp_path / "r.json", kind="one_hot") == 1
    assert "takes AudioSet classes only" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"pip install 'uss-jax\[suites\]'"):
        recordings.require_package("no_such_package", "this")


def test_the_figure_of_a_set_is_the_median_of_what_is_a_number():
    sentences = [{MIXTURE: {"ssnr": x}, "row": {"ssnr": x + 1}} for x in (1.0, np.nan, 2.0, 6.0)]
    summary = {row["query"]: row for row in voicebank_demand._summary(sentences)}
    assert (summary["row"]["ssnr"], summary["row"]["ssnr_mean"]) == (3.0, 4.0)
    assert summary["row"]["ssnr_gain"] == 1.0
    nothing = voicebank_demand._summary([{MIXTURE: {"ssnr": np.nan}}])
    assert nothing[0]["ssnr"] is None
