import pytest

from tests import tiny
from tests.benchmarks.seams import differences
from uss_jax.bundles.model import Model
from uss_jax.errors import UserError
from uss_jax.separation.windows import Layout


@pytest.fixture
def model(tmp_path):
    return Model(tiny.write_separator(tmp_path / "bundle"))


def test_windows_differ_at_their_ends_only(model):
    waveform = tiny.noise(0, 20)
    layout = Layout.windows(model, len(waveform))
    step = layout.context // 4
    shares = differences(model, waveform, layout, step)
    assert shares.shape[1] == 8  # up to twice the context
    assert len(shares) >= 2
    assert (shares[:, 0] > 1e-4).all()
    assert (shares[:, 4:] < 1e-10).all()  # the part that is kept


def test_a_short_recording_is_refused(model):
    waveform = tiny.noise(0, 1)
    with pytest.raises(UserError, match="expected a recording of more than"):
        differences(model, waveform, Layout.windows(model, 10**6), 100)
