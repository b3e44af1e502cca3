"""A tiny separator and a folder of recordings for it."""

import pytest
import soundfile

from tests import tiny
from uss_jax.bundles.model import Model


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    return str(tiny.write_separator(tmp_path_factory.mktemp("separator") / "bundle"))


@pytest.fixture(scope="session")
def model(bundle):
    return Model(bundle)


@pytest.fixture
def recordings(tmp_path):
    folder = tmp_path / "recordings"
    (folder / "more").mkdir(parents=True)
    for name, seed in (("a.wav", 0), ("b.flac", 1), ("more/a.wav", 2)):
        soundfile.write(folder / name, tiny.noise(seed, 1.2), tiny.RATE)
    (folder / "notes.txt").write_text("not audio")
    return folder
