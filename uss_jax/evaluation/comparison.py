"""Our figures beside the published ones.

Published: Kong et al., arXiv:2305.07447 (abstract and tables), with the condition averaged over a
training split; AudioSep, arXiv:2308.05037, on the same AudioSet pairs.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from uss_jax.errors import UserError
from uss_jax.evaluation.scoring import AVERAGE, CLASS, HALF, ORACLE

_ASKED = (AVERAGE, CLASS, ORACLE)


@dataclasses.dataclass(frozen=True)
class Published:
    """A figure of the paper.

    Attributes:
      data_set: as people call it.
      suite: of `uss-jax evaluate`.
      figure: as results name it.
      unit: of it, for people.
      paper, audiosep: the figures, None where there is none.
      classes: that they are means over, None where an item has no class of its own.
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
# What a suite must be told for the published figure.
_MORE = {"pairs": " --train-pairs TRAIN_PAIRS", "musdb18": " --legacy"}


def find_results(workdir: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """Suite -> the newest results of it in a folder or in one folder below.

    Raises:
      UserError: there is no such folder.
    """
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir} is not a folder; give workdirs that hold results")
    found: dict[str, dict[str, Any]] = {}
    files = [*workdir.glob("*.json"), *workdir.glob("*/*.json")]
    for path in sorted(files, key=lambda path: path.stat().st_mtime):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # a file of another program
        if isinstance(content, dict) and "suite" in content and "rows" in content:
            found[content["suite"]] = content
    return found


def compare(
    workdirs: Sequence[str | os.PathLike],
) -> tuple[list[str], list[list[Any]], list[str], list[str]]:
    """The paper's table with a column for each workdir.

    Returns:
      header; rows, one a data set and way of asking; what is not of as many classes as the
      published figure beside it; and, for what is missing, how to get it.
    """
    results = [find_results(workdir) for workdir in workdirs]
    names = [os.path.normpath(os.fspath(workdir)) for workdir in workdirs]
    header = ["", "figure", "asked with", *names, "paper", "AudioSep"]
    rows, unlike, missing = [], [], []
    for published in PUBLISHED:
        for asked in (*_ASKED, HALF):
            ours = [
                _figure(found.get(published.suite), asked, published.figure) for found in results
            ]
            if asked != AVERAGE and ours == [None] * len(ours):
                continue
            beside = (published.paper, published.audiosep) if asked == AVERAGE else (None, None)
            name = published.data_set if asked == AVERAGE else ""
            rows.append([name, published.unit, asked, *ours, *beside])
        for workdir, found in zip(names, results, strict=True):
            if _figure(found.get(published.suite), AVERAGE, published.figure) is None:
                missing.append(_how(published.suite, workdir, published.suite in found))
            number = _row(found.get(published.suite), ORACLE).get("classes", {}).get("number")
            if published.classes and number not in (None, published.classes):
                unlike.append(
                    f"{workdir}: {published.suite} of {number} classes, not of "
                    f"{published.classes} as published"
                )
    return header, rows, unlike, missing


def _figure(results: dict[str, Any] | None, asked: str, figure: str) -> float | None:
    return _row(results, asked).get(figure)


def _row(results: dict[str, Any] | None, asked: str) -> dict[str, Any]:
    """The figures of a way of asking over all items; empty where there are none."""
    for row in (results or {}).get("rows", ()):
        if row.get("query") == asked and row.get("group", "all") == "all":
            return row
    return {}


def _how(suite: str, workdir: str, scored: bool) -> str:
    """The command that gives a missing figure."""
    more = _MORE.get(suite, "")
    data = "PAIRS" if suite == "pairs" else f"FOLDER_OF_{suite.upper()}"
    why = f" (it was scored without{more})" if scored else ""
    return (
        f"{workdir}: uss-jax evaluate {suite} --model {workdir} --data {data}{more} "
        f"--out {workdir}/{suite}.json{why}"
    )
