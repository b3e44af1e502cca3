"""Another separator is a module that fulfils the protocol, a row in SEPARATORS, and a config."""

import json

import flax.linen as nn
import numpy as np
import pytest

from tests.tiny import CONFIGS, RATE, tone, train_words, write_pairs, write_place
from uss_jax.audio.files import read_audio, write_wav
from uss_jax.audio.stft import istft, stft
from uss_jax.bundles import nets
from uss_jax.cli.inspection import inspect
from uss_jax.cli.main import main

CONFIG = f"""
import runpy

from ml_collections import ConfigDict


def get_config():
    config = runpy.run_path({str(CONFIGS / "resunet30.py")!r})["get_config"]()
    config.separator = ConfigDict(SEPARATOR)
    return config
"""
COMMON = dict(n_fft=128, hop_samples=64, audio_channels=1, dtype="float32")
BANDS = dict(bands=(2,) * 16 + (8,) * 4, width=8, layers=1, head_width=4, hidden_width=12)


class Gains(nn.Module):
    """A gain for each frequency, from the condition alone."""

    n_fft: int = 2048
    hop_samples: int = 320
    audio_channels: int = 1
    condition_width: int = 527
    dtype: str = "float32"

    @property
    def grid_samples(self):
        return self.hop_samples

    @property
    def window_samples(self):
        return 32 * self.n_fft

    @property
    def context_samples(self):
        return self.n_fft

    def for_training(self, norm_scope, remat):
        return self

    def __call__(self, mixture, condition, train=False):
        return self.separate_with_shared_mask(mixture, condition)

    @nn.compact
    def separate_with_shared_mask(self, mixture, condition):
        gain = nn.sigmoid(nn.Dense(self.n_fft // 2 + 1, name="gain")(condition))
        spectrum = stft(mixture, self.n_fft, self.hop_samples) * gain[:, None, None]
        return istft(spectrum, self.n_fft, self.hop_samples, mixture.shape[-1])


@pytest.mark.long
@pytest.mark.parametrize(
    "separator", [dict(net="gains", **COMMON), dict(net="bandsplit", **COMMON, **BANDS)]
)
def test_it_trains_is_measured_separates_and_is_exported(tmp_path, monkeypatch, separator):
    monkeypatch.setitem(nets.SEPARATORS, "gains", Gains)
    place, run, out = write_place(tmp_path), tmp_path / "run", str(tmp_path / "pairs.json")
    write_pairs(tmp_path / "pairs", [1, 300])
    (tmp_path / "other.py").write_text(CONFIG.replace("SEPARATOR", repr(separator)))
    changed = {"eval.pairs": tmp_path / "pairs", "eval.every_steps": 2, "total_steps": 4}
    words = train_words(str(tmp_path / "other.py"), place, run, changed)
    words = [word for word in words if not word.startswith("--config.separator.")]
    assert main(words) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4
    assert np.isfinite(lines[-1]["eval/sdri"])

    model = ["--model", str(run)]
    pairs = ["--data", str(tmp_path / "pairs")]
    assert main(["evaluate", "pairs", *pairs, *model, "--out", out]) == 0
    write_wav(tmp_path / "two.wav", np.stack([tone(400, 1.5), tone(400, 1.5) / 2]), RATE)
    separate = ["separate", str(tmp_path / "two.wav"), *model, "--classes", "Speech"]
    assert main([*separate, "--threshold", "0", "--out", str(tmp_path / "separated")]) == 0
    (file,) = (tmp_path / "separated").rglob("*.wav")
    estimate, _ = read_audio(file)
    np.testing.assert_allclose(estimate[0], 2 * estimate[1], atol=1e-6)
    assert np.abs(estimate).max() > 0
    for form in ("orbax", "safetensors"):
        exported = str(tmp_path / form)
        assert main(["export", str(run), "--format", form, "--out", exported]) == 0
        assert any(separator["net"] in line for line in inspect(exported))
    assert f"separator: {separator['net']}" in "\n".join(inspect(run))
