"""Deterministic test signals for the parity tests, with numpy alone.

`make_signal(seed_string, n)` gives a mono float32 signal of n samples at 32 kHz: a few random
events (chirps with harmonics, amplitude-modulated noise, click trains, decaying tones) over weak
noise, with one or two stretches of exact digital silence. It is rounded to multiples of 1/32768,
so it is the same on all platforms and survives a 16-bit WAV file.
"""

import numpy as np

from tests.golden.weights import uniform01

SAMPLE_RATE = 32000


def _noise(seed_string: str, n: int) -> np.ndarray:
    """Zero-mean noise of unit variance: the sum of four uniform numbers."""
    u = uniform01(seed_string, 4 * n).reshape(4, n)
    return (u.sum(axis=0) - 2.0) * np.sqrt(3.0)


def _chirp(t: np.ndarray, f0: float, f1: float, seconds: float) -> np.ndarray:
    phase = 2 * np.pi * (f0 * t + 0.5 * (f1 - f0) / seconds * t * t)
    return sum(np.sin(k * phase) / k for k in range(1, 4))


def _modulated_noise(p: np.ndarray, t: np.ndarray, seed_string: str) -> np.ndarray:
    rate = 1.0 + 12.0 * p[6]
    a = 0.3 + 0.65 * p[7]  # one-pole low-pass colour
    s = np.convolve(_noise(seed_string, len(t)), a ** np.arange(64), mode="full")
    s = s[: len(t)] * np.sqrt(1 - a * a)
    return s * (0.5 - 0.5 * np.cos(2 * np.pi * rate * t + 6.28 * p[8]))


def _clicks(p: np.ndarray, t: np.ndarray, f0: float) -> np.ndarray:
    period = int(SAMPLE_RATE * (0.02 + 0.25 * p[6]))
    s = np.zeros(len(t))
    body = np.exp(-np.arange(400) / (20.0 + 100.0 * p[7]))
    body = body * np.cos(2 * np.pi * f0 * np.arange(400) / SAMPLE_RATE)
    for begin in range(0, len(t), period):
        k = min(400, len(t) - begin)
        s[begin : begin + k] += 2.0 * body[:k]
    return s


def _decaying_tones(p: np.ndarray, t: np.ndarray, f0: float) -> np.ndarray:
    return sum(
        np.exp(-t * (1.0 + 6.0 * q)) * np.sin(2 * np.pi * f0 * (1.0 + 2.3 * j * q) * t)
        for j, q in enumerate(p[9:13])
    )


def _event(p: np.ndarray, t: np.ndarray, seed_string: str) -> np.ndarray:
    """One event from its 16 random numbers p at the times t (seconds)."""
    f0 = 80.0 * (60.0 ** p[3])  # 80 .. 4800 Hz
    f1 = 80.0 * (60.0 ** p[4])
    kind = int(p[5] * 4)
    if kind == 0:
        return _chirp(t, f0, f1, len(t) / SAMPLE_RATE)
    if kind == 1:
        return _modulated_noise(p, t, seed_string)
    if kind == 2:
        return _clicks(p, t, f0)
    return _decaying_tones(p, t, f0)


def make_signal(
    seed_string: str, n: int, events: int = 7, silence: bool = True, floor: float = 2e-3
) -> np.ndarray:
    """A signal, float32 [n].

    Args:
      seed_string: what the signal depends on.
      n: samples at 32 kHz.
      events: how many events are drawn.
      silence: whether stretches of digital silence are cut into it.
      floor: standard deviation of the noise below the events.
    """
    r = uniform01(seed_string + ":params", 16 * events + 8)
    x = floor * _noise(seed_string + ":floor", n)
    for e in range(events):
        p = r[16 * e : 16 * e + 16]
        begin = int(p[0] * 0.85 * n)
        length = max(int((0.1 + 0.5 * p[1]) * n), min(n - begin, 800))
        end = min(begin + length, n)
        m = end - begin
        if m < 16:
            continue
        ramp = max(int(0.01 * SAMPLE_RATE), 1)
        edge = np.minimum(np.arange(m), np.arange(m)[::-1])
        envelope = np.minimum(edge / ramp, 1.0)
        amplitude = 0.05 + 0.25 * p[2] ** 2
        t = np.arange(m, dtype=np.float64) / SAMPLE_RATE
        x[begin:end] += amplitude * envelope * _event(p, t, f"{seed_string}:am{e}")
    if silence:
        p = r[16 * events :]
        for a, b in ((p[0], p[1]), (p[2], p[3])):
            begin = int(a * 0.9 * n)
            x[begin : begin + int((0.03 + 0.07 * b) * n)] = 0.0
    x = np.clip(x, -0.98, 0.98)
    return (np.round(x * 32768.0) / 32768.0).astype(np.float32)


def make_batch(seed_string: str, b: int, n: int) -> np.ndarray:
    """b signals of n samples with the seed strings "<seed_string>/0", ..., float32 [b, n]."""
    return np.stack([make_signal(f"{seed_string}/{i}", n) for i in range(b)])


def query_signal(seed_string: str, n: int, soft: tuple[int, int] | None = None) -> np.ndarray:
    """A query recording: `make_signal`, with the samples of `soft` (begin, end) at 1/100.

    The soft stretch counts as silence, and is rounded to multiples of 1/32768 again.
    """
    x = make_signal(seed_string, n)
    if soft:
        begin, end = soft
        y = np.round(x[begin:end].astype(np.float64) * 0.01 * 32768.0) / 32768.0
        x[begin:end] = y.astype(np.float32)
    return x
