"""Trains a tagging and detection net on weak labels, from top to bottom."""

import os

import jax
import numpy as np
from ml_collections import ConfigDict

from uss_jax.bundles import nets
from uss_jax.devices.mesh import make_mesh
from uss_jax.devices.precision import at_precision
from uss_jax.errors import UserError
from uss_jax.models.norm import MOMENTUM
from uss_jax.models.tagging import TaggingNet
from uss_jax.training import run
from uss_jax.training.optim import OPTIMIZERS, clipped, make_schedule
from uss_jax.training.state import TrainState, create_state
from uss_jax.training.tagging_step import make_tagging_step

# Needed in a tagger's config besides the keys of every run.
_KEYS = ("optimizer", "tagger", "tagger.dtype", "outputs", "mixup_alpha", "spec_augment")
_KEYS += ("noise", "speed", "weight_decay")


def train_tagger(config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Trains a tagging net until `config.total_steps`, resuming the workdir's run if it has one.

    The workdir can then serve as a bundle, whose detector and query net share the trained
    parameters.

    Args:
      config: training config; configs/tagger_cnn14.py and tagger_htsat.py document every key.
      workdir: folder for config, checkpoints and metrics.

    Raises:
      UserError: config, records or workdir are unusable; checked before the first step.
    """
    # Devices, optimiser and records. Mixup blends pairs of clips, so twice the batch is read.
    mesh = make_mesh()
    remedy = "give a tagger's config, such as tagger_cnn14 or quickstart:part=tagger"
    run.check(config, _KEYS, f"{remedy} (`train` takes those of separators)")
    if config.optimizer not in OPTIMIZERS:
        raise UserError(
            f"config.optimizer is {config.optimizer!r}, expected {' or '.join(OPTIMIZERS)}"
        )
    schedule = make_schedule(**config.schedule)
    optimizer = clipped(
        OPTIMIZERS[config.optimizer](schedule, config.weight_decay), config.get("clip_norm", 0.0)
    )
    records = run.open_records(config.data, config.sample_rate, config.seed)
    clips_per_step = config.global_batch * (1 if config.mixup_alpha is None else 2)

    # The net.
    tagger = nets.build_sed({**config.tagger, "sample_rate": config.sample_rate})
    nets.require_classes(tagger, "config.tagger")
    _check_outputs(config, tagger)
    key = jax.random.key(config.seed)

    def fresh(key: jax.Array) -> TrainState:
        variables = nets.init(tagger, key)
        return create_state(
            {"tagger": variables["params"]}, {"tagger": variables["batch_stats"]}, optimizer
        )

    # One step as a pure function.
    step = make_tagging_step(
        tagger.clone(norm_momentum=config.get("norm_momentum", MOMENTUM)),
        optimizer,
        outputs=tuple(config.outputs),
        mixup_alpha=config.mixup_alpha,
        spec_augment_stripes=config.spec_augment and config.spec_augment.to_dict(),
        noise=config.noise and config.noise.to_dict(),
        speed=config.speed and config.speed.to_dict(),
        max_norm_ratio=run.max_norm_ratio_of(config),
    )
    step = at_precision(run.precision_of(config), step)

    # The training loop, from the last checkpoint if there is one.
    model = {"model": nets.fields_of(tagger)}
    with run.open_workdir(workdir) as held:
        run.train_on(
            records,
            step,
            fresh,
            (key,),
            {},
            config=config,
            workdir=held,
            mesh=mesh,
            key=key,
            kind="tagger",
            nets={"sed": model, "query": model},
            clips_per_step=clips_per_step,
            learning_rate=schedule,
            dtype=config.tagger.dtype,
            labels=True,
        )


def _check_outputs(config: ConfigDict, tagger: TaggingNet) -> None:
    second = np.zeros((1, tagger.sample_rate), np.float32)
    given, _ = jax.eval_shape(tagger.init_with_output, jax.random.key(0), second)
    known = [name for name, value in given.items() if value.shape == (1, tagger.classes)]
    if not config.outputs or set(config.outputs) - set(known):
        raise UserError(
            f"config.outputs is {tuple(config.outputs)}, expected one or more of this net's clip "
            f"probabilities: {', '.join(known)}"
        )
