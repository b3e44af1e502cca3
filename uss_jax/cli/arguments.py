"""Kinds of numbers on the command line, and options that would have no effect."""

import argparse
from collections.abc import Iterable

from uss_jax.errors import UserError


def natural(text: str) -> int:
    """A whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, not {text!r}")
    return int(text)


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, not {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A length above 0, to an hour."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"expected seconds, above 0 and to 3600, not {text!r}")
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
