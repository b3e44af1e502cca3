"""Finds the anchors of every label of every clip once, for training with anchors.source=table.

Runs the detector over each clip of a split. For each label of a clip, the table holds the position
where the label is most likely, the runners-up, and level and purity at the best position. An
interrupted job resumes when the same command is given again. Several machines that share a disk can
divide the work: give each its --host of --hosts.

With --query, the condition of every anchor is computed in the same pass, so that training need not
run the query net (config.query.table). Conditions are in a folder beside TABLE: anchors.conditions
for anchors.npz. If only they are missing, the table stays and the detector is not run again.

With --show, draws the anchors of one clip over its spectrogram instead.
"""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from uss_jax.cli.arguments import (
    add_detector_precision,
    natural,
    number,
    path,
    positive,
    refuse_idle,
    say_detector_precision,
    whole,
)
from uss_jax.errors import UserError, counted

if TYPE_CHECKING:
    from uss_jax.anchors.mine import Query
    from uss_jax.anchors.table import AnchorTable
    from uss_jax.bundles.model import Model
    from uss_jax.data.index import RecordIndex
    from uss_jax.models.tagging import TaggingNet

# Values of options that are not given; they have no effect with --show.
_DEFAULTS = {
    "candidates": 4,
    "min_dbfs": -60.0,
    "rule": "uss",
    "batch": 16,
    "threads": 4,
    "host": 0,
    "hosts": 1,
}
# A median score below this means that the detector does not know the classes.
_GUESSING = 0.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--records", type=path, required=True, metavar="R", help="directory of the records"
    )
    parser.add_argument("--split", default="train", help="split of the records; default: train")
    parser.add_argument(
        "--sed",
        type=path,
        required=True,
        metavar="BUNDLE",
        help="bundle or workdir with a detector",
    )
    parser.add_argument(
        "--out", type=path, required=True, metavar="TABLE", help="anchor table, an .npz file"
    )
    parser.add_argument(
        "--query",
        type=path,
        metavar="BUNDLE",
        help="also compute the conditions of the anchors with this query net: a tagger's bundle or "
        "workdir, or a separator's",
    )
    parser.add_argument(
        "--query-output",
        choices=("clipwise", "embedding"),
        help="output of the query net: clipwise for conditions soft and class_vectors, embedding "
        "for embedding; default: that of a separator's conditions, clipwise of a tagger",
    )
    parser.add_argument(
        "--candidates",
        type=whole(1, 64),
        metavar="K",
        help="anchors per label; default: 4. With --query, each of them has a condition",
    )
    parser.add_argument(
        "--segment-seconds",
        type=number(0.01, 600),
        metavar="S",
        help="length of an anchor in seconds, segment_seconds of the config; default: that of the "
        "detector's bundle",
    )
    parser.add_argument(
        "--clip-seconds",
        type=number(0.01, 3600),
        metavar="S",
        help="pad or cut clips to this length in seconds, as data.clip_seconds of the config does; "
        "default: the longest clip of the split",
    )
    parser.add_argument(
        "--min-dbfs",
        type=number(-1000, 0),
        metavar="DB",
        help="skip segments below this level in dBFS; default: -60; -1000 skips none",
    )
    parser.add_argument(
        "--rule",
        choices=("uss", "htsat"),
        help="rule that chooses anchors: that of bytedance/uss (default), or that of HTS-AT's own "
        "separation program, for HTS-AT as detector",
    )
    parser.add_argument(
        "--batch",
        type=whole(1, 65_536),
        help="clips per device in a batch; default: 16",
    )
    parser.add_argument("--threads", type=whole(1, 256), help="reading threads; default: 4")
    parser.add_argument("--host", type=natural, help="index of this machine, from 0")
    parser.add_argument("--hosts", type=positive, help="number of machines; default: 1")
    parser.add_argument("--show", metavar="ID", help="draw the anchors of this clip")
    parser.add_argument(
        "--picture",
        type=path,
        metavar="PNG",
        help="new file for the picture of --show; default: TABLE with the suffix .png",
    )
    add_detector_precision(parser)
    parser.epilog = (
        "example:\n"
        "  uss-jax mine --records data/my_sounds/1.0.0 --sed runs/tagger --out anchors.npz\n"
        "  uss-jax mine --records data/my_sounds/1.0.0 --sed runs/tagger --out anchors.npz \\\n"
        "      --show dogs/a.wav --picture a.png"
    )


def run(args: argparse.Namespace) -> None:
    import jax

    from uss_jax.anchors.mine import MiningSettings, mine
    from uss_jax.anchors.table import read_table
    from uss_jax.bundles.model import Model
    from uss_jax.evaluation.clips import open_clips

    _check(args)
    say_detector_precision(args)
    reader, model = open_clips(args.records, args.split, Model(args.sed))
    segment_samples = _segment_samples(args.segment_seconds, model)
    if args.show is not None:
        from uss_jax.anchors.show import draw_anchors

        remedy = "give the --sed and --segment-seconds that it was mined with"
        table = read_table(args.out, reader.index, segment_samples, args.sed, remedy)
        draw_anchors(reader, table, model.sed, args.show, args.picture)
        print(args.picture)
        return
    settings = MiningSettings(
        sample_rate=model.sample_rate,
        segment_samples=segment_samples,
        clip_samples=_clip_samples(args.clip_seconds, segment_samples, model, reader.index),
        candidates=args.candidates,
        min_dbfs=args.min_dbfs,
        rule=args.rule,
    )
    written = mine(
        reader,
        model.sed,
        args.out,
        settings,
        query=_query(args),
        batch_size=args.batch * jax.local_device_count(),
        host=args.host,
        hosts=args.hosts,
        threads=args.threads,
    )
    if not written:
        print(f"this machine's part is done; {args.out} is written when all machines are done")
        return
    table = read_table(args.out, reader.index, segment_samples)
    _say_mined(args, table, model.sed.module, reader.index)


def _check(args: argparse.Namespace) -> None:
    """Raises a UserError for options that do not suit each other; fills in those not given."""
    if not args.out.endswith(".npz"):
        raise UserError(f"--out {args.out} does not end in .npz; give the name of an .npz file")
    if args.query_output and not args.query:
        raise UserError("--query-output has no effect without --query")
    if args.show is None:
        refuse_idle(args, ("picture",), "without --show")
    else:
        idle = "query", "clip_seconds", *_DEFAULTS
        refuse_idle(args, idle, "with --show, which mines nothing")
        if args.picture is None:  # the next clip's replaces it
            args.picture = f"{args.out.removesuffix('.npz')}.png"
        elif os.path.lexists(args.picture):
            raise UserError(f"{args.picture} exists; remove it or give another --picture")
    for option, default in _DEFAULTS.items():
        if getattr(args, option) is None:
            setattr(args, option, default)
    if not 0 <= args.host < args.hosts:
        raise UserError(f"--host {args.host} is not between 0 and {args.hosts - 1}")


def _segment_samples(seconds: float | None, model: "Model") -> int:
    """Returns the length of an anchor: as given, or that of the detector's bundle."""
    if seconds is None:
        return model.segment_samples
    return max(round(seconds * model.sample_rate), 1)


def _clip_samples(
    seconds: float | None, segment_samples: int, model: "Model", index: "RecordIndex"
) -> int:
    """Returns the length that clips are padded or cut to: as given, or that of the longest."""
    if seconds is None:
        return max(int(index.samples.max()), segment_samples)
    samples = round(seconds * model.sample_rate)
    if samples < segment_samples:
        raise UserError(
            f"--clip-seconds {seconds:g} is less than an anchor; give at least "
            f"{segment_samples / model.sample_rate:g}, or shorter anchors (--segment-seconds)"
        )
    return samples


def _say_mined(
    args: argparse.Namespace, table: "AnchorTable", detector: "TaggingNet", index: "RecordIndex"
) -> None:
    """Prints what was mined, and whether its anchors are worth anything."""
    import numpy as np

    from uss_jax.anchors.conditions import folder_of
    from uss_jax.bundles.nets import arbitrary_anchors

    best = table.score[:, 0]
    silent = int((best < 0).sum())
    print(
        f"{args.out}: anchors of {counted(len(table), 'label')} of {counted(len(index), 'clip')}, "
        f"median score {np.median(best):.3f}, median purity "
        f"{np.median(table.purity.astype(np.float32)):.3f}"
        + (f", {silent} below {args.min_dbfs:g} dBFS" if silent else "")
    )
    if args.query:
        print(f"{folder_of(args.out)}: the conditions of these anchors")
    if said := arbitrary_anchors(detector, index.label_class):
        print(said, file=sys.stderr)
    heard = best[best >= 0]
    if heard.size and np.median(heard) < _GUESSING:
        print(
            f"the detector barely detects the labels (half of the scores are below "
            f"{np.median(heard):.3f}); the anchors are little better than random ones "
            "(config.anchors.source=random); train the detector longer or convert a published one",
            file=sys.stderr,
        )


def _query(args: argparse.Namespace) -> "Query | None":
    """Returns what computes the conditions; None without --query."""
    from uss_jax.anchors.mine import Query
    from uss_jax.bundles.model import Model
    from uss_jax.evaluation.clips import open_clips

    if not args.query:
        return None
    _, model = open_clips(args.records, args.split, Model(args.query))
    found = model.query.module
    if not found.takes.recordings:
        raise UserError(
            f"--query {args.query}: its conditions are {found.kind}, which are not computed from "
            "anchors; give a tagger"
        )
    return Query(model.tagger, args.query_output or found.takes.reads)
