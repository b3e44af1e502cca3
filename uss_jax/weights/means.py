"""The mean vectors of classes for a model, from conditions that were mined with its query net."""

import os
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from uss_jax.anchors.conditions import class_means, folder_of, open_conditions
from uss_jax.anchors.table import read_table, usable
from uss_jax.bundles.bundle import Bundle, net_hash
from uss_jax.data.index import load_index
from uss_jax.errors import UserError
from uss_jax.evaluation.clips import MIN_DBFS


def means_of(
    bundle: Bundle, table: str | os.PathLike, records: str | os.PathLike, split: str
) -> Float[np.ndarray, "k k"]:
    """Averages the mined vectors of each class: those of all its clips with a usable anchor.

    Anchors are usable as the run that made the model says, or from -60 dBFS on.

    Args:
      bundle: a separator whose conditions are made of probabilities.
      table: table of anchors, with its conditions beside it.
      records: folder of the records.
      split: their split.

    Raises:
      UserError: the conditions are of another query net, or cannot be read; or the model is asked
        otherwise.
    """
    query, _ = bundle.query()
    if not query.takes.probabilities:
        raise UserError(
            f"{bundle.name} takes conditions of the kind {query.kind}, which means of "
            "probabilities are none of; leave out --class-means"
        )
    index = load_index(records, split)
    segment = round(bundle.config["segment_seconds"] * bundle.config["sample_rate"])
    anchors = read_table(table, index, segment, bundle.name, "give another model")
    conditions = open_conditions(folder_of(table), anchors, index, verify=True)
    same = conditions.mined_with(query.tagger, net_hash(bundle.variables("query")))
    if conditions.header["output"] != query.takes.reads or not same:
        raise UserError(
            f"{conditions.path} was mined with another query net than that of {bundle.name}, or "
            f"holds another output of it; mine with --query {bundle.name}"
        )
    asked = {"min_score": 0.0, "min_dbfs": MIN_DBFS}
    of_run = bundle.config.get("training", {}).get("anchors")
    if isinstance(of_run, Mapping):
        asked |= {name: of_run[name] for name in asked.keys() & of_run.keys()}
    for name, value in asked.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(
                f"{bundle.name}: training.anchors.{name} of its config is {value!r}, expected a "
                "number; export the model anew"
            )
    return class_means(conditions, index, usable(anchors, **asked), query.takes.weighs_vectors)
