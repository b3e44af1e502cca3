"""Device mesh of a run: one axis, `data`, that shards batches and, by rules, state arrays."""

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from uss_jax.errors import UserError

# Name of the mesh axis.
BATCH_AXIS = "data"
# Each device holds its own copy of the nets, half a gigabyte for the published ones.
_MOST_CPU_DEVICES = 8


def make_mesh(devices: Iterable[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of the given devices, by default all devices of all hosts."""
    # Sorted by host: with the order of jax.make_mesh, a host's rows may not be contiguous.
    devices = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
    return Mesh(np.array(devices), (BATCH_AXIS,), axis_types=(AxisType.Auto,))


def one_device_per_core() -> None:
    """Makes each CPU core one JAX device, up to 8, unless the user has set their number.

    Separating two items on one core each is up to 1.3 times as fast as one after the other on both
    cores. No effect with accelerators, or after JAX has initialised its devices.
    """
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if chosen or jax.config.jax_num_cpu_devices != -1:
        return
    cores = min(len(os.sched_getaffinity(0)), _MOST_CPU_DEVICES)
    with contextlib.suppress(RuntimeError):  # JAX is already initialised
        jax.config.update("jax_num_cpu_devices", cores)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that puts a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of batches: rows split over devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXIS))


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns the global batch, to which this host contributes its block of rows."""
    sharding = batch_sharded(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def on_all_devices(tree: Any, mesh: Mesh) -> Any:
    """Replicates a tree of arrays, the same on every host, to all devices of all hosts."""
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
    """Shards along the largest axis divisible by the device count; replicates if there is none."""
    axes = [axis for axis, size in enumerate(shape) if size and size % devices == 0]
    if not axes:
        return PartitionSpec()
    split = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*(BATCH_AXIS if axis == split else None for axis in range(split + 1)))


# Maps shape and number of devices to a partition.
TACTICS: dict[str, Callable[[Sequence[int], int], PartitionSpec]] = {
    "replicate": _whole,
    "fsdp": _largest_axis,
}


def check_rules(rules: Sequence[Any]) -> None:
    """Raises a UserError for a rule that is not a pair of a regular expression and a tactic."""
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
    """Returns the sharding of each array of a state.

    Args:
      state: arrays or their shapes.
      rules: pairs (regular expression, tactic); the first that matches in an array's name counts.
        A name is, for example, `params/separator/centre_block/conv_block1/conv1/kernel`; moments
        of the parameter are under `opt_state/...`, its moving average under `ema`. Arrays that no
        rule matches are replicated.
      mesh: mesh of the devices.
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        tactics = [tactic for pattern, tactic in rules if re.search(pattern, _name(path))]
        return NamedSharding(mesh, TACTICS[(tactics or ["replicate"])[0]](leaf.shape, mesh.size))

    return jax.tree_util.tree_map_with_path(sharding, state)


def idle_rules(state: Any, rules: Sequence[tuple[str, str]]) -> list[str]:
    """Returns the regular expressions of rules that match no array of a state."""
    names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    return [pattern for pattern, _ in rules if not any(re.search(pattern, name) for name in names)]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shapes(
    make: Callable[..., Any], *arguments: Any, rules: Sequence[tuple[str, str]], mesh: Mesh
) -> Any:
    """Returns the shapes of a pure function's results, with shardings by rules."""
    made = jax.eval_shape(make, *arguments)
    return jax.tree.map(laid_out, made, state_shardings(made, rules, mesh))


def laid_out(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of an array, with a sharding."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def create(make: Callable[..., Any], *arguments: Any, like: Any) -> Any:
    """Returns the results of a pure function; each device computes only its own part.

    Args:
      make: function of arrays.
      *arguments: its arguments, the same on every host.
      like: its results as returned by `shapes`.
    """
    # A hundred random draws that run only once: with optimisation they take ten times as long.
    quickly = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    shardings = jax.tree.map(lambda x: x.sharding, like)
    return jax.jit(make, out_shardings=shardings, compiler_options=quickly)(*arguments)


def lay_out(state: Any, rules: Sequence[tuple[str, str]], mesh: Mesh) -> Any:
    """Shards a tree over the devices by rules; every host must hold the whole tree."""

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])

    return jax.tree.map(put, state, state_shardings(state, rules, mesh))
