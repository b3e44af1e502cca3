"""Reading `--config NAME[:ARGUMENT] --config.key=value`."""

import argparse
import ast
import contextlib
import difflib
import functools
import math
import os
import pathlib
import runpy
from collections.abc import Iterator, Sequence, Set
from typing import Any

from ml_collections import ConfigDict

import uss_jax
from uss_jax.cli.arguments import path
from uss_jax.errors import UserError

_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_BRACKETS = set("()[]{}'\"")
_SHOWN = 60  # characters of a value that an error message shows


def add_config_arguments(
    parser: argparse.ArgumentParser, example: str, *, workdir_required: bool = True
) -> None:
    """Adds the arguments of training commands; `example` is shown in the help."""
    parser.add_argument(
        "--config",
        type=path,
        required=True,
        metavar="CONFIG[:ARGUMENT]",
        help="Python file with get_config(), or name of a shipped config, such as resunet30; "
        "ARGUMENT is passed to get_config(); set any key with --config.key=value",
    )
    parser.add_argument(
        "--workdir",
        type=path,
        required=workdir_required,
        help="folder of the run; a run that exists there is resumed",
    )
    hosts = parser.add_argument_group(
        "several hosts",
        "Run the same command on each host. TPU pods, SLURM job steps and the environment\n"
        "variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are detected;\n"
        "otherwise give:",
    )
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    hosts.add_argument("--processes", type=int, metavar="N", help="number of processes")
    hosts.add_argument("--process", type=int, metavar="I", help="index of this process, from 0")
    parser.epilog = (
        f"example:\n  {example}\n\nexit status: 0 done, 1 error (see the message), 143 stopped by\n"
        "SIGTERM after saving (the same command resumes)"
    )


def joined_hosts(args: argparse.Namespace) -> contextlib.AbstractContextManager:
    """Connects this process to the others of its run, see `join_hosts`."""
    from uss_jax.bundles.checkpoints import latest_step
    from uss_jax.devices.hosts import join_hosts

    last_step = lambda: None  # noqa: E731
    if args.workdir is not None:
        last_step = functools.partial(latest_step, os.path.join(args.workdir, "checkpoints"))
    return join_hosts(args.coordinator, args.processes, args.process, last_step=last_step)


def load_config(location: str, overrides: list[str]) -> ConfigDict:
    """Loads a config file and applies the overrides from the command line.

    "~" at the start of a value is expanded to the home folder.

    Args:
      location: path of a config file or name of a shipped one, then `:argument` for its
        get_config() if it takes one.
      overrides: words of the form `--config.key=value`.

    Raises:
      UserError: the config, its argument or a key is unknown, or a value has the wrong type.
    """
    config = _get_config(location)
    free = {name for name, value in _walk(config) if value is None or _is_empty(value)}
    with config.unlocked():
        for word in overrides:
            option, given, text = word.partition("=")
            names = option.removeprefix("--config.").split(".")
            _override(config, free, names, text if given else None, option)
        _expand_home(config)
    return config


def shipped_configs() -> dict[str, pathlib.Path]:
    """Maps shipped config names to files; a wheel holds them inside the package."""
    package = pathlib.Path(uss_jax.__file__).parent
    packaged, checkout = package / "configs", package.parent / "configs"
    folder = packaged if packaged.is_dir() else checkout
    return {file.stem: file for file in sorted(folder.glob("*.py"))}


def _find_config(name: str) -> str:
    """Returns the path of a config file, given its path or a shipped config's name."""
    if os.path.isfile(name):  # false for names that no file can have, too
        return name
    shipped = shipped_configs()
    if name in shipped:
        return str(shipped[name])
    near = difflib.get_close_matches(pathlib.PurePath(name).stem, shipped, n=1)
    hint = f"; did you mean --config {near[0]}?" if near else "."
    known = ", ".join(shipped) or "none"
    raise UserError(f"--config {name}: there is no such file{hint} Shipped configs: {known}")


def _get_config(location: str) -> ConfigDict:
    name, _, argument = location.partition(":")
    file = _find_config(name)
    try:
        get_config = runpy.run_path(file).get("get_config")
        if get_config is None:
            raise UserError(f"--config {name}: the file has no get_config()")
        config = get_config(argument) if argument else get_config()
    except UserError:
        raise
    except ValueError as error:  # as the shipped ones raise of an argument
        raise UserError(f"--config {location}: {error}") from error
    except (Exception, SystemExit) as error:  # the file is the user's and can raise anything
        raise UserError(f"--config {location}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config {name}: get_config() returns a {type(config).__name__}, not a ConfigDict"
        )
    return config


def _override(
    config: ConfigDict, free: Set[str], names: list[str], text: str | None, option: str
) -> None:
    """Sets one value of a config, or several if the text is a dict.

    Args:
      config: config to change.
      free: dotted names of the sections that accept new keys: those that are empty or None.
      names: path of the key: names of its sections, then its own.
      text: value as text; None if the option has no "=".
      option: option as typed, for error messages.
    """
    node, key = _locate(config, free, names, option)
    now = node.get(key)
    if text is None and not isinstance(now, bool):
        raise UserError(f"{option}: the value is missing; write {option}=VALUE")
    value = True if text is None else _parse(text, now, option)
    if not isinstance(value, dict):
        node[key] = value
    elif isinstance(now, ConfigDict) and ("name" in now or "net" in value):
        # A section's valid keys depend on its name or net, so it is replaced whole.
        if not all(isinstance(part, str) and part.isidentifier() for part in value):
            raise UserError(f"{option}: expected keys that are identifiers, not {list(value)}")
        node[key] = ConfigDict(value)
    else:
        for part, of in value.items():
            _override(config, free, [*names, str(part)], str(of), f"{option}.{part}")


def _locate(
    config: ConfigDict, free: Set[str], names: list[str], option: str
) -> tuple[ConfigDict, str]:
    """Returns the section of a key, and the key; makes sections of those that are None."""
    node, where = config, ""
    for name in names[:-1]:
        if where in free:
            raise UserError(f"{option}: a key of config.{where} cannot contain a dot")
        _require_key(node, name, where, option)
        where = f"{where}.{name}".removeprefix(".")
        if where in free and node[name] is None:
            node[name] = ConfigDict()
        node = node[name]
        if not isinstance(node, ConfigDict):
            raise UserError(
                f"{option}: config.{where} is {node!r}, which has no keys; write "
                f"--config.{where}=VALUE"
            )
    if where not in free:
        _require_key(node, names[-1], where, option)
    elif not names[-1]:
        raise UserError(f"{option}: the key is missing; write {option}KEY=VALUE")
    return node, names[-1]


def _require_key(node: ConfigDict, key: str, where: str, option: str) -> None:
    """Raises a UserError that suggests the nearest key if a section lacks the key."""
    if key in node:
        return
    section = f"--config.{where}" if where else "--config"
    near = difflib.get_close_matches(key, map(str, node), n=1)
    hint = (
        f"did you mean {section}.{near[0]}?"
        if near
        else f"the keys are {', '.join(map(str, node))}"
    )
    if where and "name" in node:
        hint += f"; to change the name, set the whole section: {section}=\"{{'name': ..., ...}}\""
    raise UserError(f"{option}: there is no such key; {hint}")


def _parse(text: str, now: Any, option: str) -> Any:
    """Parses a text to the type of the value it replaces, or "None" to None.

    Raises:
      UserError: the text is of another type.
    """
    if isinstance(now, str):
        return text
    value = _literal(text)
    if value is None or now is None:
        return value
    if isinstance(now, bool):
        value, expected = _BOOLEANS.get(text.lower()), "true or false"
    elif isinstance(now, int):
        value, expected = value if type(value) is int else None, "a whole number"
    elif isinstance(now, float):
        value, expected = _finite(value), "a number"
    elif isinstance(now, ConfigDict):
        value, expected = (
            value if isinstance(value, dict) else None,
            "a dict such as {'key': value}",
        )
    elif isinstance(now, tuple | list):
        value, expected = _sequence(value, text, now), f"values such as {now or (1, 2)}"
    if value is None:
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        raise UserError(f"{option}: expected {expected}, not {shown!r}")
    return value


def _literal(text: str) -> Any:
    """Evaluates a Python literal; returns other text unchanged."""
    try:
        return ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return text


def _finite(value: Any) -> float | None:
    number = type(value) is float or (type(value) is int and abs(value) < 1e300)
    return float(value) if number and math.isfinite(value) else None


def _sequence(value: Any, text: str, now: Sequence[Any]) -> Sequence[Any] | None:
    """Converts a value to a sequence of the type of `now`; None if element types differ."""
    if value is text:  # not a literal: words without quotes
        if _BRACKETS & set(text):
            return None
        value = [part.strip() for part in text.split(",")]
    elif not isinstance(value, tuple | list):
        value = [value]
    kinds = {type(element) for element in now}
    if kinds == {float}:
        value = [_finite(element) for element in value]
    same = len(kinds) != 1 or all(type(element) in kinds for element in value)
    return type(now)(value) if same else None


def _walk(config: ConfigDict, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted name and value of every section and key."""
    for key, value in config.items():
        yield f"{where}{key}", value
        if isinstance(value, ConfigDict):
            yield from _walk(value, f"{where}{key}.")


def _is_empty(value: Any) -> bool:
    return isinstance(value, ConfigDict) and not len(value)


def _expand_home(config: ConfigDict) -> None:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            _expand_home(value)
        elif isinstance(value, str):
            config[key] = path(value)
