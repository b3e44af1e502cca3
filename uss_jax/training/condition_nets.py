"""The nets around a separator in training: detector and query net."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from uss_jax.anchors.conditions import ConditionTable
from uss_jax.anchors.table import AnchorTable
from uss_jax.bundles import nets
from uss_jax.bundles.bundle import MEANS, Bundle, net_hash, read_bundle, section_of_means
from uss_jax.bundles.checkpoints import latest_step, save_tree
from uss_jax.bundles.packaged import PACKAGED
from uss_jax.errors import UserError
from uss_jax.models.query import KINDS, QueryNet
from uss_jax.models.tagging import TaggingNet
from uss_jax.training.settings import SeparatorSettings
from uss_jax.training.texts import Texts


@dataclasses.dataclass(frozen=True)
class ConditionNets:
    """Detector and query net of a run.

    Attributes:
      sed: the detector that the workdir stores; None if it stores none.
      detects: whether the step runs it; with a table of anchors it is only stored, so that the
        workdir is a complete bundle.
      query: computes conditions.
      frozen: variables that the step needs and that do not train, of `sed` and `query`.
      trained: trainable variables of `query`.
    """

    sed: TaggingNet | None
    detects: bool
    query: QueryNet
    frozen: dict[str, Any]
    trained: dict[str, Any]

    @property
    def detector(self) -> TaggingNet | None:
        """The detector that the step runs, if it does."""
        return self.sed if self.detects else None

    def sections(self, settings: SeparatorSettings) -> dict[str, Any]:
        """Returns their sections of config.json."""
        fields = nets.fields_of(self.query)
        trains_on = {name: fields[name] for name in nets.TRAINS_ON}
        tagger = self.query.tagger
        model = tagger and nets.fields_of(tagger)
        found = {"query": {**settings.query_fields, **trains_on, "model": model}}
        if self.sed is not None:
            found["sed"] = {"model": nets.fields_of(self.sed)}
        return found


def load_condition_nets(
    settings: SeparatorSettings,
    workdir: pathlib.Path,
    table: AnchorTable | None = None,
    conditions: ConditionTable | None = None,
    texts: Texts | None = None,
    *,
    trains_on: Mapping[str, Any],
) -> ConditionNets:
    """Loads the nets from their bundles.

    A new run copies the frozen nets into the workdir. A run with a checkpoint reads these copies,
    so the bundles may have changed since.

    Args:
      settings: settings of the run.
      workdir: folder of the run.
      table: table of the anchors; None without one.
      conditions: conditions of its anchors; None without them.
      texts: sentence vectors of the classes' names; None without texts.
      trains_on: fields of the query net that tell what the run trains on.

    Raises:
      UserError: a bundle is missing or unsuitable, or table or conditions are of another net.
    """
    sed, frozen = None, {}
    detects = settings.anchors.source == "device"
    if detects or (table is not None and settings.sed_bundle):
        sed, frozen["sed"] = _source_bundle(settings, workdir, "sed").sed()
        _require_suitable(sed, "sed", settings)
        if table is not None:
            _require_detector_of(table, sed, frozen["sed"], settings)
        _keep(workdir, "sed", frozen["sed"])
        if not detects:
            del frozen["sed"]

    model, tagger = None, {"params": {}, "batch_stats": {}}
    if KINDS[settings.query["kind"]].recordings:
        bundle = _source_bundle(settings, workdir, "query")
        goes_on = bundle.path == workdir
        source, variables = bundle.query(bundle.frozen_or_zeros if goes_on else None)
        if source.tagger is None:
            raise _no_tagger(bundle, source.kind)
        _require_suitable(source.tagger, "query", settings)
        model = nets.fields_of(source.tagger)
        tagger = {item: {"tagger": variables[item]["tagger"]} for item in variables}
    query = nets.build_query({**settings.query_fields, **trains_on}, model)
    if conditions is not None:
        _require_query_of(conditions, query, tagger, settings)

    trained = {"params": {}, "batch_stats": {}}
    if query.finetune:
        tagger, trained = trained, tagger
    elif model is not None:
        _keep(workdir, "query", {item: tagger[item]["tagger"] for item in tagger})
    if texts is not None:
        names = {"params": {"names": texts.names[:, 0]}}
        _keep(workdir, "names", names)
        if latest_step(workdir / "checkpoints") is not None:
            names = read_bundle(workdir).variables("names")
        tagger["params"] = {**tagger["params"], **names["params"]}
    trained["params"] |= nets.init_adaptors(query, jax.random.key(settings.seed))
    return ConditionNets(sed, detects, query, {**frozen, "query": tagger}, trained)


def keep_means(workdir: pathlib.Path, means: np.ndarray | None) -> dict[str, Any]:
    """Stores the classes' mean vectors of a new run, if it has them, with its frozen nets.

    Returns:
      Their section of config.json, which a resumed run has if its first start stored them.
    """
    if latest_step(workdir / "checkpoints") is not None:
        saved = read_bundle(workdir).config
        return {MEANS: saved[MEANS]} if MEANS in saved else {}
    if means is None:
        return {}
    _keep(workdir, MEANS, {"params": {MEANS: means}})
    return section_of_means(means)


def shapes_of_condition_nets(settings: SeparatorSettings) -> ConditionNets:
    """Returns what `load_condition_nets` returns, with shapes instead of arrays.

    A net without a bundle gets the published architecture named by `sed_net` or `query_net`.

    Raises:
      UserError: a bundle is missing or unsuitable.
    """

    def model(part: str) -> dict[str, Any]:
        location = getattr(settings, f"{part}_bundle")
        if not location:
            return {"net": getattr(settings, f"{part}_net"), "sample_rate": settings.sample_rate}
        bundle = read_bundle(location).at_sample_rate(settings.sample_rate)
        section = bundle.section(part)
        if not section.get("model"):
            raise _no_tagger(bundle, section.get("kind", "soft"))
        return section["model"]

    sed, frozen = None, {}
    detects = settings.anchors.source == "device"
    if detects or (settings.anchors.source == "table" and settings.sed_bundle):
        sed = nets.build_sed(model("sed"))
        nets.require_classes(sed, "config.sed_bundle")
        _require_suitable(sed, "sed", settings)
        if detects:
            frozen["sed"] = nets.layout(sed)
    has_tagger = KINDS[settings.query["kind"]].recordings
    query = nets.build_query(settings.query_fields, model("query") if has_tagger else None)
    tagger, trained = ({"params": {}, "batch_stats": {}} for _ in range(2))
    if has_tagger:
        nets.require_classes(query.tagger, "config.query_bundle")
        _require_suitable(query.tagger, "query", settings)
        tagger = {name: {"tagger": tree} for name, tree in nets.layout(query.tagger).items()}
    if query.finetune:
        tagger, trained = trained, tagger
    parts = nets.parts_of_query(query)
    tagger["params"] = {**tagger["params"], **parts.pop("names", {})}
    trained["params"] = {**trained["params"], **parts}
    return ConditionNets(sed, detects, query, {**frozen, "query": tagger}, trained)


def _require_detector_of(
    table: AnchorTable, sed: TaggingNet, variables: Any, settings: SeparatorSettings
) -> None:
    """Raises a UserError unless a table was mined with this detector."""
    if not table.mined_with(sed, net_hash(variables)):
        raise UserError(
            f"{settings.anchors.table} was mined with another detector than config.sed_bundle="
            f"{settings.sed_bundle}; mine again with this one, or set config.sed_bundle to that one"
        )


def _require_query_of(
    conditions: ConditionTable, query: QueryNet, tagger: Any, settings: SeparatorSettings
) -> None:
    """Raises a UserError unless conditions were mined with this query net."""
    header = conditions.header
    if header["output"] != query.takes.reads:
        raise UserError(
            f"{conditions.path} holds the output {header['output']} of its query net, "
            f"config.query.kind={query.kind} needs {query.takes.reads}; mine with "
            f"--query-output {query.takes.reads}"
        )
    found = net_hash({item: tagger[item]["tagger"] for item in tagger})
    if not conditions.mined_with(query.tagger, found):
        raise UserError(
            f"{conditions.path} was mined with another query net than config.query_bundle="
            f"{settings.query_bundle}; mine again with this one, or set config.query_bundle to "
            "that one"
        )


def _source_bundle(settings: SeparatorSettings, workdir: pathlib.Path, part: str) -> Bundle:
    if latest_step(workdir / "checkpoints") is not None:
        bundle = read_bundle(workdir)
        if part in bundle.config:
            return bundle
    location = getattr(settings, f"{part}_bundle")
    if not location:
        raise UserError(
            f"config.{part}_bundle is empty; give a tagger's bundle or workdir "
            "(`uss-jax convert` and `uss-jax train-tagger` make them)"
        )
    return read_bundle(location).at_sample_rate(settings.sample_rate)


def _keep(workdir: pathlib.Path, part: str, variables: dict[str, Any]) -> None:
    if latest_step(workdir / "checkpoints") is None:
        save_tree(workdir / "frozen" / part, variables)


def _no_tagger(bundle: Bundle, kind: str) -> UserError:
    return UserError(f"{bundle.path} has no tagging net: its conditions are {kind}")


def _require_suitable(net: TaggingNet, part: str, settings: SeparatorSettings) -> None:
    """Raises a UserError if a net is another, or of another sampling rate, than the config says."""
    found, wanted = nets.fields_of(net)["net"], getattr(settings, f"{part}_net")
    if found != wanted and getattr(settings, f"{part}_bundle") not in PACKAGED:
        raise UserError(
            f"config.{part}_bundle holds the net {found}, config.{part}_net is {wanted}; give "
            f"another bundle or --config.{part}_net={found}"
        )
    if net.sample_rate != settings.sample_rate:
        raise UserError(
            f"config.{part}_bundle is a net for {net.sample_rate} Hz, config.sample_rate is "
            f"{settings.sample_rate}"
        )
