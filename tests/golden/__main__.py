"""Holds the nets to the reference's numbers, on whatever device JAX finds.

    JAX_PLATFORMS=cuda python -m tests.golden [--at highest|high|default|bfloat16] [pytest's words]

The tests are those marked `golden`. A machine with a GPU may lack packages that only other tests
need; files that cannot be imported there are left out, and named. `ways.py` holds the limits.
"""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# Prints, as JSON, which of the modules named lack a package, and which one.
_PROBE = """
import importlib, json, sys
missing = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing[name] = error.name
print(json.dumps(missing))
"""


def golden_files() -> list[pathlib.Path]:
    """The test files that hold a golden test."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [file for file in files if "pytest.mark.golden" in file.read_text(encoding="utf-8")]


def main(words: list[str]) -> int:
    """Runs them; pytest's exit status."""
    names = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in golden_files()
    }
    probe = [sys.executable, "-c", _PROBE, *names]
    found = subprocess.run(probe, cwd=ROOT, capture_output=True, text=True, check=True)
    for name, package in json.loads(found.stdout.splitlines()[-1]).items():
        print(f"{names.pop(name)} is left out: there is no package {package}")
    # Warnings are the business of the whole test run, and so are the checks of shapes, which need
    # one package more.
    options = ["-m", "golden", "-o", "filterwarnings=default"]
    if importlib.util.find_spec("beartype") is None:
        options += ["-o", "addopts=--strict-markers"]
    return pytest.main([*options, f"--rootdir={ROOT}", *map(str, names.values()), *words])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
