import jax
import jax.numpy as jnp
import numpy as np

from uss_jax.models.masks import complex_mask, direction_of


def test_mask_scales_and_turns_as_the_reference_does():
    rng = np.random.default_rng(0)
    spectrum = rng.standard_normal((2, 2, 7, 9)) + 1j * rng.standard_normal((2, 2, 7, 9))
    maps = rng.standard_normal((2, 7, 8, 6))
    maps[0, 2, 3] = 0  # no direction: the floor of the norm applies
    with jax.enable_x64(True):
        actual = np.asarray(spectrum * complex_mask(jnp.asarray(maps), audio_channels=2))
    for channel in range(2):
        mag, real, imag = np.moveaxis(np.pad(maps, ((0, 0), (0, 0), (0, 1), (0, 0))), -1, 0)[
            3 * channel : 3 * channel + 3
        ]
        mixture = spectrum[:, channel]
        cos_in, sin_in = mixture.real / np.abs(mixture), mixture.imag / np.abs(mixture)
        cos, sin = np.tanh(real), np.tanh(imag)
        norm = np.maximum(np.hypot(cos, sin), 1e-10)
        cos, sin = cos / norm, sin / norm
        magnitude = np.maximum(np.abs(mixture) / (1 + np.exp(-mag)), 0)
        expected = magnitude * ((cos_in * cos - sin_in * sin) + 1j * (sin_in * cos + cos_in * sin))
        np.testing.assert_allclose(actual[:, channel], expected, atol=1e-14)
    assert not actual[..., -1].any()  # the Nyquist bin
    assert not actual[0, :, 2, 3].any()


STEEPEST = 1e4
# From exact zeros over denormals to infinity, of either sign.
EXTREMES = np.array([0, 1e-45, 1e-40, 1e-30, 1e-12, 1e-10, 1e-5, 1e-4, 1e-2, 1, 1e4, np.inf])
EXTREMES = np.float32([*-EXTREMES, *EXTREMES])


def derivatives(function, real, imag):
    """[outputs, inputs, values] of a function of two arrays that gives two."""
    push = lambda *tangent: jax.jvp(function, (real, imag), tangent)[1]  # noqa: E731
    one, none = jnp.ones_like(real), jnp.zeros_like(real)
    return np.stack([push(one, none), push(none, one)], axis=1)


def test_the_direction_of_any_two_maps_has_a_bounded_derivative():
    real, imag = (jnp.asarray(x.ravel()) for x in np.meshgrid(EXTREMES, EXTREMES))
    values = direction_of(jnp.tanh(real), jnp.tanh(imag))
    assert np.isfinite(values).all()
    found = derivatives(lambda a, b: direction_of(jnp.tanh(a), jnp.tanh(b)), real, imag)
    assert np.abs(found).max() <= STEEPEST * (1 + 1e-6)
    # Reverse mode, as training uses it, of the whole mask.
    maps = jnp.stack([jnp.zeros_like(real), real, imag], axis=-1)[None, None]
    gradient = jax.grad(lambda x: jnp.sum(jnp.real(complex_mask(x, 1) * (1 + 0.5j))))(maps)
    assert np.abs(gradient).max() <= 0.5 * (1 + 0.5) * STEEPEST


def test_the_direction_has_the_derivative_of_finite_differences_where_it_has_one():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        angle, length = rng.uniform(0, 2 * np.pi, 500), 10 ** rng.uniform(-3.9, 0.1, 500)
        maps = jnp.asarray([length * np.cos(angle), length * np.sin(angle)])
        found = derivatives(direction_of, *maps)
        for i in range(2):
            step = np.zeros((2, 500))
            step[i] = 1e-6 * length
            ahead, behind = (np.stack(direction_of(*(maps + s))) for s in (step, -step))
            expected = (ahead - behind) / (2 * step[i])
            np.testing.assert_allclose(found[:, i], expected, rtol=1e-6, atol=1e-6 / length.min())


def test_the_direction_is_the_references_for_any_two_maps():
    real, imag = map(np.ravel, np.meshgrid(EXTREMES, EXTREMES))
    finite = np.isfinite(real) & np.isfinite(imag)
    real, imag = np.float64(real[finite]), np.float64(imag[finite])
    length = np.maximum(np.hypot(real, imag), 1e-10)
    with jax.enable_x64(True):
        found = np.stack(direction_of(jnp.asarray(real), jnp.asarray(imag)))
    np.testing.assert_allclose(found, np.stack([real, imag]) / length, rtol=1e-12)
