"""Separates items with several queries and measures the estimates, on all devices.

An item is a mixture and its target source. Each mixture is separated with
- the condition of the clean source ("oracle"),
- the condition averaged over training recordings of its class ("class average"),
- the tagging probability of its class in the mixture, others zero ("class vector"),
- the oracle of an unrelated item ("shuffled oracle"): shows whether the query matters, and its
  level shows the leakage when the queried sound is absent.
The source as its own mixture ("target alone") shows the distortion added by the net. Two baselines
need no model: the mixture, and half the mixture, which has an SDRi of +3 dB at equal energies.

Letters: `n` items, `b` batch, `m` items of a batch without padding, `t` samples of an item,
`d` width of the condition.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Integer
from tqdm import tqdm

from uss_jax.bundles.bundle import net_hash
from uss_jax.bundles.model import Model, Net, separate_with
from uss_jax.devices.mesh import batch_sharded, make_mesh, replicated
from uss_jax.errors import UserError
from uss_jax.evaluation.finished import Finished
from uss_jax.evaluation.metrics import FLOOR, is_silent, separation_figures
from uss_jax.ontology import load_ontology

ORACLE, AVERAGE, CLASS = "oracle", "class average", "class vector"
SHUFFLED, IDENTITY = "shuffled oracle", "target alone"
MIXTURE, HALF = "the mixture", "half the mixture"
# Batch rows per device: 16 items of 2 s keep an accelerator busy. On a CPU, separation takes one
# item per core, to stay in cache, and tagging several, to amortise reading 80 M parameters.
_ROWS_OF_ACCELERATOR = 16
_ROWS_TAGGED_BY_CORE = 4
_READERS = 8

Figures = dict[str, Float[np.ndarray, " n"]]
Waveforms = Float[np.ndarray, "b t"]


@runtime_checkable
class Item(Protocol):
    """A mixture and its target source.

    Attributes:
      name: unique name.
      label: name of its class, for tables.
      class_index: AudioSet class; None if AudioSet has no such class.
      other_class_index: class of the mixture's other source; None if unknown.
      group: group that is also summarised separately; empty for none.
    """

    name: str
    label: str
    class_index: int | None
    other_class_index: int | None
    group: str

    def samples(self, sample_rate: int) -> int:
        """Returns the length at a sampling rate, without reading the whole file."""

    def read(self, side: str, sample_rate: int) -> Float[np.ndarray, " _"]:
        """Reads the "mixture" or the "source"; callers cut it to `samples`."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A kind of query, with its condition for each item; a row of the table.

    Attributes:
      name: name in the table.
      conditions: [n, d].
      exists: [n] False where the item has no such condition.
    """

    name: str
    conditions: Float[np.ndarray, "n d"]
    exists: Bool[np.ndarray, " n"]


class Batches:
    """Groups items of equal length into batches over all devices.

    All batches have the same number of rows: the last batch of a length repeats its last item.

    Attributes:
      items: all items.
      sample_rate: sampling rate at which they are read, in Hz.
      mesh: the devices.
      size: rows of a batch, over all devices.
      places: for each batch, the positions of its items in `items`, without padding.
      samples: for each batch, the length of its items.
    """

    def __init__(
        self,
        items: Sequence[Item],
        lengths: Sequence[int],
        sample_rate: int,
        rows_of_core: int = 1,
    ):
        """Groups items by their lengths in samples, with `rows_of_core` rows per CPU device."""
        self.items = items
        self.sample_rate = sample_rate
        self.mesh = make_mesh()
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        self.size = self.mesh.size * (rows_of_core if on_cpu else _ROWS_OF_ACCELERATOR)
        by_length = collections.defaultdict(list)
        for at, length in enumerate(lengths):
            by_length[length].append(at)
        self.places, self.samples = [], []
        for samples, same in sorted(by_length.items()):
            for first in range(0, len(same), self.size):
                self.places.append(np.array(same[first : first + self.size]))
                self.samples.append(samples)

    def filled(self, at: Integer[np.ndarray, " m"]) -> Integer[np.ndarray, " b"]:
        """Pads the places of a batch to `size` by repeating the last one."""
        return np.pad(at, (0, self.size - len(at)), mode="edge")

    def put(self, rows: np.ndarray) -> Array:
        """Shards the rows of a batch over the devices."""
        sharding = batch_sharded(self.mesh)
        return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])

    def read(
        self, sides: Sequence[str], which: Sequence[int], what: str
    ) -> Iterator[tuple[int, list[Waveforms]]]:
        """Yields (batch number, waveforms of each side), reading ahead in threads.

        Args:
          sides: "mixture", "source" or both.
          which: batch numbers to read.
          what: label of the progress bar.
        """

        def load(number: int) -> list[Waveforms]:
            items = [self.items[at] for at in self.places[number]]
            missing = self.size - len(items)
            waveforms = []
            for side in sides:
                read = [i.read(side, self.sample_rate)[: self.samples[number]] for i in items]
                waveforms.append(np.stack(read + read[-1:] * missing))
            return waveforms

        loaded = _ahead(load, which)
        yield from tqdm(zip(which, loaded, strict=True), what, len(which), disable=None)


def _ahead(function: Callable[[int], Any], arguments: Sequence[int]) -> Iterator[Any]:
    """Maps a function over arguments in order, computing a few results ahead in threads."""
    threads = min(_READERS, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        running: collections.deque = collections.deque()
        for argument in arguments:
            running.append(pool.submit(function, argument))
            if len(running) > threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def score(
    model: Model,
    items: Sequence[Item],
    averages: dict[str, Float[np.ndarray, " d"]] | None = None,
    *,
    oracle_only: bool = False,
    unfinished: str | os.PathLike | None = None,
) -> tuple[dict[str, Figures], dict[str, Row]]:
    """Computes the metrics of every item for every query.

    Args:
      model: the separator with its query net.
      items: items to separate.
      averages: label -> averaged condition, if available.
      oracle_only: separate each item only once, with the condition of its clean source.
      unfinished: file that stores the metrics of finished batches, to resume an interrupted run;
        removed at the end.

    Returns:
      Row name -> metric name -> [n], NaN where an item has no condition or its source is silent:
      the metrics of `separation_figures`, and `level`, the energy of the estimate relative to the
      mixture in dB. Then row name -> `Row`, for the rows that were separated.

    Raises:
      UserError: every source is silent, no item can be queried, or an estimate is NaN.
    """
    lengths = [item.samples(model.sample_rate) for item in items]
    batches = Batches(items, lengths, model.sample_rate)
    tagged = Batches(items, lengths, model.sample_rate, _ROWS_TAGGED_BY_CORE)
    separator = model.separator_on(batches.mesh)
    with jax.set_mesh(batches.mesh):
        rows = _rows(model, tagged, averages, oracle_only)
        finished = Finished(unfinished, _identity(model, items, rows, batches.size, oracle_only))
        which = [number for number in range(len(batches.places)) if number not in finished.done]
        for number, sides in batches.read(("mixture", "source"), which, "evaluate"):
            at = batches.places[number]
            finished.add(
                number, _score_batch(separator, batches, rows, at, not oracle_only, *sides)
            )
    figures = _together(finished, batches.places, len(items))
    _require_numbers(model, items, rows, figures)
    finished.remove()
    return figures, {row.name: row for row in rows}


@functools.partial(jax.jit, static_argnames="everywhere")
def _measure(
    separator: Net,
    mixture: Float[Array, "b t"],
    source: Float[Array, "b t"],
    condition: Float[Array, "b d"],
    everywhere: NamedSharding,
) -> dict[str, Float[Array, " b"]]:
    """Separates a batch and computes its metrics, replicated to every host."""
    estimate = separate_with(separator, mixture, condition)
    found = _figures(source, estimate, mixture)
    return jax.lax.with_sharding_constraint(found, everywhere)


@jax.jit
def _figures(source: Array, estimate: Array, mixture: Array) -> dict[str, Array]:
    level = jnp.mean(jnp.square(estimate), axis=-1) / jnp.maximum(
        jnp.mean(jnp.square(mixture), axis=-1), FLOOR
    )
    figures = separation_figures(source, estimate, mixture)
    return {**figures, "level": 10 * jnp.log10(jnp.maximum(level, FLOOR))}


def _score_batch(
    separator: Net,
    batches: Batches,
    rows: Sequence[Row],
    at: Integer[np.ndarray, " m"],
    alone: bool,
    mixture: Waveforms,
    source: Waveforms,
) -> dict[str, Figures]:
    """Returns row name -> metric name -> [m]; `alone` adds the row "target alone"."""
    mixtures, sources = batches.put(mixture), batches.put(source)
    measure = functools.partial(_measure, separator, everywhere=replicated(batches.mesh))
    filled = batches.filled(at)
    found = {}
    for row in rows:
        if row.exists[at].any():
            condition = batches.put(row.conditions[filled])
            found[row.name] = measure(mixtures, sources, condition)
            if alone and row.name == ORACLE:  # no SDRi: the mixture is the source
                identity = measure(sources, sources, condition)
                found[IDENTITY] = {name: identity[name] for name in ("sdr", "si_sdr", "level")}
    found[HALF] = _figures(source, mixture / 2, mixture)
    found[MIXTURE] = _figures(source, mixture, mixture)
    exists = {row.name: row.exists[at] for row in rows}
    exists[IDENTITY] = exists[ORACLE]
    exists[HALF] = exists[MIXTURE] = ~is_silent(source[: len(at)])
    return {
        name: {
            figure: np.where(exists[name], np.asarray(of)[: len(at)], np.nan)
            for figure, of in by_figure.items()
        }
        for name, by_figure in found.items()
    }


def _rows(
    model: Model,
    batches: Batches,
    averages: dict[str, Float[np.ndarray, " d"]] | None,
    oracle_only: bool,
) -> list[Row]:
    """Computes the conditions of every query that at least one item has."""
    items = batches.items
    conditions, digests, heard = oracle_conditions(model, batches)
    if not heard.any():
        raise UserError("every source is silent, so no metric is defined; check the recordings")
    asked = heard
    if not model.query.module.takes.recordings:  # without a class there is no query
        asked = heard & [item.class_index is not None for item in items]
        if not asked.any():
            raise UserError(
                f"{model.path} takes AudioSet classes only, and none of these sounds belongs to one"
            )
    rows = [Row(ORACLE, conditions, asked)]
    if oracle_only:
        return rows
    if averages:
        exists = heard & [item.label in averages for item in items]
        zeros = np.zeros(conditions.shape[1], np.float32)
        rows.append(
            Row(AVERAGE, np.stack([averages.get(item.label, zeros) for item in items]), exists)
        )
    if model.query.module.takes.probabilities:
        rows.append(_class_vectors(model, batches, heard, conditions.shape[1]))
    classes = [item.label if item.class_index is None else item.class_index for item in items]
    others = unrelated_items(classes, digests, [item.other_class_index for item in items])
    exists = heard & (others >= 0) & asked[others]
    rows.append(Row(SHUFFLED, conditions[np.maximum(others, 0)], exists))
    return [row for row in rows if row.exists.any()]


def oracle_conditions(
    model: Model, batches: Batches
) -> tuple[Float[np.ndarray, "n d"], list[str], Bool[np.ndarray, " n"]]:
    """Returns the conditions of the clean sources, their digests, and whether each is audible.

    Equal digests mark one sound under several labels, so each silent source has a digest of its
    own.
    """
    query = model.query.on(batches.mesh)
    conditions: list[Any] = [None] * len(batches.items)
    digests = [f"silent {place}" for place in range(len(batches.items))]
    heard = np.zeros(len(batches.items), bool)
    for number, (source,) in batches.read(("source",), range(len(batches.places)), "conditions"):
        at = batches.places[number]
        classes = [batches.items[place].class_index or 0 for place in batches.filled(at)]
        inputs = batches.put(source), batches.put(np.array(classes, np.int32))
        found = _on_host(query(*inputs), batches.mesh)
        for row, place in enumerate(at.tolist()):
            conditions[place] = found[row]
            if not is_silent(source[row]):
                heard[place] = True
                digests[place] = samples_digest(source[row])
    return np.stack(conditions), digests, heard


def _class_vectors(
    model: Model, batches: Batches, heard: Bool[np.ndarray, " n"], width: int
) -> Row:
    """Conditions on the class's tagging probability in the mixture, all others zero.

    This is the reference's query. Items without an AudioSet class have none; the reference would
    not separate them.
    """
    items, tagger = batches.items, model.tagger.on(batches.mesh)
    conditions = np.zeros((len(items), width), np.float32)
    exists = heard & [item.class_index is not None for item in items]
    which = [number for number, at in enumerate(batches.places) if exists[at].any()]
    for number, (mixture,) in batches.read(("mixture",), which, "class vectors"):
        at = batches.places[number]
        found = _on_host(tagger(batches.put(mixture))["clipwise"], batches.mesh)[: len(at)]
        classes = np.array([items[place].class_index or 0 for place in at])
        one = np.arange(found.shape[1]) == classes[:, None]
        conditions[at] = model.adapt(np.where(one, found, 0).astype(np.float32))
    return Row(CLASS, conditions, exists)


def _on_host(rows: Array, mesh: Mesh) -> np.ndarray:
    """Gathers rows sharded over devices onto every host."""
    if rows.is_fully_addressable:
        return np.asarray(rows)
    return np.asarray(
        jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(rows)
    )


def samples_digest(waveform: Float[np.ndarray, " s"]) -> str:
    """Returns the SHA-256 of the samples as little-endian float32."""
    return hashlib.sha256(waveform.astype("<f4").tobytes()).hexdigest()


def unrelated_items(
    classes: Sequence[Hashable],
    digests: Sequence[str],
    others: Sequence[int | None] | None = None,
) -> Integer[np.ndarray, " n"]:
    """Chooses for each item another whose class is absent from the mixture; -1 if there is none.

    The chosen class is not equal to, above or below the item's class in the ontology, nor another
    label of any source of the item's class (a clip may have several), nor related to the mixture's
    other source, if known. The choice is deterministic.

    Args:
      classes: for each item an AudioSet class index, or a name, which has no relatives.
      digests: for each item the digest of its source's samples.
      others: for each item the class index of the mixture's other source, if known.
    """
    labels_of: dict[str, set[Hashable]] = {}
    for label, digest in zip(classes, digests, strict=True):
        labels_of.setdefault(digest, set()).add(label)
    related = {label: _relatives(label) for label in set(classes)}
    for labels in labels_of.values():
        for label in labels:
            related[label] |= labels
    numbers = {label: number for number, label in enumerate(dict.fromkeys(classes))}
    number_of = np.array([numbers[label] for label in classes])

    @functools.cache
    def candidates(label: Hashable, other: int | None) -> Integer[np.ndarray, " m"]:
        taken = related[label] | (set() if other is None else _relatives(other))
        taken = [numbers[label] for label in taken if label in numbers]
        return np.flatnonzero(~np.isin(number_of, taken))

    chosen = np.full(len(classes), -1)
    for at, label in enumerate(classes):
        found = candidates(label, others[at] if others else None)
        if len(found):
            chosen[at] = np.random.default_rng(at).choice(found)
    return chosen


def _relatives(label: Hashable) -> set[Hashable]:
    return set(load_ontology().relatives(label)) if isinstance(label, int) else {label}


def _identity(
    model: Model,
    items: Sequence[Item],
    rows: Sequence[Row],
    batch_size: int,
    oracle_only: bool,
) -> Iterator[bytes]:
    """Yields everything that the metrics of a batch depend on, for `Finished`."""
    yield net_hash(model.separator.variables).encode()
    how = [model.precision, batch_size, oracle_only]
    yield json.dumps([*how, [item.name for item in items]]).encode()
    for row in rows:
        yield row.name.encode() + row.conditions.tobytes() + row.exists.tobytes()


def _together(
    finished: Finished, places: Sequence[Integer[np.ndarray, "_"]], count: int
) -> dict[str, Figures]:
    """Collects the metrics of all batches into arrays in the order of the items."""
    together: dict[str, Figures] = {}
    for name in _ORDER:
        for number, found in finished.done.items():
            for figure, values in found.get(name, {}).items():
                of_row = together.setdefault(name, {})
                of_row.setdefault(figure, np.full(count, np.nan, np.float32))
                of_row[figure][places[number]] = values
    return together


_ORDER = (ORACLE, AVERAGE, CLASS, SHUFFLED, IDENTITY, HALF, MIXTURE)


def _require_numbers(
    model: Model,
    items: Sequence[Item],
    rows: Iterable[Row],
    figures: dict[str, Figures],
) -> None:
    for row in rows:
        wrong = row.exists & ~np.isfinite(figures[row.name]["sdr"])
        if wrong.any():
            raise UserError(
                f"{model.path} gives an estimate that is NaN or infinite for "
                f"{items[int(np.argmax(wrong))].name}; its training has diverged"
            )
