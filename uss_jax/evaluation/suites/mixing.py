"""Items made of recordings: two mixed at equal energy, or windows of mixtures as they are.

Letters: `t` samples of an item, `s` samples of a recording.
"""

import csv
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Float

from uss_jax.anchors.mix import GAIN_RANGE
from uss_jax.audio.files import audio_format, read_mono, read_segment, resample
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology
from uss_jax.opening import at_once

# As published: two-second items, a hundred of each class, drawn with this seed.
SECONDS = 2.0
PER_CLASS = 100
SEED = 1234


@dataclasses.dataclass(frozen=True)
class Recording:
    """A labelled recording of a data set.

    Attributes:
      path: its file.
      labels: the first is its class; the others count where several are asked for.
      class_indexes: AudioSet's of each label, None for a class that AudioSet has not.
    """

    path: pathlib.Path
    labels: tuple[str, ...]
    class_indexes: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A recording and another one scaled to its energy; an `Item`.

    Of both the first two seconds count, shorter ones are repeated to that (the reference's way).

    Attributes:
      name, label, class_index, other_class_index, group: as in `Item`.
      source, other: the files.
    """

    name: str
    label: str
    class_index: int | None
    other_class_index: int | None
    source: pathlib.Path
    other: pathlib.Path
    group: str = ""

    def samples(self, sample_rate: int) -> int:
        """Two seconds."""
        return round(SECONDS * sample_rate)

    def read(self, side: str, sample_rate: int) -> Float[np.ndarray, " t"]:
        """The source, or the sum."""
        source = fitted(read_mono(self.source, sample_rate), self.samples(sample_rate))
        if side == "source":
            return source
        other = fitted(read_mono(self.other, sample_rate), len(source))
        energy, others = (np.mean(np.square(x, dtype=np.float64)) for x in (source, other))
        gain = np.clip(np.sqrt(energy / max(others, 1e-10)), *GAIN_RANGE)
        return source + other * np.float32(gain)


@dataclasses.dataclass(frozen=True)
class Window:
    """Two seconds of a mixture and of one of its sources; an `Item`.

    Attributes:
      name, label, class_index, other_class_index, group: as in `Item`.
      source, mixture: the files.
      begin_seconds: where in both.
    """

    name: str
    label: str
    class_index: int | None
    source: pathlib.Path
    mixture: pathlib.Path
    begin_seconds: float
    other_class_index: int | None = None
    group: str = ""

    def samples(self, sample_rate: int) -> int:
        """Two seconds."""
        return round(SECONDS * sample_rate)

    def read(self, side: str, sample_rate: int) -> Float[np.ndarray, " t"]:
        """The window of one of the files."""
        path = self.source if side == "source" else self.mixture
        rate = audio_format(path).sample_rate
        begin = int(rate * self.begin_seconds)
        end = int(rate * (self.begin_seconds + SECONDS))
        segment = read_segment(path, begin, end - begin).mean(axis=0)
        return fitted(resample(segment, rate, sample_rate), self.samples(sample_rate))


def fitted(waveform: Float[np.ndarray, " s"], samples: int) -> Float[np.ndarray, " t"]:
    """Cut, or repeated, to a length."""
    return np.resize(waveform, samples)


def mixed_neighbours(
    recordings: Sequence[Recording], *, conflict_free: bool = False
) -> list[Mixed]:
    """Items as published: in random orders, each recording with the one after it in the table.

    Classes differ; there are `PER_CLASS` items of each class, recordings of small classes coming
    again. With `conflict_free` every label of a recording counts as its class, and the other one is
    the next in the table that has no label of the recording's, nor one above or below it.
    """
    random = np.random.RandomState(SEED)
    classes = {label for r in recordings for label in (r.labels if conflict_free else r.labels[:1])}
    counts = dict.fromkeys(sorted(classes), 0)
    other_of = _other_of(recordings, conflict_free)
    items: list[Mixed] = []
    while min(counts.values()) < PER_CLASS:
        before = len(items)
        for at in random.permutation(len(recordings)).tolist():
            recording = recordings[at]
            labels = recording.labels if conflict_free else recording.labels[:1]
            wanted = [n for n, label in enumerate(labels) if counts[label] < PER_CLASS]
            other = other_of(at) if wanted else None
            if other is None:
                continue
            for number in wanted:
                label = labels[number]
                items.append(
                    Mixed(
                        f"{label}/{counts[label]:03d}: {recording.path} + {other.path}",
                        label,
                        recording.class_indexes[number],
                        other.class_indexes[0],
                        recording.path,
                        other.path,
                    )
                )
                counts[label] += 1
        if len(items) == before:  # what is left of the classes stands beside no other
            break
    if not items:
        raise UserError("the recordings are all of one class; a mixture needs two")
    return items


def _other_of(
    recordings: Sequence[Recording], conflict_free: bool
) -> Callable[[int], Recording | None]:
    """What a recording is mixed with, None where it fits nothing."""

    def neighbour(at: int) -> Recording | None:
        other = recordings[(at + 1) % len(recordings)]
        return None if other.labels[0] == recordings[at].labels[0] else other

    @functools.cache
    def unrelated(at: int) -> Recording | None:
        taken = _relatives(recordings[at])
        for step in range(1, len(recordings)):
            other = recordings[(at + step) % len(recordings)]
            if not taken & {*other.labels, *other.class_indexes} - {None}:
                return other
        return None

    return unrelated if conflict_free else neighbour


def _relatives(recording: Recording) -> set[str | int | None]:
    indexes = [index for index in recording.class_indexes if index is not None]
    below_and_above = (load_ontology().relatives(index) for index in indexes)
    return {*recording.labels}.union(*below_and_above)


def read_table(path: pathlib.Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """The lines of a publisher's CSV file, which must have these columns."""
    try:
        with open(path, encoding="utf-8-sig", newline="", opener=at_once) as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a CSV file ({error})") from error
    missing = [column for column in columns if not rows or column not in rows[0]]
    if missing:
        raise UserError(f'{path} has no column "{missing[0]}"; unpack the data set again')
    return rows


def require_files(files: Iterable[pathlib.Path], data_set: str) -> None:
    """Raises a UserError that says how many of a data set's files are missing, and which."""
    files = list(files)
    missing = [file for file in files if not file.exists()]
    if missing:
        names = ", ".join(map(str, missing[:3])) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"{len(missing)} of {len(files)} files of {data_set} are missing: {names}; unpack the "
            "data set as its publisher packs it, and give the folder with --data"
        )


def class_index_of(label: str) -> int | None:
    """AudioSet's class of a data set's label such as `Gunshot_or_gunfire`, if it has one."""
    text = label.replace("_", " ")
    for name in (text, text.replace(" or ", ", "), text.replace(" and ", ", ")):
        try:
            return load_ontology().resolve(name)
        except UserError:
            continue
    return None
