"""Trains a separator, from top to bottom."""

import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from uss_jax.anchors.detect import RULES, image_of_rule
from uss_jax.anchors.table import AnchorTable
from uss_jax.bundles import nets
from uss_jax.bundles.bundle import Bundle, net_hash, read_bundle
from uss_jax.bundles.checkpoints import latest_step, save_tree
from uss_jax.devices.mesh import check_rules, make_mesh, replicated, shapes
from uss_jax.devices.precision import at_precision
from uss_jax.errors import UserError
from uss_jax.evaluation.suites.pairs import find_pairs
from uss_jax.models.norm import SCOPES
from uss_jax.models.query import KINDS, QueryNet
from uss_jax.models.separator import SeparatorNet
from uss_jax.models.tagging import TaggingNet
from uss_jax.training import run
from uss_jax.training.examples import Mixing
from uss_jax.training.live import make_evaluation, workdir_averages
from uss_jax.training.loop import Evaluate
from uss_jax.training.losses import LOSSES
from uss_jax.training.optim import adamw_amsgrad, clipped, make_schedule
from uss_jax.training.plan import clip_batch, describe
from uss_jax.training.separation_step import Anchoring, Nets, Updating, make_separation_step
from uss_jax.training.state import TrainState, create_state
from uss_jax.training.step import Step


def train_separator(config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Trains a separator until `config.total_steps`, resuming the workdir's run if it has one.

    Args:
      config: training config; configs/resunet30.py documents every key.
      workdir: folder for config, frozen nets, checkpoints and metrics.

    Raises:
      UserError: config, records, nets or workdir are unusable; checked before the first step.
    """
    mesh = make_mesh()
    _check(config)
    with run.open_workdir(workdir) as held:
        _train(config, held, mesh)


def _train(config: ConfigDict, workdir: pathlib.Path, mesh: Mesh) -> None:
    # Optimiser and records.
    optimizer, schedule = _optimizer(config)
    segment_samples = round(config.segment_seconds * config.sample_rate)
    records = run.open_records(
        config.data,
        config.sample_rate,
        config.seed,
        anchors=config.anchors,
        mixing=config.mixing,
        segment_samples=segment_samples,
    )

    # The detector, the query net and the separator.
    sed, query, frozen, trained_query = _condition_nets(config, workdir)
    step_sed = sed
    if records.places is not None:  # the detector ran when the table was mined
        step_sed = None
        _require_its_detector(records.places.table, frozen.pop("sed", None), config)
    separator = nets.build_separator({**config.separator, "condition_width": query.width})
    key = jax.random.key(config.seed)
    fresh = functools.partial(_fresh_state, separator, optimizer, config.ema_decay > 0)

    # One step as a pure function.
    if config.accumulate > 1 and config.batch_norm == "global":
        part = config.global_batch // config.accumulate
        run.say(
            f"batch norms use the statistics of {part} items, not of the whole batch: "
            f"config.accumulate={config.accumulate}"
        )
    step = _step(config, separator, query, step_sed, optimizer, mesh)

    # Periodic evaluation on pairs.
    pairs = find_pairs(config.eval.pairs) if config.eval.pairs else []

    def evaluation(frozen: Any) -> Evaluate:
        averages = None
        if sed is not None and query.takes.recordings and not trained_query["params"]:
            averages = workdir_averages(workdir, config.data.records, config.data.split, pairs)
        run.say(
            f"evaluating {len(pairs)} pairs every {config.eval.every_steps} steps, with the "
            f"conditions of their sources{' and with class averages' if averages else ''}"
        )
        return make_evaluation(
            separator,
            query,
            frozen,
            pairs,
            averages,
            mesh=mesh,
            sample_rate=config.sample_rate,
            batch_size=config.global_batch,
            threads=config.data.threads,
        )

    # The training loop, from the last checkpoint if there is one.
    sections = {
        "separator": nets.fields_of(separator),
        "query": {**config.query, "model": query.tagger and nets.fields_of(query.tagger)},
    }
    if sed is not None:
        sections["sed"] = {"model": nets.fields_of(sed)}
    run.train_on(
        records,
        step,
        fresh,
        (key, trained_query),
        frozen,
        config=config,
        workdir=workdir,
        mesh=mesh,
        key=key,
        kind="separator",
        nets=sections,
        clips_per_step=config.global_batch,
        learning_rate=schedule,
        dtype=config.separator.dtype,
        counted=_step(config, separator, query, step_sed, optimizer, mesh, remat=False),
        evaluation=evaluation if pairs else None,
    )


def dry_run(config: ConfigDict) -> list[str]:
    """Compiles a config's training step for the available devices, without data or workdir.

    A net without a bundle gets the published architecture named by `sed_net` or `query_net`.

    Returns:
      Lines that report mesh, parameters, FLOPs, memory and input size.
    """
    mesh = make_mesh()
    _check(config)
    optimizer, _ = _optimizer(config)
    sed, query, frozen, trained = _shapes_of_condition_nets(config)
    separator = nets.build_separator({**config.separator, "condition_width": query.width})
    fresh = functools.partial(_fresh_state, separator, optimizer, config.ema_decay > 0)
    key = jax.random.key(config.seed)
    state = shapes(fresh, key, trained, rules=config.sharding, mesh=mesh)
    from_table = config.anchors.source == "table"
    seconds = config.segment_seconds if from_table else config.data.clip_seconds
    samples = round(seconds * config.sample_rate)
    return describe(
        _step(config, separator, query, sed, optimizer, mesh),
        state,
        frozen,
        clip_batch(config.global_batch, samples, from_table=from_table),
        counted=_step(config, separator, query, sed, optimizer, mesh, remat=False),
        mesh=mesh,
    )


def _fresh_state(
    separator: SeparatorNet,
    optimizer: optax.GradientTransformation,
    ema: bool,
    key: jax.Array,
    trained_query: dict[str, Any],
) -> TrainState:
    """Returns the initial state; `trained_query` holds the query net's trainable variables."""
    variables = nets.init(separator, key)
    return create_state(
        {"separator": variables["params"], "query": trained_query["params"]},
        {"separator": variables["batch_stats"], "query": trained_query["batch_stats"]},
        optimizer,
        ema=ema,
    )


def _optimizer(
    config: ConfigDict,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimiser and its learning-rate schedule."""
    schedule = make_schedule(**config.schedule)
    return clipped(adamw_amsgrad(schedule, config.weight_decay), config.clip_norm), schedule


def _step(
    config: ConfigDict,
    separator: SeparatorNet,
    query: QueryNet,
    sed: TaggingNet | None,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    remat: bool | None = None,
) -> Step:
    """Returns the training step; `remat` overrides the config's."""
    remat = config.remat if remat is None else remat
    sharded = {}
    if config.sharding:
        whole = functools.partial(jax.lax.with_sharding_constraint, shardings=replicated(mesh))
        sharded["gather"] = whole
    image = image_of_rule(
        run.anchor_rule_of(config),
        sed,
        round(config.data.clip_seconds * config.sample_rate),
        "config.anchors.rule",
    )
    known = {field.name for field in dataclasses.fields(Mixing)}
    step = make_separation_step(
        Nets(separator.for_training(_norm_scope(config), remat), query, sed),
        optimizer,
        LOSSES[config.loss],
        Anchoring(
            segment_samples=round(config.segment_seconds * config.sample_rate),
            min_dbfs=config.anchors.min_dbfs,
            image=image,
            speed=config.speed and config.speed.to_dict(),
        ),
        Mixing(**{k: v for k, v in config.mixing.items() if k in known}),
        Updating(config.accumulate, config.ema_decay, run.max_norm_ratio_of(config), **sharded),
    )
    return at_precision(run.precision_of(config), step)


def _norm_scope(config: ConfigDict) -> str | int:
    """Returns the scope of batch norms: one of SCOPES, or a number of items."""
    if config.batch_norm in SCOPES:
        return config.batch_norm
    part = config.global_batch // config.accumulate
    items = int(config.batch_norm) if config.batch_norm.isdigit() else 0
    if not items or part % items:
        raise UserError(
            f"config.batch_norm is {config.batch_norm!r}, expected {', '.join(SCOPES)} or a number "
            f"of items that divides {part}"
        )
    return items


# Needed in every separator's config besides the keys of every run.
_KEYS = (
    *("loss", "speed", "weight_decay", "clip_norm", "ema_decay", "accumulate", "batch_norm"),
    *("remat", "sharding", "anchors.source", "anchors.min_dbfs", "data.verify"),
    *("mixing.sources", "mixing.group_size", "mixing.match_energy", "mixing.order"),
    *("mixing.all_targets", "mixing.silent_share", "query.kind", "query.dropout"),
    *("separator.audio_channels", "separator.dtype", "eval.pairs"),
)


def _check(config: ConfigDict) -> None:
    remedy = "give a separator's config, such as resunet30 (`train-tagger` takes those of taggers)"
    run.check(config, _KEYS, remedy)
    for key, value, allowed in (
        ("loss", config.loss, LOSSES),
        ("anchors.source", config.anchors.source, ("device", "table", "random")),
        ("mixing.order", config.mixing.order, ("reference", "conflict_free")),
        ("data.verify", config.data.verify, ("whole", "always")),
        ("query.kind", config.query.kind, KINDS),
        ("separator.audio_channels", config.separator.audio_channels, (1,)),  # records are mono
    ):
        if value not in allowed:
            expected = " or ".join(map(str, allowed))
            raise UserError(f"config.{key} is {value!r}, expected {expected}")
    if config.eval.pairs and config.eval.every_steps < 1:
        raise UserError(
            f"config.eval.every_steps is {config.eval.every_steps}, expected at least 1"
        )
    rule = run.anchor_rule_of(config)
    if config.anchors.source != "device" and rule != RULES[0]:
        raise UserError(
            f"config.anchors.rule={rule} has no effect with config.anchors.source="
            f"{config.anchors.source}; leave it at {RULES[0]} (`mine --rule` sets that of a table)"
        )
    _norm_scope(config)
    check_rules(config.sharding)
    mixing = config.mixing
    if mixing.all_targets and mixing.group_size % mixing.sources:
        raise UserError(
            f"config.mixing.all_targets needs config.mixing.group_size={mixing.group_size} to be a "
            f"multiple of config.mixing.sources={mixing.sources}"
        )
    for key, share in (
        ("mixing.silent_share", mixing.silent_share),
        ("ema_decay", config.ema_decay),
        ("query.dropout", config.query.dropout),
    ):
        if not 0 <= share < 1:
            raise UserError(f"config.{key} is {share}, expected at least 0 and below 1")
    if mixing.silent_share and mixing.sources >= mixing.group_size:
        raise UserError(
            f"config.mixing.silent_share={mixing.silent_share} needs a config.mixing.group_size "
            f"above config.mixing.sources={mixing.sources}: a silent item is queried with "
            "a sound of its group that is outside its mixture"
        )
    if not 1 <= config.mixing.sources <= config.mixing.group_size:
        raise UserError(
            f"config.mixing.sources={config.mixing.sources} is not between 1 and "
            f"config.mixing.group_size={config.mixing.group_size}; change one of them"
        )


def _condition_nets(
    config: ConfigDict, workdir: pathlib.Path
) -> tuple[TaggingNet | None, QueryNet, dict[str, Any], dict[str, Any]]:
    """Returns detector, query net, frozen variables and the query net's trainable variables.

    A new run copies the frozen nets into the workdir. A run with a checkpoint reads these copies,
    so the bundles may have changed since.
    """
    sed, frozen = None, {}
    # With an anchor table the detector is only stored, so that the workdir is a complete bundle.
    given = config.anchors.source == "table" and config.sed_bundle
    if config.anchors.source == "device" or given:
        sed, frozen["sed"] = _source_bundle(config, workdir, "sed").sed()
        _check_net(sed, "sed", config)
        _check_rate(sed.sample_rate, config, "sed_bundle")
        _keep(workdir, "sed", frozen["sed"])

    model, tagger = None, {"params": {}, "batch_stats": {}}
    if KINDS[config.query.kind].recordings:
        bundle = _source_bundle(config, workdir, "query")
        source, variables = bundle.query()
        if source.tagger is None:
            raise UserError(f"{bundle.path} has no tagging net: its conditions are one_hot")
        _check_net(source.tagger, "query", config)
        model = nets.fields_of(source.tagger)
        _check_rate(source.tagger.sample_rate, config, "query_bundle")
        tagger = {item: {"tagger": variables[item]["tagger"]} for item in variables}
    query = nets.build_query({**config.query}, model)

    trained = {"params": {}, "batch_stats": {}}
    if query.finetune:
        tagger, trained = trained, tagger
    elif model is not None:
        _keep(workdir, "query", {item: tagger[item]["tagger"] for item in tagger})
    if query.adaptor_width:
        trained["params"]["adaptor"] = nets.init_adaptor(query, jax.random.key(config.seed))
    return sed, query, {**frozen, "query": tagger}, trained


def _shapes_of_condition_nets(
    config: ConfigDict,
) -> tuple[TaggingNet | None, QueryNet, dict[str, Any], dict[str, Any]]:
    """Returns what `_condition_nets` returns, with shapes instead of arrays."""

    def model(part: str) -> dict[str, Any]:
        location = config[f"{part}_bundle"]
        if location:
            return read_bundle(location).config[part]["model"]
        return {"net": config[f"{part}_net"], "sample_rate": config.sample_rate}

    sed, frozen = None, {}
    if config.anchors.source == "device":
        sed = nets.build_sed(model("sed"))
        frozen["sed"] = nets.layout(sed)
    has_tagger = KINDS[config.query.kind].recordings
    query = nets.build_query({**config.query}, model("query") if has_tagger else None)
    tagger, trained = ({"params": {}, "batch_stats": {}} for _ in range(2))
    if has_tagger:
        tagger = {name: {"tagger": tree} for name, tree in nets.layout(query.tagger).items()}
    if query.finetune:
        tagger, trained = trained, tagger
    if query.adaptor_width:
        adaptor = functools.partial(nets.init_adaptor, query)
        trained["params"]["adaptor"] = jax.eval_shape(adaptor, jax.random.key(0))
    return sed, query, {**frozen, "query": tagger}, trained


def _require_its_detector(table: AnchorTable, sed: Any, config: ConfigDict) -> None:
    if sed is not None and net_hash(sed) != table.header["sed_hash"]:
        raise UserError(
            f"{config.anchors.table} was mined with another detector than config.sed_bundle="
            f"{config.sed_bundle}; mine again with this one, or set config.sed_bundle to that one"
        )


def _source_bundle(config: ConfigDict, workdir: pathlib.Path, part: str) -> Bundle:
    if latest_step(workdir / "checkpoints") is not None:
        bundle = read_bundle(workdir)
        if part in bundle.config:
            return bundle
    location = config[f"{part}_bundle"]
    if not location:
        raise UserError(
            f"config.{part}_bundle is empty; give a tagger's bundle or workdir "
            "(`uss-jax convert` and `uss-jax train-tagger` make them)"
        )
    return read_bundle(location)


def _keep(workdir: pathlib.Path, part: str, variables: dict[str, Any]) -> None:
    if latest_step(workdir / "checkpoints") is None:
        save_tree(workdir / "frozen" / part, variables)


def _check_net(net: TaggingNet, part: str, config: ConfigDict) -> None:
    found, wanted = nets.fields_of(net)["net"], config[f"{part}_net"]
    if found != wanted:
        raise UserError(
            f"config.{part}_bundle holds the net {found}, config.{part}_net is {wanted}; give "
            f"another bundle or --config.{part}_net={found}"
        )


def _check_rate(found: int, config: ConfigDict, name: str) -> None:
    if found != config.sample_rate:
        raise UserError(
            f"config.{name} is a net for {found} Hz, config.sample_rate is {config.sample_rate}"
        )
