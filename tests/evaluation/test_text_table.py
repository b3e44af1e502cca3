from uss_jax.evaluation.text_table import sibling


def test_files_beside_results_keep_the_whole_name():
    assert str(sibling("runs/v1.2.json", ".csv")) == "runs/v1.2.csv"
