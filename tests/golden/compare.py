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
    values = stored(fixture, key, actual).astype(np.float64)
    reference = fixture[key].astype(np.float64)
    return float(np.linalg.norm(values - reference) / np.linalg.norm(reference))
