import dataclasses
import os
import shutil

import jax
import numpy as np
import pytest
import soundfile

from tests.evaluation.tones import DOG, sdr, write_tones
from tests.tiny import RATE, noise, tone
from uss_jax.bundles.model import Model
from uss_jax.devices.mesh import make_mesh
from uss_jax.errors import UserError
from uss_jax.evaluation import items, scoring
from uss_jax.evaluation.rows import CLASS, HALF, IDENTITY, MIXTURE, ORACLE, SHUFFLED, TEXT
from uss_jax.evaluation.scoring import score
from uss_jax.evaluation.suites.pairs import find_pairs
from uss_jax.models.query import KINDS

QUICK_COMPILATION = True


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_those_of_the_estimates(place, kind):
    model, pairs = Model(place / kind), find_pairs(place / "pairs")
    figures, rows = score(model, pairs)
    rounding = 1e-5 if kind == "class_vectors" else 1e-6  # of sums over 527 classes
    asked = [ORACLE, CLASS] if KINDS[kind].probabilities else [ORACLE]
    asked += [TEXT] if kind == "text_or_audio" else []
    assert list(figures) == [*asked, SHUFFLED, IDENTITY, HALF, MIXTURE]
    for at, pair in enumerate(pairs):
        source, _ = soundfile.read(pair.source, dtype="float32")
        mixture, _ = soundfile.read(pair.mixture, dtype="float32")
        condition = model.condition(source[None], np.array([pair.class_index], np.int32))
        np.testing.assert_allclose(rows[ORACLE].conditions[at], condition[0], atol=rounding)
        estimate = np.asarray(model.separate(mixture[None], condition))[0]
        alone = np.asarray(model.separate(source[None], condition))[0]
        assert figures[IDENTITY]["sdr"][at] == pytest.approx(sdr(source, alone), abs=1e-3)
        assert figures[ORACLE]["level"][at] == pytest.approx(
            10 * np.log10(np.mean(estimate**2) / np.mean(mixture**2)), abs=1e-3
        )
        assert figures[ORACLE]["level_error"][at] == pytest.approx(
            10 * np.log10(np.mean(estimate**2) / np.mean(source**2)), abs=1e-3
        )
        improvement = sdr(source, estimate) - sdr(source, mixture)
        assert figures[ORACLE]["sdri"][at] == pytest.approx(improvement, abs=1e-3)
        assert figures[HALF]["sdri"][at] == pytest.approx(
            sdr(source, mixture / 2) - sdr(source, mixture), abs=1e-3
        )
        assert figures[MIXTURE]["sdri"][at] == pytest.approx(0, abs=1e-6)


def test_one_device_gives_the_same_figures_as_eight(place, monkeypatch):
    model, pairs = Model(place / "soft"), find_pairs(place / "pairs")
    assert jax.device_count() == 8
    eight, _ = score(model, pairs)
    monkeypatch.setattr(items, "make_mesh", lambda: make_mesh(jax.devices()[:1]))
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
    assert unfinished.exists()  # until the results are written
    for row in whole:
        for figure in whole[row]:
            np.testing.assert_array_equal(again[row][figure], whole[row][figure])

    # A mixture has changed since: nothing is taken over.
    shutil.copytree(place / "pairs", tmp_path / "pairs")
    copied = [
        dataclasses.replace(
            pair,
            mixture=tmp_path / "pairs" / pair.mixture.relative_to(place / "pairs"),
            source=tmp_path / "pairs" / pair.source.relative_to(place / "pairs"),
        )
        for pair in pairs
    ]
    before = b"".join(scoring._identity(model, copied, [], 8, False))
    assert b"".join(scoring._identity(model, copied, [], 8, False)) == before
    os.utime(copied[3].mixture, ns=(1, 1))
    assert b"".join(scoring._identity(model, copied, [], 8, False)) != before


def test_pairs_at_another_rate_are_resampled(place, tmp_path):
    folder = tmp_path / "pairs" / f"class_id={DOG}"
    folder.mkdir(parents=True)
    waveform = np.random.default_rng(0).standard_normal(16000) / 10
    for name in ("1_source.wav", "1_mixture.wav"):
        soundfile.write(folder / name, waveform, 32000)
    figures, _ = score(Model(place / "soft"), find_pairs(tmp_path / "pairs"))
    assert np.isfinite(figures[ORACLE]["sdr"]).all()
    assert SHUFFLED not in figures  # there is no pair of another class


def test_pairs_may_differ_in_length_and_subtype(place, tmp_path):
    write_tones(tmp_path, "class_id=3/1mixture.wav", "class_id=3/1source.wav")
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
    write_tones(tmp_path, "class_id=3/1mixture.wav")
    write_tones(tmp_path, "class_id=3/1source.wav", seconds=0.4)
    with pytest.raises(UserError, match=r"1mixture.wav lasts 0.5 s, 1source.wav 0.4 s"):
        score(Model(place / "soft"), find_pairs(tmp_path))
