"""Kinds of numbers on the command line, and options that would have no effect."""

import argparse
from collections.abc import Iterable

from uss_jax.errors import UserError


def natural(text: str) -> int:
    """A whole number from 0 to 4,294,967,295, which every generator takes as a seed."""
    return _whole(text, 0, 2**32 - 1)


def positive(text: str) -> int:
    """A whole number from 1 to 1,000,000."""
    return _whole(text, 1, 1_000_000)


def _whole(text: str, least: int, most: int) -> int:
    # Python refuses to read thousands of digits, and other scripts have digits too.
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        raise argparse.ArgumentTypeError(
            f"expected a whole number from {least} to {most}, not {text[:40]!r}"
        )
    return int(text)


def seconds(text: str) -> float:
    """A length above 0, to an hour."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"expected seconds, above 0, to 3600, not {text[:40]!r}")
    return value


def refuse_idle(args: argparse.Namespace, options: Iterable[str], why: str) -> None:
    """Raises a UserError where an option is given that would have no effect.

    Args:
      args: parsed, with None or False for options that are not given.
      options: their names, such as "out_dir".
      why: for people, such as "with --query".
    """
    for option in options:
        if getattr(args, option) not in (None, False):
            words = "--" + option.replace("_", "-")
            raise UserError(f"{words} has no effect {why}; leave it out")
