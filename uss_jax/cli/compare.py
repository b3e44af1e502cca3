"""Compares the results in workdirs with the published ones, as a table with a column per workdir.

The results are those that `uss-jax evaluate SUITE --out WORKDIR/SUITE.json` wrote, in the workdir
or in a folder directly below it. Lists missing results with the command that computes them, and
results that average over another number of classes than the published one, and JSON files that
cannot be read.
"""

import argparse
import os

from uss_jax.cli.arguments import path
from uss_jax.errors import UserError

_HEADING = "# Comparison with the published results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "workdirs", type=path, nargs="+", metavar="WORKDIR", help="folders that contain results"
    )
    parser.add_argument(
        "--out", type=path, metavar="FILE.md", help="also write the table as Markdown"
    )
    parser.epilog = "example:\n  uss-jax compare runs/soft runs/embedding --out comparison.md"


def run(args: argparse.Namespace) -> None:
    from uss_jax.disk.atomic import replacing
    from uss_jax.evaluation.comparison import compare
    from uss_jax.evaluation.text_table import format_table, markdown_table

    if args.out:
        _require_replaceable(args.out)
    header, rows, remarks = compare(args.workdirs)
    print(format_table(header, rows))
    for what, of in remarks.items():
        print(f"\n{what}:\n  " + "\n  ".join(of))
    if args.out:
        lines = [_HEADING, "", *markdown_table(header, rows)]
        for what, of in remarks.items():
            lines += ["", f"{what.capitalize()}:", "", *(f"    {line}" for line in of)]
        with replacing(args.out) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"\n{args.out}: the same table in Markdown")


def _require_replaceable(out: str) -> None:
    """Raises a UserError if a file is not Markdown, or is there and is not of this command."""
    from uss_jax.disk.opening import at_once

    if not out.endswith(".md"):
        raise UserError(f"--out {out}: the table is Markdown; give a name that ends in .md")
    if not os.path.lexists(out):
        return
    begin = _HEADING.encode()
    try:
        with open(out, "rb", opener=at_once) as file:
            ours = file.read(len(begin)) == begin
    except OSError:  # a folder, or a link to nothing
        ours = False
    if not ours:
        raise UserError(f"--out {out} exists and is no table of this command; give another name")
