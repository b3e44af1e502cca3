import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from uss_jax.bundles.fingerprint import fingerprint
from uss_jax.devices.mesh import make_mesh

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "bool"]


def _array(dtype, shape=(8, 24), seed=0):
    drawn = np.random.default_rng(seed).standard_normal(shape) * 3
    return np.asarray(drawn).astype(jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (8, 24), (2, 3, 8, 5)])
def test_host_and_devices_agree(dtype, shape):
    array = _array(dtype, shape)
    assert fingerprint({"a": array}) == fingerprint({"a": jnp.asarray(array)})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool"])
def test_large_arrays_stay_on_their_devices_and_agree(dtype):
    array = _array(dtype, (17, 70_001))
    assert fingerprint({"a": array}) == fingerprint({"a": jnp.asarray(array)})


def test_of_more_than_one_block_of_the_host():
    array = _array("float32", (3, 70_001))
    assert fingerprint([array]) == fingerprint([jnp.asarray(array)])


@pytest.mark.parametrize("spec", [("data",), (None, "data"), ()])
def test_is_of_the_values_and_not_of_their_layout(spec):
    array = _array("float32")
    laid_out = jax.device_put(array, NamedSharding(make_mesh(), PartitionSpec(*spec)))
    assert fingerprint({"a": laid_out}) == fingerprint({"a": array})
    with jax.set_mesh(make_mesh()):  # as in training
        assert fingerprint({"a": laid_out}) == fingerprint({"a": array})
    changed = array.copy()
    changed[-1, -1] += 1
    assert fingerprint({"a": laid_out}) != fingerprint({"a": changed})


def test_containers_do_not_count_and_order_neither():
    a, b = _array("float32"), _array("int32")
    assert fingerprint({"x": (a, b)}) == fingerprint({"x": {"1": b, "0": a}})


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_change_of_any_one_bit_shows(dtype):
    array = _array(dtype, (3, 5))
    before = fingerprint({"a": array})
    seen = {before}
    for at in range(array.size):
        for bit in range(1 if dtype == "bool" else 8 * array.dtype.itemsize):
            changed = array.copy()
            raw = changed.reshape(-1).view(np.uint8)
            raw[at * array.dtype.itemsize + bit // 8] ^= 1 << bit % 8
            seen.add(fingerprint({"a": changed}))
    assert len(seen) == 1 + array.size * (1 if dtype == "bool" else 8 * array.dtype.itemsize)


@pytest.mark.parametrize("length", [2, 256, 512, 4096])
def test_lost_and_moved_runs_show(length):
    # Ones and zeros, as in fresh batch norms: sums with simple weights would cancel.
    ones = np.ones(8192, np.float32)
    lost = ones.copy()
    lost[1024 : 1024 + length] = 0
    moved = np.roll(lost, length)
    assert len({fingerprint([x]) for x in (ones, lost, moved, -ones, 2 * ones)}) == 5


def test_name_shape_and_dtype_count():
    array = _array("int32", (4, 6))
    of = [{"a": array}, {"b": array}, {"a": array.reshape(6, 4)}, {"a": array.view(np.uint32)}]
    assert len({fingerprint(tree) for tree in of}) == 4
