"""Exports a model as orbax (whole or sharded), safetensors or StableHLO.

An export is written to a temporary folder, read back, run on noise, compared with the live model,
and only then moved into place. It includes the model's config, licence and loading instructions.

Letters: `b` batch, `t` samples of a window, `d` condition width.
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

from uss_jax.bundles.bundle import (
    MEANS,
    OF_QUERY,
    Bundle,
    Variables,
    net_hash,
    packaged_taggers,
    read_bundle,
    section_of_means,
    write_bundle,
)
from uss_jax.bundles.card import CARD, read_card
from uss_jax.bundles.checkpoints import save_tree
from uss_jax.bundles.tensors import PARTS_FILE, read_tensors, write_tensors
from uss_jax.devices.mesh import lay_out, make_mesh
from uss_jax.devices.precision import HIGHEST, at_precision, check_precision
from uss_jax.disk.atomic import replacing_folder
from uss_jax.errors import UserError
from uss_jax.models.query import KINDS, TEXT_WIDTH, QueryNet
from uss_jax.models.separator import SeparatorNet, separate

FORMATS = ("orbax", "safetensors", "stablehlo")
DTYPES = ("float32", "bfloat16")
# Relative to the largest sample: what another order of float32 summation may change.
_TOLERANCE = 1e-4
_PARTS = ("separator", "query", *OF_QUERY, MEANS, "sed")
_ROWS = 2
_CLASS_CONDITIONS = "class_conditions.npy"

_LOAD = {
    "orbax": """A bundle, accepted by `uss-jax separate --model` and all other commands. Without
uss_jax, `orbax.checkpoint.StandardCheckpointer().restore(absolute_path_of_a_part)` reads a part.
""",
    "safetensors": """`safetensors.numpy.load_file("model.safetensors")`; names are
part/collection/layer/.../leaf, convolutions are HWIO, dense layers (in, out).
""",
    "stablehlo": """    import jax
    read = lambda name: jax.export.deserialize(bytearray(open(name, "rb").read()))
    separated = read("separate.stablehlo").call(mixture, condition)

mixture {shape} float32 at {rate} Hz, condition [b, {width}] float32, any b; needs only jax.
Matrix products and convolutions of float32 arrays use the precision `{precision}`.
{condition}""",
}

# Runs an exported function in a process that imports neither uss_jax nor flax.
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
    without_packaged: bool = False,
    means: Float[np.ndarray, "k k"] | None = None,
) -> str:
    """Exports a model; the folder appears complete, and only if its outputs match the model's.

    Args:
      bundle: bundle of a separator.
      form: one of FORMATS.
      out: a folder that does not exist yet.
      dtype: dtype of stored parameters; batch statistics stay float32.
      shards: orbax only: number of devices over which every large array is sharded.
      window_seconds: stablehlo only: window length, in seconds; a segment's when None.
      precision: stablehlo only: precision of the function, see uss_jax/devices/precision.py.
      without_packaged: safetensors only: leave out tagging nets that are in the package.
      means: mean vectors of classes in place of the model's, see `means_of`.

    Returns:
      A sentence on what was checked.

    Raises:
      UserError: the folder exists, an argument does not apply to the form, or the export differs
        from the model.
    """
    out = pathlib.Path(out)
    if out.exists():
        raise UserError(f"{out} already exists; choose another name or remove it first")
    _require_applicable(form, dtype, precision, shards)
    if means is not None:  # before anything is read: all parts are of one step of a run
        config = {**bundle.config, **section_of_means(means)}
        bundle = dataclasses.replace(bundle, config=config)
    separator, variables = bundle.separator()
    given = {"separator": variables}
    given |= {} if means is None else {MEANS: {"params": {MEANS: means}}}
    parts = {p: given.get(p) or bundle.variables(p) for p in _PARTS if bundle.holds(p)}
    left_out = _packaged(parts) if without_packaged else {}
    if without_packaged and not left_out:
        raise UserError(f"no net of {bundle.name} is in the package; leave out --without-packaged")
    # Vectors of names stay as exact as those of texts, and small probabilities say much.
    parts = {
        part: variables if part in ("names", MEANS) else _cast(variables, dtype)
        for part, variables in parts.items()
        if part not in left_out
    }
    window = round((window_seconds or bundle.config["segment_seconds"]) * _rate(bundle))
    inputs = _inputs(separator, window)
    original = _live(separator, variables, inputs)
    live = original if dtype == DTYPES[0] else _live(separator, parts["separator"], inputs)

    with replacing_folder(out) as unfinished:
        writers: dict[str, Callable[[], Float[np.ndarray, "b t"]]] = {
            "orbax": lambda: _orbax(bundle, parts, unfinished, shards, inputs),
            "safetensors": lambda: _safetensors(separator, parts, unfinished, inputs),
            "stablehlo": lambda: _stablehlo(
                separator, bundle, parts, unfinished, inputs, precision
            ),
        }
        if form != "orbax":
            unfinished.mkdir()
        found = writers[form]()
        _require_same(live, found, f"the {form} export of {bundle.name}")
        if form != "orbax":
            hashes = {p: net_hash(v) for p, v in parts.items()}
            config = {**_config(bundle), "hashes": {**hashes, **left_out}}
            if form == "stablehlo":
                config["precision"] = precision
            (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if form != "stablehlo":
            _require_readable(unfinished, [*parts, *left_out])
        card = read_card(bundle.path)
        if card:
            (unfinished / CARD).write_text(card, encoding="utf-8")
        (unfinished / "README.md").write_text(
            _read_me(bundle, separator, form, window, precision, bool(card), left_out)
        )
    return (
        f"on noise, its output differs from the model's by {_difference(original, found):.1e} of "
        "the largest sample"
    )


def _require_applicable(form: str, dtype: str, precision: str, shards: int) -> None:
    """Raises a UserError if an argument of `export` does not apply to the form."""
    if form == "stablehlo":
        _require_flatbuffers()
        if dtype != DTYPES[0]:
            raise UserError(
                "stablehlo keeps the dtypes that the model computes in; leave out --dtype"
            )
    elif precision != HIGHEST:
        raise UserError(f"{form} holds parameters, not computations; leave out --precision")
    check_precision(precision, "precision")
    if shards > jax.device_count():
        raise UserError(
            f"--shards {shards} needs that many devices, there are {jax.device_count()}; without "
            f"accelerators set JAX_NUM_CPU_DEVICES={shards}"
        )


def _packaged(parts: Mapping[str, Variables]) -> dict[str, str]:
    """Returns the hashes of the parts that are tagging nets of the package."""
    packaged = packaged_taggers()
    hashes = {part: net_hash(parts[part]) for part in ("query", "sed") if part in parts}
    return {part: digest for part, digest in hashes.items() if digest in packaged}


def _config(bundle: Bundle) -> dict[str, Any]:
    """Returns the bundle's config, with the step of its parameters if it is a workdir."""
    return bundle.config if bundle.step is None else {**bundle.config, "step": bundle.step}


def _rate(bundle: Bundle) -> int:
    return int(bundle.config["sample_rate"])


def _cast(variables: Variables, dtype: str) -> Variables:
    params = jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), variables["params"])
    statistics = variables.get("batch_stats")  # adaptors have none
    return {"params": params, "batch_stats": statistics} if statistics else {"params": params}


def _inputs(separator: SeparatorNet, window: int) -> dict[str, np.ndarray]:
    """Returns random mixtures and conditions, keyed by argument position."""
    rng = np.random.default_rng(0)
    shape = (_ROWS, separator.audio_channels, window)
    mixture = 0.1 * rng.standard_normal(shape).astype(np.float32)
    condition = rng.uniform(size=(_ROWS, separator.condition_width)).astype(np.float32)
    return {"0": mixture[:, 0] if separator.audio_channels == 1 else mixture, "1": condition}


def _separate(separator: SeparatorNet, variables: Variables, mixture: Any, condition: Any) -> Any:
    """Separates mixtures [b, t], or [b, channels, t] if the net has several channels."""
    if separator.audio_channels == 1:
        return separate(separator, variables, mixture, condition)
    return separator.apply(variables, mixture, condition)


def _live(
    separator: SeparatorNet, variables: Variables, inputs: Mapping[str, np.ndarray]
) -> Float[np.ndarray, "..."]:
    """Returns the live model's estimates, at highest precision.

    Exported functions are checked on the CPU, where all precisions are the same.
    """
    run = jax.jit(at_precision(HIGHEST, functools.partial(_separate, separator)))
    return np.asarray(run(variables, inputs["0"], inputs["1"]))


def _difference(live: np.ndarray, exported: np.ndarray) -> float:
    """Returns the largest difference relative to the largest sample."""
    return float(np.abs(live - exported).max()) / max(float(np.abs(live).max()), 1e-10)


def _require_same(live: np.ndarray, exported: np.ndarray, what: str) -> None:
    """Raises a UserError if the outputs differ by more than _TOLERANCE."""
    difference = _difference(live, exported)
    if not difference <= _TOLERANCE:
        raise UserError(f"{what} differs from the model by {difference:.1e}, so it was not kept")


def _require_readable(folder: pathlib.Path, parts: Sequence[str]) -> None:
    """Opens each net of an export, which checks its layout, values and hash."""
    written = read_bundle(folder)
    for part in ("separator", "query", "sed"):
        if part in parts or (part == "query" and set(OF_QUERY) & set(parts)):
            getattr(written, part)()
    written.means()


def _orbax(
    bundle: Bundle,
    parts: Mapping[str, Variables],
    folder: pathlib.Path,
    shards: int,
    inputs: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Writes a bundle; returns estimates from what is read back."""
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
    """Writes one file with all parts; returns estimates from what is read back."""
    path = folder / PARTS_FILE
    flat = flatten_dict(dict(parts), sep="/")
    write_tensors(path, flat)
    variables = unflatten_dict(read_tensors(path), sep="/")["separator"]
    return _live(separator, variables, inputs)


def _stablehlo(
    separator: SeparatorNet,
    bundle: Bundle,
    parts: Mapping[str, Variables],
    folder: pathlib.Path,
    inputs: Mapping[str, np.ndarray],
    precision: str,
) -> np.ndarray:
    """Writes functions with their parameters; returns estimates from a bare process."""
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
    asking: dict[str, tuple[Callable[..., Any], int]] = {}  # with the length of what they take
    if "query" in parts:
        segment = round(bundle.config["segment_seconds"] * _rate(bundle))
        asking["condition"] = _of_recording, segment
    if "names" in parts:
        asking["text_condition"] = _of_text, TEXT_WIDTH
        np.save(folder / "names.npy", np.asarray(parts["names"]["params"]["names"]))
    query, variables = bundle.query() if asking else (None, None)
    variables = jax.tree.map(jnp.asarray, variables)
    if MEANS in parts:
        means = jnp.asarray(parts[MEANS]["params"][MEANS])
        adapt = at_precision(HIGHEST, functools.partial(query.apply, method="adapt"))
        known = means.any(axis=1, keepdims=True)
        conditions = np.where(known, np.asarray(adapt(variables, means)), np.float32(np.nan))
        np.save(folder / _CLASS_CONDITIONS, conditions)
    for name, (function, length) in asking.items():
        given = 0.1 * np.random.default_rng(1).standard_normal((_ROWS, length)).astype(np.float32)
        path = folder / f"{name}.stablehlo"
        _write_function(
            path,
            at_precision(precision, functools.partial(function, query, variables)),
            [jax.ShapeDtypeStruct((b, length), np.float32)],
        )
        live = jax.jit(at_precision(HIGHEST, functools.partial(function, query)))
        _require_same(np.asarray(live(variables, given)), _run_alone(path, {"0": given}), str(path))
    return _run_alone(folder / "separate.stablehlo", inputs)


def _of_recording(query: QueryNet, variables: Variables, recording: Any) -> Any:
    classes = jnp.zeros(recording.shape[0], jnp.int32)  # unused: a recording is its own query
    return query.apply(variables, recording, classes)


def _of_text(query: QueryNet, variables: Variables, vector: Any) -> Any:
    return query.apply(variables, vector, method="of_texts")


def _write_function(
    path: pathlib.Path, function: Callable[..., Any], shapes: list[jax.ShapeDtypeStruct]
) -> None:
    platforms = ("cpu", "cuda", "tpu")
    path.write_bytes(jax.export.export(jax.jit(function), platforms=platforms)(*shapes).serialize())


def _run_alone(path: pathlib.Path, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the output of an exported function, run in a new process on the CPU."""
    given, given_back = path.with_suffix(".in.npz"), path.with_suffix(".out.npy")
    np.savez(given, **inputs)
    # -I keeps this package from being imported through the working directory or PYTHONPATH.
    command = [sys.executable, "-I", "-c", _RUN, str(path), str(given), str(given_back)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise UserError(
            f"{path.name} failed to run in a process without uss_jax: {ran.stderr[-500:]}"
        )
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


def _read_me(
    bundle: Bundle,
    separator: SeparatorNet,
    form: str,
    window: int,
    precision: str,
    has_card: bool,
    left_out: Iterable[str],
) -> str:
    config, channels = bundle.config, separator.audio_channels
    segment = round(config["segment_seconds"] * _rate(bundle))
    if "query" in config:
        words = KINDS[config["query"].get("kind", "soft")].words.format(samples=segment)
    else:
        words = "The condition is that which the separator was trained with; its query net is gone."
    if bundle.holds("adaptor") and not bundle.holds("query") and not bundle.holds("names"):
        words = "The condition is what the adaptor makes of the requested class, in uss_jax only."
    if form == "stablehlo" and bundle.holds(MEANS):
        words += f"\n{_CLASS_CONDITIONS} has that of each AudioSet class, NaN for unknown ones."
    about = {
        "shape": f"[b, {window}]" if channels == 1 else f"[b, {channels}, {window}]",
        "rate": _rate(bundle),
        "width": separator.condition_width,
        "precision": precision,
        "condition": f"{words}\n",
    }
    licence = config.get("licence", "subject to the licences of the training recordings")
    missing = f"Not in it, but in uss_jax: {' and '.join(left_out)}.\n" if left_out else ""
    return (
        f"# Separator exported as {form}\n\nWritten by uss-jax; config.json describes it"
        f"{', card.md the model' if has_card else ''}.\n\n"
        f"Licence of the parameters: {licence}\n\n{_LOAD[form].format(**about)}"
        f"{missing}"
    )
