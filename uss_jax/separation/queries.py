"""Queries: classes, condition vectors from example recordings, and banks of such vectors.

Letters: `t` samples and `s` segments of a recording, `k` classes, `d` condition width, `n` vectors.
"""

import dataclasses
import os
import pathlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Float32

from uss_jax.audio.files import find_recordings, read_mono
from uss_jax.bundles.model import Model
from uss_jax.disk.atomic import replacing
from uss_jax.disk.checked_npz import Column, read_npz
from uss_jax.disk.opening import at_once
from uss_jax.errors import UserError
from uss_jax.models.query import KINDS
from uss_jax.ontology import load_ontology, reference_tree
from uss_jax.separation.separator import Target
from uss_jax.wording import counted

# A class is active in a segment if its probability is at least this (as in bytedance/uss).
THRESHOLD = 0.2

# As in bytedance/uss: a frame of 0.1 s is silent if no sample's magnitude exceeds this.
_SILENT_PEAK = 0.02
# A recording whose peak is below this, -80 dBFS, is wholly silent.
_NOTHING = 1e-4
_FRAMES_A_SECOND = 10
_BATCH_SIZE = 8
# Conditions are probabilities, activations or an adaptor's output; a net overflows long before the
# largest float32.
_LARGEST_VALUE = 1e6


def parse_classes(words: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Parses classes, or sets of them joined by "+", into a dict of name -> class indexes."""
    ontology, sets = load_ontology(), {}
    for word in words:
        indexes = tuple(ontology.resolve(part) for part in word.split("+"))
        name = " + ".join(ontology.class_names[index] for index in indexes)
        if name in sets:
            raise UserError(f'"{name}" is given twice; give it once')
        sets[name] = indexes
    return sets


def level_sets(levels: Sequence[int], first_parent_only: bool) -> dict[str, tuple[int, ...]]:
    """Maps "level=L/Name" to class indexes, for the nodes with classes at the given levels.

    Args:
      levels: levels of the ontology; 1 is the top.
      first_parent_only: use the tree of bytedance/uss, where a sound with several parents counts
        under one of them.

    Raises:
      UserError: a level that the ontology does not have.
    """
    if first_parent_only:
        nodes = [(n.level, n.name, n.class_indexes()) for n in reference_tree().walk()]
    else:
        ontology = load_ontology()
        nodes = [(n.level, n.name, ontology.class_indexes(m)) for m, n in ontology.nodes.items()]
    sets = {
        f"level={level}/{name}": tuple(indexes)
        for wanted in levels
        for level, name, indexes in nodes
        if level == wanted and indexes
    }
    for wanted in levels:
        if not any(name.startswith(f"level={wanted}/") for name in sets):
            deepest = max(level for level, _, indexes in nodes if indexes)
            raise UserError(f"the ontology has no level {wanted}; its levels are 1 to {deepest}")
    return sets


@dataclasses.dataclass(frozen=True)
class Classes:
    """Queries sets of classes in the segments where they are heard, as bytedance/uss does.

    The condition of a segment is its tagging probabilities with those outside the set zeroed, or
    the set's indicator vector if the model's condition is one-hot. A segment is active if any
    probability of the set reaches the threshold.

    Attributes:
      sets: name -> class indexes.
      threshold: probability in [0, 1].
      only_active: leave out sets that are active in no segment.
    """

    sets: Mapping[str, Sequence[int]]
    threshold: float = THRESHOLD
    only_active: bool = False
    needs_tags: ClassVar[bool] = True

    def require_fit(self, model: Model) -> None:
        """Raises a UserError if the model does not take classes or an index is out of range."""
        takes = model.query.module.takes
        if not (takes.classes or takes.probabilities):
            raise UserError(
                f"{model.path} takes embeddings of example recordings, not classes; give --query a "
                "folder of recordings, or a query bank and names of its vectors with --classes"
            )
        number = len(load_ontology().class_mids)
        for name, indexes in self.sets.items():
            if not len(indexes) or not all(0 <= index < number for index in indexes):
                raise UserError(
                    f'"{name}" has the class indexes {list(indexes)}; give one or more from 0 to '
                    f"{number - 1}"
                )

    def peaks(self, probabilities: Float32[np.ndarray, "s k"]) -> dict[str, float]:
        """Returns each set's highest probability in the recording."""
        return {
            name: float(probabilities[:, list(indexes)].max())
            for name, indexes in self.sets.items()
        }

    def targets(self, model: Model, probabilities: Float32[np.ndarray, "s k"]) -> list[Target]:
        """Returns the targets of a recording, given its segments' tagging probabilities."""
        self.require_fit(model)
        targets = []
        for name, indexes in self.sets.items():
            indexes = list(indexes)
            active = probabilities[:, indexes].max(axis=1) >= self.threshold
            if self.only_active and not active.any():
                continue
            if model.query.module.takes.classes:
                vectors = np.zeros((1, probabilities.shape[1]), np.float32)
                vectors[0, indexes] = 1
            else:
                vectors = np.zeros_like(probabilities)
                vectors[:, indexes] = probabilities[:, indexes]
            targets.append(Target(name, model.adapt(vectors), active))
        return targets


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Queries with condition vectors, each constant over the recording.

    Attributes:
      vectors: name -> condition [d].
    """

    vectors: Mapping[str, Float32[np.ndarray, " d"]]
    needs_tags: ClassVar[bool] = False

    def require_fit(self, model: Model) -> None:
        """Raises a UserError if a vector has the wrong width, or is NaN or too large."""
        width = model.separator.module.condition_width
        for name, vector in self.vectors.items():
            if vector.shape != (width,):
                raise UserError(
                    f'the vector "{name}" has {vector.size} values, {model.path} takes conditions '
                    f"of width {width}"
                )
            if not np.abs(vector).max(initial=0) <= _LARGEST_VALUE:  # also false for NaN
                raise UserError(
                    f'the vector "{name}" has a value that is NaN or larger than '
                    f"{_LARGEST_VALUE:g} in magnitude; make it again"
                )

    def targets(self, model: Model, probabilities: Any) -> list[Target]:
        """Returns the targets; `probabilities` is unused."""
        self.require_fit(model)
        always = np.ones(1, bool)
        return [Target(name, vector[None], always) for name, vector in self.vectors.items()]


Query = Classes | Vectors


def remove_silence(
    waveform: Float32[np.ndarray, " t"], sample_rate: int, silent_peak: float = _SILENT_PEAK
) -> Float32[np.ndarray, "_"]:
    """Drops silent frames of 0.1 s, and the samples after the last whole frame."""
    frame = sample_rate // _FRAMES_A_SECOND
    frames = waveform[: len(waveform) // frame * frame].reshape(-1, frame)
    return frames[np.abs(frames).max(axis=1) > silent_peak].reshape(-1)


def sounding(waveform: Float32[np.ndarray, " t"], sample_rate: int) -> Float32[np.ndarray, "_"]:
    """Returns an example without its silence; handles quiet and short recordings too.

    In a quiet recording the silence threshold is 20 dB below the peak. A recording without a whole
    sounding frame is returned whole; one with a peak below -80 dBFS yields no samples. A DC offset
    is removed first.
    """
    if abs(offset := waveform.mean()) > _SILENT_PEAK / 2:
        waveform = waveform - offset
    peak = float(np.abs(waveform).max())
    if peak < _NOTHING:
        return waveform[:0]
    heard = remove_silence(waveform, sample_rate, min(_SILENT_PEAK, peak / 10))
    return heard if heard.size else waveform


def recording_vector(
    model: Model, waveform: Float32[np.ndarray, " t"]
) -> Float32[np.ndarray, " d"]:
    """Returns the mean condition of a recording's segments.

    A short last segment is repeated to full length.

    Args:
      model: model whose query net computes the condition.
      waveform: at least one sample, at the model's sample rate.
    """
    length = model.segment_samples
    segments = [waveform[begin : begin + length] for begin in range(0, len(waveform), length)]
    segments = np.stack([np.resize(segment, length) for segment in segments])
    vectors = []
    for first in range(0, len(segments), _BATCH_SIZE):
        some = segments[first : first + _BATCH_SIZE]
        batch = np.pad(some, ((0, _BATCH_SIZE - len(some)), (0, 0)))
        classes = np.zeros(_BATCH_SIZE, np.int32)  # unused: one_hot takes no recordings
        vectors.append(np.asarray(model.condition(batch, classes))[: len(some)])
    return np.concatenate(vectors).mean(axis=0)


def name_of_examples(path: str | os.PathLike) -> str:
    """Returns the name of examples: the folder's full name, or the file's without suffix."""
    path = pathlib.Path(os.path.abspath(path))
    return path.name if path.is_dir() else path.stem


def vector_of_recordings(model: Model, path: str | os.PathLike) -> Float32[np.ndarray, " d"]:
    """Averages `recording_vector` over recordings without silence, as bytedance/uss queries.

    Args:
      model: model with a `soft` or `embedding` condition.
      path: a recording or a folder of them; silent recordings are skipped.

    Raises:
      UserError: the model's condition is one-hot, or nothing sounds in the recordings.
    """
    if not model.query.module.takes.recordings:
        raise UserError(
            f"{model.path} takes classes, not recordings; give --classes instead of --query"
        )
    vectors = []
    for file in _recordings(pathlib.Path(path)):
        waveform = sounding(read_mono(file, model.sample_rate), model.sample_rate)
        if waveform.size:
            vectors.append(recording_vector(model, waveform))
    if not vectors:
        raise UserError(f"{path} holds nothing but silence; give recordings of the sound you want")
    return np.mean(vectors, axis=0)


def _recordings(path: pathlib.Path) -> list[pathlib.Path]:
    if not path.is_dir():
        return [path]
    found, _ = find_recordings(path)
    if not found:
        raise UserError(f"{path} holds no recordings; add some of the sound you want")
    return found


@dataclasses.dataclass(frozen=True)
class Bank:
    """Stored condition vectors.

    Attributes:
      name: [n] names of the sounds.
      vectors: [n, d] conditions.
      kind: `one_hot`, `soft` or `embedding`.
      net_hash: hash of the query net that computed them.
      how: how they were made, in words.
    """

    name: tuple[str, ...]
    vectors: Float[np.ndarray, "n d"]
    kind: str
    net_hash: str
    how: str = ""

    def select(self, names: Sequence[str], where: str) -> list[int]:
        """Returns the rows of the vectors with these names.

        Without an exact match, case and "_" for spaces are ignored.

        Raises:
          UserError: a name is missing, ambiguous or given twice.
        """
        rows = [self._row(name, where) for name in names]
        for row in rows:
            if rows.count(row) > 1:
                raise UserError(f'"{self.name[row]}" is given twice; give it once')
        return rows

    def _row(self, name: str, where: str) -> int:
        if name in self.name:
            return self.name.index(name)
        alike = [row for row, other in enumerate(self.name) if _folded(other) == _folded(name)]
        if not alike:
            raise UserError(f'{where} has no vector called "{name}"; it has {", ".join(self.name)}')
        if len(alike) > 1:
            choices = " or ".join(f'"{self.name[row]}"' for row in alike)
            raise UserError(
                f'"{name}" is ambiguous: it could be {choices} of {where}; give the exact name'
            )
        return alike[0]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).replace("_", " ").casefold()


def write_bank(path: str | os.PathLike, bank: Bank) -> None:
    """Writes an .npz file with `name`, `vectors`, `kind`, `net_hash` and `how`."""
    require_npz(path)
    with replacing(path) as temporary:
        np.savez(
            temporary,
            name=np.array(bank.name, np.str_),
            vectors=bank.vectors.astype(np.float32),
            kind=bank.kind,
            net_hash=bank.net_hash,
            how=bank.how,
        )


def require_npz(path: str | os.PathLike) -> None:
    """Raises a UserError if a path lacks the suffix .npz, which numpy would append."""
    if not os.fspath(path).endswith(".npz"):
        raise UserError(f"{path}: the file name of a query bank must end in .npz")


_COLUMNS = {
    "name": Column("U", "n"),
    "vectors": Column("f4", "n d"),
    "kind": Column("U"),
    "net_hash": Column("U"),
    "how": Column("U", optional=True),
}


def load_bank(path: str | os.PathLike) -> Bank:
    """Reads a bank, without checking that it fits a model."""
    try:
        with open(path, "rb", opener=at_once) as file:
            stored = read_npz(file, _COLUMNS)
        texts = {key: str(stored.get(key, "")) for key in ("kind", "net_hash", "how")}
        if texts["kind"] not in KINDS:
            raise ValueError(f"its kind is {texts['kind'][:20]!r}, expected {', '.join(KINDS)}")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give a bank that `uss-jax query make` wrote"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{path} cannot be read as a query bank ({error}); it needs the arrays name, vectors, "
            "kind and net_hash, as `uss-jax query make` writes them"
        ) from error
    bank = Bank(tuple(stored["name"].tolist()), stored["vectors"], **texts)
    if not bank.name:
        raise UserError(f"{path} holds no vector; make it again")
    if twice := [name for name in bank.name if bank.name.count(name) > 1]:
        raise UserError(f'{path} holds two vectors called "{twice[0]}"; make it again')
    return bank


def read_bank(path: str | os.PathLike, model: Model) -> Bank:
    """Reads a bank; raises a UserError unless this model's query net made its vectors."""
    bank = load_bank(path)
    width = model.separator.module.condition_width
    if bank.vectors.shape[1] != width:
        raise UserError(
            f"{path} holds vectors of shape {bank.vectors.shape} for "
            f"{counted(len(bank.name), 'name')}, {model.path} takes conditions of width "
            f"{width}; make the bank with this model"
        )
    if bank.net_hash != model.query_hash:
        raise UserError(
            f"{path} was made with another query net than {model.path} has; make the bank with "
            "this model"
        )
    return bank
