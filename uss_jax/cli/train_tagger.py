"""Train a tagging and sound event detection net on weak labels. The same command resumes."""

import argparse

from uss_jax.cli.config import add_config_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_config_arguments(
        parser,
        "uss-jax train-tagger --config tagger_cnn14 --workdir runs/tagger \\\n"
        "      --config.data.records=/data/audioset/1.0.0",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from uss_jax.cli.config import joined_hosts, load_config, say_next
    from uss_jax.training.train_tagger import train_tagger

    # Joined first, so that an error on one host stops the others too.
    with joined_hosts(args):
        config = load_config(args.config, args.config_overrides)
        train_tagger(config, args.workdir)
        say_next(
            f"{args.workdir} holds the tagging net, for detection and for queries. To train a "
            f"separator with it: `uss-jax train ... --config.sed_bundle={args.workdir} "
            f"--config.query_bundle={args.workdir}`; to find anchors once: `uss-jax mine ... --sed "
            f"{args.workdir}`"
        )
