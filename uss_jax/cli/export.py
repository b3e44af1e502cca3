"""Exports a separator for other programs, other machines or other device meshes.

orbax        a bundle like the given one, its arrays whole or sharded (--shards), in float32 or
             bfloat16 (--dtype)
safetensors  one file with all tensors, or without those of nets in the package
stablehlo    functions: from mixture and condition to estimate, for any batch size and a fixed
             window length, and from recording to condition; they need only jax, on cpu, cuda or tpu

Every export is run on noise and compared with the model before it is moved to DIR.
"""

import argparse
import dataclasses

from uss_jax.cli.arguments import add_precision, number, path, positive, refuse_idle
from uss_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle", type=path, metavar="BUNDLE", help="bundle or workdir of a separator"
    )
    parser.add_argument("--format", required=True, choices=("orbax", "safetensors", "stablehlo"))
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="folder to create")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="dtype of the stored parameters; default: float32",
    )
    parser.add_argument(
        "--parameters",
        choices=("averaged", "last"),
        help="parameters of a run: the moving average if it has one (default), or the last step's",
    )
    parser.add_argument(
        "--shards",
        type=positive,
        metavar="N",
        help="orbax: shard every array over N devices; default: 1, whole arrays",
    )
    parser.add_argument(
        "--window-seconds",
        type=number(0.01, 600),
        metavar="S",
        help="stablehlo: window length, in seconds; default: the segment length, 2 s as published",
    )
    parser.add_argument(
        "--without-packaged",
        action="store_true",
        help="safetensors: leave out tagging nets that are in the package (yamnet); other programs "
        "cannot compute conditions then",
    )
    parser.add_argument(
        "--class-means",
        type=path,
        metavar="TABLE",
        help="store the mean vector of each class, with which --classes, --levels and --text ask: "
        "table of anchors that `mine --query BUNDLE` wrote; default: those of the model, if any",
    )
    parser.add_argument(
        "--records", type=path, metavar="R", help="--class-means: records of the table"
    )
    parser.add_argument(
        "--split", help="--class-means: split of the records; default: train", metavar="NAME"
    )
    parser.add_argument(
        "--licence", help="licence of the parameters, for config.json; default: the model's"
    )
    add_precision(parser, of="stablehlo: ")
    parser.epilog = (
        "example:\n"
        "  uss-jax export uss --format stablehlo --out uss_stablehlo\n"
        "  JAX_NUM_CPU_DEVICES=8 uss-jax export runs/soft --format orbax --shards 8 --out soft8\n"
        "  uss-jax export uss --format orbax --class-means anchors.npz \\\n"
        "      --records data/audioset_balanced_train/1.0.0 --out uss_with_means"
    )


def run(args: argparse.Namespace) -> None:
    from uss_jax.bundles.bundle import read_bundle
    from uss_jax.weights.export import export
    from uss_jax.weights.means import means_of

    if args.format != "orbax":
        refuse_idle(args, ("shards",), "without --format orbax")
    if args.format != "stablehlo":
        refuse_idle(args, ("window_seconds",), "without --format stablehlo")
    else:
        refuse_idle(args, ("dtype",), "with stablehlo, which stores the functions as they run")
    if args.format != "safetensors":
        refuse_idle(args, ("without_packaged",), "without --format safetensors")
    if not args.class_means:
        refuse_idle(args, ("records", "split"), "without --class-means")
    elif not args.records:
        raise UserError("--class-means needs --records, the records that its table is of")
    bundle = read_bundle(args.bundle, averaged=args.parameters != "last")
    if not bundle.is_run:
        refuse_idle(args, ("parameters",), "with a bundle, which holds one set of parameters")
    if args.licence:
        config = {**bundle.config, "licence": args.licence}
        bundle = dataclasses.replace(bundle, config=config)
    means = None
    if args.class_means:
        means = means_of(bundle, args.class_means, args.records, args.split or "train")
    checked = export(
        bundle,
        args.format,
        args.out,
        dtype=args.dtype or "float32",
        shards=args.shards or 1,
        window_seconds=args.window_seconds,
        precision=args.precision,
        without_packaged=args.without_packaged,
        means=means,
    )
    print(f"{args.out}: {args.format}; {checked}")
