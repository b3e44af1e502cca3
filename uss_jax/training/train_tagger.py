"""Trains a tagging and detection net on weak labels, from top to bottom."""

import os

import jax
from ml_collections import ConfigDict

from uss_jax.bundles import nets
from uss_jax.devices.hosts import require_same
from uss_jax.devices.mesh import make_mesh
from uss_jax.devices.precision import at_precision
from uss_jax.errors import UserError
from uss_jax.models.tagging import TaggingNet, at_momentum
from uss_jax.training.optim import OPTIMIZERS, clipped, make_schedule
from uss_jax.training.records import open_records
from uss_jax.training.resuming import config_of_hosts
from uss_jax.training.run import Trained, run
from uss_jax.training.settings import TaggerSettings, tagger_settings
from uss_jax.training.state import TrainState, create_state
from uss_jax.training.tagging_step import make_tagging_step
from uss_jax.training.workdir import open_workdir


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
    mesh = make_mesh()
    settings = tagger_settings(config)
    require_same(config_of_hosts(config))
    schedule = make_schedule(**settings.schedule)
    optimizer = OPTIMIZERS[settings.optimizer](schedule, settings.weight_decay)
    optimizer = clipped(optimizer, settings.clip_norm)

    # The net and its step.
    fields = {**settings.tagger, "sample_rate": settings.sample_rate}
    tagger = nets.build_tagger(fields, "sed", "config.tagger")
    nets.require_classes(tagger, "config.tagger")
    _check_outputs(settings, tagger)
    records = open_records(settings)
    step = make_tagging_step(
        at_momentum(tagger, settings.norm_momentum),
        optimizer,
        outputs=tuple(settings.outputs),
        mixup_alpha=settings.mixup_alpha,
        spec_augment_stripes=settings.spec_augment,
        noise=settings.noise,
        speed=settings.speed,
        max_norm_ratio=settings.max_norm_ratio,
    )
    step = at_precision(settings.precision, step)

    def fresh(key: jax.Array) -> TrainState:
        variables = nets.init(tagger, key)
        return create_state(
            {"tagger": variables["params"]}, {"tagger": variables["batch_stats"]}, optimizer
        )

    # The run: from its last checkpoint if there is one.
    model = {"model": nets.fields_of(tagger)}
    trained = Trained(
        kind="tagger",
        sections={"sed": model, "query": model},
        step=step,
        counted=None,
        fresh=fresh,
        fresh_from=(jax.random.key(settings.seed),),
        frozen={},
        learning_rate=schedule,
        dtype=tagger.dtype,
        clips_per_step=settings.clips_per_step,
        labels=True,
    )
    with open_workdir(workdir) as held:
        run(trained, records, settings, config, held, mesh)


def _check_outputs(settings: TaggerSettings, tagger: TaggingNet) -> None:
    given = nets.output_shapes(tagger)
    known = [name for name, value in given.items() if value.shape == (1, tagger.classes)]
    if not settings.outputs or set(settings.outputs) - set(known):
        raise UserError(
            f"config.outputs is {tuple(settings.outputs)}, expected one or more of this net's clip "
            f"probabilities: {', '.join(known)}"
        )
