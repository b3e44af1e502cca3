"""Computes the metrics of a model on a data set; prints a table and writes a JSON file.

A suite of a published data set takes its folder as unpacked from the publisher's archives, checks
that it is complete, and scores it. Where the published protocol is not the default, an option
gives it.
"""

import argparse

from uss_jax.cli.arguments import (
    add_detector_precision,
    add_precision,
    natural,
    path,
    positive,
    positives,
    refuse_idle,
    say_detector_precision,
)
from uss_jax.evaluation.suite import Option, Suite, keyword
from uss_jax.evaluation.suites import SUITES

_TYPES = {
    "text": None,
    "path": path,
    "natural": natural,
    "positive": positive,
    "positives": positives,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suites = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    for suite in SUITES.values():
        _add_suite(suites, suite)
    parser.epilog = (
        "example:\n"
        "  uss-jax evaluate pairs --model runs/separator --data pairs --out results.json\n\n"
        "`uss-jax evaluate SUITE --help` shows the options of a suite."
    )


def _add_suite(suites: argparse._SubParsersAction, suite: Suite) -> None:
    parser = suites.add_parser(
        suite.name,
        help=suite.help,
        description=suite.help[0].upper() + suite.help[1:] + ".",
        epilog=f"example:\n  {suite.example}" if suite.example else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", type=path, required=True, metavar="B", help="bundle or workdir")
    parser.add_argument("--data", type=path, required=True, metavar="DIR", help=suite.data)
    parser.add_argument(
        "--out",
        type=path,
        default="results.json",
        metavar="FILE",
        help="JSON file to write; default: results.json",
    )
    if suite.detector_only:
        add_detector_precision(parser)
    else:
        add_precision(parser)
    for option in suite.options:
        _add_option(parser, option)


def _add_option(parser: argparse.ArgumentParser, option: Option) -> None:
    if option.kind == "switch":
        parser.add_argument(option.flag, action="store_true", help=option.help)
        return
    parser.add_argument(
        option.flag,
        type=_TYPES[option.kind],
        default=option.default,
        choices=option.choices,
        metavar=option.metavar,
        help=option.help,
    )


def run(args: argparse.Namespace) -> None:
    from uss_jax.devices.mesh import one_device_per_core
    from uss_jax.evaluation.run import evaluate

    one_device_per_core()
    suite = SUITES[args.suite]
    if suite.detector_only:
        say_detector_precision(args)
    for option in suite.options:
        if option.only_with and not getattr(args, keyword(option.only_with)):
            refuse_idle(args, (option.name,), f"without {option.only_with}")
    values = {option.name: getattr(args, option.name) for option in suite.options}
    print(evaluate(args.suite, args.model, args.data, args.out, precision=args.precision, **values))
    print(f"\n{args.out}: all metrics")
