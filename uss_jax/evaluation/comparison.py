"""Compares results with the published ones.

Published: Kong et al., arXiv:2305.07447 (abstract and tables), with conditions averaged over a
training split; AudioSep, arXiv:2308.05037, on the same AudioSet pairs.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from uss_jax.disk.checked_json import (
    either,
    list_of,
    nothing,
    number,
    parse_json,
    record,
    text,
    whole,
)
from uss_jax.errors import UserError, one_line
from uss_jax.evaluation.scoring import AVERAGE, CLASS, HALF, ORACLE
from uss_jax.wording import counted

_ASKED = (AVERAGE, CLASS, ORACLE)


@dataclasses.dataclass(frozen=True)
class Published:
    """A published result.

    Attributes:
      data_set: name of the data set, for the table.
      suite: suite of `uss-jax evaluate`.
      figure: key of the metric in result files.
      unit: metric and unit, for the table.
      paper, audiosep: published values; None where not reported.
      classes: number of classes averaged over; None where not compared.
    """

    data_set: str
    suite: str
    figure: str
    unit: str
    paper: float | None
    audiosep: float | None = None
    classes: int | None = None


PUBLISHED = (
    Published("AudioSet, 527 classes", "pairs", "sdri", "SDRi, dB", 5.57, 7.74, 527),
    Published("FSDKaggle2018, 41 classes", "fsdkaggle2018", "sdri", "SDRi, dB", 10.57, None, 41),
    Published("FSD50K, 200 classes", "fsd50k", "sdri", "SDRi, dB", None, None, 200),
    Published("MUSDB18, 4 stems", "musdb18", "legacy_sdri", "SDRi, dB", 8.12),
    Published("Slakh2100", "slakh2100", "sdri", "SDRi, dB", 7.28),
    Published("Voicebank-Demand", "voicebank_demand", "ssnr", "SSNR, dB", 9.00),
)
# Options a suite needs to compute the published metric.
_MORE = {"pairs": " --train-pairs TRAIN_PAIRS", "musdb18": " --legacy"}


_FIGURE = either(nothing(), number())
# The keys used of a result file. All are optional: suites not compared have other rows.
_ROW = record(
    {},
    {
        "query": text(),
        "group": text(),
        "classes": record({"number": whole(0, 10**6)}, others=True),
        **{published.figure: _FIGURE for published in PUBLISHED},
    },
    others=True,
)
_RESULTS = record({"suite": text(), "rows": list_of(_ROW)}, others=True)


def find_results(workdir: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """Returns suite -> its newest results in a folder or its immediate subfolders.

    Raises:
      UserError: there is no such folder, or its results are not as `uss-jax evaluate` writes them.
    """
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir} is not a folder; give workdirs that hold results")
    found: dict[str, dict[str, Any]] = {}
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
            _RESULTS(content, "")
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
    for published in PUBLISHED:
        of_suite = [found.get(published.suite) for found in results]
        counts = [published.classes and (_classes(of) or published.classes) for of in of_suite]
        for count in (published.classes, *sorted({*counts} - {published.classes})):
            of_count = [
                of if of_classes == count else None
                for of, of_classes in zip(of_suite, counts, strict=True)
            ]
            rows += _rows(published, count, of_count)
        for workdir, of, count in zip(names, of_suite, counts, strict=True):
            if _figure(of, AVERAGE, published.figure) is None:
                missing.append(_how(published.suite, workdir, of is not None))
            if count != published.classes:
                unlike.append(
                    f"{workdir}: {published.suite} averaged over "
                    f"{counted(count, 'class', 'classes')}, published over {published.classes}"
                )
    return header, rows, unlike, missing


def _rows(
    published: Published, count: int | None, results: Sequence[dict[str, Any] | None]
) -> list[list[Any]]:
    """Builds the rows over `count` classes, with published values if theirs is the same count."""
    is_like = count == published.classes
    name = published.data_set
    if not is_like:
        name = f"{published.suite}, {counted(count, 'class', 'classes')} of your own"
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
    return _row(results, asked).get(figure)


def _row(results: dict[str, Any] | None, asked: str) -> dict[str, Any]:
    """Returns the metrics of a query over all items; empty where there are none."""
    for row in (results or {}).get("rows", ()):
        if row.get("query") == asked and row.get("group", "all") == "all":
            return row
    return {}


def _how(suite: str, workdir: str, scored: bool) -> str:
    """Returns the command that computes a missing metric."""
    more = _MORE.get(suite, "")
    data = "PAIRS" if suite == "pairs" else f"FOLDER_OF_{suite.upper()}"
    why = f" (evaluated without{more})" if scored else ""
    return (
        f"{workdir}: uss-jax evaluate {suite} --model {workdir} --data {data}{more} "
        f"--out {workdir}/{suite}.json{why}"
    )
