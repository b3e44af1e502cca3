"""Training a tagging and detection net on weak labels, from top to bottom."""

import os

import jax
from ml_collections import ConfigDict

from uss_jax.errors import UserError
from uss_jax.training import nets, run
from uss_jax.training.mesh import make_mesh
from uss_jax.training.optim import adamw_amsgrad, make_schedule
from uss_jax.training.state import create_state
from uss_jax.training.step import make_tagging_step

OUTPUTS = ("clipwise", "tagging")


def train_tagger(config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Trains until `config.total_steps`, resuming what the workdir holds.

    The workdir can then be used as a bundle with a detector and a query net, which share the
    trained parameters.

    Args:
      config: see configs/tagger_cnn14.py, where every key is said.
      workdir: config, checkpoints and metrics go there.

    Raises:
      UserError: what would fail later, said before the first step.
    """
    # Devices, optimiser and records. Mixup blends two clips into one, so twice the batch is read.
    mesh = make_mesh()
    run.check(config)
    if not config.outputs or not set(config.outputs) <= set(OUTPUTS):
        raise UserError(f"config.outputs is {config.outputs}, expected some of {OUTPUTS}")
    optimizer = adamw_amsgrad(make_schedule(**config.schedule), config.weight_decay)
    workdir = run.open_workdir(workdir)
    records = run.open_records(config.data, config.sample_rate, config.seed)
    clips_per_step = config.global_batch * (1 if config.mixup_alpha is None else 2)

    # The net.
    tagger = nets.build_sed({**config.tagger, "sample_rate": config.sample_rate})
    key = jax.random.key(config.seed)
    variables = nets.init(tagger, key)
    state = create_state(
        {"tagger": variables["params"]}, {"tagger": variables["batch_stats"]}, optimizer
    )

    # One step as a pure function.
    step = make_tagging_step(
        tagger,
        optimizer,
        outputs=tuple(config.outputs),
        mixup_alpha=config.mixup_alpha,
        spec_augment_stripes=config.spec_augment and config.spec_augment.to_dict(),
        noise=config.noise and config.noise.to_dict(),
    )

    # The loop, from where the run stands.
    model = {"model": nets.fields_of(tagger)}
    run.train_on(
        records,
        step,
        state,
        {},
        config=config,
        workdir=workdir,
        mesh=mesh,
        key=key,
        kind="tagger",
        nets={"sed": model, "query": model},
        clips_per_step=clips_per_step,
        labels=True,
    )
