"""A bundle's nets, ready to be run on arrays.

Letters: `b` batch, `s` samples of a segment, `d` width of the condition.
"""

import dataclasses
import functools
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from uss_jax.errors import UserError
from uss_jax.training.bundle import net_hash, read_bundle
from uss_jax.training.mesh import on_all_devices


@dataclasses.dataclass(frozen=True)
class Net:
    """A module with its variables; calling it runs it, compiled, in evaluation mode."""

    module: nn.Module
    variables: Any

    def __call__(self, *arrays: Array | np.ndarray) -> Any:
        return _apply(self.module, self.variables, *arrays)

    def on(self, mesh: Mesh) -> "Net":
        """The net with its variables on every device."""
        return Net(self.module, on_all_devices(self.variables, mesh))


@functools.partial(jax.jit, static_argnums=0)
def _apply(module: nn.Module, variables: Any, *arrays: Array) -> Any:
    return module.apply(variables, *arrays)


class Model:
    """The nets of a bundle or training workdir, each read when first used.

    Attributes:
      path: where it is.
      config: its config.
      sample_rate: in Hz.
      segment_samples: length of the segments it was trained on.
    """

    def __init__(self, path: str | os.PathLike):
        """Opens it; a UserError when there is neither a bundle nor a workdir."""
        self.path = os.fspath(path)
        self._bundle = read_bundle(path)
        self.config = self._bundle.config
        self.sample_rate = int(self.config["sample_rate"])
        self._separator_on: dict[Mesh, Net] = {}
        self.segment_samples = round(self.config["segment_seconds"] * self.sample_rate)

    @functools.cached_property
    def separator(self) -> Net:
        """ResUNet: (mixture [b, 1, t], condition [b, d]) to the estimate."""
        module, variables = self._bundle.separator()
        if module.audio_channels != 1:
            raise UserError(
                f"{self.path} separates {module.audio_channels} channels at once; "
                "give a model with audio_channels=1"
            )
        return Net(module, jax.device_put(variables))

    def separator_on(self, mesh: Mesh) -> Net:
        """The separator on every device, put there once: recordings come one by one."""
        if mesh not in self._separator_on:
            self._separator_on[mesh] = self.separator.on(mesh)
        return self._separator_on[mesh]

    @functools.cached_property
    def query(self) -> Net:
        """QueryNet: (waveform [b, s], class_index [b]) to the condition [b, d]."""
        module, variables = self._bundle.query()
        return Net(module, jax.device_put(variables))

    @functools.cached_property
    def tagger(self) -> Net:
        """What tells which classes sound: waveform [b, t] to `clipwise` and `embedding`.

        The query net's tagging net; where conditions are `one_hot`, the detector.
        """
        if self.query.module.tagger is None:
            return self.sed
        parts = self.query.variables.items()
        return Net(self.query.module.tagger, {k: v["tagger"] for k, v in parts if "tagger" in v})

    @functools.cached_property
    def sed(self) -> Net:
        """The detector, a tagging net: waveform [b, t] to `clipwise`, `framewise` and more."""
        module, variables = self._bundle.sed()
        return Net(module, jax.device_put(variables))

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
        return np.asarray(net.module.apply(net.variables, jnp.asarray(vectors), method="adapt"))

    def separate(
        self, mixture: Float[np.ndarray, "b t"], condition: Float[Array | np.ndarray, "b d"]
    ) -> Float[Array, "b t"]:
        """The estimates of a batch of one-channel mixtures."""
        return self.separator(jnp.asarray(mixture)[:, None], jnp.asarray(condition))[:, 0]
