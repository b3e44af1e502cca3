import numpy as np
import pytest

from tests import tiny
from tests.separation.test_recordings import vectors
from uss_jax.errors import UserError
from uss_jax.separation.recordings import Separator
from uss_jax.separation.waveforms import require_rate


@pytest.mark.parametrize(
    ("waveform", "said"),
    [
        (np.zeros((0,), np.float32), "shape"),
        (np.zeros((1, 2, 3), np.float32), "shape"),
        (np.array([0, np.inf], np.float32), "NaN or infinite"),
        (np.zeros((800, 2), np.float32), "more channels than samples.*transpose"),
        (np.zeros(800, np.int64), "int64 has no known full scale"),
        (np.zeros(800, np.uint8), "uint8"),
        (np.zeros(800, bool), "bool"),
        (np.zeros(800, complex), "complex128"),
        (np.array(["a", "b"]), "<U1"),
        ([None, 1.0], "object"),
        (np.full(800, 20000.0), "samples of 20000.*divided by 32768"),
        (np.array([1e300, 0.0]), "NaN or infinite"),
    ],
)
def test_hostile_waveforms(model, waveform, said):
    with pytest.raises(UserError, match=said):
        Separator(model).separate(waveform, tiny.RATE, vectors(model))


@pytest.mark.parametrize("rate", [0, -8000, 8000.5, np.nan, 1e300, "8000", None, True])
def test_hostile_rates(rate):
    with pytest.raises(UserError, match="sample rate is"):
        require_rate(rate)


@pytest.mark.parametrize("rate", [tiny.RATE, 11025])
def test_samples_of_other_types_are_the_same_sound(model, rate):
    """Integers are scaled, at the model's rate as at others."""
    separator, query = Separator(model), vectors(model, 1)
    integers = np.rint(tiny.noise(0, 0.6) * 32768).astype(np.int16)
    floats = (integers / np.float32(32768)).astype(np.float32)
    expected = separator.separate(floats, rate, query)["sound 0"]
    same = {
        "int16": integers,
        "int32": integers.astype(np.int32) * 2**16,
        "float64": floats.astype(np.float64),
        "list": floats.tolist(),
        "reversed twice": np.ascontiguousarray(floats[::-1])[::-1],
        "transposed": np.stack([floats] * 2, axis=1).T[0],
    }
    for name, waveform in same.items():
        found = separator.separate(waveform, rate, query)["sound 0"]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected, err_msg=name)
