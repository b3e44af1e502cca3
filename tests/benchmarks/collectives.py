"""What devices tell each other in a training step: `python -m tests.benchmarks.collectives`.

The published separator's step, float32, global batch 16 of 2 s, compiled for 1, 2, 4 and 8 forced
CPU devices and not run: their speed would say nothing of a pod's. Bytes are those of the reduced
arrays; in a ring each device sends and receives 2 (n - 1) / n times as many. Frozen nets tell
nothing.
"""

import re
import time

import jax
import jax.numpy as jnp
import numpy as np

from uss_jax.bundles.nets import layout
from uss_jax.devices.mesh import batch_sharded, make_mesh, replicated
from uss_jax.models.query import QueryNet
from uss_jax.models.resunet import ResUNet
from uss_jax.training.examples import Mixing
from uss_jax.training.losses import LOSSES
from uss_jax.training.optim import adamw_amsgrad
from uss_jax.training.separation_step import Anchoring, Nets, make_separation_step
from uss_jax.training.state import create_state

BATCH, RATE, CLIP_SECONDS, SEGMENT_SECONDS = 16, 32000, 10, 2
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# All programs are compiled to be read, not to be fast.
QUICKLY = {"xla_backend_optimization_level": 0}
_SHAPE = re.compile(r"\b(?:f|s|u|bf)(8|16|32|64)\[([\d,]*)\]")


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Kind -> number and bytes of the results, of a compiled program's text."""
    found = {}
    for kind in KINDS:
        results = re.findall(rf"= (\S.*?) {kind}(?:-start)?\(", text)
        shapes = [shape for result in results for shape in _SHAPE.findall(result)]
        count = sum(
            int(bits) // 8 * int(np.prod([int(n) for n in sizes.split(",") if n]))
            for bits, sizes in shapes
        )
        if results:
            found[kind] = (len(results), count)
    return found


def compile_step(devices: int) -> str:
    """The text of the step, compiled for so many devices."""
    separator, optimizer = ResUNet(condition_width=527), adamw_amsgrad(1e-3)
    step = make_separation_step(
        Nets(separator, QueryNet(None, "one_hot")),
        optimizer,
        LOSSES["l1_wav"],
        Anchoring(SEGMENT_SECONDS * RATE, min_dbfs=-60.0),
        Mixing(sources=2, group_size=BATCH, match_energy=True),
    )
    variables = layout(separator)
    parts = ({"separator": variables[name], "query": {}} for name in ("params", "batch_stats"))
    state = jax.eval_shape(lambda *trees: create_state(*trees, optimizer), *parts)
    mesh = make_mesh(jax.devices()[:devices])
    place = lambda tree, sharding: jax.tree.map(  # noqa: E731
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )
    batch = {
        "audio": jax.ShapeDtypeStruct((BATCH, CLIP_SECONDS * RATE), jnp.int16),
        "samples": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
        "class_index": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    whole = replicated(mesh)
    with jax.set_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=0).lower(
            place(state, whole), {}, place(batch, batch_sharded(mesh)), place(key, whole)
        )
    return lowered.compile(compiler_options=QUICKLY).as_text()


def main() -> None:
    print("| devices | collectives of a step | MB reduced | MB a device sends in a ring |")
    print("| --- | --- | --- | --- |")
    for devices in (1, 2, 4, 8):
        began = time.monotonic()
        found = collectives(compile_step(devices))
        count = sum(size for _, size in found.values())
        kinds = ", ".join(f"{number} {kind}" for kind, (number, _) in found.items()) or "none"
        sent = 2 * (devices - 1) / devices * count
        print(
            f"| {devices} | {kinds} | {count / 1e6:.1f} | {sent / 1e6:.1f} |"
            f"  (compiled in {time.monotonic() - began:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
