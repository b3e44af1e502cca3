"""Training a separator, from top to bottom: `uss-jax train` = `python -m uss_jax.train`."""

import os
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict

from uss_jax.anchors.table import AnchorTable
from uss_jax.errors import UserError
from uss_jax.evaluation.live import make_evaluation, workdir_averages
from uss_jax.evaluation.pairs import find_pairs
from uss_jax.models.query import KINDS, QueryNet
from uss_jax.models.tagging import TaggingNet
from uss_jax.training import nets, run
from uss_jax.training.bundle import Bundle, net_hash, read_bundle
from uss_jax.training.checkpoints import latest_step, save_tree
from uss_jax.training.loop import Evaluate
from uss_jax.training.losses import LOSSES
from uss_jax.training.mesh import make_mesh
from uss_jax.training.optim import adamw_amsgrad, make_schedule
from uss_jax.training.state import create_state
from uss_jax.training.step import make_separation_step


def train(config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Trains until `config.total_steps`, resuming what the workdir holds.

    Args:
      config: see configs/resunet30.py, where every key is said.
      workdir: config, frozen nets, checkpoints and metrics go there.

    Raises:
      UserError: what would fail later, said before the first step.
    """
    # Devices, optimiser and records.
    mesh = make_mesh()
    _check(config)
    schedule = make_schedule(**config.schedule)
    optimizer = adamw_amsgrad(schedule, config.weight_decay)
    workdir = run.open_workdir(workdir)
    segment_samples = round(config.segment_seconds * config.sample_rate)
    records = run.open_records(
        config.data,
        config.sample_rate,
        config.seed,
        anchors=config.anchors,
        mixing=config.mixing,
        segment_samples=segment_samples,
    )

    # The nets that find anchors and make conditions, and the separator that they serve.
    sed, query, frozen, trained_query = _condition_nets(config, workdir)
    step_sed = sed
    if records.places is not None:  # the table holds what it found
        step_sed = None
        _require_its_detector(records.places.table, frozen.pop("sed", None), config)
    separator = nets.build_separator(
        {**config.separator, "condition_width": nets.condition_width(query)}
    )
    key = jax.random.key(config.seed)
    variables = nets.init(separator, key)
    state = create_state(
        {"separator": variables["params"], "query": trained_query["params"]},
        {"separator": variables["batch_stats"], "query": trained_query["batch_stats"]},
        optimizer,
    )

    # One step as a pure function.
    step = make_separation_step(
        separator,
        query,
        step_sed,
        optimizer,
        LOSSES[config.loss],
        segment_samples=segment_samples,
        sources=config.mixing.sources,
        group_size=config.mixing.group_size,
        match_energy=config.mixing.match_energy,
        min_dbfs=config.anchors.min_dbfs,
        speed=config.speed and config.speed.to_dict(),
    )

    # Figures of pairs now and then.
    pairs = find_pairs(config.eval.pairs) if config.eval.pairs else []

    def evaluation(frozen: Any) -> Evaluate:
        averages = None
        if sed is not None and config.query.kind != "one_hot" and not trained_query["params"]:
            averages = workdir_averages(workdir, config.data.records, config.data.split, pairs)
        run.say(
            f"{len(pairs)} pairs every {config.eval.every_steps} steps, by the conditions of their "
            f"sources{' and averaged ones' if averages else ''}"
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

    # The loop, from where the run stands.
    sections = {
        "separator": nets.fields_of(separator),
        "query": {**config.query, "model": query.tagger and nets.fields_of(query.tagger)},
    }
    if sed is not None:
        sections["sed"] = {"model": nets.fields_of(sed)}
    run.train_on(
        records,
        step,
        state,
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
        evaluation=evaluation if pairs else None,
    )


def _check(config: ConfigDict) -> None:
    run.check(config, config.mixing.group_size)
    for key, value, allowed in (
        ("loss", config.loss, LOSSES),
        ("anchors.source", config.anchors.source, ("device", "table", "random")),
        ("mixing.order", config.mixing.order, ("reference", "conflict_free")),
        ("data.verify", config.data.verify, ("whole", "always")),
        ("query.kind", config.query.kind, KINDS),
        ("separator.audio_channels", config.separator.audio_channels, (1,)),  # as records have
    ):
        if value not in allowed:
            expected = " or ".join(map(str, allowed))
            raise UserError(f"config.{key} is {value!r}, expected {expected}")
    if config.eval.pairs and config.eval.every_steps < 1:
        raise UserError(
            f"config.eval.every_steps is {config.eval.every_steps}, expected at least 1"
        )
    if not 1 <= config.mixing.sources <= config.mixing.group_size:
        raise UserError(
            f"config.mixing.sources={config.mixing.sources} is not between 1 and "
            f"config.mixing.group_size={config.mixing.group_size}; change one of them"
        )


def _condition_nets(
    config: ConfigDict, workdir: pathlib.Path
) -> tuple[TaggingNet | None, QueryNet, dict[str, Any], dict[str, Any]]:
    """The detector, the query net, the variables that stay and the query's that train.

    At the start the frozen nets are copied into the workdir; once there is a checkpoint, the copies
    are used, whatever has become of the bundles.
    """
    sed, frozen = None, {}
    # With a table the detector only goes into the workdir, for those who use it as a bundle.
    given = config.anchors.source == "table" and config.sed_bundle
    if config.anchors.source == "device" or given:
        sed, frozen["sed"] = _source_bundle(config, workdir, "sed").sed()
        _check_net(sed, "sed", config)
        _check_rate(sed.sample_rate, config, "sed_bundle")
        _keep(workdir, "sed", frozen["sed"])

    model, tagger = None, {"params": {}, "batch_stats": {}}
    if config.query.kind != "one_hot":
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


if __name__ == "__main__":
    import sys

    from uss_jax.cli.main import main

    sys.exit(main(["train", *sys.argv[1:]]))
