"""The nets of a bundle, callable on arrays.

Letters: `b` batch, `t` samples, `s` samples of a segment, `k` classes, `w` width of a sentence
vector, `d` width of the condition.
"""

import functools
import hashlib
import json
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from uss_jax.bundles import nets
from uss_jax.bundles.bundle import MEANS, net_hash, read_bundle
from uss_jax.devices.mesh import on_all_devices
from uss_jax.devices.precision import HIGHEST, at_precision, check_precision
from uss_jax.models.separator import separate
from uss_jax.models.tagging import as_detector


@struct.dataclass
class Net:
    """A module with its variables; calling it runs it, jitted, in evaluation mode.

    It can be passed to jitted functions.

    Attributes:
      module: the Flax module.
      variables: its parameters and batch statistics.
      precision: precision of products and convolutions, see uss_jax/devices/precision.py.
    """

    module: nn.Module = struct.field(pytree_node=False)
    variables: Any
    precision: str = struct.field(pytree_node=False, default=HIGHEST)

    def __call__(self, *arrays: Array | np.ndarray, method: str | None = None) -> Any:
        """Runs a method of the module, by default `__call__`."""
        return _apply(self, method, *arrays)

    def on(self, mesh: Mesh) -> "Net":
        """Returns the net with its variables on every device."""
        return self.replace(variables=on_all_devices(self.variables, mesh))


@functools.partial(jax.jit, static_argnums=1)
def _apply(net: Net, method: str | None, *arrays: Array) -> Any:
    return at_precision(net.precision, net.module.apply)(net.variables, *arrays, method=method)


@jax.jit
def separate_with(
    net: Net, mixture: Float[Array, "b t"], condition: Float[Array, "b d"]
) -> Float[Array, "b t"]:
    """Separates a batch of mono mixtures."""
    run = at_precision(net.precision, functools.partial(separate, net.module))
    return run(net.variables, mixture, condition)


class Model:
    """The nets of a bundle or training workdir, each loaded on first use.

    Attributes:
      path: path of the bundle or workdir.
      precision: precision of separator and query net; the detector's is always "highest".
      config: content of config.json.
      sample_rate: sampling rate, in Hz.
      segment_samples: length of the training segments, in samples.
    """

    def __init__(
        self, path: str | os.PathLike, precision: str = HIGHEST, sample_rate: int | None = None
    ):
        """Reads the config.

        Args:
          path: path of the bundle or workdir, or the name of a bundle in the package.
          precision: see devices/precision.py; "highest" gives the same metrics on every device.
          sample_rate: rate of the waveforms, in Hz, if all nets can resample; else theirs is kept.

        Raises:
          UserError: the path is neither a bundle nor a workdir, or the precision is unknown.
        """
        self.path, self._given = os.fspath(path), path  # only text can name one of the package
        self.precision = check_precision(precision, "precision")
        self._bundle = read_bundle(path)
        if sample_rate is not None:
            self._bundle = self._bundle.at_sample_rate(sample_rate)
        self.config = self._bundle.config
        self.sample_rate = int(self.config["sample_rate"])
        self._separator_on: dict[Mesh, Net] = {}
        self.segment_samples = round(self.config["segment_seconds"] * self.sample_rate)

    def at_sample_rate(self, sample_rate: int) -> "Model":
        """Returns the model for waveforms at this rate; itself if that is its own or only rate."""
        if sample_rate == self.sample_rate:
            return self
        other = Model(self._given, self.precision, sample_rate)
        return other if other.sample_rate == sample_rate else self

    @functools.cached_property
    def separator(self) -> Net:
        """Separator: maps mixture [b, a, t] and condition [b, d] to the estimate [b, a, t]."""
        module, variables = self._bundle.separator()
        return Net(module, jax.device_put(variables), self.precision)

    def separator_on(self, mesh: Mesh) -> Net:
        """Returns the separator on every device, cached for the recordings that follow."""
        if mesh not in self._separator_on:
            self._separator_on[mesh] = self.separator.on(mesh)
        return self._separator_on[mesh]

    @functools.cached_property
    def query(self) -> Net:
        """QueryNet: maps waveform [b, s] and class_index [b] to the condition [b, d]."""
        module, variables = self._bundle.query()
        return Net(module, jax.device_put(variables), self.precision)

    @functools.cached_property
    def tagger(self) -> Net:
        """Tagging net: maps waveform [b, t] to `clipwise` and `embedding`.

        The query net's; if conditions are computed without one, the detector.
        """
        if self.query.module.tagger is None:
            return self.sed
        parts = self.query.variables.items()
        variables = {k: v["tagger"] for k, v in parts if "tagger" in v}
        return Net(self.query.module.tagger, variables, self.precision)

    @functools.cached_property
    def sed(self) -> Net:
        """Detector, a tagging net: maps waveform [b, t] to `clipwise`, `framewise` and more."""
        module, variables = self._bundle.sed()
        return Net(as_detector(module), jax.device_put(variables), HIGHEST)

    @functools.cached_property
    def query_hash(self) -> str:
        """Hash of the query net; vectors of another one are meaningless to this separator."""
        return net_hash(self.query.variables)

    @functools.cached_property
    def digest(self) -> str:
        """Hash of what separations depend on: the nets that are called, with their fields.

        A detector whose tags are asked for is not among them.
        """
        words = [self.precision, net_hash(self.separator.variables), self.query_hash]
        about = nets.completed({part: self.config[part] for part in ("separator", "query")})
        words += [about["separator"], about["query"], self.sample_rate, self.segment_samples]
        if self.means is not None:
            words.append(net_hash({MEANS: self.means}))
        return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()

    def condition(
        self, waveform: Float[np.ndarray, "b s"], class_index: Int[np.ndarray, "b"]
    ) -> Float[Array, "b d"]:
        """Returns the conditions of clean targets and their classes."""
        return self.query(jnp.asarray(waveform), jnp.asarray(class_index))

    def adapt(self, vectors: Float[np.ndarray, "b _"]) -> Float[np.ndarray, "b d"]:
        """Maps outputs of the tagging net to conditions, through the adaptor if there is one."""
        return self._asked("adapt", vectors)

    def of_classes(self, sets: Float[np.ndarray, "b k"]) -> Float[np.ndarray, "b d"]:
        """Returns the conditions of sets of classes, for kinds that classes are conditions of."""
        return self._asked("of_classes", sets)

    def of_texts(self, vectors: Float[np.ndarray, "b w"]) -> Float[np.ndarray, "b d"]:
        """Returns the conditions of sentence vectors, for kinds that take texts."""
        return self._asked("of_texts", vectors)

    def of_probabilities(self, heard: Float[np.ndarray, "b k"]) -> Float[np.ndarray, "b d"]:
        """Returns the conditions of classes that are heard, for kinds made of probabilities.

        `heard` are the probabilities of the classes that are asked for, 0 elsewhere. A class that
        the model has a mean of is asked for with that.
        """
        if self.means is None:
            return self.adapt(heard)
        return self._asked("of_probabilities", heard, self.means)

    @functools.cached_property
    def means(self) -> Float[np.ndarray, "k k"] | None:
        """The mean probabilities of each class's training recordings, see `Bundle.means`."""
        return self._bundle.means()

    def _asked(self, method: str, *rows: np.ndarray) -> Float[np.ndarray, "b d"]:
        """Runs a method of the query net."""
        run = at_precision(self.query.precision, self.query.module.apply)
        return np.asarray(run(self.query.variables, *map(jnp.asarray, rows), method=method))

    def separate(
        self, mixture: Float[np.ndarray, "b t"], condition: Float[Array | np.ndarray, "b d"]
    ) -> Float[Array, "b t"]:
        """Separates a batch of mono mixtures."""
        return separate_with(self.separator, jnp.asarray(mixture), jnp.asarray(condition))
