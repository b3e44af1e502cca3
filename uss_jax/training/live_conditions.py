"""The conditions that an evaluation in training asks with, besides those of the clean sources.

Letters: `n` pairs, `c` numbers of recordings, `d` width of the condition, `k` classes.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float, Int

from uss_jax.bundles.bundle import net_hash
from uss_jax.bundles.model import Model
from uss_jax.disk.atomic import replacing
from uss_jax.disk.checked_npz import Column, read_npz
from uss_jax.errors import UserError
from uss_jax.evaluation.averages import averaged, by_name, class_vectors
from uss_jax.evaluation.clips import open_clips
from uss_jax.evaluation.items import samples_digest
from uss_jax.evaluation.metrics import is_silent
from uss_jax.evaluation.rows import Drawn, unrelated_items
from uss_jax.evaluation.suites.pairs import Pair

# Files in the workdir with conditions of its training clips: the averages of classes, and those of
# a few clips drawn for each pair.
AVERAGES, RECORDINGS = "class_averages.npz", "recordings_asked.npz"
# Names of queries, see `config.eval.queries`; "recordings_4" are four training recordings.
AVERAGE, MEAN, CLASS, TEXT = "average", "mean", "class", "text"
SHUFFLED, SOME = "shuffled", "recordings_"

# Files of older versions have no digest, and are computed again.
_DIGEST = {"digest": Column("U", optional=True)}
_COLUMNS = {
    AVERAGES: {**_DIGEST, "classes": Column("i8", "m"), "vectors": Column("f4", "m d")},
    RECORDINGS: {**_DIGEST, "vectors": Column("f4", "c n d")},
}


@dataclasses.dataclass(frozen=True)
class Asked:
    """The conditions of each pair, besides that of its source.

    Attributes:
      vectors: name of a query -> conditions [n, d], NaN for pairs that have none.
      others: with whose source a pair is asked as "shuffled", -1 for none; None to leave it out.
      known: which pairs can be asked with their class: those of classes that the tagging net knows;
        None if conditions are not made of probabilities.
      alone: whether to ask with the class in the mixture, all others zero, as "class".
      means: the run's means of its classes (see `QueryNet.of_probabilities`), to ask with, as
        "mean"; None to leave it out.
      named: whether to ask with the name of the class, as "text".
    """

    vectors: Mapping[str, Float[np.ndarray, "n d"]] = dataclasses.field(default_factory=dict)
    others: Int[np.ndarray, " n"] | None = None
    known: Bool[np.ndarray, " n"] | None = None
    alone: bool = False
    means: Float[np.ndarray, "k k"] | None = None
    named: bool = False

    @property
    def names(self) -> list[str]:
        """Names of the queries."""
        known = self.known is not None and self.known.any()
        rest = {MEAN: known and self.means is not None, CLASS: known and self.alone}
        rest |= {TEXT: self.named, SHUFFLED: self.others is not None}
        return [*self.vectors, *(name for name, there in rest.items() if there)]

    def exists(self, name: str, pairs: int) -> Bool[np.ndarray, " n"]:
        """Returns which of so many pairs have the condition of a query; "" is the clean source."""
        if name in self.vectors:
            return np.isfinite(self.vectors[name]).all(axis=1)
        if name == SHUFFLED:
            return self.others >= 0
        if name in (MEAN, CLASS):
            return self.known
        return np.ones(pairs, bool)


def other_pairs(pairs: Sequence[Pair], sample_rate: int, threads: int) -> Int[np.ndarray, " n"]:
    """Returns for each pair another whose class is absent from its mixture; -1 if there is none.

    The choice is that of `uss-jax evaluate pairs`, which leaves out silent sources too.
    """

    def digest(pair: Pair) -> str | None:
        source = pair.read("source", sample_rate)[: pair.samples(sample_rate)]
        return None if is_silent(source) else samples_digest(source)

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(digest, pairs))
    digests = [digest or f"silent {number}" for number, digest in enumerate(found)]
    classes = [pair.class_index for pair in pairs]
    others = unrelated_items(classes, digests, [pair.other_class_index for pair in pairs])
    heard = np.array([digest is not None for digest in found])
    return np.where(heard[others], others, -1)


def training_conditions(
    workdir: pathlib.Path, records: str, split: str, pairs: Sequence[Pair], queries: Sequence[str]
) -> dict[str, Float[np.ndarray, "n d"]]:
    """Returns the conditions of training clips that pairs are asked with, by name of the query.

    Rows of pairs whose class has too few clips are NaN; a query that no pair has is left out.
    The first host computes what the workdir does not hold yet, of these nets, records and pairs;
    all read it there. The nets that compute conditions must be frozen.

    Args:
      workdir: workdir with config and frozen nets.
      records: folder of the training records.
      split: split of the records.
      pairs: pairs to ask for.
      queries: names of queries; those that need no training clips are ignored.

    Raises:
      UserError: a cached file cannot be read.
    """
    counts = [int(name.removeprefix(SOME)) for name in queries if name.startswith(SOME)]
    wanted = [
        name for name, there in ((AVERAGES, AVERAGE in queries), (RECORDINGS, counts)) if there
    ]
    if jax.process_index() == 0 and wanted:
        _cache(workdir, wanted, records, split, pairs, counts)
    multihost_utils.sync_global_devices("conditions of training clips are written")
    found = {}
    if AVERAGES in wanted:
        stored = _read(workdir / AVERAGES)
        averages = dict(zip(stored["classes"].tolist(), stored["vectors"], strict=True))
        none = np.full(stored["vectors"].shape[1], np.nan, np.float32)
        found[AVERAGE] = np.stack([averages.get(pair.class_index, none) for pair in pairs])
    if RECORDINGS in wanted:
        drawn = _read(workdir / RECORDINGS)["vectors"]
        found |= {f"{SOME}{count}": rows for count, rows in zip(counts, drawn, strict=True)}
    return {name: rows for name, rows in found.items() if np.isfinite(rows).any()}


def _cache(
    workdir: pathlib.Path,
    wanted: Sequence[str],
    records: str,
    split: str,
    pairs: Sequence[Pair],
    counts: Sequence[int],
) -> None:
    """Writes the wanted files, unless they are there and of the same nets, records and pairs."""
    model = Model(workdir)
    reader, _ = open_clips(records, split, model)
    classes = [pair.class_index for pair in pairs]
    about = [model.query_hash, net_hash(model.sed.variables), model.segment_samples]
    about += [reader.index.digest, split]
    digests = {
        AVERAGES: _digest([*about, sorted(set(classes))]),
        RECORDINGS: _digest([*about, classes, list(counts)]),
    }
    stale = [name for name in wanted if _digest_of(workdir / name) != digests[name]]
    if not stale:
        return
    vectors = class_vectors(model, reader, sorted(set(classes)))
    width = next((of.shape[1] for of in vectors.values()), 0)
    if AVERAGES in stale:
        averages = averaged(vectors)
        rows = np.array(list(averages.values()), np.float32).reshape(len(averages), width)
        written = {"classes": np.array(list(averages), np.int64), "vectors": rows}
        _write(workdir / AVERAGES, digests[AVERAGES], written)
    if RECORDINGS in stale:
        labels, heard = [pair.label for pair in pairs], np.ones(len(pairs), bool)
        drawn = [
            np.where(row.exists[:, None], row.conditions, np.float32(np.nan))
            for row in Drawn(by_name(vectors), counts).rows(labels, heard, width)
        ]
        _write(workdir / RECORDINGS, digests[RECORDINGS], {"vectors": np.stack(drawn)})


def _digest(about: Any) -> str:
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _digest_of(path: pathlib.Path) -> str | None:
    """Returns the digest of what a file was computed from; None without a file or digest."""
    found = _read(path).get("digest") if path.exists() else None
    return None if found is None else str(found)


def _write(path: pathlib.Path, digest: str, columns: Mapping[str, np.ndarray]) -> None:
    with replacing(path) as temporary:
        np.savez(temporary, digest=digest, **columns)


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file:
            return read_npz(file, _COLUMNS[path.name])
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); remove it to have it computed again"
        ) from error
