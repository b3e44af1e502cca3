"""Small nets with random variables, and comparisons of trees, for tests of conversions."""

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from tests.golden.weights import fixed_buffer
from tests.tiny import shapes_of
from uss_jax.models.cnn14 import Cnn14
from uss_jax.models.resunet import ResUNet

TAGGER_FIELDS = dict(
    sample_rate=32000,
    n_fft=1024,
    hop_samples=320,
    mel_bins=8,
    f_min=50.0,
    f_max=14000.0,
    channels=(4, 6),
    classes=527,
)
SEPARATOR_FIELDS = dict(
    n_fft=2048,
    hop_samples=320,
    channels=(4, 6, 6),
    blocks_per_level=2,
    audio_channels=2,
    condition_width=527,
)


def all_random(module, *shapes, seed=0):
    """Variables of a module with random numbers everywhere."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes_of(module, shapes)
    )


def tagger_variables(fields=TAGGER_FIELDS, seed=0):
    return all_random(Cnn14(**fields), (1, 3200), seed=seed)


def separator_variables(fields=SEPARATOR_FIELDS, seed=0):
    shapes = (1, fields["audio_channels"], 640), (1, fields["condition_width"])
    return all_random(ResUNet(**fields), *shapes, seed=seed)


def assert_same_tree(actual, expected):
    actual, expected = (flatten_dict(tree, sep="/") for tree in (actual, expected))
    assert actual.keys() == expected.keys()
    for path in expected:
        np.testing.assert_array_equal(actual[path], expected[path], err_msg=path)


def empty_arrays(rows):
    """Arrays of the right shapes: formulas are real, all else is zero."""
    formulas = ("stft.conv_real.weight", "melW")
    return {
        row["name"]: fixed_buffer(tuple(row["shape"]), *row["kind"].split(":"))
        if row["name"].endswith(formulas) and "istft" not in row["name"]
        else np.zeros(row["shape"], row["dtype"])
        for row in rows
    }


def shapes(tree):
    return {path: tuple(leaf.shape) for path, leaf in flatten_dict(tree, sep="/").items()}


def leaf_count(tree):
    return len(jax.tree.leaves(tree))
