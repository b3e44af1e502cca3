"""Builds Flax modules from the sections of a config or bundle, and checks their fields."""

import contextlib
import dataclasses
import difflib
import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, SupportsIndex, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError
from jaxtyping import Integer

from uss_jax.audio import HIGHEST_SAMPLE_RATE, LOWEST_SAMPLE_RATE
from uss_jax.disk.checked_json import Rule, flag, list_of, number, text, whole
from uss_jax.errors import UserError
from uss_jax.models.bandsplit import BandSplit
from uss_jax.models.cnn14 import Cnn14, Cnn14DecisionLevelMax
from uss_jax.models.htsat import HTSAT
from uss_jax.models.norm import MOMENTUM
from uss_jax.models.query import KINDS, TEXT_WIDTH, Adaptor, QueryNet
from uss_jax.models.resunet import ResUNet
from uss_jax.models.separator import SeparatorNet
from uss_jax.models.tagging import TaggingNet, at_momentum, unknown_classes
from uss_jax.models.yamnet import YAMNet
from uss_jax.ontology import load_ontology

Module = TypeVar("Module", bound=nn.Module)
Entry = TypeVar("Entry")

# Nets by their name in a config (`net`, by default the first).
SEPARATORS: dict[str, type[SeparatorNet]] = {"resunet": ResUNet, "bandsplit": BandSplit}
# Tagging nets: the class for each role. Both roles have the same variables.
TAGGERS = {
    "cnn14": {"query": Cnn14, "sed": Cnn14DecisionLevelMax},
    "htsat": {"query": HTSAT, "sed": HTSAT},
    "yamnet": {"query": YAMNet, "sed": YAMNet},
}

# Rules for net fields, in a config or a bundle's config.json. The bounds are far above any net
# that trains, and below what numpy, XLA or a host's memory cannot handle.
FIELD_RULES: dict[str, Rule] = {
    "sample_rate": whole(LOWEST_SAMPLE_RATE, HIGHEST_SAMPLE_RATE),
    "n_fft": whole(16, 32768),
    "hop_samples": whole(1, 32768),
    "mel_bins": whole(1, 512),
    "f_min": number(0, HIGHEST_SAMPLE_RATE),
    "f_max": number(1, HIGHEST_SAMPLE_RATE),
    "channels": list_of(whole(1, 16384), 1, 16),
    "classes": whole(1, 100_000),
    "unknown_classes": list_of(whole(0, 100_000), 0, 1000),
    "patch_hop_frames": whole(1, 96),
    "dtype": text("float32", "bfloat16"),
    "image_size": whole(16, 2048),
    "token_width": whole(1, 8192),
    "depths": list_of(whole(1, 48), 1, 6),
    "heads": list_of(whole(1, 256), 1, 6),
    "repeat_short": flag(),
    "stochastic_depth": number(0, 0.999),
    "blocks_per_level": whole(1, 16),
    "bands": list_of(whole(1, 16384), 1, 1024),
    "width": whole(1, 16384),
    "layers": whole(1, 48),
    "head_width": whole(2, 256),
    "hidden_width": whole(1, 65536),
    "time_span": whole(0, 4096),
    "audio_channels": whole(1, 64),
    "condition_width": whole(1, 100_000),
    "condition_norm": number(0, 1000),
    "film_gain": flag(),
    "condition_added": flag(),
    "kind": text(*KINDS),
    "adaptor_width": whole(0, 100_000),
    "adaptor_hidden": whole(1, 100_000),
    "shortcut": flag(),
    "one_class_share": number(0, 1),
    "dropout": number(0, 0.999),
    "finetune": flag(),
    "trained": list_of(whole(0, 100_000), 0, 100_000),
    "by_names": flag(),
}

# Fields that do not define a net: the first three configure training, the others are Flax's.
_NO_FIELDS = ("norm_scope", "norm_momentum", "remat", "parent", "name")


# Fields of a query net that tell what a run trains on, which is no difference between nets.
TRAINS_ON = ("trained", "by_names")


def build(net: type[Module], fields: Mapping[str, Any], where: str) -> Module:
    """Builds a module from its fields.

    Args:
      net: class of the module.
      fields: values of its dataclass fields, as in JSON: a list may stand for a tuple, and a whole
        number for a float.
      where: name of the config section, for the message.

    Raises:
      UserError: a field is unknown, or its value breaks its rule.
    """
    known = {f.name: f.type for f in dataclasses.fields(net) if f.name not in _NO_FIELDS}
    for key in fields:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"its fields are {', '.join(known)}"
            raise UserError(f"{where}.{key}: {net.__name__} has no such field; {hint}")
    check_fields(fields, where)
    return net(**{name: _cast(value, known[name]) for name, value in fields.items()})


def _cast(value: Any, wanted: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return float(value) if wanted is float else value


def check_fields(fields: Mapping[str, Any], where: str) -> None:
    """Raises a UserError if a field breaks its rule or fields are inconsistent."""
    try:
        for key, value in fields.items():
            if key in FIELD_RULES:
                FIELD_RULES[key](list(value) if isinstance(value, tuple) else value, key)
    except ValueError as error:
        raise UserError(f"{where}.{error}") from error
    if fields.get("n_fft", 2) % 2:
        raise UserError(f"{where}.n_fft is {fields['n_fft']}, expected an even number")
    if {"f_min", "f_max", "sample_rate"} <= fields.keys():
        low, high, rate = (fields[name] for name in ("f_min", "f_max", "sample_rate"))
        if not low < high <= rate / 2:
            raise UserError(
                f"{where}: f_min {low:g} must be below f_max {high:g} Hz, and f_max at most half "
                f"of sample_rate {rate} Hz"
            )


def fields_of(net: nn.Module) -> dict[str, Any]:
    """Returns `net` and fields in JSON types; inverse of `build_separator` and `build_tagger`."""
    fields = {f.name: getattr(net, f.name) for f in dataclasses.fields(net)}
    classes = {name: tuple(roles.values()) for name, roles in TAGGERS.items()}
    classes |= {name: (separator,) for name, separator in SEPARATORS.items()}
    names = [name for name, alike in classes.items() if type(net) in alike]
    content = {"net": names[0]} if names else {}
    for name, value in fields.items():
        if name not in _NO_FIELDS:
            content[name] = list(value) if isinstance(value, tuple) else value
    return content


def build_separator(section: Mapping[str, Any]) -> SeparatorNet:
    """Builds the separator of a config's or bundle's `separator` section (`net` and fields)."""
    net, fields = _chosen(SEPARATORS, section, "separator")
    return build(net, fields, "separator")


def build_tagger(model: Mapping[str, Any], role: str, where: str) -> TaggingNet:
    """Builds a tagging net.

    Args:
      model: `net`, a name in TAGGERS, and fields.
      role: "query" or "sed".
      where: name of the config section, for messages.
    """
    roles, fields = _chosen(TAGGERS, model, where)
    return build(roles[role], fields, where)


def name_of(table: Mapping[str, Any], section: Mapping[str, Any]) -> str:
    """Returns the name of a section's net in SEPARATORS or TAGGERS."""
    return section.get("net", next(iter(table)))


def _chosen(
    table: Mapping[str, Entry], section: Mapping[str, Any], where: str
) -> tuple[Entry, dict[str, Any]]:
    """Returns the table entry that a section's `net` selects, and the section's other entries."""
    name = name_of(table, section)
    if name not in table:
        raise UserError(f"{where}.net is {name!r}, expected {' or '.join(table)}")
    return table[name], {key: value for key, value in section.items() if key != "net"}


def takes_any_rate(model: Mapping[str, Any]) -> bool:
    """Returns whether a tagging net resamples waveforms, so that `sample_rate` may be any."""
    net, _ = _chosen(TAGGERS, model, "model")
    return getattr(net["sed"], "resamples", False)


def build_sed(model: Mapping[str, Any]) -> TaggingNet:
    """Builds the sound event detector of a bundle's `sed.model` section."""
    return build_tagger(model, "sed", "sed.model")


def build_query(section: Mapping[str, Any], model: Mapping[str, Any] | None) -> QueryNet:
    """Builds the query net.

    Args:
      section: `kind` and further fields, as in a config's `query` section.
      model: `net` and fields of the tagging net; None for kinds that read none.
    """
    fields = {k: v for k, v in section.items() if k != "model"}
    if fields.get("kind") not in KINDS:
        raise UserError(f"query.kind is {fields.get('kind')!r}, expected {', '.join(KINDS)}")
    tagger = None
    if model is not None:
        tagger = build_tagger(model, "query", "query.model")
        if fields.get("finetune"):  # trained with the separator, at the separator's momentum
            tagger = at_momentum(tagger, MOMENTUM)
    query = build(QueryNet, {**fields, "tagger": tagger}, "query")
    if tagger is None and query.takes.recordings:
        raise UserError(f"query.model is missing: query.kind={query.kind} needs a tagging net")
    if query.takes.weighs_vectors and not hasattr(tagger, "class_vectors"):
        raise UserError(f"query.kind={query.kind} needs class vectors, which this net has none of")
    if query.one_class_share and not query.takes.probabilities:
        kinds = " or ".join(name for name, kind in KINDS.items() if kind.probabilities)
        raise UserError(
            f"query.one_class_share needs probabilities: query.kind={kinds}, not {query.kind}"
        )
    if query.takes.texts and query.takes.reads and (query.shortcut or not query.adaptor_width):
        raise UserError(
            f"query.kind={query.kind} needs query.adaptor_width above 0, the width of conditions "
            "of either, and no query.shortcut"
        )
    if query.trained and max(query.trained) >= query.classes:
        raise UserError(
            f"query.trained has class {max(query.trained)}, but there are {query.classes} classes"
        )
    if query.by_names and not query.takes.texts:
        raise UserError(f"query.by_names needs texts, which query.kind={query.kind} does not take")
    if query.shortcut and query.adaptor_width not in (0, width := query.source_width):
        raise UserError(
            f"query.shortcut needs query.adaptor_width={width}, the width of the adaptor's input"
        )
    return query


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a bundle's config with all fields of its nets.

    Older versions wrote fewer; what is missing has its default.
    """
    found = dict(config)
    if "separator" in config:
        found["separator"] = fields_of(build_separator(config["separator"]))
    if "sed" in config:
        found["sed"] = {"model": fields_of(build_sed(config["sed"]["model"]))}
    if "query" in config:
        query = build_query({"kind": "soft", **config["query"]}, config["query"].get("model"))
        model = query.tagger and fields_of(query.tagger)
        found["query"] = {**fields_of(query), "tagger": None, "model": model}
    return found


def differences(
    before: Any, now: Any, where: str = "", ignored: Collection[str] = ()
) -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted name, value before, value now) of the entries in which two sections differ.

    Where the nets of a section are of two kinds, only that is a difference.

    Args:
      before, now: sections of two configs, perhaps nested; those of nets `completed`.
      where: name of the section.
      ignored: names of entries, at any depth, that may differ.
    """
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        if before != now:
            yield where, before, now
        return
    keys = [*now, *(key for key in before if key not in now)]
    if "net" in keys and before.get("net") != now.get("net"):
        keys = ["net"]
    for key in keys:
        if key not in ignored:
            name = f"{where}.{key}" if where else key
            yield from differences(before.get(key), now.get(key), name, ignored)


def require_classes(net: TaggingNet | QueryNet, where: str) -> None:
    """Raises a UserError unless a net has as many classes as AudioSet, since labels index them."""
    wanted = len(load_ontology().class_mids)
    if net.classes != wanted:
        raise UserError(
            f"{where} has {net.classes} classes; labels, queries and metrics use AudioSet's "
            f"{wanted}, so the net must have as many"
        )


def unknown_among(net: TaggingNet, class_indexes: Iterable[SupportsIndex]) -> str:
    """Returns a sentence that names the classes whose probability is always 0; empty if none is."""
    ontology = load_ontology()
    asked = set(unknown_classes(net)).intersection(map(int, class_indexes))
    if not asked:
        return ""
    named = []
    for k in sorted(asked):
        nodes = (ontology.nodes[mid] for mid in ontology.nodes[ontology.class_mids[k]].parents)
        above = " and ".join(node.name for node in nodes if node.class_index is not None)
        named.append(f'"{ontology.class_names[k]}"' + (f" (below {above})" if above else ""))
    return (
        f"the net {fields_of(net)['net']} has no output for {', '.join(named)}: their probability "
        "is always 0"
    )


def arbitrary_anchors(sed: TaggingNet, labels: Integer[np.ndarray, "_"]) -> str:
    """Returns a sentence on the labels whose anchors a detector cannot find; empty if none is."""
    unknown = unknown_among(sed, np.unique(labels))
    return unknown and f"{unknown}; the anchors of these labels are arbitrary"


# Raised by flax, jax and numpy when fields are inconsistent.
_MISFITS = (ValueError, TypeError, IndexError, ZeroDivisionError, AssertionError, FlaxError)


def layout(net: TaggingNet | SeparatorNet) -> Any:
    """Returns the shapes of a net's variables."""
    return jax.eval_shape(functools.partial(init, net), jax.random.key(0))


def init(net: TaggingNet | SeparatorNet, key: jax.Array) -> dict[str, Any]:
    """Initialises a net's variables; a tagging net has the same in both roles.

    A net without batch norms has empty `batch_stats`.
    """
    with _misfits_said(net):
        return {"batch_stats": {}, **net.init(key, *_inputs(net))}


def output_shapes(net: TaggingNet) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a tagging net's outputs for a second of sound, [1, samples]."""
    with _misfits_said(net):
        return jax.eval_shape(net.init_with_output, jax.random.key(0), *_inputs(net))[0]


def takes_length(net: TaggingNet, samples: int) -> bool:
    """Returns whether a tagging net can compute on waveforms of so many samples; not if too few."""
    waveform = jax.ShapeDtypeStruct((1, samples), jnp.float32)
    try:
        jax.eval_shape(net.init, jax.random.key(0), waveform)
    except _MISFITS:
        return False
    return True


@contextlib.contextmanager
def _misfits_said(net: nn.Module) -> Iterator[None]:
    """Raises a UserError in place of what inconsistent fields make flax, jax and numpy raise."""
    try:
        yield
    except _MISFITS as error:
        words = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise UserError(f"the fields of {type(net).__name__} are inconsistent: {words}") from error


def _inputs(net: TaggingNet | SeparatorNet) -> tuple[jax.Array, ...]:
    if isinstance(net, TaggingNet):
        return (jnp.zeros((1, net.sample_rate), jnp.float32),)
    waveform = jnp.zeros((1, net.audio_channels, net.grid_samples), jnp.float32)
    return waveform, jnp.zeros((1, net.condition_width), jnp.float32)


def init_adaptors(net: QueryNet, key: jax.Array) -> dict[str, Any]:
    """Initialises the parameters of a query net's adaptors, by name."""
    if not net.adaptor_width:
        return {}
    adaptor = Adaptor(net.adaptor_width, net.adaptor_hidden)
    found = {"adaptor": adaptor.init(key, jnp.zeros((1, net.source_width)), train=False)}
    if net.takes.texts and net.takes.reads:
        key = jax.random.fold_in(key, 1)
        found["text_adaptor"] = adaptor.init(key, jnp.zeros((1, TEXT_WIDTH)), train=False)
    return {name: variables["params"] for name, variables in found.items()}


def parts_of_query(net: QueryNet) -> dict[str, Any]:
    """Returns the shapes of a query net's parameters by part, besides its tagging net."""
    parts = jax.eval_shape(functools.partial(init_adaptors, net), jax.random.key(0))
    if net.takes.texts:
        names = jax.ShapeDtypeStruct((net.classes, TEXT_WIDTH), jnp.float32)
        parts["names"] = {"names": names}
    return parts
