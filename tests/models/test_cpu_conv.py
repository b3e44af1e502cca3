"""Every form that a CPU computes in, through the functions that choose it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden.compare import distance
from tests.models.test_conv import normal
from uss_jax.devices.mesh import batch_sharded, make_mesh
from uss_jax.models.conv import conv3x3, linear

# Batch, frames, bins, channels in and out. From 32 channels on the filter gradient is a sum of
# products over a few rows: as many as fit, a part of them at the end, one for a long row. From 64
# on, minimal filtering over tiles of four rows: all at once, some at a time, a part at the end; of
# small maps with many channels, only the gradient.
SHAPES = [
    (2, 7, 6, 3, 5),
    (1, 1, 1, 1, 1),
    (2, 5, 4, 40, 33),
    (3, 23, 200, 32, 32),
    (1, 3, 1500, 32, 33),
    (2, 1, 3, 64, 32),
    (2, 9, 8, 31, 64),
    (2, 9, 8, 64, 65),
    (2, 30, 100, 80, 64),
    (1, 5, 600, 64, 64),
    (1, 1, 1, 64, 64),
    (2, 7, 32, 256, 64),
]


def plain(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def gradients(convolve, x, kernel, dy):
    return jax.jit(lambda *arrays: jax.vjp(convolve, *arrays)[1])(x, kernel)(dy)


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_xlas_own(shape):
    b, n, f, c, d = shape
    shapes = (b, n, f, c), (3, 3, c, d), (b, n, f, d)
    with jax.enable_x64(True):
        x, kernel, dy = (normal(*s, seed=i, dtype=float) for i, s in enumerate(shapes))
        both = (conv3x3, plain)
        assert distance(*(jax.jit(convolve)(x, kernel) for convolve in both)) < 1e-13
        actual, expected = (gradients(convolve, x, kernel, dy) for convolve in both)
        for a, e in zip(actual, expected, strict=True):
            assert a.shape == e.shape
            assert distance(a, e) < 1e-13


@pytest.mark.parametrize("shape", [(2, 7, 6, 3, 5), (1, 1, 1, 1, 1), (2, 30, 100, 4, 64)])
def test_a_linear_maps_gradients_are_jaxs_own(shape):
    b, n, f, c, d = shape
    with jax.enable_x64(True):
        shapes = (b, n, f, c), (c, d), (b, n, f, d)
        x, matrix, dy = (normal(*s, seed=i, dtype=float) for i, s in enumerate(shapes))
        actual, expected = (gradients(convolve, x, matrix, dy) for convolve in (linear, jnp.matmul))
        for a, e in zip(actual, expected, strict=True):
            assert a.shape == e.shape
            assert distance(a, e) < 1e-13


def test_minimal_filtering_loses_little_precision():
    """Sums of 64 x 9 products in float32: 9e-7 off, XLA's own 4e-7 and 1.4e-6 (filter gradient)."""
    x, kernel, dy = normal(2, 30, 100, 64), normal(3, 3, 64, 64), normal(2, 30, 100, 64, seed=2)
    actual = conv3x3(x, kernel), *gradients(conv3x3, x, kernel, dy)
    with jax.enable_x64(True):
        x, kernel, dy = (jnp.asarray(a, jnp.float64) for a in (x, kernel, dy))
        expected = plain(x, kernel), *gradients(plain, x, kernel, dy)
    assert max(map(distance, actual, expected)) < 2e-6


def test_minimal_filtering_keeps_a_sharded_batch_where_it_is():
    x, kernel = normal(8, 30, 100, 64), normal(3, 3, 64, 64)
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        rows = jax.device_put(x, batch_sharded(mesh))
        compiled = jax.jit(conv3x3).lower(rows, kernel).compile()
        assert "all-" not in compiled.as_text()
        actual = compiled(rows, kernel)
        assert actual.sharding.is_equivalent_to(rows.sharding, 4)
    assert distance(actual, plain(x, kernel)) < 1e-5


def test_filter_gradient_of_bfloat16_is_summed_in_float32():
    x, kernel, dy = (
        a.astype(jnp.bfloat16)
        for a in (normal(2, 30, 40, 32), normal(3, 3, 32, 32), normal(2, 30, 40, 32, seed=2))
    )
    _, actual = gradients(conv3x3, x, kernel, dy)
    _, expected = gradients(plain, *(a.astype(jnp.float32) for a in (x, kernel, dy)))
    assert actual.dtype == jnp.bfloat16
    # Only the last rounding, to eight bits.
    assert distance(actual.astype(np.float32), expected) < 2**-8


def test_filter_gradient_of_a_sharded_batch_is_reduced_once():
    x, kernel, dy = normal(8, 9, 8, 32), normal(3, 3, 32, 32), normal(8, 9, 8, 32, seed=2)
    gradient = lambda x, dy: jax.vjp(lambda k: conv3x3(x, k), kernel)[1](dy)[0]  # noqa: E731
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        rows = jax.device_put((x, dy), batch_sharded(mesh))
        compiled = jax.jit(gradient).lower(*rows).compile()
        assert compiled.as_text().count(" all-reduce(") == 1
        assert "all-gather" not in compiled.as_text()
        actual = compiled(*rows)
    assert distance(actual, gradients(plain, x, kernel, dy)[1]) < 1e-6
