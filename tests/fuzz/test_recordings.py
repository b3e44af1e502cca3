"""Audio files, damaged: what is read of them is finite, and as long as is said."""

import io
import itertools

import numpy as np
import pytest
import soundfile
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz.damage import check_words, damaged, fuzz
from uss_jax.audio import mended
from uss_jax.audio.containers import read_mp3, read_parts, wav_without_length
from uss_jax.audio.files import audio_format, read_audio, truncation
from uss_jax.audio.in_memory import decode_bytes, format_of_bytes
from uss_jax.errors import UserError

RATE = 16000


def _encoded(form, subtype):
    memory = io.BytesIO()
    t = np.arange(RATE // 2) / RATE
    waveform = np.sin(2 * np.pi * 440 * t)[:, None] * [0.5, 0.2]
    soundfile.write(memory, waveform, RATE, format=form, subtype=subtype)
    return memory.getvalue()


FILES = {
    "wav": _encoded("WAV", "PCM_16"),
    "float": _encoded("WAV", "FLOAT"),
    "flac": _encoded("FLAC", "PCM_16"),
    "ogg": _encoded("OGG", "VORBIS"),
    "opus": _encoded("OGG", "OPUS"),
    "mp3": _encoded("MP3", "MPEG_LAYER_III"),
    "aiff": _encoded("AIFF", "PCM_16"),
    "au": _encoded("AU", "PCM_16"),
    "w64": _encoded("W64", "PCM_16"),
    "caf": _encoded("CAF", "PCM_16"),
}


@pytest.fixture(scope="module", autouse=True)
def no_ffmpeg():
    """A process for each example would take the time of a thousand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mended.shutil, "which", lambda name: None)
        yield


@pytest.mark.parametrize("kind", FILES)
@fuzz
@given(st.data())
def test_a_damaged_recording_is_read_or_refused(tmp_path_factory, kind, data):
    good = FILES[kind]
    content = data.draw(damaged(good) | damaged(good + good) | damaged(good[:200]))
    path = tmp_path_factory.getbasetemp() / f"fuzzed.{kind}"
    path.write_bytes(content)
    try:
        form = audio_format(path)
        waveform, rate = read_audio(path, seconds=3.0, accept_truncated=True)
    except UserError as error:
        check_words(error)
    else:
        assert np.isfinite(waveform).all()
        assert waveform.shape[0] == form.channels
        assert waveform.shape[1] <= 3 * rate
        # Samples are what makes memory: none without a byte for some thousand of them.
        assert waveform.shape[1] <= len(content) * 8192
        try:
            truncation(path)
        except UserError as error:
            check_words(error)
    try:
        assert format_of_bytes(content).samples >= 0
        assert np.isfinite(decode_bytes(content)).all()
    except ValueError as error:
        check_words(error)


@fuzz
@given(st.sampled_from(sorted(FILES)).flatmap(lambda kind: damaged(FILES[kind])) | st.binary())
@example(b"riff")
def test_containers_are_walked_to_their_end(data):
    parts = read_parts(data)
    assert parts[0].begin == 0
    assert parts[-1].end == len(data)
    assert all(one.end == other.begin for one, other in itertools.pairwise(parts))
    mp3 = read_mp3(data)
    assert mp3 is None or 0 < mp3.frames <= len(data)
    assert wav_without_length(data) is None or data[:4] == b"RIFF"
