"""Writes metrics as text, Markdown and JSON."""

import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from uss_jax.disk.atomic import replacing

# Limit for a file of results, which may have many groups of pairs, classes and rows.
MOST_BYTES = 1 << 28


def format_table(header: Sequence[str], rows: Sequence[Sequence[str | int | float | None]]) -> str:
    """Aligns columns, the first to the left, others to the right; floats have two decimals."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]).rstrip())
    return "\n".join(lines)


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str | int | float | None]]
) -> list[str]:
    """Returns the lines of a Markdown table: first column to the left, others to the right."""
    cells = [[_cell(value).replace("|", "\\|") for value in row] for row in (header, *rows)]
    cells.insert(1, ["---", *["---:"] * (len(header) - 1)])
    return [f"| {' | '.join(line)} |" for line in cells]


def _cell(value: str | int | float | None) -> str:
    if value is None or value != value:  # NaN
        return "-"
    # Adding 0.0 turns -0.0 into 0.0.
    return f"{round(value, 2) + 0.0:.2f}" if isinstance(value, float) else str(value)


def silent_note(number: int) -> str:
    """Returns a note on the number of silent targets left out."""
    return f"left out: {number} with a silent target, for which no metric is defined"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sibling(out: str, suffix: str) -> pathlib.Path:
    """Returns the path of a JSON file with another suffix."""
    return pathlib.Path(out.removesuffix(".json") + suffix)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes UTF-8; what is left of a file name in another encoding is escaped."""
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_results(path: str | os.PathLike, results: dict[str, Any]) -> None:
    """Writes results atomically as strict JSON; NaN and infinities become null."""
    text = json.dumps(_finite(results), indent=2, allow_nan=False, ensure_ascii=False)
    with replacing(path) as temporary:
        write_text(temporary, text + "\n")
