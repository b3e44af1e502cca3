import pytest

from tests.evaluation.tones import evaluate_pairs


@pytest.mark.parametrize("out", ["results", "results.csv", "run.v1", ".json"])
def test_results_are_json_so_that_no_file_beside_takes_their_place(place, tmp_path, out, capsys):
    assert evaluate_pairs(place, "soft", tmp_path / out) == 1
    assert "give a file name that ends in .json" in capsys.readouterr().err
