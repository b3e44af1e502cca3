"""Three training steps of each tagging net against PyTorch: same weights, same batches, float64.

Augmentation is off. Dropout leaves out the same channels in both nets, so that its places are held
to the original's. In float32 such differences would hide in rounding noise.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.tiny import TAGGER, TINY_HTSAT, tagger_variables
from uss_jax.bundles.nets import build_sed, fields_of
from uss_jax.training.optim import adamw, adamw_amsgrad, clipped
from uss_jax.training.state import create_state
from uss_jax.training.tagging_step import make_tagging_step
from uss_jax.weights.torch import state_dict_of

torch = pytest.importorskip("torch")

STEPS, ITEMS, CLASSES = 3, 4, 9
SAMPLES = 255 * 80  # 256 frames, as HTS-AT's image holds: a stretch has float32 positions
LEARNING_RATE = 1e-3
CLIP_NORM = 0.05  # low enough to clip every gradient of the tiny nets
TOLERANCE = 1e-10  # relative to a tensor's largest value; the worst found is 5e-14
CNN14 = TAGGER.clone(classes=CLASSES)
HTSAT = TINY_HTSAT.clone(classes=CLASSES, stochastic_depth=0.0)
CASES = {
    "cnn14": (CNN14, adamw_amsgrad(LEARNING_RATE), 0.0),
    "cnn14_decision_level_max": (build_sed(fields_of(CNN14)), adamw_amsgrad(LEARNING_RATE), 0.0),
    "htsat": (HTSAT, adamw(LEARNING_RATE, 0.05), CLIP_NORM),
}


def kept(channels, rate):
    """The share of each channel that dropout leaves: every second or fifth one falls out."""
    return (np.arange(channels) % round(1 / rate) != 0) / (1 - rate)


def even_dropout(call, args, kwargs, context):
    """Takes the place of Flax's dropout."""
    net = context.module
    if not isinstance(net, nn.Dropout) or kwargs.get("deterministic", net.deterministic):
        return call(*args, **kwargs)
    return args[0] * kept(args[0].shape[-1], net.rate) if net.rate else args[0]


def torch_net(name):
    from tests.benchmarks import torch_htsat, torch_nets

    net = CASES[name][0]
    fields = {key: value for key, value in fields_of(net).items() if key not in ("net", "dtype")}
    if name == "htsat":
        for key in ("stochastic_depth", "repeat_short"):
            del fields[key]
        return torch_htsat.HTSAT(**fields)
    family = {
        "cnn14": torch_nets.Cnn14,
        "cnn14_decision_level_max": torch_nets.Cnn14DecisionLevelMax,
    }[name]

    class WithDropout(family):
        def dropout(self, x, rate):
            share = torch.from_numpy(kept(x.shape[1], rate))
            return x * share.reshape(-1, *[1] * (x.ndim - 2))

    return WithDropout(**fields)


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        loudness = 10 ** rng.uniform(-2, -0.5, (ITEMS, 1))
        yield loudness * rng.standard_normal((ITEMS, SAMPLES)), rng.random((ITEMS, CLASSES)) < 0.3


def start(name):
    variables = tagger_variables(net=CASES[name][0])
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)


def in_torch(name, params, batch_stats):
    variables = jax.device_get({"params": params, "batch_stats": batch_stats})
    return state_dict_of("query", fields_of(CASES[name][0]), variables)


def ours(name):
    """(loss, gradients, parameters and statistics) after each step, by the names of PyTorch."""
    net, optimizer, norm = CASES[name]
    gradients = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params=None: (updates, updates),
    )
    # The gradients kept are those that the optimiser sees.
    optimizer = clipped(optax.chain(gradients, optimizer), norm)
    step = make_tagging_step(
        net, optimizer, outputs=("clipwise",), mixup_alpha=None, spec_augment_stripes=None
    )
    with jax.enable_x64(True), nn.intercept_methods(even_dropout):
        fresh = jax.tree.map(jnp.asarray, start(name))
        state = create_state(
            {"tagger": fresh["params"]}, {"tagger": fresh["batch_stats"]}, optimizer
        )
        step = jax.jit(step)
        for audio, labels in batches():
            batch = {"audio": audio, "labels": labels}
            state, metrics = step(state, {}, batch, jax.random.key(0))
            statistics = state.batch_stats["tagger"]
            yield (
                float(metrics["loss"]),
                in_torch(name, state.opt_state[0]["tagger"], statistics),
                in_torch(name, state.params["tagger"], statistics),
            )


def theirs(name):
    """The same from PyTorch."""
    from torch.nn.functional import binary_cross_entropy

    net = torch_net(name).double()
    variables = start(name)
    tensors = in_torch(name, variables["params"], variables["batch_stats"])
    # Attention's index and masks are no parameters; batches are counted from 0.
    missing, unexpected = net.load_state_dict(
        {key: torch.from_numpy(array) for key, array in tensors.items()}, strict=False
    )
    assert all(key.endswith("num_batches_tracked") for key in missing)
    assert not unexpected
    _, _, norm = CASES[name]
    rates = dict(lr=LEARNING_RATE, weight_decay=0.05 if name == "htsat" else 0.0)
    optimizer = torch.optim.AdamW(net.parameters(), **rates, amsgrad=name != "htsat")
    net.train()
    for audio, labels in batches():
        clipwise, _ = net(torch.from_numpy(audio))
        loss = binary_cross_entropy(clipwise, torch.from_numpy(labels.astype(np.float64)))
        optimizer.zero_grad()
        loss.backward()
        if norm:
            assert torch.nn.utils.clip_grad_norm_(net.parameters(), norm) > norm
        optimizer.step()
        gradients = {key: p.grad.numpy().copy() for key, p in net.named_parameters()}
        state = {key: tensor.numpy().copy() for key, tensor in net.state_dict().items()}
        yield loss.item(), gradients, state


def error(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", CASES)
def test_three_steps_are_pytorch_s(name):
    worst = {"loss": 0.0, "gradients": 0.0, "parameters": 0.0, "statistics": 0.0}

    def note(what, found, key=""):
        worst[what] = max(worst[what], found)
        assert found < TOLERANCE, (what, key)

    for (loss, gradients, tensors), expected in zip(ours(name), theirs(name), strict=True):
        note("loss", abs(loss - expected[0]) / expected[0])
        for key, gradient in expected[1].items():
            note("gradients", error(gradients[key], gradient), key)
        for key, array in tensors.items():
            what = "statistics" if "running" in key else "parameters"
            note(what, error(array, expected[2][key]), key)
    print(name, {what: f"{found:.1e}" for what, found in worst.items()})  # with pytest -s
