"""Other forms of a model: orbax (whole or sharded), safetensors, StableHLO.

Each is written beside its place, read back, run on noise and held to the live model, and only then
takes its place. Each carries the model's config with its licence, and how to load it.

Letters: `b` batch, `t` samples of a window, `d` width of the condition.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

from uss_jax.atomic import replacing_folder
from uss_jax.errors import UserError
from uss_jax.models.query import KINDS, QueryNet
from uss_jax.models.separator import SeparatorNet, separate
from uss_jax.precision import HIGHEST, at_precision, check_precision
from uss_jax.training.bundle import (
    Bundle,
    Variables,
    net_hash,
    read_bundle,
    read_tensors,
    write_bundle,
    write_tensors,
)
from uss_jax.training.checkpoints import latest_step, save_tree
from uss_jax.training.mesh import lay_out, make_mesh

FORMATS = ("orbax", "safetensors", "stablehlo")
DTYPES = ("float32", "bfloat16")
# Of the largest sample: what another order of float32 sums leaves.
_TOLERANCE = 1e-4
_PARTS = ("separator", "query", "adaptor", "sed")
_ROWS = 2

_LOAD = {
    "orbax": """A bundle: `uss-jax separate --model` and all other commands take it. Without them,
`orbax.checkpoint.StandardCheckpointer().restore(absolute_path_of_a_part)` reads a part.
""",
    "safetensors": """`safetensors.numpy.load_file("model.safetensors")`; names are
part/collection/layer/.../leaf, convolutions are HWIO, dense layers (in, out).
""",
    "stablehlo": """    import jax
    read = lambda name: jax.export.deserialize(bytearray(open(name, "rb").read()))
    separated = read("separate.stablehlo").call(mixture, condition)

mixture [b, {samples}] float32 at {rate} Hz, condition [b, {width}] float32, any b; needs jax alone.
Products and convolutions of float32 arrays have the precision `{precision}`.
{condition}""",
}
_CONDITION = {
    False: "The condition is 1 for the class asked for and 0 elsewhere.",
    True: '`read("condition.stablehlo").call(recording)` makes conditions of recordings of the '
    "sound asked for, [b, {samples}].",
}

# Runs an exported function in a bare process.
_RUN = """
import sys, numpy, jax
inputs = numpy.load(sys.argv[2])
exported = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
numpy.save(sys.argv[3], exported.call(*(inputs[name] for name in sorted(inputs.files))))
assert not [name for name in sys.modules if name.split(".")[0] in ("uss_jax", "flax")]
"""


def export(
    bundle: Bundle,
    form: str,
    out: str | os.PathLike,
    *,
    dtype: str = DTYPES[0],
    shards: int = 1,
    window_seconds: float | None = None,
    precision: str = HIGHEST,
) -> str:
    """Writes another form of a model; the folder appears whole, and only if it runs as the model.

    Args:
      bundle: a separator's.
      form: one of FORMATS.
      out: a folder that does not exist yet.
      dtype: of stored parameters; batch statistics stay float32.
      shards: for orbax: pieces over which every large array is divided, as on so many devices.
      window_seconds: for stablehlo: length of a window; that of a segment when None.
      precision: for stablehlo: of the function's products, see uss_jax/precision.py. Other forms
        hold no products.

    Returns:
      What was checked, for people.
    """
    out = pathlib.Path(out)
    if out.exists():
        raise UserError(f"{out} exists already; choose another name or remove it first")
    if form == "stablehlo":
        _require_flatbuffers()
        if dtype != DTYPES[0]:
            raise UserError("stablehlo holds the function as it runs; give no --dtype")
    elif precision != HIGHEST:
        raise UserError(f"{form} holds parameters and no products; give no --precision")
    check_precision(precision, "precision")
    separator, _ = bundle.separator()
    parts = {p: bundle.variables(p) for p in _PARTS if _has(bundle, p)}
    parts = {p: _cast(variables, dtype) for p, variables in parts.items()}
    window = round((window_seconds or bundle.config["segment_seconds"]) * _rate(bundle))
    inputs = _inputs(separator, window)
    live = _live(separator, parts["separator"], inputs)

    with replacing_folder(out) as unfinished:
        writers: dict[str, Callable[[], Float[np.ndarray, "b t"]]] = {
            "orbax": lambda: _orbax(bundle, parts, unfinished, shards, inputs),
            "safetensors": lambda: _safetensors(separator, parts, unfinished, inputs),
            "stablehlo": lambda: _stablehlo(bundle, parts, unfinished, window, inputs, precision),
        }
        if form != "orbax":
            unfinished.mkdir()
        difference = _require_same(live, writers[form](), f"the {form} export of {bundle.path}")
        if form != "orbax":
            config = {**_config(bundle), "hashes": {p: net_hash(v) for p, v in parts.items()}}
            if form == "stablehlo":
                config["precision"] = precision
            (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (unfinished / "README.md").write_text(_read_me(bundle, form, window, precision))
    return f"run on noise, it differs from the model by {difference:.1e} of the largest sample"


def _has(bundle: Bundle, part: str) -> bool:
    query = bundle.config.get("query", {})
    if part == "query":
        return query.get("model") is not None
    if part == "adaptor":
        return bool(query.get("adaptor_width"))
    return part in bundle.config


def _config(bundle: Bundle) -> dict[str, Any]:
    """The bundle's config and, of a run, how far it had come."""
    step = latest_step(bundle.path / "checkpoints")
    return bundle.config if step is None else {**bundle.config, "step": step}


def _rate(bundle: Bundle) -> int:
    return int(bundle.config["sample_rate"])


def _cast(variables: Variables, dtype: str) -> Variables:
    params = jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), variables["params"])
    statistics = variables.get("batch_stats")  # an adaptor has none
    return {"params": params, "batch_stats": statistics} if statistics else {"params": params}


def _inputs(separator: SeparatorNet, window: int) -> dict[str, np.ndarray]:
    """A mixture of every channel as a row, and conditions; named in the order of arguments."""
    rng = np.random.default_rng(0)
    shape = (_ROWS, separator.audio_channels, window)
    mixture = 0.1 * rng.standard_normal(shape).astype(np.float32)
    condition = rng.uniform(size=(_ROWS, separator.condition_width)).astype(np.float32)
    return {"0": mixture[:, 0] if separator.audio_channels == 1 else mixture, "1": condition}


def _separate(separator: SeparatorNet, variables: Variables, mixture: Any, condition: Any) -> Any:
    """Mixtures [b, t], or [b, channels, t] of a net of several channels, to estimates alike."""
    if separator.audio_channels == 1:
        return separate(separator, variables, mixture, condition)[0]
    return separator.apply(variables, mixture, condition)


def _live(
    separator: SeparatorNet, variables: Variables, inputs: Mapping[str, np.ndarray]
) -> Float[np.ndarray, "..."]:
    """The estimates that a form is held to, at highest precision.

    An exported function runs on the CPU then, where every precision is the highest.
    """
    run = jax.jit(at_precision(HIGHEST, functools.partial(_separate, separator)))
    return np.asarray(run(variables, inputs["0"], inputs["1"]))


def _require_same(live: np.ndarray, exported: np.ndarray, what: str) -> float:
    """The largest difference as a share of the largest sample; refuses more than rounding."""
    peak = float(np.abs(live).max())
    difference = float(np.abs(live - exported).max()) / max(peak, 1e-10)
    if not difference <= _TOLERANCE:
        raise UserError(f"{what} differs from the model by {difference:.1e}, so it was not kept")
    return difference


def _orbax(
    bundle: Bundle,
    parts: Mapping[str, Variables],
    folder: pathlib.Path,
    shards: int,
    inputs: Mapping[str, np.ndarray],
) -> np.ndarray:
    """A bundle, read back and run."""
    if shards > jax.device_count():
        raise UserError(
            f"--shards {shards} needs as many devices, there are {jax.device_count()}; without "
            f"accelerators set JAX_NUM_CPU_DEVICES={shards}"
        )
    foreign = bundle.path / "foreign.safetensors"
    kept = read_tensors(foreign) if foreign.is_file() else None
    write_bundle(folder, _config(bundle), parts, kept)
    if shards > 1:
        mesh = make_mesh(jax.devices()[:shards])
        for part, variables in parts.items():
            save_tree(folder / part, lay_out(variables, [("", "fsdp")], mesh))
    separator, variables = read_bundle(folder).separator()
    return _live(separator, variables, inputs)


def _safetensors(
    separator: SeparatorNet,
    parts: Mapping[str, Variables],
    folder: pathlib.Path,
    inputs: Mapping[str, np.ndarray],
) -> np.ndarray:
    """One file of all parts, read back and run."""
    path = folder / "model.safetensors"
    flat = flatten_dict(dict(parts), sep="/")
    write_tensors(path, flat)
    variables = unflatten_dict(read_tensors(path), sep="/")["separator"]
    return _live(separator, variables, inputs)


def _stablehlo(
    bundle: Bundle,
    parts: Mapping[str, Variables],
    folder: pathlib.Path,
    window: int,
    inputs: Mapping[str, np.ndarray],
    precision: str,
) -> np.ndarray:
    """The functions themselves, parameters included, run in a process without this package."""
    separator, _ = bundle.separator()
    constants = jax.tree.map(jnp.asarray, parts["separator"])
    (b,) = jax.export.symbolic_shape("b")
    shapes = [
        jax.ShapeDtypeStruct((b, *array.shape[1:]), array.dtype)
        for _, array in sorted(inputs.items())
    ]
    _write_function(
        folder / "separate.stablehlo",
        at_precision(precision, functools.partial(_separate, separator, constants)),
        shapes,
    )
    if "query" in parts:
        query, variables = bundle.query()
        variables = jax.tree.map(jnp.asarray, variables)
        segment = round(bundle.config["segment_seconds"] * _rate(bundle))
        recording = 0.1 * np.random.default_rng(1).standard_normal((_ROWS, segment))
        path = folder / "condition.stablehlo"
        _write_function(
            path,
            at_precision(precision, functools.partial(_condition, query, variables)),
            [jax.ShapeDtypeStruct((b, segment), np.float32)],
        )
        recording = recording.astype(np.float32)
        live = jax.jit(at_precision(HIGHEST, functools.partial(_condition, query)))
        live = live(variables, recording)
        _require_same(np.asarray(live), _run_alone(path, {"0": recording}), str(path))
    return _run_alone(folder / "separate.stablehlo", inputs)


def _condition(query: QueryNet, variables: Variables, recording: Any) -> Any:
    classes = jnp.zeros(recording.shape[0], jnp.int32)  # a recording tells by itself
    return query.apply(variables, recording, classes)


def _write_function(
    path: pathlib.Path, function: Callable[..., Any], shapes: list[jax.ShapeDtypeStruct]
) -> None:
    platforms = ("cpu", "cuda", "tpu")
    path.write_bytes(jax.export.export(jax.jit(function), platforms=platforms)(*shapes).serialize())


def _run_alone(path: pathlib.Path, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The output of an exported function in a fresh process on the CPU."""
    given, given_back = path.with_suffix(".in.npz"), path.with_suffix(".out.npy")
    np.savez(given, **inputs)
    # -I: neither the working directory nor PYTHONPATH can bring this package in.
    command = [sys.executable, "-I", "-c", _RUN, str(path), str(given), str(given_back)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise UserError(f"{path.name} did not run in a process of its own: {ran.stderr[-500:]}")
    found = np.load(given_back)
    given.unlink()
    given_back.unlink()
    return found


def _require_flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise UserError(
            "stablehlo needs the package flatbuffers: pip install 'uss-jax[export]'"
        ) from error


def _read_me(bundle: Bundle, form: str, window: int, precision: str) -> str:
    config = bundle.config
    segment = round(config["segment_seconds"] * _rate(bundle))
    about = {
        "samples": window,
        "rate": _rate(bundle),
        "width": bundle.separator()[0].condition_width,
        "precision": precision,
        "condition": _CONDITION[KINDS[config["query"]["kind"]].recordings].format(samples=segment)
        + "\n",
    }
    licence = config.get("licence", "as the recordings it was trained on allow")
    return (
        f"# A separator as {form}\n\nWritten by uss-jax; config.json says what it is.\n\n"
        f"Licence of the parameters: {licence}\n\n{_LOAD[form].format(**about)}"
    )
