"""What the fuzz targets share: how long they run, and how good files are damaged."""

import functools
import os
import time
from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

_MINUTES = float(os.environ.get("FUZZ_MINUTES", "0"))
_ROUND = 500  # examples
_SETTINGS = settings(
    max_examples=_ROUND if _MINUTES else 50,
    derandomize=not _MINUTES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def fuzz(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a `given` test for 50 examples, always the same, or for FUZZ_MINUTES of CPU time."""
    test = _SETTINGS(test)
    if not _MINUTES:
        return test

    @functools.wraps(test)
    def for_minutes(*args, **kwargs):
        rounds, end = 0, time.process_time() + 60 * _MINUTES
        while time.process_time() < end:
            test(*args, **kwargs)
            rounds += 1
        print(f"{rounds * _ROUND} examples without a finding")

    return for_minutes


def check_words(error: Exception) -> None:
    """A sentence for people: one line, of bounded length."""
    assert "\n" not in str(error)
    assert len(str(error)) < 600


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """The bytes of a file with a few changed, inserted, removed or doubled, or cut at its end."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        size = draw(st.integers(1, 16))
        kind = draw(st.sampled_from(("flip", "set", "remove", "insert", "double", "cut")))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            data[at : at + size] = draw(st.sampled_from((b"\xff", b"\0", b"9"))) * size
        elif kind == "remove":
            del data[at : at + size]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "double":
            data[at:at] = data[at : at + 64 * size]
        elif kind == "cut":
            del data[at:]
    return bytes(data)


def json_values() -> st.SearchStrategy:
    """Any JSON value, odd numbers and texts among them."""
    leaves = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.sampled_from((0, -1, 2**31, 2**63, 10**30, 1e300, -1e300))
        | st.floats()
        | st.text(max_size=8)
    )
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
        ),
        max_leaves=8,
    )
