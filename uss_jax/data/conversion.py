"""Converts a recording to a record: one pure function, for any engine or program."""

import dataclasses
import errno
import os
import pathlib
import tempfile
from typing import NamedTuple

import numpy as np

from uss_jax.audio.files import CutOff, audio_format, read_mono, truncation
from uss_jax.audio.in_memory import flac_bytes
from uss_jax.audio.mended import FfmpegFailed
from uss_jax.data.encodings import to_int16
from uss_jax.data.tf_example import serialise
from uss_jax.disk.atomic import full, is_full, stems_from
from uss_jax.disk.opening import absence
from uss_jax.errors import UserError

# A clip is silent if no sample reaches -60 dBFS, the level below which anchors are not drawn.
_SILENT_PEAK = 1e-3
_SEGMENT_SLACK = 1.0  # seconds; downloaders cut imprecisely
# Of a process with too many open files, of too little memory, of a file system that is gone.
_OF_MACHINE = (
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN),
)


@dataclasses.dataclass(frozen=True)
class ClipSettings:
    """Settings for the conversion of a clip.

    Attributes:
      sample_rate: sampling rate, in Hz.
      clip_seconds: maximum length, in seconds; longer recordings keep only their beginning.
      encoding: `pcm_s16le`, which allows partial reads, or `flac`, half the size and slower.
      accept_truncated: use the readable part of truncated recordings; False: skip them.
    """

    sample_rate: int = 32000
    clip_seconds: float = 10.0
    encoding: str = "pcm_s16le"
    accept_truncated: bool = False


class Skipped(NamedTuple):
    """The reason why a clip has no record.

    Attributes:
      kind: category, for counting: "missing", "unreadable", "cut off", ...
      reason: a sentence.
    """

    kind: str
    reason: str


class Record(NamedTuple):
    """A clip as a record.

    Attributes:
      data: the serialised record.
      clipped: share of samples above full scale, which were clipped.
    """

    data: bytes
    clipped: float


def prepare_clip(
    path: str | os.PathLike,
    id: str,
    labels: tuple[int, ...],
    settings: ClipSettings,
    segment: tuple[float, float] | None = None,
    shared: bool = False,
    caption: str = "",
) -> Record | Skipped:
    """Converts a recording to a record, or returns why it is skipped. Pure but for reading `path`.

    Args:
      path: audio file.
      id: clip name in the records.
      labels: class indexes.
      settings: conversion settings.
      segment, shared, caption: see LabelledFile.
    """
    try:
        if not labels:
            raise _LeftOut("no label", f"{path} has no label that is a class")
        if _is_missing(path):
            raise _LeftOut("missing", f"{path} {absence(path)}")
        cut = None if settings.accept_truncated else truncation(path, decode=False)
        if cut:
            raise CutOff(f"{path} is cut off ({cut}); copy or download it again")
        begin, seconds = _place(path, segment, shared, settings.clip_seconds)
        waveform = read_mono(path, settings.sample_rate, seconds, begin, settings.accept_truncated)
        waveform = waveform[: round(seconds * settings.sample_rate)]
        if np.abs(waveform).max(initial=0) < _SILENT_PEAK:
            raise _LeftOut("silent", f"{path} is silent (no sample reaches -60 dBFS)")
    except _LeftOut as error:
        return Skipped(error.kind, str(error))
    except UserError as error:
        if is_full(error):  # of decoded recordings: the next ones would be left out too
            raise UserError(full(tempfile.gettempdir())) from error
        if _is_of_machine(path, error):  # likewise
            raise UserError(
                f"{error}: this is the machine's trouble, not the recording's; give fewer "
                "--workers or see to the file system, then run the same command again to resume"
            ) from error
        return Skipped("cut off" if isinstance(error, CutOff) else "unreadable", str(error))
    samples = to_int16(waveform)
    audio = flac_bytes(samples, settings.sample_rate) if settings.encoding == "flac" else samples
    data = serialise(id.encode(errors="surrogateescape"), audio, labels, caption)
    return Record(data, float(np.mean(np.abs(waveform) > 1)))


def _is_missing(path: str | os.PathLike) -> bool:
    """Returns whether there is no such file; where that cannot be told, reading it says why."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return True
    except OSError:
        return False
    return False


def _is_of_machine(path: str | os.PathLike, error: Exception) -> bool:
    """Returns whether a recording could not be read for reasons that are not its own."""
    if "system error" in str(error).lower():  # of libsndfile, which keeps the reason to itself
        try:
            with open(path, "rb"):
                return False
        except OSError as reason:
            error = reason
    # Ffmpeg says of a damaged header that there is not the memory for what it states.
    said_by_ffmpeg = isinstance(error.__cause__, FfmpegFailed)
    return stems_from(error, set(_OF_MACHINE) - ({errno.ENOMEM} if said_by_ffmpeg else set()))


class _LeftOut(UserError):
    """A clip is skipped; `kind` as in Skipped."""

    def __init__(self, kind: str, sentence: str):
        super().__init__(sentence)
        self.kind = kind


def _place(
    path: str | os.PathLike,
    segment: tuple[float, float] | None,
    shared: bool,
    clip_seconds: float,
) -> tuple[float, float]:
    """Returns where in the file the clip begins, and its maximum length, in seconds."""
    if segment is None:
        return 0.0, clip_seconds
    begin, end = segment
    form = audio_format(path)
    seconds = form.samples / form.sample_rate
    if seconds <= end - begin + _SEGMENT_SLACK:  # the file is the segment itself
        if not shared:
            return 0.0, clip_seconds
        raise _LeftOut(
            "not its segment",
            f"{path} lasts {seconds:.1f} s and is thus one segment, but several segments of the "
            "video are labelled; put the times into the names of their files, as in "
            f"{pathlib.Path(path).stem}_{begin:g}_{end:g}",
        )
    if seconds < end - _SEGMENT_SLACK:
        raise _LeftOut(
            "not its segment",
            f"{path} lasts {seconds:.1f} s: longer than its segment of {end - begin:g} s, but too "
            f"short to be the whole video, of which the segment is {begin:g} to {end:g} s; get the "
            "segment or the whole video",
        )
    return begin, min(end - begin, clip_seconds)
