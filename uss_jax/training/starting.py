"""The first state of a run: fresh, or with the parameters of a bundle, workdir or converted net."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from uss_jax.bundles import nets
from uss_jax.bundles.bundle import Bundle, net_hash, read_bundle
from uss_jax.bundles.fingerprint import by_path, path_of
from uss_jax.errors import UserError, counted
from uss_jax.training.state import TrainState

# Nets of a state by their names in its trees, and the parts of a bundle that they start from.
_PARTS = {
    "separator": "separator",
    "query/adaptor": "adaptor",
    "query/text_adaptor": "text_adaptor",
    "query/tagger": "query",
    "tagger": "sed",
}
# Fields that say how a net computes or trains, not what it computes.
_FREE = ("dtype", "one_class_share", "dropout", "stochastic_depth", "finetune", *nets.TRAINS_ON)
_NAMED = 4
# Vectors of names by one encoder differ by less: the package has them as float16.
_NEAR = 1e-2


def find_start(
    state: TrainState,
    location: str,
    partly: bool,
    about: Mapping[str, Any],
    frozen: Mapping[str, Any],
) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """Finds what a fresh state can take from a model.

    A model that keeps an average of its parameters gives that.

    Args:
      state: the fresh state, or its shapes.
      location: bundle or workdir.
      partly: take whatever has the same name and shape; otherwise all must, and the nets be equal.
      about: content of the run's config.json.
      frozen: variables of the run's nets that do not train; {} to compare these nets' fields only.

    Returns:
      Arrays by tree of the state and name, and lines on what is taken and what is not.

    Raises:
      UserError: the model cannot be read, or does not fit; or nothing of it does.
    """
    lines = []
    bundle = read_bundle(location).at_sample_rate(about["sample_rate"])
    if said := list(_differences(bundle, about, frozen)):
        lines.append(f"{location} differs from this run: {', '.join(said)}")
        if not partly:
            raise UserError(
                f"{lines[0]}; give another config.init_from or --config.init_partly=True"
            )
    wanted = {"params": by_path(state.params), "batch_stats": by_path(state.batch_stats)}
    stored = _stored(bundle, wanted["params"])
    taken, left = {}, []
    for tree, leaves in wanted.items():
        taken[tree] = {
            name: value
            for name, value in stored[tree].items()
            if name in leaves and np.shape(value) == leaves[name].shape
        }
        left += [f"{tree}/{name}" for name in leaves if name not in taken[tree]]
    unused = [
        f"{tree}/{name}" for tree in stored for name in stored[tree].keys() - taken[tree].keys()
    ]
    count = sum(map(len, taken.values()))
    if not count:
        raise UserError(f"nothing of {location} fits this run; give another config.init_from")
    if not partly and (left or unused):
        raise UserError(
            f"config.init_from={location} does not fit: {_shown('no array of its shape for', left)}"
            f"{_shown('no place for', unused)}take what fits with --config.init_partly=True"
        )
    lines.append(f"starting from {location}: {counted(count, 'array')} taken")
    for what, names in (("as new", left), ("not taken", unused)):
        if names:
            lines.append(f"  {what}: {_listed(names)}")
    return taken, lines


def started_with(state: TrainState, taken: Mapping[str, Mapping[str, np.ndarray]]) -> TrainState:
    """Returns a fresh state with parameters and statistics that `find_start` found.

    Step, optimiser and position in the data stay those of a new run.
    """
    return state.replace(
        params=_replaced(state.params, taken["params"]),
        batch_stats=_replaced(state.batch_stats, taken["batch_stats"]),
        ema=_replaced(state.ema, taken["params"]),
    )


def _differences(
    bundle: Bundle, wanted: Mapping[str, Any], frozen: Mapping[str, Any]
) -> Iterator[str]:
    """Yields what differs between a model's nets and those of a run, in words."""
    stored, wanted = nets.completed(bundle.config), nets.completed(wanted)
    part = "separator" if wanted["kind"] == "separator" else "sed"
    source = _source(bundle, part)
    if not bundle.holds(source):
        raise UserError(
            f"config.init_from={bundle.name} has no {part}, from which a {wanted['kind']} starts; "
            "give another"
        )
    if source != part:
        stored[part] = {"model": stored[source]["model"]}
    with_query = part == "separator" and "query" in stored
    for name in ("sample_rate", part, *(["query"] if with_query else [])):
        # How often a tagger in training is run is no difference; a condition's, that is one.
        free = (*_FREE, "patch_hop_frames") if name == "sed" else _FREE
        found = nets.differences(stored.get(name), wanted.get(name), name, free)
        for key, before, now in found:
            before, now = ("..." if isinstance(x, Mapping) else x for x in (before, now))
            yield f"{key}={before}, not {now}"
    query = frozen.get("query", {}).get("params")
    if with_query and query and "tagger" in query and bundle.holds("query"):
        tagger = {item: tree.get("tagger", {}) for item, tree in frozen["query"].items()}
        try:
            same = net_hash(tagger) == net_hash(bundle.variables("query"))
        except UserError:  # exported without a tagger that this version lacks
            same = False
        if not same:
            yield "the arrays of its query net, so that conditions mean something else"
    if with_query and query and "names" in query and bundle.holds("names"):
        names = bundle.variables("names")["params"]["names"]
        if not np.allclose(names, query["names"], atol=_NEAR):
            yield "the vectors of the classes' names, so that texts mean something else"


def _source(bundle: Bundle, part: str) -> str:
    """Returns the part that a net starts from: PANNs' Cnn14, a detector's, is a query net alone."""
    return "query" if part == "sed" and not bundle.holds("sed") else part


def _stored(bundle: Bundle, wanted: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Reads the parts of a model that a state has, flat and by the state's names."""
    trees: dict[str, dict[str, np.ndarray]] = {"params": {}, "batch_stats": {}}
    for prefix, part in _PARTS.items():
        part = _source(bundle, part)
        if bundle.holds(part) and any(name.startswith(f"{prefix}/") for name in wanted):
            variables = bundle.variables(part)
            bundle.require_finite(part, variables)
            for tree, found in trees.items():
                flat = by_path(variables.get(tree, {}))
                found |= {f"{prefix}/{name}": value for name, value in flat.items()}
    return trees


def _replaced(tree: Any, by: Mapping[str, np.ndarray]) -> Any:
    """Returns the tree with some leaves replaced by arrays of the same layout."""

    def new(path: Any, leaf: jax.Array) -> jax.Array:
        if (name := path_of(path)) not in by:
            return leaf
        value = np.asarray(by[name], leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda part: value[part])

    return jax.tree_util.tree_map_with_path(new, tree)


def _shown(what: str, names: Sequence[str]) -> str:
    return f"{what} {_listed(names)}; " if names else ""


def _listed(names: Sequence[str]) -> str:
    """Names the modules of arrays, whose names are tree/net/module/..."""
    modules = sorted({"/".join(name.split("/")[1:3]) for name in names})
    more = len(modules) - _NAMED
    shown = ", ".join(modules[:_NAMED]) + (f" and {more} more" if more > 0 else "")
    return f"{shown} ({counted(len(names), 'array')})"
