"""Segmental SNR, log-likelihood ratio and spectral slope against their definitions, written out."""

import math

import numpy as np
import pytest
import scipy.linalg

from tests.evaluation.suites.imitations import sound
from uss_jax.evaluation.suites import speech

CLEAN = sound("ovos-dog", 0.6, rate=16000).astype(np.float64)
NOISY = CLEAN + 0.2 * sound("ovos-pig", 0.6, rate=16000)
WINDOW = [0.5 * (1 - math.cos(2 * math.pi * n / 481)) for n in range(1, 481)]


def _frames(wave):
    count = int(len(wave) / 120 - 480 / 120)
    return [wave[120 * i : 120 * i + 480] * WINDOW for i in range(count)]


def _better(values):
    return np.mean(sorted(values)[: round(0.95 * len(values))])


def test_segmental_snr():
    values = []
    for a, b in zip(_frames(CLEAN), _frames(NOISY), strict=True):
        value = 10 * math.log10(sum(a**2) / (sum((a - b) ** 2) + 2.2e-16) + 2.2e-16)
        values.append(min(max(value, -10), 35))
    assert speech.segmental_snr(CLEAN, NOISY) == pytest.approx(np.mean(values))
    assert speech.segmental_snr(CLEAN, CLEAN) > speech.segmental_snr(CLEAN, NOISY)


def test_log_likelihood_ratio():
    def correlation(frame):
        return np.array([np.dot(frame[: 480 - lag], frame[lag:]) for lag in range(17)])

    def prediction(r):
        return np.concatenate([[1], scipy.linalg.solve_toeplitz(r[:16], -r[1:])])

    values = []
    for a, b in zip(_frames(CLEAN), _frames(NOISY), strict=True):
        matrix = scipy.linalg.toeplitz(correlation(a))
        own, other = prediction(correlation(a)), prediction(correlation(b))
        values.append(math.log((other @ matrix @ other) / (own @ matrix @ own)))
    found = speech.log_likelihood_ratio(CLEAN, NOISY)
    assert found == pytest.approx(_better(values), rel=1e-5)  # rounding of ill-conditioned frames
    assert speech.log_likelihood_ratio(CLEAN, 0.1 * CLEAN) == pytest.approx(0, abs=1e-9)


def test_weighted_spectral_slope():
    def energies(frame):
        power = np.abs(np.fft.fft(frame, 1024)[:512]) ** 2
        found = []
        for centre, width in zip(speech._CENTRES, speech._WIDTHS, strict=True):
            total = 0.0
            for j in range(512):
                off = (j - math.floor(centre / 8000 * 512)) / (width / 8000 * 512)
                weight = math.exp(-11 * off**2 + math.log(70) - math.log(width))
                total += power[j] * weight * (weight > math.exp(-30 / 4.606))
            found.append(10 * math.log10(max(total, 1e-10)))
        return found

    def weights(energy, slope):
        found = []
        for k in range(24):
            n = k
            if slope[k] > 0:
                while n < 24 and slope[n] > 0:
                    n += 1
                peak = energy[n - 1]
            else:
                while n >= 0 and slope[n] <= 0:
                    n -= 1
                peak = energy[n + 1]
            loud = 20 / (20 + max(energy) - energy[k])
            found.append(loud / (1 + peak - energy[k]))
        return np.array(found)

    values = []
    for a, b in zip(_frames(CLEAN), _frames(NOISY), strict=True):
        one, two = energies(a), energies(b)
        slopes = np.diff(one), np.diff(two)
        weight = (weights(one, slopes[0]) + weights(two, slopes[1])) / 2
        values.append(sum(weight * (slopes[0] - slopes[1]) ** 2) / sum(weight))
    assert speech.weighted_spectral_slope(CLEAN, NOISY) == pytest.approx(_better(values))
    assert speech.weighted_spectral_slope(CLEAN, 0.5 * CLEAN) == pytest.approx(0, abs=1e-9)


def test_the_bands_are_25_as_published():
    centres, widths = np.array(speech._CENTRES), np.array(speech._WIDTHS)
    assert len(centres) == len(widths) == 25
    # Each band begins where the one before has its centre: Klatt's spacing from 470 Hz on.
    np.testing.assert_allclose(np.diff(centres)[7:], widths[7:-1], rtol=2e-3)


@pytest.mark.filterwarnings("ignore")
def test_composites_lie_within_their_scale():
    pytest.importorskip("pesq")
    best = speech.speech_figures(CLEAN, CLEAN)
    assert best["csig"] == best["cbak"] == best["covl"] == 5
    assert best["pesq"] == pytest.approx(4.64, abs=0.01)  # the scale's end
    assert best["ssnr"] == 35
    heard = speech.speech_figures(CLEAN, NOISY)
    slope = speech.weighted_spectral_slope(CLEAN, NOISY)
    ratio = speech.log_likelihood_ratio(CLEAN, NOISY)
    quality = heard["pesq"]
    assert 1 < heard["cbak"] < 5
    expected = 1.634 + 0.478 * quality - 0.007 * slope + 0.063 * heard["ssnr"]
    assert heard["cbak"] == pytest.approx(expected)
    expected = 3.093 - 1.029 * ratio + 0.603 * quality - 0.009 * slope
    assert heard["csig"] == pytest.approx(min(max(expected, 1), 5))
    expected = 1.594 + 0.805 * quality - 0.512 * ratio - 0.007 * slope
    assert heard["covl"] == pytest.approx(min(max(expected, 1), 5))
