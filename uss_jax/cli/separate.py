"""Separates recordings: writes a file per queried sound, aligned with and as long as the recording.

AUDIO is a file, a folder (all audio files below it) or a quoted glob pattern. Each recording gets a
folder below DIR at its own path: sounds/street.wav goes to DIR/sounds/street/. An
absolute path is shortened to start at the given folder or at the name of a given file. The folder
holds the sounds, report.json, and report.html to look at and listen to. The same command given
again resumes where it was stopped and leaves finished recordings as they are. Sounds that an
earlier run wrote below DIR are skipped unless named.

Queries:
  --classes NAME ...        classes by name, mid or index; "Speech+Singing" is one sound, and so is
                            a node of the ontology that is no class, such as "Human voice": all
                            classes below. Each is separated where the model's tagging net hears it,
                            and asked for with the mean of its training recordings, if the model has
                            means of its classes (uss-jax inspect)
  --levels 1 2 ...          all classes on these levels of the AudioSet ontology that the model's
                            tagging net hears; level 1 has seven, such as Music and Human sounds
  --without NAME ...        alone: the recording less the estimate of these classes or nodes, as
                            "Speech+Singing" asks for them; the two add up to the recording. With
                            --classes, --levels or --text: leaves out classes, and all below them
  --text TEXT ...           sounds described in English: each asks for the nearest node of the
                            ontology, as --classes would. With --text-encoder nearness is that of
                            meanings ("puppy whining" is near "Whimper (dog)"), without it that of
                            words ("cats meowing"). --dry-run shows what is near. A model that
                            was trained with texts (query.kind text, text_or_audio) is asked with
                            the text itself, or the nearest of its names if it was trained with
                            names alone; this needs an encoder and no --without
  --query FOLDER            the sound in the example recordings of the folder
  --query BANK.npz          every vector of a bank; with --classes, only those with these names
"""

import argparse
import dataclasses
import os
import pathlib
import sys
from typing import Any

from uss_jax.cli.arguments import (
    add_precision,
    add_recordings,
    add_threshold,
    input_files,
    number,
    path,
    positive,
    refuse_idle,
    whole,
)
from uss_jax.devices.precision import HIGHEST
from uss_jax.errors import NotHeard, UserError, counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    add_recordings(parser)
    parser.add_argument(
        "--model",
        type=path,
        metavar="B",
        help="bundle or workdir; default: demo, a small separator in the package, with which "
        "results are poor",
    )
    parser.add_argument(
        "--out",
        type=path,
        metavar="DIR",
        help="output folder; sounds go to DIR/<path of the recording>/; default: separated",
    )
    parser.add_argument("--classes", **several, metavar="NAME", help="see above")
    parser.add_argument("--levels", **several, type=positive, metavar="LEVEL", help="see above")
    parser.add_argument(
        "--first-parent",
        action="store_true",
        help="with --levels: count a class under its first parent only, as bytedance/uss does",
    )
    parser.add_argument("--without", **several, metavar="NAME", help="see above")
    parser.add_argument("--text", **several, metavar="TEXT", help="see above")
    parser.add_argument(
        "--text-encoder",
        type=path,
        metavar="DIR",
        help="with --text: the sentence encoder all-MiniLM-L6-v2, as published or converted",
    )
    parser.add_argument(
        "--nearest",
        type=whole(1, 100),
        metavar="N",
        help="with --text: ask with up to N nodes as one sound; default: 1",
    )
    parser.add_argument(
        "--similarity",
        type=number(0, 1),
        metavar="S",
        help="with --text: lowest similarity of a node; default: 0.3 by words, 0.5 by meanings",
    )
    parser.add_argument("--query", type=path, metavar="PATH", help="see above")
    add_threshold(parser, "is active in a segment")
    parser.add_argument(
        "--residual", action="store_true", help="also write the recording minus the estimates"
    )
    parser.add_argument(
        "--sum-to-mixture",
        action="store_true",
        help="divide the residual among the estimates of the sounds that are heard, so that they "
        "add up to the recording; needs several sounds",
    )
    parser.add_argument(
        "--blocks",
        choices=("windows", "reference"),
        help="windows with context (default), or blocks of 2 s without overlap as in "
        "bytedance/uss; for stereo, equal to bytedance/uss only with --mono",
    )
    parser.add_argument(
        "--mono",
        action="store_true",
        help="mix down to one channel first, as bytedance/uss does; otherwise all channels share "
        "a mask, which keeps sounds at their stereo positions, unless the model takes two at once",
    )
    parser.add_argument(
        "--format",
        choices=_FORMATS,
        help="default: wav (32-bit float); the others clip samples beyond full scale, and the "
        "report states how many",
    )
    add_precision(parser)
    parser.set_defaults(precision=None)  # tells that it is not given
    parser.add_argument(
        "--dry-run", action="store_true", help="only print which classes are heard where"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.epilog = (
        "example:\n"
        "  uss-jax separate street.wav --levels 1\n"
        '  uss-jax separate street.wav --model uss --classes "Dog" "Speech+Singing" --out sounds\n'
        '  uss-jax separate street.wav --model uss --classes "Human voice" --without Singing\n'
        "  uss-jax separate street.wav --model uss --without Speech"
        "\n\nexit status: 0 done, 1 some recordings could not be separated, 3 all were, but a\n"
        "queried class is not heard in some"
    )


# Name -> suffix, libsndfile subtype. Only floats hold samples beyond full scale.
_FORMATS = {
    "wav": (".wav", "FLOAT"),
    "wav24": (".wav", "PCM_24"),
    "wav16": (".wav", "PCM_16"),
    "flac": (".flac", "PCM_24"),
}


_REPORTED = ("model", "classes", "levels", "first_parent", "query", "threshold")
_REPORTED += ("blocks", "mono", "residual", "sum_to_mixture", "format", "precision")


_DEMONSTRATION = (
    "model demo: a demonstration, trained on minutes of sound; for good results give --model a "
    "published separator (`uss-jax convert`) or your own (`uss-jax train`)"
)


_BY_WORDS = (
    "--text compares words with the names of sounds; to compare meanings, give --text-encoder DIR, "
    "the published folder of all-MiniLM-L6-v2 (needs pip install 'uss-jax[text]')"
)


def run(args: argparse.Namespace) -> None:
    from uss_jax.models.query import HEARD
    from uss_jax.separation.job import separate_all
    from uss_jax.separation.queries import Classes, not_trained
    from uss_jax.separation.recordings import Separator, Settings
    from uss_jax.separation.words import refuse_files

    _refuse_idle_options(args)
    refuse_files(args.text or ())
    threshold = HEARD if args.threshold is None else args.threshold
    if args.dry_run:
        _dry_run(args, threshold)
        return
    args.blocks, args.format = args.blocks or "windows", args.format or "wav"
    out = args.out or "separated"
    recordings = _not_separated_before(input_files(args), out)
    model = _open(args, "demo")
    suffix, subtype = _FORMATS[args.format]
    settings = Settings(
        reference_blocks=args.blocks == "reference",
        mono=args.mono,
        residual=args.residual,
        only_residual=_takes_out(args),
        sum_to_mixture=args.sum_to_mixture,
        suffix=suffix,
        subtype=subtype,
        overwrite=args.overwrite,
    )
    asked = {key: value for key, value in vars(args).items() if key in _REPORTED}
    asked["threshold"] = None if args.query else threshold
    query = _query(args, model, threshold, asked)
    if len(query.sets if isinstance(query, Classes) else query.vectors) == 1:
        why = "with a single sound, whose estimate would be the whole recording"
        refuse_idle(args, ("sum_to_mixture",), why)
    if said := not_trained(model, query):
        print(said, file=sys.stderr)
    if args.without:
        asked["without"] = args.without
    done = separate_all(Separator(model, settings), recordings, out, query, asked)
    if done.failed:
        raise UserError(
            f"{done.failed} of {counted(len(recordings), 'recording')} could not be separated, "
            "see above"
        )
    if done.not_heard:
        result = "nothing was taken out for it" if _takes_out(args) else "its file is silent"
        raise NotHeard(
            f"in {done.not_heard} of {counted(len(recordings), 'recording')} a queried class is "
            f"not heard, and {result}; see above"
        )


def _dry_run(args: argparse.Namespace, threshold: float) -> None:
    """Prints what texts ask the model for, and which classes are heard where in the recordings."""
    from uss_jax.bundles.text_encoder import TextEncoder
    from uss_jax.separation.job import for_each, heard
    from uss_jax.separation.queries import not_trained

    model = _open(args, "yamnet") if args.model else None
    if args.text and model:
        query = _by_text(args, model, threshold, {})
        query.require_fit(model)
        if said := not_trained(model, query):
            print(said, file=sys.stderr)
    elif args.text:  # of all sounds, whatever a model knows
        encoder = TextEncoder(args.text_encoder) if args.text_encoder else None
        print("\n".join(map(str, _found(args, encoder))))
    if args.text and not _gives_recordings(args):
        return
    recordings = _not_separated_before(input_files(args), args.out or "separated")
    model = model or _open(args, "yamnet")
    failed = for_each(recordings, lambda one: print(heard(model, one.path, threshold)))
    if failed:
        raise UserError(f"{failed} of {counted(len(recordings), 'recording')} could not be read")


def _open(args: argparse.Namespace, default: str):
    """Opens the model, or the default one in the package, which `args` then names."""
    from uss_jax.bundles.model import Model
    from uss_jax.bundles.packaged import PACKAGED

    place = args.model or PACKAGED[default]  # whatever the working directory holds
    args.model = args.model or default
    if args.model == "demo":
        print(_DEMONSTRATION, file=sys.stderr)
    args.precision = args.precision or HIGHEST
    return Model(place, args.precision)


def _gives_recordings(args: argparse.Namespace) -> bool:
    return bool(args.audio or args.files_from)


def _not_separated_before(recordings: list, out: str) -> list:
    """Leaves out the sounds of an earlier run, unless they are named themselves."""
    from uss_jax.separation.job import UNFINISHED
    from uss_jax.separation.report import REPORT

    place = pathlib.Path(os.path.realpath(out))
    marks = REPORT, UNFINISHED

    def is_result(path: pathlib.Path) -> bool:
        parent = pathlib.Path(os.path.realpath(path.parent))
        inside = [folder for folder in (parent, *parent.parents) if place in folder.parents]
        return any((folder / mark).is_file() for folder in inside for mark in marks)

    left = [one for one in recordings if one.named or not is_result(one.path)]
    if skipped := len(recordings) - len(left):
        results = f"{counted(skipped, 'file')} that an earlier run has written below {out}"
        if not left:
            raise UserError(
                f"nothing is left but {results}; to separate these, name them or give another --out"
            )
        print(f"passed over {results}", file=sys.stderr)
    return left


def _refuse_idle_options(args: argparse.Namespace) -> None:
    if args.dry_run:
        asking = (
            "classes",
            "levels",
            "without",
            "query",
            "first_parent",
            "mono",
            "residual",
            "sum_to_mixture",
        )
        refuse_idle(args, asking, "with --dry-run, which prints all classes heard")
        refuse_idle(args, ("format", "blocks", "overwrite"), "with --dry-run, which writes nothing")
        if args.text and not _gives_recordings(args):
            of_recordings = ("threshold", "precision", "out")
            refuse_idle(args, of_recordings, "with --dry-run and --text, without recordings")
    if args.query:
        refuse_idle(args, ("threshold",), "with --query, which is separated everywhere")
        refuse_idle(args, ("without",), "with --query, whose vectors are not made of classes")
    if _takes_out(args):
        refuse_idle(args, ("residual",), "with --without, which gives nothing else")
        refuse_idle(args, ("sum_to_mixture",), "with --without, whose estimate would be it all")
    if args.text and (args.classes or args.levels or args.query):
        raise UserError("--text asks by itself; give it without --classes, --levels, --query")
    if not args.text:
        refuse_idle(args, ("text_encoder", "nearest", "similarity"), "without --text")
    if not args.levels:
        refuse_idle(args, ("first_parent",), "without --levels")
    if args.sum_to_mixture:
        refuse_idle(args, ("residual",), "with --sum-to-mixture, which leaves no residual")


def _found(args: argparse.Namespace, encoder, model=None) -> list:
    """Returns what the texts ask for, of what the model knows."""
    from uss_jax.separation.words import classes_of, excludes, find_texts

    if not args.text_encoder:
        print(_BY_WORDS, file=sys.stderr)
    if any(map(excludes, args.text)):
        print("a text cannot leave sounds out; --without NAME does", file=sys.stderr)
    of_model = classes_of(model) if model else {}
    return find_texts(args.text, encoder, args.similarity, args.nearest or 1, **of_model)


def _takes_out(args: argparse.Namespace) -> bool:
    """Returns whether everything but some classes is asked for."""
    return bool(args.without) and not (args.classes or args.levels or args.text)


def _by_text(args: argparse.Namespace, model, threshold: float, asked: dict[str, Any]):
    """Returns the query of texts, before `--without`; adds to `asked` what they ask for."""
    from uss_jax.bundles.text_encoder import TextEncoder
    from uss_jax.separation.queries import Classes, Vectors
    from uss_jax.separation.words import made_of, vectors_of_texts

    encoder = TextEncoder(args.text_encoder) if args.text_encoder else None
    asked["text_encoder"] = args.text_encoder
    if encoder and model.query.module.takes.texts and not args.without:
        idle = ("nearest", "similarity") if args.dry_run else ("threshold", "nearest", "similarity")
        refuse_idle(args, idle, "with a text's own vector, which is separated everywhere")
        found, vectors = vectors_of_texts(model, encoder, args.text)
        how = made_of(model)
        asked["threshold"] = None
        query = Vectors({one.name: vector for one, vector in zip(found, vectors, strict=True)})
    else:
        found, how = _found(args, encoder, model), "the classes of these nodes"
        asked["nearest"] = args.nearest or 1
        query = Classes({one.name: one.class_indexes for one in found}, threshold)
    print("\n".join([*map(str, found), f"asked with {how}"]))
    asked["text"] = [{**one.facts(), "asked_with": how} for one in found]
    return query


def _query(args: argparse.Namespace, model, threshold: float, asked: dict[str, Any]):
    """Returns the query; adds to `asked`, for the reports, what texts ask for."""
    from uss_jax.separation.banks import read_bank
    from uss_jax.separation.example_vectors import (
        AVERAGED,
        name_of_examples,
        vector_of_recordings,
    )
    from uss_jax.separation.queries import Classes, Vectors, level_sets, parse_classes, without

    def less(sets):
        if not args.without:
            return sets
        left, remarks = without(sets, args.without)
        for remark in remarks:
            print(remark, file=sys.stderr)
        return left

    if args.levels:
        if args.classes or args.query:
            raise UserError(
                "--levels queries all classes heard; give it without --classes, --query"
            )
        sets = less(level_sets(args.levels, args.first_parent))
        return Classes(sets, threshold, only_active=True)
    if args.text:
        query = _by_text(args, model, threshold, asked)
        return dataclasses.replace(query, sets=less(query.sets)) if args.without else query
    if args.query is None:
        if _takes_out(args):
            return Classes(parse_classes(["+".join(args.without)]), threshold)
        if not args.classes:
            raise UserError("no query; give --classes, --levels, --without, --text or --query")
        return Classes(less(parse_classes(args.classes)), threshold)
    if not args.query.endswith(".npz"):
        if args.classes:
            raise UserError(
                "--classes selects from a bank, but --query is not a bank (.npz); use only one"
            )
        vector = vector_of_recordings(model, args.query)
        asked["query_how"] = AVERAGED
        return Vectors({name_of_examples(args.query): vector})
    bank = read_bank(args.query, model)
    asked["query_how"] = bank.how
    rows = bank.select(args.classes or bank.name, args.query)
    return Vectors({bank.name[row]: bank.vectors[row] for row in rows})
