"""The devices of a run: one axis, `data`, over which batches are split."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from uss_jax.audio.stft import BATCH_AXIS


def make_mesh(devices: Iterable[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices of all hosts, or those given."""
    # Host by host: jax.make_mesh may choose an order in which a host's rows are no block.
    devices = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
    return Mesh(np.array(devices), (BATCH_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of parameters: a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The sharding of batches: rows split over devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXIS))


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The global batch, of which this host gives its block of rows."""
    sharding = batch_sharded(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def on_all_devices(tree: Any, mesh: Mesh) -> Any:
    """A tree of host arrays copied whole to every device."""
    sharding = replicated(mesh)
    return jax.tree.map(lambda x: jax.device_put(x, sharding), tree)
