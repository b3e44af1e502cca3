"""Another separator is a module that fulfils the protocol, a row in SEPARATORS, and a config."""

import json
import re

import flax.linen as nn
import numpy as np
import pytest

from tests.tiny import CONFIGS, RATE, tone, train_words, write_pairs, write_place
from uss_jax.audio.files import read_audio, write_wav
from uss_jax.audio.stft import istft, stft
from uss_jax.bundles import nets
from uss_jax.cli.inspection import inspect
from uss_jax.cli.main import main

QUICK_COMPILATION = True
pytestmark = pytest.mark.usefixtures("one_device")

CONFIG = f"""
import runpy

from ml_collections import ConfigDict


def get_config():
    config = runpy.run_path({str(CONFIGS / "resunet30.py")!r})["get_config"]()
    config.separator = ConfigDict(SEPARATOR)
    return config
"""
COMMON = dict(n_fft=128, hop_samples=64, dtype="float32")
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
    "separator",
    [
        dict(net="gains", audio_channels=1, **COMMON),
        dict(net="bandsplit", audio_channels=1, **COMMON, **BANDS),
        dict(net="bandsplit", audio_channels=2, **COMMON, **BANDS),
        dict(net="resunet", audio_channels=2, channels=(4, 4), **COMMON),
    ],
)
def test_it_trains_is_measured_separates_and_is_exported(tmp_path, monkeypatch, capsys, separator):
    monkeypatch.setitem(nets.SEPARATORS, "gains", Gains)
    place, run, out = write_place(tmp_path), tmp_path / "run", str(tmp_path / "pairs.json")
    write_pairs(tmp_path / "pairs", [1, 300])
    (tmp_path / "other.py").write_text(CONFIG.replace("SEPARATOR", repr(separator)))
    changed = {"eval.pairs": tmp_path / "pairs", "eval.every_steps": 2, "total_steps": 2}
    stereo = separator["audio_channels"] == 2
    changed |= {"mixing.pan": 1.0} if stereo else {}
    words = train_words(str(tmp_path / "other.py"), place, run, changed)
    words = [word for word in words if not word.startswith("--config.separator.")]
    assert main(words) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2
    assert np.isfinite(lines[-1]["eval/sdri"])

    model = ["--model", str(run)]
    pairs = ["--data", str(tmp_path / "pairs")]
    assert main(["evaluate", "pairs", *pairs, *model, "--out", out]) == 0
    write_wav(tmp_path / "two.wav", np.stack([tone(400, 1.5), tone(400, 1.5) / 2]), RATE)
    separate = ["separate", str(tmp_path / "two.wav"), *model, "--classes", "Speech"]
    assert main([*separate, "--threshold", "0", "--out", str(tmp_path / "separated")]) == 0
    (file,) = (tmp_path / "separated").rglob("*.wav")
    estimate, _ = read_audio(file)
    assert np.abs(estimate).max() > 0
    if stereo:
        _takes_one_or_two_channels(estimate, tmp_path, model, capsys)
    else:  # one mask for both
        np.testing.assert_allclose(estimate[0], 2 * estimate[1], atol=1e-6)
    if stereo:
        exported = ["export", str(run), "--format", "stablehlo", "--out", str(tmp_path / "hlo")]
        assert main(exported) == 0
        assert re.search(r"mixture \[b, 2, \d+\]", (tmp_path / "hlo" / "README.md").read_text())
    for form in ("orbax", "safetensors"):
        exported = str(tmp_path / form)
        assert main(["export", str(run), "--format", form, "--out", exported]) == 0
        assert any(separator["net"] in line for line in inspect(exported))
    assert f"separator: {separator['net']}" in "\n".join(inspect(run))


def _takes_one_or_two_channels(estimate, folder, model, capsys):
    """A mono recording is heard in both channels, another number is refused."""
    assert np.abs(estimate[0] - 2 * estimate[1]).max() > 1e-4  # each has a mask of its own
    one, three = tone(400, 1.5)[None], np.stack([tone(400, 1.5)] * 3)
    for name, channels in (("one", one), ("both", one.repeat(2, axis=0)), ("three", three)):
        write_wav(folder / f"{name}.wav", channels, RATE)
    words = [*model, "--classes", "Speech", "--threshold", "0", "--out"]
    found = {}
    for name in ("one", "both"):
        assert main(["separate", str(folder / f"{name}.wav"), *words, str(folder / name)]) == 0
        (file,) = (folder / name).rglob("*.wav")
        found[name], _ = read_audio(file)
    np.testing.assert_allclose(found["one"][0], found["both"].mean(axis=0), atol=1e-6)
    capsys.readouterr()
    three = ["separate", str(folder / "three.wav"), *words, str(folder / "three")]
    assert main(three) == 1
    assert "three.wav has 3 channels" in (said := capsys.readouterr().err)
    assert "separates 2 at once; give --mono, or a model with audio_channels=1" in said
    assert main([*three, "--mono"]) == 0
