"""Encodes the captions of a split's clips, for training with texts (config.query.captions).

A caption is a sentence on what is heard in a clip. `uss-jax prepare` takes them from the column
`caption` of the label file; records of other programs may have them under another name. Each
different caption is encoded once.
"""

import argparse

from uss_jax.cli.arguments import path
from uss_jax.errors import UserError, counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", type=path, metavar="DIR", help="directory of the records")
    parser.add_argument(
        "--text-encoder",
        type=path,
        required=True,
        metavar="ENCODER",
        help="the sentence encoder all-MiniLM-L6-v2, as published or converted",
    )
    parser.add_argument("--out", type=path, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--split", default="train", help="split of the records; default: train")
    parser.add_argument(
        "--feature",
        default="caption",
        metavar="NAME",
        help="name of the records' feature that holds captions; default: caption",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FOLDER if it exists")
    parser.epilog = (
        "example:\n"
        "  uss-jax captions data/my_sounds/1.0.0 --text-encoder minilm --out train.captions"
    )


def run(args: argparse.Namespace) -> None:
    import os
    import pathlib

    from tqdm import tqdm

    from uss_jax.anchors.captions import captions_of, read_captions_header, write_captions
    from uss_jax.bundles.text_encoder import TextEncoder
    from uss_jax.data.index import load_index

    if os.path.lexists(args.out):
        if not args.overwrite:
            raise UserError(f"{args.out} exists; give --overwrite to replace it")
        read_captions_header(pathlib.Path(args.out))  # nothing else is replaced
    index = load_index(args.records, args.split)
    encoder = TextEncoder(args.text_encoder)
    with tqdm(total=len(index), desc="read", unit="clip", disable=None) as bar:
        captions = list(captions_of(args.records, index, args.feature, bar.update))
    there = sum(map(bool, captions))
    if not there:
        raise UserError(
            f"no clip of {args.records} ({args.split}) has a caption in {args.feature!r}; prepare "
            "them with a column `caption`, or give --feature"
        )
    with tqdm(total=len(set(captions) - {""}), desc="encode", disable=None) as bar:
        different = write_captions(
            args.out, captions, encoder.encode, encoder.width, encoder.hash, index, bar.update
        )
    clips = counted(len(index), "clip")
    print(f"{args.out}: {counted(different, 'caption')}, of {there:,} of {clips}")
