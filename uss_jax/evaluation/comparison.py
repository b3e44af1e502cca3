"""Compares results with the published ones of each suite."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from uss_jax.disk.checked_json import (
    Rule,
    either,
    list_of,
    nothing,
    number,
    parse_json,
    record,
    text,
    whole,
)
from uss_jax.errors import UserError, counted, one_line
from uss_jax.evaluation.rows import AVERAGE, CLASS, HALF, ORACLE
from uss_jax.evaluation.suite import Suite
from uss_jax.evaluation.suites import SUITES

_ASKED = (AVERAGE, CLASS, ORACLE)


def _results() -> Rule:
    """Describes the keys used of a result file.

    All are optional: suites that are not compared have other rows.
    """
    figures = {suite.published.figure for suite in _published()}
    row = record(
        {},
        {
            "query": text(),
            "group": text(),
            "classes": record({"number": whole(0, 10**6)}, others=True),
            **dict.fromkeys(figures, either(nothing(), number())),
        },
        others=True,
    )
    return record({"suite": text(), "rows": list_of(row)}, others=True)


def _published() -> list[Suite]:
    return [suite for suite in SUITES.values() if suite.published]


def find_results(workdir: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """Returns suite -> its newest results in a folder or its immediate subfolders.

    Raises:
      UserError: there is no such folder, or its results are not as `uss-jax evaluate` writes them.
    """
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir} is not a folder; give workdirs that hold results")
    found: dict[str, dict[str, Any]] = {}
    check = _results()
    files = [*workdir.glob("*.json"), *workdir.glob("*/*.json")]
    files = [path for path in files if path.is_file()]
    for path in sorted(files, key=lambda path: path.stat().st_mtime):
        try:
            content = parse_json(path.read_bytes())
        except (OSError, ValueError):
            continue  # not ours
        if not isinstance(content, dict) or not {"suite", "rows"} <= content.keys():
            continue
        try:
            check(content, "")
        except ValueError as error:
            raise UserError(
                f"{path}: {error}; run the evaluation again or remove the file"
            ) from error
        found[content["suite"]] = content
    return found


def compare(
    workdirs: Sequence[str | os.PathLike],
) -> tuple[list[str], list[list[Any]], list[str], list[str]]:
    """Builds the paper's table with a column for each workdir.

    Results over another number of classes than published are listed in separate rows.

    Returns:
      Header; rows, one per data set and query; notes on results over another number of classes;
      commands that compute the missing results.
    """
    results = [find_results(workdir) for workdir in workdirs]
    names = [one_line(os.path.normpath(os.fspath(workdir))) for workdir in workdirs]
    header = ["", "metric", "query", *names, "paper", "AudioSep"]
    rows, unlike, missing = [], [], []
    for suite in _published():
        published = suite.published
        of_suite = [found.get(suite.name) for found in results]
        counts = [published.classes and (_classes(of) or published.classes) for of in of_suite]
        for count in (published.classes, *sorted({*counts} - {published.classes})):
            of_count = [
                of if of_classes == count else None
                for of, of_classes in zip(of_suite, counts, strict=True)
            ]
            rows += _rows(suite, count, of_count)
        for workdir, of, count in zip(names, of_suite, counts, strict=True):
            if _figure(of, AVERAGE, published.figure) is None:
                missing.append(_how(suite, workdir, of is not None))
            if count != published.classes:
                unlike.append(
                    f"{workdir}: {suite.name} averaged over "
                    f"{counted(count, 'class', 'classes')}, published over {published.classes}"
                )
    return header, rows, unlike, missing


def _rows(
    suite: Suite, count: int | None, results: Sequence[dict[str, Any] | None]
) -> list[list[Any]]:
    """Builds the rows over `count` classes, with published values if theirs is the same count."""
    published = suite.published
    is_like = count == published.classes
    name = published.data_set
    if not is_like:
        name = f"{suite.name}, {counted(count, 'class', 'classes')} of your own"
    rows = []
    for asked in (*_ASKED, HALF):
        ours = [_figure(of, asked, published.figure) for of in results]
        if ours == [None] * len(ours) and not (is_like and asked == AVERAGE):
            continue
        beside = (published.paper, published.audiosep)
        beside = beside if is_like and asked == AVERAGE else (None, None)
        rows.append(["" if rows else name, published.unit, asked, *ours, *beside])
    return rows


def _classes(results: dict[str, Any] | None) -> int | None:
    """Returns the number of classes averaged over, if stated in the results."""
    return _row(results, ORACLE).get("classes", {}).get("number")


def _figure(results: dict[str, Any] | None, asked: str, figure: str) -> float | None:
    value = _row(results, asked).get(figure)
    return None if value is None else float(value)


def _row(results: dict[str, Any] | None, asked: str) -> dict[str, Any]:
    """Returns the metrics of a query over all items; empty where there are none."""
    for row in (results or {}).get("rows", ()):
        if row.get("query") == asked and row.get("group", "all") == "all":
            return row
    return {}


def _how(suite: Suite, workdir: str, scored: bool) -> str:
    """Returns the command that computes a missing metric."""
    data = suite.published.data or f"FOLDER_OF_{suite.name.upper()}"
    needed = f" {suite.published.options}" if suite.published.options else ""
    why = f" (evaluated without{needed})" if scored and needed else ""
    return (
        f"{workdir}: uss-jax evaluate {suite.name} --model {workdir} --data {data}{needed} "
        f"--out {workdir}/{suite.name}.json{why}"
    )
