import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import train_words, write_place
from uss_jax.bundles import nets
from uss_jax.bundles.model import Model
from uss_jax.cli.inspection import inspect
from uss_jax.cli.main import main
from uss_jax.models.cnn14 import Cnn14, Cnn14DecisionLevelMax
from uss_jax.models.htsat import HTSAT
from uss_jax.models.tagging import TaggingNet

pytestmark = pytest.mark.usefixtures("one_device")


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


class Plain(nn.Module):
    """Two dense layers on the spectrum of each frame; no batch norm, fields of its own."""

    sample_rate: int = 32000
    frame: int = 320
    width: int = 8
    classes: int = 527
    dtype: str = "float32"

    @property
    def embedding_width(self):
        return self.width

    @property
    def frame_hop_samples(self):
        return self.frame

    @nn.compact
    def __call__(self, waveform, train=False, augment=None):
        frames = waveform.shape[1] // self.frame + 1
        x = jnp.pad(waveform, ((0, 0), (0, frames * self.frame - waveform.shape[1])))
        x = jnp.log(jnp.abs(jnp.fft.rfft(x.reshape(len(x), frames, self.frame))) + 1e-5)
        x = augment(x) if augment else x
        hidden = nn.relu(nn.Dense(self.width, dtype=self.dtype)(x)).astype(jnp.float32)
        framewise = nn.sigmoid(nn.Dense(self.classes)(hidden))
        return {
            "clipwise": jnp.max(framewise, axis=1),
            "framewise": framewise,
            "embedding": jnp.mean(hidden, axis=1),
        }


@pytest.mark.long
def test_another_tagging_net_is_its_file_and_a_row(tmp_path, monkeypatch, quick_compilation):
    monkeypatch.setitem(nets.TAGGERS, "plain", {"query": Plain, "sed": Plain})
    place = write_place(tmp_path)
    changed = {"outputs": ("clipwise",), "total_steps": 2, "spec_augment": None}
    words = train_words("tagger_cnn14.py", place, tmp_path / "plain", changed)
    words = [word for word in words if not word.startswith("--config.tagger.")]
    assert main([*words, "--config.tagger={'net': 'plain', 'frame': 80}"]) == 0
    assert any("plain, 527 classes" in line for line in inspect(tmp_path / "plain"))
    finds = {"sed_bundle": tmp_path / "plain", "query_bundle": tmp_path / "plain"}
    finds |= {"sed_net": "plain", "query_net": "plain", "query.finetune": True, "total_steps": 1}
    assert main(train_words("resunet30.py", place, tmp_path / "run", finds)) == 0
    model = Model(tmp_path / "run")
    assert (model.sed.module.frame, type(model.tagger.module)) == (80, Plain)
