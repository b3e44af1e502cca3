"""Bundles: a model on disk with everything needed to use it. A workdir can be used as one.

A bundle is a folder with `config.json` and a folder for each part: `separator`, `query` (the
tagging net that computes conditions), `adaptor` and `text_adaptor` (if the query has them), `names`
(sentence vectors of the classes' names, if it takes texts), `means` (the mean vector of each class
that it was trained on, if it has them), `sed`; or all parts are in one safetensors file, where a
`tagger` is both `query` and `sed`. Tagging nets missing from a separator's bundle are taken from
the package, by hash. In a workdir the frozen parts are under `frozen/`, and the trained ones in the
newest checkpoint, as a moving average if there is one. The folder of another checkpoint, such as
`RUN/checkpoints/4000`, stands for the run at that step.
A tagger's run has one trained net, used as both `query` and `sed`.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from uss_jax.bundles import nets
from uss_jax.bundles.checkpoints import Checkpoints, latest_step, load_tree, save_tree, saved_steps
from uss_jax.bundles.fingerprint import by_path
from uss_jax.bundles.layout import require_same_layout
from uss_jax.bundles.packaged import PACKAGED, find_bundle
from uss_jax.bundles.tensors import PARTS_FILE, names_in, read_parts, write_tensors
from uss_jax.disk.atomic import replacing_folder
from uss_jax.disk.checked_json import (
    anything,
    either,
    mapping_of,
    nothing,
    number,
    read_json,
    record,
    text,
    whole,
)
from uss_jax.disk.opening import at_once
from uss_jax.errors import UserError
from uss_jax.models.query import KINDS, QueryNet
from uss_jax.models.separator import SeparatorNet
from uss_jax.models.tagging import TaggingNet

FORMAT_VERSION = 1
# Names of these parts in a checkpoint or safetensors file that holds one net for both.
_TRAINED_AS = {"query": "tagger", "sed": "tagger"}
# Parts of the query net besides its tagging net.
OF_QUERY = ("adaptor", "text_adaptor", "names")
# The part with the mean of each class, and the section of config.json that says so.
MEANS = "means"
# Schema of config.json; unknown keys are ignored.
_NET = lambda value, key: text(*nets.TAGGERS)(value, key)  # noqa: E731, with rows added later
_TAGGER = record({}, {**nets.FIELD_RULES, "net": _NET}, others=True)
_QUERY = record({}, {**nets.FIELD_RULES, "model": either(nothing(), _TAGGER)}, others=True)
_CONFIG = record(
    {
        "format_version": whole(0, 1 << 30),
        "kind": text(),
        "sample_rate": nets.FIELD_RULES["sample_rate"],
        "segment_seconds": number(0.01, 600),
    },
    {
        "separator": record({}, {**nets.FIELD_RULES, "net": text()}, others=True),
        "query": _QUERY,
        "sed": record({"model": _TAGGER}, others=True),
        MEANS: record({"classes": whole(0, 1 << 30)}, others=True),
        "hashes": mapping_of(text()),
        "licence": text(),
        "training": mapping_of(anything()),
        "step": whole(0, 1 << 53),
    },
    others=True,
)
Variables = dict[str, Any]
Read = Callable[[str], Variables]


@dataclasses.dataclass(frozen=True)
class Bundle:
    """An open bundle or workdir; parts are read on demand.

    Methods that return a net take `read`, a function from the name of a part to its variables, for
    callers that have read them already; it is `variables` when None.

    Attributes:
      path: folder of the bundle.
      config: `kind` (separator or tagger), `sample_rate` in Hz, `segment_seconds`, and a section
        for each part with the fields of its net, and the net's name under `net`; a tagging net's
        are under `model`.
      averaged: whether to read the moving average of a run's parameters if there is one.
      at_step: step of the checkpoint of a run to read; None for the newest.
    """

    path: pathlib.Path
    config: dict[str, Any]
    averaged: bool = True
    at_step: int | None = None

    @property
    def name(self) -> str:
        """The path, of a checkpoint if it is one, for messages."""
        at = () if self.at_step is None else ("checkpoints", str(self.at_step))
        return str(self.path.joinpath(*at))

    @property
    def is_run(self) -> bool:
        """True for the workdir of a run."""
        return (self.path / "checkpoints").is_dir()

    @property
    def step(self) -> int | None:
        """Step of the checkpoint that trained parts are read from; None if there is none."""
        return self._trained[0]

    def holds(self, part: str) -> bool:
        """Returns whether the model has variables of a part."""
        query = self.config.get("query", {})
        if part in OF_QUERY:
            kind = KINDS.get(query.get("kind", "soft"))
            adapted, texts = bool(query.get("adaptor_width")), kind is not None and kind.texts
            both = adapted and texts and kind.recordings
            return {"adaptor": adapted, "text_adaptor": both, "names": texts}[part]
        if part == "query":
            return query.get("model") is not None
        if part == MEANS:
            kind = KINDS.get(query.get("kind", "soft"))
            return part in self.config and kind is not None and kind.probabilities
        return part in self.config

    def section(self, part: str) -> dict[str, Any]:
        """Returns a part's section of the config; raises a UserError if there is none."""
        if part not in self.config:
            raise UserError(f"{self.name} has no {part}; it is a {self.config['kind']} bundle")
        return self.config[part]

    def separator(self, read: Read | None = None) -> tuple[SeparatorNet, Variables]:
        """Returns the separator and its variables."""
        separator, variables = self._built(
            "separator", nets.build_separator, self.section("separator"), read
        )
        if "query" in self.config:
            width = self._query_net().width
            if width != separator.condition_width:
                raise UserError(
                    f"{self.name}: separator.condition_width is {separator.condition_width}, but "
                    f"its query net gives conditions of width {width}"
                )
        return separator, variables

    def sed(self, read: Read | None = None) -> tuple[TaggingNet, Variables]:
        """Returns the sound event detector and its variables."""
        sed, variables = self._built("sed", nets.build_sed, self.section("sed")["model"], read)
        self._require_audioset(sed, "sed")
        return sed, variables

    def query(self, read: Read | None = None) -> tuple[QueryNet, Variables]:
        """Returns the query net and its variables, including those of adaptors and names.

        The query net of a tagger has the kind `soft`.
        """
        query = self._query_net()
        nets.require_classes(query, f"{self.name}: query")
        variables: Variables = {"params": {}, "batch_stats": {}}
        if query.tagger is not None:
            self._require_audioset(query.tagger, "query")
            _, tagger = self._built("query", lambda net: net, query.tagger, read)
            variables = {item: {"tagger": tagger[item]} for item in variables}
        for part, layout in nets.parts_of_query(query).items():
            found = (read or self.variables)(part)
            require_same_layout(layout, found["params"], part, self.name)
            self.require_finite(part, found)
            variables["params"] |= found["params"] if part == "names" else {part: found["params"]}
        return query, variables

    def means(self, read: Read | None = None) -> Float[np.ndarray, "k k"] | None:
        """Returns the mean probabilities of each class's training recordings, if it has them.

        What an adaptor takes, or the condition without one, is then the mean of that of the
        recordings. A class without a recording has a row of zeros.
        """
        if not self.holds(MEANS):
            return None
        variables, classes = (read or self.variables)(MEANS), self._query_net().classes
        layout = {"params": {MEANS: jax.ShapeDtypeStruct((classes, classes), jnp.float32)}}
        require_same_layout({**layout, "batch_stats": {}}, variables, MEANS, self.name)
        self.require_finite(MEANS, variables)
        return np.asarray(variables["params"][MEANS], np.float32)

    def at_sample_rate(self, sample_rate: int) -> "Bundle":
        """Returns the bundle with nets for this rate; itself if any net is bound to its own."""
        models = {p: self.config[p]["model"] for p in ("query", "sed") if self.holds(p)}
        if "separator" in self.config or not all(map(nets.takes_any_rate, models.values())):
            return self
        changed = {
            part: {**self.config[part], "model": {**model, "sample_rate": sample_rate}}
            for part, model in models.items()
        }
        config = {**self.config, **changed, "sample_rate": sample_rate}
        return dataclasses.replace(self, config=config)

    def variables(self, part: str) -> Variables:
        """Reads `params` and `batch_stats` of a part as host arrays.

        Raises:
          UserError: there are no variables, they cannot be read, or they do not match the hash in
            the bundle's config.
        """
        variables = self.read_unverified(part)
        if part in self.config.get("hashes", {}):
            self.require_hash(part, net_hash(variables))
        return variables

    def require_hash(self, part: str, found: str) -> None:
        """Raises a UserError if the hash of a part's variables is not that in the config."""
        place = self._folder(part) or self.path / PARTS_FILE
        if place.exists() and self.config.get("hashes", {}).get(part, found) != found:
            raise UserError(
                f"{place}: the arrays do not match the hash of {part} in config.json; "
                "copy the bundle again, or remove the hash if the change is intended"
            )

    def read_unverified(self, part: str) -> Variables:
        """Reads a part's variables without checking their hash; otherwise as `variables`."""
        if folder := self._folder(part):
            return {"batch_stats": {}, **load_tree(folder)}
        if packaged := self.packaged(part):
            return packaged.read_unverified(part)
        in_file = read_parts(self.path / PARTS_FILE)
        if found := in_file.get(part) or in_file.get(_TRAINED_AS.get(part)):
            return {"batch_stats": {}, **found}
        _, params, stats = self._trained
        if (name := _TRAINED_AS.get(part, part)) in params:
            return {"params": params[name], "batch_stats": stats.get(name, {})}
        if in_file and part in self.config.get("hashes", {}):
            raise UserError(
                f"{self.name} was exported without its {part}, and this version of the package "
                "has no net of that hash; export it again without --without-packaged"
            )
        raise UserError(
            f"{self.name} holds no parameters of its {part}; copy it again or, if it is the "
            "workdir of a run, wait for its first checkpoint"
        )

    @functools.cached_property
    def _trained(self) -> tuple[int | None, dict[str, Any], dict[str, Any]]:
        """Step, parameters and statistics by net, of a run's checkpoint, if there is one.

        Read at one time: a run may write another checkpoint before the next part is asked for, and
        a separator does not know the conditions of another step's query net.
        """
        step = self.at_step
        if step is None:
            step = latest_step(self.path / "checkpoints")
        if step is None:
            return None, {}, {}
        with Checkpoints(self.path / "checkpoints", keep=None) as checkpoints:
            items = checkpoints.items(step)
            params = checkpoints.read(step, "ema" if self.averaged and "ema" in items else "params")
            # A separator without batch norm has no statistics.
            stats = checkpoints.read(step, "batch_stats") if "batch_stats" in items else {}
        # Nets of the query are under `query`.
        return step, {**params, **params.get("query", {})}, {**stats, **stats.get("query", {})}

    def frozen_or_zeros(self, part: str) -> Variables:
        """Reads a part of a run's query that does not train; zeros for one that does.

        For a run that goes on: what it trains comes from the checkpoint that it goes on from, which
        need not be the newest.
        """
        query = self._query_net()
        if part == "names" or (part == "query" and not query.finetune):
            return self.variables(part)
        if part == "query":
            shapes = nets.layout(query.tagger)
        else:
            shapes = {"params": nets.parts_of_query(query)[part], "batch_stats": {}}
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)

    def _folder(self, part: str) -> pathlib.Path | None:
        """Returns the folder that holds a part; None for the trained parts of a run."""
        places = [self.path / part, self.path / "frozen" / part]
        if part == "query" and self.config.get("query", {}).get("finetune"):
            places.pop()  # if there, it was left by a run that ended before its first checkpoint
        return next((place for place in places if place.is_dir()), None)

    def packaged(self, part: str) -> "Bundle | None":
        """Returns the tagger in the package that a part without variables here is read from."""
        wanted = self.config.get("hashes", {}).get(part)
        if not wanted or self.config["kind"] == "tagger" or self._folder(part):
            return None
        here = {name.split("/", 1)[0] for name in names_in(self.path / PARTS_FILE)}
        if here & {part, _TRAINED_AS.get(part)}:
            return None
        return packaged_taggers().get(wanted)

    def _query_net(self) -> QueryNet:
        section = {"kind": "soft", **self.section("query")}
        return nets.build_query(section, section.get("model"))

    def _require_audioset(self, net: TaggingNet, part: str) -> None:
        """Checks a tagging net for AudioSet's classes and the bundle's sampling rate."""
        nets.require_classes(net, f"{self.name}: {part}.model")
        if net.sample_rate != self.config["sample_rate"]:
            raise UserError(
                f"{self.name}: {part}.model.sample_rate is {net.sample_rate}, the bundle's "
                f"sample_rate {self.config['sample_rate']}; both must be the same"
            )

    def _built(
        self, part: str, build: Any, fields: Any, read: Read | None
    ) -> tuple[Any, Variables]:
        net, variables = build(fields), (read or self.variables)(part)
        require_same_layout(nets.layout(net), variables, part, self.name)
        self.require_finite(part, variables)
        return net, variables

    def require_finite(self, part: str, variables: Variables) -> None:
        """Raises a UserError if an array has NaN or infinite values; a net may hide them."""
        for name, leaf in by_path(variables).items():
            if not np.isfinite(leaf).all():
                raise UserError(
                    f"{self.name}: {part}/{name} has values that are NaN or infinite; its training "
                    "has diverged, or the file is damaged"
                )


def section_of_means(means: Float[np.ndarray, "k k"]) -> dict[str, Any]:
    """Returns the section of config.json that says that a model has these means."""
    return {MEANS: {"classes": int(means.any(axis=1).sum())}}


def read_bundle(path: str | os.PathLike, averaged: bool = True) -> Bundle:
    """Opens a bundle, a workdir or a checkpoint in it, by its path or its name in the package.

    `averaged` is as in `Bundle`.

    Raises:
      UserError: the config is missing, invalid, or of another format version or kind; or there is
        no such checkpoint.
    """
    path, at_step = _run_and_step(find_bundle(path))
    config_path = path / "config.json"
    try:
        with open(config_path, "rb", opener=at_once) as file:
            config = read_json(file, _CONFIG)
    except OSError as error:
        raise UserError(
            f"{path} is not a bundle or workdir: {config_path} cannot be read "
            f"({error.strerror or error})"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{config_path} is not the config of a bundle or workdir: {error}"
        ) from error
    version, kind = config["format_version"], config["kind"]
    if version != FORMAT_VERSION or kind not in ("separator", "tagger"):
        raise UserError(
            f"{config_path} has format version {version} and kind {kind}; this version reads "
            f"format version {FORMAT_VERSION} and kind separator or tagger"
        )
    return Bundle(path, config, averaged, at_step)


def _run_and_step(path: pathlib.Path) -> tuple[pathlib.Path, int | None]:
    """Splits the folder of a checkpoint into the workdir and the step; None for other folders."""
    run, name = path.parent.parent, path.name
    of_checkpoint = path.parent.name == "checkpoints" and name.isascii() and name.isdecimal()
    if not of_checkpoint or (path / "config.json").exists() or not (run / "config.json").exists():
        return path, None
    steps = sorted(saved_steps(path.parent))
    if int(name) not in steps:
        raise UserError(
            f"{run} has no checkpoint of step {name}; it has {', '.join(map(str, steps)) or 'none'}"
        )
    return run, int(name)


def packaged_taggers() -> dict[str, Bundle]:
    """Returns the taggers in the package by the hash of their net."""
    bundles = [read_bundle(folder) for folder in PACKAGED.values()]
    taggers = [bundle for bundle in bundles if bundle.config["kind"] == "tagger"]
    return {bundle.config["hashes"]["query"]: bundle for bundle in taggers}


def write_bundle(
    path: str | os.PathLike,
    config: Mapping[str, Any],
    parts: Mapping[str, Variables],
    foreign: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes a bundle atomically, with hashes of its parts added to the config.

    Args:
      path: folder to create; must not exist yet.
      config: as in `Bundle`.
      parts: variables of each part.
      foreign: tensors of a foreign checkpoint without a counterpart here, kept verbatim.
    """
    path = pathlib.Path(path)
    if path.exists():
        raise UserError(f"{path} exists already; choose another name or remove it first")
    with replacing_folder(path) as unfinished:
        unfinished.mkdir()
        for part, variables in parts.items():
            save_tree(unfinished / part, dict(variables))
        if foreign:
            write_tensors(unfinished / "foreign.safetensors", foreign)
        hashes = {part: net_hash(variables) for part, variables in parts.items()}
        content = {"format_version": FORMAT_VERSION, **config, "hashes": hashes}
        (unfinished / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def net_hash(variables: Variables) -> str:
    """Returns the SHA-256 of the names, shapes, dtypes and values of a net's variables."""
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    for key, leaf in sorted((jax.tree_util.keystr(key), leaf) for key, leaf in leaves):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{key}{array.shape}{array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
