"""Verifies every record of a directory of TFRecord shards and writes the index the reader needs.

Every checksum is checked; what is wrong is said with shard and byte.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="directory of the shards")
    parser.epilog = "example:\n  uss-jax index data/my_sounds/1.0.0"


def run(args: argparse.Namespace) -> None:
    from uss_jax.data.tfrecord import build_index, splits
    from uss_jax.errors import UserError

    found = splits(args.directory)
    if not found:
        raise UserError(
            f"{args.directory} has no shards; expected names such as "
            "mine-train.tfrecord-00000-of-00004"
        )
    for split in found:
        index = build_index(args.directory, split)
        gigabytes = int(index.shard_bytes.sum()) / 1e9
        print(
            f"{split}: {len(index)} records in {len(index.shards)} shards, {gigabytes:.3f} GB, "
            f"{len(index.label_class)} labels of {len(set(index.label_class.tolist()))} classes, "
            f"digest {index.digest[:12]}"
        )
