"""Train a tagging and sound event detection net on weak labels. The same command resumes."""

import argparse

from uss_jax.cli.config import add_config_arguments
from uss_jax.errors import one_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_config_arguments(
        parser,
        "uss-jax train-tagger --config tagger_cnn14 --workdir runs/tagger \\\n"
        "      --config.data.records=/data/audioset/1.0.0",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from uss_jax.bundles.nets import TAGGERS, name_of
    from uss_jax.cli.config import joined_hosts, load_config
    from uss_jax.devices.hosts import say
    from uss_jax.training.train_tagger import train_tagger

    # Joined first, so that an error on one host stops the others too.
    with joined_hosts(args):
        config = load_config(args.config, args.config_overrides)
        train_tagger(config, args.workdir)
        workdir, net = one_line(args.workdir), name_of(TAGGERS, config.tagger.to_dict())
        options, uses = f"--config.sed_bundle={workdir} --config.sed_net={net}", "detection"
        # A query net of this kind reads the output that is pooled over time first.
        if net != "cnn14" or "tagging" in config.outputs:
            options += f" --config.query_bundle={workdir} --config.query_net={net}"
            uses += " and for queries"
        say(
            f"{workdir} holds the tagging net, for {uses}. To train a separator with it: "
            f"`uss-jax train ... {options}`; to find anchors once: `uss-jax mine ... --sed "
            f"{workdir}`"
        )
