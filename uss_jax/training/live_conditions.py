"""The conditions that an evaluation in training asks with, besides those of the clean sources.

Letters: `n` pairs, `c` numbers of recordings, `d` width of the condition.
"""

import concurrent.futures
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

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
AVERAGE, CLASS, SHUFFLED, SOME = "average", "class", "shuffled", "recordings_"

_Vectors = Callable[[], dict[int, Float[np.ndarray, "_ d"]]]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What each pair is asked with, besides the condition of its source.

    Attributes:
      vectors: name of a query -> conditions [n, d], NaN for pairs that have none.
      others: with whose source a pair is asked as "shuffled", -1 for none; None to leave it out.
      class_alone: whether to ask with the class in the mixture, all others zero, as "class".
    """

    vectors: Mapping[str, Float[np.ndarray, "n d"]] = dataclasses.field(default_factory=dict)
    others: Int[np.ndarray, " n"] | None = None
    class_alone: bool = False

    @property
    def names(self) -> list[str]:
        """Names of the queries."""
        rest = {CLASS: self.class_alone, SHUFFLED: self.others is not None}
        return [*self.vectors, *(name for name, there in rest.items() if there)]


def other_pairs(pairs: Sequence[Pair], sample_rate: int, threads: int) -> Int[np.ndarray, " n"]:
    """Returns for each pair another whose class is absent from its mixture; -1 if there is none.

    The choice is that of `uss-jax evaluate pairs`.
    """

    def digest(numbered: tuple[int, Pair]) -> str:
        number, pair = numbered
        source = pair.read("source", sample_rate)[: pair.samples(sample_rate)]
        return f"silent {number}" if is_silent(source) else samples_digest(source)

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        digests = list(pool.map(digest, enumerate(pairs)))
    classes = [pair.class_index for pair in pairs]
    return unrelated_items(classes, digests, [pair.other_class_index for pair in pairs])


def training_conditions(
    workdir: pathlib.Path, records: str, split: str, pairs: Sequence[Pair], queries: Sequence[str]
) -> dict[str, Float[np.ndarray, "n d"]]:
    """Returns the conditions of training clips that pairs are asked with, by name of the query.

    Rows of pairs whose class has too few clips are NaN; a query that no pair has is left out.
    Computed once and cached in the workdir: the nets that compute conditions must be frozen.

    Args:
      workdir: workdir with config and frozen nets.
      records: folder of the training records.
      split: split of the records.
      pairs: pairs to ask for.
      queries: names of queries; those that need no training clips are ignored.

    Raises:
      UserError: a cached file cannot be read.
    """

    @functools.cache
    def vectors() -> dict[int, np.ndarray]:
        model = Model(workdir)
        classes = sorted({pair.class_index for pair in pairs})
        return class_vectors(model, open_clips(records, split, model)[0], classes)

    found = {}
    if AVERAGE in queries:
        found[AVERAGE] = _averages(workdir / AVERAGES, pairs, vectors)
    counts = [int(name.removeprefix(SOME)) for name in queries if name.startswith(SOME)]
    if counts:
        drawn = _recordings(workdir / RECORDINGS, pairs, counts, vectors)
        found |= {f"{SOME}{count}": rows for count, rows in zip(counts, drawn, strict=True)}
    return {name: rows for name, rows in found.items() if np.isfinite(rows).any()}


def _averages(
    path: pathlib.Path, pairs: Sequence[Pair], vectors: _Vectors
) -> Float[np.ndarray, "n d"]:
    if not path.exists():
        found = averaged(vectors())
        rows = list(found.values()) or np.zeros((0, 0), np.float32)
        with replacing(path) as temporary:
            np.savez(temporary, classes=np.array(list(found), np.int64), vectors=rows)
    stored = _read(path, {"classes": Column("i8", "m"), "vectors": Column("f4", "m d")})
    averages = dict(zip(stored["classes"].tolist(), stored["vectors"], strict=True))
    none = np.full(stored["vectors"].shape[1], np.nan, np.float32)
    return np.stack([averages.get(pair.class_index, none) for pair in pairs])


def _recordings(
    path: pathlib.Path, pairs: Sequence[Pair], counts: Sequence[int], vectors: _Vectors
) -> Float[np.ndarray, "c n d"]:
    """Returns the conditions of recordings drawn for each pair, as `uss-jax evaluate` draws them.

    The file is written again if pairs or counts have changed.
    """
    classes = np.array([pair.class_index for pair in pairs], np.int64)
    columns = {
        "counts": Column("i8", "c"),
        "classes": Column("i8", "n"),
        "vectors": Column("f4", "c n d"),
    }
    stored = _read(path, columns) if path.exists() else {}
    wanted = {"counts": np.array(counts, np.int64), "classes": classes}
    if not all(np.array_equal(stored.get(name), of) for name, of in wanted.items()):
        of_classes = by_name(vectors())
        width = next((of.shape[1] for of in of_classes.values()), 0)
        labels, heard = [pair.label for pair in pairs], np.ones(len(pairs), bool)
        rows = Drawn(of_classes, counts).rows(labels, heard, width)
        drawn = [np.where(row.exists[:, None], row.conditions, np.float32(np.nan)) for row in rows]
        stored = {**wanted, "vectors": np.stack(drawn)}
        with replacing(path) as temporary:
            np.savez(temporary, **stored)
    return stored["vectors"]


def _read(path: pathlib.Path, columns: Mapping[str, Column]) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file:
            return read_npz(file, columns)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); remove it to have it computed again"
        ) from error
