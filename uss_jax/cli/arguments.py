"""Arguments of several commands: kinds of values, precision, and options without effect."""

import argparse
import math
import os
from collections.abc import Callable, Iterable

from uss_jax.devices.precision import HIGHEST, PRECISIONS
from uss_jax.errors import UserError

_MOST = 2**31 - 1  # default upper limit


def whole(least: int, most: int) -> Callable[[str], int]:
    """Returns a parser of integers in [least, most]."""

    def parse(text: str) -> int:
        # int() would accept signs, "_", digits of other scripts and thousands of digits.
        if text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(
            f"expected a whole number from {least} to {most}, not {text[:60]!r}"
        )

    return parse


def number(least: float | int, most: float | int) -> Callable[[str], float]:
    """Returns a parser of numbers in [least, most]."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if least <= value <= most:  # false for NaN
            return value
        raise argparse.ArgumentTypeError(
            f"expected a number from {least:g} to {most:g}, not {text[:60]!r}"
        )

    return parse


natural = whole(0, _MOST)
positive = whole(1, _MOST)


def positives(text: str) -> tuple[int, ...]:
    """Parses different integers above 0, separated by commas."""
    found = tuple(positive(part.strip()) for part in text.split(","))
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"expected different numbers, not {text[:60]!r}")
    return found


def path(text: str) -> str:
    """Expands "~" in a path; shells leave it unexpanded after "="."""
    return os.path.expanduser(text)


def add_recordings(parser: argparse.ArgumentParser) -> None:
    """Adds AUDIO and --files-from; `input_files` finds what they name."""
    parser.add_argument(
        "audio", type=path, nargs="*", metavar="AUDIO", help="recordings, see above"
    )
    parser.add_argument(
        "--files-from",
        type=path,
        action="append",
        metavar="LIST",
        help="text file with one recording per line; can be repeated",
    )


def input_files(args: argparse.Namespace) -> list:
    """Returns the recordings that the arguments name; raises a UserError if there are none."""
    from uss_jax.separation.input_files import find_input_files

    recordings = find_input_files(args.audio, args.files_from or ())
    if not recordings:
        raise UserError("no recordings; give files, folders, patterns or --files-from LIST")
    return recordings


def add_threshold(parser: argparse.ArgumentParser, of: str) -> None:
    """Adds --threshold, whose default None stands for HEARD of models/query.py.

    Args:
      parser: the parser.
      of: what happens from this probability on.
    """
    parser.add_argument(
        "--threshold",
        type=number(0, 1),
        metavar="P",
        help=f"probability from which a class {of}, 0 to 1; default: 0.2",
    )


def add_precision(parser: argparse.ArgumentParser, of: str = "") -> None:
    """Adds --precision; `of` is put before its help."""
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=HIGHEST,
        help=f"{of}precision of float32 matrix products and convolutions; default: highest, as "
        "accurate as float32 on every device. high and default are faster and less accurate: TF32 "
        "on an NVIDIA GPU, three bfloat16 passes (high) or one (default) on a TPU, no difference "
        "on a CPU. A detector always computes at highest",
    )


def add_detector_precision(parser: argparse.ArgumentParser) -> None:
    """Adds --precision, without effect, to a command that runs only the detector."""
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=HIGHEST,
        help="accepted as in other commands, but without effect: only the detector, and the query "
        "net of mined conditions, compute here, always at highest, so that what they find does not "
        "depend on the device",
    )


def say_detector_precision(args: argparse.Namespace) -> None:
    """Prints a notice if --precision is not the detector's, and so has no effect."""
    if args.precision != HIGHEST:
        print(f"--precision {args.precision}: no effect, the detector always computes at {HIGHEST}")


def refuse_idle(args: argparse.Namespace, options: Iterable[str], why: str) -> None:
    """Raises a UserError if an option is given that would have no effect.

    Args:
      args: parsed arguments; None or False if an option is not given.
      options: names of the options, such as "out_dir".
      why: end of the message, such as "with --query".
    """
    for option in options:
        value = getattr(args, option)
        if value is not None and value is not False:  # 0 is given, too
            words = "--" + option.replace("_", "-")
            raise UserError(f"{words} has no effect {why}; leave it out")
