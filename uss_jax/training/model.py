"""A bundle's nets, ready to be run on arrays.

Letters: `b` batch, `s` samples of a segment, `d` width of the condition.
"""

import functools
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from uss_jax.errors import UserError
from uss_jax.models.separator import separate
from uss_jax.models.tagging import as_detector
from uss_jax.precision import HIGHEST, at_precision, check_precision
from uss_jax.training.bundle import net_hash, read_bundle
from uss_jax.training.mesh import on_all_devices


@struct.dataclass
class Net:
    """A module with its variables; calling it runs it, compiled, in evaluation mode.

    Jitted functions take it as an argument.

    Attributes:
      module: the Flax module.
      variables: its parameters and statistics.
      precision: of its products and convolutions, see uss_jax/precision.py.
    """

    module: nn.Module = struct.field(pytree_node=False)
    variables: Any
    precision: str = struct.field(pytree_node=False, default=HIGHEST)

    def __call__(self, *arrays: Array | np.ndarray, method: str | None = None) -> Any:
        """Runs a method of the module, `__call__` if none is named."""
        return _apply(self, method, *arrays)

    def on(self, mesh: Mesh) -> "Net":
        """The net with its variables on every device."""
        return self.replace(variables=on_all_devices(self.variables, mesh))


@functools.partial(jax.jit, static_argnums=1)
def _apply(net: Net, method: str | None, *arrays: Array) -> Any:
    return at_precision(net.precision, net.module.apply)(net.variables, *arrays, method=method)


@jax.jit
def separate_with(
    net: Net, mixture: Float[Array, "b t"], condition: Float[Array, "b d"]
) -> Float[Array, "b t"]:
    """The estimates of a batch of one-channel mixtures."""
    estimate, _ = at_precision(net.precision, functools.partial(separate, net.module))(
        net.variables, mixture, condition
    )
    return estimate


class Model:
    """The nets of a bundle or training workdir, each read when first used.

    Attributes:
      path: where it is.
      precision: of the products of separator and query net; the detector's is always the highest.
      config: its config.
      sample_rate: in Hz.
      segment_samples: length of the segments it was trained on.
    """

    def __init__(self, path: str | os.PathLike, precision: str = HIGHEST):
        """Opens it.

        Args:
          path: where it is.
          precision: see uss_jax/precision.py. The highest gives the same figures on every device.

        Raises:
          UserError: there is neither a bundle nor a workdir, or no such precision.
        """
        self.path = os.fspath(path)
        self.precision = check_precision(precision, "precision")
        self._bundle = read_bundle(path)
        self.config = self._bundle.config
        self.sample_rate = int(self.config["sample_rate"])
        self._separator_on: dict[Mesh, Net] = {}
        self.segment_samples = round(self.config["segment_seconds"] * self.sample_rate)

    @functools.cached_property
    def separator(self) -> Net:
        """The separator: (mixture [b, 1, t], condition [b, d]) to the estimate."""
        module, variables = self._bundle.separator()
        if module.audio_channels != 1:
            raise UserError(
                f"{self.path} separates {module.audio_channels} channels at once; "
                "give a model with audio_channels=1"
            )
        return Net(module, jax.device_put(variables), self.precision)

    def separator_on(self, mesh: Mesh) -> Net:
        """The separator on every device, put there once: recordings come one by one."""
        if mesh not in self._separator_on:
            self._separator_on[mesh] = self.separator.on(mesh)
        return self._separator_on[mesh]

    @functools.cached_property
    def query(self) -> Net:
        """QueryNet: (waveform [b, s], class_index [b]) to the condition [b, d]."""
        module, variables = self._bundle.query()
        return Net(module, jax.device_put(variables), self.precision)

    @functools.cached_property
    def tagger(self) -> Net:
        """What tells which classes sound: waveform [b, t] to `clipwise` and `embedding`.

        The query net's tagging net; where conditions are `one_hot`, the detector.
        """
        if self.query.module.tagger is None:
            return self.sed
        parts = self.query.variables.items()
        variables = {k: v["tagger"] for k, v in parts if "tagger" in v}
        return Net(self.query.module.tagger, variables, self.precision)

    @functools.cached_property
    def sed(self) -> Net:
        """The detector, a tagging net: waveform [b, t] to `clipwise`, `framewise` and more."""
        module, variables = self._bundle.sed()
        return Net(as_detector(module), jax.device_put(variables), HIGHEST)

    @functools.cached_property
    def query_hash(self) -> str:
        """Identifies the query net: vectors of another one mean nothing to this separator."""
        return net_hash(self.query.variables)

    def condition(
        self, waveform: Float[np.ndarray, "b s"], class_index: Int[np.ndarray, "b"]
    ) -> Float[Array, "b d"]:
        """The conditions of clean targets and their classes."""
        return self.query(jnp.asarray(waveform), jnp.asarray(class_index))

    def adapt(self, vectors: Float[np.ndarray, "b _"]) -> Float[np.ndarray, "b d"]:
        """The conditions of vectors such as the tagging net gives: behind the adaptor, if any."""
        net = self.query
        adapt = at_precision(net.precision, net.module.apply)
        return np.asarray(adapt(net.variables, jnp.asarray(vectors), method="adapt"))

    def separate(
        self, mixture: Float[np.ndarray, "b t"], condition: Float[Array | np.ndarray, "b d"]
    ) -> Float[Array, "b t"]:
        """The estimates of a batch of one-channel mixtures."""
        return separate_with(self.separator, jnp.asarray(mixture), jnp.asarray(condition))
