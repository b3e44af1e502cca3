"""Sentence encoders on disk: MiniLM with its tokenizer.

Two kinds of folders are read, both with `config.json`, `model.safetensors` and `tokenizer.json`: a
bundle of the kind `text_encoder`, and the folder that sentence-transformers publishes. In both,
tensors have the names of BERT.

Letters: `n` sentences, `b` sentences of a batch, `l` tokens, `d` width.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

from uss_jax.bundles.bundle import FORMAT_VERSION, net_hash
from uss_jax.bundles.model import Net
from uss_jax.bundles.tensors import read_tensors, shapes_in
from uss_jax.devices.batching import in_batches
from uss_jax.disk.checked_json import (
    MAX_BYTES,
    Rule,
    anything,
    list_of,
    mapping_of,
    number,
    parse_json,
    record,
    shown,
    text,
    whole,
)
from uss_jax.disk.opening import at_once
from uss_jax.errors import UserError, counted
from uss_jax.models.minilm import WIDTH, MiniLM

CONFIG, TENSORS, TOKENIZER = FILES = ("config.json", "model.safetensors", "tokenizer.json")
KIND = "text_encoder"
# As sentence-transformers truncates for this encoder; counts the two special tokens.
MOST_TOKENS = 256
# Sentences are padded to one of these numbers of tokens, and batches to one of these of sentences.
_LENGTHS = (16, 32, 64, 128, MOST_TOKENS)
_BATCHES = (1, 32)
_PROBLEMS_SHOWN = 3
_FLOATS = ("F16", "F32", "F64")

# Fields of MiniLM by their key in a published config.json, with bounds far above this encoder.
_FIELDS: dict[str, tuple[str, Rule]] = {
    "vocab_size": ("vocabulary", whole(1, 1 << 18)),
    "max_position_embeddings": ("positions", whole(3, 1 << 14)),
    "type_vocab_size": ("token_types", whole(1, 16)),
    "hidden_size": ("width", whole(1, 1 << 16)),
    "num_hidden_layers": ("layers", whole(1, 48)),
    "num_attention_heads": ("heads", whole(1, 256)),
    "intermediate_size": ("hidden_width", whole(1, 1 << 13)),
    "layer_norm_eps": ("epsilon", number(1e-15, 1e-2)),
}
_PUBLISHED = record(
    {"model_type": text("bert"), **{key: rule for key, (_, rule) in _FIELDS.items()}},
    {"hidden_act": text("gelu"), "position_embedding_type": text("absolute")},
    others=True,
)
_BUNDLE = record(
    {
        "format_version": whole(FORMAT_VERSION, FORMAT_VERSION),
        "kind": text(KIND),
        "encoder": record(dict(_FIELDS.values())),
        "hashes": record({"encoder": text(), "tokenizer": text()}),
    },
    {"licence": text()},
    others=True,
)
# Files of sentence-transformers that tell what follows the last layer; they may be missing.
_FURTHER = {
    "modules.json": list_of(record({"type": text()}, others=True)),
    "1_Pooling/config.json": mapping_of(anything()),
}
_MODULES = ("Transformer", "Pooling", "Normalize")
_TOKENIZER = record(
    {
        "model": record(
            {"type": text("WordPiece")}, {"vocab": mapping_of(whole(0, 1 << 18))}, others=True
        ),
        "normalizer": record({"type": text("BertNormalizer")}, others=True),
        "pre_tokenizer": record({"type": text("BertPreTokenizer")}, others=True),
        "post_processor": record(
            {"type": text("TemplateProcessing", "BertProcessing")}, others=True
        ),
    },
    others=True,
)

# Layers of BERT: name, name in MiniLM, and its leaves. Dense kernels are transposed.
_NORM = {"weight": "scale", "bias": "bias"}
_DENSE = {"weight": "kernel", "bias": "bias"}
_EMBEDDING = {"weight": "embedding"}
_FIRST = "embeddings.word_embeddings"
_TABLE = (
    (_FIRST, "words", _EMBEDDING),
    ("embeddings.position_embeddings", "positions", _EMBEDDING),
    ("embeddings.token_type_embeddings", "token_types", _EMBEDDING),
    ("embeddings.LayerNorm", "norm", _NORM),
)
_LAYER_TABLE = (
    ("attention.self.query", "query", _DENSE),
    ("attention.self.key", "key", _DENSE),
    ("attention.self.value", "value", _DENSE),
    ("attention.output.dense", "out", _DENSE),
    ("attention.output.LayerNorm", "attention_norm", _NORM),
    ("intermediate.dense", "fc1", _DENSE),
    ("output.dense", "fc2", _DENSE),
    ("output.LayerNorm", "mlp_norm", _NORM),
)
# Tensors that mean pooling does not use.
_UNUSED = frozenset(("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"))


@dataclasses.dataclass(frozen=True)
class EncoderFiles:
    """The content of a sentence encoder's folder, checked.

    Attributes:
      module: the Flax module.
      params: its parameters, float32.
      tokenizer: text of tokenizer.json.
      is_bundle: whether the folder is a bundle.
      licence: licence that a bundle tells; empty if none.
    """

    module: MiniLM
    params: dict[str, Any]
    tokenizer: str
    is_bundle: bool
    licence: str = ""

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of the parameters; the same for a published folder and a bundle made of it."""
        return net_hash({"params": self.params})

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of the module, as in a bundle's config."""
        return {field: getattr(self.module, field) for field, _ in _FIELDS.values()}

    @property
    def tokenizer_hash(self) -> str:
        """SHA-256 of tokenizer.json."""
        return hashlib.sha256(self.tokenizer.encode()).hexdigest()


class TextEncoder:
    """A sentence encoder: maps sentences to vectors of unit norm.

    Attributes:
      path: path of the folder.
      hash: SHA-256 of the parameters. Vectors of encoders with different hashes do not compare.
      licence: licence that a bundle tells; empty if none.
    """

    width = WIDTH

    def __init__(self, path: str | os.PathLike):
        """Reads a bundle or a published folder.

        Raises:
          UserError: the folder is not one of an encoder like all-MiniLM-L6-v2 or is damaged, or the
            library `tokenizers` is missing.
        """
        self.path = os.fspath(path)
        files = read_encoder(path)
        self.hash, self.licence = files.hash, files.licence
        self._net = Net(files.module, jax.device_put({"params": files.params}))
        self._most_tokens = min(MOST_TOKENS, files.module.positions)
        self._tokenizer = _tokenizer(files, self.path)

    def encode(self, sentences: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Returns the vectors of sentences; what a sentence has beyond 256 tokens is left out.

        Raises:
          UserError: a sentence has no words, or the encoder is damaged.
        """
        if isinstance(sentences, str):
            raise TypeError("encode takes a list of sentences, not one sentence")
        tokens = [self._tokens(sentence) for sentence in sentences]
        vectors = np.zeros((len(tokens), self.width), np.float32)
        for rows, length in _batches([len(ids) for ids in tokens], self._most_tokens):
            padded = np.zeros((len(rows), length), np.int32)
            present = np.zeros((len(rows), length), bool)
            for i, row in enumerate(rows):
                padded[i, : len(tokens[row])] = tokens[row]
                present[i, : len(tokens[row])] = True
            vectors[rows] = self._net(padded, present)
        if not np.isfinite(vectors).all():
            raise UserError(f"{self.path} gives NaN or infinite vectors; get the encoder again")
        return vectors

    def knows(self, word: str) -> bool:
        """Returns whether a word is a token by itself, as common English words are."""
        return self._tokenizer.token_to_id(word.lower()) is not None

    def _tokens(self, sentence: str) -> list[int]:
        """Returns the token ids of a sentence, with the special tokens."""
        try:
            encoding = self._tokenizer.encode(sentence)
        except Exception as error:  # the library raises no other class
            raise UserError(
                f"the sentence {shown(sentence)} cannot be split into tokens "
                f"({str(error)[:200]}); use other characters"
            ) from error
        if all(encoding.special_tokens_mask):
            raise UserError(
                f"the sentence {shown(sentence)} has no words; say what the sound is, such as "
                '"a dog barks"'
            )
        highest = max(encoding.ids)
        if highest >= self._net.module.vocabulary:
            raise UserError(
                f"{self.path}: {TOKENIZER} gives token {highest}, but {TENSORS} has "
                f"{self._net.module.vocabulary}; they are of different encoders"
            )
        return encoding.ids


def _batches(lengths: Sequence[int], most: int) -> Iterator[tuple[list[int], int]]:
    """Yields rows of a batch and the number of tokens to pad them to.

    There are two sizes of batches, so that few programs compile; the last row is repeated.
    """
    of_length: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        padded = next(bound for bound in (*_LENGTHS, length) if bound >= length)
        of_length.setdefault(min(padded, most), []).append(row)
    for length, rows in of_length.items():
        size = _BATCHES[len(rows) > 1]
        for batch, _ in in_batches(rows, size):
            yield batch, length


def _tokenizer(files: EncoderFiles, path: str) -> Any:
    """Returns the tokenizer, without padding and with this encoder's truncation."""
    try:
        from tokenizers import Tokenizer
        from tokenizers.processors import TemplateProcessing
    except ImportError as error:
        raise UserError(
            "sentences are split into tokens by the library tokenizers, which is missing; "
            "install it: pip install 'uss-jax[text]'"
        ) from error
    try:
        tokenizer = Tokenizer.from_str(files.tokenizer)
        # BERT's own, since the library panics while it encodes if that of the file is inconsistent.
        ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
        tokenizer.no_padding()
        tokenizer.enable_truncation(min(MOST_TOKENS, files.module.positions))
    except Exception as error:  # the library raises no other class
        raise UserError(
            f"{path}/{TOKENIZER} is not a tokenizer ({str(error)[:200]}); get it again"
        ) from error
    return tokenizer


def read_encoder(path: str | os.PathLike) -> EncoderFiles:
    """Reads and checks the folder of a sentence encoder, see the module's docstring.

    Raises:
      UserError: a file is missing, damaged, or of another encoder.
    """
    path = pathlib.Path(path)
    if missing := [name for name in FILES if not (path / name).is_file()]:
        raise UserError(
            f"{path} is not the folder of a sentence encoder: it has no {missing[0]}; "
            "give the folder of all-MiniLM-L6-v2 or a bundle made from it"
        )
    content = _read_text(path / CONFIG)
    config = _parsed(content, mapping_of(anything()), path / CONFIG)
    is_bundle = "kind" in config
    _parsed(content, _BUNDLE if is_bundle else _PUBLISHED, path / CONFIG)
    if is_bundle:
        fields = config["encoder"]
    else:
        fields = {field: config[key] for key, (field, _) in _FIELDS.items()}
        _require_mean_pooling(path)
    module = _module(fields, path)
    params = _read_params(path / TENSORS, module)
    tokenizer = _read_text(path / TOKENIZER)
    _parsed(tokenizer, _TOKENIZER, path / TOKENIZER)
    licence = config.get("licence", "") if is_bundle else ""
    files = EncoderFiles(module, params, tokenizer, is_bundle, licence)
    if is_bundle:
        found = {"encoder": files.hash, "tokenizer": files.tokenizer_hash}
        for part, name in (("encoder", TENSORS), ("tokenizer", TOKENIZER)):
            if config["hashes"][part] != found[part]:
                raise UserError(
                    f"{path / name} does not match the hash of {part} in {CONFIG}; copy the "
                    "bundle again, or make it again with uss-jax convert"
                )
    return files


def _module(fields: Mapping[str, Any], path: pathlib.Path) -> MiniLM:
    width, heads = fields["width"], fields["heads"]
    if width != WIDTH:
        raise UserError(
            f"{path} is a sentence encoder of width {width}, but vectors here are of width "
            f"{WIDTH}; give all-MiniLM-L6-v2"
        )
    if width % heads:
        raise UserError(f"{path / CONFIG}: {heads} heads do not divide the width {width}")
    return MiniLM(**{**fields, "epsilon": float(fields["epsilon"])})


def _require_mean_pooling(path: pathlib.Path) -> None:
    """Raises a UserError unless a published folder's vectors are normed means over tokens."""
    further = {}
    for name, rule in _FURTHER.items():
        if (path / name).is_file():
            further[name] = _parsed(_read_text(path / name), rule, path / name)
    pooling = further.get("1_Pooling/config.json", {"pooling_mode_mean_tokens": True})
    modes = {key for key, value in pooling.items() if value is True and "_mode_" in key}
    if modes != {"pooling_mode_mean_tokens"}:
        raise UserError(
            f"{path}/1_Pooling/config.json asks for another vector than the mean over tokens; only "
            "encoders that take this mean can be used, such as all-MiniLM-L6-v2"
        )
    kinds = [module["type"].rpartition(".")[2] for module in further.get("modules.json", [])]
    if others := [kind for kind in kinds if kind not in _MODULES]:
        raise UserError(
            f"{path}/modules.json has a module {shown(others[0])}; only {', '.join(_MODULES)} can "
            "be used, as in all-MiniLM-L6-v2"
        )


def _tensor_paths(layers: int) -> dict[str, tuple[str, bool]]:
    """Maps the tensor names of BERT to (path of the parameter in MiniLM, whether transposed)."""
    table = list(_TABLE)
    for i in range(layers):
        table += [
            (f"encoder.layer.{i}.{name}", f"layer{i + 1}/{layer}", leaves)
            for name, layer, leaves in _LAYER_TABLE
        ]
    return {
        f"{name}.{leaf}": (f"{layer}/{to}", to == "kernel")
        for name, layer, leaves in table
        for leaf, to in leaves.items()
    }


def _read_params(path: pathlib.Path, module: MiniLM) -> dict[str, Any]:
    """Reads the parameters of a module; shapes and types are checked before anything is read."""
    there = shapes_in(path)
    first = [name for name in there if name.endswith(f"{_FIRST}.weight")]
    if len(first) != 1:
        raise UserError(
            f"{path} has {counted(len(first), 'tensor')} called {_FIRST}.weight, expected one; "
            "give the folder of all-MiniLM-L6-v2"
        )
    prefix = first[0].removesuffix(f"{_FIRST}.weight")
    paths = _tensor_paths(module.layers)
    inputs = (jax.ShapeDtypeStruct((1, 1), dtype) for dtype in (np.int32, np.bool_))
    layout = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    shapes = {key: leaf.shape for key, leaf in flatten_dict(layout, sep="/").items()}

    problems = []
    for name, (shape, kind) in there.items():
        plain = name.removeprefix(prefix) if name.startswith(prefix) else None
        if plain in paths:
            key, transposed = paths[plain]
            wanted = shapes[key][::-1] if transposed else shapes[key]
            if shape != wanted:
                problems.append(f"{name} has shape {list(shape)} instead of {list(wanted)}")
            elif kind not in _FLOATS:
                problems.append(f"{name} holds {kind} instead of floats")
        elif plain not in _UNUSED:
            problems.append(f"{shown(name)} is unexpected")
    problems += [f"{prefix}{name} is missing" for name in paths if prefix + name not in there]
    _require_none(problems, path)

    flat = {}
    for name, (key, transposed) in paths.items():
        array = read_tensors(path, [prefix + name])[prefix + name]
        with np.errstate(over="ignore"):  # gives inf
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            problems.append(f"{prefix}{name} holds NaN or infinite values")
        flat[key] = np.ascontiguousarray(array.T if transposed else array)
    _require_none(problems, path)
    return unflatten_dict(flat, sep="/")


def tensors_of(files: EncoderFiles) -> dict[str, np.ndarray]:
    """Returns the parameters by the tensor names of BERT, without a prefix."""
    flat = flatten_dict(files.params, sep="/")
    paths = _tensor_paths(files.module.layers)
    return {name: flat[key].T if kernel else flat[key] for name, (key, kernel) in paths.items()}


def _require_none(problems: Sequence[str], path: pathlib.Path) -> None:
    if problems:
        said = "; ".join(problems[:_PROBLEMS_SHOWN])
        more = len(problems) - _PROBLEMS_SHOWN
        raise UserError(
            f"{path} does not fit its {CONFIG}: {said}"
            + (f"; and {counted(more, 'more problem')}" if more > 0 else "")
        )


def _read_text(path: pathlib.Path) -> str:
    try:
        with open(path, "rb", opener=at_once) as file:
            return file.read(MAX_BYTES + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        words = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise UserError(f"{path} cannot be read ({words}); get it again") from error


def _parsed(content: str, rule: Rule | None, path: pathlib.Path) -> Any:
    try:
        return parse_json(content, rule)
    except ValueError as error:
        raise UserError(
            f"{path} is not that of a sentence encoder such as all-MiniLM-L6-v2: {error}"
        ) from error
