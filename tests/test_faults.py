"""Every test that FAULTS.md names exists."""

import pathlib
import re

HERE = pathlib.Path(__file__).parent


def _named():
    """Yields (file, test) of the table's cells; a name without a file is of the file before it."""
    for line in (HERE / "FAULTS.md").read_text().splitlines():
        file = None
        for match in re.finditer(r"(?:tests/([\w/]+\.py))?(?:::(\w+))?", line.rpartition(" | ")[2]):
            file = match[1] or file
            if match[1] or match[2]:
                yield file, match[2]


def test_the_tests_of_every_fault_exist():
    named = list(_named())
    assert len(named) > 100
    for file, test in named:
        text = (HERE / file).read_text()
        assert test is None or f"def {test}(" in text, f"{file}::{test}"
