import os

import numpy as np
import pytest
import soundfile

from tests.audio.sounds import RATE, swelling_tone
from uss_jax.audio.files import (
    Format,
    audio_format,
    find_recordings,
    read_audio,
    read_mono,
    write_wav,
    writing_audio,
)
from uss_jax.audio.in_memory import decode_bytes
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


@pytest.mark.parametrize("peak", [32768.0, -1e30, 12.0])
def test_integers_stored_as_floats_are_refused_with_the_remedy(tmp_path, peak):
    waveform = swelling_tone() * peak
    soundfile.write(tmp_path / "loud.wav", waveform, RATE, subtype="FLOAT")
    with pytest.raises(UserError, match=r"loud.wav .*above full scale .*divided by 32768"):
        read_mono(tmp_path / "loud.wav", RATE)
    with pytest.raises(ValueError, match="above full scale"):
        decode_bytes((tmp_path / "loud.wav").read_bytes())
    soundfile.write(tmp_path / "loud.wav", waveform / peak * 9, RATE, subtype="FLOAT")
    assert np.abs(read_mono(tmp_path / "loud.wav", RATE)).max() > 5


def test_what_integers_cannot_hold_is_counted(tmp_path):
    block = np.array([[0.5, 1.0, 1.5, -1.0, -1.01], [0, 0, 0, 2, 0]], np.float32)
    form = Format(RATE, 2, 5)
    for subtype, clipped in (("PCM_16", 6), ("PCM_24", 6), ("FLOAT", 0)):
        with writing_audio(tmp_path / "out.wav", form, subtype) as write:
            write(block)
            write(block)
        assert write.clipped == clipped


def test_one_rule_says_what_a_recording_is(tmp_path):
    for name in (
        *("a.wav", "b.OPUS", "c.aiff", "d.au", "e.w64", "f.caf", "sub/g.m4a", "sub/h.mp3"),
        *("._a.wav", ".hidden/x.wav", "Thumbs.db", "notes.txt", "sub/labels.csv"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    recordings, others = find_recordings(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in recordings]
    assert names == [
        *["a.wav", "b.OPUS", "c.aiff", "d.au", "e.w64", "f.caf", "sub/g.m4a", "sub/h.mp3"]
    ]
    assert [path.name for path in others] == ["notes.txt", "labels.csv"]


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    for path in (tmp_path / "pipe.wav", "/dev/zero"):
        with pytest.raises(UserError, match="is not a regular file"):
            audio_format(path)
