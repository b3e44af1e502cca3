"""The package as others install it: a wheel, used far from the repository."""

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.tiny import CONFIGS

ROOT = pathlib.Path(__file__).parent.parent
_BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the files of a wheel, built from a copy of what it is made of."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("uss_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.cfg", "setup.py", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    for name in ("README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-c", _BUILD, place], cwd=source, check=True, capture_output=True
    )
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place / "installed")
    return place / "installed"


def _files(folder):
    return {
        str(file.relative_to(folder))
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def test_a_wheel_holds_every_file_of_the_package_and_the_configs(installed):
    package = {name for name in _files(ROOT / "uss_jax") if "egg-info" not in name}
    configs = {f"configs/{name}" for name in _files(CONFIGS)}
    assert _files(installed / "uss_jax") == package | configs
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"uss_jax"}


def test_training_commands_of_a_wheel_find_configs_by_name(installed, tmp_path):
    commands = [
        ("train", "resunet30:condition=soft"),
        ("train", "ablations:sources=3"),
        ("train-tagger", "quickstart:part=tagger"),
        ("train-tagger", "nowhere"),
    ]
    script = f"""
import uss_jax
from uss_jax.cli.main import main
print(uss_jax.__file__)
for command, config in {commands}:
    assert main([command, "--config", config, "--workdir", "run"]) == 1
"""
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"{installed / 'uss_jax' / '__init__.py'}\n"
    *found, missing = ran.stderr.splitlines()
    # The config is read, and complete but for the records.
    assert [line.partition(";")[0] for line in found] == (
        ["uss-jax: config.data.records is empty"] * 3
    )
    names = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.py")))
    assert missing.endswith(f"nowhere: there is no such file. Shipped configs: {names}")


def test_a_wheel_installs_the_command(installed):
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    (entry,) = distribution.entry_points.select(group="console_scripts")
    assert (entry.name, entry.value) == ("uss-jax", "uss_jax.cli.main:command")
