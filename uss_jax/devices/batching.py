"""Batches of one size, so that a jitted function compiles once.

The last batch repeats its last row; the results of the repeated rows are to be dropped.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

Row = TypeVar("Row")


def filled(rows: Sequence[Row], size: int) -> list[Row]:
    """Repeats the last of one or more rows until there are `size`."""
    return [*rows, *[rows[-1]] * (size - len(rows))]


def in_batches(rows: Iterable[Row], size: int) -> Iterator[tuple[list[Row], int]]:
    """Yields (batch of `size` rows, number of rows that are not repeated ones)."""
    rows = iter(rows)
    while some := list(itertools.islice(rows, size)):
        yield filled(some, size), len(some)
