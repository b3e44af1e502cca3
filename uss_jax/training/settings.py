"""Settings of a training run: a config, checked as a whole and read into frozen dataclasses.

The fields are the keys of the config, documented in configs/resunet30.py and tagger_cnn14.py. A
field with a default is optional; the default is what runs did before the key existed.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
from ml_collections import ConfigDict

from uss_jax.anchors.detect import RULES
from uss_jax.audio import HIGHEST_SAMPLE_RATE, LOWEST_SAMPLE_RATE
from uss_jax.devices.mesh import check_rules
from uss_jax.devices.precision import PRECISIONS
from uss_jax.disk.checked_json import Rule, number, record, text, whole
from uss_jax.errors import UserError
from uss_jax.models.norm import MOMENTUM, SCOPES
from uss_jax.models.query import KINDS, Kind
from uss_jax.training.asking import check_shares
from uss_jax.training.augment import AUGMENTATIONS
from uss_jax.training.examples import Mixing
from uss_jax.training.losses import LOSSES
from uss_jax.training.optim import OPTIMIZERS
from uss_jax.training.sections import MOST, one_of, read_section

Settings = TypeVar("Settings")


@dataclasses.dataclass(frozen=True)
class Data:
    """Section `data`: records and the order in which their clips are drawn."""

    records: str
    split: str
    order: str
    clip_seconds: float
    threads: int
    workers: int = 0
    share: float = 1.0
    class_weights: Mapping[str, int] = dataclasses.field(default_factory=dict)
    max_corrupt: int = 0
    verify: str = "whole"


@dataclasses.dataclass(frozen=True)
class Profile:
    """Section `profile`: the steps to trace, (first, last) or none."""

    steps: Sequence[int]


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Keys of every run."""

    seed: int
    sample_rate: int
    segment_seconds: float
    total_steps: int
    global_batch: int
    data: Data
    schedule: Mapping[str, Any]
    weight_decay: float
    max_skipped_steps: int
    log_every_steps: int
    checkpoint_every_steps: int
    keep_checkpoints: int
    profile: Profile
    keep_best: int = 0
    best_by: str = "sdri"
    clip_norm: float = 0.0
    # The largest ratio in a healthy float32 run of 827 steps was 10.
    max_norm_ratio: float = 100.0
    damaged_checkpoint: str = "set_aside"
    init_from: str = ""
    init_partly: bool = False
    precision: str = "default"
    speed: Mapping[str, float] | None = None
    sharding: Sequence[Any] = ()

    @property
    def segment_samples(self) -> int:
        """Length of an anchor, in samples."""
        return round(self.segment_seconds * self.sample_rate)

    @property
    def clip_samples(self) -> int:
        """Length to which clips are padded or cut, in samples."""
        return round(self.data.clip_seconds * self.sample_rate)

    @property
    def read_samples(self) -> int:
        """Length of what is read of each clip, in samples."""
        return self.clip_samples


@dataclasses.dataclass(frozen=True)
class AnchorSettings:
    """Section `anchors`: where anchors come from."""

    source: str
    min_dbfs: float
    rule: str = RULES[0]
    table: str = ""
    min_score: float = 0.0
    top_k: int = 1
    jitter_samples: int = 0


@dataclasses.dataclass(frozen=True)
class AskingSettings:
    """Keys of section `query` that do not define the net: what items are asked with."""

    source: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"own": 1.0})
    table: str = ""
    groups: str = ""
    text_encoder: str = ""
    captions: str = ""
    text_share: float = 0.5


@dataclasses.dataclass(frozen=True)
class MixingSettings(Mixing):
    """Section `mixing`: how anchors are mixed, and arranged before (`order`)."""

    order: str = "reference"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Section `eval`: pairs on which the separator is evaluated while it trains."""

    pairs: str
    every_steps: int
    queries: Sequence[str] = ("average", "class")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeparatorSettings(RunSettings):
    """Keys of a separator's run."""

    loss: str
    anchors: AnchorSettings
    mixing: MixingSettings
    query: Mapping[str, Any]
    separator: Mapping[str, Any]
    eval: Evaluation
    ema_decay: float
    accumulate: int
    batch_norm: str
    remat: bool
    sed_bundle: str = ""
    sed_net: str = "cnn14"
    query_bundle: str = ""
    query_net: str = "cnn14"

    @property
    def best_query(self) -> str | None:
        """The query of `best_by`; None for the sources."""
        return _BEST_BY.fullmatch(self.best_by)[1]

    @property
    def read_samples(self) -> int:
        """With anchors of a table, an anchor and as much around it as `speed` can need."""
        if self.anchors.source != "table":
            return self.clip_samples
        longest = math.ceil(self.segment_samples * (self.speed["most"] if self.speed else 1))
        return max(self.segment_samples, min(longest, self.clip_samples))

    @property
    def query_fields(self) -> dict[str, Any]:
        """The keys of section `query` that define the net."""
        asking = {field.name for field in dataclasses.fields(AskingSettings)}
        return {key: value for key, value in self.query.items() if key not in asking}

    @property
    def asking(self) -> "AskingSettings":
        """The other keys of section `query`."""
        asking = {key: self.query[key] for key in self.query if key not in self.query_fields}
        return AskingSettings(**asking)

    @property
    def norm_scope(self) -> str | int:
        """Scope of batch norms: one of SCOPES, or a number of items."""
        return self.batch_norm if self.batch_norm in SCOPES else int(self.batch_norm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaggerSettings(RunSettings):
    """Keys of a tagger's run."""

    optimizer: str
    tagger: Mapping[str, Any]
    outputs: Sequence[str]
    mixup_alpha: float | None
    spec_augment: Mapping[str, int] | None
    noise: Mapping[str, float] | None
    norm_momentum: float = MOMENTUM

    @property
    def clips_per_step(self) -> int:
        """Clips read for a step, over all hosts: mixup blends pairs of them."""
        return self.global_batch * (1 if self.mixup_alpha is None else 2)


def _class_weights(value: Any, key: str) -> None:
    record({}, others=True)(value, key)
    for label, draws in value.items():
        whole(0, 10_000)(draws, f"{key}[{label!r}]")


def _shares(value: Any, key: str) -> None:
    record({}, others=True)(value, key)
    for kind, share in value.items():
        number(0, 1)(share, f"{key}.{kind}")


def _steps(value: Any, key: str) -> None:
    integers = isinstance(value, Sequence) and all(isinstance(step, int) for step in value)
    if value and not (integers and len(value) == 2 and 1 <= value[0] <= value[1]):
        raise ValueError(
            f"{key} is {value!r}, expected (first, last): the first and the last step to trace, "
            "from 1"
        )


def _each(rule: Rule) -> Rule:
    def check(value: Any, key: str) -> None:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{key} is {value!r}, expected several numbers")
        for at, item in enumerate(value):
            rule(item, f"{key}[{at}]")

    return check


# What an evaluation in training can ask with besides the sources, and the metrics by which the best
# checkpoint can be chosen, see live.py.
_QUERY = r"average|mean|class|text|shuffled|recordings_(?:100|[1-9][0-9]?)"
_BEST_BY = re.compile(rf"(?:({_QUERY})_)?(?:si_)?sdri")


def _queries(value: Any, key: str) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(set(value)) < len(value):
        raise ValueError(f"{key} is {value!r}, expected names of queries, none of them twice")
    for query in value:
        if not isinstance(query, str) or not re.fullmatch(_QUERY, query):
            raise ValueError(
                f"{key} has {query!r}, expected average, mean, class, text, shuffled, or "
                "recordings_N with N from 1 to 100"
            )


def _best_by(value: Any, key: str) -> None:
    if not isinstance(value, str) or not _BEST_BY.fullmatch(value):
        raise ValueError(
            f"{key} is {value!r}, expected sdri or si_sdri, or one of these after a query of "
            "config.eval.queries, such as average_sdri"
        )


# Rules of keys by dotted name; other keys follow that of their type.
_RULES: dict[str, Rule] = {
    **AUGMENTATIONS,
    "seed": whole(0, 2**32 - 1),
    "sample_rate": whole(LOWEST_SAMPLE_RATE, HIGHEST_SAMPLE_RATE),
    "segment_seconds": number(0.01, 600),
    "weight_decay": number(0, 1e3),
    "clip_norm": number(0, 1e30),
    "keep_best": whole(0, MOST),
    "best_by": _best_by,
    "damaged_checkpoint": one_of("set_aside", "stop"),
    "precision": text(*PRECISIONS),
    "loss": one_of(*LOSSES),
    "optimizer": one_of(*OPTIMIZERS),
    "schedule": record(
        {"name": text()},
        {
            "learning_rate": number(0, 1e3),
            "warm_up_steps": whole(0, MOST),
            "reduce_lr_steps": whole(1, MOST),
            "total_steps": whole(1, MOST),
            "boundaries": _each(whole(0, MOST)),
            "scales": _each(number(0, 1e6)),
        },
        others=True,
    ),
    "query": record(
        {"kind": one_of(*KINDS)},
        {
            "dropout": number(),
            "source": _shares,
            "text_share": number(0, 1),
            **dict.fromkeys(("table", "groups", "text_encoder", "captions"), text()),
        },
        others=True,
    ),
    "profile.steps": _steps,
    "data.order": one_of("balanced", "uniform"),
    "data.clip_seconds": number(0.01, 3600),
    "data.class_weights": _class_weights,
    "data.threads": whole(1, 256),
    "data.workers": whole(0, 1024),
    "data.max_corrupt": whole(0, MOST),
    "data.verify": one_of("whole", "always"),
    "anchors.source": one_of("device", "table", "random"),
    "anchors.rule": one_of(*RULES),
    "anchors.min_dbfs": number(-1000, 0),
    "anchors.jitter_samples": whole(0, MOST),
    "mixing.gain_db": number(0, 200),
    "mixing.pan": number(0, 1),
    "mixing.order": one_of("reference", "conflict_free"),
    "eval.every_steps": whole(0, MOST),
    "eval.queries": _queries,
}


def separator_settings(config: ConfigDict) -> SeparatorSettings:
    """Reads and checks the config of a separator's run.

    Raises:
      UserError: a key is missing, invalid, inconsistent with others, or does not suit the devices.
    """
    values = config.to_dict()
    remedy = "give a separator's config, such as resunet30 (`train-tagger` takes those of taggers)"
    settings = _checked(SeparatorSettings, values, remedy)
    _check_batch(settings, settings.accumulate, settings.mixing.group_size)
    _check_separator(settings)
    _check_mixing(settings.mixing)
    return settings


def tagger_settings(config: ConfigDict) -> TaggerSettings:
    """Reads and checks the config of a tagger's run; errors as in `separator_settings`."""
    remedy = "give a tagger's config, such as tagger_cnn14 or quickstart:part=tagger"
    settings = _checked(
        TaggerSettings, config.to_dict(), f"{remedy} (`train` takes those of separators)"
    )
    _check_batch(settings, 1, 1)
    if not 0 < settings.norm_momentum <= 1:
        raise UserError(
            f"config.norm_momentum is {settings.norm_momentum}, expected above 0 and at most 1"
        )
    return settings


def _checked(kind: type[Settings], values: Mapping[str, Any], remedy: str) -> Settings:
    """Reads settings; checks each key by itself, and those of every run together."""
    _require_values(values, "config")

    def remedy_of(key: str) -> str:
        return (
            "set it (every shipped config does)" if key.split(".")[0] in _OF_EVERY_RUN else remedy
        )

    settings = read_section(kind, values, _RULES, remedy_of)
    _check_run(settings)
    return settings


_OF_EVERY_RUN = frozenset(field.name for field in dataclasses.fields(RunSettings))


def _require_values(section: Mapping[str, Any], where: str) -> None:
    """Raises a UserError if a key is None, except augmentations, which None turns off."""
    for key, value in section.items():
        if isinstance(value, Mapping):
            _require_values(value, f"{where}.{key}")
        elif value is None and not (where == "config" and key in AUGMENTATIONS):
            off = ", ".join(AUGMENTATIONS)
            raise UserError(f"{where}.{key} is None; give it a value (only {off} may be None)")


def _check_run(settings: RunSettings) -> None:
    if not 0 < settings.data.share <= 1:
        raise UserError(
            f"config.data.share is {settings.data.share}, expected above 0 and at most 1"
        )
    if settings.init_partly and not settings.init_from:
        raise UserError("config.init_partly has no effect without config.init_from")
    ratio = settings.max_norm_ratio
    if not (ratio == 0 or ratio > 1):
        raise UserError(
            f"config.max_norm_ratio is {ratio}, expected more than 1, or 0 for no limit: an update "
            "is skipped if its gradient norm exceeds that multiple of the running median"
        )
    if settings.segment_seconds > settings.data.clip_seconds:
        raise UserError(
            f"config.segment_seconds={settings.segment_seconds} is longer than "
            f"config.data.clip_seconds={settings.data.clip_seconds}; change one of them"
        )
    check_rules(settings.sharding)


def _check_batch(settings: RunSettings, parts: int, group_size: int) -> None:
    """Raises a UserError unless devices, accumulated parts and groups divide the batch evenly."""
    batch, devices = settings.global_batch, jax.device_count()
    times = f" times config.accumulate={parts}" if parts > 1 else ""
    if batch % (devices * parts):
        lower = batch // (devices * parts) * devices * parts
        raise UserError(
            f"config.global_batch={batch} is not divisible by {devices} devices{times}; use "
            f"{' or '.join(str(n) for n in (lower, lower + devices * parts) if n)}"
        )
    if batch % (group_size * parts):
        raise UserError(
            f"config.global_batch={batch} is not divisible by "
            f"config.mixing.group_size={group_size}{times}; change one of them"
        )


def _check_separator(settings: SeparatorSettings) -> None:
    channels, pan = settings.separator.get("audio_channels", 1), settings.mixing.pan
    if channels != (2 if pan else 1):  # records are mono
        raise UserError(
            f"config.mixing.pan={pan:g} makes mixtures of {2 if pan else 1} channels, "
            f"config.separator.audio_channels is {channels}; change one of them"
        )
    if settings.eval.pairs and settings.eval.every_steps < 1:
        raise UserError(
            f"config.eval.every_steps is {settings.eval.every_steps}, expected at least 1"
        )
    _check_asking(settings)
    if settings.best_by != RunSettings.best_by and not settings.eval.pairs:
        raise UserError(
            f"config.best_by={settings.best_by} has no effect without config.eval.pairs; give "
            "pairs, which `uss-jax make-pairs` makes"
        )
    rule, source = settings.anchors.rule, settings.anchors.source
    if settings.anchors.table and source != "table":
        raise UserError(
            f"config.anchors.table has no effect with config.anchors.source={source}; set it to "
            "table, or leave the other empty"
        )
    if source != "device" and rule != RULES[0]:
        raise UserError(
            f"config.anchors.rule={rule} has no effect with config.anchors.source={source}; leave "
            f"it at {RULES[0]} (`mine --rule` sets that of a table)"
        )
    part, scope = settings.global_batch // settings.accumulate, settings.batch_norm
    items = int(scope) if scope.isdigit() else 0
    if scope not in SCOPES and (not items or part % items):
        raise UserError(
            f"config.batch_norm is {scope!r}, expected {', '.join(SCOPES)} or a number of items "
            f"that divides {part}"
        )
    for key, share in (
        ("mixing.silent_share", settings.mixing.silent_share),
        ("ema_decay", settings.ema_decay),
        ("query.dropout", settings.query.get("dropout", 0.0)),
    ):
        if not 0 <= share < 1:
            raise UserError(f"config.{key} is {share}, expected at least 0 and below 1")


def _check_asking(settings: SeparatorSettings) -> None:
    asking, kind = settings.asking, KINDS[settings.query["kind"]]
    if asking.groups and not (asking.source.get("other") or asking.source.get("mix")):
        raise UserError(
            "config.query.groups has no effect without config.query.source.other or mix; leave it "
            "empty"
        )
    best = settings.best_query
    if best and best not in settings.eval.queries:
        raise UserError(
            f"config.best_by={settings.best_by} needs {best} in config.eval.queries, which is "
            f"{', '.join(settings.eval.queries) or 'empty'}"
        )
    if best in ("class", "mean") and not kind.probabilities:
        raise UserError(
            f"config.best_by={settings.best_by} needs conditions of probabilities, which "
            f"config.query.kind={settings.query['kind']} are not; choose sdri"
        )
    if best == "mean" and not asking.table:
        raise UserError(
            f"config.best_by={settings.best_by} needs means of classes, which a run on mined "
            "conditions stores (config.query.table); choose sdri"
        )
    if best == "text" and not (kind.texts and kind.recordings):
        raise UserError(
            f"config.best_by={settings.best_by} needs conditions of texts or sounds, which "
            f"config.query.kind={settings.query['kind']} are not; choose sdri"
        )
    _check_texts(asking, kind, settings.query["kind"])
    check_shares(asking.source, bool(asking.table))
    if asking.table and not kind.recordings:
        raise UserError(
            f"config.query.table has no effect with config.query.kind={settings.query['kind']}, "
            "whose conditions are not computed from anchors; leave it empty"
        )
    if settings.query.get("finetune") and not kind.recordings:
        raise UserError(
            f"config.query.finetune has no effect with config.query.kind={settings.query['kind']}, "
            "whose conditions no tagging net computes; leave it False"
        )
    if settings.query.get("shortcut") and not settings.query.get("adaptor_width"):
        raise UserError(
            "config.query.shortcut has no effect without an adaptor; set config.query.adaptor_width"
        )
    if asking.table and settings.query.get("finetune"):
        raise UserError(
            "config.query.table holds the conditions of a net that config.query.finetune=True "
            "changes; set one of them only"
        )
    if asking.table and settings.anchors.source != "table":
        raise UserError(
            "config.query.table holds the conditions of mined anchors; set "
            "config.anchors.source=table and config.anchors.table to those it was mined with"
        )
    if asking.source.get("masked") and not kind.probabilities:
        raise UserError(
            "config.query.source.masked needs conditions of probabilities: config.query.kind="
            + " or ".join(name for name, kind in KINDS.items() if kind.probabilities)
        )


def _check_texts(asking: AskingSettings, kind: Kind, name: str) -> None:
    """Raises a UserError for keys on texts that have no effect."""
    given = [key for key in ("text_encoder", "captions") if getattr(asking, key)]
    if given and not kind.texts:
        raise UserError(
            f"config.query.{given[0]} has no effect with config.query.kind={name}, whose "
            "conditions are not made of texts; leave it empty"
        )
    if asking.text_share != AskingSettings.text_share and not (kind.texts and kind.recordings):
        raise UserError(
            f"config.query.text_share={asking.text_share:g} has no effect with "
            f"config.query.kind={name}, whose conditions are not of texts or sounds; leave it at "
            f"{AskingSettings.text_share:g}"
        )
    if given and not asking.text_share:
        raise UserError(
            f"config.query.{given[0]} has no effect with config.query.text_share=0, which asks "
            "with no text; raise it"
        )


def _check_mixing(mixing: MixingSettings) -> None:
    sources, group = mixing.sources, mixing.group_size
    if mixing.all_targets and group % sources:
        raise UserError(
            f"config.mixing.all_targets needs config.mixing.group_size={group} to be a multiple of "
            f"config.mixing.sources={sources}"
        )
    if mixing.silent_share and sources >= group:
        raise UserError(
            f"config.mixing.silent_share={mixing.silent_share} needs a config.mixing.group_size "
            f"above config.mixing.sources={sources}: a silent item is queried with a sound of its "
            "group that is outside its mixture"
        )
    if sources > group:
        raise UserError(
            f"config.mixing.sources={sources} is not between 1 and config.mixing.group_size="
            f"{group}; change one of them"
        )
