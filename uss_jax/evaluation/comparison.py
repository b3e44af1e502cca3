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
    read_json,
    record,
    text,
    whole,
)
from uss_jax.disk.opening import at_once
from uss_jax.errors import UserError, counted, one_line
from uss_jax.evaluation.items import ALL
from uss_jax.evaluation.rows import AVERAGE, CLASS, HALF, ORACLE
from uss_jax.evaluation.suite import Suite
from uss_jax.evaluation.suites import SUITES
from uss_jax.evaluation.text_table import MOST_BYTES

_SHOWN = (AVERAGE, CLASS, ORACLE, HALF)
# Figures are in dB, or shares.
_LARGEST = 1e4


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
            **dict.fromkeys(figures, either(nothing(), number(-_LARGEST, _LARGEST))),
        },
        others=True,
    )
    return record({"suite": text(), "rows": list_of(row)}, others=True)


def _published() -> list[Suite]:
    return [suite for suite in SUITES.values() if suite.published]


def find_results(workdir: str | os.PathLike) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Finds the results in a folder or its immediate subfolders.

    Returns:
      Suite -> its newest results; and why other JSON files could not be read.

    Raises:
      UserError: there is no such folder, or its results are not as `uss-jax evaluate` writes them.
    """
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir} is not a folder; give workdirs that hold results")
    found: dict[str, dict[str, Any]] = {}
    unread = []
    check = _results()
    files = [*workdir.glob("*.json"), *workdir.glob("*/*.json")]
    files = [path for path in files if path.is_file()]
    for path in sorted(files, key=lambda path: path.stat().st_mtime):
        try:
            with open(path, "rb", opener=at_once) as file:
                content = read_json(file, max_bytes=MOST_BYTES)
        except (OSError, ValueError) as error:
            unread.append(f"{path}: {getattr(error, 'strerror', None) or error}")
            continue
        if not isinstance(content, dict) or not {"suite", "rows"} <= content.keys():
            continue
        try:
            check(content, "")
        except ValueError as error:
            raise UserError(
                f"{path}: {error}; run the evaluation again or remove the file"
            ) from error
        found[content["suite"]] = content
    return found, unread


def compare(
    workdirs: Sequence[str | os.PathLike],
) -> tuple[list[str], list[list[Any]], dict[str, list[str]]]:
    """Builds the paper's table with a column for each workdir.

    Results over another number of classes than published are listed in separate rows.

    Returns:
      Header; rows, one per data set and query; and remarks: results over another number of
      classes, commands that compute what is missing, and files that could not be read.
    """
    found = [find_results(workdir) for workdir in workdirs]
    results = [of for of, _ in found]
    names = [one_line(os.path.normpath(os.fspath(workdir))) for workdir in workdirs]
    header = ["", "metric", "query", *names, "paper", "AudioSep"]
    rows, unlike, missing = [], [], []
    for suite in _published():
        published = suite.published
        of_suite = [of.get(suite.name) for of in results]
        others = {_classes(suite, of, asked) for of in of_suite for asked in _SHOWN}
        for count in (published.classes, *sorted(others - {published.classes})):
            rows += _rows(suite, count, of_suite)
        for workdir, of in zip(names, of_suite, strict=True):
            if _row(of, AVERAGE).get(published.figure) is None:
                missing.append(_how(suite, workdir, of is not None))
            unlike += _unlike(suite, workdir, of) + _other_protocol(suite, workdir, of)
    unread = [line for _, lines in found for line in lines]
    remarks = {"not comparable": unlike, "missing": missing, "not read": unread}
    return header, rows, {what: lines for what, lines in remarks.items() if lines}


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
    for asked in _SHOWN:
        ours = [_figure(suite, of, asked, count) for of in results]
        if ours == [None] * len(ours) and not (is_like and asked == AVERAGE):
            continue
        beside = (published.paper, published.audiosep)
        beside = beside if is_like and asked == AVERAGE else (None, None)
        rows.append(["" if rows else name, published.unit, asked, *ours, *beside])
    return rows


def _classes(suite: Suite, results: dict[str, Any] | None, asked: str) -> int | None:
    """Returns the number of classes that a row averages over; as published if it is not stated."""
    published = suite.published.classes
    return published and _row(results, asked).get("classes", {}).get("number", published)


def _unlike(suite: Suite, workdir: str, results: dict[str, Any] | None) -> list[str]:
    """Returns a line for each number of classes that is not the published one, with its rows."""
    published, rows = suite.published, {}
    for asked in _SHOWN:
        if _row(results, asked).get(published.figure) is not None:
            rows.setdefault(_classes(suite, results, asked), []).append(asked)
    return [
        f"{workdir}: {suite.name} ({', '.join(asked)}) averaged over "
        f"{counted(count, 'class', 'classes')}, published over {published.classes}"
        for count, asked in rows.items()
        if count != published.classes
    ]


def _other_protocol(suite: Suite, workdir: str, results: dict[str, Any] | None) -> list[str]:
    """Returns a line if the class averages were computed without the published option."""
    flag, *wanted = suite.published.options.split() or [""]
    option = next((option for option in suite.options if option.flag == flag), None)
    # Results of older versions do not say how they were computed.
    how = (results or {}).get("how")
    if not (option and how) or suite.published.figure not in _row(results, AVERAGE):
        return []
    used = how.get(option.name)
    if used == wanted[0] if option.choices else used:
        return []
    used = f"with {flag} {used}" if option.choices else f"without {flag}"
    return [f"{workdir}: {suite.name} computed {used}, published with {suite.published.options}"]


def _figure(
    suite: Suite, results: dict[str, Any] | None, asked: str, count: int | None
) -> float | None:
    """Returns the figure of a row; None if it averages over another number of classes."""
    value = _row(results, asked).get(suite.published.figure)
    return None if value is None or _classes(suite, results, asked) != count else float(value)


def _row(results: dict[str, Any] | None, asked: str) -> dict[str, Any]:
    """Returns the metrics of a query over all items; empty where there are none."""
    for row in (results or {}).get("rows", ()):
        if row.get("query") == asked and row.get("group", ALL) == ALL:
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
