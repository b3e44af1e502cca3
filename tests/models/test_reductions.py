import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uss_jax.models.reductions import places, sum_places


@pytest.mark.parametrize(
    "shape", [(3, 5), (2, 1, 1, 1, 3), (2, 7, 3), (2, 6, 5, 3), (2, 4, 64, 32), (1, 3, 8, 256)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_all_places_of_each_channel_in_float32(shape, dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)
    found = jax.jit(sum_places)(x)
    exact = np.asarray(x, np.float64).reshape(shape[0], -1, shape[-1]).sum(axis=1)
    assert found.dtype == jnp.float32
    assert places(x) == np.prod(shape[1:-1])
    np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-5)


def test_a_long_sum_keeps_its_digits():
    # Terms of one sign: a running sum over 262,144 places is off by 1e-4 and more.
    x = np.random.default_rng(0).uniform(0.9, 1.1, (1, 256, 1024, 4)).astype(np.float32)
    exact = x.astype(np.float64).sum((1, 2))
    np.testing.assert_allclose(jax.jit(sum_places)(jnp.asarray(x)), exact, rtol=2e-6)
