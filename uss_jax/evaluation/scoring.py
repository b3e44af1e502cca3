"""Separates items with several queries and measures the estimates, on all devices.

The queries, and the baselines beside them, are described in uss_jax/evaluation/rows.py.

Letters: `n` items, `b` batch, `m` items of a batch without padding, `t` samples of an item,
`d` width of the condition.
"""

import functools
import json
import os
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Integer

from uss_jax.bundles.model import Model, Net, separate_with
from uss_jax.devices.mesh import replicated
from uss_jax.errors import UserError
from uss_jax.evaluation.finished import Finished, stamps
from uss_jax.evaluation.items import Batches, Item, Waveforms, require_sound
from uss_jax.evaluation.metrics import FLOOR, is_silent, separation_figures
from uss_jax.evaluation.rows import HALF, IDENTITY, MIXTURE, ORACLE, Drawn, Row, find_rows, in_order
from uss_jax.evaluation.wording import Wording

# A CPU core separates one item at a time, to stay in cache, and tags several, to amortise reading
# 80 M parameters.
_ROWS_TAGGED_BY_CORE = 4

_OF_IDENTITY = ("sdr", "si_sdr", "level", "level_error")

Figures = dict[str, Float[np.ndarray, " n"]]


def score(
    model: Model,
    items: Sequence[Item],
    averages: dict[str, Float[np.ndarray, " d"]] | None = None,
    *,
    drawn: Drawn | None = None,
    wording: Wording | None = None,
    oracle_only: bool = False,
    unfinished: str | os.PathLike | None = None,
) -> tuple[dict[str, Figures], dict[str, Row]]:
    """Computes the metrics of every item for every query.

    Args:
      model: the separator with its query net.
      items: items to separate.
      averages: label -> averaged condition, if available.
      drawn: training recordings to query with; None for none.
      wording: texts to query with; None: a model that takes texts is asked with names of classes.
      oracle_only: separate each item only once, with the condition of its clean source.
      unfinished: file that stores the metrics of finished batches, to resume an interrupted run;
        the caller removes it.

    Returns:
      Row name -> metric name -> [n], NaN where an item has no condition or its source is silent:
      the metrics of `separation_figures`; `level` and `level_error`, the energy of the estimate
      relative to the mixture and to the source, in dB. Then row name -> `Row`, for the rows that
      were separated.

    Raises:
      UserError: every source is silent, no item can be queried, or an estimate is NaN.
    """
    lengths = [item.samples(model.sample_rate) for item in items]
    batches = Batches(items, lengths, model.sample_rate)
    tagged = Batches(items, lengths, model.sample_rate, _ROWS_TAGGED_BY_CORE)
    separator = model.separator_on(batches.mesh)
    with jax.set_mesh(batches.mesh):
        rows = find_rows(model, tagged, averages, drawn, wording, oracle_only)
        finished = Finished(unfinished, _identity(model, items, rows, batches.size, oracle_only))
        which = [number for number in range(len(batches.places)) if number not in finished.done]
        for number, sides in batches.read(("mixture", "source"), which, "evaluate"):
            for at, *waveforms in zip(batches.places[number], *sides, strict=False):
                require_sound(items[at].name, *waveforms)
            found = _score_batch(separator, batches, rows, number, not oracle_only, *sides)
            finished.add(number, found)
    figures = _together(finished, batches.places, len(items))
    _require_numbers(model, items, rows, figures)
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
    energy = lambda x: jnp.mean(jnp.square(x), axis=-1)  # noqa: E731
    over = lambda x: energy(estimate) / jnp.maximum(energy(x), FLOOR)  # noqa: E731
    levels = {"level": over(mixture), "level_error": over(source)}
    levels = {name: 10 * jnp.log10(jnp.maximum(of, FLOOR)) for name, of in levels.items()}
    return separation_figures(source, estimate, mixture) | levels


def _score_batch(
    separator: Net,
    batches: Batches,
    rows: Sequence[Row],
    number: int,
    alone: bool,
    mixture: Waveforms,
    source: Waveforms,
) -> dict[str, Figures]:
    """Returns row name -> metric name -> [m]; `alone` adds the row "target alone"."""
    mixtures, sources = batches.put(mixture), batches.put(source)
    measure = functools.partial(_measure, separator, everywhere=replicated(batches.mesh))
    at, filled = batches.places[number], batches.filled[number]
    found = {}
    for row in rows:
        if row.exists[at].any():
            condition = batches.put(row.conditions[filled])
            found[row.name] = measure(mixtures, sources, condition)
            if alone and row.name == ORACLE:  # no SDRi: the mixture is the source
                identity = measure(sources, sources, condition)
                found[IDENTITY] = {name: identity[name] for name in _OF_IDENTITY}
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


def _identity(
    model: Model,
    items: Sequence[Item],
    rows: Sequence[Row],
    batch_size: int,
    oracle_only: bool,
) -> Iterator[bytes]:
    """Yields everything that the metrics of a batch depend on, for `Finished`."""
    yield model.digest.encode()
    # With the metrics, since a file of another version may lack one.
    how = [batch_size, oracle_only, _OF_IDENTITY]
    yield json.dumps([*how, [item.name for item in items]]).encode()
    yield stamps(file for item in items for file in item.files)
    for row in rows:
        yield row.name.encode() + row.conditions.tobytes() + row.exists.tobytes()


def _together(
    finished: Finished, places: Sequence[Integer[np.ndarray, "_"]], count: int
) -> dict[str, Figures]:
    """Collects the metrics of all batches into arrays in the order of the items."""
    together: dict[str, Figures] = {}
    names = {name for found in finished.done.values() for name in found}
    for name in in_order(names):
        for number, found in finished.done.items():
            for figure, values in found.get(name, {}).items():
                of_row = together.setdefault(name, {})
                of_row.setdefault(figure, np.full(count, np.nan, np.float32))
                of_row[figure][places[number]] = values
    return together


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
