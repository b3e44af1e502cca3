"""Describes a path: a model, records, an anchor table, mined conditions, captions or a query bank.

For a model: its condition, the parameters of every module, hashes (computed anew), licence, and how
it was trained.
"""

import argparse

from uss_jax.cli.arguments import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=path, metavar="PATH")
    parser.epilog = "example:\n  uss-jax inspect runs/soft"


def run(args: argparse.Namespace) -> None:
    from uss_jax.cli.inspection import inspect
    from uss_jax.errors import one_line

    print("\n".join(map(one_line, inspect(args.path))))  # names and licences come from the input
