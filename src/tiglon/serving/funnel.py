"""The funnel: what several retrievers find becomes one list.

    histories ─▶ retrievers    each gives its best `candidates`
              ─▶ pool          every item once, with its place and score at each retriever
              ─▶ features      those, and what the user did with the item before
              ─▶ fusion        one linear score an item
              ─▶ ranker        where there is one, its log-odds added to the scores of the best
              ─▶ the k best

The fusion learns on what the retrievers really return: the target of a user's validation moment against the
other candidates, retrieved and not taken. The retrievers have seen training events only, so nothing that the
fusion reads knows the target. Half of the users learn and the other half choose the strength of the penalty,
with which all of them then learn; the test is read once, afterwards. With seen items hidden and with them shown, other candidates compete, so
there is a fusion for each.

A retriever that scores the whole catalogue (`CatalogueScorer`) tells the score of every candidate, whoever
found it; of any other only the places and scores in its own list are known.

A lifelong ranker reads the whole life beside each of a user's best candidates. How much its log-odds weigh is
chosen on the same validation, after the fusion has learned; nothing is a weight, too, where it does not help.

Letters: B users, T candidates of all of them, R retrievers, F features, N items.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from tiglon.errors import ConfigError, DataError, require_counts, require_weights
from tiglon.retrieval.dense import DenseRetriever
from tiglon.retrieval.neighbours import CatalogueScorer, NeighbourSum
from tiglon.retrieval.retriever import Retriever, require_k
from tiglon.retrieval.topk import require_deny, tie_keys, top_items
from tiglon.serving.remembered import Remembered
from tiglon.types import MISSING, Candidates, Histories, Targets

FORMAT = 1
_SCORES_AT_ONCE = 1 << 22  # of a batch, B × N
_K = 10  # places of a list that count when weights are learned and selected
RANKED = 50  # candidates of a user that the lifelong ranker reads, the best of the fusion
_RANKER_WEIGHTS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0)  # of its log-odds; the best on the validation stays


@dataclass(frozen=True)
class FunnelConfig:
    candidates: int = 100  # of each retriever that scores the whole catalogue
    dense: int = 100  # of each that compares a vector with every item's: SASRec, two towers
    generated: int = 50  # of each other one, such as TIGER, whose cost grows with them
    users: int = 4_000  # that the fusion learns on, at most
    penalties: tuple[float, ...] = (
        1e-4,
        1e-3,
        1e-2,
    )  # of squared weights; the best on half of the users stays
    seed: int = 0

    def __post_init__(self) -> None:
        require_counts(self, "candidates", "dense", "generated")
        if self.users < 2:
            raise ConfigError(f"users={self.users}", rule="Half of the users learn, the others select")
        if not self.penalties or not all(0 <= one < math.inf for one in self.penalties):
            raise ConfigError(
                f"penalties={self.penalties}", rule="There is at least one, each at least 0 and finite"
            )
        require_weights(self, "seed")

    def gives(self, retriever: Retriever, k: int = 1) -> int:
        """Candidates that a retriever is asked for; k, where that is more and more of them cost it nothing."""
        if isinstance(retriever, CatalogueScorer):
            return max(self.candidates, k)
        return max(self.dense, k) if isinstance(retriever, DenseRetriever) else self.generated


# -- the pool ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pool:
    """What R retrievers found for B users: each item of a user once, ascending.

    offsets: (B+1,).   item: (T,) dense.   rank: (T, R) int32, the place at each retriever from 1, 0 where it
    did not find the item.   score: (T, R) float32, as each gives it; NaN where a list does not have the item,
    0 where a catalogue does not.
    """

    names: tuple[str, ...]
    offsets: np.ndarray
    item: np.ndarray
    rank: np.ndarray
    score: np.ndarray

    def __len__(self) -> int:
        """How many users."""
        return len(self.offsets) - 1

    @cached_property
    def owner(self) -> np.ndarray:
        """(T,) which of the B users each candidate is for."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def only(self, user: int) -> Pool:
        """The pool of one of the users."""
        rows = slice(self.offsets[user], self.offsets[user + 1])
        offsets = np.array([0, rows.stop - rows.start])
        return Pool(self.names, offsets, self.item[rows], self.rank[rows], self.score[rows])


def gather(
    retrievers: Sequence[Retriever],
    histories: Histories,
    n_items: int,
    config: FunnelConfig,
    *,
    k: int = 1,
    exclude_seen: bool = True,
    allowed: np.ndarray | None = None,
    extra: np.ndarray | None = None,
    stand_in: np.ndarray | None = None,
    skip: Collection[str] = (),
    spent: Callable[[str, float], None] = lambda name, seconds: None,
    remembered: Remembered | None = None,
) -> Pool:
    """Ask every retriever and merge. A retriever may know fewer items than the N of the catalogue.

    k: candidates of each retriever that scores every item, where that is more than the config says.
    allowed: (N,) bool, items that may be returned.   extra: dense items that are scored whoever finds them.
    stand_in: (N,) the known item that a retriever which was fitted before an item came reads in its place.
    skip: names of retrievers that are not asked; they find nothing.   spent: told the seconds of each other.
    remembered: lists that need not be made again.
    """
    B, R = len(histories), len(retrievers)
    owner = histories.owner
    items: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    matrices: dict[int, np.ndarray] = {}
    evidence: dict[Retriever, np.ndarray] = {}
    readable: dict[int, Histories] = {}  # by those who know so many items
    for r, retriever in enumerate(retrievers):
        if retriever.name in skip:
            items.append(np.empty((B, 0), np.int64))
            scores.append(np.empty((B, 0), np.float32))
            continue
        began = time.perf_counter()
        known = len(retriever.items)
        if known not in readable:
            readable[known] = _known(histories, known, stand_in)
        if isinstance(retriever, CatalogueScorer):
            if isinstance(retriever, NeighbourSum) and {retriever.text, retriever.together} <= set(evidence):
                told = evidence[retriever.text] + evidence[retriever.together]  # looked up just now
            else:
                told = retriever.evidence(readable[known])
            evidence[retriever] = told
            matrices[r] = matrix = retriever.or_popularity(told)
            hidden = owner, histories.item
            if known < n_items:
                there = histories.item < known
                hidden = owner[there], histories.item[there]
            open_ = matrix
            if exclude_seen or allowed is not None:
                open_ = matrix.copy()
                if exclude_seen:
                    open_[hidden] = -np.inf
                if allowed is not None:
                    open_[:, ~allowed[:known]] = -np.inf
            best, asked = top_items(open_, config.gives(retriever, k)), B
            item = best.item
        else:
            read = histories if known == n_items else readable[known]
            most = config.gives(retriever, k)
            rules: dict[str, Any] = {"exclude_seen": exclude_seen}
            if allowed is not None:
                rules["deny"] = ~allowed[:known]
            if remembered is None:
                best, asked = retriever.retrieve(read, most, **rules), B
            else:
                best, asked = remembered.retrieve(retriever, read, most, **rules)
            item = best.item
        items.append(item)
        scores.append(best.score)
        if asked:
            spent(retriever.name, time.perf_counter() - began)

    keys, places = [], []
    for item in items:
        row, place = np.nonzero(item != MISSING)
        keys.append(row * n_items + item[row, place])
        places.append((row, place))
    more = [] if extra is None else [(np.arange(B)[:, None] * n_items + extra).ravel()]
    key, at = np.unique(np.concatenate([*keys, *more]), return_inverse=True)
    of, item = key // n_items, key % n_items
    rank = np.zeros((len(key), R), np.int32)
    score = np.full((len(key), R), np.nan, np.float32)
    start = 0
    for r, (row, place) in enumerate(places):
        here = at[start : start + len(row)]
        rank[here, r] = place + 1
        if r in matrices:
            known = matrices[r].shape[1]
            there = item < known
            score[~there, r] = 0
            score[there, r] = matrices[r][of[there], item[there]]
        else:
            score[here, r] = scores[r][row, place]
        start += len(row)
    offsets = np.searchsorted(of, np.arange(B + 1))
    return Pool(tuple(r.name for r in retrievers), offsets, item, rank, score)


def _known(histories: Histories, known: int, stand_in: np.ndarray | None) -> Histories:
    """The histories as a retriever of `known` items reads them: newer ones by another's name, or left out."""
    item = histories.item
    if stand_in is not None:
        item = stand_in[item]
    there = (item >= 0) & (item < known)
    if there.all():
        return replace(histories, item=item)
    lengths = np.bincount(histories.owner[there], minlength=len(histories))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Histories(offsets, item[there], histories.time[there], user=histories.user)


# -- features --------------------------------------------------------------------------------------------------

DECAYS = (0.99, 0.97, 0.9, 0.7)  # of what the user did with the item, from one moment to the next
OWN = (
    "had",
    "had once",
    "had, popular",
    "times had",
    "share of moments",
    "how lately",
    "how long ago",
    *(f"weight of the past, {decay}" for decay in DECAYS),
)
_NONE = 0.01  # the weight of a past that is empty, before its logarithm


def feature_names(retrievers: Sequence[str]) -> tuple[str, ...]:
    """What `features` returns: three of each retriever, then popularity, then what the user did with the item."""
    of_each = [f"{name}: {what}" for name in retrievers for what in ("score", "place", "found")]
    return (*of_each, "popularity", *OWN)


def features(pool: Pool, histories: Histories, popularity: np.ndarray) -> np.ndarray:
    """(T, F) float32 of a pool and the histories that it was gathered for.

    Scores keep their retriever's scale (of TIGER, log-probabilities) but begin at the user's best where not
    every candidate has one; places are 1 / (10 + place).   popularity: (N,) 0 … 1.
    """
    T, R = pool.rank.shape
    out = np.zeros((T, 3 * R + 1 + len(OWN)), np.float32)
    found = pool.rank > 0
    for r in range(R):
        out[:, 3 * r] = _level(pool, r)
    out[:, 1 : 3 * R : 3] = np.where(found, 1 / (10 + pool.rank), 0)
    out[:, 2 : 3 * R : 3] = found
    out[:, 3 * R] = popularity[pool.item]
    out[:, 3 * R + 1 :] = _own(pool, histories, popularity)
    return out


def _level(pool: Pool, r: int) -> np.ndarray:
    """(T,) the scores of a retriever: as they are where every candidate has one, else below the user's best;
    a candidate that was not found stands one below the last."""
    score = pool.score[:, r]
    known = ~np.isnan(score)
    if known.all():
        return score
    best, last = np.full(len(pool), -np.inf, np.float32), np.full(len(pool), np.inf, np.float32)
    owner = pool.owner
    np.maximum.at(best, owner[known], score[known])
    np.minimum.at(last, owner[known], score[known])
    silent = ~np.isfinite(best)
    best[silent] = last[silent] = 0
    return np.where(known, score, (last - 1)[owner]) - best[owner]


def _own(pool: Pool, histories: Histories, popularity: np.ndarray) -> np.ndarray:
    """(T, len(OWN)) what each user did with each candidate before; 0 where nothing."""
    out = np.zeros((len(pool.item), len(OWN)), np.float32)
    if not len(histories.item):
        return out
    age = histories.moments_ago
    moments = np.ones(len(pool), np.int64)
    np.maximum.at(moments, histories.owner, age + 1)
    n_items = len(popularity)
    newest_first = (histories.owner * n_items + histories.item)[::-1]
    key, newest, at, times = np.unique(
        newest_first, return_index=True, return_inverse=True, return_counts=True
    )
    age = age[::-1]
    weights = [np.log(_NONE + np.bincount(at, decay**age)) - np.log(_NONE) for decay in DECAYS]
    wanted = pool.owner * n_items + pool.item
    place = np.searchsorted(key, wanted).clip(max=len(key) - 1)
    had = key[place] == wanted
    place, of = place[had], pool.owner[had]
    columns = [
        np.ones(len(place)),
        times[place] == 1,
        popularity[pool.item[had]],
        np.log1p(times[place]),
        times[place] / moments[of],
        1 / (1 + age[newest][place]),
        np.log1p(age[newest][place]),
        *(weight[place] for weight in weights),
    ]
    out[had] = np.stack(columns, axis=1)
    return out


# -- the fusion --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Fusion:
    """A score an item: the weighted sum of its features. Scores compare the items of one user."""

    retrievers: tuple[str, ...]
    weight: np.ndarray  # (F,) float32
    ranker: float = 1.0  # weight of the lifelong ranker's log-odds, where there is one; 0: it is not asked

    def __post_init__(self) -> None:
        if len(self.weight) != len(self.names):
            raise DataError(f"{len(self.weight)} weights for {len(self.names)} features")

    @property
    def names(self) -> tuple[str, ...]:
        return feature_names(self.retrievers)

    @classmethod
    def untrained(cls, retrievers: Sequence[str]) -> Fusion:
        """The places alone, each retriever counting as much (reciprocal rank fusion)."""
        names = feature_names(retrievers)
        return cls(tuple(retrievers), np.array([n.endswith(": place") for n in names], np.float32))

    def score(self, features_TF: np.ndarray) -> np.ndarray:
        """(T,)"""
        return features_TF @ self.weight

    def shares(self, features_F: np.ndarray) -> dict[str, float]:
        """What each retriever, popularity and the user's own past added to one item's score."""
        added: dict[str, float] = {}
        for name, value in zip(self.names, (features_F * self.weight).tolist(), strict=True):
            whose = name.rpartition(": ")[0] or ("own past" if name in OWN else name)
            added[whose] = added.get(whose, 0.0) + value
        return added

    def to_json(self) -> dict[str, Any]:
        weights = dict(zip(self.names, self.weight.tolist(), strict=True))
        return {"retrievers": list(self.retrievers), "weights": weights, "ranker": self.ranker}

    @classmethod
    def of_json(cls, saved: Mapping[str, Any]) -> Fusion:
        names = feature_names(saved["retrievers"])
        weight = np.array([saved["weights"][n] for n in names], np.float32)
        return cls(tuple(saved["retrievers"]), weight, saved.get("ranker", 1.0))


def best_first(pool: Pool, score: np.ndarray) -> np.ndarray:
    """(T,) rows of the pool, each user's best first; ties as `tie_keys` has them."""
    tie = tie_keys(pool.item)
    return np.lexsort((tie, -score, pool.owner))


class LifeReader(Protocol):
    """Who reads whole lives beside candidates: `serving.lifelong`."""

    def log_odds(self, lives: Histories, offsets: np.ndarray, item: np.ndarray) -> np.ndarray:
        """(T,) float32 for dense candidates (T,), of which user b has offsets[b]:offsets[b+1]."""
        ...


def ranked(reader: LifeReader, pool: Pool, score: np.ndarray, lives: Histories) -> np.ndarray:
    """(T,) what the ranker says for the `RANKED` best candidates of each user: its log-odds, less their least.

    0 for all others, which so stay behind the best under every weight.
    """
    order = best_first(pool, score)
    place = np.arange(len(order)) - pool.offsets[pool.owner]
    best = np.sort(order[place < RANKED])
    lengths = np.minimum(np.diff(pool.offsets), RANKED)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    odds = reader.log_odds(lives, offsets, pool.item[best])
    least = np.minimum.reduceat(odds, offsets[:-1][lengths > 0]) if len(odds) else odds
    added = np.zeros(len(score), np.float32)
    added[best] = odds - np.repeat(least, lengths[lengths > 0])
    return added


class Funnel(Retriever):
    """All of it as one retriever, to be measured beside its own."""

    name = "funnel"

    def __init__(
        self,
        retrievers: Sequence[Retriever],
        popularity: np.ndarray,
        fusion: Fusion | None = None,
        config: FunnelConfig | None = None,
        reader: LifeReader | None = None,
    ) -> None:
        """retrievers: of one catalogue, or of the first part of it.   popularity: (N,) events in training."""
        self.retrievers, self.reader = tuple(retrievers), reader
        self.remembered: Remembered | None = None  # lists that need not be made again
        self.items = max((r.items for r in retrievers), key=len)
        self.config = config or FunnelConfig()
        names = tuple(r.name for r in retrievers)
        self.fusion = fusion or Fusion.untrained(names)
        if self.fusion.retrievers != names:
            raise DataError(
                f"a fusion of {', '.join(self.fusion.retrievers)} for {', '.join(names)}",
                rule="A fusion weighs the retrievers that it learned with",
                fix="Learn it anew with tiglon.serving.funnel.learn",
            )
        self.popularity = log_share(popularity, len(self.items))

    @property
    def asks_ranker(self) -> bool:
        return self.reader is not None and self.fusion.ranker > 0

    def reranked(self, pool: Pool, score: np.ndarray, lives: Histories) -> np.ndarray:
        """(T,) the scores with what the ranker adds, where it is asked."""
        if self.reader is None or not self.asks_ranker:
            return score
        return score + self.fusion.ranker * ranked(self.reader, pool, score, lives)

    def retrieve(
        self, histories: Histories, k: int, *, exclude_seen: bool = True, deny: np.ndarray | None = None
    ) -> Candidates:
        require_k(k)
        require_deny(deny, len(self.items))
        k = min(k, len(self.items))
        item = np.full((len(histories), k), MISSING, np.int64)
        score = np.full((len(histories), k), -np.inf, np.float32)
        for rows, some in batches(histories, len(self.items)):
            pool = gather(
                self.retrievers,
                some,
                len(self.items),
                self.config,
                k=k,
                exclude_seen=exclude_seen,
                allowed=None if deny is None else ~deny,
                remembered=self.remembered,
            )
            value = self.fusion.score(features(pool, some, self.popularity))
            value = self.reranked(pool, value, some)
            order = best_first(pool, value)
            owner = pool.owner[order]
            place = np.arange(len(order)) - pool.offsets[owner]
            order, owner, place = (x[place < k] for x in (order, owner, place))
            item[rows.start + owner, place] = pool.item[order]
            score[rows.start + owner, place] = value[order]
        return Candidates(item, score, self.name)


def batches(histories: Histories, n_items: int) -> list[tuple[slice, Histories]]:
    """Histories in parts whose scores of the whole catalogue fit into memory."""
    step = min(64, max(1, _SCORES_AT_ONCE // max(n_items, 1)))
    return [(slice(a, a + step), histories.take(slice(a, a + step))) for a in range(0, len(histories), step)]


def log_share(counts: np.ndarray, n_items: int) -> np.ndarray:
    """(N,) 0 … 1 of events an item in training; 0 for items that came later."""
    share = np.log1p(counts) / max(np.log1p(counts.max(initial=0)), 1e-9)
    return np.concatenate([share, np.zeros(n_items - len(counts))]).astype(np.float32)


# -- learning --------------------------------------------------------------------------------------------------


def learn(
    retrievers: Sequence[Retriever],
    popularity: np.ndarray,
    validation: Targets,
    config: FunnelConfig | None = None,
    *,
    exclude_seen: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Fusion:
    """A fusion from the validation targets of retrievers that were fitted on training events alone.

    The loss is −log softmax of each taken candidate among all of its user's, divided by the user's best possible
    DCG@10, as NDCG@10 is; users none of whose targets was found teach nothing. Without at least ten users that teach and ten that select, it stays untrained.
    progress: called with (users done, users in all).
    """
    c = config or FunnelConfig()
    random = np.random.default_rng(c.seed)
    rows = random.permutation(len(validation))[: c.users]
    targets = validation.take(rows)
    names = tuple(r.name for r in retrievers)
    n_items = max(len(r.items) for r in retrievers)
    share = log_share(popularity, n_items)
    parts: list[Lists] = []
    for at, some in batches(targets.histories, n_items):
        pool = gather(retrievers, some, n_items, c, exclude_seen=exclude_seen)
        truth = targets.truth.take(at)
        taken = np.isin(pool.owner * n_items + pool.item, truth.owner * n_items + truth.item)
        parts.append(Lists(features(pool, some, share), np.diff(pool.offsets), taken, truth.lengths))
        if progress is not None:
            progress(min(at.stop, len(targets)), len(targets))
    half = len(parts) // 2
    if half < 1:
        parts = [part for whole in parts for part in whole.halves()]
        half = len(parts) // 2
    learned, selected = (Lists.join(some) for some in (parts[:half], parts[half:]))
    if min(learned.useful(), selected.useful()) < 10:
        return Fusion.untrained(names)
    score = {penalty: selected.ndcg(learned.fit(penalty)) for penalty in c.penalties}
    best = max(score, key=score.__getitem__)
    untrained = Fusion.untrained(names)
    if score[best] <= selected.ndcg(untrained.weight):
        return untrained
    return Fusion(names, Lists.join([learned, selected]).fit(best).astype(np.float32))


def weigh(
    funnel: Funnel,
    validation: Targets,
    *,
    exclude_seen: bool,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Fusion, dict[float, float]]:
    """The funnel's fusion with the best weight for its ranker, and NDCG@10 by weight, on the validation targets.

    The ranker has learned from training moments alone. Of equal weights the smaller one stays.
    progress: called with (users done, users in all).
    """
    assert funnel.reader is not None
    random = np.random.default_rng(funnel.config.seed)
    targets = validation.take(random.permutation(len(validation))[: funnel.config.users])
    n_items, parts = len(funnel.items), []
    for at, some in batches(targets.histories, n_items):
        pool = gather(funnel.retrievers, some, n_items, funnel.config, exclude_seen=exclude_seen)
        truth = targets.truth.take(at)
        taken = np.isin(pool.owner * n_items + pool.item, truth.owner * n_items + truth.item)
        score = funnel.fusion.score(features(pool, some, funnel.popularity))
        both = np.stack([score, ranked(funnel.reader, pool, score, some)], axis=1)
        parts.append(Lists(both, np.diff(pool.offsets), taken, truth.lengths))
        if progress is not None:
            progress(min(at.stop, len(targets)), len(targets))
    lists = Lists.join(parts)
    found = {weight: lists.ndcg(np.array([1.0, weight])) for weight in _RANKER_WEIGHTS}
    return replace(funnel.fusion, ranker=max(found, key=found.__getitem__)), found


@dataclass(frozen=True, eq=False)
class Lists:
    """Candidates of B users. features: (T, F).   lengths: (B,).   taken: (T,) bool.
    targets: (B,) how many items each user took, found or not."""

    features: np.ndarray
    lengths: np.ndarray
    taken: np.ndarray
    targets: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[Lists]) -> Lists:
        columns = ("features", "lengths", "taken", "targets")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in columns))

    def halves(self) -> tuple[Lists, Lists]:
        B = len(self.lengths) // 2
        T = int(self.lengths[:B].sum())
        return (
            Lists(self.features[:T], self.lengths[:B], self.taken[:T], self.targets[:B]),
            Lists(self.features[T:], self.lengths[B:], self.taken[T:], self.targets[B:]),
        )

    @cached_property
    def owner(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def hits(self) -> np.ndarray:
        """(B,) how many candidates of each user were taken."""
        return np.bincount(self.owner, self.taken, len(self.lengths))

    def useful(self) -> int:
        """Users of whose targets something was found."""
        return int((self.hits > 0).sum())

    @cached_property
    def ideal(self) -> np.ndarray:
        """(B,) the best possible DCG@10."""
        best = np.cumsum(1 / np.log2(np.arange(_K) + 2))
        return best[np.clip(self.targets, 1, _K) - 1]

    def ndcg(self, weight: np.ndarray) -> float:
        """The mean over users of NDCG@10."""
        order = np.lexsort((-(self.features @ weight.astype(np.float32)), self.owner))
        place = np.arange(len(order)) - (np.cumsum(self.lengths) - self.lengths)[self.owner]
        gain = self.taken[order] / np.log2(place + 2) * (place < _K)
        return float((np.bincount(self.owner, gain, len(self.lengths)) / self.ideal).mean())

    def fit(self, penalty: float) -> np.ndarray:
        """(F,) weights with the least loss and penalty; the penalty acts on features of unit variance."""
        some = self.hits > 0
        rows = np.repeat(some, self.lengths)
        x = self.features[rows]
        scale = x.std(axis=0) + 1e-6
        x = (x - x.mean(axis=0)) / scale
        lengths, ideal = self.lengths[some], self.ideal[some]
        start = np.cumsum(lengths) - lengths
        owner = np.repeat(np.arange(len(lengths)), lengths)
        share = (self.taken[rows] / ideal[owner]).astype(np.float32)
        user = (self.hits[some] / ideal).astype(np.float32)  # the sum of each user's shares
        total = float(user.sum())

        def loss(weight: np.ndarray) -> tuple[float, np.ndarray]:
            score = x @ weight.astype(np.float32)
            score -= np.maximum.reduceat(score, start)[owner]
            exponential = np.exp(score)
            sums = np.add.reduceat(exponential, start)
            value = float(((user * np.log(sums)).sum() - (share * score).sum()) / total)
            slope = x.T @ (exponential * (user / sums)[owner] - share) / total
            return value + penalty * float(weight @ weight), slope.astype(float) + 2 * penalty * weight

        with threadpool_limits(1):  # the optimizer's own sums are too small to be shared
            found = minimize(
                loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 200}
            )
        return found.x / scale


# -- files -------------------------------------------------------------------------------------------------------


def save(fusions: Mapping[bool, Fusion], config: FunnelConfig, directory: Path) -> None:
    """Write funnel.json. fusions: by whether seen items are hidden."""
    directory.mkdir(parents=True)
    about = {
        "format": FORMAT,
        "candidates": config.candidates,
        "dense": config.dense,
        "generated": config.generated,
        "fusions": {"masked" if hidden else "shown": fusion.to_json() for hidden, fusion in fusions.items()},
    }
    text = json.dumps(about, indent=1, ensure_ascii=False)
    (directory / "funnel.json").write_text(text, encoding="utf-8")


def load(directory: Path) -> tuple[dict[bool, Fusion], FunnelConfig]:
    """What `save` wrote. Raises OSError, ValueError, KeyError."""
    about = json.loads((directory / "funnel.json").read_text(encoding="utf-8"))
    if about["format"] > FORMAT:
        raise ValueError(f"a funnel of format {about['format']}; this Tiglon reads up to {FORMAT}")
    fusions = {mode == "masked": Fusion.of_json(saved) for mode, saved in about["fusions"].items()}
    dense = about.get("dense", about["generated"])  # what fusions learned with before it had a name
    return fusions, FunnelConfig(about["candidates"], dense, about["generated"])
