"""Makes bundles of the sentence encoder all-MiniLM-L6-v2, and the vectors of the ontology's nodes.

`python -m uss_jax.weights.minilm FOLDER` writes the vectors that travel in the package,
uss_jax/assets/text/nodes.npz; FOLDER is that of the encoder, as published or converted.
"""

import argparse
import json
import os
import pathlib

from uss_jax.bundles.bundle import FORMAT_VERSION
from uss_jax.bundles.node_vectors import (
    NODES_FILE,
    TEMPLATE,
    NodeVectors,
    node_texts,
    write_node_vectors,
)
from uss_jax.bundles.tensors import write_tensors
from uss_jax.bundles.text_encoder import (
    CONFIG,
    FILES,
    KIND,
    TENSORS,
    TOKENIZER,
    EncoderFiles,
    TextEncoder,
    read_encoder,
    tensors_of,
)
from uss_jax.disk.atomic import replacing_folder
from uss_jax.disk.folder import sha256_of
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology

# Licences of published encoders, by the SHA-256 of model.safetensors.
_LICENCES = {
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db": (
        "sentence-transformers/all-MiniLM-L6-v2: Apache-2.0"
    ),
}


def is_encoder_folder(path: str | os.PathLike) -> bool:
    """Returns whether a folder has the files of a sentence encoder."""
    return all((pathlib.Path(path) / name).is_file() for name in FILES)


def convert_encoder(path: str | os.PathLike, out: str | os.PathLike) -> EncoderFiles:
    """Writes a bundle of the kind `text_encoder` and returns what it holds.

    The bundle's tensors have the names of BERT without a prefix; a pooler is left out.

    Args:
      path: folder of the published encoder.
      out: folder to create; must not exist yet.

    Raises:
      UserError: the encoder is damaged, of another kind or a bundle already, or `out` exists.
    """
    out = pathlib.Path(out)
    if out.exists():
        raise UserError(f"{out} exists already; give a new folder")
    files = read_encoder(path)
    if files.is_bundle:
        raise UserError(f"{path} is a bundle already; use it as it is")
    config = {
        "format_version": FORMAT_VERSION,
        "kind": KIND,
        "encoder": files.fields,
        "hashes": {"encoder": files.hash, "tokenizer": files.tokenizer_hash},
        "licence": _licence(pathlib.Path(path)),
    }
    with replacing_folder(out) as unfinished:
        unfinished.mkdir()
        write_tensors(unfinished / TENSORS, tensors_of(files))
        (unfinished / TOKENIZER).write_text(files.tokenizer, encoding="utf-8", newline="")
        (unfinished / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return files


def _licence(folder: pathlib.Path) -> str:
    digest = sha256_of(folder / TENSORS)
    return _LICENCES.get(digest, f"unknown: see the source of {TENSORS} (SHA-256 {digest})")


def encode_nodes(encoder: TextEncoder, template: str = TEMPLATE) -> NodeVectors:
    """Encodes the text of every ontology node."""
    vectors = encoder.encode(node_texts(template))
    return NodeVectors(tuple(load_ontology().nodes), vectors, template, encoder.hash)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="writes the sentence vectors of all nodes")
    parser.add_argument("folder", metavar="FOLDER", help="folder of the sentence encoder")
    write_node_vectors(NODES_FILE, encode_nodes(TextEncoder(parser.parse_args().folder)))
