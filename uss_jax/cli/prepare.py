"""Makes TFRecord shards, an index and TFDS metadata of audio files and their labels.

Recordings (what libsndfile reads: wav, flac, ogg, opus, mp3, aiff, au, caf, w64; and what ffmpeg
decodes where it is installed: m4a, mp4, webm; any rate, any number of channels) become mono int16
at one sample rate. Longer ones are cut to their first --clip-seconds, shorter keep their length.
Recordings that are missing, unreadable, silent or cut off are left out, counted, and listed with
the reason in skipped-SPLIT.csv. A job that was stopped goes on when the same command is given
again. The index is made too: `index` is only for records of others, or shards that have changed.

The label file has one of two forms:
  file,labels         with this header; paths relative to --audio; labels separated by ";": class
                      names, mids or indexes. If there is a column "split", only the lines whose
                      value is --split are used. Other columns are ignored.
  AudioSet segments   as published (balanced_train_segments.csv). A segment's file is looked for in
                      --audio and below it as YTID or Y + YTID, alone or followed by START or
                      START and END in seconds or milliseconds, after "_" or "-". A file without
                      times in its name that is longer than the segment is taken for the whole
                      video, of which START to END is cut.
"""

import argparse
import collections
import os
from typing import TYPE_CHECKING

from uss_jax.audio import HIGHEST_SAMPLE_RATE, LOWEST_SAMPLE_RATE
from uss_jax.cli.arguments import number, path, whole
from uss_jax.errors import one_line

if TYPE_CHECKING:
    from uss_jax.data.labels import Labels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--audio", type=path, required=True, metavar="DIR", help="folder of the recordings"
    )
    parser.add_argument(
        "--labels", type=path, required=True, metavar="CSV", help="label file, see above"
    )
    parser.add_argument(
        "--out", type=path, required=True, metavar="ROOT", help="folder of data sets"
    )
    parser.add_argument("--name", required=True, help="of the data set, such as my_sounds")
    parser.add_argument("--version", required=True, help="of the data set, such as 1.0.0")
    parser.add_argument("--split", required=True, help="such as train")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the split if it is there already"
    )
    parser.add_argument(
        "--files-from",
        type=path,
        metavar="FILE",
        help="use only the label file's lines of these files, one name a line",
    )
    parser.add_argument(
        "--label-map",
        type=path,
        metavar="CSV",
        help="what own label names stand for: columns name and class; several classes separated "
        'by ";", none to pass over a label',
    )
    parser.add_argument(
        "--skip-unknown-labels",
        action="store_true",
        help="pass over labels that are no classes, and count them; default: an error",
    )
    parser.add_argument(
        "--accept-truncated",
        action="store_true",
        help="use what there is of recordings that are cut off; default: leave them out",
    )
    parser.add_argument(
        "--sample-rate",
        type=whole(LOWEST_SAMPLE_RATE, HIGHEST_SAMPLE_RATE),
        default=32000,
        metavar="HZ",
        help="default: 32000",
    )
    parser.add_argument(
        "--clip-seconds", type=number(0.01, 3600), default=10.0, metavar="S", help="default: 10"
    )
    parser.add_argument(
        "--encoding",
        choices=("pcm_s16le", "flac"),
        default="pcm_s16le",
        help="flac is half as large, but is read whole and slower; default: pcm_s16le",
    )
    parser.add_argument(
        "--shards",
        type=whole(1, 99_999),
        metavar="K",
        help="at most so many files; default: 200 MB each",
    )
    parser.add_argument(
        "--workers",
        type=whole(1, 1024),
        default=os.cpu_count(),
        help="threads; default: one a core",
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
        "  uss-jax prepare --audio sounds --labels sounds/labels.csv --out data \\\n"
        "      --name my_sounds --version 1.0.0 --split train --overwrite \\\n"
        "      --label-map own_names.csv --skip-unknown-labels\n"
        "  uss-jax prepare --audio /nfs/clips --labels unbalanced_train_segments.csv \\\n"
        "      --out /nfs/data --name audioset --version 1.0.0 --split full_train \\\n"
        "      --engine beam -- --runner=FlinkRunner --flink_master=head:8081 \\\n"
        "      --parallelism=512 --environment_type=EXTERNAL --environment_config=localhost:50000\n"
        "  where on every machine of the cluster runs, with this package installed,\n"
        "      python -m apache_beam.runners.worker.worker_pool_main --service_port=50000"
    )


def run(args: argparse.Namespace) -> None:
    from uss_jax.data.labels import read_file_list, read_label_map, read_labels
    from uss_jax.data.prepare import ClipSettings, prepare
    from uss_jax.errors import UserError

    engine = None
    if args.engine == "beam":
        from uss_jax.data.beam import beam_engine

        engine = beam_engine(args.beam_options)
    elif args.beam_options:
        raise UserError("options after -- are for --engine beam; give that too or leave them out")
    labels = read_labels(
        args.labels,
        args.audio,
        args.split,
        label_map=read_label_map(args.label_map) if args.label_map else None,
        skip_unknown=args.skip_unknown_labels,
        files=read_file_list(args.files_from) if args.files_from else None,
    )
    print(f"{args.labels}: {len(labels.clips)} clips for split {args.split}", flush=True)
    _tell_passed_over(labels, args.audio)
    made = prepare(
        labels.clips,
        args.audio,
        args.out,
        name=args.name,
        version=args.version,
        split=args.split,
        settings=ClipSettings(
            args.sample_rate, args.clip_seconds, args.encoding, args.accept_truncated
        ),
        shards=args.shards,
        workers=args.workers,
        engine=engine,
        overwrite=args.overwrite,
    )
    minutes = int(made.index.samples.astype("u8").sum()) / args.sample_rate / 60
    classes = len(set(made.index.label_class.tolist()))
    print(
        f"{made.directory}: {len(made.index)} clips, {minutes:.1f} minutes, {classes} classes, "
        f"{len(made.index.shards)} shards"
    )
    if made.skipped:
        kinds = collections.Counter(why.kind for _, why in made.skipped)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        print(f"{len(made.skipped)} clips left out ({counts}), with reasons in {made.report}")
    if made.clipped:
        loudest, share = max(made.clipped, key=lambda pair: pair[1])
        print(
            f"{len(made.clipped)} clips have more than 0.1 % of their samples above full scale, "
            f"which were clipped; the most, {100 * share:.1f} %, has {loudest.file}"
        )


def _tell_passed_over(labels: "Labels", audio: str) -> None:
    """Prints which files of the folder and labels of the label file are not used."""
    if labels.unknown:
        first = list(labels.unknown.items())[:10]
        counts = ", ".join(f'"{name}" ({len(lines)})' for name, lines in first)
        more = ", ..." if len(labels.unknown) > 10 else ""
        said = f"{len(labels.unknown)} labels are no classes and are passed over: {counts}{more}"
        print(one_line(said))
    for files, what in (
        (labels.unlisted, "recordings in {} are in no line of the label file"),
        (labels.others, "files in {} are no recordings by their names"),
    ):
        if files:
            print(one_line(f"{len(files)} {what.format(audio)}, such as {files[0]}"))
