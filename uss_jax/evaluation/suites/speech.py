"""Metrics of enhanced speech at 16 kHz: PESQ, segmental SNR, and Hu and Loizou's composites.

Definitions as in P. Loizou, Speech Enhancement: Theory and Practice (2nd ed., ch. 11), and Y. Hu
and P. Loizou, Evaluation of objective quality measures for speech enhancement, IEEE TASLP 16
(2008), with frames of 30 ms and a hop of 7.5 ms. PESQ is ITU-T P.862.2 (wide band), computed by the
package pesq.

Letters: `t` samples, `n` frames, `w` samples of a frame, `k` critical bands, `p` order of linear
prediction.
"""

import contextlib

import numpy as np
from jaxtyping import Float

from uss_jax.evaluation.metrics import is_silent
from uss_jax.evaluation.suites.whole import require_package

RATE = 16000
_FRAME = 480
_STEP = 120
_ORDER = 16
_N_FFT = 1024
_KEPT = 0.95  # share of the frames averaged, leaving out the worst
_SNR_RANGE = (-10.0, 35.0)
# Klatt's constants in the weights of spectral slopes, for the loudest band and the nearest peak.
_K_MAX, _K_LOCAL = 20.0, 1.0
# Centres and widths of the critical bands in Hz.
_CENTRES = (
    *(50, 120, 190, 260, 330, 400, 470, 540, 617.372, 703.378, 798.717, 904.128, 1020.38),
    *(1148.30, 1288.72, 1442.54, 1610.70, 1794.16, 1993.93, 2211.08, 2446.71, 2701.97, 2978.04),
    *(3276.17, 3597.63),
)
_WIDTHS = (
    *(70, 70, 70, 70, 70, 70, 70, 77.3724, 86.0056, 95.3398, 105.411, 116.256, 127.914, 140.423),
    *(153.823, 168.154, 183.457, 199.776, 217.153, 235.631, 255.255, 276.072, 298.126, 321.465),
    346.136,
)

Wave = Float[np.ndarray, " t"]


def speech_figures(clean: Wave, estimate: Wave) -> dict[str, float]:
    """Computes PESQ (1..4.64), SSNR (dB), CSIG, CBAK and COVL (1..5) of an estimate.

    All are NaN if the clean speech is silent or shorter than 37.5 ms. PESQ, and the composites that
    are made of it, are NaN if PESQ finds no speech in a side, or if they are shorter than 1/4 s.
    """
    pesq = require_package("pesq", "PESQ")
    if is_silent(clean) or len(clean) < _FRAME + _STEP:
        return dict.fromkeys(("pesq", "ssnr", "csig", "cbak", "covl"), float("nan"))
    clean, estimate = clean.astype(np.float64), estimate.astype(np.float64)
    quality = float("nan")
    if not is_silent(estimate):  # of which pesq makes a NaN, then a ValueError
        with contextlib.suppress(pesq.BufferTooShortError, pesq.NoUtterancesError):
            quality = float(pesq.pesq(RATE, clean, estimate, "wb"))
    snr, likelihood = segmental_snr(clean, estimate), log_likelihood_ratio(clean, estimate)
    slope = weighted_spectral_slope(clean, estimate)
    composites = {
        "csig": 3.093 - 1.029 * likelihood + 0.603 * quality - 0.009 * slope,
        "cbak": 1.634 + 0.478 * quality - 0.007 * slope + 0.063 * snr,
        "covl": 1.594 + 0.805 * quality - 0.512 * likelihood - 0.007 * slope,
    }
    return {
        "pesq": quality,
        "ssnr": snr,
        **{name: float(np.clip(value, 1, 5)) for name, value in composites.items()},
    }


def _frames(wave: Wave) -> Float[np.ndarray, "n w"]:
    """Cuts a waveform into frames, times a Hann window without zeros at its ends."""
    count = int(len(wave) / _STEP - _FRAME / _STEP)
    window = 0.5 * (1 - np.cos(2 * np.pi * np.arange(1, _FRAME + 1) / (_FRAME + 1)))
    return np.lib.stride_tricks.sliding_window_view(wave, _FRAME)[::_STEP][:count] * window


def segmental_snr(clean: Wave, estimate: Wave) -> float:
    """Mean over frames of the SNR, clipped to -10 ... 35 dB."""
    signal = np.sum(np.square(_frames(clean)), axis=1)
    noise = np.sum(np.square(_frames(clean) - _frames(estimate)), axis=1)
    tiny = np.finfo(float).eps
    return float(np.mean(np.clip(10 * np.log10(signal / (noise + tiny) + tiny), *_SNR_RANGE)))


def log_likelihood_ratio(clean: Wave, estimate: Wave) -> float:
    """Log ratio of clean-speech prediction errors: with the LPC of the estimate and of the clean.

    log(a_e R a_e / a_c R a_c) of each frame, with R the clean frame's autocorrelation; mean over
    the best 95 % of frames.
    """
    clean_frames = _frames(clean)
    correlation = _autocorrelation(clean_frames)
    own, other = _prediction(correlation), _prediction(_autocorrelation(_frames(estimate)))
    lags = np.abs(np.arange(_ORDER + 1)[:, None] - np.arange(_ORDER + 1))
    matrix = correlation[:, lags]
    errors = [np.einsum("np,npq,nq->n", a, matrix, a) for a in (other, own)]
    tiny = np.finfo(float).eps
    return _mean_of_better(np.log(np.maximum(errors[0], tiny) / np.maximum(errors[1], tiny)))


def _autocorrelation(frames: Float[np.ndarray, "n w"]) -> Float[np.ndarray, "n _"]:
    spectrum = np.fft.rfft(frames, 2 * _FRAME)
    return np.fft.irfft(np.square(np.abs(spectrum)))[:, : _ORDER + 1]


def _prediction(correlation: Float[np.ndarray, "n p"]) -> Float[np.ndarray, "n p"]:
    """Prediction error filter by Levinson-Durbin recursion; its first coefficient is 1."""
    coefficients = np.zeros_like(correlation)
    coefficients[:, 0] = 1
    error = correlation[:, 0].copy()
    tiny = np.finfo(float).eps
    for order in range(1, correlation.shape[1]):
        past = coefficients[:, :order]
        reflected = -np.sum(past * correlation[:, order:0:-1], axis=1) / np.maximum(error, tiny)
        coefficients[:, 1 : order + 1] += (
            reflected[:, None] * coefficients[:, order - 1 :: -1][:, :order]
        )
        error = error * (1 - np.square(reflected))
    return coefficients


def weighted_spectral_slope(clean: Wave, estimate: Wave) -> float:
    """Klatt's weighted distance of the slopes between critical bands, in which peaks weigh most.

    Mean over the best 95 % of frames.
    """
    energies = [_band_energies(_frames(wave)) for wave in (clean, estimate)]
    slopes = [np.diff(energy, axis=1) for energy in energies]
    weights = [_weights(e, s) for e, s in zip(energies, slopes, strict=True)]
    weight = (weights[0] + weights[1]) / 2
    distance = np.sum(weight * np.square(slopes[0] - slopes[1]), axis=1) / np.sum(weight, axis=1)
    return _mean_of_better(distance)


def _band_energies(frames: Float[np.ndarray, "n w"]) -> Float[np.ndarray, "n k"]:
    """Energy of each critical band, clipped to at least -100 dB."""
    half = _N_FFT // 2
    power = np.square(np.abs(np.fft.rfft(frames, _N_FFT)))[:, :half]
    centre, width = (np.array(hertz)[:, None] / (RATE / 2) * half for hertz in (_CENTRES, _WIDTHS))
    gain = np.log(_WIDTHS[0]) - np.log(np.array(_WIDTHS))[:, None]
    filters = np.exp(-11 * np.square((np.arange(half) - np.floor(centre)) / width) + gain)
    filters *= filters > np.exp(-30 / (2 * 2.303))
    return 10 * np.log10(np.maximum(power @ filters.T, 1e-10))


def _weights(
    energy: Float[np.ndarray, "n k"], slope: Float[np.ndarray, "n _"]
) -> Float[np.ndarray, "n _"]:
    """Weights of the slopes: large in loud bands and near spectral peaks."""
    peak = np.empty_like(slope)
    bands = slope.shape[1]
    for n in range(len(slope)):
        for k in range(bands):
            at = k
            if slope[n, k] > 0:  # climb to the right
                while at < bands and slope[n, at] > 0:
                    at += 1
                peak[n, k] = energy[n, at - 1]
            else:  # or to the left
                while at >= 0 and slope[n, at] <= 0:
                    at -= 1
                peak[n, k] = energy[n, at + 1]
    here = energy[:, :-1]
    loudest = energy.max(axis=1, keepdims=True)
    return _K_MAX / (_K_MAX + loudest - here) * _K_LOCAL / (_K_LOCAL + peak - here)


def _mean_of_better(distances: Float[np.ndarray, " n"]) -> float:
    return float(np.mean(np.sort(distances)[: round(len(distances) * _KEPT)]))
