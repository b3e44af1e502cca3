"""Train a separator on records. The same command resumes a run that was stopped."""

import argparse

from uss_jax.cli.config import add_config_arguments
from uss_jax.errors import UserError, one_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_config_arguments(
        parser,
        "uss-jax train --config resunet30:condition=soft,data=full --workdir runs/soft"
        " \\\n      --config.data.records=/data/audioset/1.0.0",
        workdir_required=False,
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="compile the step for the available devices and print its parameters, operations, "
        "memory and input rate; needs neither records nor --workdir",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from uss_jax.cli.config import joined_hosts, load_config
    from uss_jax.devices.hosts import say
    from uss_jax.models.query import KINDS
    from uss_jax.training.plan import dry_run
    from uss_jax.training.train_separator import train_separator

    if args.workdir is None and not args.dry_run:
        raise UserError("--workdir is missing; give the folder of the run")
    # Joined first, so that an error on one host stops the others too.
    with joined_hosts(args):
        config = load_config(args.config, args.config_overrides)
        if args.dry_run:
            print("\n".join(dry_run(config)))
        else:
            train_separator(config, args.workdir)
            kind = KINDS[config.query.kind]
            asking = "--classes NAME" if kind.classes or kind.probabilities else "--query EXAMPLES"
            if kind.texts:
                asking = "--text TEXT"
            workdir = one_line(args.workdir)
            say(
                f"{workdir} holds the separator. To separate: `uss-jax separate AUDIO --model "
                f"{workdir} {asking} --out DIR`; to measure: `uss-jax evaluate pairs --model "
                f"{workdir} --data PAIRS --out RESULTS.json`"
            )
