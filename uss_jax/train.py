"""Training a separator, from top to bottom: `uss-jax train` = `python -m uss_jax.train`."""

import os
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict

from uss_jax.data.pipeline import batches
from uss_jax.errors import UserError
from uss_jax.models.query import QueryNet
from uss_jax.models.tagging import TaggingNet
from uss_jax.training import nets, run
from uss_jax.training.bundle import Bundle, read_bundle
from uss_jax.training.checkpoints import Checkpoints, save_tree
from uss_jax.training.loop import fit
from uss_jax.training.losses import LOSSES
from uss_jax.training.mesh import make_mesh, on_all_devices
from uss_jax.training.metrics import MetricsWriter
from uss_jax.training.optim import adamw_amsgrad, make_schedule
from uss_jax.training.state import create_state, parameter_count
from uss_jax.training.step import make_separation_step


def train(config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Trains until `config.total_steps`, resuming what the workdir holds.

    Args:
      config: see configs/resunet30.py, where every key is said.
      workdir: config, frozen nets, checkpoints and metrics go there.

    Raises:
      UserError: what would fail later, said before the first step.
    """
    # Devices and records.
    mesh = make_mesh()
    run.check_division(config.global_batch, config.mixing.group_size)
    if config.loss not in LOSSES:
        raise UserError(f"config.loss is {config.loss!r}, expected {' or '.join(LOSSES)}")
    workdir = run.open_workdir(workdir)
    records = run.open_records(config.data, config.sample_rate, config.seed)

    # The nets that find anchors and make conditions, and the separator that they serve.
    sed, query, frozen, trained_query = _condition_nets(config, workdir)
    separator = nets.build_separator(
        {**config.separator, "condition_width": nets.condition_width(query)}
    )
    key = jax.random.key(config.seed)
    variables = nets.init_separator(separator, key)
    schedule = make_schedule(**config.schedule)
    optimizer = adamw_amsgrad(schedule, config.weight_decay)
    state = create_state(
        {"separator": variables["params"], "query": trained_query["params"]},
        {"separator": variables["batch_stats"], "query": trained_query["batch_stats"]},
        optimizer,
    )
    print(
        f"separator of {parameter_count(state.params) / 1e6:.1f} M parameters, "
        f"{len(records.index)} clips, global batch {config.global_batch} on "
        f"{jax.device_count()} devices ({jax.devices()[0].device_kind})"
    )

    # One step as a pure function, and where the run stands.
    step = make_separation_step(
        separator,
        query,
        sed,
        optimizer,
        LOSSES[config.loss],
        segment_samples=round(config.segment_seconds * config.sample_rate),
        sources=config.mixing.sources,
        group_size=config.mixing.group_size,
        match_energy=config.mixing.match_energy,
        min_dbfs=config.anchors.min_dbfs,
    )
    position = {
        "seed": config.seed,
        "global_batch": config.global_batch,
        "index_digest": records.index.digest,
    }
    with Checkpoints(workdir / "checkpoints", config.keep_checkpoints) as checkpoints:
        state = run.resume(checkpoints, on_all_devices(state, mesh), position)
        sections = {
            "separator": nets.fields_of(separator),
            "query": {**config.query, "model": _fields(query.tagger)},
            "sed": {"model": _fields(sed)},
        }
        if sed is None:
            del sections["sed"]
        run.write_config(workdir, "separator", config, sections)

        # The loop.
        start = int(state.step)
        feed = batches(
            records.reader,
            records.order,
            start_step=start,
            stop_step=config.total_steps,
            batch_size=config.global_batch,
            clip_samples=round(config.data.clip_seconds * config.sample_rate),
            host=jax.process_index(),
            hosts=jax.process_count(),
            threads=config.data.threads,
        )
        with MetricsWriter(workdir, start, config.total_steps, "train") as writer:
            fit(
                step,
                state,
                on_all_devices(frozen, mesh),
                feed,
                key=on_all_devices(key, mesh),
                mesh=mesh,
                total_steps=config.total_steps,
                checkpoints=checkpoints,
                position=lambda done: {**position, "examples_seen": done * config.global_batch},
                writer=writer,
                log_every_steps=config.log_every_steps,
                checkpoint_every_steps=config.checkpoint_every_steps,
            )


def _condition_nets(
    config: ConfigDict, workdir: pathlib.Path
) -> tuple[TaggingNet | None, QueryNet, dict[str, Any], dict[str, Any]]:
    """The detector, the query net, the variables that stay and the query's that train.

    At the first start the frozen nets are copied into the workdir; a resumed run uses the copies,
    whatever has become of the bundles.
    """
    source = config.anchors.source
    if source not in ("device", "random"):
        raise UserError(f"config.anchors.source is {source!r}, expected device or random")
    sed, frozen = None, {}
    if source == "device":
        bundle = _source_bundle(config, workdir, "sed")
        _check_net(bundle, "sed", config)
        sed, frozen["sed"] = bundle.sed()
        _keep(workdir, "sed", frozen["sed"])
        _check_rate(sed.sample_rate, config, "sed_bundle")

    model, tagger = None, {"params": {}, "batch_stats": {}}
    if config.query.kind != "one_hot":
        bundle = _source_bundle(config, workdir, "query")
        _check_net(bundle, "query", config)
        model = bundle.config["query"]["model"]
        tagger = bundle.variables("query")
        _keep(workdir, "query", tagger)
    query = nets.build_query({**config.query}, model)
    if model is not None:
        _check_rate(query.tagger.sample_rate, config, "query_bundle")
        tagger = {item: {"tagger": tagger[item]} for item in tagger}

    trained = {"params": {}, "batch_stats": {}}
    if query.finetune:
        tagger, trained = trained, tagger
    if query.adaptor_width:
        trained["params"]["adaptor"] = nets.init_adaptor(query, jax.random.key(config.seed))
    return sed, query, {**frozen, "query": tagger}, trained


def _source_bundle(config: ConfigDict, workdir: pathlib.Path, part: str) -> Bundle:
    if (workdir / "frozen" / part).is_dir():
        return read_bundle(workdir)
    location = config[f"{part}_bundle"]
    if not location:
        raise UserError(
            f"config.{part}_bundle is empty; give a tagger's bundle or workdir "
            "(`uss-jax convert` and `uss-jax train-tagger` make them)"
        )
    return read_bundle(location)


def _keep(workdir: pathlib.Path, part: str, variables: dict[str, Any]) -> None:
    if not (workdir / "frozen" / part).is_dir():
        save_tree(workdir / "frozen" / part, variables)


def _check_net(bundle: Bundle, part: str, config: ConfigDict) -> None:
    model = bundle.config.get(part, {}).get("model")
    if model is None:
        raise UserError(f"config.{part}_bundle: {bundle.path} holds no {part} net")
    found, wanted = nets.net_name(model), config[f"{part}_net"]
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


def _fields(net: Any) -> dict[str, Any] | None:
    return None if net is None else nets.fields_of(net)


if __name__ == "__main__":
    import sys

    from uss_jax.cli.main import main

    sys.exit(main(["train", *sys.argv[1:]]))
