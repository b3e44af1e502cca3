import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.lowered import precisions, products
from uss_jax.devices.precision import at_precision
from uss_jax.models.conv import conv3x3, linear

# One for each form that a CPU convolves in: by XLA, products of rows, tiles, one product.
CONVOLUTIONS = [(2, 8, 9, 4, 4), (1, 8, 64, 32, 32), (1, 8, 64, 64, 64), (1, 4, 8, 256, 256)]


def _convolution(shape):
    b, n, f, c, d = shape
    shapes = (b, n, f, c), (3, 3, c, d)
    return conv3x3, [jax.ShapeDtypeStruct(s, np.float32) for s in shapes]


def _linear():
    shapes = (1, 8, 9, 4), (4, 5)
    return linear, [jax.ShapeDtypeStruct(s, np.float32) for s in shapes]


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("function", "arrays"),
    [*map(_convolution, CONVOLUTIONS), _linear()],
    ids=[*map(str, CONVOLUTIONS), "linear"],
)
def test_gradients_have_the_precision_of_the_call(function, arrays, compiled, platform):
    """Differentiated where that precision is no longer in force, and another one is."""

    def called(*arrays):
        return jnp.sum(jnp.square(at_precision("highest", function)(*arrays)))

    called = jax.jit(called) if compiled else called
    with jax.default_matmul_precision("high"):
        assert precisions(products(called, *arrays, platform=platform)) == {"HIGHEST"}
        both = products(jax.grad(called, argnums=(0, 1)), *arrays, platform=platform)
    assert len(both) >= 3
    assert precisions(both) == {"HIGHEST"}


def test_without_a_precision_it_is_what_is_in_force():
    function, arrays = _linear()
    with jax.default_matmul_precision("high"):
        assert precisions(products(function, *arrays)) == {"HIGH"}
