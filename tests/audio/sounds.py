"""Sound files of many formats, and their lengths."""

import numpy as np
import soundfile

from uss_jax.audio.containers import read_mp3
from uss_jax.audio.files import audio_format, read_audio

RATE = 32000
SECONDS = 3


def swelling_tone(seconds=SECONDS, channels=1):
    """A tone that grows and shrinks: frames of a variable bit rate differ in size."""
    t = np.arange(seconds * RATE) / RATE
    noise = np.random.default_rng(0).normal(0, 0.2, (len(t), channels)) * (t > 1)[:, None]
    return (0.3 * np.sin(2 * np.pi * 440 * t)[:, None] + noise).clip(-0.9, 0.9)


def sound_file(folder, suffix, **options):
    path = folder / f"whole.{suffix}"
    options = {
        "wav": {"subtype": "PCM_16"},
        "opus": {"format": "OGG", "subtype": "OPUS"},
        "rf64": {"format": "RF64", "subtype": "PCM_16"},
    }.get(suffix, {}) | options
    rate = 48000 if suffix == "opus" else RATE
    soundfile.write(path, swelling_tone(), rate, **options)
    return path


def vbr_mp3(folder):
    path = sound_file(folder, "mp3", bitrate_mode="VARIABLE", compression_level=0.4)
    mp3 = read_mp3(path.read_bytes())
    assert mp3.promised == mp3.frames
    return path, mp3


def seconds_of(path):
    waveform, rate = read_audio(path)
    assert waveform.shape[1] == audio_format(path).samples
    return waveform.shape[1] / rate
