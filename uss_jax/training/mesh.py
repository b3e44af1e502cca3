"""The devices of a run: one axis, `data`, over which batches and, by rules, arrays are split."""

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from uss_jax.audio.stft import BATCH_AXIS
from uss_jax.errors import UserError

# Each holds its own copy of the nets, half a gigabyte for the published ones.
_MOST_CPU_DEVICES = 8


def make_mesh(devices: Iterable[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices of all hosts, or those given."""
    # Host by host: jax.make_mesh may choose an order in which a host's rows are no block.
    devices = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
    return Mesh(np.array(devices), (BATCH_AXIS,), axis_types=(AxisType.Auto,))


def one_device_per_core() -> None:
    """Lets a CPU be as many devices as it has cores, 8 at most, unless somebody has chosen.

    Two items on a core each are separated up to 1.3 times as fast as one after the other on both.
    Without effect where there are accelerators, or once JAX has looked for devices.
    """
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if chosen or jax.config.jax_num_cpu_devices != -1:
        return
    cores = min(len(os.sched_getaffinity(0)), _MOST_CPU_DEVICES)
    with contextlib.suppress(RuntimeError):  # too late
        jax.config.update("jax_num_cpu_devices", cores)


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
    """A tree of arrays, the same on every host, copied whole to every device of all hosts."""
    sharding = replicated(mesh)

    def put(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                put(jax.random.key_data(x)), impl=jax.random.key_impl(x)
            )
        x = np.asarray(x)
        return jax.make_array_from_process_local_data(sharding, x, x.shape)

    return jax.tree.map(put, tree)


def _whole(shape: Sequence[int], devices: int) -> PartitionSpec:
    return PartitionSpec()


def _largest_axis(shape: Sequence[int], devices: int) -> PartitionSpec:
    """Split along the largest axis that can be; arrays without one stay whole."""
    axes = [axis for axis, size in enumerate(shape) if size and size % devices == 0]
    if not axes:
        return PartitionSpec()
    split = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*(BATCH_AXIS if axis == split else None for axis in range(split + 1)))


# How a rule lays an array out.
TACTICS: dict[str, Callable[[Sequence[int], int], PartitionSpec]] = {
    "replicate": _whole,
    "fsdp": _largest_axis,
}


def check_rules(rules: Sequence[Any]) -> None:
    """Raises a UserError for a rule that is no pair of a regular expression and a tactic."""
    for rule in rules:
        try:
            pattern, tactic = rule
            re.compile(pattern)
            TACTICS[tactic]
        except (ValueError, TypeError, KeyError, re.error) as error:
            raise UserError(
                f"config.sharding has the rule {rule!r}, expected (regular expression, "
                f"{' or '.join(TACTICS)})"
            ) from error


def state_shardings(state: Any, rules: Sequence[tuple[str, str]], mesh: Mesh) -> Any:
    """How each array of a state is laid out over the devices.

    Args:
      state: arrays or their shapes.
      rules: (regular expression, tactic): the first found in an array's name counts, such as
        `params/separator/centre_block/conv_block1/conv1/kernel`; the same parameter's moments are
        under `opt_state/...`, its average under `ema`. Arrays without a rule are replicated.
      mesh: the devices.
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        tactics = [tactic for pattern, tactic in rules if re.search(pattern, name)]
        return NamedSharding(mesh, TACTICS[(tactics or ["replicate"])[0]](leaf.shape, mesh.size))

    return jax.tree_util.tree_map_with_path(sharding, state)


def shapes(
    make: Callable[..., Any], *arguments: Any, rules: Sequence[tuple[str, str]], mesh: Mesh
) -> Any:
    """What a pure function of arrays will make: shapes, laid out over the devices by rules."""
    made = jax.eval_shape(make, *arguments)
    return jax.tree.map(laid_out, made, state_shardings(made, rules, mesh))


def laid_out(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """The shape of an array that lies so over the devices."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def create(make: Callable[..., Any], *arguments: Any, like: Any) -> Any:
    """What a pure function of arrays makes; no device makes more than its own part.

    Args:
      make: the function.
      *arguments: of it, the same on every host.
      like: its `shapes`.
    """
    # A hundred random draws that run once: optimising them takes ten times as long.
    quickly = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    shardings = jax.tree.map(lambda x: x.sharding, like)
    return jax.jit(make, out_shardings=shardings, compiler_options=quickly)(*arguments)


def lay_out(state: Any, rules: Sequence[tuple[str, str]], mesh: Mesh) -> Any:
    """A tree of which every host has the whole, laid out over the devices by rules."""

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])

    return jax.tree.map(put, state, state_shardings(state, rules, mesh))
