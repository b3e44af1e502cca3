import pytest

from tests.audio.sounds import RATE, SECONDS, sound_file, vbr_mp3
from uss_jax.audio.in_memory import decode_bytes, format_of_bytes


def test_an_audio_file_in_memory_is_mended_too(tmp_path):
    path, mp3 = vbr_mp3(tmp_path)
    bare = path.read_bytes()[mp3.begin :]
    assert format_of_bytes(bare).samples == decode_bytes(bare).shape[1] > 0.98 * SECONDS * RATE
    wav = sound_file(tmp_path, "wav").read_bytes()
    with pytest.raises(ValueError, match=r"is cut off .its header promises 3.0 s"):
        format_of_bytes(wav[:9999])
    with pytest.raises(ValueError, match="several audio files"):
        format_of_bytes(2 * wav)
