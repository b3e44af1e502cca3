import jax
import numpy as np
import pytest

from uss_jax.models.cnn14 import Cnn14, Cnn14DecisionLevelMax
from uss_jax.models.htsat import HTSAT
from uss_jax.models.tagging import TaggingNet


@pytest.mark.parametrize("net", [Cnn14(), Cnn14DecisionLevelMax(), HTSAT()])
def test_every_tagging_net_keeps_the_protocol(net):
    assert isinstance(net, TaggingNet)
    waveform = np.zeros((2, 5 * net.sample_rate), np.float32)
    given = jax.eval_shape(lambda x: net.init_with_output(jax.random.key(0), x)[0], waveform)
    assert given["clipwise"].shape == (2, net.classes)
    assert given["embedding"].shape == (2, net.embedding_width)
    if "framewise" in given:
        frames = waveform.shape[1] // net.frame_hop_samples + 1
        assert given["framewise"].shape == (2, frames, net.classes)
