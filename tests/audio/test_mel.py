import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden.compare import distance, relative_error
from tests.golden.inputs import make_signal
from uss_jax.audio.mel import hz_to_mel, log_mel, mel_matrix, mel_to_hz
from uss_jax.audio.stft import stft

MATRIX = dict(sample_rate=32000, n_fft=1024, mel_bins=64, f_min=50.0, f_max=14000.0)
log_mel_of = jax.jit(log_mel, static_argnames=(*MATRIX, "hop_samples"))


@pytest.fixture(scope="module")
def frontend(golden):
    with np.load(golden / "frontend.npz") as fixture:
        return dict(fixture)


@pytest.mark.golden
def test_golden_matrix(frontend):
    # The reference rounds to float32.
    assert relative_error(frontend, "mel_matrix", mel_matrix(**MATRIX)) < 1e-7


@pytest.mark.golden
@pytest.mark.parametrize("n", [64000, 63999, 329600])
def test_golden_log_mel(frontend, n):
    signal = make_signal(f"dev/frontend/{n}", n)[None]
    power = np.abs(stft(jnp.asarray(signal), 1024, 320))[None] ** 2
    assert relative_error(frontend, f"n{n}/power1024", power) < 1e-5
    actual = np.asarray(log_mel_of(signal, hop_samples=320, **MATRIX))[None]
    key = f"n{n}/logmel"
    assert relative_error(frontend, key, actual) < 2e-6
    thin = actual.ravel()[:: int(frontend.get(f"{key}@stride", 1))]
    np.testing.assert_allclose(thin, frontend[key].ravel(), rtol=0, atol=5e-3)


def test_scale_goes_there_and_back():
    hz = np.concatenate([np.linspace(0, 16000, 777), [999.999, 1000.0, 1000.001]])
    np.testing.assert_allclose(mel_to_hz(hz_to_mel(hz)), hz, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(hz_to_mel(np.array([0, 200 / 3, 1000, 6400])), [0, 1, 15, 42])
    assert (np.diff(hz_to_mel(np.sort(hz))) > 0).all()


def test_filters_have_unit_area_between_the_edges():
    n_fft = 1 << 16
    matrix = mel_matrix(32000, n_fft, 40, 100.0, 9000.0)
    hz = np.arange(n_fft // 2 + 1) * 32000 / n_fft
    # Sums of 150 samples or more of a triangle.
    np.testing.assert_allclose(matrix.sum(axis=0) * 32000 / n_fft, 1, rtol=1e-3)
    assert (matrix >= 0).all()
    assert not matrix[(hz < 99) | (hz > 9001)].any()
    assert (np.diff(matrix.argmax(axis=0)) > 0).all()


def test_silence_lies_on_the_floor():
    mel = log_mel_of(np.zeros((1, 3200), np.float32), hop_samples=320, **MATRIX)
    np.testing.assert_allclose(mel, -100, atol=1e-4)


def test_narrow_input_gives_float32():
    noise = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3200)), jnp.bfloat16)
    mel = log_mel_of(noise, hop_samples=320, **MATRIX)
    assert mel.dtype == jnp.float32
    # The very samples in float32.
    np.testing.assert_allclose(
        mel, log_mel_of(noise.astype(jnp.float32), hop_samples=320, **MATRIX), atol=1e-3
    )


def test_float64_is_computed_in_float64():
    noise = np.random.default_rng(0).standard_normal((1, 3200))
    with jax.enable_x64(True):
        mel = np.asarray(log_mel_of(noise, hop_samples=320, **MATRIX))
    blocks = np.pad(noise[0], 512, mode="reflect")
    frames = np.stack([blocks[i : i + 1024] for i in range(0, 3201, 320)])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    power = np.abs(np.fft.rfft(frames * window)) ** 2
    expected = 10 * np.log10(np.maximum(power @ mel_matrix(**MATRIX), 1e-10))
    assert distance(mel[0], expected) < 1e-13
