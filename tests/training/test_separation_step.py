"""What a separation step can do besides the published recipe."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.tiny import quick_jit, random_variables
from uss_jax.anchors.mix import energy, mix_sets
from uss_jax.models.query import QueryNet
from uss_jax.models.resunet import ResUNet
from uss_jax.training.examples import Mixing
from uss_jax.training.losses import l1_waveform
from uss_jax.training.separation_step import Anchoring, Nets, Updating, make_separation_step
from uss_jax.training.state import create_state

BATCH, GROUP, SEGMENT = 8, 4, 1000
SEPARATOR = ResUNet(n_fft=64, hop_samples=32, channels=(4,), norm_scope=GROUP)
SGD = optax.sgd(0.1)


class Echo(ResUNet):
    """Gives back the number of the class that it is asked for."""

    mask = None

    @nn.compact
    def __call__(self, mixture, condition, train):
        self.variable("batch_stats", "nothing", jnp.zeros, ())
        asked = jnp.argmax(condition, axis=1).astype(jnp.float32)
        return self.param("gain", nn.initializers.ones_init(), ()) * jnp.broadcast_to(
            asked[:, None, None], mixture.shape
        )


def _batch(seed=0):
    """Anchors of a table, as the host gives them."""
    rng = np.random.default_rng(seed)
    return {
        "audio": (0.1 * rng.standard_normal((BATCH, SEGMENT))).astype(np.float32),
        "samples": np.full(BATCH, SEGMENT, np.int32),
        "class_index": rng.permutation(527)[:BATCH].astype(np.int32),
        "begin_sample": np.zeros(BATCH, np.int32),
        "anchor_sample": np.zeros(BATCH, np.int32),
        "score": np.zeros(BATCH, np.float32),
        "absent": np.array([1, 0, 1, 1, 0, 1, 1, 1], np.uint8),
    }


def _made(separator=SEPARATOR, loss=l1_waveform, optimizer=SGD, ema=False, **options):
    sections = []
    for section in (Mixing, Updating):
        known = {field.name for field in dataclasses.fields(section)}
        sections.append({name: options.pop(name) for name in known & options.keys()})
    mixing, updating = sections
    step = make_separation_step(
        Nets(separator, QueryNet(None, "one_hot")),
        optimizer,
        loss,
        Anchoring(SEGMENT, min_dbfs=None, **options),
        Mixing(**{"sources": 2, "group_size": GROUP, "match_energy": True, **mixing}),
        Updating(**updating),
    )
    if type(separator) is ResUNet:
        variables = random_variables(separator, (1, 1, SEGMENT), (1, 527))
    else:
        variables = {"params": {"gain": np.ones(())}, "batch_stats": {"nothing": np.zeros(())}}
    trees = ({"separator": variables[k], "query": {}} for k in ("params", "batch_stats"))
    return quick_jit(step), create_state(*jax.tree.map(jnp.asarray, tuple(trees)), optimizer, ema)


def _run(made, *batches):
    step, state = made
    states, metrics = [state], []
    for batch in batches:
        state, values = step(state, {}, batch, jax.random.key(0))
        states.append(state)
        metrics.append(jax.device_get(values))
    return states, metrics


def _heard(**options):
    """(asked, target) of each item in a step."""
    heard = {}

    def loss(estimate, target):
        jax.debug.callback(lambda *x: heard.update(pair=x), estimate[:, 0, 0], target[:, 0])
        return l1_waveform(estimate, target)

    _, metrics = _run(_made(Echo(), loss, **options), _batch())
    jax.effects_barrier()
    return *heard["pair"], metrics[0]


def test_silent_items_ask_for_the_class_that_is_the_nearest_outside_their_mixture():
    batch = _batch()
    asked, target, _ = _heard()
    np.testing.assert_array_equal(asked, batch["class_index"])
    np.testing.assert_array_equal(target, batch["audio"])

    asked, target, metrics = _heard(silent_share=1.0)
    silent = batch["absent"] != 0
    groups = batch["class_index"].reshape(-1, GROUP)
    further = np.roll(groups, -2, axis=1).ravel()  # two sources: the next is in the mixture
    np.testing.assert_array_equal(asked, np.where(silent, further, batch["class_index"]))
    np.testing.assert_array_equal(target, np.where(silent[:, None], 0, batch["audio"]))
    assert metrics["silent_share"] == pytest.approx(silent.mean())


def test_so_many_items_are_silent_as_asked_for():
    step, state = _made(Echo(), silent_share=0.25)
    shares = []
    for _ in range(100):
        state, metrics = step(state, {}, _batch() | {"absent": np.ones(BATCH)}, jax.random.key(0))
        shares.append(float(metrics["silent_share"]))
    assert np.mean(shares) == pytest.approx(0.25, abs=0.05)
    assert np.std(shares) > 0.05


def test_sdri_of_a_step_is_that_of_items_with_a_sound():
    asked, target, metrics = _heard(silent_share=1.0)
    batch = _batch()
    groups = batch["audio"].reshape(-1, GROUP, SEGMENT)
    powers = np.mean(groups**2, axis=2)[:, :, None]
    gain = np.sqrt(powers / np.roll(powers, -1, axis=1))
    other = (gain * np.roll(groups, -1, axis=1)).reshape(BATCH, SEGMENT)
    before = np.mean((batch["audio"] + other - target) ** 2, axis=1)
    now = np.mean((asked[:, None] - target) ** 2, axis=1)
    sdri, silent = 10 * np.log10(before / now), batch["absent"] != 0
    assert metrics["sdri"] == pytest.approx(sdri[~silent].mean(), rel=1e-4)
    assert metrics["silent_db"] == pytest.approx(sdri[silent].mean(), rel=1e-4)


def test_parts_of_a_step_without_a_silent_item_do_not_count_as_zero():
    batch = _batch() | {"absent": np.repeat([1, 0], GROUP).astype(np.uint8)}
    found = []
    for parts in (1, 2):
        _, metrics = _run(_made(Echo(), silent_share=1.0, accumulate=parts), batch)
        names = ("sdri", "silent_db", "silent_share")
        found.append({name: float(metrics[0][name]) for name in names})
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    _, metrics = _run(_made(Echo(), silent_share=1.0), batch | {"absent": np.zeros(BATCH)})
    assert np.isnan(metrics[0]["silent_db"])  # and the report leaves it out
    assert np.isfinite(metrics[0]["sdri"])


def test_all_sources_are_targets_of_the_mixture_that_they_share():
    batch = _batch()
    asked, target, _ = _heard(all_targets=True)
    audio = jnp.asarray(batch["audio"])
    _, wanted = mix_sets(audio, energy(audio), sources=2, match_energy=True)
    np.testing.assert_array_equal(asked, batch["class_index"])
    np.testing.assert_allclose(target, wanted, rtol=1e-5)


class Mirror(Echo):
    """A separator whose estimate is the mixture."""

    @nn.compact
    def __call__(self, mixture, condition, train=False):
        self.variable("batch_stats", "nothing", jnp.zeros, ())
        return self.param("gain", nn.initializers.ones_init(), ()) * mixture


def test_random_gains_are_as_large_as_asked_for():
    heard = {}

    def loss(estimate, target):
        jax.debug.callback(lambda *x: heard.update(pair=x), estimate[:, 0], target[:, 0])
        return l1_waveform(estimate, target)

    decibel = {}
    for gain_db in (0.0, 6.0):
        _run(_made(Mirror(), loss, gain_db=gain_db), _batch())
        jax.effects_barrier()
        mixture, target = map(np.asarray, heard["pair"])
        np.testing.assert_array_equal(target, _batch()["audio"])
        powers = [np.mean(x**2, axis=1) for x in (mixture - target, target)]
        decibel[gain_db] = 10 * np.log10(powers[0] / powers[1])
    np.testing.assert_allclose(decibel[0.0], 0, atol=1e-3)
    assert 1 < np.abs(decibel[6.0]).max() < 6.001
    assert decibel[6.0].min() < 0 < decibel[6.0].max()


def test_panned_sounds_are_the_targets_of_stereo_mixtures():
    heard = {}

    def loss(estimate, target):
        jax.debug.callback(lambda *x: heard.update(pair=x), estimate, target)
        return l1_waveform(estimate, target)

    options = dict(all_targets=True, pan=0.7, silent_share=0.5)
    _, (metrics,) = _run(_made(Mirror(audio_channels=2), loss, **options), _batch())
    jax.effects_barrier()
    mixture, target = map(np.asarray, heard["pair"])
    assert mixture.shape == target.shape == (BATCH, 2, SEGMENT)
    silent = (target == 0).all(axis=(1, 2))
    assert silent.mean() == pytest.approx(metrics["silent_share"])
    assert 0 < silent.mean() < 1
    _, wanted = mix_sets(
        *(jnp.asarray(x) for x in (_batch()["audio"], np.mean(_batch()["audio"] ** 2, axis=1))),
        sources=2,
        match_energy=True,
    )
    power = np.mean(np.square(target), axis=1)
    np.testing.assert_allclose(power[~silent], np.square(wanted)[~silent], rtol=1e-3, atol=1e-9)
    gains = target[~silent] / np.asarray(wanted)[~silent][:, None]
    np.testing.assert_allclose(gains, gains[:, :, :1].repeat(SEGMENT, axis=2), rtol=1e-3)
    assert np.abs(gains[:, 0] - gains[:, 1]).max(axis=1).min() > 0.01  # none is in the middle


def test_a_batch_in_parts_gives_the_gradient_of_the_whole():
    (before, whole), (values,) = _run(_made(), _batch())
    (_, parts), (in_parts,) = _run(_made(accumulate=2), _batch())
    for name in ("loss", "grad_norm", "sdri"):
        assert in_parts[name] == pytest.approx(values[name], rel=1e-5)
    jax.tree.map(
        lambda a, b, c: np.testing.assert_allclose(a - c, b - c, atol=1e-6),
        parts.params,
        whole.params,
        before.params,
    )

    # The running statistics have seen one part after the other.
    still = _made(optimizer=optax.set_to_zero())
    rows = [{k: v[at : at + GROUP] for k, v in _batch().items()} for at in (0, GROUP)]
    (*_, after), _ = _run(still, *rows)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        parts.batch_stats,
        after.batch_stats,
    )


def test_steps_that_give_no_number_are_left_out_and_counted():
    bad = _batch()
    bad["audio"][3, 5] = np.nan
    made = _made(optimizer=optax.adam(1e-2), ema=True, ema_decay=0.9, accumulate=2)
    states, metrics = _run(made, _batch(), bad, bad, _batch(1))
    first, after, last = states[1], states[3], states[4]
    assert [int(m["skipped_steps"]) for m in metrics] == [0, 1, 2, 2]
    assert [int(m["skipped_in_a_row"]) for m in metrics] == [0, 1, 2, 0]
    assert int(after.step) == 3
    for name in ("params", "batch_stats", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(first, name))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(getattr(last, name)))
    assert int(last.opt_state[0].count) == 2


def test_the_moving_average_follows_the_parameters():
    states, _ = _run(_made(Echo(), ema=True, ema_decay=0.3), *map(_batch, range(6)))
    average = states[0].params
    for step, state in enumerate(states[1:]):
        decay = min(0.3, (1 + step) / (10 + step))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, state.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), states[-1].ema, average
    )
    assert states[-1].averaged is states[-1].ema
    (*_, plain), _ = _run(_made(Echo()), _batch())
    assert plain.averaged is plain.params
