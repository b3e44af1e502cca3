"""Makes and lists banks: conditions of recordings or texts, for `uss-jax separate --query`.

make   one vector per folder (or single recording), named after it: silence removed, averaged over
       the segments of each recording, then over recordings; and one per text
list   lists the vectors of a bank
"""

import argparse

from uss_jax.cli.arguments import path
from uss_jax.errors import UserError, counted, one_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="query_command", required=True, metavar="make|list")
    make = commands.add_parser("make", help="make a bank", allow_abbrev=False)
    make.add_argument("bank", type=path, metavar="BANK.npz", help="file to write")
    make.add_argument(
        "examples",
        type=path,
        nargs="*",
        metavar="FOLDER",
        help="folder with recordings of one sound, or one recording",
    )
    make.add_argument(
        "--text",
        nargs="+",
        action="extend",
        default=[],
        metavar="TEXT",
        help="sounds described in English, for models of one_hot or texts",
    )
    make.add_argument(
        "--text-encoder",
        type=path,
        metavar="DIR",
        help="with --text: as in `uss-jax separate`",
    )
    make.add_argument("--model", type=path, required=True, metavar="B", help="bundle or workdir")
    make.add_argument("--overwrite", action="store_true", help="replace BANK.npz if it exists")
    show = commands.add_parser("list", help="list the vectors of a bank", allow_abbrev=False)
    show.add_argument("bank", type=path, metavar="BANK.npz")
    parser.epilog = (
        "example:\n"
        "  uss-jax query make sounds.npz doorbells/ my_dog.wav --model uss\n"
        '  uss-jax query make words.npz --text "a puppy whines" --model runs/words \\\n'
        "      --text-encoder minilm\n"
        "  uss-jax query list sounds.npz\n"
        "  uss-jax separate street.wav --model uss --query sounds.npz --out separated"
    )


def run(args: argparse.Namespace) -> None:
    if args.query_command == "list":
        _list(args.bank)
    else:
        _make(args)


def _list(path: str) -> None:
    from uss_jax.separation.banks import load_bank

    bank = load_bank(path)
    about = (
        f"{path}: {counted(len(bank.name), 'vector')} of width {bank.vectors.shape[1]}, "
        f"kind {bank.kind}, made with query net {bank.net_hash}, {bank.how or 'origin unknown'}"
    )
    print("\n".join(map(one_line, [about, *(f"  {name}" for name in bank.name)])))


def _make(args: argparse.Namespace) -> None:
    import pathlib

    import numpy as np

    from uss_jax.bundles.model import Model
    from uss_jax.bundles.text_encoder import TextEncoder
    from uss_jax.separation.banks import Bank, require_npz, write_bank
    from uss_jax.separation.example_vectors import (
        AVERAGED,
        name_of_examples,
        vector_of_recordings,
    )
    from uss_jax.separation.words import conditions_of_texts, refuse_files

    if not (args.examples or args.text):
        raise UserError("nothing to store; give folders of recordings, or --text")
    if args.text_encoder and not args.text:
        raise UserError("--text-encoder has no effect without --text; leave it out")
    refuse_files(args.text)
    require_npz(args.bank)
    if pathlib.Path(args.bank).exists() and not args.overwrite:
        raise UserError(f"{args.bank} exists; give --overwrite to replace it")
    names = [name_of_examples(example) for example in args.examples]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f'two examples are called "{min(twice)}"; rename one of them')
    model = Model(args.model)
    vectors, how = {}, [AVERAGED] if names else []
    if args.text:
        encoder = TextEncoder(args.text_encoder) if args.text_encoder else None
        vectors, said = conditions_of_texts(model, encoder, args.text, "--text NAME")
        how.append(said)
    if twice := vectors.keys() & set(names):
        raise UserError(f'"{min(twice)}" is an example and a text; change one of them')
    names += vectors
    remedy = "give --text instead of folders"
    of_examples = [vector_of_recordings(model, example, remedy) for example in args.examples]
    bank = Bank(
        tuple(names),
        np.stack([*of_examples, *vectors.values()]),
        model.query.module.kind,
        model.query_hash,
        f"{'; '.join(how)}; for {args.model}",
    )
    write_bank(args.bank, bank)
    print(f"{args.bank}: {counted(len(names), 'vector')}")
