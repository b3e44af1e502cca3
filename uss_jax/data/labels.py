"""Label files: which clip has which classes. Two forms are read, told apart by their beginning.

file,labels                       a header line; more columns may follow, `split` selects rows
dogs/a.wav,Bark;Dog               labels separated by ";": names, mids or class indexes

# YTID, start_seconds, ...        AudioSet's own segments, as published
--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"
"""

import csv
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from uss_jax.audio.files import AUDIO_SUFFIXES
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology


class LabelledFile(NamedTuple):
    """A line of a label file.

    Attributes:
      file: path of the recording, relative to the folder of the recordings.
      labels: class indexes, ascending.
      line: where in the label file it stands, from 1.
    """

    file: str
    labels: tuple[int, ...]
    line: int


def read_labels(
    path: str | os.PathLike, audio: str | os.PathLike, split: str
) -> list[LabelledFile]:
    """Reads a label file of either form.

    Args:
      path: the CSV file.
      audio: the folder of the recordings.
      split: when the file has a column `split`, only lines with this value count.
    """
    if not os.path.isdir(audio):
        raise UserError(f"{audio} is not a folder; give the folder that holds the recordings")
    rows = _read_rows(path)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path} is empty; expected lines of file and labels")
    line, header = first
    if header[0].startswith("#"):
        labelled = _audioset_segments(path, rows, pathlib.Path(audio))
    elif {"file", "labels"} <= set(header):
        labelled = _table(path, header, rows, split)
    else:
        raise UserError(
            f'{path}, line {line}: expected a header with the columns "file" and "labels", or '
            "AudioSet's segments, which begin with # comments"
        )
    _refuse_duplicates(path, labelled)
    if not labelled:
        raise UserError(f"{path} lists no clips; expected a line for each")
    return labelled


def _read_rows(path: str | os.PathLike) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, fields) of every line that is not blank."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True, strict=True)
            read_lines = 0
            try:
                for row in reader:
                    read_lines = reader.line_num
                    if row:
                        yield read_lines, row
            except (csv.Error, UnicodeDecodeError) as error:
                raise UserError(
                    f"{path}, line {read_lines + 1}: not a line of a CSV file in UTF-8 "
                    f"({error}); save it again as one"
                ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a CSV file") from None


def _table(
    path: str | os.PathLike, header: list[str], rows: Iterator[tuple[int, list[str]]], split: str
) -> list[LabelledFile]:
    labelled, other_splits = [], set()
    for line, row in rows:
        if len(row) != len(header):
            raise UserError(
                f"{path}, line {line}: {len(row)} fields, the header has {len(header)}; put "
                "quotes around a field that has commas"
            )
        fields = dict(zip(header, row, strict=True))
        if fields.get("split", split) != split:
            other_splits.add(fields["split"])
            continue
        if not fields["file"]:
            raise UserError(f'{path}, line {line}: the column "file" is empty; name a recording')
        labels = _resolve(path, line, fields["labels"].split(";"))
        labelled.append(LabelledFile(fields["file"], labels, line))
    if not labelled and other_splits:
        raise UserError(
            f'{path} has no line whose column "split" says "{split}"; '
            f"it has {', '.join(sorted(other_splits))}"
        )
    return labelled


def _audioset_segments(
    path: str | os.PathLike, rows: Iterator[tuple[int, list[str]]], audio: pathlib.Path
) -> list[LabelledFile]:
    files = _files_by_stem(audio)
    labelled = []
    for line, row in rows:
        if row[0].startswith("#"):
            continue
        try:
            video, begin, end, mids = row
            names = _segment_stems(video, float(begin), float(end))
        except ValueError:
            raise UserError(
                f"{path}, line {line}: expected YTID, start_seconds, end_seconds, positive_labels "
                "as in AudioSet's segments"
            ) from None
        # A clip that was never downloaded is listed as missing under the first name.
        file = next((files[name] for name in names if name in files), f"{names[0]}.wav")
        labelled.append(LabelledFile(file, _resolve(path, line, mids.split(",")), line))
    return labelled


def _segment_stems(video: str, begin: float, end: float) -> list[str]:
    """How common downloaders name a segment's file, without its suffix."""
    seconds = f"{begin:g}", f"{end:g}"
    milliseconds = f"{begin * 1000:.0f}", f"{end * 1000:.0f}"
    tails = ["", *(f"_{t[0]}_{t[1]}" for t in (seconds, milliseconds))]
    tails += [f"_{t[0]}" for t in (seconds, milliseconds)]
    return [head + video + tail for tail in tails for head in ("Y", "")]


def _files_by_stem(audio: pathlib.Path) -> dict[str, str]:
    found = {}
    for folder, folders, names in os.walk(audio):
        folders.sort()
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in AUDIO_SUFFIXES:
                found.setdefault(stem, os.path.relpath(os.path.join(folder, name), audio))
    return found


def _resolve(path: str | os.PathLike, line: int, labels: list[str]) -> tuple[int, ...]:
    try:
        return tuple(sorted({load_ontology().resolve(label) for label in labels}))
    except UserError as error:
        raise UserError(f"{path}, line {line}: {error}") from None


def _refuse_duplicates(path: str | os.PathLike, labelled: list[LabelledFile]) -> None:
    lines: dict[str, int] = {}
    for item in labelled:
        if lines.setdefault(item.file, item.line) != item.line:
            raise UserError(
                f"{path}, line {item.line}: {item.file} was listed in line {lines[item.file]} "
                "already; keep one line with all its labels"
            )
