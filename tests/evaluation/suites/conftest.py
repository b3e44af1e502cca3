import pytest

from tests.evaluation.suites import imitations
from tests.tiny import write_separator


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """A folder of imitated data sets, each named after its suite, and of models."""
    sets = tmp_path_factory.mktemp("suites")
    for kind in ("one_hot", "soft", "embedding"):
        write_separator(sets / kind, kind)
    for suite in ("fsdkaggle2018", "fsd50k", "slakh2100", "musdb18", "voicebank_demand"):
        getattr(imitations, suite)(sets / suite)
    return sets
