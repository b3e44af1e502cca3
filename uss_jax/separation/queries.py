"""What to ask a separator for: classes, vectors made of example recordings, banks of such vectors.

Letters: `t` samples of a recording, `s` segments of it, `k` classes, `d` width of the condition,
`n` vectors.
"""

import dataclasses
import os
import pathlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Float32

from uss_jax.atomic import replacing
from uss_jax.audio.files import find_recordings, read_mono
from uss_jax.checked_npz import Column, read_npz
from uss_jax.errors import UserError
from uss_jax.models.query import KINDS
from uss_jax.ontology import load_ontology, reference_tree
from uss_jax.opening import at_once
from uss_jax.separation.separator import Target
from uss_jax.training.model import Model

# A class sounds in a segment where its probability is at least this (the reference's).
THRESHOLD = 0.2

# The reference's: a frame of a tenth of a second is silent if no sample is above this.
_SILENT_PEAK = 0.02
# Below it, 80 dB under full scale, nothing sounds in a recording at all.
_NOTHING = 1e-4
_FRAMES_A_SECOND = 10
_BATCH_SIZE = 8
# Conditions are probabilities, activations or what an adaptor makes of them; a net's arithmetic
# overflows long before the largest float32.
_LARGEST_VALUE = 1e6


def parse_classes(words: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Name -> class indexes of what was asked for: classes, or sets of them joined by "+"."""
    ontology, sets = load_ontology(), {}
    for word in words:
        indexes = tuple(ontology.resolve(part) for part in word.split("+"))
        name = " + ".join(ontology.class_names[index] for index in indexes)
        if name in sets:
            raise UserError(f'"{name}" is asked for twice; once is enough')
        sets[name] = indexes
    return sets


def level_sets(levels: Sequence[int], first_parent_only: bool) -> dict[str, tuple[int, ...]]:
    """ "level=L/Name" -> class indexes, for the nodes of some levels that have any class.

    Args:
      levels: of the ontology, from 1 at the top.
      first_parent_only: use the reference's tree, where a sound with several parents counts under
        one of them.
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
    """Asks for sets of classes, where they sound (the reference's way).

    The condition of a segment is its tagging probabilities with those of other classes set to zero;
    it is active where one of the set's is at least the threshold.

    Attributes:
      sets: name -> class indexes.
      threshold: probability, 0..1.
      only_active: leave out the sets that sound nowhere.
    """

    sets: Mapping[str, Sequence[int]]
    threshold: float = THRESHOLD
    only_active: bool = False
    needs_tags: ClassVar[bool] = True

    def require_fit(self, model: Model) -> None:
        """Raises a UserError where the model does not take classes, or has none of this number."""
        takes = model.query.module.takes
        if not (takes.classes or takes.probabilities):
            raise UserError(
                f"{model.path} does not take classes but embeddings of examples; give --query a "
                "folder of recordings, or a bank of vectors and its names with --classes"
            )
        number = len(load_ontology().class_mids)
        for name, indexes in self.sets.items():
            if not len(indexes) or not all(0 <= index < number for index in indexes):
                raise UserError(
                    f'"{name}" asks for the classes {list(indexes)}; give one or more from 0 to '
                    f"{number - 1}"
                )

    def peaks(self, probabilities: Float32[np.ndarray, "s k"]) -> dict[str, float]:
        """Returns the highest probability of each set in a recording."""
        return {
            name: float(probabilities[:, list(indexes)].max())
            for name, indexes in self.sets.items()
        }

    def targets(self, model: Model, probabilities: Float32[np.ndarray, "s k"]) -> list[Target]:
        """The targets of a recording with these tagging probabilities of its segments."""
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
    """Asks with one condition for all of a recording.

    Attributes:
      vectors: name -> condition, [d].
    """

    vectors: Mapping[str, Float32[np.ndarray, " d"]]
    needs_tags: ClassVar[bool] = False

    def require_fit(self, model: Model) -> None:
        """Raises a UserError where a vector is not one that the model takes."""
        width = model.separator.module.condition_width
        for name, vector in self.vectors.items():
            if vector.shape != (width,):
                raise UserError(
                    f'the vector "{name}" has {vector.size} values, {model.path} takes conditions '
                    f"of width {width}"
                )
            if not np.abs(vector).max(initial=0) <= _LARGEST_VALUE:  # a NaN is not, either
                raise UserError(
                    f'the vector "{name}" has a value that is not finite or beyond '
                    f"{_LARGEST_VALUE:g}; make it again"
                )

    def targets(self, model: Model, probabilities: Any) -> list[Target]:
        """The targets, whatever the recording."""
        self.require_fit(model)
        always = np.ones(1, bool)
        return [Target(name, vector[None], always) for name, vector in self.vectors.items()]


Query = Classes | Vectors


def remove_silence(
    waveform: Float32[np.ndarray, " t"], sample_rate: int, silent_peak: float = _SILENT_PEAK
) -> Float32[np.ndarray, "_"]:
    """Drops the silent frames of 0.1 s, and what is left after the last whole frame."""
    frame = sample_rate // _FRAMES_A_SECOND
    frames = waveform[: len(waveform) // frame * frame].reshape(-1, frame)
    return frames[np.abs(frames).max(axis=1) > silent_peak].reshape(-1)


def sounding(waveform: Float32[np.ndarray, " t"], sample_rate: int) -> Float32[np.ndarray, "_"]:
    """Returns what sounds in an example: `remove_silence`, of quiet and short ones too.

    In a quiet recording a frame is silent that stays 20 dB below the peak; a recording without a
    whole frame that sounds is taken as it is. An offset is removed first: it is no sound.
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
    """The mean condition of a recording's segments; a last short one is repeated to full length.

    Args:
      model: gives the condition.
      waveform: at the model's sample rate, at least one sample.
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
    """Returns what examples are called: their folder's whole name, or a file's without suffix."""
    path = pathlib.Path(os.path.abspath(path))
    return path.name if path.is_dir() else path.stem


def vector_of_recordings(model: Model, path: str | os.PathLike) -> Float32[np.ndarray, " d"]:
    """The mean over recordings of their vectors, silence removed (the reference's query mode).

    Args:
      model: gives the condition, `soft` or `embedding`.
      path: a recording, or a folder of them. Wholly silent ones are passed over.
    """
    if not model.query.module.takes.recordings:
        raise UserError(
            f"{model.path} knows classes only, not recordings; ask with --classes instead of "
            "--query"
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
        raise UserError(f"{path} holds no recording; put some of the sound you want into it")
    return found


@dataclasses.dataclass(frozen=True)
class Bank:
    """Stored vectors.

    Attributes:
      name: [n] what each asks for.
      vectors: [n, d].
      kind: `one_hot`, `soft` or `embedding`.
      net_hash: of the query net that made them.
      how: in words, for people.
    """

    name: tuple[str, ...]
    vectors: Float[np.ndarray, "n d"]
    kind: str
    net_hash: str
    how: str = ""

    def select(self, names: Sequence[str], where: str) -> list[int]:
        """Returns the rows of the vectors with these names.

        A name that is not there as it is written is also found in other case, or with "_" for
        spaces, if only one vector is meant.

        Raises:
          UserError: a name that is not there, is several vectors', or comes twice.
        """
        rows = [self._row(name, where) for name in names]
        for row in rows:
            if rows.count(row) > 1:
                raise UserError(f'"{self.name[row]}" is asked for twice; once is enough')
        return rows

    def _row(self, name: str, where: str) -> int:
        if name in self.name:
            return self.name.index(name)
        alike = [row for row, other in enumerate(self.name) if _folded(other) == _folded(name)]
        if not alike:
            raise UserError(f'{where} has no vector called "{name}"; it has {", ".join(self.name)}')
        if len(alike) > 1:
            choices = " or ".join(f'"{self.name[row]}"' for row in alike)
            raise UserError(f'"{name}" could be {choices} of {where}; write it exactly')
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
    """Refuses a name that numpy would add to."""
    if not os.fspath(path).endswith(".npz"):
        raise UserError(f"{path}: name a query bank something.npz")


_COLUMNS = {
    "name": Column("U", "n"),
    "vectors": Column("f4", "n d"),
    "kind": Column("U"),
    "net_hash": Column("U"),
    "how": Column("U", optional=True),
}


def load_bank(path: str | os.PathLike) -> Bank:
    """Reads a bank, whatever model it was made with."""
    try:
        with open(path, "rb", opener=at_once) as file:
            stored = read_npz(file, _COLUMNS)
        texts = {key: str(stored.get(key, "")) for key in ("kind", "net_hash", "how")}
        if texts["kind"] not in KINDS:
            raise ValueError(f"it is of kind {texts['kind'][:20]!r}, expected {', '.join(KINDS)}")
    except (OSError, ValueError) as error:
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
    """Reads a bank whose vectors the model understands."""
    bank = load_bank(path)
    width = model.separator.module.condition_width
    if bank.vectors.shape[1] != width:
        raise UserError(
            f"{path} holds vectors of shape {bank.vectors.shape} for {len(bank.name)} names, "
            f"{model.path} takes conditions of width {width}; make the bank with this model"
        )
    if bank.net_hash != model.query_hash:
        raise UserError(
            f"{path} was made with another query net than that of {model.path}; make the bank with "
            "this model"
        )
    return bank
