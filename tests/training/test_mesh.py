"""A step on eight devices is the step on one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import RATE, TAGGER, random_variables, tagger_variables
from uss_jax.models.query import QueryNet
from uss_jax.models.resunet import ResUNet
from uss_jax.training.losses import LOSSES
from uss_jax.training.mesh import make_mesh, on_all_devices, to_devices
from uss_jax.training.nets import build_sed, fields_of
from uss_jax.training.optim import adamw_amsgrad
from uss_jax.training.state import create_state
from uss_jax.training.step import make_separation_step, make_tagging_step

SED = build_sed(fields_of(TAGGER))
OPTIMIZER = adamw_amsgrad(1e-3)
BATCH, CLIP, SEGMENT = 16, RATE // 2, RATE // 4


def _separation(channels=(4, 4)):
    """Step, state and frozen variables: device-found anchors, soft condition.

    One mixing group spans all devices.
    """
    separator = ResUNet(n_fft=128, hop_samples=64, channels=channels, condition_width=527)
    variables = random_variables(separator, (1, 1, SEGMENT), (1, 527))
    tagger = tagger_variables()
    step = make_separation_step(
        separator,
        QueryNet(TAGGER, "soft"),
        SED,
        OPTIMIZER,
        LOSSES["l1_wav"],
        segment_samples=SEGMENT,
        sources=2,
        group_size=BATCH,
        match_energy=True,
        min_dbfs=-60.0,
    )
    params, stats = ({"separator": variables[k], "query": {}} for k in ("params", "batch_stats"))
    frozen = {"sed": tagger, "query": {k: {"tagger": tagger[k]} for k in tagger}}
    return step, params, stats, frozen


def _tagging():
    variables = tagger_variables()
    step = make_tagging_step(
        SED,
        OPTIMIZER,
        outputs=("clipwise", "tagging"),
        mixup_alpha=1.0,
        spec_augment_stripes=dict(time_width=8, time_stripes=2, mel_width=3, mel_stripes=2),
    )
    return step, *({"tagger": variables[k]} for k in ("params", "batch_stats")), {}


def _batch(number, dtype):
    """Noise bursts of ever other places, of which some clips end early."""
    rng = np.random.default_rng(number)
    samples = rng.integers(SEGMENT // 2, CLIP + 1, BATCH).astype(np.int32)
    time = np.arange(CLIP)
    burst = np.exp(-(((time - rng.uniform(0, CLIP, (BATCH, 1))) / 1000) ** 2))
    audio = 0.3 * rng.standard_normal((BATCH, CLIP)) * (0.05 + burst)
    labels = np.zeros((BATCH, 527), np.uint8)
    index = rng.integers(0, 527, BATCH).astype(np.int32)
    labels[np.arange(BATCH), index] = 1
    return {
        "audio": (audio * (time < samples[:, None])).astype(dtype),
        "samples": samples,
        "class_index": index,
        "labels": labels,
    }


def _train(made, devices, dtype, steps=20):
    """Losses of the steps and the gradient of the first."""
    step, params, stats, frozen = made
    cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)  # noqa: E731
    mesh = make_mesh(jax.devices()[:devices])
    state = on_all_devices(create_state(cast(params), cast(stats), OPTIMIZER), mesh)
    frozen, key = on_all_devices(cast(frozen), mesh), on_all_devices(jax.random.key(0), mesh)
    jitted = jax.jit(step, donate_argnums=0)
    losses, gradient = [], None
    with jax.set_mesh(mesh):
        for number in range(steps):
            state, metrics = jitted(state, frozen, to_devices(_batch(number, dtype), mesh), key)
            losses.append(float(metrics["loss"]))
            if gradient is None:
                gradient = jax.tree.map(lambda m: np.asarray(m) / 0.1, state.opt_state[0].mu)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(state.params))
    return np.array(losses), gradient


def _distance(found, wanted):
    """Norm of the difference of two trees over that of the second."""
    norm = lambda tree: np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))  # noqa: E731
    return norm(jax.tree.map(np.subtract, found, wanted)) / norm(wanted)


@pytest.mark.long
@pytest.mark.parametrize(
    ("make", "dtype", "tolerance"),
    [
        (_separation, np.float64, 1e-8),
        (_separation, np.float32, 1e-3),
        (_tagging, np.float64, 1e-8),
    ],
)
def test_eight_devices_train_as_one(make, dtype, tolerance):
    with jax.enable_x64(dtype == np.float64):
        made = make()
        eight, eight_gradient = _train(made, 8, dtype)
        one, one_gradient = _train(made, 1, dtype)
    losses, gradient = np.abs(eight / one - 1).max(), _distance(eight_gradient, one_gradient)
    print(f"\n{make.__name__} {dtype.__name__}: losses {losses:.1e}, gradient {gradient:.1e}")
    assert losses < tolerance
    assert gradient < tolerance
    assert one[-1] != one[0]


@pytest.mark.long
def test_published_structure_reduces_twice_a_batch_norm_and_never_gathers(quick_compilation):
    """66 for the 33 batch norms, and one for gradients and metrics together."""
    step, params, stats, frozen = _separation(channels=(4,) * 6)
    mesh = make_mesh()
    norms = len({key[:-1] for key, _ in jax.tree_util.tree_leaves_with_path(stats)})
    assert norms == 33
    arguments = (create_state(params, stats, OPTIMIZER), frozen)
    batch = to_devices(_batch(0, np.int16), mesh)
    with jax.set_mesh(mesh):
        lowered = jax.jit(step).lower(
            *on_all_devices(arguments, mesh), batch, on_all_devices(jax.random.key(0), mesh)
        )
    text = lowered.compile().as_text()
    reduces = len(re.findall(r"\ball-reduce(?:-start)?\(", text))
    print(f"\n{reduces} all-reduces")
    assert norms <= reduces <= 2 * norms + 2
    assert not re.search(r"\b(all-gather|all-to-all)(-start)?\(", text)


def test_rows_go_to_the_devices_in_order():
    mesh = make_mesh(reversed(jax.devices()))
    assert mesh.devices.tolist() == jax.devices()
    placed = to_devices({"x": np.arange(16)}, mesh)["x"]
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, 2 * shard.device.id + np.arange(2))
