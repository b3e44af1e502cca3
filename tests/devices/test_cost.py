import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import CONFIGS
from uss_jax.bundles.nets import build_separator
from uss_jax.cli.config import load_config
from uss_jax.devices.cost import (
    device_bytes,
    flops_by_way,
    least_seconds,
    model_flops,
    peak_flops,
)
from uss_jax.devices.precision import PRECISIONS, at_precision
from uss_jax.models.resunet import ResUNet

SHAPE = jax.ShapeDtypeStruct


def test_products_and_convolutions_are_counted_by_hand():
    a, b = SHAPE((2, 3, 5), np.float32), SHAPE((2, 5, 7), np.float32)
    product = 2 * 2 * 3 * 5 * 7
    assert model_flops(jnp.matmul, a, b) == product
    assert model_flops(jax.jit(lambda a, b: jnp.sin(a @ b)), a, b) == product
    scanned = lambda a, b: jax.lax.scan(lambda c, _: (c, a @ b), 0, None, length=4)  # noqa: E731
    assert model_flops(scanned, a, b) == 4 * product

    image, kernel = SHAPE((2, 6, 8, 3), np.float32), SHAPE((3, 3, 3, 5), np.float32)
    convolve = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    once = 2 * (2 * 6 * 8) * 5 * (3 * 3 * 3)
    assert model_flops(convolve, image, kernel) == once
    both = jax.grad(lambda x, k: jnp.sum(jnp.square(convolve(x, k))), argnums=(0, 1))
    assert model_flops(both, image, kernel) == 3 * once


def _separate(net):
    mixture, condition = SHAPE((2, 1, 64000), np.float32), SHAPE((2, 527), np.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), mixture, condition)

    def separate(params, stats, mixture, condition):
        variables = {"params": params, "batch_stats": stats}
        return net.apply(variables, mixture, condition, train=True, mutable=["batch_stats"])[0]

    return separate, (variables["params"], variables.get("batch_stats", {}), mixture, condition)


def _residual_bytes(function, *arguments):
    """The bytes that a function keeps for its backward pass, besides its arguments."""
    kept = lambda *args: jax.tree.leaves(jax.vjp(function, *args)[1])  # noqa: E731
    jaxpr = jax.make_jaxpr(kept)(*arguments).jaxpr
    given = {*jaxpr.invars, *jaxpr.constvars}
    found = {v for v in jaxpr.outvars if isinstance(v, jax.extend.core.Var)} - given
    return sum(v.aval.size * np.dtype(v.aval.dtype).itemsize for v in found)


def test_the_published_separator_costs_what_is_said_of_it():
    separate, arguments = _separate(ResUNet())
    assert model_flops(separate, *arguments) / 2 == pytest.approx(2 * 51e9, rel=0.02)
    gradient = jax.grad(lambda *x: jnp.sum(separate(*x)))
    assert model_flops(gradient, *arguments) / 2 == pytest.approx(0.31e12, rel=0.02)


@pytest.mark.parametrize(("size", "macs"), [("small", 15.3e9), ("base", 51.6e9), ("large", 235e9)])
def test_band_split_separators_cost_what_is_said_of_them(size, macs):
    config = load_config(str(CONFIGS / f"bandsplit.py:size={size}"), [])
    separate, arguments = _separate(build_separator(config.separator.to_dict()))
    assert model_flops(separate, *arguments) / 2 == pytest.approx(2 * macs, rel=0.02)


def test_bfloat16_nearly_halves_what_is_kept_for_the_backward_pass_and_remat_takes_more_of_it():
    kept = {
        (dtype, remat): _residual_bytes(
            *(lambda f, x: (f, *x))(*_separate(ResUNet(dtype=dtype, remat=remat)))
        )
        for dtype in ("float32", "bfloat16")
        for remat in (False, True)
    }
    print({key: f"{value / 1e9:.2f} GB" for key, value in kept.items()})
    for remat in (False, True):
        # Not half: head and masks stay in float32.
        assert kept["bfloat16", remat] < 0.6 * kept["float32", remat]
    assert kept["float32", True] < 0.45 * kept["float32", False]


def test_what_a_function_keeps_is_counted_once_and_arguments_are_not():
    x = SHAPE((100,), np.float32)
    assert _residual_bytes(lambda x: x * x, x) == 0
    assert _residual_bytes(lambda x: jnp.exp(jnp.sin(x)), x) == 2 * 400  # cosine, exponential
    assert _residual_bytes(lambda x: (jnp.exp(x), 2 * jnp.exp(x)), x) == 2 * 400


def test_memory_of_a_compiled_function_counts_a_donated_argument_once():
    x = SHAPE((1000,), np.float32)
    plain, donated = (
        jax.jit(lambda x: x + 1, donate_argnums=given).lower(x).compile() for given in ((), 0)
    )
    assert device_bytes(plain)["arguments"] == device_bytes(donated)["arguments"] == 4000
    assert device_bytes(plain)["total"] - device_bytes(donated)["total"] == 4000


def test_peaks_of_known_devices():
    assert peak_flops("NVIDIA H200", "bfloat16") == 989e12
    h100 = [peak_flops("NVIDIA H100 80GB HBM3", precision) for precision in PRECISIONS]
    assert h100 == [67e12, 495e12, 495e12]  # highest, high, default
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak_flops("TPU v5 lite", "bfloat16") == 197e12
    assert peak_flops("TPU v5p", "bfloat16") == 459e12
    v5e = [peak_flops("TPU v5 lite", precision) for precision in PRECISIONS]
    assert v5e == [197e12 / 6, 197e12 / 3, 197e12]
    assert peak_flops("cpu", "default") is None


def test_each_way_of_multiplying_counts_at_its_own_peak():
    a = SHAPE((100, 100), np.float32)
    rough = SHAPE((100, 100), jnp.bfloat16)

    def products(a, rough):
        exact = at_precision("highest", jnp.matmul)(a, a)
        return at_precision("default", lambda: a @ exact @ a)(), rough @ rough

    found = flops_by_way(products, a, rough)
    assert found == {"highest": 2e6, "default": 4e6, "bfloat16": 2e6}
    assert least_seconds(found, "NVIDIA H200") == pytest.approx(
        2e6 / 67e12 + 4e6 / 495e12 + 2e6 / 989e12
    )
    assert least_seconds(found, "cpu") is None
