"""Makes items from recordings, and scores them.

An item is two recordings mixed at equal energy, or a window of an existing mixture.

Letters: `t` samples of an item, `s` samples of a recording.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Float

from uss_jax.anchors.mix import matching_gain
from uss_jax.audio.files import audio_format, read_mono, read_segment
from uss_jax.audio.resampling import resample
from uss_jax.bundles.model import Model
from uss_jax.data.csv_rows import read_columns
from uss_jax.errors import UserError, counted
from uss_jax.evaluation.averages import source_averages
from uss_jax.evaluation.finished import unfinished_beside
from uss_jax.evaluation.items import Item
from uss_jax.evaluation.rows import left_out
from uss_jax.evaluation.scoring import score
from uss_jax.evaluation.suite import Results
from uss_jax.evaluation.summary import report
from uss_jax.evaluation.wording import how_asked, read_wording
from uss_jax.ontology import load_ontology

# As published: items of 2 s, 100 per class, drawn with this seed.
SECONDS = 2.0
PER_CLASS = 100
SEED = 1234


@dataclasses.dataclass(frozen=True)
class Recording:
    """A labelled recording of a data set.

    Attributes:
      path: audio file.
      labels: the first is its class; the others are used only with `conflict_free`.
      class_indexes: AudioSet class of each label; None if AudioSet has no such class.
    """

    path: pathlib.Path
    labels: tuple[str, ...]
    class_indexes: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A mixture of a recording and another one scaled to its energy; implements `Item`.

    As in the reference, both are cut to their first 2 s, or repeated up to 2 s.

    Attributes:
      name, label, class_index, other_class_index, group: as in `Item`.
      source, other: audio files.
    """

    name: str
    label: str
    class_index: int | None
    other_class_index: int | None
    source: pathlib.Path
    other: pathlib.Path
    group: str = ""

    @property
    def files(self) -> tuple[pathlib.Path, ...]:
        """The source and the other recording."""
        return self.source, self.other

    def samples(self, sample_rate: int) -> int:
        """Two seconds."""
        return round(SECONDS * sample_rate)

    def read(self, side: str, sample_rate: int) -> Float[np.ndarray, " t"]:
        """Reads the source, or the mixture."""
        source = fitted(read_mono(self.source, sample_rate), self.samples(sample_rate))
        if side == "source":
            return source
        other = fitted(read_mono(self.other, sample_rate), len(source))
        energy, others = (np.mean(np.square(x, dtype=np.float64)) for x in (source, other))
        gain = matching_gain(energy, others, np)
        return source + other * np.float32(gain)


@dataclasses.dataclass(frozen=True)
class Window:
    """A window of 2 s of a mixture and of one of its sources; implements `Item`.

    Attributes:
      name, label, class_index, other_class_index, group: as in `Item`.
      source, mixture: audio files.
      begin_seconds: start of the window in both files, in seconds.
    """

    name: str
    label: str
    class_index: int | None
    source: pathlib.Path
    mixture: pathlib.Path
    begin_seconds: float
    other_class_index: int | None = None
    group: str = ""

    @property
    def files(self) -> tuple[pathlib.Path, ...]:
        """Source and mixture."""
        return self.source, self.mixture

    def samples(self, sample_rate: int) -> int:
        """Two seconds."""
        return round(SECONDS * sample_rate)

    def read(self, side: str, sample_rate: int) -> Float[np.ndarray, " t"]:
        """Reads the window from one of the files."""
        path = self.source if side == "source" else self.mixture
        rate = audio_format(path).sample_rate
        begin = int(rate * self.begin_seconds)
        end = int(rate * (self.begin_seconds + SECONDS))
        segment = read_segment(path, begin, end - begin).mean(axis=0)
        return fitted(resample(segment, rate, sample_rate), self.samples(sample_rate))


def fitted(waveform: Float[np.ndarray, " s"], samples: int) -> Float[np.ndarray, " t"]:
    """Cuts a waveform to a length, or repeats it up to that length."""
    return np.resize(waveform, samples)


def mixed_neighbours(
    recordings: Sequence[Recording], *, conflict_free: bool = False
) -> list[Mixed]:
    """Mixes each recording with its successor in the table, if of another class, as published.

    Goes through the recordings in random orders until there are `PER_CLASS` items of each class, so
    that recordings of small classes are reused; classes without a possible mixture have fewer. With
    `conflict_free` every label of a recording counts as its class, and the other recording is the
    next in the table with no label equal to, above or below one of these.

    Raises:
      UserError: no two recordings can be mixed.
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
        if len(items) == before:  # no mixture is possible for the other classes
            break
    if not items:
        raise UserError("all recordings are of one class; a mixture needs two classes")
    return items


def _other_of(
    recordings: Sequence[Recording], conflict_free: bool
) -> Callable[[int], Recording | None]:
    """Returns a function from a recording's position to its partner; None if there is none."""

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


def score_splits(
    model: Model,
    out: str,
    items: Callable[[str], Sequence[Item]],
    how: Results,
    *,
    text_encoder: str | None,
    texts: str | None,
) -> tuple[Results, str]:
    """Scores the test split, with conditions averaged over the sources of the training split.

    Args:
      model: the separator.
      out: JSON file of the results.
      items: maps a split, `train` or `test`, to its items.
      how: options of the suite, for the results.
      text_encoder, texts: see `read_wording`.
    """
    wording = read_wording(model, text_encoder, texts)
    test = items("test")
    remark = wording.remark(test) if wording else ""
    averages = source_averages(model, items("train"))
    figures, rows = score(model, test, averages, wording=wording, unfinished=unfinished_beside(out))
    results, text = report(model, test, figures, out)
    text = "\n\n".join([text, *filter(None, [remark, left_out(rows, len(test))])])
    return {**results, "how": {**how, **how_asked(text_encoder, texts)}}, text


def read_table(path: pathlib.Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """Reads the rows of a data set's CSV file, see `read_columns`; refuses one without rows."""
    rows = read_columns(path, columns, "unpack the data set again")
    if not rows:
        raise UserError(f"{path} lists no recordings; unpack the data set again")
    return rows


def require_files(files: Iterable[pathlib.Path], data_set: str) -> None:
    """Raises a UserError with the number and names of missing files, if there are any."""
    files = list(files)
    missing = [file for file in files if not file.exists()]
    if missing:
        names = ", ".join(map(str, missing[:3])) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"{data_set} lacks {len(missing):,} of its {counted(len(files), 'file')}: {names}; "
            "unpack the data set in its publisher's folder layout, and give the folder with --data"
        )


def class_index_of(label: str) -> int | None:
    """Returns the AudioSet class of a label such as `Gunshot_or_gunfire`; None if none matches."""
    text = label.replace("_", " ")
    for name in (text, text.replace(" or ", ", "), text.replace(" and ", ", ")):
        try:
            return load_ontology().resolve(name)
        except UserError:
            continue
    return None
