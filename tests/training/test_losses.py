import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden.compare import distance, relative_error
from tests.golden.inputs import make_batch
from uss_jax.evaluation import metrics
from uss_jax.training.losses import LOSSES, binary_cross_entropy, l1_waveform


def pair(dims, tag):
    """Estimate and target [b, c, n] of the reference."""
    b, c, n = dims
    signals = (make_batch(f"dev/loss/{tag}/{side}", b * c, n) for side in ("est", "ref"))
    return [jnp.asarray(s.reshape(b, c, n)) for s in signals]


def value_and_gradient(name, estimate, target):
    mean = lambda estimate, target: jnp.mean(LOSSES[name](estimate, target))  # noqa: E731
    return jax.jit(jax.value_and_grad(mean))(estimate, target)


@pytest.mark.golden
@pytest.mark.parametrize("tag", ["mono", "stereo"])
@pytest.mark.parametrize(("name", "gradient_tolerance"), [("l1_wav", 1e-5), ("l1_wav_l1_sp", 1e-4)])
def test_golden_values_and_gradients(golden, tag, name, gradient_tolerance):
    with np.load(golden / "losses.npz") as fixture:
        value, gradient = value_and_gradient(name, *pair(fixture[f"{tag}/dims"], tag))
        assert relative_error(fixture, f"{tag}/{name}", value) < 1e-5
        assert relative_error(fixture, f"{tag}/{name}/grad", gradient) < gradient_tolerance
        norm = np.linalg.norm(np.asarray(gradient, np.float64))
        assert distance(norm, fixture[f"{tag}/{name}/grad_norm"]) < gradient_tolerance


@pytest.mark.parametrize("name", LOSSES)
def test_silence_has_no_loss_and_a_finite_gradient(name):
    silence = jnp.zeros((2, 1, 4000))
    value, gradient = value_and_gradient(name, silence, silence)
    assert abs(value) < 1e-6
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("level", [1e-4, 1e-2, 1.0])
def test_sound_in_place_of_silence_is_a_finite_loss_that_falls_with_its_level(name, level):
    estimate, _ = pair((3, 1, 4000), "mono")
    silence = jnp.zeros_like(estimate)
    value, gradient = value_and_gradient(name, level * estimate, silence)
    quieter, _ = value_and_gradient(name, level / 2 * estimate, silence)
    assert jnp.isfinite(gradient).all()
    assert 0 <= quieter < value
    assert jnp.sum(gradient * estimate) > 0  # the step down makes it quieter


@pytest.mark.parametrize("name", LOSSES)
def test_every_item_has_its_own_loss(name):
    estimate, target = pair((3, 2, 4000), "mono")
    together = LOSSES[name](estimate, target)
    alone = [LOSSES[name](estimate[i : i + 1], target[i : i + 1])[0] for i in range(3)]
    assert together.shape == (3,)
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    assert len(set(together.tolist())) == 3


def test_si_sdr_is_the_figure_of_evaluation_whatever_the_level():
    other, target = (x[:, :1] for x in pair((3, 2, 4000), "mono"))
    estimate = target + 0.1 * other
    figure = metrics.si_sdr(target[:, 0], estimate[:, 0])
    for level in (0.3, 1.0, 3.0):
        np.testing.assert_allclose(LOSSES["si_sdr"](level * estimate, target), -figure, atol=1e-2)


def test_snr_threshold_is_the_snr_that_gains_nothing_above_its_threshold():
    _, target = pair((1, 1, 4000), "mono")
    noise = jnp.asarray(np.random.default_rng(0).standard_normal(target.shape), jnp.float32)
    noise *= jnp.sqrt(jnp.mean(target**2) / jnp.mean(noise**2))
    for snr, loss in ((0, -0.0), (10, -9.96), (30, -26.99), (60, -29.996)):
        found = LOSSES["snr_threshold"](target + 10 ** (-snr / 20) * noise, target)[0]
        assert float(found) == pytest.approx(loss, abs=0.02)


def test_l1_by_hand():
    estimate = jnp.array([[[1.0, -1.0]], [[0.5, 0.0]]])
    target = jnp.array([[[0.0, 1.0]], [[0.5, 0.0]]])
    np.testing.assert_array_equal(l1_waveform(estimate, target), [1.5, 0])


def test_cross_entropy_by_its_definition_and_finite_at_its_ends():
    rng = np.random.default_rng(0)
    p, y = rng.uniform(0.01, 0.99, (3, 8)), rng.uniform(0, 1, (3, 8))
    expected = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p), axis=1)
    actual = binary_cross_entropy(*(jnp.asarray(x, jnp.float32) for x in (p, y)))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)

    mean = lambda p, y: jnp.sum(binary_cross_entropy(p, y))  # noqa: E731
    ends, labels = jnp.array([[0.0, 1.0, 0.0, 1.0]]), jnp.array([[0.0, 0.0, 1.0, 1.0]])
    value, gradient = jax.value_and_grad(mean)(ends, labels)
    np.testing.assert_allclose(value, -2 * np.log(1e-7) / 4, rtol=1e-2)  # two are wholly wrong
    assert jnp.isfinite(gradient).all()
