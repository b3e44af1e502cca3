import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden.compare import relative_error
from uss_jax.anchors.mix import GAIN_RANGE, energy, mix, mix_sets, panned

CASES = [
    "plain", "one_silent", "one_very_weak", "two_silent", "batch1", "batch2", "all_silent"
]  # fmt: skip


def mixtures(segment, sources, group_size=None, match_energy=True):
    segment = jnp.asarray(segment)
    return mix(
        segment,
        energy(segment),
        sources=sources,
        group_size=group_size or len(segment),
        match_energy=match_energy,
    )


def noises(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sources", [2, 3, 4])
@pytest.mark.parametrize("match", [0, 1])
def test_golden_mixtures(golden, case, sources, match):
    with np.load(golden / "mixer.npz") as fixture:
        actual = mixtures(fixture[f"{case}/input"], sources, match_energy=bool(match))
        key = f"{case}/mix{sources}_match{match}"
        if fixture[key].any():
            assert relative_error(fixture, key, actual) < 1e-5
        else:
            assert case == "all_silent"
            np.testing.assert_array_equal(actual, fixture[key])


@pytest.mark.parametrize("sources", [1, 2, 3, 4])
@pytest.mark.parametrize("match", [False, True])
def test_equals_the_rule_in_words(sources, match):
    segment = noises(6, 50) * np.array([1, 0.1, 3, 1e-4, 0, 1], np.float32)[:, None]
    expected = np.zeros((6, 50))
    for i in range(6):
        begin = i // 3 * 3  # groups of three
        for k in range(sources):
            other = segment[begin + (i - begin + k) % 3].astype(np.float64)
            gain = 1.0
            if match and k > 0:
                power, own = np.mean(other**2), np.mean(segment[i].astype(np.float64) ** 2)
                gain = np.clip(np.sqrt(own / max(power, 1e-10)), *GAIN_RANGE)
            expected[i] += gain * other
    actual = mixtures(segment, sources, group_size=3, match_energy=match)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_groups_do_not_hear_each_other():
    segment, other = noises(12, 40), noises(12, 40, seed=1)
    changed = np.concatenate([segment[:4], other[4:8], segment[8:]])
    before, after = (mixtures(s, 3, group_size=4) for s in (segment, changed))
    np.testing.assert_array_equal(
        np.delete(before, slice(4, 8), 0), np.delete(after, slice(4, 8), 0)
    )
    assert (before[4:8] != after[4:8]).any(axis=1).all()


def test_all_parts_have_the_energy_of_the_target():
    segment = noises(4, 4000) * np.array([1, 0.1, 3, 0.5], np.float32)[:, None]
    added = mixtures(segment, 2) - segment
    np.testing.assert_allclose(energy(added), energy(jnp.asarray(segment)), rtol=1e-4)


def test_energy_of_a_padded_segment_is_over_its_true_samples():
    segment = noises(3, 50)
    segment[1, 20:] = 0
    segment[2] = 0
    actual = energy(jnp.asarray(segment), jnp.array([50, 20, 0]))
    expected = [np.mean(segment[0] ** 2), np.mean(segment[1, :20] ** 2), 0]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("sources", [1, 2, 3])
@pytest.mark.parametrize("match", [False, True])
def test_targets_of_a_set_add_up_to_the_mixture_that_its_first_item_has_in_a_group(sources, match):
    segment = noises(6, 50) * np.array([1, 0.1, 3, 1e-4, 0, 1], np.float32)[:, None]
    mixture, target = mix_sets(
        jnp.asarray(segment), energy(jnp.asarray(segment)), sources=sources, match_energy=match
    )
    np.testing.assert_array_equal(target[::sources], segment[::sources])
    sets = target.reshape(-1, sources, 50)
    for i in range(sources):
        np.testing.assert_allclose(mixture[i::sources], sets.sum(axis=1), atol=1e-5)
    grouped = mixtures(segment, sources, match_energy=match)
    np.testing.assert_allclose(mixture[::sources], grouped[::sources], atol=1e-5)


@pytest.mark.parametrize("pan", [0.0, 0.3, 1.0])
def test_a_panned_sound_is_one_source_whose_channels_have_its_mean_power(pan):
    segment = noises(200, 40)
    left, right = np.moveaxis(panned(jnp.asarray(segment), pan, jax.random.key(0)), 1, 0)
    np.testing.assert_allclose((left**2 + right**2) / 2, segment**2, rtol=1e-4, atol=1e-7)
    place = np.arctan2((right / segment)[:, 0], (left / segment)[:, 0]) * 4 / np.pi - 1
    np.testing.assert_allclose(np.tan(np.pi / 4 * (1 + place))[:, None] * left, right, atol=1e-3)
    assert np.abs(place).max() == pytest.approx(pan, rel=0.03, abs=1e-5)
    assert np.mean(place) == pytest.approx(0, abs=0.15 * pan + 1e-6)


@pytest.mark.parametrize("sets", [False, True])
def test_each_channel_is_mixed_as_one_alone_with_the_gains_of_the_sounds(sets):
    segment = noises(8, 50) * np.array([1, 0.1, 3, 1e-4, 0, 1, 2, 1], np.float32)[:, None]
    levels = energy(jnp.asarray(segment))
    stereo = panned(jnp.asarray(segment), 0.8, jax.random.key(1))

    def mixed(sounds):
        how = dict(sources=2, match_energy=True)
        return mix_sets(sounds, levels, **how) if sets else mix(sounds, levels, group_size=4, **how)

    channels = [mixed(stereo[:, a]) for a in range(2)]
    alone = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *channels)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), mixed(stereo), alone)
