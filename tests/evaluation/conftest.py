import pytest

from tests.evaluation.tones import BARK, DOG, SPEECH, write_pairs
from tests.tiny import noise, tone, write_records, write_separator
from uss_jax.models.query import KINDS


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("evaluate")
    write_pairs(place / "pairs")
    for kind in KINDS:
        write_separator(place / kind, kind)
    clips = [
        ("a", tone(220, 0.8), [SPEECH]),
        ("b", tone(260, 1.2), [SPEECH]),
        ("c", noise(50, 1.0), [DOG, BARK]),
        ("quiet", 1e-4 * noise(51, 1.0), [DOG]),
    ]
    write_records(place / "records", "train", clips)
    return place
