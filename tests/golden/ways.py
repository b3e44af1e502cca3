"""The ways in which the golden tests can compute, and how near the reference each must come.

`python -m tests.golden --at WAY` chooses one; what a test aims at is what it says at "highest".
"""

import dataclasses
from collections.abc import Mapping

import pytest

# Of a test that holds a decision, such as where a maximum lies, to be the reference's.
decides_at_highest = pytest.mark.skipif(
    "config.getoption('--at') != 'highest'",
    reason="decisions are made in float32 at highest precision only",
)


@dataclasses.dataclass(frozen=True)
class Way:
    """A way of computing.

    Attributes:
      precision: of float32 products and convolutions.
      dtype: that the nets compute in; the detector in a training step stays float32.
      limits: what is compared -> the distance allowed, where it is above that at highest precision.
    """

    precision: str
    dtype: str
    limits: Mapping[str, float]


TF32 = {}
BFLOAT16 = {}
WAYS = {
    "highest": Way("highest", "float32", {}),
    "high": Way("high", "float32", TF32),
    "default": Way("default", "float32", TF32),
    "bfloat16": Way("highest", "bfloat16", BFLOAT16),
}

chosen = WAYS["highest"]


def choose(name: str) -> Way:
    """Makes all that follows compute in a way."""
    global chosen
    chosen = WAYS[name]
    return chosen


def limit(what: str, at_highest: float) -> float:
    """The largest distance from the reference that a test lets pass.

    Args:
      what: a key of the limits.
      at_highest: the limit in float32 at highest precision.
    """
    return max(at_highest, chosen.limits.get(what, 0.0))
