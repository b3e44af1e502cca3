import pathlib
import threading

import jax
import jax.numpy as jnp
import pytest

from uss_jax.cli import compiling
from uss_jax.cli.compiling import long_compilations_reported


@pytest.fixture
def impatient(monkeypatch):
    """Whatever compiles is reported, and at once; gives the reports."""
    started = []

    class AtOnce(threading.Timer):
        def start(self):
            started.append(self.args)
            self.function(*self.args)

    monkeypatch.setattr(compiling.threading, "Timer", AtOnce)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    return started


def step(x):
    return jnp.sin(x) * 3 + 1


def test_what_compiles_is_named_before_it_is_done_and_the_advice_given_once(impatient, capsys):
    with long_compilations_reported():
        jax.jit(step)(jnp.ones(3)).block_until_ready()
        jax.jit(lambda x: x - 5)(jnp.ones(3)).block_until_ready()
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert [line for line in lines if line.startswith("compiling the training step: ")]
    assert [line for line in lines if line.startswith("compiling a program (<lambda>): ")]
    assert said.err.count("JAX_COMPILATION_CACHE_DIR=DIR") == 1
    assert "JAX_COMPILATION_CACHE_DIR=DIR" in lines[0]


def test_what_compiles_at_once_is_not_reported(monkeypatch, capsys):
    started, cancelled = [], []
    monkeypatch.setattr(threading.Timer, "start", lambda timer: started.append(timer))
    monkeypatch.setattr(threading.Timer, "cancel", lambda timer: cancelled.append(timer))
    with long_compilations_reported():
        jax.jit(step)(jnp.ones(4)).block_until_ready()
        assert started
        assert cancelled == started
    assert capsys.readouterr().err == ""


def test_nothing_is_reported_afterwards_nor_by_other_hosts(impatient, capsys, monkeypatch):
    with long_compilations_reported():
        pass
    jax.jit(step)(jnp.ones(5)).block_until_ready()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with long_compilations_reported():
        jax.jit(step)(jnp.ones(6)).block_until_ready()
    assert (impatient, capsys.readouterr().err) == ([], "")


def test_programs_are_named_after_functions_of_the_package():
    package = pathlib.Path(compiling.__file__).parent.parent
    sources = "\n".join(path.read_text() for path in package.rglob("*.py"))
    unknown = [name for name in compiling._PROGRAMS if f"def {name}(" not in sources]
    assert not unknown
