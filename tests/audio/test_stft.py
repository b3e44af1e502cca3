import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.golden.compare import distance, relative_error
from tests.golden.inputs import make_signal
from uss_jax.audio.stft import change_spectrum, frame_count, hann_window, istft, stft
from uss_jax.devices.mesh import batch_sharded, make_mesh

N_FFT, HOP = 2048, 320
LENGTHS = [64000, 63999, 329600]
FRONT_ENDS = [(16, 4), (16, 5), (16, 16), (18, 7), (64, 10), (8, 11)]

spectrum_of = jax.jit(stft, static_argnums=(1, 2))
waveform_of = jax.jit(istft, static_argnums=(1, 2, 3))


@pytest.fixture(scope="module")
def frontend(golden):
    with np.load(golden / "frontend.npz") as fixture:
        return dict(fixture)


@functools.cache
def golden_spectrum(n):
    """The spectrum [1, 1, frames, bins] of the reference's input of n samples."""
    return spectrum_of(make_signal(f"dev/frontend/{n}", n)[None, None], N_FFT, HOP)


@pytest.mark.golden
@pytest.mark.parametrize("n", LENGTHS)
def test_golden_spectrum(frontend, n):
    spectrum = np.asarray(golden_spectrum(n))
    magnitude = np.maximum(np.abs(spectrum), 1e-5)
    assert relative_error(frontend, f"n{n}/stft_real", spectrum.real) < 1e-5
    assert relative_error(frontend, f"n{n}/stft_imag", spectrum.imag) < 1e-5
    assert relative_error(frontend, f"n{n}/mag", magnitude) < 1e-5
    assert relative_error(frontend, f"n{n}/spectrogram_eps1e-8", np.maximum(magnitude, 1e-4)) < 1e-5


@pytest.mark.golden
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(("name", "part"), [("cos", np.real), ("sin", np.imag)])
def test_golden_phase(frontend, n, name, part):
    spectrum = np.asarray(golden_spectrum(n))
    direction = part(spectrum) / np.maximum(np.abs(spectrum), 1e-5)
    key = f"n{n}/{name}"
    # Below 1e-3 the direction of a bin is rounding noise of the magnitude's.
    audible = frontend[f"n{n}/mag"] > 1e-3
    actual = direction.ravel()[:: int(frontend[f"{key}@stride"])]
    assert audible.mean() > 0.8
    assert distance(actual[audible], frontend[key][audible]) < 1e-4
    np.testing.assert_allclose(actual[audible], frontend[key][audible], rtol=0, atol=1e-3)


@pytest.mark.golden
@pytest.mark.parametrize("n", LENGTHS)
def test_golden_inverse(frontend, n):
    spectrum = golden_spectrum(n)[0]
    frame, bin_ = np.mgrid[: spectrum.shape[1], : spectrum.shape[2]]
    gain = 0.3 + 0.7 * ((7 * frame + 3 * bin_) % 11) / 10
    turn = 0.1 * ((5 * frame + bin_) % 13)
    modified = spectrum * (gain * np.exp(1j * turn)).astype(np.complex64)
    for key, values, length in [
        ("istft_roundtrip", spectrum, n),
        ("istft_modified", modified, n),
        ("istft_modified_length_none", modified, None),
    ]:
        actual = waveform_of(values, N_FFT, HOP, length)
        assert relative_error(frontend, f"n{n}/{key}", actual) < 5e-6, key


def literal_stft(waveform, n_fft, hop):
    """The definition: reflected ends, a window around every hop, a sum over its samples."""
    padded = np.pad(waveform.astype(np.float64), n_fft // 2, mode="reflect")
    t, f = np.arange(n_fft), np.arange(n_fft // 2 + 1)
    basis = np.exp(-2j * np.pi * np.outer(t, f) / n_fft)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * t / n_fft)
    frames = [
        (padded[begin : begin + n_fft] * window) @ basis for begin in range(0, len(waveform), hop)
    ]
    if len(waveform) % hop == 0:  # one more frame is centred just behind the last sample
        frames.append((padded[len(waveform) :][:n_fft] * window) @ basis)
    return np.stack(frames)


def literal_istft(spectrum, n_fft, hop):
    """The definition: windowed frames added, over the sum of squared windows."""
    window = hann_window(n_fft)
    total = np.zeros((len(spectrum) - 1) * hop + n_fft)
    weight = np.zeros_like(total)
    for i, frame in enumerate(spectrum):
        total[i * hop : i * hop + n_fft] += window * np.fft.irfft(frame, n_fft)
        weight[i * hop : i * hop + n_fft] += window**2
    centred = slice(n_fft // 2, len(total) - n_fft // 2)
    return total[centred] / np.maximum(weight[centred], 1e-11)


@pytest.mark.parametrize(("n_fft", "hop"), FRONT_ENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-14)])
def test_equals_the_definition(n_fft, hop, dtype, tolerance):
    # Ten units of the dtype's last place.
    waveform = np.random.default_rng(0).standard_normal(203).astype(dtype)
    with jax.enable_x64(dtype == np.float64):
        spectrum = np.asarray(spectrum_of(waveform, n_fft, hop))
        inverse = np.asarray(waveform_of(spectrum, n_fft, hop, None))
    assert inverse.dtype == dtype
    assert (
        distance(spectrum.view(dtype), literal_stft(waveform, n_fft, hop).view(float)) < tolerance
    )
    assert distance(inverse, literal_istft(spectrum, n_fft, hop)) < tolerance


@settings(max_examples=8)
@example(samples=1, lead=[])
@example(samples=32, lead=[2])  # as long as half a window
@given(samples=st.integers(1, 200), lead=st.lists(st.integers(1, 3), max_size=3))
def test_any_length_and_leading_axes_come_back(samples, lead):
    n_fft, hop = 64, 12
    waveform = np.random.default_rng(samples).standard_normal((*lead, samples)).astype(np.float32)
    spectrum = spectrum_of(waveform, n_fft, hop)
    assert spectrum.shape == (*lead, frame_count(samples, hop), n_fft // 2 + 1)
    row = literal_stft(waveform.reshape(-1, samples)[-1], n_fft, hop)
    np.testing.assert_allclose(spectrum.reshape(-1, *row.shape)[-1], row, atol=2e-5)
    # Less than a hop behind the last frame's centre, the squared windows sum to 0.3 or more.
    np.testing.assert_allclose(
        waveform_of(spectrum, n_fft, hop, samples), waveform, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("length", [0, 1, 50, 120, 152, 200])
def test_inverse_of_any_length_is_cut_or_followed_by_silence(length):
    spectrum = spectrum_of(np.random.default_rng(0).standard_normal(120).astype(np.float32), 64, 12)
    whole = waveform_of(spectrum, 64, 12, None)
    assert whole.shape == (120,)
    part = waveform_of(spectrum, 64, 12, length)
    assert part.shape == (length,)
    np.testing.assert_array_equal(part[:120], whole[:length])
    np.testing.assert_array_equal(part[120 + 32 :], 0)  # past the last frame


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_samples_are_transformed_in_float32(dtype):
    waveform = jnp.asarray(np.random.default_rng(0).integers(-99, 99, 100), dtype)
    spectrum = spectrum_of(waveform, 16, 4)
    assert spectrum.dtype == jnp.complex64
    assert distance(spectrum, literal_stft(np.asarray(waveform, np.float32), 16, 4)) < 1e-6


def round_trip(waveform):
    return istft(stft(waveform, 64, 10), 64, 10, waveform.shape[-1])


@pytest.mark.parametrize("shape", [(16, 400), (8, 2, 400)])
def test_sharded_batch_stays_where_it_is(shape):
    mesh = make_mesh()
    waveform = np.random.default_rng(0).standard_normal(shape).astype(np.float32)

    def loss_and_gradient(x):
        return jax.value_and_grad(lambda x: jnp.sum(round_trip(x) ** 3))(x)

    with jax.set_mesh(mesh):
        sharding = batch_sharded(mesh)
        sharded = jax.device_put(waveform, sharding)
        compiled = jax.jit(loss_and_gradient).lower(sharded).compile()
        _, gradient = compiled(sharded)
    for gathering in ("all-gather", "all-to-all", "collective-permute"):
        assert gathering not in compiled.as_text()
    assert gradient.sharding.is_equivalent_to(sharding, gradient.ndim)
    np.testing.assert_allclose(gradient, 3 * waveform**2, atol=1e-4)


def test_batch_that_does_not_divide_over_the_devices_runs_too():
    waveform = np.random.default_rng(0).standard_normal((3, 100)).astype(np.float32)
    with jax.set_mesh(make_mesh()):
        np.testing.assert_allclose(jax.jit(round_trip)(waveform), waveform, atol=1e-5)


def test_inside_a_shard_map_of_the_caller():
    mesh = make_mesh()
    waveform = np.random.default_rng(0).standard_normal((16, 100)).astype(np.float32)
    with jax.set_mesh(mesh):
        spec = batch_sharded(mesh).spec
        inside = jax.shard_map(round_trip, in_specs=spec, out_specs=spec)
        np.testing.assert_allclose(jax.jit(inside)(waveform), waveform, atol=1e-5)


@pytest.mark.parametrize(("n_fft", "hop"), [(16, 8), (16, 5), (64, 32), (64, 16)])
def test_a_changed_spectrum_bursts_at_no_length(n_fft, hop):
    """As the last samples did whose only window is nearly 0 there."""
    rng = np.random.default_rng(0)
    for length in range(3 * n_fft, 3 * n_fft + 2 * hop):
        waveform = jnp.asarray(rng.standard_normal(length), jnp.float32)

        def change(spectrum):
            turned = np.exp(2j * np.pi * rng.random(spectrum.shape))
            return spectrum * turned.astype(np.complex64)

        changed = change_spectrum(waveform, n_fft, hop, change)
        assert changed.shape == waveform.shape
        assert np.abs(changed).max() < 8
        np.testing.assert_allclose(
            change_spectrum(waveform, n_fft, hop, lambda x: x), waveform, atol=1e-5
        )


def test_a_transform_of_much_overlap_is_that_of_the_reference():
    waveform = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3199)), jnp.float32)
    changed = change_spectrum(waveform, N_FFT, HOP, lambda x: x * 0.5j)
    plain = istft(stft(waveform, N_FFT, HOP) * 0.5j, N_FFT, HOP, 3199)
    np.testing.assert_array_equal(changed, plain)
    with pytest.raises(ValueError, match="hop_samples=9 is more than half of n_fft=16"):
        change_spectrum(waveform, 16, 9, lambda x: x)
