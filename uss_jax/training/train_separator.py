"""Trains a separator, from top to bottom."""

import functools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from uss_jax.anchors.detect import image_of_rule
from uss_jax.bundles import nets
from uss_jax.bundles.bundle import read_bundle
from uss_jax.bundles.checkpoints import latest_step
from uss_jax.devices.hosts import require_same, say
from uss_jax.devices.mesh import make_mesh, replicated
from uss_jax.devices.precision import at_precision
from uss_jax.errors import UserError, counted
from uss_jax.evaluation.suites.pairs import Pair, find_pairs
from uss_jax.models.query import KINDS
from uss_jax.models.separator import SeparatorNet
from uss_jax.models.tagging import unknown_classes
from uss_jax.training.condition_nets import ConditionNets, keep_means, load_condition_nets
from uss_jax.training.live import make_evaluation
from uss_jax.training.live_conditions import (
    CLASS,
    MEAN,
    SHUFFLED,
    TEXT,
    Asked,
    other_pairs,
    training_conditions,
)
from uss_jax.training.loop import Evaluate
from uss_jax.training.losses import LOSSES
from uss_jax.training.optim import adamw_amsgrad, clipped, make_schedule
from uss_jax.training.records import open_records
from uss_jax.training.resuming import config_of_hosts
from uss_jax.training.run import Trained, run
from uss_jax.training.separation_step import Anchoring, Nets, Updating, make_separation_step
from uss_jax.training.settings import SeparatorSettings, separator_settings
from uss_jax.training.state import TrainState, create_state
from uss_jax.training.step import Step
from uss_jax.training.texts import Texts, load_texts
from uss_jax.training.workdir import open_workdir


def train_separator(config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Trains a separator until `config.total_steps`, resuming the workdir's run if it has one.

    Args:
      config: training config; configs/resunet30.py documents every key.
      workdir: folder for config, frozen nets, checkpoints and metrics.

    Raises:
      UserError: config, records, nets or workdir are unusable; checked before the first step.
    """
    mesh = make_mesh()
    settings = separator_settings(config)
    require_same(config_of_hosts(config))  # before hosts wait for each other
    with open_workdir(workdir) as held:
        # What it learns from, and the nets around it.
        schedule = make_schedule(**settings.schedule)
        texts = _texts(settings)
        takes = KINDS[settings.query["kind"]]
        new = latest_step(held / "checkpoints") is None
        if new and settings.init_from:  # tell a wrong name before records and vectors are read
            read_bundle(settings.init_from)
        records = open_records(
            *(settings, settings.anchors, settings.mixing, settings.asking, texts),
            weighs=takes.weighs_vectors,
            with_means=takes.probabilities and new,
        )
        table = records.places and records.places.table
        conditions = records.asks and records.asks.conditions
        by_names = texts is not None and not settings.asking.captions
        trains_on = {"trained": records.classes, "by_names": by_names}
        around = load_condition_nets(settings, held, table, conditions, texts, trains_on=trains_on)
        mean = records.asks.mean if takes.probabilities and records.asks else None
        means = keep_means(held, mean)

        # The separator and its step.
        separator = build_separator(settings, around)
        for remark in _remarks(settings, separator, around, records.index.label_class):
            say(remark)
        step = functools.partial(make_step, settings, separator, around, mesh)

        # The run: from its last checkpoint if there is one.
        trained = Trained(
            kind="separator",
            sections={"separator": nets.fields_of(separator), **around.sections(settings), **means},
            step=step(),
            counted=step(remat=False) if settings.remat else None,
            fresh=functools.partial(fresh_state, settings, separator),
            fresh_from=(jax.random.key(settings.seed), around.trained),
            frozen=around.frozen,
            learning_rate=schedule,
            dtype=separator.dtype,
            clips_per_step=settings.global_batch,
            **_evaluation(settings, separator, around, mesh, held),
        )
        run(trained, records, settings, config, held, mesh)


def _remarks(
    settings: SeparatorSettings, separator: SeparatorNet, around: ConditionNets, labels: np.ndarray
) -> Iterator[str]:
    """Yields sentences on what a run does not do as its config or labels may suggest."""
    masked = settings.asking.source.get("masked")
    if masked and (unknown := nets.unknown_among(around.query.tagger, np.unique(labels))):
        yield f"{unknown}; these are asked with the target's own condition instead"
    if around.sed and (arbitrary := nets.arbitrary_anchors(around.sed, labels)):
        yield arbitrary
    if settings.mixing.gain_db and not settings.mixing.match_energy:
        yield "config.mixing.gain_db has no effect with config.mixing.match_energy=False"
    if not hasattr(separator, "norm_scope"):
        if settings.batch_norm != "global":
            yield f"config.batch_norm={settings.batch_norm} has no effect: the net has none"
    elif settings.accumulate > 1 and settings.batch_norm == "global":
        part = settings.global_batch // settings.accumulate
        yield (
            f"batch norms use the statistics of {part} items, not of the whole batch: "
            f"config.accumulate={settings.accumulate}"
        )


def _texts(settings: SeparatorSettings) -> Texts | None:
    """Returns the sentence vectors of what items are asked with, if with texts."""
    takes = KINDS[settings.query["kind"]]
    if not takes.texts:
        return None
    asking = settings.asking
    return load_texts(asking.text_encoder, asking.text_share if takes.recordings else 1.0)


def build_separator(settings: SeparatorSettings, around: ConditionNets) -> SeparatorNet:
    """Builds the separator for the conditions of the query net."""
    return nets.build_separator({**settings.separator, "condition_width": around.query.width})


def make_step(
    settings: SeparatorSettings,
    separator: SeparatorNet,
    around: ConditionNets,
    mesh: Mesh,
    *,
    remat: bool | None = None,
) -> Step:
    """Returns the training step; `remat` overrides the settings'."""
    remat = settings.remat if remat is None else remat
    sharded = {}
    if settings.sharding:
        whole = functools.partial(jax.lax.with_sharding_constraint, shardings=replicated(mesh))
        sharded["gather"] = whole
    image = image_of_rule(
        settings.anchors.rule, around.detector, settings.clip_samples, "config.anchors.rule"
    )
    step = make_separation_step(
        Nets(separator.for_training(settings.norm_scope, remat), around.query, around.detector),
        _optimizer(settings),
        LOSSES[settings.loss],
        Anchoring(settings.segment_samples, settings.anchors.min_dbfs, image, settings.speed),
        settings.mixing,
        Updating(settings.accumulate, settings.ema_decay, settings.max_norm_ratio, **sharded),
    )
    return at_precision(settings.precision, step)


def fresh_state(
    settings: SeparatorSettings,
    separator: SeparatorNet,
    key: jax.Array,
    trained_query: dict[str, Any],
) -> TrainState:
    """Returns the initial state; `trained_query` holds the query net's trainable variables."""
    variables = nets.init(separator, key)
    return create_state(
        {"separator": variables["params"], "query": trained_query["params"]},
        {"separator": variables["batch_stats"], "query": trained_query["batch_stats"]},
        _optimizer(settings),
        ema=settings.ema_decay > 0,
    )


def _optimizer(settings: SeparatorSettings) -> optax.GradientTransformation:
    optimizer = adamw_amsgrad(make_schedule(**settings.schedule), settings.weight_decay)
    return clipped(optimizer, settings.clip_norm)


def _evaluation(
    settings: SeparatorSettings,
    separator: SeparatorNet,
    around: ConditionNets,
    mesh: Mesh,
    workdir: pathlib.Path,
) -> dict[str, Any]:
    """Returns the evaluation on pairs, as arguments of Trained; none if no pairs are given."""
    if not settings.eval.pairs:
        return {}
    pairs = find_pairs(settings.eval.pairs)

    def evaluation(frozen: Any) -> Evaluate:
        require_same({"config.eval.pairs": [_about(pair, settings.sample_rate) for pair in pairs]})
        asked = _asked(settings, around, pairs, workdir)
        names = ", ".join(["sources", *asked.names])
        absent = ", ".join(name for name in settings.eval.queries if name not in asked.names)
        say(
            f"evaluating {counted(len(pairs), 'pair')} every {settings.eval.every_steps} steps, "
            f"asked with: {names}{absent and f'; this run has no {absent} (configs/README.md)'}"
        )
        if settings.eval.every_steps > settings.total_steps:
            say(
                f"config.eval.every_steps={settings.eval.every_steps} is more than "
                f"config.total_steps={settings.total_steps}: this run is never evaluated"
            )
        return make_evaluation(
            separator,
            around.query,
            frozen,
            pairs,
            asked,
            mesh=mesh,
            sample_rate=settings.sample_rate,
            batch_size=settings.global_batch,
            threads=settings.data.threads,
        )

    return {"evaluation": evaluation, "evaluate_every_steps": settings.eval.every_steps}


def _about(pair: Pair, sample_rate: int) -> list[Any]:
    """Returns what identifies a pair on any host."""
    return [pair.mixture.name, pair.class_index, pair.samples(sample_rate)]


def _asked(
    settings: SeparatorSettings,
    around: ConditionNets,
    pairs: Sequence[Pair],
    workdir: pathlib.Path,
) -> Asked:
    """Returns what pairs are asked with, of `config.eval.queries` what this run has."""
    queries, data, vectors = settings.eval.queries, settings.data, {}
    frozen = around.query.takes.recordings and not around.trained["params"]
    if frozen and around.sed is not None:
        vectors = training_conditions(workdir, data.records, data.split, pairs, queries)
    others = None
    if SHUFFLED in queries:
        others = other_pairs(pairs, settings.sample_rate, data.threads)
    takes, known, means = around.query.takes, None, None
    if takes.probabilities:
        lacking = unknown_classes(around.query.tagger)
        known = np.array([pair.class_index not in lacking for pair in pairs])
        means = read_bundle(workdir).means() if MEAN in queries else None
    asked = Asked(
        vectors,
        others,
        known,
        alone=CLASS in queries,
        means=means,
        named=TEXT in queries and takes.texts and takes.recordings,  # else it is the oracle
    )
    if settings.best_query and settings.best_query not in asked.names:
        raise UserError(
            f"config.best_by={settings.best_by} needs conditions of training clips, which this run "
            "has not: they need config.sed_bundle, a query net that does not train, and clips of "
            "the pairs' classes (means of classes: a run that began with config.query.table); "
            "choose sdri"
        )
    return asked
