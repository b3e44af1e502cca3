"""Metrics of separation (SDR and variants, on the device) and of tagging (on the host).

Letters: `*b` any batch axes, `t` samples, `n` items, `k` classes.
"""

import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Num

# Lower bound of mean squares in SDR and of energy shares in SI-SDR: a silent estimate has finite
# metrics, and SI-SDR lies within -100 ... 100 dB. A reference whose mean square is not above it
# counts as silent, and its metrics are undefined.
FLOOR = 1e-10

SEPARATION_FIGURES = ("sdr", "sdri", "si_sdr", "si_sdri")


def sdr(reference: Float[Array, "*b t"], estimate: Float[Array, "*b t"]) -> Float[Array, "*b"]:
    """Signal-to-distortion ratio in dB: 10 log10 of mean(ref^2) / mean((est - ref)^2).

    Both means are clipped to at least 1e-10.
    """
    signal = jnp.mean(jnp.square(reference), axis=-1)
    error = jnp.mean(jnp.square(estimate - reference), axis=-1)
    return 10 * jnp.log10(jnp.maximum(signal, FLOOR) / jnp.maximum(error, FLOOR))


def si_sdr(reference: Float[Array, "*b t"], estimate: Float[Array, "*b t"]) -> Float[Array, "*b"]:
    """Scale-invariant SDR in dB (Le Roux et al. 2019, arXiv:1811.02508), means not removed.

    The ratio of the energy of the estimate's projection onto the reference to that of the residual.
    Both are divided by the estimate's energy and clipped to at least 1e-10, so that the result does
    not depend on the level of a quiet estimate and lies between -100 and 100 dB. A silent reference
    or estimate gives -100 dB.
    """
    unit_reference, unit_estimate = _unit(reference), _unit(estimate)
    along = jnp.sum(unit_reference * unit_estimate, axis=-1, keepdims=True)
    # 1 - along^2 would suffer from cancellation.
    rest = jnp.sum(jnp.square(unit_estimate - along * unit_reference), axis=-1)
    share = jnp.maximum(jnp.square(along[..., 0]), FLOOR)
    silent = jnp.logical_not(jnp.any(estimate, axis=-1))
    return 10 * jnp.log10(share / jnp.maximum(jnp.where(silent, 1, rest), FLOOR))


def _unit(x: Float[Array, "*b t"]) -> Float[Array, "*b t"]:
    """Scales to energy 1; divides by the peak first, so that no square underflows."""
    x = x / jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-30)
    return x / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True)), 1e-30)


@jax.jit
def separation_figures(
    reference: Float[Array, "*b t"], estimate: Float[Array, "*b t"], mixture: Float[Array, "*b t"]
) -> dict[str, Float[Array, "*b"]]:
    """Computes SDR and SI-SDR of estimates, and their improvement over the mixtures, in dB.

    NaN where the reference is silent.
    """
    now, before = sdr(reference, estimate), sdr(reference, mixture)
    si_now, si_before = si_sdr(reference, estimate), si_sdr(reference, mixture)
    figures = {"sdr": now, "sdri": now - before, "si_sdr": si_now, "si_sdri": si_now - si_before}
    heard = jnp.mean(jnp.square(reference), axis=-1) > FLOOR
    return {name: jnp.where(heard, of, jnp.nan) for name, of in figures.items()}


def is_silent(waveform: Float[np.ndarray, "*b t"]) -> Bool[np.ndarray, "*b"]:
    """Tells whether a reference has a mean square of at most `FLOOR`: metrics are undefined."""
    return np.asarray(np.mean(np.square(waveform, dtype=np.float64), axis=-1) <= FLOOR)


def class_medians(
    values: Num[np.ndarray, " n"], classes: Integer[np.ndarray, " n"]
) -> dict[int, float]:
    """Returns class index -> median of the class's values, in ascending order of class index."""
    return {int(k): float(np.median(values[classes == k])) for k in np.unique(classes)}


def average_precision(
    positive: Bool[np.ndarray, " n"], score: Float[np.ndarray, " n"]
) -> float | None:
    """Area under the precision-recall curve, as a sum of steps; None without positives.

    Items of equal score form one step, so that their order does not matter.
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
    """Probability that a positive scores above a negative; a tie counts half.

    None without positives or without negatives.
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return None
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2  # from 1, the mean rank among ties
    above = rank[place][positive].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def d_prime(auc: float) -> float:
    """Distance between the means of two normal distributions of variance 1 with this ROC AUC."""
    return 2**0.5 * statistics.NormalDist().inv_cdf(min(max(auc, 1e-9), 1 - 1e-9))


def per_class(
    figure: Callable[[np.ndarray, np.ndarray], float | None],
    positive: Bool[np.ndarray, "n k"],
    score: Float[np.ndarray, "n k"],
) -> dict[int, float]:
    """Returns class index -> metric, for the classes where it is defined."""
    figures = {k: figure(positive[:, k], score[:, k]) for k in range(positive.shape[1])}
    return {k: value for k, value in figures.items() if value is not None}
