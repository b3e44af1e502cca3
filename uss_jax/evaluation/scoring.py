"""Separating items with several queries and measuring the estimates, on all devices at once.

An item is a mixture and the source to give back. The same mixtures are separated with the condition
of the clean source ("oracle"), one vector for each class averaged over training recordings ("class
average"), the class itself ("class vector"), and the oracle of another item ("shuffled"), which
tells whether the query matters and, by its level, how much is let through when the sound asked for
is absent. The source alone, asked for by its own oracle, tells what the net itself costs. Two
answers that need no model stand beside them: the mixture, and half the mixture, which scores +3 dB
SDRi at equal energies.

Letters: `n` items, `b` batch, `t` samples of an item, `d` width of the condition, `r` rows.
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

from uss_jax.errors import UserError
from uss_jax.evaluation.finished import Finished
from uss_jax.evaluation.metrics import FLOOR, is_silent, separation_figures
from uss_jax.ontology import load_ontology
from uss_jax.training.bundle import net_hash
from uss_jax.training.mesh import batch_sharded, make_mesh, replicated
from uss_jax.training.model import Model, Net, separate_with

ORACLE, AVERAGE, CLASS = "oracle", "class average", "class vector"
SHUFFLED, IDENTITY = "shuffled oracle", "target alone"
MIXTURE, HALF = "the mixture", "half the mixture"
# Rows of one device: an accelerator is busy with 16 items of 2 s. A core is not: its cache holds
# what separates one item, and of tagging nets it reads 80 M parameters for as many as there are.
_ROWS_OF_ACCELERATOR = 16
_ROWS_TAGGED_BY_CORE = 4
_READERS = 8

Figures = dict[str, Float[np.ndarray, " n"]]
Waveforms = Float[np.ndarray, "b t"]


@runtime_checkable
class Item(Protocol):
    """A mixture and the source to give back.

    Attributes:
      name: no other item has it.
      label: name of its class, for tables.
      class_index: AudioSet's, None for a class that AudioSet has not.
      other_class_index: of what else is in the mixture, None where that is not known.
      group: tables are also made of each group apart; empty for none.
    """

    name: str
    label: str
    class_index: int | None
    other_class_index: int | None
    group: str

    def samples(self, sample_rate: int) -> int:
        """Its length at a sample rate, told without reading it all."""

    def read(self, side: str, sample_rate: int) -> Float[np.ndarray, " _"]:
        """The "mixture" or the "source"; what is longer than `samples` does not count."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A condition for each item.

    Attributes:
      name: for the table.
      conditions: [n, d].
      exists: [n] False where the item has none.
    """

    name: str
    conditions: Float[np.ndarray, "n d"]
    exists: Bool[np.ndarray, " n"]


class Batches:
    """Items in batches of one shape each, on all devices.

    Items of one length are batched together; the last batch of a length repeats its last item.

    Attributes:
      items: all of them.
      sample_rate: at which they are read.
      mesh: the devices.
      size: rows of a batch, on all devices together.
      places: of each batch, which items are in it.
      samples: of each batch, its items' length.
    """

    def __init__(
        self,
        items: Sequence[Item],
        lengths: Sequence[int],
        sample_rate: int,
        rows_of_core: int = 1,
    ):
        """Groups items of these lengths in samples; `rows_of_core` for each device of a CPU."""
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
        """The places of a batch, its last one repeated up to the batch's size."""
        return np.pad(at, (0, self.size - len(at)), mode="edge")

    def put(self, rows: np.ndarray) -> Array:
        """The rows of a batch, divided over the devices."""
        sharding = batch_sharded(self.mesh)
        return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])

    def read(
        self, sides: Sequence[str], which: Sequence[int], what: str
    ) -> Iterator[tuple[int, list[Waveforms]]]:
        """Yields (number of a batch, waveforms of each side); the next ones are read meanwhile.

        Args:
          sides: of "mixture" and "source".
          which: numbers of the batches.
          what: for the progress bar.
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
    """The function of every argument in order, a few of them computed ahead in threads."""
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
    """Figures of every item under every query.

    Args:
      model: the separator with its query net.
      items: what to separate.
      averages: a condition for each label, if there are any.
      oracle_only: separates each item once, with the condition of its clean source.
      unfinished: a file that keeps the figures of finished batches, so that a run that was stopped
        goes on there; it is removed at the end.

    Returns:
      row name -> figure name -> [n], NaN where an item has no condition or its source is silent:
      the figures of `separation_figures` and `level`, the energy of the estimate in dB of the
      mixture's; and the rows that were separated, by name.
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
    """The figures of a batch of estimates, on every host."""
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
    """Row name -> figure name -> [m]; `alone` adds the target alone."""
    mixtures, sources = batches.put(mixture), batches.put(source)
    measure = functools.partial(_measure, separator, everywhere=replicated(batches.mesh))
    filled = batches.filled(at)
    found = {}
    for row in rows:
        if row.exists[at].any():
            condition = batches.put(row.conditions[filled])
            found[row.name] = measure(mixtures, sources, condition)
            if alone and row.name == ORACLE:  # the source is the mixture, which no figure is above
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
    """Every query that at least one item has."""
    items = batches.items
    conditions, digests, heard = oracle_conditions(model, batches)
    if not heard.any():
        raise UserError("every source is silent, so no figure is defined; check the recordings")
    asked = heard
    if not model.query.module.takes.recordings:  # a sound without a class cannot be asked for
        asked = heard & [item.class_index is not None for item in items]
        if not asked.any():
            raise UserError(
                f"{model.path} knows AudioSet's classes only, and none of these sounds is of one"
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
    """The conditions of the clean sources, a digest of each, and whether it is heard at all.

    Of silent sources no two have the same digest: they say nothing of what else a sound is called.
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
    """The tagging probability of the class in the mixture, all others zero (the reference's way).

    Nothing is asked for (the reference would not separate) where an item has no AudioSet class.
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
    """Rows that are divided over devices, whole on every host."""
    if rows.is_fully_addressable:
        return np.asarray(rows)
    return np.asarray(
        jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(rows)
    )


def samples_digest(waveform: Float[np.ndarray, " s"]) -> str:
    """SHA-256 of the samples as little-endian float32."""
    return hashlib.sha256(waveform.astype("<f4").tobytes()).hexdigest()


def unrelated_items(
    classes: Sequence[Hashable],
    digests: Sequence[str],
    others: Sequence[int | None] | None = None,
) -> Integer[np.ndarray, " n"]:
    """For each item another one whose query asks for what is absent, -1 where there is none.

    Its class is not the item's, above or below it in the ontology, nor a class that some source of
    the item's class also stands for (a clip may have several labels), nor related to what else is
    in the mixture, where that is known. Always the same choice.

    Args:
      classes: of each item: a class index of AudioSet, or a name that has no relatives.
      digests: of each source's samples.
      others: class indexes of what else is in the mixtures.
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
    """What the figures of a batch depend on."""
    yield net_hash(model.separator.variables).encode()
    how = [model.precision, batch_size, oracle_only]
    yield json.dumps([*how, [item.name for item in items]]).encode()
    for row in rows:
        yield row.name.encode() + row.conditions.tobytes() + row.exists.tobytes()


def _together(
    finished: Finished, places: Sequence[Integer[np.ndarray, "_"]], count: int
) -> dict[str, Figures]:
    """The figures of all items, in their order."""
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
                f"{model.path} gives an estimate that is not a number for "
                f"{items[int(np.argmax(wrong))].name}; its training has diverged"
            )
