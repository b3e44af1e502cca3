"""Kinds of values on the command line; each says its range where the option is declared."""

import argparse
import math
import os
from collections.abc import Callable

_MOST = 2**31 - 1  # where nothing smaller is known


def whole(least: int, most: int) -> Callable[[str], int]:
    """A whole number in a range, both ends included."""

    def parse(text: str) -> int:
        # int() would take signs, "_" and digits of other scripts, and thousands of digits.
        if text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(
            f"expected a whole number from {least} to {most}, not {text[:60]!r}"
        )

    return parse


def number(least: float | int, most: float | int) -> Callable[[str], float]:
    """A number in a range, both ends included."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if least <= value <= most:  # which NaN is not
            return value
        raise argparse.ArgumentTypeError(
            f"expected a number from {least:g} to {most:g}, not {text[:60]!r}"
        )

    return parse


natural = whole(0, _MOST)
positive = whole(1, _MOST)


def path(text: str) -> str:
    """A path; "~" is the home folder, also after "=", where a shell leaves it."""
    return os.path.expanduser(text)
