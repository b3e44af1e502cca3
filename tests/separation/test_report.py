"""The report page and its pictures."""

import re
import shutil
import subprocess

import numpy as np
import pytest
import soundfile

from tests import tiny
from tests.separation.test_job import separate
from uss_jax.separation.report import _player, band_levels

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)


def test_picture_shows_tones_where_they_are(tmp_path):
    tone = np.concatenate([tiny.tone(1000, 2), np.zeros(2 * tiny.RATE, np.float32)])
    soundfile.write(tmp_path / "tone.wav", np.stack([tone, 0 * tone], axis=1), tiny.RATE)
    levels = band_levels(tmp_path / "tone.wav")
    loud, quiet = levels[:, : levels.shape[1] // 2 - 1], levels[:, levels.shape[1] // 2 + 1 :]
    assert (quiet.max(axis=0) < -100).all()
    place = loud.mean(axis=1).argmax()
    assert 0.2 < place / len(levels) < 0.6
    assert -25 < loud.max() < -13  # -13.5 dB, less what its band has beside it


def test_sounds_far_above_full_scale_are_drawn_and_played(tmp_path):
    """The residual of many sounds that overlap."""
    path = tmp_path / "residual.wav"
    soundfile.write(path, 13 * tiny.tone(1000, 1), tiny.RATE, subtype="FLOAT")
    assert -25 < band_levels(path).max() - 20 * np.log10(13) < -13
    data, whole = _player(path)
    assert data.startswith("data:audio/mpeg;base64,")
    assert whole


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium browser")
def test_report_works_in_a_browser(bundle, recordings, tmp_path):
    assert separate(bundle, tmp_path / "out", str(recordings / "a.wav"), "--classes", "Dog") == 0
    page = tmp_path / "out" / "a" / "report.html"
    command = (
        f"{CHROMIUM} --headless --no-sandbox --disable-gpu --no-first-run --disable-sync "
        "--disable-background-networking --disable-component-update --virtual-time-budget=5000 "
        f"--user-data-dir={tmp_path / 'profile'} --dump-dom"
    )
    made = subprocess.run(
        [*command.split(), page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    playable = re.findall(r'data-playable="([\d.]+)"', made.stdout)
    assert len(playable) == 2  # the recording and one sound, both decoded
    assert all(abs(float(seconds) - 1.2) < 0.15 for seconds in playable)
    assert "http://" not in page.read_text().replace("http://www.w3.org", "")
    assert "https://" not in page.read_text()
