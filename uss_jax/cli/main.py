"""`uss-jax COMMAND`: finds the command's module and turns user errors into one sentence."""

import argparse
import contextlib
import errno
import importlib
import io
import os
import sys
from typing import NoReturn

import uss_jax
from uss_jax.cli.compiling import long_compilations_reported
from uss_jax.cli.interrupt import end_on_interrupt
from uss_jax.devices.cpu import tune_for_cpu
from uss_jax.devices.memory import exhausted, is_exhausted
from uss_jax.disk.atomic import full, is_full
from uss_jax.disk.leaving import leave
from uss_jax.errors import NotHeard, Stopped, UserError, one_line, tell

# command -> what it does; its module is uss_jax.cli.<command with "_" for "-">.
COMMANDS = {
    "prepare": "convert audio files and labels to TFRecord shards and an index",
    "index": "index and verify a directory of TFRecords",
    "train-tagger": "train a tagging and sound event detection net on weak labels",
    "mine": "find the anchors of every clip once, for training",
    "captions": "encode the captions of clips, for training with texts",
    "train": "train a separator; the same command resumes",
    "make-pairs": "build evaluation pairs (mixture, source) from records",
    "evaluate": "compute the metrics of a model on a data set",
    "compare": "compare results with the published ones",
    "tag": "tell which classes sound when in recordings",
    "separate": "separate recordings",
    "query": "make and list banks of stored queries",
    "convert": "convert PANNs, HTS-AT and bytedance/uss checkpoints to bundles, and back",
    "export": "export a separator as orbax, safetensors or StableHLO",
    "inspect": "describe a model, records, mined anchors or conditions, or a query bank",
}
_COMPILING = {"train-tagger", "mine", "train", "make-pairs", "evaluate", "separate", "query"}
_COMPILING |= {"export", "tag", "captions"}
_WITH_CONFIG = {"train-tagger", "train"}
# command -> how it needs less memory on a device.
_LESS_MEMORY = {
    "train": "set config.accumulate higher, config.remat=True or config.separator.dtype=bfloat16",
    "train-tagger": "start a new run with a smaller config.global_batch",
    "mine": "give a smaller --batch",
}


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """Returns the parser of one command, or of the overview when None or unknown.

    Only that command's module is imported, to keep `--help` fast.
    """
    if command not in COMMANDS:
        parser = argparse.ArgumentParser(
            prog="uss-jax",
            description=uss_jax.__doc__,
            epilog="commands:\n"
            + "\n".join(f"  {name:<14}{text}" for name, text in COMMANDS.items())
            + "\n\n`uss-jax COMMAND --help` describes a command, with an example.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--version", action="version", version=f"uss-jax {uss_jax.__version__}")
        parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below")
        return parser
    module = importlib.import_module(f"uss_jax.cli.{command.replace('-', '_')}")
    parser = argparse.ArgumentParser(
        prog=f"uss-jax {command}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    0 is success, 1 an error whose message says how to fix it, 2 wrong arguments (SystemExit), 3 a
    queried class that is not heard, 130 Ctrl-C, 141 a broken pipe, 143 SIGTERM, after which a run
    has saved its state.

    Args:
      argv: arguments after `uss-jax`; those of the process when None.
    """
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv and argv[0] in COMMANDS else None
    try:
        parser = build_parser(command)
        if command is None:
            parser.parse_args(argv)
        words, overrides = argv[1:], []
        if command in _WITH_CONFIG:  # parsed later, against the types in the config
            overrides = [word for word in words if word.startswith("--config.")]
        args = parser.parse_args([word for word in words if word not in overrides])
        args.config_overrides = overrides
        tune_for_cpu()
        _print_any_name()
        with long_compilations_reported() if command in _COMPILING else contextlib.nullcontext():
            args.run(args)
        sys.stdout.flush()
    except UserError as error:
        tell(one_line(str(error)))
        return 1
    except NotHeard as error:
        tell(one_line(str(error)))
        return 3
    except Stopped as stopped:
        tell(str(stopped))
        return 143
    except KeyboardInterrupt:
        tell("interrupted")
        return 130
    except BrokenPipeError:  # `uss-jax ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except RuntimeError as error:
        if not is_exhausted(error):
            raise
        remedy = _LESS_MEMORY.get(command, "take another one (JAX_PLATFORMS=cpu: the host)")
        tell(one_line(exhausted(f"{remedy} ({str(error).splitlines()[0]})")))
        return 1
    except OSError as error:
        if is_full(error):
            said = full(error.filename)
        elif error.errno == errno.ENAMETOOLONG:
            said = f"{str(error.filename)[:60]}... is too long for a file name; give a shorter one"
        else:
            raise
        tell(one_line(said))
        return 1
    return 0


def command() -> NoReturn:
    """Runs one command as the process's entry point."""
    end_on_interrupt()
    status = main()
    if status == 130:
        leave(status)
    sys.exit(status)


def _print_any_name() -> None:
    """Makes standard output escape characters that its encoding lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    command()
