"""Reading `--config FILE[:ARGUMENT] --config.key=value`. The only user of absl flags."""

import argparse
import difflib
import pathlib
import runpy

from ml_collections import ConfigDict

from uss_jax.errors import UserError


def add_config_arguments(
    parser: argparse.ArgumentParser, example: str, *, workdir_required: bool = True
) -> None:
    """Adds the arguments every training command has; `example` is one to show."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARGUMENT]",
        help="a Python file with get_config(); any leaf can be set with --config.key=value",
    )
    parser.add_argument(
        "--workdir", required=workdir_required, help="where the run lives; resumes if it does"
    )
    hosts = parser.add_argument_group(
        "several hosts",
        "The same command runs on each. TPU pods, SLURM job steps and the environment variables "
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID need no words; elsewhere:",
    )
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    hosts.add_argument("--processes", type=int, metavar="N", help="how many there are")
    hosts.add_argument("--process", type=int, metavar="I", help="number of this one, from 0")
    parser.epilog = (
        f"example:\n  {example}\n\nexit status: 0 done, 1 an error that is said, 143 stopped by "
        "SIGTERM after saving (the same command resumes)"
    )


def load_config(location: str, overrides: list[str]) -> ConfigDict:
    """The config of a file, with leaves overridden.

    Args:
      location: path of a config file, with `:argument` for its get_config if it takes one.
      overrides: `--config.key=value` words.

    Raises:
      UserError: no such file, an argument it does not know, or a misspelt key.
    """
    from absl import flags
    from ml_collections import config_flags

    config = _get_config(location)
    for word in overrides:
        _check_key(config, word)
    words = ["uss-jax", *overrides]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=words)
    try:
        values(words)
    except (flags.Error, ValueError, TypeError) as error:
        raise UserError(f"--config {location}: {error}") from error
    return holder.value


def _get_config(location: str) -> ConfigDict:
    path, _, argument = location.partition(":")
    if not pathlib.Path(path).is_file():
        raise UserError(f"--config {path}: there is no such file")
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise UserError(f"--config {path}: it has no get_config()")
        config = get_config(argument) if argument else get_config()
    except UserError:
        raise
    except Exception as error:  # whatever a config file may do wrong is the user's to mend
        raise UserError(f"--config {location}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config {path}: get_config() gives a {type(config).__name__}, expected a ConfigDict"
        )
    return config


def _check_key(config: ConfigDict, word: str) -> None:
    """Raises a UserError that offers the nearest key where an override names none."""
    dotted = word.split("=")[0].removeprefix("--config.")
    node, walked = config, ""
    for key in dotted.split("."):
        known = list(node.keys()) if isinstance(node, ConfigDict) else []
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            if near:
                hint = f"did you mean --config.{walked}{near[0]}?"
            else:
                hint = f"there are {', '.join(known)}" if known else "that is a leaf already"
            raise UserError(f"--config.{dotted}: there is no such key; {hint}")
        node, walked = node[key], f"{walked}{key}."
