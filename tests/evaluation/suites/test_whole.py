import pytest

from tests.evaluation.suites.recomputed import run_suite
from uss_jax.errors import UserError
from uss_jax.evaluation.suites.whole import require_package


def test_a_model_that_takes_classes_only_is_refused(sets, tmp_path, capsys):
    assert run_suite(sets, "musdb18", tmp_path / "r.json", kind="one_hot") == 1
    assert "takes AudioSet classes only" in capsys.readouterr().err


def test_a_missing_package_says_how_to_install_it():
    with pytest.raises(UserError, match=r"pip install 'uss-jax\[suites\]'"):
        require_package("no_such_package", "this")
