"""Training a tagging and detection net on weak labels, from top to bottom."""

import os

import jax
import numpy as np
from ml_collections import ConfigDict

from uss_jax.data.pipeline import batches
from uss_jax.errors import UserError
from uss_jax.models.tagging import TaggingNet
from uss_jax.training import nets, run
from uss_jax.training.checkpoints import Checkpoints
from uss_jax.training.loop import fit
from uss_jax.training.mesh import make_mesh, on_all_devices
from uss_jax.training.metrics import MetricsWriter
from uss_jax.training.optim import OPTIMIZERS, make_schedule
from uss_jax.training.state import create_state, parameter_count
from uss_jax.training.step import make_tagging_step


def train_tagger(config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Trains until `config.total_steps`, resuming what the workdir holds.

    The workdir can then be used as a bundle with a detector and a query net, which share the
    trained parameters.

    Args:
      config: see configs/tagger_cnn14.py and tagger_htsat.py, where every key is said.
      workdir: config, checkpoints and metrics go there.

    Raises:
      UserError: what would fail later, said before the first step.
    """
    # Devices and records. Mixup blends two clips into one, so twice the batch is read.
    mesh = make_mesh()
    run.check_division(config.global_batch)
    workdir = run.open_workdir(workdir)
    records = run.open_records(config.data, config.sample_rate, config.seed)
    clips_per_step = config.global_batch * (1 if config.mixup_alpha is None else 2)

    # The net and its optimiser.
    tagger = nets.build_sed({**config.tagger, "sample_rate": config.sample_rate})
    _check_outputs(config, tagger)
    key = jax.random.key(config.seed)
    variables = nets.init_tagger(tagger, key)
    if config.optimizer not in OPTIMIZERS:
        raise UserError(
            f"config.optimizer is {config.optimizer!r}, expected {' or '.join(OPTIMIZERS)}"
        )
    schedule = make_schedule(**config.schedule)
    optimizer = OPTIMIZERS[config.optimizer](schedule, config.weight_decay)
    state = create_state(
        {"tagger": variables["params"]}, {"tagger": variables["batch_stats"]}, optimizer
    )
    print(
        f"tagger of {parameter_count(state.params) / 1e6:.1f} M parameters, "
        f"{len(records.index)} clips, global batch {config.global_batch} on "
        f"{jax.device_count()} devices ({jax.devices()[0].device_kind})"
    )

    # One step as a pure function, and where the run stands.
    step = make_tagging_step(
        tagger,
        optimizer,
        outputs=tuple(config.outputs),
        mixup_alpha=config.mixup_alpha,
        spec_augment_stripes=config.spec_augment and config.spec_augment.to_dict(),
    )
    position = {
        "seed": config.seed,
        "global_batch": config.global_batch,
        "index_digest": records.index.digest,
    }
    with Checkpoints(workdir / "checkpoints", config.keep_checkpoints) as checkpoints:
        state = run.resume(checkpoints, on_all_devices(state, mesh), position)
        model = {"model": nets.fields_of(tagger)}
        run.write_config(workdir, "tagger", config, {"sed": model, "query": model})

        # The loop.
        start = int(state.step)
        feed = batches(
            records.reader,
            records.order,
            start_step=start,
            stop_step=config.total_steps,
            batch_size=clips_per_step,
            clip_samples=round(config.data.clip_seconds * config.sample_rate),
            host=jax.process_index(),
            hosts=jax.process_count(),
            threads=config.data.threads,
            labels=True,
        )
        with MetricsWriter(workdir, start, config.total_steps, "train-tagger") as writer:
            fit(
                step,
                state,
                {},
                feed,
                key=on_all_devices(key, mesh),
                mesh=mesh,
                total_steps=config.total_steps,
                checkpoints=checkpoints,
                position=lambda done: {**position, "examples_seen": done * clips_per_step},
                writer=writer,
                log_every_steps=config.log_every_steps,
                checkpoint_every_steps=config.checkpoint_every_steps,
            )


def _check_outputs(config: ConfigDict, tagger: TaggingNet) -> None:
    second = np.zeros((1, tagger.sample_rate), np.float32)
    given, _ = jax.eval_shape(tagger.init_with_output, jax.random.key(0), second)
    known = [name for name, value in given.items() if value.shape == (1, tagger.classes)]
    if not config.outputs or set(config.outputs) - set(known):
        raise UserError(
            f"config.outputs is {tuple(config.outputs)}; probabilities of a clip that this net "
            f"gives are {', '.join(known)}"
        )
