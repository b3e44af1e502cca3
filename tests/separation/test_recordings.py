"""Files in, files out."""

import numpy as np
import pytest
import soundfile

from tests import tiny
from uss_jax.audio.resampling import resample
from uss_jax.errors import UserError
from uss_jax.separation.queries import Classes, Vectors
from uss_jax.separation.recordings import RESIDUAL, Separator, Settings
from uss_jax.separation.waveforms import consistent

QUICK_COMPILATION = True


def vectors(model, number=2):
    width = model.separator.module.condition_width
    drawn = np.random.default_rng(0).random((number, width), np.float32)
    return Vectors({f"sound {at}": vector for at, vector in enumerate(drawn)})


def recording(path, rate=tiny.RATE, channels=1, seconds=1.5, subtype="FLOAT", gain=1.0):
    samples = max(round(rate * seconds), 1)
    waveform = np.random.default_rng(1).uniform(-0.5, 0.5, (samples, channels)) * gain
    soundfile.write(path, waveform, rate, subtype=subtype)
    return path


FORMS = {
    "model_rate": {},
    "stereo_44100": {"rate": 44100, "channels": 2},
    "8_channels": {"channels": 8, "seconds": 0.3},
    "192_khz": {"rate": 192000, "seconds": 0.4},
    "odd_rate": {"rate": 11025},
    "one_sample": {"seconds": 0},
    "one_sample_44100": {"rate": 44100, "seconds": 0},
    "beyond_full_scale": {"gain": 19.0},
    "silence": {"gain": 0.0},
    "16_bit": {"subtype": "PCM_16"},
}


@pytest.mark.parametrize("form", FORMS)
def test_estimates_have_the_form_of_the_recording_and_are_those_of_the_waveform(
    model, tmp_path, form
):
    path = recording(tmp_path / "in.wav", **FORMS[form])
    waveform, rate = soundfile.read(path, dtype="float32", always_2d=True)
    separator = Separator(model, Settings(residual=True))
    made = separator.separate_file(path, tmp_path / "out", vectors(model))
    assert list(made.files) == ["sound 0", "sound 1", RESIDUAL]
    expected = separator.separate(np.ascontiguousarray(waveform.T), rate, vectors(model))
    total = np.zeros_like(waveform)
    for name, file in made.files.items():
        info = soundfile.info(str(file))
        assert (info.samplerate, info.channels, info.frames) == (
            rate,
            waveform.shape[1],
            len(waveform),
        )
        assert info.subtype == "FLOAT"
        written, _ = soundfile.read(file, dtype="float32", always_2d=True)
        total += written
        assert np.isclose(made.rms[name], np.sqrt(np.mean(np.square(written))), rtol=1e-4)
        if name != RESIDUAL:
            scale = max(np.abs(expected[name]).max(), 1.0)
            np.testing.assert_allclose(written.T, expected[name], atol=2e-6 * scale)
    np.testing.assert_allclose(total, waveform, atol=4e-6 * max(np.abs(waveform).max(), 1))


def test_channels_are_mixed_down_where_asked(model, tmp_path):
    # As the original: of stereo one channel, whose estimates stand beside its own mixture.
    path = recording(tmp_path / "in.wav", rate=44100, channels=2)
    settings = Settings(mono=True, reference_blocks=True, residual=True)
    made = Separator(model, settings).separate_file(path, tmp_path / "out", vectors(model))
    mixed = soundfile.read(path, dtype="float32")[0].mean(axis=1)
    expected = Separator(model, settings).separate(mixed, 44100, vectors(model))
    total = np.zeros_like(mixed)
    for name, file in made.files.items():
        written, _ = soundfile.read(file, dtype="float32")
        assert written.shape == mixed.shape
        total += written
        if name != RESIDUAL:
            np.testing.assert_allclose(written, expected[name], atol=2e-6)
    np.testing.assert_allclose(total, mixed, atol=4e-6)


def test_estimates_that_sum_to_the_mixture(model, tmp_path):
    path = recording(tmp_path / "in.wav", rate=22050, channels=2)
    mixture, _ = soundfile.read(path, dtype="float32", always_2d=True)
    separator = Separator(model, Settings(sum_to_mixture=True))
    made = separator.separate_file(path, tmp_path / "out", vectors(model, 3))
    total = sum(soundfile.read(f, dtype="float32", always_2d=True)[0] for f in made.files.values())
    np.testing.assert_allclose(total, mixture, atol=1e-6)
    alone = consistent(
        np.zeros((1, 1, 5), np.float32), np.ones((1, 5), np.float32), np.ones(1, bool)
    )
    np.testing.assert_array_equal(alone, np.ones((1, 1, 5)))


def test_a_long_recording_comes_in_pieces_and_stays_aligned(model, tmp_path, monkeypatch):
    """With the mixture itself as estimate, what comes out is the resampled mixture."""
    from uss_jax.separation import windows

    monkeypatch.setattr(windows, "_separate", lambda net, w, c: w)
    path = recording(tmp_path / "in.wav", rate=44100, seconds=20)
    made = Separator(model).separate_file(path, tmp_path / "out", vectors(model, 1))
    written, _ = soundfile.read(made.files["sound 0"], dtype="float32")
    waveform, _ = soundfile.read(path, dtype="float32")
    there = resample(waveform[None], 44100, tiny.RATE)
    back = resample(there, tiny.RATE, 44100)[0]
    np.testing.assert_allclose(written, back[: len(written)], atol=1e-6)


@pytest.mark.parametrize(
    ("suffix", "subtype", "step"), [(".wav", "PCM_24", 2**-23), (".flac", "PCM_24", 2**-23)]
)
def test_other_forms_of_samples(model, tmp_path, suffix, subtype, step):
    path = recording(tmp_path / "in.wav")
    float_file = Separator(model).separate_file(path, tmp_path / "float", vectors(model, 1))
    coarse = Separator(model, Settings(suffix=suffix, subtype=subtype))
    made = coarse.separate_file(path, tmp_path / "out", vectors(model, 1))
    assert made.files["sound 0"].suffix == suffix
    fine, _ = soundfile.read(float_file.files["sound 0"])
    np.testing.assert_allclose(soundfile.read(made.files["sound 0"])[0], fine, atol=step)


def test_files_are_not_overwritten_in_silence_nor_left_half_written(model, tmp_path):
    path = recording(tmp_path / "in.wav")
    Separator(model).separate_file(path, tmp_path / "out", vectors(model, 1))
    with pytest.raises(UserError, match="give --overwrite"):
        Separator(model).separate_file(path, tmp_path / "out", vectors(model, 1))
    again = Separator(model, Settings(overwrite=True))
    again.separate_file(path, tmp_path / "out", vectors(model, 1))

    broken = np.random.default_rng(0).uniform(-0.5, 0.5, 2 * tiny.RATE).astype(np.float32)
    broken[-1] = np.nan
    soundfile.write(tmp_path / "nan.wav", broken, tiny.RATE, subtype="FLOAT")
    with pytest.raises(UserError, match=r"NaN or infinite, at 2\.000 s"):
        Separator(model).separate_file(tmp_path / "nan.wav", tmp_path / "nan", vectors(model, 1))
    assert not list((tmp_path / "nan").iterdir())


def test_no_two_sounds_share_a_file(model, tmp_path):
    path = recording(tmp_path / "in.wav")
    width = model.separator.module.condition_width
    alike = Vectors({name: np.ones(width, np.float32) for name in ("a:b", "a?b", "a_b", "a b")})
    made = Separator(model).separate_file(path, tmp_path / "out", alike)
    assert len({file for file in made.files.values() if file.is_file()}) == 4
    named = Vectors({RESIDUAL: np.ones(width, np.float32)})
    with pytest.raises(UserError, match="would both be written to"):
        Separator(model, Settings(residual=True)).separate_file(path, tmp_path / "two", named)


def test_a_recording_is_never_replaced_by_its_own_sound(model, tmp_path):
    (tmp_path / "out").mkdir()
    path = recording(tmp_path / "out/sound 0.wav")
    with pytest.raises(UserError, match="is the recording itself"):
        Separator(model, Settings(overwrite=True)).separate_file(
            path, tmp_path / "out", vectors(model, 1)
        )


def test_classes_heard_nowhere_are_silent_or_left_out(model):
    waveform = tiny.noise(0, 1)
    asked = {"Speech": (0,), "Music": (137,)}
    separator = Separator(model)
    silent = separator.separate(waveform, tiny.RATE, Classes(asked, threshold=1.0))
    assert not np.any(list(silent.values()))
    for rate in (tiny.RATE, 2 * tiny.RATE):
        assert separator.separate(waveform, rate, Classes(asked, 1.0, only_active=True)) == {}
    heard = separator.separate(waveform, tiny.RATE, Classes(asked, threshold=0.0))
    assert all(estimate.any() for estimate in heard.values())


def test_estimates_that_are_not_finite_are_refused(model, tmp_path, monkeypatch):
    from uss_jax.separation import windows

    monkeypatch.setattr(windows, "_separate", lambda net, w, c: w * np.nan)
    with pytest.raises(UserError, match='NaN or infinite samples for "sound 0"'):
        Separator(model).separate(tiny.noise(0, 0.5), tiny.RATE, vectors(model))
    path = recording(tmp_path / "in.wav")
    with pytest.raises(UserError, match='NaN or infinite samples for "sound 0"'):
        Separator(model).separate_file(path, tmp_path / "out", vectors(model))
    assert not list((tmp_path / "out").iterdir())


def test_flac_of_many_channels_is_refused_before_anything_is_written(model, tmp_path):
    path = recording(tmp_path / "in.wav", channels=16, seconds=0.2)
    separator = Separator(model, Settings(suffix=".flac", subtype="PCM_24"))
    with pytest.raises(UserError, match="has 16 channels, a FLAC file holds 8; give --format wav"):
        separator.separate_file(path, tmp_path / "out", vectors(model, 1))
    assert not (tmp_path / "out").exists()


def test_only_sounds_that_are_heard_share_the_residual(model, tmp_path):
    path = recording(tmp_path / "in.wav")
    mixture, _ = soundfile.read(path, dtype="float32")
    heard, unheard = Classes({"a": (0,), "b": (137,)}, 0.0), Classes({"c": (1,)}, 1.0)

    class Both(Classes):
        def targets(self, model, probabilities):
            return [query.targets(model, probabilities)[0] for query in (unheard, heard)] + (
                heard.targets(model, probabilities)[1:]
            )

    separator = Separator(model, Settings(sum_to_mixture=True))
    both = Both({**unheard.sets, **heard.sets})
    made = separator.separate_file(path, tmp_path / "out", both)
    sounds = {n: soundfile.read(f, dtype="float32")[0] for n, f in made.files.items()}
    assert not sounds["c"].any()
    assert sounds["a"].any()
    np.testing.assert_allclose(sounds["a"] + sounds["b"], mixture, atol=1e-6)
    of_waveform = separator.separate(mixture, tiny.RATE, both)
    np.testing.assert_allclose(of_waveform["a"], sounds["a"], atol=2e-6)
    assert not of_waveform["c"].any()
    nothing = separator.separate(mixture, tiny.RATE, unheard)
    assert not nothing["c"].any()
