"""Converts checkpoints of PANNs, HTS-AT, bytedance/uss or MiniLM to a bundle, or a bundle back.

IN is one checkpoint, or two: a tagging net and a detector to store in one bundle. A bytedance/uss
checkpoint contains separator, query net and detector and becomes a separator bundle. PANNs' Cnn14
becomes the query net of a tagger bundle, Cnn14_DecisionLevelMax its detector ("sed"), and HTS-AT
both. In the other direction, IN is the bundle of a bytedance/uss checkpoint and OUT a .ckpt file,
which the original program loads with strict=True under Lightning 1.9 and newer.

Both directions need PyTorch (pip install 'uss-jax[torch]'). No code in a checkpoint is executed.

IN may also be the folder of the sentence encoder all-MiniLM-L6-v2, with model.safetensors,
tokenizer.json and config.json; this needs no PyTorch.
"""

import argparse
import dataclasses
import hashlib
import pathlib

from uss_jax.cli.arguments import path, refuse_idle
from uss_jax.errors import UserError, counted

_ENCODER = "minilm"
KINDS = ("cnn14", "decision-level-max", "htsat", "uss", _ENCODER)
# Licences of published files, by the MD5 sums that the publisher gives.
_PANNS = "PANNs, https://zenodo.org/records/3987831: CC BY 4.0"
_LICENCES = {
    "541141fa2ee191a88f24a3219fff024e": _PANNS,  # Cnn14_mAP=0.431.pth
    "70539c43c18b6a289b3199c503a82c5a": _PANNS,  # Cnn14_DecisionLevelMax_mAP=0.385.pth
}
# Length of anchors and of separated segments in bytedance/uss.
_SEGMENT_SECONDS = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        type=path,
        nargs="+",
        metavar="IN",
        help=".pth or .ckpt file, a bundle, or a folder",
    )
    parser.add_argument(
        "out", type=path, metavar="OUT", help="folder of the bundle, or a .ckpt file"
    )
    parser.add_argument(
        "--kind",
        action="append",
        choices=KINDS,
        help="kind of IN, given once per IN; default: inferred from tensors and published names",
    )
    parser.epilog = (
        "example:\n"
        "  uss-jax convert 'Cnn14_mAP=0.431.pth' 'Cnn14_DecisionLevelMax_mAP=0.385.pth' panns\n"
        "  uss-jax convert HTSAT_AudioSet_Saved_1.ckpt htsat\n"
        "  uss-jax convert net.pth tagger --kind cnn14\n"
        "  uss-jax convert uss uss.ckpt\n"
        "  uss-jax convert all-MiniLM-L6-v2 minilm"
    )


def run(args: argparse.Namespace) -> None:
    from uss_jax.bundles.bundle import write_bundle
    from uss_jax.ontology import load_ontology
    from uss_jax.weights.unpickle import read_checkpoint

    source = pathlib.Path(args.inputs[0])
    if len(args.inputs) == 1 and not source.is_file() and _is_encoder(args.inputs[0], args.kind):
        _convert_encoder(args.inputs[0], args.out)
        return
    if len(args.inputs) == 1 and source.is_dir():
        refuse_idle(args, ("kind",), "with a bundle, whose kind is stored in it")
        _write_back(args.inputs[0], args.out)
        return
    kinds = args.kind or [None] * len(args.inputs)
    if len(kinds) != len(args.inputs):
        raise UserError(
            f"{len(kinds)} --kind for {counted(len(args.inputs), 'file')}; give one per file"
        )
    if _ENCODER in kinds:
        raise UserError(f"--kind {_ENCODER} takes one folder as IN, and no other kind beside it")
    if pathlib.Path(args.out).exists():
        raise UserError(f"{args.out} exists already; give a new folder")
    parts, licences = {}, {}
    for source, kind in zip(args.inputs, kinds, strict=True):
        state_dict = read_checkpoint(source)
        kind = kind or _guess_kind(source, state_dict)
        try:
            found = _convert(state_dict, kind)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        if twice := parts.keys() & found.keys():
            raise UserError(f"{source} is a second {twice.pop()} net; a bundle holds one")
        parts |= found
        licences[_licence(source)] = None
    config = {**_bundle_config(parts), "licence": "; ".join(licences)}
    foreign = {  # prefixed, since two files may use the same names
        f"{part}/{name}": array
        for part, converted in parts.items()
        for name, array in converted.foreign.items()
    }
    write_bundle(args.out, config, {name: part.variables for name, part in parts.items()}, foreign)
    print(f"{args.out}: a {config['kind']} bundle with {', '.join(sorted(parts))}")
    wanted = len(load_ontology().class_mids)
    for name in sorted(parts):
        if (classes := parts[name].fields.get("classes", wanted)) != wanted:
            print(
                f"{name} has {classes} classes, not AudioSet's {wanted}: a run can start from it "
                "with config.init_from and --config.init_partly=True; it has no other use"
            )


def _is_encoder(path: str, kinds: list[str] | None) -> bool:
    """Returns whether a folder is to be converted as that of a sentence encoder."""
    from uss_jax.weights.minilm import is_encoder_folder

    return kinds == [_ENCODER] or (kinds is None and is_encoder_folder(path))


def _convert_encoder(path: str, out: str) -> None:
    """Converts the folder of a sentence encoder."""
    from uss_jax.weights.minilm import convert_encoder

    net = convert_encoder(path, out).module
    print(f"{out}: a text_encoder bundle with {net.layers} layers of width {net.width}")


def _write_back(path: str, out: str) -> None:
    """Writes a bundle as a Lightning checkpoint."""
    from uss_jax.bundles.bundle import read_bundle
    from uss_jax.weights.lightning import lightning_state_dict, write_lightning

    if not out.endswith(".ckpt"):
        raise UserError(
            f"{path} is a folder, converted to a .ckpt file; {out} does not end in .ckpt"
        )
    state_dict = lightning_state_dict(read_bundle(path))
    write_lightning(out, state_dict)
    print(f"{out}: {counted(len(state_dict), 'tensor')}")


def _guess_kind(path: str, state_dict: dict) -> str:
    """Returns one of KINDS, from the tensor names and, for PANNs, the published file names."""

    if any(name.startswith(("ss_model.", "base.")) for name in state_dict):
        return "uss"
    if any(name.endswith("tscam_conv.weight") for name in state_dict):
        return "htsat"
    for start, kind in (("Cnn14_DecisionLevelMax", "decision-level-max"), ("Cnn14_mAP", "cnn14")):
        if pathlib.Path(path).name.startswith(start):
            return kind
    raise UserError(
        f"{path}: Cnn14 as tagging net and as detector has the same tensors; "
        "give --kind cnn14 or --kind decision-level-max"
    )


def _convert(state_dict: dict, kind: str) -> dict:
    """Converts a state dict; returns part of a bundle -> Converted."""
    from uss_jax.weights.cnn14 import convert_cnn14
    from uss_jax.weights.htsat import convert_htsat
    from uss_jax.weights.lightning import convert_lightning
    from uss_jax.weights.resunet import convert_resunet

    if kind == "htsat":
        both = convert_htsat(state_dict)
        return {"query": dataclasses.replace(both, foreign={}), "sed": both}
    if kind != "uss":
        return {"query" if kind == "cnn14" else "sed": convert_cnn14(state_dict)}
    if any(name.startswith("base.") for name in state_dict):
        return {"separator": convert_resunet(state_dict)}
    return convert_lightning(state_dict)


def _licence(path: str) -> str:
    """Returns the licence of a published file; refers to the source for other files."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    unknown = f"unknown: see the source of {pathlib.Path(path).name} (MD5 {digest})"
    return _LICENCES.get(digest, unknown)


def _bundle_config(parts: dict) -> dict:
    """Returns the bundle's config, without its licence and what `write_bundle` adds."""
    from uss_jax.bundles.nets import fields_of, require_classes

    if "separator" in parts:
        for name in parts.keys() & {"query", "sed"}:
            require_classes(parts[name].build(), name)
    models = {name: fields_of(parts[name].build()) for name in ("query", "sed") if name in parts}
    rates = {model["sample_rate"] for model in models.values()} or {32000}
    if len(rates) > 1:
        raise UserError(f"the nets are for different sample rates: {sorted(rates)} Hz")
    config = {
        "kind": "separator" if "separator" in parts else "tagger",
        "sample_rate": rates.pop(),
        "segment_seconds": _SEGMENT_SECONDS,
    }
    if "separator" in parts:
        config["separator"] = parts["separator"].fields
    if "query" in parts:
        config["query"] = {"kind": _query_kind(parts), "model": models["query"]}
    if "sed" in parts:
        config["sed"] = {"model": models["sed"]}
    return config


def _query_kind(parts: dict) -> str:
    """Returns the kind of the condition, "soft" or "embedding", by its width."""

    net = parts["query"].build()
    widths = {net.classes: "soft", net.embedding_width: "embedding"}
    if "separator" not in parts:
        return "soft"
    width = parts["separator"].fields["condition_width"]
    if width not in widths:
        raise UserError(
            f"condition of width {width}, expected one of the query net's {list(widths)}"
        )
    return widths[width]
