"""Lays the results in workdirs beside the published figures: the paper's table, a column for each.

The results are those that `uss-jax evaluate SUITE --out WORKDIR/SUITE.json` wrote, in the folder or
one below. What is missing is said, with the command that gives it, and what is a mean over other
classes than the published figure is.
"""

import argparse

from uss_jax.cli.arguments import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "workdirs", type=path, nargs="+", metavar="WORKDIR", help="folders that hold results"
    )
    parser.add_argument(
        "--out", type=path, metavar="FILE.md", help="also write the table as Markdown"
    )
    parser.epilog = "example:\n  uss-jax compare runs/soft runs/embedding --out comparison.md"


def run(args: argparse.Namespace) -> None:
    from uss_jax.atomic import replacing
    from uss_jax.evaluation.comparison import compare
    from uss_jax.evaluation.table import format_table, markdown_table

    header, rows, unlike, missing = compare(args.workdirs)
    remarks = {"not to be compared": unlike, "missing": missing}
    remarks = {what: lines for what, lines in remarks.items() if lines}
    print(format_table(header, rows))
    for what, of in remarks.items():
        print(f"\n{what}:\n  " + "\n  ".join(of))
    if args.out:
        lines = ["# Beside the published figures", "", *markdown_table(header, rows)]
        for what, of in remarks.items():
            lines += ["", f"{what.capitalize()}:", "", *(f"    {line}" for line in of)]
        with replacing(args.out) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"\n{args.out}: the same as Markdown")
