"""A step on eight devices is the step on one."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.tiny import RATE, TAGGER, random_variables, tagger_variables
from uss_jax.bundles.checkpoints import Checkpoints
from uss_jax.bundles.fingerprint import by_path
from uss_jax.bundles.nets import build_sed, fields_of, init
from uss_jax.devices.mesh import (
    check_rules,
    create,
    idle_rules,
    lay_out,
    make_mesh,
    on_all_devices,
    replicated,
    shapes,
    state_shardings,
    to_devices,
)
from uss_jax.errors import UserError
from uss_jax.models.bandsplit import BandSplit
from uss_jax.models.query import QueryNet
from uss_jax.models.resunet import ResUNet
from uss_jax.training.examples import Mixing
from uss_jax.training.losses import LOSSES
from uss_jax.training.optim import adamw_amsgrad
from uss_jax.training.resuming import restore_state
from uss_jax.training.separation_step import Anchoring, Nets, Updating, make_separation_step
from uss_jax.training.state import create_state
from uss_jax.training.tagging_step import make_tagging_step

SMALL = TAGGER.clone(channels=(4, 4))
SED = build_sed(fields_of(SMALL))
OPTIMIZER = adamw_amsgrad(1e-3)
BATCH, CLIP, SEGMENT = 16, RATE // 2, RATE // 4


@pytest.mark.parametrize(
    ("variable", "value", "chosen"),
    [
        ("JAX_NUM_CPU_DEVICES", "-1", None),
        ("JAX_NUM_CPU_DEVICES", "3", 3),
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=3", 3),
    ],
)
def test_a_cpu_is_a_device_per_core_unless_chosen(variable, value, chosen):
    """Asked for in time, and too late. An import lasts seconds; it makes no device."""
    code = """
import os
import jax
from uss_jax.devices.mesh import one_device_per_core

for before in (lambda: None, jax.devices):
    if not os.fork():
        before()
        one_device_per_core()
        print(jax.device_count(), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""
    settings = ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    environment = {k: v for k, v in os.environ.items() if k not in settings}
    environment |= {"JAX_PLATFORMS": "cpu", variable: value}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    in_time, too_late = map(int, run.stdout.split())
    assert in_time == (chosen or min(len(os.sched_getaffinity(0)), 8))
    assert too_late == (chosen or 1)


def _separation(channels=(4, 4), gather=lambda params: params, separator=None, **fields):
    """Step, state and frozen variables: device-found anchors, soft condition.

    One mixing group spans all devices.
    """
    if separator is None:
        separator = ResUNet(n_fft=128, hop_samples=64, channels=channels, condition_width=527)
    separator = separator.clone(**fields)
    variables = {"batch_stats": {}, **random_variables(separator, (1, 1, SEGMENT), (1, 527))}
    tagger = tagger_variables(net=SMALL)
    step = make_separation_step(
        Nets(separator, QueryNet(SMALL, "soft"), SED),
        OPTIMIZER,
        LOSSES["l1_wav"],
        Anchoring(SEGMENT, min_dbfs=-60.0),
        Mixing(sources=2, group_size=BATCH, match_energy=True),
        Updating(gather=gather),
    )
    params, stats = ({"separator": variables[k], "query": {}} for k in ("params", "batch_stats"))
    frozen = {"sed": tagger, "query": {k: {"tagger": tagger[k]} for k in tagger}}
    return step, params, stats, frozen


def _tagging():
    variables = tagger_variables(net=SMALL)
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


def _train(made, devices, dtype, steps=20, rules=(), first=0, restore=None):
    """Losses of the steps, the gradient of the first and the last state.

    `restore` puts a saved state, from which step number `first` goes on, in place of a fresh one.
    """
    step, params, stats, frozen = made
    cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)  # noqa: E731
    mesh = make_mesh(jax.devices()[:devices])
    state = lay_out(create_state(cast(params), cast(stats), OPTIMIZER, ema=True), rules, mesh)
    state = restore(state) if restore else state
    layout = jax.tree.map(lambda x: x.sharding, state)
    frozen, key = on_all_devices(cast(frozen), mesh), on_all_devices(jax.random.key(0), mesh)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(layout, None))
    losses, gradient = [], None
    with jax.set_mesh(mesh):
        for number in range(first, first + steps):
            state, metrics = jitted(state, frozen, to_devices(_batch(number, dtype), mesh), key)
            losses.append(float(metrics["loss"]))
            if gradient is None:
                gradient = jax.tree.map(lambda m: np.asarray(m) / 0.1, state.opt_state[0].mu)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(state.params))
    return np.array(losses), gradient, state


def _whole(mesh):
    """Gathers parameters that are split."""
    return functools.partial(jax.lax.with_sharding_constraint, shardings=replicated(mesh))


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
def test_eight_devices_train_as_one(make, dtype, tolerance, quick_compilation):
    with jax.enable_x64(dtype == np.float64):
        made = make()
        eight, eight_gradient, _ = _train(made, 8, dtype)
        one, one_gradient, _ = _train(made, 1, dtype)
    losses, gradient = np.abs(eight / one - 1).max(), _distance(eight_gradient, one_gradient)
    print(f"\n{make.__name__} {dtype.__name__}: losses {losses:.1e}, gradient {gradient:.1e}")
    assert losses < tolerance
    assert gradient < tolerance
    assert one[-1] != one[0]


def _compiled(made, rules=()):
    step, params, stats, frozen = made
    mesh = make_mesh()
    state = lay_out(create_state(params, stats, OPTIMIZER, ema=bool(rules)), rules, mesh)
    layout = jax.tree.map(lambda x: x.sharding, state)
    batch = to_devices(_batch(0, np.int16), mesh)
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, out_shardings=(layout, None))
        frozen, key = on_all_devices((frozen, jax.random.key(0)), mesh)
        return jitted.lower(state, frozen, batch, key).compile()


def _reduces(text):
    return len(re.findall(r"\ball-reduce(?:-start)?\(", text))


@pytest.mark.long
@pytest.mark.parametrize(
    ("fields", "least", "most"),
    [({}, 33, 66 + 2), ({"norm_scope": "replica", "remat": True}, 1, 1 + 2)],
)
def test_published_structure_reduces_twice_a_batch_norm_and_never_gathers(
    fields, least, most, quick_compilation
):
    """66 for the 33 batch norms, none where they are a device's own; one for the gradients."""
    made = _separation(channels=(4,) * 6, **fields)
    assert len({key[:-1] for key, _ in jax.tree_util.tree_leaves_with_path(made[2])}) == 33
    text = _compiled(made).as_text()
    print(f"\n{_reduces(text)} all-reduces")
    assert least <= _reduces(text) <= most
    assert not re.search(r"\b(all-gather|all-to-all)(-start)?\(", text)


def test_a_band_split_step_exchanges_gradients_metrics_and_sources_alone(quick_compilation):
    bands = dict(n_fft=128, hop_samples=64, bands=(4,) * 16, width=8, layers=2, head_width=4)
    net = BandSplit(**bands, hidden_width=8, condition_width=527, remat=True)
    text = _compiled(_separation(separator=net)).as_text()
    assert 1 <= _reduces(text) <= 1 + 2
    assert not re.search(r"\b(all-gather|all-to-all)(-start)?\(", text)
    exchanged = len(re.findall(r"\bcollective-permute(?:-start)?\(", text))
    assert exchanged <= 2  # the sources of mixtures


def test_a_band_split_state_split_by_rules_trains_as_a_whole_one(quick_compilation):
    bands = dict(n_fft=128, hop_samples=64, bands=(4,) * 16, width=16, layers=1, head_width=8)
    net = BandSplit(**bands, hidden_width=16, condition_width=527)
    plain, _, _ = _train(_separation(separator=net), 8, np.float32, 3)
    made = _separation(gather=_whole(make_mesh()), separator=net)
    split, _, state = _train(made, 8, np.float32, 3, [("kernel", "fsdp")])
    np.testing.assert_allclose(split, plain, rtol=1e-5)
    kernels = [
        leaf for path, leaf in by_path(state.params["separator"]).items() if "kernel" in path
    ]
    parts = sum(leaf.addressable_shards[0].data.size for leaf in kernels)
    assert parts < 0.2 * sum(leaf.size for leaf in kernels)


def test_a_state_split_by_rules_trains_as_a_whole_one(quick_compilation):
    """Each of eight devices holds an eighth of what is split, moments and average too."""
    rules = [(r"film1/.*bias$", "replicate"), (r"separator/", "fsdp")]
    plain, _, state = _train(_separation((8,)), 8, np.float32, 5)
    split, _, split_state = _train(_separation((8,), _whole(make_mesh())), 8, np.float32, 5, rules)
    np.testing.assert_allclose(split, plain, rtol=1e-6)

    def one_device(state):
        trees = state.params, state.opt_state, state.ema
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(trees))

    share = one_device(split_state) / one_device(state)
    assert 1 / 8 < share < 1 / 8 + 0.02
    layout = split_state.params["separator"]["encoder_block1"]["conv_block1"]
    assert layout["film1"]["shift"]["bias"].sharding.is_fully_replicated
    assert layout["film1"]["shift"]["kernel"].sharding.spec == PartitionSpec(None, "data")


def test_a_state_is_made_in_its_parts(quick_compilation):
    """Split over eight devices it is bit by bit what one device makes whole."""
    separator = ResUNet(n_fft=128, hop_samples=64, channels=(8, 8), condition_width=527)

    def fresh(key):
        variables = init(separator, key)
        return create_state(variables["params"], variables["batch_stats"], OPTIMIZER, ema=True)

    made, key = [], jax.random.key(3)
    for devices, rules in ((1, ()), (8, [("", "fsdp")])):
        mesh = make_mesh(jax.devices()[:devices])
        made.append(create(fresh, key, like=shapes(fresh, key, rules=rules, mesh=mesh)))
    jax.tree.map(np.testing.assert_array_equal, *made)
    kernel = made[1].ema["encoder_block1"]["conv_block1"]["conv1"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 3, 1, 8)}


def test_a_sharded_run_moves_from_eight_devices_to_one_to_four(tmp_path, quick_compilation):
    """In float64: in float32, sums in another order grow to 2e-5 of the loss in six steps."""
    rules = [("separator/", "fsdp")]

    def train(devices, **options):
        made = _separation((8,), _whole(make_mesh(jax.devices()[:devices])))
        losses, _, state = _train(made, devices, np.float64, rules=rules, **options)
        return losses, state

    with jax.enable_x64(True):
        wanted_losses, wanted = train(8, steps=6)
    losses = []
    for start, devices in ((0, 8), (2, 1), (4, 4)):
        with jax.enable_x64(True), Checkpoints(tmp_path / "c", keep=2) as checkpoints:
            restore = functools.partial(restore_state, checkpoints, start) if start else None
            part, state = train(devices, first=start, steps=2, restore=restore)
            checkpoints.save(start + 2, state.parts(), {})
        losses += part.tolist()
        kernel = state.params["separator"]["encoder_block1"]["conv_block1"]["film1"]["shift"]
        shards = {shard.data.shape for shard in kernel["kernel"].addressable_shards}
        assert shards == {(527, 8 // devices)}
    assert int(state.step) == 6
    assert (tmp_path / "c" / "6" / "params" / "manifest.ocdbt").exists()
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-8)
    assert _distance(state.params, wanted.params) < 1e-8


def test_rules_take_the_largest_axis_that_divides_and_the_first_match():
    mesh = make_mesh()
    state = {"a": np.zeros((3, 16, 8)), "b": np.zeros((6, 5)), "c": np.zeros(8), "d": np.zeros(8)}
    layout = state_shardings(state, [("c", "replicate"), ("[abc]", "fsdp")], mesh)
    assert {k: tuple(v.spec) for k, v in layout.items()} == {
        "a": (None, "data"),
        "b": (),
        "c": (),
        "d": (),
    }


def test_rules_without_an_array_are_told():
    state = {"params": {"dense": {"kernel": np.zeros((8, 8))}}}
    rules = [("kernal", "fsdp"), ("params/.*/kernel", "fsdp"), ("dense", "replicate")]
    assert idle_rules(state, rules) == ["kernal"]


@pytest.mark.parametrize("rule", [("a", "split"), ("(", "fsdp"), ("a",), 3])
def test_a_rule_that_is_none_is_refused(rule):
    with pytest.raises(UserError, match=r"config.sharding has the rule .*replicate or fsdp"):
        check_rules([rule])


def test_rows_go_to_the_devices_in_order():
    mesh = make_mesh(reversed(jax.devices()))
    assert mesh.devices.tolist() == jax.devices()
    placed = to_devices({"x": np.arange(16)}, mesh)["x"]
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, 2 * shard.device.id + np.arange(2))
