import numpy as np
import pytest
import soundfile

from tests.data.toy import toy_noise, write_shards


@pytest.fixture
def records(tmp_path):
    """Two shards, see SHARDS."""
    return write_shards(tmp_path / "records")


@pytest.fixture
def audio(tmp_path):
    """A folder of recordings: those of GOOD, a silent one and a text."""
    folder = tmp_path / "audio folder"
    folder.mkdir()
    for at in range(10):
        soundfile.write(folder / f"{at}.wav", toy_noise(800 + at), 8000, subtype="PCM_16")
    soundfile.write(folder / "long.flac", toy_noise(20000), 8000)
    soundfile.write(folder / "stereo.wav", toy_noise(1600, 2), 16000)
    soundfile.write(folder / "silent.wav", np.full((8000, 1), 5e-4), 8000)
    (folder / "text.wav").write_text("no sound")
    return folder
