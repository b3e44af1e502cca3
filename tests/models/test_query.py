import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import RATE, TAGGER, quick_jit, tagger_variables
from uss_jax.models.query import QueryNet

WIDTHS = {"one_hot": 527, "soft": 527, "embedding": 6}
CLASS_INDEX = jnp.array([3, 526])


@pytest.fixture(scope="module")
def waveform():
    return jnp.asarray(0.1 * np.random.default_rng(0).standard_normal((2, RATE // 4)), jnp.float32)


def with_variables(**fields):
    """A query net and its variables."""
    tagger = None if fields["kind"] == "one_hot" else TAGGER.clone()
    net = QueryNet(tagger, **fields)
    variables = {"params": {}, "batch_stats": {}}
    if tagger is not None:
        variables = {k: {"tagger": v} for k, v in tagger_variables().items()}
    if net.adaptor_width:
        shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, RATE)), CLASS_INDEX[:1])
        rng = np.random.default_rng(1)
        variables["params"]["adaptor"] = jax.tree.map(
            lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) / leaf.shape[0],
            shapes["params"]["adaptor"],
        )
    return net, jax.tree.map(jnp.asarray, variables)


def condition_of(net, variables, waveform):
    return quick_jit(net.apply)(variables, waveform, CLASS_INDEX)


def training_gradient(net, variables, waveform):
    """Gradient by the parameters, and the updated statistics, in training mode."""

    def loss(params, batch_stats):
        condition, updates = net.apply(
            {"params": params, "batch_stats": batch_stats},
            waveform,
            CLASS_INDEX,
            train=True,
            rngs={"augment": jax.random.key(0, impl="rbg")},
            mutable=["batch_stats"],
        )
        return jnp.sum(condition**2), updates

    gradient, updates = quick_jit(jax.grad(loss, has_aux=True))(
        variables["params"], variables["batch_stats"]
    )
    return gradient, updates.get("batch_stats", {})


def nonzero(tree):
    return {jnp.any(leaf != 0).item() for leaf in jax.tree.leaves(tree)}


def test_kinds_read_what_they_are_named_after(waveform):
    tags = quick_jit(TAGGER.apply)(tagger_variables(), waveform)
    expected = {
        "one_hot": jax.nn.one_hot(CLASS_INDEX, 527),
        "soft": tags["clipwise"],
        "embedding": tags["embedding"],
    }
    for kind, condition in expected.items():
        actual = condition_of(*with_variables(kind=kind), waveform)
        np.testing.assert_allclose(actual, condition, rtol=1e-6)


def test_unknown_kind_is_refused(waveform):
    with pytest.raises(ValueError, match="'hard', expected one of one_hot, soft, embedding"):
        QueryNet(None, "hard").apply({}, waveform, CLASS_INDEX)


@pytest.mark.parametrize("kind", WIDTHS)
def test_adaptor_gives_its_width_and_trains_all_its_parameters(waveform, kind):
    net, variables = with_variables(kind=kind, adaptor_width=9, adaptor_hidden=7)
    assert condition_of(net, variables, waveform).shape == (2, 9)
    gradient, _ = training_gradient(net, variables, waveform)
    assert nonzero(gradient["adaptor"]) == {True}


def test_shortcut_adds_what_goes_into_the_adaptor(waveform):
    fields = dict(kind="embedding", adaptor_width=6, adaptor_hidden=7)
    net, variables = with_variables(**fields)
    around, unadapted = net.clone(shortcut=True), net.clone(adaptor_width=0)
    conditions = [condition_of(n, variables, waveform) for n in (net, around, unadapted)]
    np.testing.assert_allclose(conditions[1], conditions[0] + conditions[2], rtol=1e-6)


def test_shortcut_between_unequal_widths_is_refused(waveform):
    net, variables = with_variables(kind="embedding", adaptor_width=7, adaptor_hidden=7)
    with pytest.raises(ValueError, match="needs adaptor_width 6, not 7"):
        jax.eval_shape(net.clone(shortcut=True).apply, variables, waveform, CLASS_INDEX)


@pytest.mark.parametrize("adaptor_width", [0, 9])
def test_frozen_tagger_gets_no_gradient_and_runs_in_evaluation_mode(waveform, adaptor_width):
    net, variables = with_variables(kind="soft", adaptor_width=adaptor_width)
    gradient, statistics = training_gradient(net, variables, waveform)
    assert nonzero(gradient["tagger"]) == {False}
    jax.tree.map(np.testing.assert_array_equal, statistics, variables["batch_stats"])


def test_finetuned_tagger_gets_gradients_and_runs_in_training_mode(waveform):
    net, variables = with_variables(kind="embedding", finetune=True)
    gradient, statistics = training_gradient(net, variables, waveform)
    # The embedding does not pass the last layer.
    assert nonzero(gradient["tagger"].pop("fc_audioset")) == {False}
    assert nonzero(gradient) == {True}
    moved = jax.tree.map(lambda a, b: a - b, statistics, variables["batch_stats"])
    assert nonzero(moved) == {True}


def test_dropout_leaves_out_parts_of_the_condition_in_training_only(waveform):
    plain, variables = with_variables(kind="soft")
    dropping = plain.clone(dropout=0.5)
    whole = condition_of(plain, variables, waveform)
    np.testing.assert_array_equal(condition_of(dropping, variables, waveform), whole)
    dropped, _ = dropping.apply(
        variables,
        waveform,
        CLASS_INDEX,
        train=True,
        rngs={"augment": jax.random.key(0)},
        mutable=["batch_stats"],
    )
    kept = dropped != 0
    assert 0.4 < kept.mean() < 0.6
    np.testing.assert_allclose(dropped[kept], 2 * whole[kept], rtol=1e-5)
