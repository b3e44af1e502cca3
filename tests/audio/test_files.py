import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from uss_jax.audio.files import read_audio, read_mono, resample, write_wav
from uss_jax.errors import UserError


def _wav(path, waveform, sample_rate=32000, subtype="FLOAT"):
    soundfile.write(path, waveform, sample_rate, subtype=subtype)


def _noise(samples, channels=1):
    return np.random.default_rng(0).uniform(-0.5, 0.5, (samples, channels)).astype(np.float32)


def _header_only(path):
    _wav(path, np.zeros((0, 1), np.float32))


def _nan(path):
    waveform = _noise(32000)
    waveform[16000] = np.nan
    _wav(path, waveform)


def _infinite(path):
    waveform = _noise(100, channels=2)
    waveform[0, 1] = -np.inf
    _wav(path, waveform)


def _cut_flac(path):
    soundfile.write(path, _noise(32000), 32000, format="FLAC")
    data = path.read_bytes()
    path.write_bytes(data[:30])


HOSTILE = {
    "missing": (lambda path: None, "does not exist"),
    "dangling_link": (
        lambda path: path.symlink_to("moved/away.wav"),
        r"sound\.wav is a link to moved/away\.wav, which does not exist",
    ),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "text": (
        lambda path: path.write_text("a letter, not a sound\n" * 99),
        "cannot be read as audio",
    ),
    "zero_bytes": (lambda path: path.touch(), r"is empty \(0 bytes\)"),
    "header_only": (_header_only, "holds no samples"),
    "cut_header": (_cut_flac, "cannot be read as audio|holds no samples"),
    "nan": (_nan, r"NaN or infinite, at 0\.500 s"),
    "infinite": (_infinite, r"NaN or infinite, at 0\.000 s"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_one_sentence_that_names_it(tmp_path, case):
    make, said = HOSTILE[case]
    path = tmp_path / "sound.wav"
    make(path)
    with pytest.raises(UserError, match=said) as error:
        read_mono(path, 32000)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_mp3_are_not_called_missing(tmp_path):
    (tmp_path / "noise.mp3").write_bytes(np.random.default_rng(1).bytes(9000))
    with pytest.raises(UserError, match=r"cannot be read as audio \(it contains no audio\)"):
        read_audio(tmp_path / "noise.mp3")


def test_name_ending_in_raw_is_refused_in_words(tmp_path):
    path = tmp_path / "sound.raw"
    path.write_bytes(bytes(1000))
    with pytest.raises(UserError, match="cannot be read as audio"):
        read_audio(path)


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
def test_reads_the_usual_formats(tmp_path, extension):
    path = tmp_path / f"sound.{extension}"
    soundfile.write(path, _noise(32000, channels=2), 32000)
    waveform, sample_rate = read_audio(path)
    assert waveform.shape[0] == 2
    assert sample_rate == 32000
    # mp3 pads to whole frames of 1152 samples, a coder's delay included.
    assert 0 <= waveform.shape[1] - 32000 <= (3 * 1152 if extension == "mp3" else 0)


def test_eight_channels_become_their_mean(tmp_path):
    waveform = _noise(500, channels=8)
    _wav(tmp_path / "eight.wav", waveform)
    read, _ = read_audio(tmp_path / "eight.wav")
    np.testing.assert_array_equal(read, waveform.T)
    # Summing eight float32 in another order: 1 ulp of 0.5.
    mono = read_mono(tmp_path / "eight.wav", 32000)
    np.testing.assert_allclose(mono, waveform.mean(axis=1), atol=1e-7)


def test_telephone_speech_becomes_four_times_as_many_samples(tmp_path):
    t = np.arange(8000) / 8000
    _wav(tmp_path / "phone.wav", np.sin(2 * np.pi * 440 * t), 8000)
    mono = read_mono(tmp_path / "phone.wav", 32000)
    expected = np.sin(2 * np.pi * 440 * np.arange(32000) / 32000)
    # Away from the ends soxr's high quality is 20 bits: 1e-6 of full scale, float32 included.
    np.testing.assert_allclose(mono[2000:-2000], expected[2000:-2000], atol=2e-6)
    assert mono.dtype == np.float32


def test_reads_only_the_beginning_when_asked(tmp_path):
    waveform = _noise(48000)
    _wav(tmp_path / "a.wav", waveform, 16000)
    read, _ = read_audio(tmp_path / "a.wav", seconds=0.5)
    np.testing.assert_array_equal(read, waveform[:8000].T)


@settings(max_examples=50)
@given(
    st.integers(0, 5000), *[st.sampled_from([8000, 11025, 16000, 22050, 32000, 44100, 48000])] * 2
)
def test_resampled_length_is_rounded_half_up(samples, from_rate, to_rate):
    out = resample(np.zeros((2, samples), np.float32), from_rate, to_rate)
    assert out.shape == (2, int(np.floor(samples * to_rate / from_rate + 0.5)))


def test_resample_treats_channels_alike():
    waveform = np.ascontiguousarray(_noise(4410, channels=6).T).reshape(2, 3, 4410)
    together = resample(waveform, 44100, 32000)
    alone = resample(waveform[1, 2], 44100, 32000)
    np.testing.assert_array_equal(together[1, 2], alone)


def test_written_wav_reads_back_exactly_even_beyond_one(tmp_path):
    waveform = 3 * np.ascontiguousarray(_noise(1000, channels=2).T)
    write_wav(tmp_path / "out.wav", waveform, 16000)
    read, sample_rate = read_audio(tmp_path / "out.wav")
    np.testing.assert_array_equal(read, waveform)
    assert sample_rate == 16000
    assert [path.name for path in tmp_path.iterdir()] == ["out.wav"]


def test_writing_into_a_missing_folder_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="could not be written"):
        write_wav(tmp_path / "none" / "out.wav", np.zeros((1, 10), np.float32), 16000)
