"""Tells which classes sound when in recordings.

AUDIO is a file, a folder (all audio files below it) or a quoted glob pattern. For each recording, a
table of the classes heard is printed. With --out, DIR/<path of the recording>/ also gets tags.json
and tags.png, a strip of each class's probability over time.
"""

import argparse
import pathlib

from uss_jax.cli.arguments import add_recordings, add_threshold, input_files, path, positive
from uss_jax.errors import UserError, counted, one_line

_INTERVALS_SHOWN = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recordings(parser)
    parser.add_argument(
        "--model",
        type=path,
        metavar="B",
        help="bundle or workdir with a detector; default: yamnet, which is in the package",
    )
    parser.add_argument("--out", type=path, metavar="DIR", help="folder for tags.json and tags.png")
    add_threshold(parser, "counts as heard")
    parser.add_argument(
        "--most",
        type=positive,
        default=20,
        metavar="N",
        help="classes to show in table and picture, the most probable ones; default: 20",
    )
    parser.epilog = "example:\n  uss-jax tag street.wav recordings/ --out tags"


def run(args: argparse.Namespace) -> None:
    from uss_jax.bundles.model import Model
    from uss_jax.bundles.packaged import PACKAGED
    from uss_jax.disk.folder import make_folder
    from uss_jax.models.query import HEARD
    from uss_jax.separation.input_files import InputFile, Places
    from uss_jax.separation.job import for_each
    from uss_jax.separation.tags import tag, write_tags

    threshold = HEARD if args.threshold is None else args.threshold
    recordings = input_files(args)
    model = Model(args.model or PACKAGED["yamnet"])  # whatever the working directory holds
    _ = model.sed  # a model without a detector is told once
    places = Places(args.out or "")
    if args.out:
        make_folder(pathlib.Path(args.out), "give another --out", name=f"--out {args.out}")

    def one(recording: InputFile) -> None:
        folder = places.folder_of(recording) if args.out else None
        tags = tag(model, recording.path)
        if folder:
            make_folder(folder, "give another --out")
            write_tags(folder, tags, model, threshold, args.most)
        print(format_tags(tags, threshold, args.most), flush=True)

    failed = for_each(recordings, one)
    if failed:
        raise UserError(f"{failed} of {counted(len(recordings), 'recording')} could not be tagged")


def format_tags(tags, threshold: float, most: int) -> str:
    """Formats the most probable classes: peak, name, and where each sounds, in seconds."""
    from uss_jax.audio.files import truncation
    from uss_jax.ontology import load_ontology

    names, heard = load_ontology().class_names, tags.heard(threshold)
    title = f"{one_line(str(tags.path))}: {tags.seconds:.1f} s"
    if cut := truncation(tags.path, decode=False):  # of a FLAC file, reading it has told
        title += f" (the recording is cut off: {cut})"
    if not heard:
        return f"{title}\n  no class reaches {threshold:g}"
    lines = [title]
    for k in heard[:most]:
        peak = float(tags.probability[:, k].max())
        lines.append(f"  {peak:.2f}  {names[k]:<40}  {_spoken(tags.intervals(k, threshold))}")
    if len(heard) > most:
        lines.append(f"  and {len(heard) - most} more; --most shows them")
    return "\n".join(lines)


def _spoken(intervals: list[tuple[float, float]]) -> str:
    shown = ", ".join(f"{begin:.1f}-{end:.1f}" for begin, end in intervals[:_INTERVALS_SHOWN])
    more = len(intervals) - _INTERVALS_SHOWN
    return shown + (f" and {more} more" if more > 0 else "")
