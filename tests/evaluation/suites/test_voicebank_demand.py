import json

import numpy as np
import pytest

from tests import tiny
from tests.evaluation.suites import imitations
from tests.evaluation.suites.recomputed import recomputed_average, run_suite, separated_in_blocks
from tests.tiny import RATE
from uss_jax.audio.files import read_mono
from uss_jax.audio.resampling import resample
from uss_jax.bundles.model import Model
from uss_jax.errors import UserError
from uss_jax.evaluation.rows import AVERAGE, HALF, MIXTURE, ORACLE
from uss_jax.evaluation.suites import speech, voicebank_demand
from uss_jax.evaluation.suites.speech import speech_figures
from uss_jax.separation.queries import Vectors
from uss_jax.separation.recordings import Separator

QUICK_COMPILATION = True

# pesq comes from another time of numpy and of setuptools.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("blocks", ["windows", "reference"])
def test_voicebank_s_figures_are_of_the_published_samples(sets, tmp_path, monkeypatch, blocks):
    # Files as one channel at the model's rate, separated there, both sides resampled for figures.
    heard = []

    def figures(clean, estimate):
        heard.append((clean, estimate))
        return {name: float(len(heard)) for name in ("pesq", "ssnr", "csig", "cbak", "covl")}

    monkeypatch.setattr(voicebank_demand, "speech_figures", figures)
    monkeypatch.setattr(voicebank_demand, "require_package", lambda *_: None)
    assert run_suite(sets, "voicebank_demand", tmp_path / "r.json", "--blocks", blocks) == 0
    model, folder = Model(sets / "soft"), sets / "voicebank_demand"
    average = recomputed_average(model, sorted((folder / "clean_trainset_28spk_wav").glob("*.wav")))
    files = sorted((folder / "clean_testset_wav").glob("*.wav"))
    rows = (ORACLE, AVERAGE, HALF, MIXTURE)
    assert len(heard) == len(rows) * len(files)
    for at, clean in enumerate(files):
        source = read_mono(clean, RATE)
        noisy = read_mono(folder / "noisy_testset_wav" / clean.name, RATE)
        if blocks == "reference":
            estimate = separated_in_blocks(model, noisy, average)
        else:
            vectors = Vectors({"speech": average})
            estimate = Separator(model).separate(noisy[None], RATE, vectors)["speech"][0]
        found = dict(zip(rows, heard[len(rows) * at :], strict=False))
        for row, expected in ((AVERAGE, estimate), (HALF, noisy / 2), (MIXTURE, noisy)):
            np.testing.assert_array_equal(found[row][0], resample(source, RATE, 16000))
            np.testing.assert_allclose(found[row][1], resample(expected, RATE, 16000), atol=1e-5)


def test_voicebank_demand(sets, tmp_path):
    pesq = pytest.importorskip("pesq")
    assert run_suite(sets, "voicebank_demand", tmp_path / "r.json") == 0
    rows = {row["query"]: row for row in json.loads((tmp_path / "r.json").read_text())["rows"]}
    folder, expected = sets / "voicebank_demand", []
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


def test_a_silent_sentence_is_left_out_and_counted(monkeypatch):
    monkeypatch.setattr(speech, "require_package", lambda *words: None)
    silent = speech_figures(np.zeros(16000), tiny.noise(0, 2))
    assert np.isnan(list(silent.values())).all()
    good = dict.fromkeys(silent, 2.0)
    sentences = [{row: of for row in (ORACLE, MIXTURE)} for of in (good, silent, good)]
    rows = voicebank_demand._summary(sentences)
    assert [row["pesq"] for row in rows] == [2.0, 2.0]
    assert [row["silent"] for row in rows] == [1, 1]


def test_the_paper_s_name_of_the_training_set_is_taken_too(sets, tmp_path):
    folder = imitations.voicebank_demand(tmp_path, train="clean_trainset_wav")
    assert set(voicebank_demand.speech_average(Model(sets / "soft"), folder)) == {"Speech"}


def test_the_figure_of_a_set_is_the_median_of_what_is_a_number():
    sentences = [{MIXTURE: {"ssnr": x}, "row": {"ssnr": x + 1}} for x in (1.0, np.nan, 2.0, 6.0)]
    summary = {row["query"]: row for row in voicebank_demand._summary(sentences)}
    assert (summary["row"]["ssnr"], summary["row"]["ssnr_mean"]) == (3.0, 4.0)
    assert summary["row"]["ssnr_gain"] == 1.0
    nothing = voicebank_demand._summary([{MIXTURE: {"ssnr": np.nan}}])
    assert nothing[0]["ssnr"] is None


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="Voicebank-Demand lacks"):
        voicebank_demand.sentences(tmp_path)


@pytest.mark.parametrize("case", ["short", "shortest", "silent"])
def test_what_pesq_does_not_score_is_no_number(case):
    pytest.importorskip("pesq")
    clean = tiny.noise(0, {"short": 0.3, "shortest": 0.05, "silent": 2}[case])
    figures = speech_figures(clean, 0 * clean if case == "silent" else clean + 0.01)
    assert np.isnan([figures[name] for name in ("pesq", "csig", "cbak", "covl")]).all()
    assert np.isnan(figures["ssnr"]) == (case == "shortest")


def test_sentences_without_pesq_are_left_out_and_counted():
    good = dict.fromkeys(("pesq", "ssnr"), 2.0)
    sentences = [{MIXTURE: good, "row": {"pesq": x, "ssnr": 1.0}} for x in (np.nan, 3.0, 5.0)]
    summary = {row["query"]: row for row in voicebank_demand._summary(sentences)}
    assert (summary["row"]["pesq"], summary["row"]["without_pesq"]) == (4.0, 1)
    assert (summary[MIXTURE]["without_pesq"], summary["row"]["silent"]) == (0, 0)
