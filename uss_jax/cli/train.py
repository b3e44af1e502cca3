"""Train a separator on records. The same command resumes a run that was stopped."""

import argparse

from uss_jax.cli.config import add_config_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_config_arguments(
        parser,
        "uss-jax train --config configs/resunet30.py:condition=soft,data=full --workdir runs/soft"
        " \\\n      --config.data.records=/data/audioset/1.0.0",
    )


def run(args: argparse.Namespace) -> None:
    """Trains."""
    from uss_jax.cli.config import load_config
    from uss_jax.train import train
    from uss_jax.training.hosts import join_hosts

    config = load_config(args.config, args.config_overrides)
    join_hosts(args.coordinator, args.processes, args.process)
    train(config, args.workdir)
