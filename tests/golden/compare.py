"""Comparing an array with a stored reference, whole or thinned out."""

from collections.abc import Mapping

import numpy as np


def stored(fixture: Mapping[str, np.ndarray], key: str, actual: np.ndarray) -> np.ndarray:
    """The values of `actual` that the fixture holds under `key`, after checking its shape.

    A big tensor X is stored as `X.ravel()[::stride]` with companions `key@shape`, `key@stride` and
    `key@norm`; one without companions is stored whole.
    """
    actual = np.asarray(actual)
    if f"{key}@shape" not in fixture:
        assert actual.shape == fixture[key].shape, (key, actual.shape, fixture[key].shape)
        return actual
    assert actual.shape == tuple(fixture[f"{key}@shape"]), (key, actual.shape)
    return actual.ravel()[:: int(fixture[f"{key}@stride"])]


def relative_error(fixture: Mapping[str, np.ndarray], key: str, actual: np.ndarray) -> float:
    """||actual - reference|| / ||reference|| over the stored values."""
    return distance(stored(fixture, key, actual), fixture[key])


def statistics_error(fixture: Mapping[str, np.ndarray], key: str, actual: np.ndarray) -> float:
    """The larger error of the means and deviations of a feature map's channels.

    Args:
      fixture: holds `key/mean`, `key/std` and `key/shape`, the shape in torch's order.
      key: which map.
      actual: the map as the nets here have it, [batch, time, frequency, channels].
    """
    actual = np.moveaxis(np.asarray(actual, np.float64), -1, 1)
    assert actual.shape == tuple(fixture[f"{key}/shape"]), (key, actual.shape)
    axes = (0, 2, 3)
    return max(
        distance(actual.mean(axes), fixture[f"{key}/mean"]),
        distance(actual.std(axes), fixture[f"{key}/std"]),
    )


def distance(actual: np.ndarray, reference: np.ndarray) -> float:
    """||actual - reference|| / ||reference||, in double precision."""
    reference = np.asarray(reference)
    reference = reference.astype(np.result_type(reference, np.float64))
    return float(np.linalg.norm(actual - reference) / np.linalg.norm(reference))
