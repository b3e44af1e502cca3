"""Arguments that several commands have: kinds of numbers, and the precision."""

import argparse

from uss_jax.precision import HIGHEST, PRECISIONS


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


def add_precision(parser: argparse.ArgumentParser, of: str = "") -> None:
    """Adds --precision; `of` begins its help."""
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=HIGHEST,
        help=f"{of}of float32 products and convolutions; default: highest, the same on every "
        "device. high and default are faster and coarser: TF32 on an NVIDIA GPU, three passes or "
        "one in bfloat16 on a TPU; on a CPU there is no difference. A detector always computes at "
        "the highest",
    )


def add_detector_precision(parser: argparse.ArgumentParser) -> None:
    """Adds --precision to a command in which only the detector computes."""
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=HIGHEST,
        help="taken as by other commands, but only the detector computes here, always at the "
        "highest: anchors do not depend on the device",
    )


def say_detector_precision(args: argparse.Namespace) -> None:
    """Prints that a lower --precision than the detector's was not followed."""
    if args.precision != HIGHEST:
        print(f"--precision {args.precision}: the detector computes at {HIGHEST} all the same")
