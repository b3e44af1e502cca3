"""Converts audio files and their labels to TFRecord shards, an index and TFDS metadata.

Recordings of any sampling rate and number of channels become mono int16 at one sampling rate.
libsndfile reads wav, flac, ogg, opus, mp3, aiff, au, caf and w64; ffmpeg, if installed, decodes
m4a, mp4 and webm. Longer recordings are cut to their first --clip-seconds, shorter ones keep their
length. Recordings that are missing, unreadable, silent or truncated are left out, counted, and
listed with the reason in skipped-SPLIT.csv; remarks-SPLIT.csv lists files with unknown labels,
clipped samples, or no line in the label file. An interrupted job resumes when the same command is
given again. The index is written too: `uss-jax index` is only needed for TFRecords written by
other programs, or for shards that have changed.

The label file has one of two forms:
  file,labels         CSV with this header; paths relative to --audio; labels separated by ";", as
                      class names, mids or indexes. If there is a column "split", only the lines
                      whose value is --split are used. Other columns are ignored.
  AudioSet segments   as published (balanced_train_segments.csv). The file of a segment is looked up
                      in --audio and below it as YTID or Y + YTID, alone or followed by START or
                      START and END in seconds or milliseconds, after "_" or "-". A file without
                      times in its name that is longer than the segment is taken as the whole
                      video, and START to END is cut out of it.
"""

import argparse
import collections
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from uss_jax.audio import HIGHEST_SAMPLE_RATE, LOWEST_SAMPLE_RATE
from uss_jax.cli.arguments import number, path, refuse_idle, whole
from uss_jax.errors import UserError, counted, one_line

if TYPE_CHECKING:
    from uss_jax.data.labels import Labels

_NAMED = 10  # unknown labels that are printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--audio", type=path, required=True, metavar="DIR", help="folder of the recordings"
    )
    parser.add_argument(
        "--labels", type=path, required=True, metavar="CSV", help="label file, see above"
    )
    parser.add_argument(
        "--out",
        type=path,
        required=True,
        metavar="ROOT",
        help="root folder; data goes to ROOT/NAME/VERSION",
    )
    parser.add_argument("--name", required=True, help="name of the data set, such as my_sounds")
    parser.add_argument("--version", required=True, help="version of the data set, such as 1.0.0")
    parser.add_argument("--split", required=True, help="name of the split, such as train")
    parser.add_argument("--overwrite", action="store_true", help="replace the split if it exists")
    parser.add_argument(
        "--files-from",
        type=path,
        metavar="FILE",
        help="text file with one name per line; use only these files of the label file",
    )
    parser.add_argument(
        "--label-map",
        type=path,
        metavar="CSV",
        help="CSV that maps own label names to classes: columns name and class; several classes "
        'separated by ";", no class to skip a label',
    )
    parser.add_argument(
        "--skip-unknown-labels",
        action="store_true",
        help="skip labels that are not classes, and count them; default: an error",
    )
    parser.add_argument(
        "--accept-truncated",
        action="store_true",
        help="use the readable part of truncated recordings; default: leave them out",
    )
    parser.add_argument(
        "--sample-rate",
        type=whole(LOWEST_SAMPLE_RATE, HIGHEST_SAMPLE_RATE),
        default=32000,
        metavar="HZ",
        help="sampling rate of the records, in Hz; default: 32000",
    )
    parser.add_argument(
        "--clip-seconds",
        type=number(0.01, 3600),
        default=10.0,
        metavar="S",
        help="maximum clip length, in seconds; default: 10",
    )
    parser.add_argument(
        "--encoding",
        choices=("pcm_s16le", "flac"),
        default="pcm_s16le",
        help="flac: half the size, but clips are read whole and more slowly; default: pcm_s16le",
    )
    parser.add_argument(
        "--shards",
        type=whole(1, 99_999),
        metavar="K",
        help="maximum number of shards; default: about 200 MB each",
    )
    parser.add_argument(
        "--workers",
        type=whole(1, 1024),
        help="number of threads, and of processes that index the shards; default: one per core",
    )
    parser.add_argument(
        "--engine",
        choices=("threads", "beam"),
        default="threads",
        help="beam: runs on many machines that share the folders, and writes the same shards",
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
        "  where every machine of the cluster, with this package installed, runs\n"
        "      python -m apache_beam.runners.worker.worker_pool_main --service_port=50000"
    )


def run(args: argparse.Namespace) -> None:
    from uss_jax.data.conversion import ClipSettings
    from uss_jax.data.label_map import read_label_map
    from uss_jax.data.labels import read_file_list, read_labels
    from uss_jax.data.prepare import prepare

    engine = None
    if args.engine == "beam":
        from uss_jax.data.beam import beam_engine

        refuse_idle(args, ("workers",), "with --engine beam, whose options say how many machines")
        engine = beam_engine(args.beam_options)
    elif args.beam_options:
        raise UserError("options after -- need --engine beam; add it or leave them out")
    labels = read_labels(
        args.labels,
        args.audio,
        args.split,
        label_map=read_label_map(args.label_map) if args.label_map else None,
        skip_unknown=args.skip_unknown_labels,
        files=read_file_list(args.files_from) if args.files_from else None,
        known=[file for file in (args.label_map, args.files_from) if file],
    )
    workers = args.workers or os.cpu_count()
    print(f"{args.labels}: {counted(len(labels.clips), 'clip')} for split {args.split}", flush=True)
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
        workers=workers,
        processes=min(workers, len(os.sched_getaffinity(0))),
        engine=engine,
        overwrite=args.overwrite,
        remarks=labels.remarks(),
    )
    minutes = int(made.index.samples.astype("u8").sum()) / args.sample_rate / 60
    classes = len(set(made.index.label_class.tolist()))
    print(
        f"{made.directory}: {counted(len(made.index), 'clip')}, {minutes:.1f} minutes, "
        f"{counted(classes, 'class', 'classes')}, {counted(len(made.index.shards), 'shard')}"
    )
    if made.skipped:
        left_out = counted(len(made.skipped), "clip")
        kinds = _counts(why.kind for _, why in made.skipped)
        print(f"{left_out} left out ({kinds}), with reasons in {made.report}")
    if made.clipped:
        loudest, share = max(made.clipped, key=lambda pair: pair[1])
        print(
            one_line(
                f"{counted(len(made.clipped), 'clip has', 'clips have')} more than 0.1 % of the "
                f"samples above full scale, which were clipped; the largest share is "
                f"{100 * share:.2g} %, in {loudest.file}"
            )
        )
    if made.remarks:
        kinds = _counts(remark.kind for remark in made.remarks)
        print(f"{made.remarks_report} lists each file with remarks ({kinds})")


def _counts(kinds: Iterable[str]) -> str:
    """Returns text such as "3 silent, 1 missing", most frequent first."""
    return ", ".join(f"{n:,} {kind}" for kind, n in collections.Counter(kinds).most_common())


def _tell_passed_over(labels: "Labels", audio: str) -> None:
    """Prints which files of the folder and labels of the label file are not used."""
    if labels.unknown:
        first = list(labels.unknown.items())[:_NAMED]
        counts = ", ".join(f'"{name}" ({len(lines):,})' for name, lines in first)
        more = ", ..." if len(labels.unknown) > _NAMED else ""
        number = counted(
            len(labels.unknown),
            "label is not a class and is skipped",
            "labels are not classes and are skipped",
        )
        print(one_line(f"{number}: {counts}{more}"))
    for files, one, many in (
        (
            labels.unlisted,
            "recording is in no line of the label file",
            "recordings are in no line of the label file",
        ),
        (
            labels.others,
            "file is not a recording, judging by its name",
            "files are not recordings, judging by their names",
        ),
    ):
        if files:
            names = ", ".join(map(str, files[:3])) + (", ..." if len(files) > 3 else "")
            print(one_line(f"{audio}: {counted(len(files), one, many)} ({names})"))
