"""Finds the recordings to separate or tag, and their places below the output folder."""

import codecs
import dataclasses
import glob
import os
import pathlib
from collections.abc import Iterator, Sequence

from uss_jax.audio.files import AUDIO_SUFFIXES, find_recordings
from uss_jax.disk.opening import at_once
from uss_jax.errors import UserError, counted, one_line
from uss_jax.separation.names import file_name

_OTHERS_NAMED = 3


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A recording to separate or tag.

    Attributes:
      path: audio file.
      place: folder for its results, relative to the output folder.
      named: whether it was named itself, not by a folder or a pattern.
    """

    path: pathlib.Path
    place: pathlib.PurePath
    named: bool = True


class Places:
    """The folders of recordings below an output folder, each of one recording only."""

    def __init__(self, out: str | os.PathLike):
        self._out = pathlib.Path(out)
        self._taken: dict[pathlib.PurePath, pathlib.Path] = {}

    def folder_of(self, recording: InputFile) -> pathlib.Path:
        """Returns the folder of a recording; raises a UserError if it is another one's."""
        other = self._taken.setdefault(recording.place, recording.path)
        folder = self._out / recording.place
        if other != recording.path:
            raise UserError(
                f"{recording.path} would share an output folder with {other}, {folder}; give both "
                "as paths relative to the working directory, or run them separately with different "
                "--out"
            )
        return folder


def find_input_files(
    words: Sequence[str], lists: Sequence[str | os.PathLike] = ()
) -> list[InputFile]:
    """Returns the recordings named by files, folders, patterns and lists, without duplicates.

    A folder stands for all audio files below it; other files in it are reported. A recording's
    place is its path as given, without suffix. If the path is absolute, the place starts at the
    folder that was given, or is the file's name.

    Args:
      words: files, folders and glob patterns.
      lists: text files with one path per line, relative to the working directory.

    Raises:
      UserError: a list cannot be read or is empty, a pattern matches nothing, a folder has no
        audio files, or a word is "-".
    """
    found: dict[str, InputFile] = {}
    named_by = [(word, _named_by(word)) for word in words]
    named_by += [(line, _recordings_at(pathlib.Path(line))) for line in _listed(lists)]
    for word, paths in named_by:
        for path in paths:
            key, named = os.path.abspath(path), path == pathlib.Path(word)
            one = found.get(key, InputFile(path, _place(path, word), named))
            found[key] = dataclasses.replace(one, named=one.named or named)
    return list(found.values())


def _listed(lists: Sequence[str | os.PathLike]) -> Iterator[str]:
    for path in lists:
        try:
            with open(path, "rb", opener=at_once) as file:
                lines = file.read().removeprefix(codecs.BOM_UTF8).splitlines()
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}); give a text file"
            ) from error
        lines = [os.fsdecode(line) for line in lines if line.strip()]
        if not lines:
            raise UserError(f"{path} names no recording; write one path per line")
        if bad := next((line for line in lines if "\0" in line), None):
            raise UserError(
                f"{bad!r} holds a zero byte, which no file's name has; give a text file"
            )
        yield from lines


def _named_by(word: str) -> list[pathlib.Path]:
    if word == "-":
        raise UserError("standard input cannot be read; write it to a file and give that")
    matches = [word]
    if glob.has_magic(word) and not os.path.lexists(word):
        matches = sorted(glob.glob(word, recursive=True))
        if not matches:
            raise UserError(f"no file matches {word}")
    return [path for match in matches for path in _recordings_at(pathlib.Path(match))]


def _recordings_at(path: pathlib.Path) -> list[pathlib.Path]:
    if not path.is_dir():
        return [path]  # a missing file is reported when it is separated
    below, others = find_recordings(path)
    if not below:
        suffixes = ", ".join(sorted(AUDIO_SUFFIXES))
        raise UserError(f"{path} is a folder without audio files ({suffixes})")
    if others:
        print(one_line(f"{path}: {_passed_over(others)}"))
    return below


def _passed_over(others: Sequence[pathlib.Path]) -> str:
    """Returns a remark on the files of a folder that were skipped for their suffixes."""
    names = ", ".join(path.name for path in others[:_OTHERS_NAMED])
    more = ", ..." if len(others) > _OTHERS_NAMED else ""
    what = counted(len(others), "file that is not an audio file", "files that are not audio files")
    return f"skipped {what} ({names}{more})"


def _place(path: pathlib.Path, word: str) -> pathlib.PurePath:
    below = path
    if path.is_absolute():
        fixed = pathlib.Path(word)
        while glob.has_magic(str(fixed)) and not fixed.exists():
            fixed = fixed.parent
        while not path.is_relative_to(fixed.parent):  # a wildcard that is also a folder's name
            fixed = fixed.parent
        below = path.relative_to(fixed.parent)
    parts = [part for part in below.parts if part != ".."]
    if below.suffix.lower() in AUDIO_SUFFIXES:
        parts[-1] = below.stem
    return pathlib.PurePath(*map(file_name, parts))
