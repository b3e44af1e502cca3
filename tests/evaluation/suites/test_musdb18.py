import contextlib
import io
import json
import shutil
import sys
import types

import numpy as np
import pytest
import soundfile

from tests.evaluation.suites import imitations
from tests.evaluation.suites.recomputed import (
    recomputed_average,
    recomputed_median,
    run_suite,
    separated_in_blocks,
)
from tests.tiny import RATE
from uss_jax.audio.files import read_mono
from uss_jax.bundles.model import Model
from uss_jax.cli.main import main
from uss_jax.errors import UserError
from uss_jax.evaluation.rows import AVERAGE, HALF, MIXTURE, ORACLE
from uss_jax.evaluation.suites import musdb18
from uss_jax.separation.example_vectors import recording_vector
from uss_jax.separation.queries import Vectors
from uss_jax.separation.recordings import Separator

QUICK_COMPILATION = True

# museval comes from another time of numpy and of setuptools.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_sdr_is_museval_s(sets, monkeypatch):
    # museval asks for ffmpeg, by these, to read containers that are not read here.
    for name in ("musdb", "stempeg"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    museval = pytest.importorskip("museval")
    song = sets / "musdb18" / "test" / "c"
    source, rate = soundfile.read(song / "vocals.wav")  # its first second is silent
    mixture, _ = soundfile.read(song / "mixture.wav")
    source, mixture = (side[: int(3.7 * rate)].astype(np.float32) for side in (source, mixture))
    for reference, estimate in ((source, mixture), (mixture, source)):
        sdr = museval.evaluate(reference[None], estimate[None], win=rate, hop=rate)[0]
        assert np.isnan(sdr[0, 0])
        ours = musdb18.median_sdr(reference.T, estimate.T, rate)
        assert ours == pytest.approx(np.nanmedian(sdr), abs=1e-6)
    assert np.isnan(musdb18.median_sdr(source.T, 0 * source.T, rate))


@pytest.fixture(scope="module")
def evaluated(sets, tmp_path_factory):
    """The results, legacy figures among them, and what was printed."""
    out = tmp_path_factory.mktemp("evaluated") / "r.json"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run_suite(sets, "musdb18", out, "--legacy") == 0
    return json.loads(out.read_text()), printed.getvalue()


def test_musdb18(sets, evaluated):
    results, printed = evaluated
    assert "drums sdr" in printed
    rows = {row["query"]: row for row in results["rows"]}
    assert set(rows) == {ORACLE, AVERAGE, HALF, MIXTURE}
    model, folder = Model(sets / "soft"), sets / "musdb18"
    for stem in musdb18.STEMS:
        average = recomputed_average(model, [folder / "train" / "a" / f"{stem}.wav"])
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
                found[name].append(recomputed_median(source, estimate, RATE))
            found["mixture"].append(recomputed_median(source, mixture, RATE))
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


def test_musdb18_s_legacy_figures_are_the_published_rule(sets, evaluated):
    # Files as one channel at the model's rate; the estimate taken for the reference.
    results, _ = evaluated
    row = next(row for row in results["rows"] if row["query"] == AVERAGE)
    model, folder = Model(sets / "soft"), sets / "musdb18"
    of_stems = {"legacy_sdr": [], "legacy_sdri": []}
    for stem in musdb18.STEMS:
        average = recomputed_average(model, [folder / "train" / "a" / f"{stem}.wav"])
        sdrs, sdris = [], []
        for song in ("b", "c"):
            mixture, source = (
                read_mono(folder / "test" / song / f"{name}.wav", RATE)
                for name in ("mixture", stem)
            )
            estimate = separated_in_blocks(model, mixture, average)
            sdr = recomputed_median(estimate[None], source[None], RATE)
            sdrs.append(sdr)
            sdris.append(sdr - recomputed_median(estimate[None], mixture[None], RATE))
        for name, values in (("legacy_sdr", sdrs), ("legacy_sdri", sdris)):
            expected = np.nanmedian(values)
            assert row["stems"][stem][name] == pytest.approx(expected, abs=2e-3)
            of_stems[name].append(expected)
    for name, values in of_stems.items():
        assert row[name] == pytest.approx(np.nanmean(values), abs=2e-3)


def test_a_stopped_run_goes_on(sets, tmp_path, monkeypatch):
    model, scored = Model(sets / "soft"), []
    averages = musdb18.stem_averages(model, sets / "musdb18")
    real = musdb18._score_song

    def counting(model, song, *rest):
        scored.append(song.name)
        if scored == ["b", "c"]:
            raise KeyboardInterrupt
        return real(model, song, *rest)

    monkeypatch.setattr(musdb18, "_score_song", counting)
    words = (model, sets / "musdb18", averages, tmp_path / "unfinished")
    with pytest.raises(KeyboardInterrupt):
        musdb18.score_songs(*words, legacy=False)
    rows = musdb18.score_songs(*words, legacy=False)
    assert scored == ["b", "c", "c"]
    assert len(rows) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished"]  # until all is written


def test_a_silent_stem_is_left_out_and_counted(sets, tmp_path, capsys):
    folder = tmp_path / "musdb18"
    shutil.copytree(sets / "musdb18", folder)
    bass, rate = soundfile.read(folder / "test/b/bass.wav")
    soundfile.write(folder / "test/b/bass.wav", 0 * bass, rate)
    words = ["--model", sets / "soft", "--data", folder, "--out", tmp_path / "r.json"]
    assert main(["evaluate", "musdb18", *map(str, words)]) == 0
    assert "left out: 1 with a silent target" in capsys.readouterr().out
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["silent_targets"] == 1
    (mixture,) = [row for row in results["rows"] if row["query"] == MIXTURE]
    one = soundfile.read(folder / "test/c/bass.wav", dtype="float32")[0].T
    whole = soundfile.read(folder / "test/c/mixture.wav", dtype="float32")[0].T
    assert mixture["stems"]["bass"]["sdr"] == pytest.approx(
        recomputed_median(one, whole, rate), abs=1e-3
    )


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="MUSDB18-HQ lacks 1 of its 1 file: "):
        musdb18.songs(tmp_path, "test")
    (imitations.musdb18(tmp_path) / "test" / "b" / "bass.wav").unlink()
    with pytest.raises(UserError, match=r"MUSDB18-HQ lacks 1 of its 10 files: .*b/bass\.wav"):
        musdb18.songs(tmp_path, "test")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda x, rate: (x[:, :1], rate),
            r"has 1 channel at 8000 Hz, 4\.00 s, its mixture\.wav 2 ",
        ),
        (
            lambda x, rate: (x, 2 * rate),
            r"2 channels at 16000 Hz, 2\.00 s, its .* 8000 Hz, 4\.00 s",
        ),
        (
            lambda x, rate: (np.concatenate([x, x[:100]]), rate),
            r"4\.01 s, its mixture\.wav .*4\.00 s",
        ),
    ],
)
def test_a_stem_of_another_form_than_its_mixture_is_refused(sets, tmp_path, change, said):
    folder = tmp_path / "musdb18"
    shutil.copytree(sets / "musdb18", folder)
    path = folder / "test/b/vocals.wav"
    soundfile.write(path, *change(*soundfile.read(path)))
    with pytest.raises(UserError, match=rf"test/b/vocals\.wav .*{said}"):
        musdb18.run(Model(sets / "soft"), str(folder), str(tmp_path / "r.json"), legacy=False)


def test_a_stem_longer_by_a_few_samples_is_cut(sets, tmp_path):
    folder = tmp_path / "musdb18"
    shutil.copytree(sets / "musdb18", folder)
    model, song = Model(sets / "soft"), folder / "test/b"
    expected = musdb18._score_song(model, song, {}, False)
    vocals, rate = soundfile.read(song / "vocals.wav")
    soundfile.write(song / "vocals.wav", np.concatenate([vocals, 0 * vocals[:5]]), rate)
    assert musdb18._score_song(model, song, {}, False) == expected
