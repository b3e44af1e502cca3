"""Verifies every record of a directory of TFRecord shards and writes the index the reader needs.

All checksums are verified; errors are reported with shard and byte offset. An interrupted job
resumes with the remaining shards.

Records written by other programs (tf.train.Example) are read as they are. Features with common
names and types are detected, including TFDS's layout; --schema names a JSON file with the keys that
cannot be detected, any of:
  {"id": "video_id", "audio": "waveform", "labels": "mids", "encoding": "float",
   "label_form": "mid", "sample_rate": 32000, "shards": "*.tfrecord", "split": "train"}
  encoding    pcm_s16le, flac, wav (bytes), float, int64 (lists)
  label_form  index (int64), mid or name (bytes), multi_hot (0 or 1 per class)
  shards      a glob pattern, if the shards are not named as by TFDS; they become the split "split"
"""

import argparse
import os

from uss_jax.cli.arguments import path, whole
from uss_jax.errors import UserError, counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", type=path, metavar="DIR", help="directory of the shards, or its URL"
    )
    parser.add_argument("--schema", type=path, metavar="FILE", help="JSON file, see above")
    parser.add_argument(
        "--workers",
        type=whole(1, 1024),
        default=os.cpu_count(),
        help="number of processes; default: one per core",
    )
    parser.epilog = (
        "example:\n"
        "  uss-jax index data/my_sounds/1.0.0\n"
        "  uss-jax index lab/records --schema schema.json"
    )


def run(args: argparse.Namespace) -> None:
    from uss_jax.data.foreign import find_schema
    from uss_jax.data.indexing import build_index
    from uss_jax.data.metadata import check_indexed_format, enter_indexed_format
    from uss_jax.data.schema import read_schema
    from uss_jax.data.shards import splits
    from uss_jax.data.storage import versions_below

    given = read_schema(args.schema) if args.schema else {}
    found = [given.get("split", "train")] if "shards" in given else splits(args.directory)
    if not found:
        raise UserError(
            f"{args.directory} has no shards with names such as "
            'mine-train.tfrecord-00000-of-00004; for other names, give a --schema with "shards": '
            '"*.tfrecord"'
            f"{versions_below(args.directory)}"
        )
    for at, split in enumerate(found):
        schema, new = find_schema(args.directory, split, given)
        # Splits that come later are not compared: they get this format too, or are refused then.
        form = found[at:], schema.sample_rate, schema.encoding
        if new:
            check_indexed_format(args.directory, *form)
            print(
                f"{split}: id in {schema.id!r}, audio in {schema.audio!r} ({schema.encoding}), "
                f"labels in {schema.labels!r} ({schema.label_form}), {schema.sample_rate} Hz",
                flush=True,
            )
        index = build_index(args.directory, split, schema, args.workers)
        if new:
            enter_indexed_format(args.directory, *form)
        gigabytes = int(index.shard_bytes.sum()) / 1e9
        print(
            f"{split}: {counted(len(index), 'record')} in {counted(len(index.shards), 'shard')}, "
            f"{gigabytes:.3f} GB, {counted(len(index.label_class), 'label')} of "
            f"{counted(len(set(index.label_class.tolist())), 'class', 'classes')}, "
            f"digest {index.digest[:12]}"
        )
