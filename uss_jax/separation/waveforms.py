"""Checks waveforms and sampling rates given by a caller, and makes estimates sum to their mixture.

Letters: `n` targets, `c` channels, `t` samples.
"""

import numbers
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

from uss_jax.audio import HIGHEST_SAMPLE_RATE, LOWEST_SAMPLE_RATE
from uss_jax.audio.files import check_scale
from uss_jax.errors import UserError


def as_waveform(given: Any) -> Float32[np.ndarray, "*c t"]:
    """Converts samples to float32 in [-1, 1], [samples] or [channels, samples].

    Args:
      given: floats are not scaled; int8, int16 and int32 are divided by their type's full scale.

    Raises:
      UserError: another type or shape, more channels than samples, or a sample that is not finite
        or implausibly large for audio in [-1, 1].
    """
    try:
        array = np.asarray(given)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"the waveform is not an array of samples ({error})") from error
    if array.dtype in (np.int8, np.int16, np.int32):
        array = array / np.float64(-np.iinfo(array.dtype).min)
    elif array.dtype.kind != "f":
        raise UserError(
            f"a waveform of type {array.dtype} has no known full scale; give floats in [-1, 1], "
            "int8, int16 or int32"
        )
    if array.ndim not in (1, 2) or not array.size:
        raise UserError(
            f"a waveform of shape {array.shape} is not [samples] or [channels, samples]"
        )
    if array.ndim == 2 and array.shape[0] > array.shape[1]:
        raise UserError(
            f"a waveform of shape {array.shape} has more channels than samples; it must be "
            "[channels, samples], so transpose it"
        )
    with np.errstate(over="ignore"):  # overflow gives inf, which is refused below
        array = array.astype(np.float32)
    try:
        check_scale(array)
    except ValueError as error:
        raise UserError(f"the waveform {error}") from None
    return array


def require_rate(sample_rate: Any) -> int:
    """Returns a sampling rate as int, in Hz; raises a UserError if not whole or out of range."""
    is_whole = isinstance(sample_rate, numbers.Real) and sample_rate % 1 == 0
    if is_whole and LOWEST_SAMPLE_RATE <= sample_rate <= HIGHEST_SAMPLE_RATE:
        return int(sample_rate)
    raise UserError(
        f"the sample rate is {sample_rate!r}, expected a whole number of Hz from "
        f"{LOWEST_SAMPLE_RATE} to {HIGHEST_SAMPLE_RATE}"
    )


def consistent(
    estimates: Float32[np.ndarray, "n c t"],
    mixture: Float32[np.ndarray, "c t"],
    heard: Bool[np.ndarray, " n"],
) -> Float32[np.ndarray, "n c t"]:
    """Adds an equal share of the residual to each heard estimate, so that they sum to the mixture.

    The others, which are silent, stay so; if none is heard, all are returned as they are.
    """
    if not heard.any():
        return estimates
    share = (mixture - estimates.sum(axis=0)) / np.float32(heard.sum())
    return estimates + share * heard[:, None, None].astype(np.float32)
