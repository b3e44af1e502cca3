import numpy as np
import pytest

from uss_jax.bundles.model import Model
from uss_jax.evaluation.finished import Finished
from uss_jax.evaluation.rows import ORACLE
from uss_jax.evaluation.scoring import score
from uss_jax.evaluation.suites.pairs import find_pairs

QUICK_COMPILATION = True


def test_what_another_model_has_left_is_not_used(place, tmp_path):
    unfinished = tmp_path / "unfinished"
    unfinished.write_text('{"run": "of another"}\n[0, {}]\n')
    pairs = find_pairs(place / "pairs")
    figures, _ = score(Model(place / "soft"), pairs, unfinished=unfinished)
    assert np.isfinite(figures[ORACLE]["sdr"]).all()


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda lines: [*lines[:2], bytes(len(lines[2])), lines[3]], {"a": {"sdr": 1.5}}),
        (lambda lines: [*lines[:3], b"3", b"[[1], 2]"], {"a": {"sdr": 1.5}, "b": {"sdr": 2.5}}),
        (lambda lines: [*lines[:3], b"\xff\xfe"], {}),
        (lambda lines: [bytes(len(lines[0])), *lines[1:]], {}),
    ],
)
def test_what_a_power_cut_has_damaged_is_computed_again(tmp_path, damage, left):
    path = tmp_path / "unfinished"
    finished = Finished(path, [b"model"])
    for key, sdr in (("a", 1.5), ("b", 2.5), ("c", 3.5)):
        finished.add(key, {"sdr": sdr})
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"".join(line + b"\n" for line in damage(lines)))
    again = Finished(path, [b"model"])
    assert again.done == left
    again.add("d", {"sdr": np.float32(4.5)})
    assert Finished(path, [b"model"]).done == {**left, "d": {"sdr": 4.5}}


def test_what_another_evaluation_writes_into_the_file_is_not_taken(tmp_path):
    """Two at once with the same `out`, and the second again."""
    path = tmp_path / "unfinished"
    first, second = Finished(path, [b"one model"]), Finished(path, [b"another"])
    first.add(0, {"sdr": 1.0})
    second.add(1, {"sdr": 2.0})
    assert Finished(path, [b"another"]).done == {1: {"sdr": 2.0}}
    path.write_text("".join(line + "\n" for line in (path.read_text().splitlines()[0], "[3, 4]")))
    assert Finished(path, [b"another"]).done == {3: 4}  # a line of an older version
