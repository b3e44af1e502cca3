"""Label files: the classes of each clip. Two forms are read, recognised by their first line.

file,labels                       a header line; more columns may follow: `split` selects rows,
dogs/a.wav,Bark;Dog               `caption` is a sentence on what is heard; labels are separated by
                                  ";": names, mids or class indexes

# YTID, start_seconds, ...        AudioSet's own segments, as published
--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"
"""

import collections
import dataclasses
import functools
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from uss_jax.audio.files import find_recordings
from uss_jax.data.csv_rows import read_rows
from uss_jax.data.label_map import Resolver
from uss_jax.disk.opening import at_once
from uss_jax.errors import UserError, counted

_LONGEST_VIDEO = 1e6  # seconds
_SEGMENT = "#t="  # between file and times in the id of a clip


class LabelledFile(NamedTuple):
    """A line of a label file.

    Attributes:
      file: path of the recording, relative to the folder of recordings.
      labels: class indexes, ascending; empty if all are unknown and skipped.
      line: line number in the label file, from 1.
      segment: begin and end of the labelled part, in seconds, if the file may be the whole video;
        None: the whole file is labelled.
      shared: other lines label other segments of the file, so it must be the whole video.
      caption: a sentence on what is heard; empty if there is none.
    """

    file: str
    labels: tuple[int, ...]
    line: int
    segment: tuple[float, float] | None = None
    shared: bool = False
    caption: str = ""

    @property
    def id(self) -> str:
        """Clip name in the records: the file, with the segment's times if it has several."""
        if self.segment is None or not self.shared:
            return self.file
        begin, end = self.segment
        return f"{self.file}{_SEGMENT}{begin:.10g},{end:.10g}"


class Remark(NamedTuple):
    """A remark on a file that is not a reason to leave it out of the records.

    Attributes:
      file: path, relative to the folder of recordings.
      line: line number in the label file; None: it is in no line.
      kind: category, for counting: "unlisted", "unknown labels", "clipped", ...
      text: a phrase.
    """

    file: str
    line: int | None
    kind: str
    text: str


@dataclasses.dataclass(frozen=True)
class Labels:
    """The contents of a label file.

    Attributes:
      clips: selected lines.
      unknown: skipped labels, with the line numbers of the selected lines that have them.
      unlisted: recordings in the folder that are not in the label file.
      others: files in the folder whose names are not those of recordings, relative to it; without
        the label file.
    """

    clips: list[LabelledFile]
    unknown: dict[str, list[int]]
    unlisted: list[pathlib.Path]
    others: list[pathlib.Path]

    def remarks(self) -> list[Remark]:
        """Returns a remark on each line with unknown labels and each file that is not used."""
        by_line: dict[int, list[str]] = {}
        for label, lines in self.unknown.items():
            for line in lines:
                by_line.setdefault(line, []).append(label)
        found = [
            Remark(clip.file, clip.line, "unknown labels", "; ".join(by_line[clip.line]))
            for clip in self.clips
            if clip.line in by_line
        ]
        for files, kind, text in (
            (self.unlisted, "unlisted", "in no line of the label file"),
            (self.others, "not a recording", "judging by its name"),
        ):
            found += [Remark(os.fspath(file), None, kind, text) for file in files]
        return found


def read_labels(
    path: str | os.PathLike,
    audio: str | os.PathLike,
    split: str,
    *,
    label_map: Mapping[str, str] | None = None,
    skip_unknown: bool = False,
    files: Collection[str] | None = None,
    known: Collection[str | os.PathLike] = (),
) -> Labels:
    """Reads a label file of either form.

    Args:
      path: CSV file.
      audio: folder of recordings.
      split: if the file has a column `split`, only lines with this value are read.
      label_map: maps custom label names to classes, separated by ";".
      skip_unknown: skip labels that are not classes; False: raise an error.
      files: read only the lines of these files; None: all.
      known: files whose presence in the folder is not worth a remark, such as the label map.

    Raises:
      UserError: the file is invalid or lists no clips, or has an unknown label.
    """
    if not os.path.isdir(audio):
        raise UserError(f"{audio} is not a folder; give the folder that holds the recordings")
    rows = read_rows(path)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path} is empty; expected lines of file and labels")
    line, header = first
    recordings, others = find_recordings(audio)
    names = [os.path.relpath(found, audio) for found in recordings]
    resolver = Resolver(label_map or {})
    of_other_splits: set[str] = set()
    if header[0].startswith("#"):
        clips = _audioset_segments(path, rows, names, resolver)
    else:
        columns = _checked_header(path, line, header, "labels")
        clips, of_other_splits = _table(path, columns, rows, split, resolver)
    _refuse_duplicates(path, clips)
    listed = {clip.file for clip in clips}
    if files is not None:
        wanted = {os.path.normpath(file) for file in files}
        clips = [clip for clip in clips if clip.file in wanted]
        if missing := sorted(wanted - listed):
            raise UserError(
                f"{path} has no line for {len(missing)} of the "
                f"{counted(len(wanted), 'requested file')}, such as {missing[0]}; write file "
                "names as the label file does"
            )
        resolver.forget_other_lines({clip.line for clip in clips})
    if resolver.unknown and not skip_unknown:
        raise UserError(f"{path}, {resolver.complaint()}")
    if not clips:
        raise UserError(f"{path} lists no clips; expected a line for each")
    listed |= of_other_splits
    known = {os.path.abspath(file) for file in (path, *known)}
    others = [
        pathlib.Path(os.path.relpath(file, audio))
        for file in others
        if os.path.abspath(file) not in known
    ]
    unlisted = [pathlib.Path(name) for name in names if name not in listed]
    return Labels(clips, resolver.unknown, unlisted, others)


def read_file_list(path: str | os.PathLike) -> list[str]:
    """Reads file names from a text file, one a line; blank lines are ignored."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", opener=at_once) as file:
            lines = [line for line in map(str.strip, file) if line]
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give a text file with one name per line"
        ) from None
    if not lines:
        raise UserError(f"{path} contains no file names; write one in each line")
    return lines


def _checked_header(
    path: str | os.PathLike, line: int, header: list[str], column: str
) -> list[str]:
    """Returns the column names in lower case: `file`, `column` and any others, each once."""
    names = [name.strip().lower() for name in header]
    if {"file", column} <= set(names) and len(set(names)) == len(names):
        return names
    for delimiter, called in ((";", "semicolons"), ("\t", "tabs")):
        if {"file", column} <= {name.strip() for name in ",".join(names).split(delimiter)}:
            raise UserError(
                f"{path}, line {line}: its columns are separated by {called}; save it with commas "
                '(the labels of a clip are separated by ";")'
            )
    segments = ", or AudioSet's segments, which begin with # comments" * (column == "labels")
    raise UserError(
        f'{path}, line {line}: expected a header with the columns "file" and "{column}", each '
        f"once{segments}"
    )


def _fields(
    path: str | os.PathLike, line: int, header: list[str], row: list[str]
) -> dict[str, str]:
    """Returns the fields of a line by column; a file is named."""
    if len(row) != len(header):
        raise UserError(
            f"{path}, line {line}: {counted(len(row), 'field')}, the header has {len(header)}; "
            "put quotes around a field that has commas"
        )
    fields = dict(zip(header, map(str.strip, row), strict=True))
    if not fields["file"]:
        raise UserError(f'{path}, line {line}: the column "file" is empty; name a recording')
    return fields


def _table(
    path: str | os.PathLike,
    header: list[str],
    rows: Iterator[tuple[int, list[str]]],
    split: str,
    resolve: Resolver,
) -> tuple[list[LabelledFile], set[str]]:
    """Returns the lines of a split, and the files of the other splits."""
    labelled, other_splits, other_files = [], set(), set()
    for line, row in rows:
        fields = _fields(path, line, header, row)
        if fields.get("split", split) != split:
            other_splits.add(fields["split"])
            other_files.add(os.path.normpath(fields["file"]))
            continue
        named = [label for label in fields["labels"].split(";") if label.strip()]
        if not named:
            raise UserError(
                f"{path}, line {line}: {fields['file']} has no labels; name its classes or remove "
                "the line"
            )
        labels = resolve(line, named)
        file, caption = os.path.normpath(fields["file"]), fields.get("caption", "")
        labelled.append(LabelledFile(file, labels, line, caption=caption))
    if not labelled and other_splits:
        found = ", ".join(f'"{other}"' for other in sorted(other_splits))
        raise UserError(f'{path} has no line with "{split}" in the column "split"; it has {found}')
    return labelled, other_files


def _audioset_segments(
    path: str | os.PathLike,
    rows: Iterator[tuple[int, list[str]]],
    recordings: list[str],
    resolve: Resolver,
) -> list[LabelledFile]:
    files: dict[str, str] = {}
    for name in recordings:
        files.setdefault(os.path.splitext(os.path.basename(name))[0], name)
    labelled = []
    for line, row in rows:
        if row[0].startswith("#"):
            continue
        try:
            video, begin, end, mids = row
            segment = float(begin), float(end)
            if not 0 <= segment[0] < segment[1] <= _LONGEST_VIDEO:
                raise ValueError
        except ValueError:
            raise UserError(
                f"{path}, line {line}: expected YTID, start_seconds, end_seconds, positive_labels "
                "as in AudioSet's segments"
            ) from None
        labels = resolve(line, mids.split(","))
        # A file with the times in its name is the segment; one without may be the whole video.
        whole = next((files[name] for name in _whole_stems(video) if name in files), None)
        cut = next((files[name] for name in _segment_stems(video, *segment) if name in files), None)
        if cut:
            labelled.append(LabelledFile(cut, labels, line))
        else:
            # A clip that was never downloaded is listed as missing under the first name.
            labelled.append(LabelledFile(whole or f"Y{video}.wav", labels, line, segment))
    segments = collections.Counter(item.file for item in labelled if item.segment)
    return [item._replace(shared=segments[item.file] > 1) for item in labelled]


def _whole_stems(video: str) -> tuple[str, str]:
    return f"Y{video}", video


def _segment_stems(video: str, begin: float, end: float) -> list[str]:
    """Returns the names that common downloaders give a segment's file, without suffix."""
    return [head + tail for tail in _tails(begin, end) for head in _whole_stems(video)]


@functools.lru_cache(maxsize=4096)
def _tails(begin: float, end: float) -> list[str]:
    times = [(f"{begin:{form}}", f"{end:{form}}") for form in ("g", ".3f", ".1f", "06.0f", ".0f")]
    times.insert(1, (f"{begin * 1000:.0f}", f"{end * 1000:.0f}"))
    tails = [f"{mark}{first}{mark}{last}" for mark in "_-" for first, last in times]
    tails += [f"{mark}{first}" for mark in "_-" for first, _ in times]
    return tails


def _refuse_duplicates(path: str | os.PathLike, labelled: list[LabelledFile]) -> None:
    lines: dict[str, int] = {}
    for item in labelled:
        if lines.setdefault(item.id, item.line) != item.line:
            raise UserError(
                f"{path}, line {item.line}: {item.id} was listed in line {lines[item.id]} "
                "already; keep one line with all its labels"
            )


def read_groups(path: str | os.PathLike) -> dict[str, str]:
    """Reads file -> group from a table with the columns `file` and `group`, as `read_labels` would.

    Returns:
      The group of each file, such as the session of a recording; "" for none.

    Raises:
      UserError: the file is invalid, or gives a file two groups.
    """
    rows = read_rows(path)
    line, header = next(rows, (1, []))
    columns = _checked_header(path, line, header, "group")
    groups: dict[str, str] = {}
    for line, row in rows:
        fields = _fields(path, line, columns, row)
        file, group = os.path.normpath(fields["file"]), fields["group"]
        if groups.setdefault(file, group) != group:
            raise UserError(
                f'{path}, line {line}: {file} is in the groups "{groups[file]}" and "{group}"; '
                "keep one of them"
            )
    return groups


def groups_of(path: str | os.PathLike, ids: Sequence[str]) -> list[str]:
    """Returns the group of each clip, "" for none, from a table that `read_groups` reads.

    Args:
      path: the table.
      ids: ids of the clips.

    Raises:
      UserError: as in `read_groups`, or no clip is of a file in the table.
    """
    of_file = read_groups(path)
    files = [id if id in of_file else id.rpartition(_SEGMENT)[0] or id for id in ids]
    if of_file.keys().isdisjoint(files):
        raise UserError(
            f"{path} has no line for any record (the first is {ids[0]}); give the label file "
            "that they were prepared from"
        )
    return [of_file.get(file, "") for file in files]


def ungrouped(path: str | os.PathLike, groups: Sequence[str]) -> str:
    """Returns a sentence on the clips without a group; "" if all have one."""
    if not (without := groups.count("")):
        return ""
    return (
        f"{without:,} of {counted(len(groups), 'clip')} have no group in {path}; each counts as a "
        "group of its own"
    )
