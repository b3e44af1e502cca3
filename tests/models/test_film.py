import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden.compare import relative_error
from tests.golden.nets import golden_separator
from tests.golden.ways import limit
from uss_jax.models.film import FiLM, scaled_to


def path_of(torch_name):
    """Where a FiLM layer of the reference lies in our tree of parameters."""
    *place, layer = torch_name.replace("conv_block7a", "centre_block").split("->")
    # A decoder level's first layer has the transposed convolution, which the reference names 1.
    name = layer.replace("beta", "film") if len(place) == 2 else "film"
    return [*(part.replace("conv_block2", "conv_block1") for part in place), name]


@pytest.mark.golden
@pytest.mark.parametrize("width", [527, 2048])
def test_golden_shifts(golden, width):
    _, variables = golden_separator(f"resunet30_cond{width}")
    with np.load(golden / "film.npz") as fixture:
        condition = jnp.asarray(fixture[f"cond{width}/condition"])
        names = [key.split("/")[1] for key in fixture if key.startswith(f"cond{width}/")]
        # The reference makes, but never uses, a second layer in front of its decoder levels.
        used = [n for n in names if "beta" in n and not re.fullmatch(r"decoder_block\d->beta2", n)]
        assert len(used) == 32
        for name in used:
            layer = variables["params"]
            for part in path_of(name):
                layer = layer[part]
            film = FiLM(layer["shift"]["bias"].size)
            shift, gain = film.apply({"params": layer}, condition)
            assert gain is None
            key = f"cond{width}/{name}"
            error = relative_error(fixture, key, shift[:, :, None, None])
            assert error < limit("a linear map", 5e-6), name


def test_gain_starts_at_zero_and_is_linear_in_the_condition():
    film = FiLM(3, with_gain=True)
    condition = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5)), jnp.float32)
    variables = film.init(jax.random.key(0), condition)
    shift, gain = film.apply(variables, condition)
    assert shift.shape == gain.shape == (2, 3)
    np.testing.assert_array_equal(gain, 0)
    kernel = np.arange(15.0, dtype=np.float32).reshape(5, 3)
    variables["params"]["gain"]["kernel"] = kernel
    _, gain = film.apply(variables, condition)
    np.testing.assert_allclose(gain, condition @ kernel, rtol=1e-5)


def test_scaled_conditions_keep_their_direction_only():
    rng = np.random.default_rng(0)
    condition = jnp.asarray(rng.uniform(size=(4, 20)), jnp.float32)
    scaled = np.asarray(scaled_to(condition, 8.0))
    np.testing.assert_allclose(np.linalg.norm(scaled, axis=1), 8, rtol=1e-3)
    np.testing.assert_allclose(scaled_to(5 * condition, 8.0), scaled, rtol=1e-3)
    np.testing.assert_allclose(scaled / scaled[:, :1], condition / condition[:, :1], rtol=1e-5)


@pytest.mark.parametrize("norm", [0.0, 1e-30, 1e-12, 1e-5, 1e-2, 1.0, 1e10])
def test_scaling_has_a_bounded_gradient_at_every_length(norm):
    direction = np.random.default_rng(0).standard_normal(20)
    condition = jnp.asarray(norm * direction / np.linalg.norm(direction), jnp.float32)[None]
    scaled = scaled_to(condition, 8.0)
    assert float(jnp.linalg.norm(scaled)) <= 8.001
    gradient = jax.jacobian(lambda x: scaled_to(x, 8.0))(condition)[0, :, 0]
    assert float(jnp.linalg.norm(gradient, 2)) <= 800.1
    if norm == 0:
        assert not scaled.any()
