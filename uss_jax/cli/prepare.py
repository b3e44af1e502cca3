"""Makes TFRecord shards, an index and TFDS metadata of audio files and their labels.

Recordings (wav, flac, ogg, mp3; any rate, any number of channels) become mono int16 at one sample
rate. Longer ones are cut to their first --clip-seconds, shorter keep their length. Recordings that
are missing, unreadable or silent are left out and listed with the reason in skipped-SPLIT.csv. A
job that was stopped goes on when the same command is given again.

The label file has one of two forms:
  file,labels         with this header; paths relative to --audio; labels separated by ";": class
                      names, mids or indexes. If there is a column "split", only the lines whose
                      value is --split are used. Other columns are ignored.
  AudioSet segments   as published (balanced_train_segments.csv). A segment's file is looked for in
                      --audio and below it as YTID or Y + YTID, alone or followed by _START or
                      _START_END in seconds or milliseconds.
"""

import argparse
import os

from uss_jax.cli.arguments import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--audio", required=True, metavar="DIR", help="folder of the recordings")
    parser.add_argument("--labels", required=True, metavar="CSV", help="label file, see above")
    parser.add_argument("--out", required=True, metavar="ROOT", help="folder of data sets")
    parser.add_argument("--name", required=True, help="of the data set, such as my_sounds")
    parser.add_argument("--version", required=True, help="of the data set, such as 1.0.0")
    parser.add_argument("--split", required=True, help="such as train")
    parser.add_argument(
        "--sample-rate", type=positive, default=32000, metavar="HZ", help="default: 32000"
    )
    parser.add_argument(
        "--clip-seconds", type=_seconds, default=10.0, metavar="S", help="default: 10"
    )
    parser.add_argument(
        "--encoding",
        choices=("pcm_s16le", "flac"),
        default="pcm_s16le",
        help="flac is half as large, but is read whole and slower; default: pcm_s16le",
    )
    parser.add_argument(
        "--shards", type=positive, metavar="K", help="at most so many files; default: 200 MB each"
    )
    parser.add_argument(
        "--workers", type=positive, default=os.cpu_count(), help="threads; default: one a core"
    )
    parser.add_argument(
        "--engine",
        choices=("threads", "beam"),
        default="threads",
        help="beam: on many machines, which share the folders; the same shards",
    )
    parser.add_argument(
        "beam_options", nargs="*", metavar="-- OPTION", help="options of the Beam pipeline"
    )
    parser.epilog = (
        "example:\n"
        "  uss-jax prepare --audio sounds --labels sounds/labels.csv --out data \\\n"
        "      --name my_sounds --version 1.0.0 --split train\n"
        "  uss-jax prepare --audio /nfs/clips --labels unbalanced_train_segments.csv \\\n"
        "      --out /nfs/data --name audioset --version 1.0.0 --split full_train \\\n"
        "      --engine beam -- --runner=FlinkRunner --flink_master=head:8081 \\\n"
        "      --parallelism=512 --environment_type=EXTERNAL --environment_config=localhost:50000\n"
        "  where on every machine of the cluster runs, with this package installed,\n"
        "      python -m apache_beam.runners.worker.worker_pool_main --service_port=50000"
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"expected seconds, above 0 and to 3600, not {text!r}")
    return seconds


def run(args: argparse.Namespace) -> None:
    from uss_jax.data.labels import read_labels
    from uss_jax.data.prepare import ClipSettings, prepare
    from uss_jax.errors import UserError

    engine = None
    if args.engine == "beam":
        from uss_jax.data.beam import beam_engine

        engine = beam_engine(args.beam_options)
    elif args.beam_options:
        raise UserError("options after -- are for --engine beam; give that too or leave them out")
    labelled = read_labels(args.labels, args.audio, args.split)
    print(f"{args.labels}: {len(labelled)} clips for split {args.split}", flush=True)
    made = prepare(
        labelled,
        args.audio,
        args.out,
        name=args.name,
        version=args.version,
        split=args.split,
        settings=ClipSettings(args.sample_rate, args.clip_seconds, args.encoding),
        shards=args.shards,
        workers=args.workers,
        engine=engine,
    )
    minutes = int(made.index.samples.sum()) / args.sample_rate / 60
    classes = len(set(made.index.label_class.tolist()))
    print(
        f"{made.directory}: {len(made.index)} clips, {minutes:.1f} minutes, {classes} classes, "
        f"{len(made.index.shards)} shards"
    )
    if made.skipped:
        print(f"{len(made.skipped)} clips left out, with reasons in {made.report}")
