"""A suite of `uss-jax evaluate`: what its row in `SUITES` holds.

Rows are plain data, so that `--help` answers without a heavy import. A suite's work is the function
`run` of the module `uss_jax.evaluation.suites.<name>`, imported only when the suite runs.
"""

import dataclasses
import importlib
from typing import Any, Literal

Results = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Option:
    """A command-line option of a suite; a keyword argument of its `run`.

    Attributes:
      flag: name on the command line, such as "--out-dir".
      help: text for `--help`.
      kind: type of its value: any text, a path, an integer >= 0 (natural) or > 0 (positive), or
        several of the latter separated by commas (positives); a switch takes no value and is False
        by default.
      default: value if the option is not given.
      choices: allowed values; None allows all.
      metavar: placeholder of the value in `--help`; None for the flag's name.
      only_with: flag of another option without which this one would have no effect; then it is
        refused.
    """

    flag: str
    help: str
    kind: Literal["text", "path", "natural", "positive", "positives", "switch"] = "text"
    default: str | int | tuple[int, ...] | None = None
    choices: tuple[str, ...] | None = None
    metavar: str | None = None
    only_with: str | None = None

    @property
    def name(self) -> str:
        """Name of the keyword argument, such as "out_dir"."""
        return keyword(self.flag)


def keyword(flag: str) -> str:
    """Returns the name of an option in Python: "out_dir" for "--out-dir"."""
    return flag.removeprefix("--").replace("-", "_")


@dataclasses.dataclass(frozen=True)
class Published:
    """The published result of a data set, for `uss-jax compare`.

    The paper is Kong et al., arXiv:2305.07447 (abstract and tables), with conditions averaged over
    a training split; AudioSep, arXiv:2308.05037, evaluates on the same AudioSet pairs.

    Attributes:
      data_set: name of the data set, for the table.
      figure: key of the metric in result files.
      unit: metric and unit, for the table.
      paper, audiosep: published values; None where not reported.
      classes: number of classes averaged over; None where not compared.
      options: options that the suite needs to compute the published metric.
      data: placeholder of the folder in the command; None for one made from the suite's name.
    """

    data_set: str
    figure: str
    unit: str
    paper: float | None
    audiosep: float | None = None
    classes: int | None = None
    options: str = ""
    data: str | None = None


@dataclasses.dataclass(frozen=True)
class Suite:
    """A way to evaluate a model.

    Attributes:
      name: name on the command line, and of the module with `run`.
      help: text for `--help`, in one line.
      data: help of --data.
      options: options in addition to those that all suites have.
      example: a command for `--help`; empty for none.
      published: published result to compare with; None if there is none.
      detector_only: whether only the detector computes, always at `highest`.
    """

    name: str
    help: str
    data: str = "folder of the data set"
    options: tuple[Option, ...] = ()
    example: str = ""
    published: Published | None = None
    detector_only: bool = False

    def run(self, model: Any, data: str, out: str, **options: Any) -> tuple[Results, str]:
        """Evaluates a model.

        Args:
          model: the `Model`.
          data: value of --data.
          out: JSON file that the results will be written to; a suite may write others beside it.
          options: value of each of the suite's options, by `Option.name`.

        Returns:
          Results, among them `how`, the options' values; and the text to print.

        Raises:
          UserError: options exclude each other, or model or data are not usable.
        """
        module = importlib.import_module(f"uss_jax.evaluation.suites.{self.name}")
        return module.run(model, data, out, **options)
