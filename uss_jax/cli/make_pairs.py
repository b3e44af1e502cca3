"""Builds evaluation pairs (mixture, source) from a split of records.

For each class of the split, takes --per-class sources: each is the 2-second anchor of a clip, found
by the detector as in training, and is mixed at equal energy with an anchor of a clip of unrelated
classes. Pairs with an anchor below -60 dBFS are left out. With --pairing reference, each source is
mixed with the next one drawn, as published, whatever its labels and level. Writes
DIR/class_id=K/NUMBER.source.wav and NUMBER.mixture.wav, with manifest.csv. The same records,
detector and seed give the same pairs.
"""

import argparse

from uss_jax.cli.arguments import (
    add_detector_precision,
    natural,
    path,
    positive,
    say_detector_precision,
)
from uss_jax.errors import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--records", type=path, required=True, metavar="R", help="directory of the records"
    )
    parser.add_argument("--split", default="test", help="split of the records; default: test")
    parser.add_argument(
        "--sed",
        type=path,
        required=True,
        metavar="BUNDLE",
        help="bundle or workdir with a detector",
    )
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="folder to create")
    parser.add_argument(
        "--per-class",
        type=positive,
        default=100,
        metavar="N",
        help="sources per class; default: 100, as published",
    )
    parser.add_argument("--seed", type=natural, default=0, help="random seed; default: 0")
    parser.add_argument(
        "--pairing",
        choices=("conflict_free", "reference"),
        default="conflict_free",
        help="second sound of a mixture: from a clip of unrelated labels (default), or, as "
        "published, the next one drawn, which keeps silent anchors too",
    )
    parser.add_argument(
        "--groups",
        type=path,
        metavar="CSV",
        help='label file with a column "group"; it is copied to the manifest, and groups are '
        "evaluated separately",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing pairs in DIR")
    add_detector_precision(parser)
    parser.epilog = (
        "example:\n"
        "  uss-jax make-pairs --records data/my_sounds/1.0.0 --split test --sed runs/tagger \\\n"
        "      --out pairs"
    )


def run(args: argparse.Namespace) -> None:
    from uss_jax.bundles.model import Model
    from uss_jax.bundles.nets import arbitrary_anchors
    from uss_jax.data.labels import groups_of, ungrouped
    from uss_jax.evaluation.clips import open_clips
    from uss_jax.evaluation.make_pairs import make_pairs

    say_detector_precision(args)
    reader, model = open_clips(args.records, args.split, Model(args.sed))
    groups = {}
    if args.groups:
        ids = reader.index.clip_ids()
        groups = dict(zip(ids, groups_of(args.groups, ids), strict=True))
        if said := ungrouped(args.groups, list(groups.values())):
            print(f"--groups: {said}")
    made = make_pairs(
        reader,
        model,
        args.out,
        per_class=args.per_class,
        seed=args.seed,
        groups=groups,
        overwrite=args.overwrite,
        pairing=args.pairing,
    )
    print(
        f"{args.out}: {counted(made.pairs, 'pair')} of {counted(made.classes, 'class', 'classes')}"
    )
    if made.without_partner:
        left_out = counted(made.without_partner, "clip")
        print(f"{left_out} left out: the split has no clip of unrelated classes")
    if said := arbitrary_anchors(model.sed.module, reader.index.label_class):
        print(said)
    if made.silent:
        print(f"{counted(made.silent, 'pair')} left out: an anchor is below -60 dBFS")
