import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import RATE, TAGGER, TINY_HTSAT, TINY_YAMNET, quick_jit, tagger_variables
from uss_jax.bundles.nets import build_query, fields_of
from uss_jax.errors import UserError
from uss_jax.models.query import QueryNet

WIDTHS = {"one_hot": 527, "soft": 527, "class_vectors": 6, "embedding": 6}
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


def in_training(net, variables, waveform, classes):
    """The conditions in training mode, with the random draws of key 0."""
    condition, _ = net.apply(
        variables,
        waveform,
        classes,
        train=True,
        rngs={"augment": jax.random.key(0)},
        mutable=["batch_stats"],
    )
    return condition


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
    vectors = tagger_variables()["params"]["fc_audioset"]["kernel"].T
    vectors = vectors - vectors.mean(axis=0)
    vectors /= np.sqrt(np.sum(vectors**2, axis=1, keepdims=True) + 1e-4)
    expected = {
        "one_hot": jax.nn.one_hot(CLASS_INDEX, 527),
        "soft": tags["clipwise"],
        "class_vectors": np.log1p(np.asarray(tags["clipwise"]) * 100) / np.log(101) @ vectors,
        "embedding": tags["embedding"],
    }
    for kind, condition in expected.items():
        actual = condition_of(*with_variables(kind=kind), waveform)
        rounding = 2e-5 if kind == "class_vectors" else 0  # of sums over 527 classes
        np.testing.assert_allclose(actual, condition, rtol=1e-6, atol=rounding)


def test_unknown_kind_is_refused(waveform):
    with pytest.raises(
        ValueError, match="'hard', expected one of one_hot, soft, class_vectors, embedding"
    ):
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


def test_finetuning_moves_class_vectors_and_embedding(waveform):
    net, variables = with_variables(kind="class_vectors", finetune=True)
    gradient, statistics = training_gradient(net, variables, waveform)
    assert nonzero(gradient) == {True}
    moved = jax.tree.map(lambda a, b: a - b, statistics, variables["batch_stats"])
    assert nonzero(moved) == {True}


def test_dropout_leaves_out_parts_of_the_condition_in_training_only(waveform):
    plain, variables = with_variables(kind="soft")
    dropping = plain.clone(dropout=0.5)
    whole = condition_of(plain, variables, waveform)
    np.testing.assert_array_equal(condition_of(dropping, variables, waveform), whole)
    dropped = in_training(dropping, variables, waveform, CLASS_INDEX)
    kept = dropped != 0
    assert 0.4 < kept.mean() < 0.6
    np.testing.assert_allclose(dropped[kept], 2 * whole[kept], rtol=1e-5)


@pytest.mark.parametrize("kind", ["soft", "class_vectors"])
def test_a_share_of_items_is_asked_with_one_class_in_training_only(waveform, kind):
    net, variables = with_variables(kind=kind)
    asking = net.clone(one_class_share=1.0)
    whole = condition_of(net, variables, waveform)
    np.testing.assert_array_equal(condition_of(asking, variables, waveform), whole)

    heard = quick_jit(TAGGER.apply)(tagger_variables(), waveform)["clipwise"]
    one = np.zeros((2, 527), np.float32)
    for item, k in enumerate(CLASS_INDEX):  # as if the class were heard at least as a query needs
        one[item, k] = max(heard[item, k], 0.2)
    wanted = net.apply(variables, jnp.asarray(one), method="adapt")
    found = in_training(asking, variables, waveform, CLASS_INDEX)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)

    many = jnp.repeat(waveform[:1, :800], 200, axis=0)
    asked = in_training(
        net.clone(one_class_share=0.25), variables, many, jnp.full(200, 3, jnp.int32)
    )
    alone = jnp.abs(asked - in_training(net, variables, many[:1], CLASS_INDEX[:1])).max(axis=1)
    assert 0.15 < (alone > 1e-3).mean() < 0.35


@pytest.mark.parametrize("net", [TAGGER, TINY_HTSAT, TINY_YAMNET])
def test_class_vectors_are_what_logits_are_made_with(net):
    """A class's logit changes along its vector: what a step of the embedding does to it."""
    variables = tagger_variables(net=net)
    vectors = np.asarray(net.apply(variables, method="class_vectors"))
    assert vectors.shape == (net.classes, net.embedding_width)
    rng = np.random.default_rng(0)
    embedding, step = rng.random((2, net.embedding_width)).astype(np.float32)

    def logits(embedding):
        if isinstance(net, type(TINY_HTSAT)):  # a step inside a map of equal tokens
            grid = net.image_size // net.token_pixels
            tokens = jnp.broadcast_to(embedding, (1, 1, grid, grid, net.embedding_width))
            return net.apply(variables, tokens, method="logits")[0, 0, 1]
        probabilities = net.apply(variables, jnp.asarray(embedding)[None, None], method="classify")
        return jax.scipy.special.logit(probabilities[0, 0])

    change = logits(embedding + 1e-2 * step) - logits(embedding)
    np.testing.assert_allclose(change, 1e-2 * vectors @ step, atol=3e-5)


def test_one_class_of_a_kind_without_probabilities_is_refused():
    with pytest.raises(UserError, match="needs probabilities"):
        build_query({"kind": "embedding", "one_class_share": 0.5}, fields_of(TAGGER))
