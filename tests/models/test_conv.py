import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden.compare import distance
from uss_jax.models.conv import Conv1x1, Conv3x3, Upsample


def normal(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def flax_transposed(stride):
    return nn.ConvTranspose(4, stride, stride, transpose_kernel=True, use_bias=False)


LAYERS = [
    (Conv3x3(4, "float32"), nn.Conv(4, (3, 3), use_bias=False)),
    (Conv1x1(4, "float32"), nn.Conv(4, (1, 1))),
    (Upsample(4, (2, 2), "float32"), flax_transposed((2, 2))),
    (Upsample(4, (1, 2), "float32"), flax_transposed((1, 2))),
]


def variables_of(layer, x):
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    return jax.tree.map(lambda leaf: normal(*leaf.shape, seed=1, dtype=leaf.dtype), shapes)


@pytest.mark.parametrize(("ours", "flaxs"), LAYERS)
def test_layers_are_flaxs_with_the_same_parameters(ours, flaxs):
    x = normal(2, 5, 6, 3)
    variables = variables_of(ours, x)
    jax.tree.map(np.testing.assert_array_equal, variables, variables_of(flaxs, x))
    np.testing.assert_allclose(ours.apply(variables, x), flaxs.apply(variables, x), atol=1e-5)


@pytest.mark.parametrize("ours", [layer for layer, _ in LAYERS])
def test_bfloat16_is_for_computing_and_parameters_stay_float32(ours):
    x, narrow = normal(2, 5, 6, 3), ours.clone(dtype="bfloat16")
    variables = variables_of(narrow, x)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))
    rough, exact = narrow.apply(variables, x), ours.apply(variables, x)
    assert rough.dtype == jnp.bfloat16
    # Inputs and parameters are rounded to eight bits.
    assert 0 < distance(rough.astype(np.float32), exact) < 0.01
