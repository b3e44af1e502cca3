"""Evaluates a separator on pairs during training, on all devices of all hosts.

Letters: `n` pairs, `b` batch, `d` width of the condition, `k` classes.
"""

import concurrent.futures
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from uss_jax.bundles.nets import takes_length
from uss_jax.devices.batching import in_batches
from uss_jax.devices.mesh import on_all_devices, replicated, to_devices
from uss_jax.devices.precision import HIGHEST, at_precision
from uss_jax.errors import UserError
from uss_jax.evaluation.items import require_sound
from uss_jax.evaluation.metrics import class_medians, separation_figures
from uss_jax.evaluation.suites.pairs import Pair
from uss_jax.models.query import QueryNet
from uss_jax.models.separator import SeparatorNet, separate
from uss_jax.training.live_conditions import CLASS, MEAN, SHUFFLED, TEXT, Asked
from uss_jax.training.separation_step import query_variables
from uss_jax.training.state import TrainState

_SHOWN = ("sdri", "si_sdri")


def make_evaluation(
    separator: SeparatorNet,
    query: QueryNet,
    frozen: Any,
    pairs: Sequence[Pair],
    asked: Asked,
    *,
    mesh: Mesh,
    sample_rate: int,
    batch_size: int,
    threads: int,
) -> Callable[..., dict[str, float] | None]:
    """Returns a function from a train state to metrics: median within a class, mean over classes.

    Its second argument, if given, is asked before each batch whether to break off; it then returns
    None.

    `sdri` and `si_sdri` (dB) and `l1` (mean absolute error) use the condition of the clean source.
    With the name of another query before them, such as `average_sdri`, they use its condition, over
    the pairs that have one. `half_sdri` is the SDRi of half the mixture, a baseline without a
    model. `seconds` is the time taken. Pairs with a silent source have no SDRi and are left out of
    its medians; `silent` is their number, if any. `not_finite` is the number of pairs with an
    estimate that is NaN or infinite, if any; the metrics of the query that gave it are NaN.

    Args:
      separator, query: the nets.
      frozen: variables of the frozen nets, on the devices.
      pairs: evaluation pairs, all of one length.
      asked: other queries.
      mesh: the devices.
      sample_rate: sampling rate of the nets, in Hz.
      batch_size: pairs per batch over all devices; a multiple of the number of devices.
      threads: number of threads that read files.

    Raises:
      UserError: pairs are not equally long, or too short for the query net.
    """
    # Every host gets the metrics of the whole batch. Computed at highest precision, whatever the
    # precision of training, so that a checkpoint scores the same under `uss-jax evaluate`.
    figures = functools.partial(_figures, separator, query, asked.names)
    jitted = jax.jit(at_precision(HIGHEST, figures), out_shardings=replicated(mesh))
    classes = np.array([pair.class_index for pair in pairs])
    samples = _common_length(pairs, query, sample_rate)
    read = functools.partial(_read, pairs, asked, sample_rate=sample_rate, samples=samples)
    means = None if asked.means is None else on_all_devices(asked.means, mesh)
    mine = jax.process_index(), jax.process_count()

    def evaluate(
        state: TrainState, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        began = time.monotonic()
        parts = []
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for at, _ in in_batches(range(len(pairs)), batch_size):
                if stop():
                    return None
                rows = np.array_split(at, mine[1])[mine[0]]  # this host's
                batch = jax.tree.map(lambda *of: np.stack(of), *pool.map(read, rows.tolist()))
                parts.append(jax.device_get(jitted(state, frozen, means, to_devices(batch, mesh))))
        values = {
            name: np.concatenate([part[name] for part in parts])[: len(pairs)] for name in parts[0]
        }
        return {**_means(values, asked, classes), "seconds": time.monotonic() - began}

    return evaluate


def _common_length(pairs: Sequence[Pair], query: QueryNet, sample_rate: int) -> int:
    """Returns the length of all pairs, in samples.

    Raises:
      UserError: pairs are not equally long, or too short for the query net.
    """
    samples = pairs[0].samples(sample_rate)
    for pair in pairs:
        if (found := pair.samples(sample_rate)) != samples:
            raise UserError(
                f"{pair.mixture} lasts {found / sample_rate:.4g} s, other pairs "
                f"{samples / sample_rate:.4g} s; all config.eval.pairs must be equally long"
            )
    if query.tagger is not None and not takes_length(query.tagger, samples):
        raise UserError(
            f"{pairs[0].mixture} lasts {samples / sample_rate:.3g} s, too short for the query net; "
            "give other config.eval.pairs"
        )
    return samples


def _figures(
    separator: SeparatorNet,
    query: QueryNet,
    asked: Sequence[str],
    state: TrainState,
    frozen: Any,
    means: Float[jax.Array, "k k"] | None,
    batch: dict[str, jax.Array],
) -> dict[str, Float[jax.Array, "b"]]:
    """Computes the metrics of each pair of a batch.

    Metrics of a query are NaN for pairs that it has no condition for.
    """
    variables = {
        "params": state.averaged["separator"],
        "batch_stats": state.batch_stats["separator"],
    }
    mixture, source = batch["mixture"], batch["source"]
    ask = functools.partial(query.apply, query_variables(frozen, state.averaged, state.batch_stats))
    classes = batch["class_index"]

    def condition(name: str) -> Float[jax.Array, "b d"]:
        if name == CLASS:
            return ask(ask(mixture, classes, method="heard"), method="adapt")
        if name == MEAN:
            return ask(ask(mixture, classes, method="heard"), means, method="of_probabilities")
        if name == TEXT:
            return ask(jax.nn.one_hot(classes, query.classes), method="of_classes")
        if name == SHUFFLED:
            other = ask(batch["other_source"], batch["other_class"])
            return jnp.where(batch["other_exists"][:, None], other, jnp.nan)
        return batch[f"asked_{name}"]

    conditions = {"": ask(source, classes)} | {f"{name}_": condition(name) for name in asked}
    figures = {}
    for prefix, of in conditions.items():
        estimate = separate(separator, variables, mixture, of)
        found = separation_figures(source, estimate, mixture)
        figures |= {prefix + name: found[name] for name in _SHOWN}
        figures[f"{prefix}l1"] = jnp.mean(jnp.abs(estimate - source), axis=-1)
    half = separation_figures(source, mixture / 2, mixture)
    return {**figures, "half_sdri": half["sdri"]}


def _read(
    pairs: Sequence[Pair], asked: Asked, row: int, *, sample_rate: int, samples: int
) -> dict[str, np.ndarray]:
    """Reads a pair and what it is asked with."""
    pair = pairs[row]
    read = {side: pair.read(side, sample_rate)[:samples] for side in ("mixture", "source")}
    require_sound(pair.name, **read)
    read["class_index"] = np.int32(pair.class_index)
    read |= {f"asked_{name}": vectors[row] for name, vectors in asked.vectors.items()}
    if asked.others is not None:
        other = pairs[max(int(asked.others[row]), 0)]
        read["other_source"] = other.read("source", sample_rate)[:samples]
        read["other_class"] = np.int32(other.class_index)
        read["other_exists"] = np.bool(asked.others[row] >= 0)
    return read


def _means(
    values: Mapping[str, Float[np.ndarray, " n"]], asked: Asked, classes: np.ndarray
) -> dict[str, float]:
    """Averages metrics over the pairs that have them; counts silent pairs and wrong estimates.

    An estimate that is NaN or infinite is not left out: the average would then be of the pairs that
    suit the model.
    """
    half = values["half_sdri"]  # owes nothing to the model
    heard, wrong = np.isfinite(half), np.zeros(len(half), bool)
    means = {}
    for query in ("", *asked.names):
        exists, prefix = asked.exists(query, len(classes)), query and f"{query}_"
        for name in (*_SHOWN, "l1"):
            of, there = values[prefix + name], exists if name == "l1" else exists & heard
            means[prefix + name] = _mean_of_medians(of[there], classes[there])
            wrong |= there & ~np.isfinite(of)
    means["half_sdri"] = _mean_of_medians(half[heard], classes[heard])
    counts = {"silent": float((~heard).sum()), "not_finite": float(wrong.sum())}
    return means | {name: count for name, count in counts.items() if count}


def _mean_of_medians(values: Float[np.ndarray, " n"], classes: np.ndarray) -> float:
    if not values.size or not np.isfinite(values).all():
        return float("nan")
    return float(np.mean(list(class_medians(values, classes).values())))
