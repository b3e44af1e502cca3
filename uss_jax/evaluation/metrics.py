"""Figures of separation (SDR and its relatives, on the device) and of tagging (on the host).

Letters: `t` samples, `n` items, `k` classes.
"""

import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Num

# Least mean square that counts in an SDR, and least share of energy in an SI-SDR: a silent estimate
# gives a number, and nothing is worse than -100 dB or better than 100 dB in SI-SDR. A reference
# that is not above it is silent, and no figure is defined.
FLOOR = 1e-10

SEPARATION_FIGURES = ("sdr", "sdri", "si_sdr", "si_sdri")


def sdr(reference: Float[Array, "*b t"], estimate: Float[Array, "*b t"]) -> Float[Array, "*b"]:
    """Signal-to-distortion ratio in dB: 10 log10 of mean(ref^2) / mean((est - ref)^2).

    Both means are at least 1e-10.
    """
    signal = jnp.mean(jnp.square(reference), axis=-1)
    error = jnp.mean(jnp.square(estimate - reference), axis=-1)
    return 10 * jnp.log10(jnp.maximum(signal, FLOOR) / jnp.maximum(error, FLOOR))


def si_sdr(reference: Float[Array, "*b t"], estimate: Float[Array, "*b t"]) -> Float[Array, "*b"]:
    """Scale-invariant SDR in dB (Le Roux et al. 2019, arXiv:1811.02508), means not removed.

    The estimate's energy splits into the part along the reference and the rest; this is their
    ratio. As shares of the estimate's energy both are at least 1e-10, so that the result does not
    depend on the level of a quiet estimate and lies between -100 and 100 dB. A silent reference or
    estimate gives -100 dB.
    """
    unit_reference, unit_estimate = _unit(reference), _unit(estimate)
    along = jnp.sum(unit_reference * unit_estimate, axis=-1, keepdims=True)
    # Not 1 - along^2, which would cancel.
    rest = jnp.sum(jnp.square(unit_estimate - along * unit_reference), axis=-1)
    share = jnp.maximum(jnp.square(along[..., 0]), FLOOR)
    silent = jnp.logical_not(jnp.any(estimate, axis=-1))
    return 10 * jnp.log10(share / jnp.maximum(jnp.where(silent, 1, rest), FLOOR))


def _unit(x: Float[Array, "*b t"]) -> Float[Array, "*b t"]:
    """Scaled to energy 1; the peak goes first, so that no square of a quiet sample underflows."""
    x = x / jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-30)
    return x / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True)), 1e-30)


@jax.jit
def separation_figures(
    reference: Float[Array, "*b t"], estimate: Float[Array, "*b t"], mixture: Float[Array, "*b t"]
) -> dict[str, Float[Array, "*b"]]:
    """SDR and SI-SDR of estimates in dB, and how far they are above those of the mixtures.

    NaN where the reference is silent.
    """
    now, before = sdr(reference, estimate), sdr(reference, mixture)
    si_now, si_before = si_sdr(reference, estimate), si_sdr(reference, mixture)
    figures = {"sdr": now, "sdri": now - before, "si_sdr": si_now, "si_sdri": si_now - si_before}
    heard = jnp.mean(jnp.square(reference), axis=-1) > FLOOR
    return {name: jnp.where(heard, of, jnp.nan) for name, of in figures.items()}


def is_silent(waveform: Float[np.ndarray, "*b t"]) -> Bool[np.ndarray, "*b"]:
    """Whether the mean square of a reference is so low that no figure is defined."""
    return np.asarray(np.mean(np.square(waveform, dtype=np.float64), axis=-1) <= FLOOR)


def class_medians(
    values: Num[np.ndarray, " n"], classes: Integer[np.ndarray, " n"]
) -> dict[int, float]:
    """The median of each class's values, by class index, ascending."""
    return {int(k): float(np.median(values[classes == k])) for k in np.unique(classes)}


def average_precision(
    positive: Bool[np.ndarray, " n"], score: Float[np.ndarray, " n"]
) -> float | None:
    """Area under precision over recall, as a sum of steps; None without positives.

    Items of equal score enter together, so that their order does not matter.
    """
    if not positive.any():
        return None
    order = np.argsort(-score, kind="stable")
    found = np.cumsum(positive[order])
    last_of_score = np.append(np.diff(score[order]) != 0, True)
    found, taken = found[last_of_score], np.flatnonzero(last_of_score) + 1
    recall = found / found[-1]
    return float(np.sum(np.diff(recall, prepend=0) * found / taken))


def roc_auc(positive: Bool[np.ndarray, " n"], score: Float[np.ndarray, " n"]) -> float | None:
    """Chance that a positive scores above a negative, a tie counting half; None without either."""
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return None
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2  # from 1, the mean rank among ties
    above = rank[place][positive].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def d_prime(auc: float) -> float:
    """Distance of two normal distributions of variance 1 that would give this ROC AUC."""
    return 2**0.5 * statistics.NormalDist().inv_cdf(min(max(auc, 1e-9), 1 - 1e-9))


def per_class(
    figure: Callable[[np.ndarray, np.ndarray], float | None],
    positive: Bool[np.ndarray, "n k"],
    score: Float[np.ndarray, "n k"],
) -> dict[int, float]:
    """A figure of every class for which it exists, by class index."""
    figures = {k: figure(positive[:, k], score[:, k]) for k in range(positive.shape[1])}
    return {k: value for k, value in figures.items() if value is not None}
