"""Recipes, and the whole job: two tables go in, a bundle that recommends comes out.

A recipe is a function of the data's size that returns frozen settings. `train` runs it:

    read → align → split → text vectors → tokenizer → semantic IDs → TIGER → the other networks → baselines
         → funnel → test → bundle

A ranking recipe is the settings themselves; `train_ranker` runs it:

    read → align → split → features → requests → network → test → ranker

and `add_ranker` makes it a part of a bundle.

Long work leaves checkpoints in a folder beside the bundle. A run that was killed goes on when the same
command is given again, and the folder goes when the bundle is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import polars as pl
import torch
from filelock import FileLock, Timeout

from tiglon.data.events import Table, align, ids_of, read_interactions, read_items, read_table
from tiglon.data.features import ACTIVITY, GAP, ITEM, Feature, FeatureSchema, Role, fit
from tiglon.data.folders import written_aside
from tiglon.data.histories import CLUSTER_SIZE, HistoryStore
from tiglon.data.inspect import odd_ids, time_span
from tiglon.data.ranking import (
    NEXT_BASKET,
    QUANTITY_2,
    WITHIN_30_DAYS,
    BasketConfig,
    RankingTask,
    next_basket,
)
from tiglon.data.split import Split, leave_last_out, moment_starts
from tiglon.data.text import SentenceTransformer, TfidfSvd, VectorColumn, render, template_of, text_columns
from tiglon.errors import (
    BundleChangedError,
    BundleError,
    ConfigError,
    DataError,
    StorageError,
    did_you_mean,
    require_weights,
)
from tiglon.evaluation.protocol import to_json
from tiglon.evaluation.ranking import RankingEvaluation
from tiglon.ranking.cluster_store import ClusterStore
from tiglon.ranking.model import LifelongConfig, LifelongRanker, is_ranker
from tiglon.ranking.units import NONE, UNITS
from tiglon.retrieval.behaviour import BehaviourVectors, co_occurrence_vectors
from tiglon.retrieval.comirec import ComiRec, ComiRecConfig
from tiglon.retrieval.dense import DenseRetriever
from tiglon.retrieval.eager import Eager, EagerConfig, behaviour_vectors, eager_ids
from tiglon.retrieval.eager_network import BEHAVIOUR, SEMANTIC
from tiglon.retrieval.mind import Mind, MindConfig
from tiglon.retrieval.neighbours import NeighbourSum, Popularity, Repeats, TextConfig, text_template
from tiglon.retrieval.sasrec import SasRec, SasRecConfig
from tiglon.retrieval.tiger import Tiger, TigerConfig
from tiglon.retrieval.tiger_causal import CausalConfig
from tiglon.retrieval.tiger_paper import PaperConfig
from tiglon.retrieval.two_tower import TwoTower, TwoTowerConfig
from tiglon.semantic_ids import tokenizer as tokenizers
from tiglon.semantic_ids.catalog import SemanticIds
from tiglon.semantic_ids.kmeans import ResidualKMeans
from tiglon.semantic_ids.lsh import LSH
from tiglon.semantic_ids.random_ids import RandomIds
from tiglon.semantic_ids.rqvae import RQVAEConfig, RQVAETokenizer
from tiglon.semantic_ids.tokenizer import Tokenizer
from tiglon.serving.bundle import Bundle, ItemText, codes_of, is_bundle, require_free, require_same_log
from tiglon.serving.funnel import FunnelConfig
from tiglon.serving.publish import bundle_folder, publish
from tiglon.train import checkpoint
from tiglon.train.loop import Progress, TrainConfig
from tiglon.types import Interactions, Items, Targets, Vocabulary, hash_ids

# -- settings ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ItemTextConfig:
    template: str | None = None  # such as "{title}. {brand}"; None: every column of `text_columns`
    encoder: str = "tfidf"  # or "column:NAME" (vectors of the table), or a sentence-transformers model
    dim: int = 256  # width of "tfidf"; paper: 768 of Sentence-T5


@dataclass(frozen=True)
class IdsConfig:
    tokenizer: Literal["residual-kmeans", "rqvae", "lsh", "random"] = "residual-kmeans"  # paper: rqvae
    levels: int = 3  # paper: 3, and the collision digit
    codes: int = 256  # a level; paper: 256
    behaviour: float = 0.7  # weight of what is used together beside text, whose weight is 1; paper: 0
    seed: int = 0

    def __post_init__(self) -> None:
        known = ("residual-kmeans", "rqvae", "lsh", "random")
        if self.tokenizer not in known:
            raise ConfigError(f"tokenizer '{self.tokenizer}'", fix=did_you_mean(self.tokenizer, known))
        require_weights(self, "behaviour", "seed")


@dataclass(frozen=True)
class Recipe:
    """Everything that a run depends on beside its data."""

    name: str
    text: ItemTextConfig = field(default_factory=ItemTextConfig)
    ids: IdsConfig = field(default_factory=IdsConfig)
    tiger: TigerConfig = field(default_factory=TigerConfig)
    retrievers: tuple[str, ...] = (
        "sasrec",
        "two_tower",
    )  # that learn beside TIGER; others: mind, comirec, eager
    sasrec: SasRecConfig = field(default_factory=SasRecConfig)
    two_tower: TwoTowerConfig = field(default_factory=TwoTowerConfig)
    mind: MindConfig = field(default_factory=MindConfig)
    comirec: ComiRecConfig = field(default_factory=ComiRecConfig)
    eager: EagerConfig = field(default_factory=EagerConfig)
    funnel: FunnelConfig = field(default_factory=FunnelConfig)
    exclude_seen: bool | None = None  # never recommend what a user had; None: unless the log repeats itself

    def __post_init__(self) -> None:
        known = (*DENSE, "eager")
        for name in self.retrievers:
            if name not in known:
                raise ConfigError(
                    f"no retriever named '{name}'",
                    rule=f"Beside TIGER and the baselines there are {', '.join(known)}",
                    fix=did_you_mean(name, known),
                )
        if len(set(self.retrievers)) < len(self.retrievers):
            raise ConfigError(f"retrievers={','.join(self.retrievers)}", rule="Each is named once")


# Dense retrievers by name: a recipe, the items and their content → one that has learned nothing yet.
DENSE: dict[str, Callable[[Recipe, Vocabulary, np.ndarray | None], DenseRetriever]] = {
    "sasrec": lambda recipe, items, content: SasRec(items, recipe.sasrec, content),
    "two_tower": lambda recipe, items, content: TwoTower(items, recipe.two_tower, content),
    "mind": lambda recipe, items, content: Mind(items, recipe.mind, content),
    "comirec": lambda recipe, items, content: ComiRec(items, recipe.comirec, content),
}


MINUTES = {"tiger": 14, "eager": 14}  # parts of a time budget; every other network has 3

RecipeFunction = Callable[[int, int], Recipe]


def tiger(events: int = 150_000, items: int = 12_000) -> Recipe:
    """The default: residual k-means IDs and the one-pass network, sized by the training events and items.

    Command   tiglon train --interactions F --items G --out BUNDLE
    Hardware  one thread (AVX-512, AMX bfloat16) of a busy machine: half an hour on Beauty's 154k events
    Score     test, nothing masked, Recall@10 and NDCG@10: Beauty .0903, .0497 (one seed, 12.6 minutes of two
              threads; docs/log.md)
    """
    if events < 50_000:
        model = CausalConfig(width=64, heads=2, hidden=256, encoder_layers=2, decoder_layers=2)
        settings = TigerConfig(model, TrainConfig(epochs=16, lr=2e-3, average=0.99), batch_targets=512)
    else:
        settings = TigerConfig(train=TrainConfig(epochs=_generative_epochs(events), evaluations=8))
    return Recipe(
        "tiger",
        ids=IdsConfig(codes=256 if items > 2_000 else 64),
        tiger=settings,
        **_others(events, items),
    )


def _generative_epochs(events: int) -> int:
    """So many that TIGER takes a quarter of an hour of one core, whatever the size."""
    return min(15, max(2, 1_000_000 // events))


def _others(events: int, items: int) -> dict[str, Any]:
    """Settings of all that may learn beside TIGER, each for a few minutes of one core, but EAGER, for as long as TIGER.

    An epoch of SASRec costs the events times the catalogue, and what a state costs; that of the others the events.
    """
    small = events < 50_000
    epochs = 2e10 / (max(events, 1) * (items + 5_000))
    sasrec = TrainConfig(
        epochs=int(min(20, max(1, epochs))), minutes=None if epochs > 0.5 else 5.0, evaluations=4
    )
    epochs = min(10, max(1, 600_000 // max(events, 1)))
    training = TrainConfig(epochs=epochs, evaluations=4, minutes=None if small else 5.0)
    if not small:
        return {
            "sasrec": SasRecConfig(train=sasrec),
            "two_tower": TwoTowerConfig(train=training),
            "mind": MindConfig(train=training),
            "comirec": ComiRecConfig(train=training),
            "eager": EagerConfig(train=TrainConfig(epochs=_generative_epochs(events), evaluations=8)),
        }
    return {
        "sasrec": SasRecConfig(width=64, heads=2, hidden=256, train=sasrec),
        "two_tower": TwoTowerConfig(width=64, hidden=256, train=training),
        "mind": MindConfig(width=64, hidden=256, train=training),
        "comirec": ComiRecConfig(width=64, train=training),
        "eager": EagerConfig(
            CausalConfig(width=64, heads=2, hidden=256, encoder_layers=1, decoder_layers=1, pairs=50_000),
            replace(training, lr=2e-3),
            branches=64,
        ),
    }


def tiger_paper(events: int = 150_000, items: int = 12_000) -> Recipe:
    """The network and the tokenizer of the paper, whatever the size of the data.

    Command   tiglon train --recipe tiger_paper --interactions F --items G --out BUNDLE
    Score     not measured yet; the paper reports Recall@10 .0648 and NDCG@10 .0384 on Beauty
    """
    settings = TigerConfig(
        PaperConfig(),
        TrainConfig(epochs=200, lr=3e-4, weight_decay=0.035),
        window=20,
        batch_targets=256,
        renormalise=False,
    )
    return Recipe(
        "tiger_paper",
        ids=IdsConfig(tokenizer="rqvae", behaviour=0.0),
        tiger=settings,
        **_others(events, items),
        exclude_seen=False,
    )


RECIPES: dict[str, RecipeFunction] = {"tiger": tiger, "tiger_paper": tiger_paper}

# Every ranking recipe has the same short-term unit, sizes and training, so that rows of a table differ by
# the long-term unit alone. Command: tiglon train --recipe twin --interactions F --items G --out RANKER.
RANKING_RECIPES: dict[str, LifelongConfig] = {
    **{unit: LifelongConfig(long=unit) for unit in UNITS},
    "short": LifelongConfig(long="none"),  # the short-term unit alone
}


# -- changing one setting ------------------------------------------------------------------------------


Settings = TypeVar("Settings", Recipe, LifelongConfig, EagerConfig)


def override(recipe: Settings, changes: Mapping[str, str]) -> Settings:
    """The recipe with settings replaced, as `--set key=value` names them: {"train.lr": "0.002"}.

    Settings of TIGER need no prefix: train.lr, model.width, window; others are text.…, ids.…, exclude_seen.
    Values are read by the setting's type. Raises ConfigError for an unknown key or an unreadable value.
    """
    places = {".".join(path).removeprefix("tiger."): path for path in _paths(recipe)}
    for key, text in changes.items():
        path = places.get(key.removeprefix("tiger."))
        if path is None:
            raise ConfigError(f"unknown setting '{key}'", fix=did_you_mean(key, places))
        recipe = _replaced(recipe, path, key, text)
    return recipe


def _paths(settings: Any) -> Iterator[tuple[str, ...]]:
    """Where the plain values are."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        if is_dataclass(value):
            yield from ((f.name, *path) for path in _paths(value))
        elif f.name != "name":
            yield (f.name,)


def _replaced(settings: Any, path: tuple[str, ...], key: str, text: str) -> Any:
    name, *rest = path
    if rest:
        value = _replaced(getattr(settings, name), tuple(rest), key, text)
    else:
        value = _parsed(text, typing.get_type_hints(type(settings))[name], key)
    return replace(settings, **{name: value})


def _parsed(text: str, kind: Any, key: str) -> Any:
    """`text` as a value of the annotated type."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    if type(None) in options and text.lower() == "none":
        return None
    kind = next(option for option in options if option is not type(None))
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind in (int, float):
            number = kind(text)
            if number != number:
                raise ValueError
            return number
        if typing.get_origin(kind) is tuple:
            inner, parts = typing.get_args(kind), text.split(",")
            if inner[-1] is Ellipsis:
                parts = parts if text else []
                inner = inner[:1] * len(parts)
            return tuple(t(part) for t, part in zip(inner, parts, strict=True))
    except (ValueError, KeyError) as error:
        named = getattr(kind, "__name__", str(kind)) if typing.get_origin(kind) is None else str(kind)
        raise ConfigError(f"{key}={text}", rule=f"{key} is of type {named}") from error
    return text


# -- what the data say ----------------------------------------------------------------------------------

REPEATING = 0.10  # share of events from which a log counts as consumption that repeats

_FEW = 1_000  # values that a category of the log has at most


_ASKING: dict[str, Feature] = {  # what a log says of who asks
    ACTIVITY: Feature(ACTIVITY, "context", "number"),
    "user_id": Feature("user_id", "user"),
}


def ranking_schema(items: Items, log: Interactions, gate_by: Sequence[str] = ()) -> FeatureSchema:
    """What a ranker reads of these tables.

    Of an item: its id, numbers, and the columns that sort items into groups, those with at most half as many
    values as there are items (16 wide above a hundred values, else 8). Of a behaviour: how long ago it was,
    and the numbers and categories of its line. Left out: lists, dates, columns whose names end in "id" on the
    lines of the log, texts with more than a thousand values there, columns of one value, and columns of the
    log named like one of the items. Of who asks: what `gate_by` names, of "activity" (how many behaviours came before)
    and "user_id". Raises ConfigError for another name.
    """
    for name in gate_by:
        if name not in _ASKING:
            raise ConfigError(
                f"gate_by={name}",
                rule="From a log alone it is known who asks (user_id) and how much they did before (activity)",
                fix=did_you_mean(name, _ASKING),
            )
    features = [Feature(ITEM, "inherent", width=64), Feature(GAP, "cross", "number")]
    features += [_ASKING[name] for name in gate_by]
    columns: list[tuple[Role, pl.DataFrame]] = [("inherent", items.table), ("cross", log.extra)]
    for role, table in columns:
        for column in table.get_columns():
            name, values = column.name, column.dtype
            identifier = name.lower().rpartition("_")[2] in ("id", "ids")
            if name in {f.name for f in features} or values.is_nested() or values.is_temporal():
                continue
            different = column.n_unique()
            if different < 2 or (role == "cross" and identifier):
                continue
            if values.is_numeric() and not identifier:
                features.append(Feature(name, role, "number"))
            elif different <= (len(items) // 2 if role == "inherent" else _FEW):
                wide = role == "inherent" and different > 100
                features.append(Feature(name, role, width=16 if wide else 8))
    return FeatureSchema(features)


def repeat_share(log: Interactions) -> float:
    """Share of the events that repeat an earlier item of the same user."""
    pairs = log.user.astype(np.int64) * len(log.items) + log.item
    return 1 - len(np.unique(pairs)) / max(len(log), 1)


# -- the job -------------------------------------------------------------------------------------------


class Reporter:
    """Who is told how the job goes; this one tells nobody."""

    def say(self, line: str) -> None:
        """A fact."""

    def share(self, task: str, share: float, note: str = "") -> None:
        """How much of a long task is done, 0 … 1; it ends with 1."""


def train(
    interactions: Table,
    items: Table,
    out: str | Path,
    recipe: RecipeFunction = tiger,
    *,
    minutes: float | None = None,
    changes: Mapping[str, str] | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Bundle:
    """Two tables → a bundle at `out`, evaluated on the last moment of each user.

    minutes: stop training, fully annealed, after so long (the evaluation and the rest come on top); networks
    share them by `MINUTES`, TIGER has seven tenths of the default's.   changes: as in `override`.   overwrite: replace a bundle that stands at `out`.
    Weights are selected on the moment before the last; the test is read once, at the end.
    Raises DataError, ConfigError, StorageError; nothing half-written is left at `out`.
    """
    reporter, out = reporter or Reporter(), Path(out)
    require_free(out, overwrite)
    log, catalogue = _read(interactions, items, reporter)
    split = leave_last_out(log)
    if not len(split.test):
        raise DataError(
            f"{len(log.users)} users, none with three moments",
            rule="The last moment is the test, the one before selects, the rest is learned from",
            fix="Give a longer log",
        )
    settings = override(recipe(len(split.train), len(catalogue)), changes or {})
    if minutes is not None:
        settings = in_minutes(settings, minutes)
    settings = _mask_rule(settings, split.train, reporter)
    reporter.say(
        f"{len(split.train):,} events to learn from, {len(split.test):,} users to test on"
        + (f" ({split.skipped:,} with fewer than three moments only teach)" if split.skipped else "")
    )

    with _workshop(out, log, catalogue, settings, reporter) as work:
        bundle = _trained(log, catalogue, split, settings, work, reporter)
        require_free(out, overwrite)  # it may have come meanwhile
        bundle.save(out)
    return Bundle.load(out)


def _trained(
    log: Interactions, catalogue: Items, split: Split, settings: Recipe, work: Path, reporter: Reporter
) -> Bundle:
    text, vectors, tokenizer, ids = _item_parts(split.train, catalogue, settings, work, reporter)
    config = TextConfig(template=settings.text.template or text_template(catalogue))
    render(catalogue, config.template)  # what is wrong with it is said before hours of training
    model = Tiger(ids, catalogue.vocabulary, settings.tiger, vectors=vectors)
    count = sum(p.numel() for p in model.network.parameters())
    reporter.say(f"TIGER with {count / 1e6:.1f} M parameters; a killed run goes on: give the same command")
    began, minutes_of = time.monotonic(), dict[str, float]()
    model.fit(split.train, split.validation, directory=work, report=_bar(reporter))
    minutes_of[model.name] = _minutes(began, model.history)
    content = None if text.silent and text.behaviour is None else vectors
    learned = []
    for name in settings.retrievers:
        began = time.monotonic()
        learned.append(learn(name, settings, split.train, split.validation, content, work, reporter))
        minutes_of[learned[-1].name] = _minutes(began, learned[-1].history)

    reporter.say("Fitting the retrievers without training …")
    bundle = Bundle(
        items=catalogue,
        tiger=model,
        neighbours=NeighbourSum(config).fit(split.train, catalogue),
        popularity=Popularity().fit(split.train, catalogue),
        repeats=Repeats().fit(split.train, catalogue),
        histories=HistoryStore.build(log),
        text=text,
        tokenizer=tokenizer,
        vectors=vectors,
        exclude_seen=bool(settings.exclude_seen),
        recipe=asdict(settings),
        metrics={},
        others={retriever.name: retriever for retriever in learned},
        minutes=minutes_of,
    )
    reporter.say("Learning how to order what they find …")
    bundle = bundle.with_funnel(
        settings.funnel,
        targets=split.validation,
        progress=lambda name, done, n: reporter.share(name, done / n),
    )
    tested = bundle.evaluate(progress=lambda name, done, n: reporter.share(f"testing {name}", done / n))
    selected = {"ndcg@10": model.history["best"]}
    return replace(bundle, metrics=to_json(tested, "test") | {"validation": selected})


def _minutes(began: float, history: Mapping[str, Any]) -> float:
    """Of a training with its selection; of one that went on, at least those that its steps took."""
    return max(time.monotonic() - began, history["seconds"]) / 60


def in_minutes(settings: Recipe, minutes: float) -> Recipe:
    """The recipe with all training in so many minutes, shared out by `MINUTES`."""
    parts = {name: MINUTES.get(name, 3) for name in ("tiger", *settings.retrievers)}
    changes = {f"{name}.train.minutes": f"{minutes * p / sum(parts.values())}" for name, p in parts.items()}
    return override(settings, changes)


def learn(
    name: str,
    settings: Recipe,
    training: Interactions,
    validation: Targets,
    content: np.ndarray | None,
    work: Path | None = None,
    reporter: Reporter | None = None,
) -> DenseRetriever | Eager:
    """One of the networks beside TIGER, trained as the recipe says.

    content: (N, C) of the items, None for ids alone.   work: for checkpoints, a folder of its own in it.
    """
    reporter = reporter or Reporter()
    directory = work and work / name
    if directory:
        directory.mkdir(parents=True, exist_ok=True)
    model: DenseRetriever | Eager
    if name == "eager":
        model = _eager(settings, training, content, directory, reporter)
    else:
        model = DENSE[name](settings, training.items, content)
    count = sum(p.numel() for p in model.network.parameters())
    reporter.say(f"{name} with {count / 1e6:.1f} M parameters")
    return model.fit(training, validation, directory=directory, report=_bar(reporter))


def _eager(
    settings: Recipe,
    training: Interactions,
    content: np.ndarray | None,
    directory: Path | None,
    reporter: Reporter,
) -> Eager:
    """EAGER on behaviour vectors of its own, learned in a fifth of its minutes, and on the item vectors if any."""
    c = settings.eager
    first = c.train
    if first.minutes is not None:
        c = replace(c, train=replace(first, minutes=0.8 * first.minutes))
        first = replace(first, minutes=0.2 * first.minutes)
    reporter.say("Item vectors of behaviour, for eager")
    directory = directory and directory / "behaviour"
    start = _kept(directory and directory / "start.safetensors", lambda: co_occurrence_vectors(training))
    as_used = _kept(
        directory and directory / "vectors.safetensors",
        lambda: behaviour_vectors(
            training,
            replace(settings.sasrec, train=first),
            start=start,
            text=content,
            directory=directory,
            report=_bar(reporter),
        ),
    )
    vectors = {BEHAVIOUR: as_used}
    if content is None:
        c = replace(c, streams=(BEHAVIOUR,))
    else:
        vectors[SEMANTIC] = content
    return Eager(eager_ids(vectors, training.items, c), training.items, c, vectors)


def train_ranker(
    interactions: Table,
    items: Table,
    out: str | Path,
    recipe: LifelongConfig,
    *,
    minutes: float | None = None,
    changes: Mapping[str, str] | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> tuple[LifelongRanker, list[RankingEvaluation]]:
    """Two tables → a ranker at `out`, and its evaluation on the last moment of each user.

    The task: what of a user's next moment (a basket, a click) was taken, among items drawn by popularity, given
    the whole life before it. The last moment is the test, the one before selects, the earlier ones are learned
    from, but for each user's first, before which there is no life.
    minutes, changes, overwrite: as in `train`; changes are settings of `LifelongConfig`.
    Raises DataError, ConfigError, StorageError; nothing half-written is left at `out`.
    """
    reporter, out = reporter or Reporter(), Path(out)
    require_free_ranker(out, overwrite)
    log, catalogue = _read(interactions, items, reporter)
    with _ranker_trained(log, catalogue, out, recipe, minutes, changes, reporter) as (
        ranker,
        found,
        requests,
    ):
        require_free_ranker(out, overwrite)
        ranker.save(out, requests)
    return ranker, found


def add_ranker(
    interactions: Table,
    items: Table,
    into: str | Path,
    recipe: LifelongConfig,
    *,
    minutes: float | None = None,
    changes: Mapping[str, str] | None = None,
    reporter: Reporter | None = None,
) -> tuple[Bundle, list[RankingEvaluation]]:
    """The tables that a bundle was trained on → that bundle with a ranker, which orders the best of its funnel.

    into: a bundle, whose place the new one takes, or a home, in which it is published. Where it was changed during
        the training, the ranker joins what stands there then.
    The evaluation is the ranker's own; that of the funnel with it stands in the bundle's metrics.
    minutes, changes: as in `train_ranker`.   Raises DataError for other tables, BundleError, StorageError.
    """
    reporter, into = reporter or Reporter(), Path(into)
    log, catalogue = _read(interactions, items, reporter)
    require_same_log(Bundle.load(bundle_folder(into)).histories, HistoryStore.build(log))
    aside = _beside(into, "ranker")
    with _ranker_trained(log, catalogue, aside, recipe, minutes, changes, reporter) as (ranker, found, _):
        while True:
            try:
                return _with_ranker(into, ranker, reporter), found
            except BundleChangedError:
                reporter.say(f"{into} was changed meanwhile; once more, with what stands there now")


def _with_ranker(into: Path, ranker: LifelongRanker, reporter: Reporter) -> Bundle:
    """The bundle that stands there, with a ranker. Raises BundleChangedError where another took its place meanwhile."""
    folder = bundle_folder(into)
    old = Bundle.load(folder)
    require_same_log(old.histories, ranker.histories)
    reporter.say("Learning how much the ranker weighs …")
    new = old.with_ranker(ranker, progress=lambda name, done, n: reporter.share(name, done / n))
    for hidden, fusion in new.fusions.items():
        reporter.say(f"seen items {'hidden' if hidden else 'shown'}: its log-odds weigh {fusion.ranker:g}")
    if folder != into:
        return Bundle.load(publish(new, into, instead_of=old.version))
    new.save(into, instead_of=old.version)
    return Bundle.load(into)


@contextmanager
def _ranker_trained(
    log: Interactions,
    catalogue: Items,
    out: Path,
    recipe: LifelongConfig,
    minutes: float | None,
    changes: Mapping[str, str] | None,
    reporter: Reporter,
) -> Iterator[tuple[LifelongRanker, list[RankingEvaluation], dict[str, RankingTask]]]:
    """A ranker, its evaluation and the requests that select and test. A killed run goes on until the block has ended well."""
    settings = override(recipe, changes or {})
    if minutes is not None:
        settings = override(settings, {"train.minutes": str(minutes)})
    if settings.gate != NONE and not settings.gate_by:
        raise ConfigError(
            f"gate={settings.gate} without gate_by",
            rule="A gate reads something of who asks",
            fix=f"Set gate_by={ACTIVITY} or gate_by=user_id",
        )
    if settings.method != NONE and len(settings.tasks) < 2:
        raise ConfigError(
            f"method={settings.method} for {len(settings.tasks)} task",
            rule="A method weighs several tasks",
            fix=f"Set tasks={NEXT_BASKET},{QUANTITY_2}, or leave the method out",
        )
    schema = ranking_schema(catalogue, log, settings.gate_by)
    named = ", ".join(f"{f.name} ({f.role})" for f in schema.features)
    reporter.say(f"Features: {named}")
    learn, validation, test = ranking_tasks(log, catalogue, schema, settings.tasks)
    reporter.say(
        f"{len(learn):,} requests to learn from, {len(validation):,} to select on, {len(test):,} to test on"
    )
    ranker = LifelongRanker.of(
        learn, settings
    )  # settings that do not go together are refused before anything is left
    count = sum(p.numel() for p in ranker.network.parameters())
    reporter.say(f"A ranker with {count / 1e6:.1f} M parameters; a killed run goes on: give the same command")
    with _workshop(out, log, catalogue, settings, reporter) as work:
        ranker.fit(learn, validation, directory=work, report=_bar(reporter, "requests", "GAUC"))
        yield ranker, ranker.evaluate(test), {"validation": validation, "test": test}


def cluster_ranker(
    path: str | Path,
    by: str | None = None,
    groups: int = 5,
    *,
    until: int | None = None,
    by_keys: bool = False,
    threads: int = 1,
    reporter: Reporter | None = None,
) -> ClusterStore:
    """Put virtual items in the place of the lives of a saved ranker (TWIN V2, the offline part).

    A killed call goes on when given again.   by: a number of the log that divides a life into groups: by equal
    shares where all of it lies in 0 … 1, as a completion ratio does, else by its quantiles; None for one group.
    until: behaviours before are clustered; None: all.   by_keys: see `LifelongRanker.cluster`.
    Raises BundleError for a ranker inside a bundle, ConfigError for an unknown column, as `ClusterStore.build`.
    """
    folder, reporter = Path(path), reporter or Reporter()
    if is_bundle(bundle_folder(folder)):
        raise BundleError(
            f"the bundle {path}",
            rule="A funnel reads lives as they are now, behaviour by behaviour",
            fix="Cluster a ranker that stands alone: tiglon train --recipe twin_v2 … --out RANKER",
        )
    ranker = load_ranker(folder)
    work = _beside(folder, "clusters")
    work.mkdir(exist_ok=True)
    told = reporter
    store = ranker.cluster(
        until,
        None if by is None else ranker.groups(by, groups),
        by_keys=by_keys,
        threads=threads,
        work=work,
        report=lambda share: told.share("clustering", share),
    )
    store.save(folder / "clusters")
    shutil.rmtree(work, ignore_errors=True)
    sizes = store.virtual.features[CLUSTER_SIZE]
    reporter.say(
        f"{int(sizes.sum()):,} behaviours of {len(store):,} users became {len(sizes):,} virtual items"
    )
    return store


def ranking_tasks(
    log: Interactions,
    catalogue: Items,
    schema: FeatureSchema,
    tasks: Sequence[str] = (NEXT_BASKET,),
) -> tuple[RankingTask, RankingTask, RankingTask]:
    """(to learn from, to select on, to test on): a user's moments from the second, the last but one, the last.

    Boundaries, vocabularies and popularity are those of the moments that are learned from.
    tasks: of "next_basket" (taken then) and "quantity_2" (two or more at once, by the column `quantity`).
    Raises ConfigError for another task, SchemaError without the column, DataError where no user has three moments.
    """
    for name in tasks:
        if name == WITHIN_30_DAYS:
            raise ConfigError(
                f"the task '{name}'",
                rule="Its labels look ahead, here into the moments that are held out",
                fix="Split by time in Python, as data.ranking.complete_journey_task does",
            )
        if name not in (NEXT_BASKET, QUANTITY_2):
            raise ConfigError(f"no task '{name}'", fix=did_you_mean(name, (NEXT_BASKET, QUANTITY_2)))
    learned = leave_last_out(log).train
    features = fit(schema, catalogue, learned, pl.DataFrame({"user_id": log.users.raw}))
    counts = np.bincount(learned.item, minlength=len(catalogue))
    store = features.store(log)
    start = moment_starts(log)
    owner = log.user[start]
    left = np.searchsorted(owner, owner, side="right") - np.arange(len(owner)) - 1  # moments that follow
    enough = np.bincount(owner, minlength=len(log.users))[owner] >= 3
    if not enough.any():
        raise DataError(
            f"{len(log.users)} users, none with three moments",
            rule="The last moment is the test, the one before selects, the rest is learned from",
            fix="Give a longer log",
        )
    part = np.where(enough, np.maximum(2 - left, 0), 0)  # 0 learn, 1 select, 2 test
    part = np.repeat(part, np.diff(start, append=len(log)))
    made = [
        next_basket(log, features, counts, part == p, BasketConfig(first=1, seed=p), tasks=tasks, store=store)
        for p in range(3)
    ]
    return made[0], made[1], made[2]


def load_ranker(source: str | Path) -> LifelongRanker:
    """The ranker that a path means: itself, or that of a bundle, or of a home's current one. Raises BundleError."""
    folder = bundle_folder(Path(source))
    if is_bundle(folder):
        folder = folder / "ranker"
        if not is_ranker(folder):
            raise BundleError(
                f"the bundle {source}, which has no ranker",
                fix=f"Train one into it: tiglon train --recipe twin … --into {source}",
            )
    return LifelongRanker.load(folder)


def require_free_ranker(path: Path, overwrite: bool) -> None:
    """ConfigError where something stands at `path` that must not be replaced."""
    if is_ranker(path):
        if not overwrite:
            raise ConfigError(
                f"{path}, where a ranker stands already", fix="Choose another path, or pass --overwrite"
            )
    elif is_bundle(path):
        raise ConfigError(
            f"{path}, where a bundle stands",
            rule="A ranker joins a bundle, and takes no bundle's place",
            fix=f"Pass --into {path}, or choose another path",
        )
    else:
        require_free(path, overwrite=False)


def _read(interactions: Table, items: Table, reporter: Reporter) -> tuple[Interactions, Items]:
    table = read_table(interactions, ids=("user_id", "item_id"))
    log = read_interactions(table)
    log = replace(log, items=ids_of(interactions, log.items.raw))
    log, catalogue, unknown = align(log, read_items(items))
    reporter.say(f"{len(log):,} events, {len(log.users):,} users, {len(catalogue):,} items")
    if repeated := table.height - len(log):
        reporter.say(f"{repeated:,} lines repeat a user, item and time; the first of each stays")
    for doubt in (*odd_ids(table["user_id"]), *odd_ids(table["item_id"]), time_span(log, pl.Int64())):
        if doubt.level == "warning":
            reporter.say(f"Warning: {doubt.subject}: {doubt.text}")
    if unknown:
        events = np.isin(log.item, catalogue.vocabulary.encode(pl.Series(unknown))).mean()
        reporter.say(
            f"{len(unknown):,} items of the log ({events:.1%} of the events) are not in the item table, such as "
            f"{unknown[0]!r}; they join it without text"
        )
    return log, catalogue


def _mask_rule(settings: Recipe, training: Interactions, reporter: Reporter) -> Recipe:
    share = repeat_share(training)
    if settings.exclude_seen is None:
        settings = replace(settings, exclude_seen=share < REPEATING)
    rule = "are not recommended again" if settings.exclude_seen else "stay in the ranking"
    reporter.say(f"{share:.0%} of the events repeat an item of the same user: seen items {rule}")
    return settings


def _vectors(training: Interactions, catalogue: Items, settings: Recipe) -> tuple[ItemText, np.ndarray]:
    """How items become vectors, and those (N, D) of the catalogue."""
    text = item_text(catalogue, settings.text)
    words = text.words(catalogue)
    if not settings.ids.behaviour:
        return text, words
    behaviour = BehaviourVectors(settings.ids.behaviour, seed=settings.ids.seed)
    return replace(text, behaviour=behaviour), behaviour.fit_encode(training, words)


def _kept(path: Path | None, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Vectors, from the file once they are there: checkpoints know them to the last bit, and on another number of
    threads they would be made otherwise."""
    if path is None:
        return make()
    if not path.exists():
        checkpoint.save(path, {"vectors": torch.from_numpy(make())}, {})
    return checkpoint.load(path)[0]["vectors"].numpy()


def _item_parts(
    training: Interactions, catalogue: Items, settings: Recipe, work: Path, reporter: Reporter
) -> tuple[ItemText, np.ndarray, Tokenizer, SemanticIds]:
    """What is known of items before a network learns: text, vectors (N, D), tokenizer, IDs; kept, as by `_kept`."""
    parts = work / "items"
    if parts.is_dir():
        text, tokenizer = ItemText.load(parts / "text"), tokenizers.load(parts)
        return text, np.load(parts / "vectors.npy"), tokenizer, SemanticIds.load(parts)
    reporter.say("Making item vectors …")
    text, vectors = _vectors(training, catalogue, settings)
    tokenizer, ids = _identify(catalogue, text, vectors, settings.ids, reporter)
    with written_aside(parts, "vectors.npy") as aside:
        np.save(aside / "vectors.npy", vectors)
        text.save(aside / "text")
        tokenizer.save(aside)
        ids.save(aside)
    return text, vectors, tokenizer, ids


def _identify(
    catalogue: Items, text: ItemText, vectors: np.ndarray, config: IdsConfig, reporter: Reporter
) -> tuple[Tokenizer, SemanticIds]:
    """A tokenizer fitted on the vectors, and the IDs."""
    tokenizer = make_tokenizer(config)
    if text.silent and text.behaviour is None:
        tokenizer = RandomIds(config.levels, config.codes, seed=config.seed)
        reporter.say("No column of words in the item table: semantic IDs are random")
    tokenizer.fit(vectors)
    codes = codes_of(tokenizer, vectors, catalogue.vocabulary)
    ids = SemanticIds.assign(codes, tokenizer.sizes, catalogue.vocabulary)
    shared = np.unique(codes, axis=0, return_counts=True)[1]
    reporter.say(
        f"Semantic IDs of {' × '.join(map(str, ids.sizes))} from {text.described()}; "
        f"{shared[shared > 1].sum() / len(ids):.0%} of the items share their first {len(ids.sizes) - 1} codes "
        f"with another, {shared.max():,} at most"
    )
    return tokenizer, ids


def item_text(catalogue: Items, config: ItemTextConfig) -> ItemText:
    """The encoder of a recipe, fitted where it learns. Raises SchemaError, MissingExtraError."""
    if config.encoder.startswith("column:"):
        return ItemText(config.encoder, "", VectorColumn(config.encoder.removeprefix("column:")))
    template = config.template
    if template is None:
        template = template_of(text_columns(catalogue))
    if config.encoder != "tfidf":
        return ItemText(config.encoder, template, SentenceTransformer(config.encoder))
    encoder = TfidfSvd(config.dim).fit(render(catalogue, template))
    return ItemText(config.encoder, template, encoder)


def make_tokenizer(config: IdsConfig) -> Tokenizer:
    """An unfitted tokenizer."""
    if config.tokenizer == "rqvae":
        return RQVAETokenizer(RQVAEConfig(levels=config.levels, codes=config.codes, seed=config.seed))
    plain = {"residual-kmeans": ResidualKMeans, "lsh": LSH, "random": RandomIds}[config.tokenizer]
    return plain(config.levels, config.codes, seed=config.seed)


def _beside(path: Path, what: str) -> Path:
    """A hidden folder beside `path`, which may be ".", for what is on its way."""
    path = Path(os.path.abspath(path))
    return path.with_name(f".{path.name}.{what}")


@contextmanager
def _workshop(
    out: Path, log: Interactions, catalogue: Items, settings: Recipe | LifelongConfig, reporter: Reporter
) -> Iterator[Path]:
    """The folder for checkpoints beside `out`, of this very job, and of one process at a time.

    It goes when the block ends well, or before anything was learned; else the next call goes on with it.
    Raises ConfigError where another job or process has it, StorageError.
    """
    work = _beside(out, "work")
    lock = FileLock(work / ".lock", timeout=0)
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise ConfigError(
            f"a run in {work} that another process is at",
            rule="One process trains for one place at a time",
            fix="Wait for it, or end it: then this command goes on where it stopped",
        ) from error
    except OSError as error:
        raise StorageError(
            f"{work} could not be made: {error}",
            rule="Checkpoints stand beside what is being made",
            fix="Choose a place that can be written to",
        ) from error
    done = False
    try:
        _begin(work, _job(log, catalogue, settings), reporter)
        yield work
        done = True
    finally:
        if done or not _learned(work):
            shutil.rmtree(work, ignore_errors=True)
        lock.release()


def _begin(work: Path, job: str, reporter: Reporter) -> None:
    """Go on with this very job, or begin where nothing was learned. Raises ConfigError for another job."""
    file = work / "job.json"
    try:
        begun = json.loads(file.read_text(encoding="utf-8"))["job"] if file.is_file() else None
    except (OSError, ValueError, KeyError, TypeError):  # cut off
        begun = ""
    if begun == job:
        reporter.say(f"Going on with the run in {work}")
    elif _learned(work):
        raise ConfigError(
            f"an unfinished run of other data or settings in {work}",
            rule="A run goes on with the tables and settings it began with",
            fix=f"Give the same command again, or delete {work}",
        )
    else:
        shutil.rmtree(work / "items", ignore_errors=True)
        checkpoint.write_text(file, json.dumps({"job": job}))


def _learned(work: Path) -> bool:
    return any(work.rglob("checkpoint.safetensors"))


def _job(log: Interactions, catalogue: Items, settings: Recipe | LifelongConfig) -> str:
    """Names the data and the settings."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for array in (log.user, log.item, log.time, hash_ids(log.users)):
        digest.update(np.ascontiguousarray(array).tobytes())
    for table in (log.extra, catalogue.table):
        digest.update(table.hash_rows().to_numpy().tobytes())
    return digest.hexdigest()


def _bar(
    reporter: Reporter, examples: str = "targets", metric: str = "ndcg@10"
) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        note = f"epoch {progress.epoch + 1}"
        if progress.loss is not None:
            note += f", loss {progress.loss:.3f}, {progress.examples_per_second:,.0f} {examples}/s"
        if progress.score is not None:
            note += f", validation {metric} {progress.score:.4f}"
        reporter.share("training", progress.share, note)

    return report
