"""A bundle: one folder that holds everything a recommender needs, checked whenever it is read.

    manifest.json                   format, version, recipe, schema; size and sha256 of every file below
    tiger/                          network, semantic IDs
    neighbours/ popularity/ repeats/    retrievers without training: baselines, and what answers in need
    retrievers/NAME/                whatever else the funnel asks, such as SASRec
    funnel/                         how what they find becomes one list
    ranker/                         a lifelong ranker, where there is one
    histories/                      every user's life, memory-mapped
    items.parquet                   the catalogue; row i is dense item i
    text/ tokenizer/ vectors.npy    how a new item gets its ID; the vectors that the IDs were made of
    metrics.json                    the evaluation
    ids_report.txt                  how good the IDs are

It is written aside, flushed to the disk and renamed: a reader sees the old bundle or the new one. Nothing
in it is a pickle.

Who answers. The engine (`serving.engine`) asks all of them; `Bundle.recommend` asks the engine.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import ValidationError
from safetensors import SafetensorError

import tiglon
from tiglon.data.events import Table, items_as_in, read_items, require_same_type
from tiglon.data.folders import written_aside
from tiglon.data.histories import HistoryStore
from tiglon.data.split import leave_last_out
from tiglon.data.text import SentenceTransformer, TextEncoder, TfidfSvd, VectorColumn, encode_items, render
from tiglon.errors import (
    BundleChangedError,
    BundleDamagedError,
    BundleVersionError,
    CapacityError,
    ConfigError,
    DataError,
    SchemaError,
    StorageError,
    UnknownIdError,
)
from tiglon.evaluation.protocol import Evaluation, evaluate, to_json
from tiglon.ranking.model import LifelongRanker, is_ranker
from tiglon.retrieval.behaviour import BehaviourVectors
from tiglon.retrieval.comirec import ComiRec
from tiglon.retrieval.eager import Eager
from tiglon.retrieval.mind import Mind
from tiglon.retrieval.neighbours import CatalogueScorer, NeighbourSum, Popularity, Repeats
from tiglon.retrieval.retriever import Retriever, require_k, require_one
from tiglon.retrieval.sasrec import SasRec
from tiglon.retrieval.tiger import Tiger
from tiglon.retrieval.two_tower import TwoTower
from tiglon.semantic_ids import tokenizer as tokenizers
from tiglon.semantic_ids.random_ids import RandomIds
from tiglon.semantic_ids.report import IdReport, report
from tiglon.semantic_ids.tokenizer import Tokenizer
from tiglon.serving import funnel as funnels
from tiglon.serving.funnel import Funnel, FunnelConfig, Fusion
from tiglon.serving.lifelong import Lifelong
from tiglon.serving.messages import ID, ID_RULE, RecommendRequest
from tiglon.serving.remembered import Remembered, Remembering
from tiglon.types import MISSING, Interactions, Items, Targets, Vocabulary

if TYPE_CHECKING:
    from tiglon.serving.engine import Engine

FORMAT = 1
_LISTS = 400_000  # remembered while retrievers are measured: half a gigabyte at most

# Retrievers beside TIGER and the baselines: the class that retriever.json names → who reads the folder.
READERS: dict[str, Callable[[Path], Retriever]] = {
    "ComiRec": ComiRec.load,
    "Eager": Eager.load,
    "Mind": Mind.load,
    "SasRec": SasRec.load,
    "TwoTower": TwoTower.load,
}


@dataclass(frozen=True)
class Recommendation:
    """A raw item id. Scores compare within one answer; `source` placed it highest."""

    item_id: Any
    score: float
    source: str


@dataclass(frozen=True)
class ItemText:
    """From an item's columns to its vector. encoder None: a model that is loaded when first needed.

    behaviour: what a text says about how an item is used (`retrieval.behaviour`); None for text alone.
    """

    kind: str  # "tfidf", "column:NAME", or a sentence-transformers model
    template: str
    encoder: TextEncoder | VectorColumn | None
    name: str = ""  # the encoder's, with its version
    behaviour: BehaviourVectors | None = None

    @property
    def silent(self) -> bool:
        """Whether items have no words to be known by."""
        return self.kind == "tfidf" and not self.template

    def described(self) -> str:
        words = f'text "{self.template}"' if self.template else self.kind
        together = "what is used together"
        if self.behaviour is None:
            return words
        return together if self.silent else f"{words} and {together}"

    def vectors(self, items: Items) -> np.ndarray:
        """(M, D) float32 of items without events."""
        return self.beside_behaviour(self.words(items))

    def beside_behaviour(self, words: np.ndarray) -> np.ndarray:
        """(M, D') float32 from those of the text alone, (M, D)."""
        return words if self.behaviour is None else self.behaviour.encode(words)

    def words(self, items: Items) -> np.ndarray:
        """(M, D) float32 of the text alone."""
        encoder = self.encoder
        if encoder is None:
            encoder = SentenceTransformer(self.kind)
            if encoder.name != self.name:
                raise DataError(
                    f"the text encoder is {encoder.name}",
                    rule=f"The bundle's IDs were made with {self.name}",
                    fix="Install that version, or train anew",
                )
        return encode_items(items, encoder, self.template).values

    def known(self, items: Items, words: np.ndarray) -> np.ndarray:
        """(M,) whether an item has any words.   words: its vectors."""
        if isinstance(self.encoder, VectorColumn):
            return np.asarray(words.any(axis=1))
        return np.array([bool(text) for text in render(items, self.template)])

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        name = self.encoder.name if self.encoder is not None else self.name
        about = {"kind": self.kind, "template": self.template, "name": name}
        (directory / "text.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
        if isinstance(self.encoder, TfidfSvd):
            self.encoder.save(directory)
        if self.behaviour is not None:
            self.behaviour.save(directory)

    @classmethod
    def load(cls, directory: Path) -> ItemText:
        about = json.loads((directory / "text.json").read_text(encoding="utf-8"))
        encoder: TextEncoder | VectorColumn | None = None
        if about["kind"] == "tfidf":
            encoder = TfidfSvd.load(directory)
        elif about["kind"].startswith("column:"):
            encoder = VectorColumn(about["kind"].removeprefix("column:"))
        there = (directory / "behaviour.safetensors").is_file()
        behaviour = BehaviourVectors.load(directory) if there else None
        return cls(about["kind"], about["template"], encoder, about["name"], behaviour)


def codes_of(tokenizer: Tokenizer, vectors: np.ndarray, keys: Vocabulary) -> np.ndarray:
    """Codes (N, L): by content, or by raw id where the tokenizer is the random control."""
    return tokenizer.encode_keys(keys) if isinstance(tokenizer, RandomIds) else tokenizer.encode(vectors)


@dataclass(frozen=True, eq=False)
class Bundle:
    """A trained recommender. Changes make a new one; `save` puts it on the disk."""

    items: Items
    tiger: Tiger
    neighbours: NeighbourSum
    popularity: Popularity
    repeats: Repeats
    histories: HistoryStore
    text: ItemText
    tokenizer: Tokenizer
    vectors: np.ndarray  # (N, D) float32
    exclude_seen: bool
    recipe: dict[str, Any]
    metrics: dict[str, Any]
    fusions: Mapping[bool, Fusion] = field(default_factory=dict)  # by whether seen items are hidden
    funnel_config: FunnelConfig = field(default_factory=FunnelConfig)
    ranker: LifelongRanker | None = None
    others: Mapping[str, Retriever] = field(default_factory=dict)  # by name: what else the funnel asks
    minutes: Mapping[str, float] = field(default_factory=dict)  # by name: of training, selection with it
    manifest: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def __repr__(self) -> str:
        return f"Bundle({self.path}, version {self.version}, {len(self.items):,} items)"

    @property
    def version(self) -> str:
        """Names this bundle in every answer; empty until it is saved."""
        return str(self.manifest.get("version", ""))

    # -- answers -----------------------------------------------------------------------------------

    def recommend(
        self,
        users: Sequence[Any] | None = None,
        k: int = 10,
        *,
        history: Sequence[Sequence[Any]] | None = None,
        exclude_seen: bool | None = None,
    ) -> list[list[Recommendation]]:
        """The k best items for each user, fewer where the catalogue has fewer: what `Engine` answers.

        users: raw ids, whose stored lives are read; of a user who is not there nothing is known.
        history: instead of `users`, lists of raw item ids, oldest first; unknown items are skipped.
        exclude_seen: never an item of the history; None: as the bundle was made.
        Raises ConfigError for what are no ids, or no lists of them, and for a bad k.
        """
        require_k(k)
        require_one(users, history)
        _require_mode(exclude_seen)
        if history is not None:
            lives = _listed(history, "history", "history=[[item ids], …]")
            asked: list[dict[str, Any]] = [
                {"history": _ids(life, f"history[{n}]", "history=[[item ids], …]")}
                for n, life in enumerate(lives)
            ]
        elif users is not None:
            asked = [{"user_id": user} for user in _ids(users, "users", "users=[…]")]
        else:
            raise ConfigError("neither users nor a history", fix="Pass users=[…] or history=[[item ids], …]")
        # Not validated: who asks from Python may ask for more than one request over HTTP may.
        requests = [RecommendRequest.model_construct(k=k, exclude_seen=exclude_seen, **who) for who in asked]
        return [
            [Recommendation(found.item_id, found.score, found.source) for found in answer.items]
            for answer in self._engine.recommend_many(requests)
        ]

    @cached_property
    def _engine(self) -> Engine:
        from tiglon.serving.engine import Engine

        return Engine(self)

    def retrievers(self, exclude_seen: bool) -> Iterator[Retriever]:
        """What the funnel asks, and the funnel where it has learned."""
        yield from self.sources(exclude_seen)
        if self.fusions:
            yield self.funnel(exclude_seen)

    def sources(self, exclude_seen: bool) -> list[Retriever]:
        """What the funnel asks: baselines first, popularity the first; `repeats` only where it may repeat."""
        baselines = [self.popularity, self.neighbours.text, self.neighbours.together, self.neighbours]
        return [*baselines, *([] if exclude_seen else [self.repeats]), self.tiger, *self.others.values()]

    def funnel(self, exclude_seen: bool) -> Funnel:
        """All sources as one retriever; where it has learned nothing, their places count alike."""
        return Funnel(
            self.sources(exclude_seen),
            self.popularity.counts,
            self.fusions.get(exclude_seen),
            self.funnel_config,
            self.lifelong,
        )

    @cached_property
    def lifelong(self) -> Lifelong | None:
        """The ranker as the funnel asks it."""
        return None if self.ranker is None else Lifelong(self.ranker, self.items.vocabulary)

    def with_funnel(
        self,
        config: FunnelConfig | None = None,
        *,
        targets: Targets | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Bundle:
        """With a funnel that learned on the validation targets, once with seen items hidden, once shown.

        progress: called with (task, users done, users in all).
        """
        c = config or FunnelConfig()
        targets = targets if targets is not None else leave_last_out(self.log()).validation
        fusions = {}
        for hidden in (True, False):

            def tell(done: int, users: int, hidden: bool = hidden) -> None:
                if progress is not None:
                    progress(f"funnel, seen items {'hidden' if hidden else 'shown'}", done, users)

            fusions[hidden] = funnels.learn(
                self.sources(hidden), self.popularity.counts, targets, c, exclude_seen=hidden, progress=tell
            )
        return replace(self, fusions=fusions, funnel_config=c, manifest={}, path=None)

    def with_ranker(
        self,
        ranker: LifelongRanker,
        *,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Bundle:
        """With a lifelong ranker, which learned from the training moments of this bundle's own log.

        How much it weighs is chosen on the validation, once with seen items hidden, once shown; the funnel's
        row of the evaluation is measured anew.   progress: as in `with_funnel`.
        Raises DataError for a ranker of another log: it may have learned what the validation asks for.
        """
        require_same_log(self.histories, ranker.histories)
        bundle = replace(self, ranker=ranker, manifest={}, path=None)
        parts = leave_last_out(self.log())
        fusions = {}
        for hidden in (True, False):

            def tell(done: int, users: int, hidden: bool = hidden) -> None:
                if progress is not None:
                    progress(f"ranker, seen items {'hidden' if hidden else 'shown'}", done, users)

            funnel = bundle.funnel(hidden)
            fusions[hidden], _ = funnels.weigh(funnel, parts.validation, exclude_seen=hidden, progress=tell)
        bundle = replace(bundle, fusions=fusions)
        funnel = bundle.funnel(self.exclude_seen)
        tested = evaluate(
            funnel,
            parts.test,
            exclude_seen=self.exclude_seen,
            popularity=np.bincount(parts.train.item, minlength=len(funnel.items)),
            progress=None
            if progress is None
            else lambda done, users: progress("testing funnel", done, users),
        )
        (row,) = to_json([tested], "test")["rows"]
        rows = [old for old in self.metrics.get("rows", []) if old["name"] != funnel.name]
        return replace(bundle, metrics={**self.metrics, "rows": [*rows, row], "lead": None})

    def evaluate(
        self,
        split: Literal["validation", "test"] = "test",
        *,
        exclude_seen: bool | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> list[Evaluation]:
        """All retrievers on the last moment (test) or the one before (validation) of each stored user.

        On the validation without the funnel, which learned from it.
        progress: called with (retriever, users done, users in all).
        Raises ConfigError for another split.
        """
        if split not in ("test", "validation"):
            raise ConfigError(f"split {split!r}", rule="It is test or validation")
        _require_mode(exclude_seen)
        parts = leave_last_out(self.log())
        targets = parts.test if split == "test" else parts.validation
        mask = self.exclude_seen if exclude_seen is None else exclude_seen
        rows, remembered = [], Remembered(most=_LISTS)  # so that the funnel needs not ask all over again
        for retriever in self.retrievers(mask) if split == "test" else self.sources(mask):
            if isinstance(retriever, Funnel):
                retriever.remembered = remembered
            elif not isinstance(retriever, CatalogueScorer):
                retriever = Remembering(retriever, remembered, self.funnel_config.gives(retriever))
            counts = np.bincount(parts.train.item, minlength=len(retriever.items))

            def tell(done: int, users: int, name: str = retriever.name) -> None:
                if progress is not None:
                    progress(name, done, users)

            found = evaluate(retriever, targets, exclude_seen=mask, popularity=counts, progress=tell)
            rows.append(replace(found, skipped=found.skipped + parts.skipped))
        return rows

    def log(self) -> Interactions:
        """The stored histories as one log."""
        store = self.histories
        user = np.repeat(np.arange(len(store)), np.diff(store.offsets)).astype(np.int32)
        return Interactions(user, store.item, store.time, store.users, store.items)

    # -- the catalogue -----------------------------------------------------------------------------

    def add_items(self, source: Table) -> Bundle:
        """With the items of a table that are new; they can be recommended at once.

        Their IDs and their vectors come from the frozen tokenizer and encoder; those of known items, and what
        networks learned, stay as they are, and so do the neighbours: they know the items of the training only.
        An item without words gets codes by its raw id, for nothing says what it is like.
        Items that are known already are left alone. Raises SchemaError, CapacityError.
        """
        old = self.items
        given = items_as_in(old.vocabulary, read_items(source))
        ids = pl.Series("item_id", given.vocabulary.raw)
        require_same_type(ids, old.vocabulary)
        new = given.table.filter(pl.Series(old.vocabulary.encode(ids) == MISSING))
        new = _as_schema(new, old.table.schema)
        if not new.height:
            return self
        table = pl.concat([old.table, new])
        joined = Items(Vocabulary(table["item_id"]), table)
        arrivals = Items(Vocabulary(new["item_id"]), new)
        model = copy.copy(self.tiger)
        words = self.text.words(arrivals)
        vectors = self.text.beside_behaviour(words)
        codes = codes_of(self.tokenizer, vectors, arrivals.vocabulary)
        if not isinstance(self.tokenizer, RandomIds):
            known = self.text.known(arrivals, words)[:, None]
            by_id = RandomIds(codes.shape[1], self.tokenizer.sizes[0]).encode_keys(arrivals.vocabulary)
            codes = np.where(known, codes, by_id)
        try:
            model.add_items(joined.vocabulary, codes, vectors)
        except CapacityError as error:
            raise CapacityError(
                error.given,
                rule=error.rule,
                fix="Give items texts that tell them apart, or train anew with them in the item table",
            ) from error
        both = np.concatenate([self.vectors, vectors])
        others = {name: _joined(other, joined.vocabulary, vectors) for name, other in self.others.items()}
        return replace(self, items=joined, tiger=model, others=others, vectors=both, manifest={}, path=None)

    def remove_items(self, items: np.ndarray) -> Bundle:
        """Without these dense items in any answer; their IDs are not given to others."""
        model = copy.copy(self.tiger)
        model.remove_items(np.asarray(items, np.int64))
        return replace(self, tiger=model, manifest={}, path=None)

    def id_report(self) -> IdReport:
        """How good the semantic IDs are."""
        return report(self.tiger.ids, self.vectors, self.tokenizer)

    # -- files -------------------------------------------------------------------------------------

    def save(self, path: str | Path, *, instead_of: str | None = None) -> None:
        """Write the folder, all of it or nothing; a bundle that stands there is replaced.

        instead_of: the version that must stand there then, of which this one was made.
        Raises StorageError, BundleChangedError.
        """
        path = Path(path)
        require_free(path, overwrite=True)
        try:
            with written_aside(path, "manifest.json") as aside:
                self._write(aside)
                _write_manifest(aside, self._about())
                if instead_of is not None:
                    require_version(path, instead_of)
        except StorageError:
            raise
        except (SafetensorError, pa.ArrowException, pl.exceptions.PolarsError) as error:
            raise StorageError(
                f"{path} could not be written: {error}",
                rule="Nothing was changed there",
                fix="Free some space or choose another place",
            ) from error

    def _write(self, aside: Path) -> None:
        self.tiger.save(aside / "tiger")
        self.neighbours.save(aside / "neighbours")
        self.popularity.save(aside / "popularity")
        self.repeats.save(aside / "repeats")
        for name, other in self.others.items():
            if not isinstance(other, Saving) or type(other).__name__ not in READERS:
                raise ConfigError(
                    f"the retriever '{name}', a {type(other).__name__}",
                    rule=f"A bundle keeps what it can read again: {', '.join(READERS)}",
                    fix="Enter its load into tiglon.serving.bundle.READERS",
                )
            other.save(aside / "retrievers" / name)
        self.histories.save(aside / "histories")
        self.items.table.write_parquet(aside / "items.parquet")
        self.text.save(aside / "text")
        self.tokenizer.save(aside / "tokenizer")
        np.save(aside / "vectors.npy", self.vectors)
        if self.fusions:
            funnels.save(self.fusions, self.funnel_config, aside / "funnel")
        if self.ranker is not None:
            self.ranker.save(aside / "ranker")
        (aside / "metrics.json").write_text(json.dumps(self.metrics, indent=1), encoding="utf-8")
        (aside / "ids_report.txt").write_text(self.id_report().table(), encoding="utf-8")

    def _about(self) -> dict[str, Any]:
        return {
            "tiglon": tiglon.__version__,
            "recipe": self.recipe,
            "exclude_seen": self.exclude_seen,
            "retrievers": list(self.others),
            "minutes": dict(self.minutes),
            "ids": {"version": self.tiger.ids.version, "parent": self.tiger.ids.parent},
            "data": {
                "events": len(self.histories.item),
                "users": len(self.histories),
                "items": len(self.items),
            },
            "schema": {name: str(kind) for name, kind in self.items.table.schema.items()},
        }

    @classmethod
    def load(cls, path: str | Path) -> Bundle:
        """What `save` wrote, with the same answers. Raises BundleDamagedError, BundleVersionError."""
        path = Path(path)
        before = _manifest(path)
        try:
            bundle = cls._load(path)
        except BundleDamagedError:
            if _manifest(path) == before:
                raise
        else:
            if _manifest(path) == before:
                return bundle
        return cls.load(path)  # another took its place while it was read

    @classmethod
    def _load(cls, path: Path) -> Bundle:
        manifest = _checked_manifest(path)
        try:
            table = pl.read_parquet(path / "items.parquet", glob=False)  # a path may hold brackets
            neighbours = NeighbourSum.load(path / "neighbours")
            fusions, funnel_config = (
                funnels.load(path / "funnel") if (path / "funnel").is_dir() else ({}, FunnelConfig())
            )
            bundle = cls(
                items=Items(Vocabulary(table["item_id"]), table),
                tiger=Tiger.load(path / "tiger"),
                neighbours=neighbours,
                popularity=Popularity.load(path / "popularity"),
                repeats=Repeats.load(path / "repeats"),
                histories=HistoryStore.load(path / "histories"),
                text=ItemText.load(path / "text"),
                tokenizer=tokenizers.load(path / "tokenizer"),
                vectors=np.load(path / "vectors.npy", mmap_mode="r"),
                exclude_seen=manifest["exclude_seen"],
                recipe=manifest["recipe"],
                metrics=json.loads((path / "metrics.json").read_text(encoding="utf-8")),
                fusions=fusions,
                funnel_config=funnel_config,
                ranker=LifelongRanker.load(path / "ranker") if (path / "ranker").is_dir() else None,
                others={n: load_retriever(path / "retrievers" / n) for n in manifest.get("retrievers", [])},
                minutes=manifest.get("minutes", {}),
                manifest=manifest,
                path=path,
            )
        except (OSError, ValueError, KeyError, pl.exceptions.PolarsError) as error:
            raise BundleDamagedError(f"{path} cannot be read: {error}", fix="Copy it again") from error
        if bundle.items.vocabulary != bundle.tiger.items:
            raise BundleDamagedError(
                f"{path} holds a catalogue and a TIGER of different items", fix="Copy it again"
            )
        return bundle


@runtime_checkable
class Saving(Protocol):
    """A retriever that writes a folder, whose retriever.json names its class."""

    def save(self, directory: str | Path) -> None: ...


@runtime_checkable
class Growing(Protocol):
    """A retriever that new items can join by their content."""

    def add_items(self, items: Vocabulary, vectors: np.ndarray) -> None:
        """items: the whole new vocabulary, old ids first.   vectors: (M, C) of the new ones."""
        ...


def _listed(given: Any, name: str, way: str) -> list[Any]:
    """What a list holds. Raises ConfigError for what is none; a string is a list of letters by mistake alone."""
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise ConfigError(f"{name} of {given!r:.80}", rule="It is a list", fix=f"Pass {way}")
    return list(given)


def _ids(given: Any, name: str, way: str) -> list[int | str]:
    """The ids of a list as Python has them. Raises ConfigError for what is none."""
    found = [value.item() if isinstance(value, np.generic) else value for value in _listed(given, name, way)]
    for place, value in enumerate(found):
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise ConfigError(
                f"{name}[{place}] of {value!r:.80}", rule="An id is a whole number or a string, as in the log"
            )
    return found


def _require_mode(exclude_seen: Any) -> None:
    if exclude_seen is not None and not isinstance(exclude_seen, (bool, np.bool_)):
        raise ConfigError(
            f"exclude_seen={exclude_seen!r:.80}", rule="It is True, False, or None for as the bundle was made"
        )


def _joined(retriever: Retriever, items: Vocabulary, vectors: np.ndarray) -> Retriever:
    """The retriever with new items, or as it is: the funnel then reads their likes in their place."""
    if not isinstance(retriever, Growing):
        return retriever
    shared = (retriever.log, retriever.items)  # never changed; all else is copied, for requests still read it
    grown = copy.deepcopy(retriever, {id(part): part for part in shared})
    try:
        grown.add_items(items, vectors)
    except ConfigError:  # it knows items by their ids alone
        return retriever
    return grown


def load_retriever(folder: Path) -> Retriever:
    """Any that `READERS` knows, with what it learned. Raises BundleVersionError for another."""
    kind = json.loads((folder / "retriever.json").read_text(encoding="utf-8"))["kind"]
    if kind not in READERS:
        raise BundleVersionError(
            f"a retriever of the kind {kind} in {folder}",
            rule=f"This is Tiglon {tiglon.__version__}, which reads {', '.join(READERS)}",
            fix="Update Tiglon: pip install --upgrade tiglon",
        )
    return READERS[kind](folder)


def is_bundle(path: str | Path) -> bool:
    """Whether a folder says of itself that it is one."""
    return (Path(path) / "manifest.json").is_file()


def is_home(path: str | Path) -> bool:
    """Whether bundles are published in a folder."""
    return (Path(path) / "CURRENT").exists()


def require_bundle(path: Path) -> None:
    """BundleDamagedError where there is none, saying what stands there instead."""
    if is_bundle(path):
        return
    if is_ranker(path):
        raise BundleDamagedError(
            f"{path} is a ranker",
            rule="A ranker orders what a bundle finds",
            fix="Give a bundle; to have both in one: tiglon train --recipe R … --into BUNDLE",
        )
    if is_home(path):
        raise BundleDamagedError(
            f"{path} is a home of published bundles",
            rule="What is published there never changes",
            fix=f"Take one of {path / 'bundles'}; to change one, change a copy, and publish that",
        )
    raise BundleDamagedError(
        f"no bundle at {path}" if not path.exists() else f"{path} has no manifest.json",
        rule="A bundle is a folder that `tiglon train` wrote",
        fix="Check the path, or train one: tiglon train --interactions F --items G --out BUNDLE",
    )


def revise(path: Path, change: Callable[[Bundle], Bundle]) -> tuple[Bundle, Bundle]:
    """The bundle at `path` before and after a change; made anew where another process changed it meanwhile.

    change: its own argument where there is nothing to change. Raises what it raises, BundleError, StorageError.
    """
    while True:
        old = Bundle.load(path)
        new = change(old)
        if new is old:
            return old, old
        try:
            new.save(path, instead_of=old.version)
        except BundleChangedError:
            continue
        return old, new


def require_version(path: Path, version: str) -> None:
    """BundleChangedError where another bundle stands there."""
    try:
        found = json.loads(_manifest(path) or "{}").get("version", "none")
    except ValueError:
        found = "none"
    if found != version:
        raise BundleChangedError(
            f"version {found} in {path}, where {version} was changed",
            rule="A change takes the place of what it was made of",
            fix="Load it again, and change that",
        )


def require_same_log(bundle: HistoryStore, ranker: HistoryStore) -> None:
    """DataError where a ranker's log is not the bundle's."""
    same = bundle.users == ranker.users and bundle.items == ranker.items
    if not (same and np.array_equal(bundle.item, ranker.item) and np.array_equal(bundle.time, ranker.time)):
        raise DataError(
            f"a ranker's log of {len(ranker.item):,} events, which is not the bundle's, of {len(bundle.item):,}",
            rule="Both learn from one log, so that the moments that weigh the ranker are new to it",
            fix="Train the ranker on the tables that the bundle was trained on",
        )


def require_free(path: Path, overwrite: bool) -> None:
    """ConfigError where something stands at `path` that must not be replaced."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if is_home(path):
        raise ConfigError(
            f"{path}, which is a home of published bundles",
            fix=f"Choose another path, and publish what stands there then: tiglon publish BUNDLE {path}",
        )
    if not is_bundle(path):
        what = "is a ranker" if is_ranker(path) else "exists and is no bundle"
        raise ConfigError(f"{path}, which {what}", fix="Choose another path")
    if not overwrite:
        raise ConfigError(
            f"{path}, where a bundle stands already",
            fix="Choose another path, or pass --overwrite (overwrite=True)",
        )


def matching_id(vocabulary: Vocabulary, text: str) -> Any:
    """A raw id typed on a command line, as the vocabulary's type. Raises UnknownIdError, ConfigError."""
    found: int | str = text
    if pa.types.is_integer(vocabulary.raw.type):
        if not re.fullmatch(r"0|-?[1-9][0-9]*", text):  # int() would take "007", " 7" and "1_0", too
            example = f", such as {vocabulary.raw[0]}" if len(vocabulary) else ""
            raise UnknownIdError(f"the id {text!r:.80}", rule=f"Ids here are whole numbers{example}")
        found = int(text)
    try:
        return ID.validate_python(found)
    except ValidationError as error:
        raise ConfigError(f"the id {text!r:.80}", rule=ID_RULE) from error


def _as_schema(table: pl.DataFrame, schema: pl.Schema) -> pl.DataFrame:
    """The columns of an older table, null where this one lacks them. Raises SchemaError."""
    if not set(table.columns) & set(schema.names()[1:]) and len(schema) > 1:
        raise SchemaError(
            f"an item table with the columns {', '.join(table.columns)}",
            rule=f"The bundle's items have {', '.join(schema.names())}",
            fix="Rename its columns to these",
        )
    columns = []
    for name, kind in schema.items():
        column = table[name] if name in table.columns else pl.Series(name, [None] * table.height)
        try:
            columns.append(column.cast(kind))
        except pl.exceptions.PolarsError as error:
            raise SchemaError(
                f"the column '{name}' of the new items, of {column.dtype}",
                rule=f"The bundle's is of {kind}",
                fix="Give it the type of the first item table",
            ) from error
    return pl.DataFrame(columns)


# -- the manifest ------------------------------------------------------------------------------------


def _write_manifest(folder: Path, about: dict[str, Any]) -> None:
    """List every file, flush everything, the manifest last."""
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        file.chmod(0o644)  # who serves is often not who trained
        files[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        _flush(file)
    manifest = {"format": FORMAT, **about, "files": files}
    manifest["version"] = _version(manifest)
    manifest["created"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    path = folder / "manifest.json"
    path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
    _flush(path)
    for directory in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        _flush(directory)


def _manifest(path: Path) -> str | None:
    try:
        return (path / "manifest.json").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _checked_manifest(path: Path) -> dict[str, Any]:
    """The manifest, once every file that it lists is there and has its checksum."""
    require_bundle(path)
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] > FORMAT:
            raise BundleVersionError(
                f"a bundle of format {manifest['format']}, written by Tiglon {manifest.get('tiglon', '?')}",
                rule=f"This is Tiglon {tiglon.__version__}, which reads formats up to {FORMAT}",
                fix="Update Tiglon: pip install --upgrade tiglon",
            )
        files, version = manifest["files"], manifest["version"]
        if _version(manifest) != version:
            raise ValueError("its content is not what its version says")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleDamagedError(
            f"{path / 'manifest.json'} cannot be read: {error}", fix="Copy the bundle again"
        ) from error
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise BundleDamagedError(f"{name} is missing from {path}", fix="Copy the bundle again")
        size = file.stat().st_size
        if size != expected["bytes"] or _sha256(file) != expected["sha256"]:
            raise BundleDamagedError(
                f"{name} in {path} is damaged: {size:,} bytes, and another checksum than the manifest's "
                f"{expected['bytes']:,} bytes",
                fix="Copy the bundle again",
            )
    return manifest


def _version(manifest: dict[str, Any]) -> str:
    """Hash of the content: everything but the version itself, the time of writing and how long training took."""
    left_out = ("version", "created", "minutes")
    content = {name: value for name, value in manifest.items() if name not in left_out}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
