"""Evaluates a separator on pairs during training, on all devices of all hosts.

Letters: `n` pairs, `b` batch, `d` width of the condition.
"""

import concurrent.futures
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from uss_jax.bundles.model import Model
from uss_jax.devices.batching import in_batches
from uss_jax.devices.mesh import replicated, to_devices
from uss_jax.devices.precision import HIGHEST, at_precision
from uss_jax.disk.atomic import replacing
from uss_jax.disk.checked_npz import Column, read_npz
from uss_jax.errors import UserError
from uss_jax.evaluation.averages import class_averages
from uss_jax.evaluation.clips import open_clips
from uss_jax.evaluation.metrics import class_medians, separation_figures
from uss_jax.evaluation.suites.pairs import Pair
from uss_jax.models.query import QueryNet
from uss_jax.models.separator import SeparatorNet, separate
from uss_jax.training.separation_step import query_variables
from uss_jax.training.state import TrainState

# File in the workdir with the averaged conditions of its training clips.
AVERAGES = "class_averages.npz"
_SHOWN = ("sdri", "si_sdri")


def make_evaluation(
    separator: SeparatorNet,
    query: QueryNet,
    frozen: Any,
    pairs: Sequence[Pair],
    averages: dict[int, Float[np.ndarray, " d"]] | None = None,
    *,
    mesh: Mesh,
    sample_rate: int,
    batch_size: int,
    threads: int,
) -> Callable[[TrainState], dict[str, float]]:
    """Returns a function from a train state to metrics: median within a class, mean over classes.

    `sdri` and `si_sdri` (dB) and `l1` (mean absolute error) use the condition of the clean source.
    With the prefix `average_` they use the averaged condition of the class, over the pairs whose
    class has one; with the prefix `class_`, if conditions are made of probabilities, that of the
    class in the mixture, all others zero. `half_sdri` is the SDRi of half the mixture, a baseline
    without a model. `seconds` is the time taken. Pairs with a silent source have no SDRi and are
    left out of its medians; `silent` is their number, if any.

    Args:
      separator, query: the nets.
      frozen: variables of the frozen nets, on the devices.
      pairs: evaluation pairs, all of one length.
      averages: class index -> averaged condition, if available.
      mesh: the devices.
      sample_rate: sampling rate of the nets, in Hz.
      batch_size: pairs per batch over all devices; a multiple of the number of devices.
      threads: number of threads that read files.
    """
    # Every host gets the metrics of the whole batch. Computed at highest precision, whatever the
    # precision of training, so that a checkpoint scores the same under `uss-jax evaluate`.
    figures = functools.partial(_figures, separator, query, bool(averages))
    jitted = jax.jit(at_precision(HIGHEST, figures), out_shardings=replicated(mesh))
    classes = np.array([pair.class_index for pair in pairs])
    samples = pairs[0].samples(sample_rate)
    mine = jax.process_index(), jax.process_count()

    def evaluate(state: TrainState) -> dict[str, float]:
        began = time.monotonic()
        parts = []
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for at, _ in in_batches(range(len(pairs)), batch_size):
                rows = np.array_split(at, mine[1])[mine[0]]  # this host's
                read = functools.partial(_read, sample_rate=sample_rate, samples=samples)
                batch = _stack(list(pool.map(read, (pairs[row] for row in rows))), averages)
                parts.append(jax.device_get(jitted(state, frozen, to_devices(batch, mesh))))
        values = {
            name: np.concatenate([part[name] for part in parts])[: len(pairs)] for name in parts[0]
        }
        means = {name: _mean_of_medians(of, classes) for name, of in values.items()}
        if silent := int(np.isnan(values["half_sdri"]).sum()):
            means["silent"] = silent
        return {**means, "seconds": time.monotonic() - began}

    return evaluate


def _figures(
    separator: SeparatorNet,
    query: QueryNet,
    averaged: bool,
    state: TrainState,
    frozen: Any,
    batch: dict[str, jax.Array],
) -> dict[str, Float[jax.Array, "b"]]:
    """Computes the metrics of each pair of a batch.

    Metrics of the averaged condition are NaN where the class has none.
    """
    variables = {
        "params": state.averaged["separator"],
        "batch_stats": state.batch_stats["separator"],
    }
    mixture, source = batch["mixture"], batch["source"]
    ask = functools.partial(query.apply, query_variables(frozen, state.averaged, state.batch_stats))
    classes = batch["class_index"]
    conditions = {"": ask(source, classes)}
    if averaged:
        conditions["average_"] = batch["average"]
    if query.takes.probabilities:
        none, every = jnp.zeros((*classes.shape, query.classes)), jnp.ones(classes.shape, bool)
        conditions["class_"] = ask(source, classes, vector=none, masked=(every, mixture))
    figures = {}
    for prefix, condition in conditions.items():
        estimate = separate(separator, variables, mixture, condition)
        found = separation_figures(source, estimate, mixture)
        figures |= {prefix + name: found[name] for name in _SHOWN}
        figures[f"{prefix}l1"] = jnp.mean(jnp.abs(estimate - source), axis=-1)
    half = separation_figures(source, mixture / 2, mixture)
    return {**figures, "half_sdri": half["sdri"]}


def _read(pair: Pair, *, sample_rate: int, samples: int) -> tuple[Pair, np.ndarray, np.ndarray]:
    found = pair.samples(sample_rate)
    if found != samples:
        raise UserError(
            f"{pair.mixture} lasts {found / sample_rate:.4g} s, other pairs "
            f"{samples / sample_rate:.4g} s; all config.eval.pairs must be equally long"
        )
    mixture, source = (pair.read(side, sample_rate)[:samples] for side in ("mixture", "source"))
    return pair, mixture, source


def _stack(
    read: list[tuple[Pair, np.ndarray, np.ndarray]],
    averages: dict[int, Float[np.ndarray, " d"]] | None,
) -> dict[str, np.ndarray]:
    batch = {
        "mixture": np.stack([mixture for _, mixture, _ in read]),
        "source": np.stack([source for _, _, source in read]),
        "class_index": np.array([pair.class_index for pair, _, _ in read], np.int32),
    }
    if averages:
        none = np.full(len(next(iter(averages.values()))), np.nan, np.float32)
        batch["average"] = np.stack([averages.get(pair.class_index, none) for pair, _, _ in read])
    return batch


def _mean_of_medians(values: Float[np.ndarray, " n"], classes: np.ndarray) -> float:
    there = np.isfinite(values)
    if not there.any():
        return float("nan")
    return float(np.mean(list(class_medians(values[there], classes[there]).values())))


def workdir_averages(
    workdir: pathlib.Path, records: str, split: str, pairs: Sequence[Pair]
) -> dict[int, Float[np.ndarray, " d"]]:
    """Averages the conditions of training clips for each class of the pairs.

    Computed once and cached in the workdir: the nets that compute conditions must be frozen.

    Args:
      workdir: workdir with config and frozen nets.
      records: folder of the training records.
      split: split of the records.
      pairs: pairs whose classes need an average.

    Raises:
      UserError: the cached file cannot be read.
    """
    path = workdir / AVERAGES
    if not path.exists():
        model = Model(workdir)
        classes = sorted({pair.class_index for pair in pairs})
        found = class_averages(model, open_clips(records, split, model)[0], classes)
        with replacing(path) as temporary:
            vectors = list(found.values()) or np.zeros((0, 0), np.float32)
            np.savez(temporary, classes=np.array(list(found), np.int64), vectors=vectors)
    try:
        with open(path, "rb") as file:
            stored = read_npz(file, {"classes": Column("i8", "n"), "vectors": Column("f4", "n d")})
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); remove it to have it computed again"
        ) from error
    return dict(zip(stored["classes"].tolist(), stored["vectors"], strict=True))
