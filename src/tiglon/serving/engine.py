"""Requests in, answers out, with reasons.

    life ─▶ retrievers ─▶ pool ─▶ fusion ─▶ (lifelong ranker) ─▶ (language model) ─▶ rules ─▶ answer

    engine = Engine(Bundle.load("runs/first"), LmdbState("runs/state"))
    engine.recommend(RecommendRequest(user_id=7, k=5))

Whose life. The `history` of the request, where there is one; else what the bundle and the state know of the
user. Where nothing is known, the answer is what is popular. Whatever stood in for something better is said in
`degraded`.

Rules. An item is never returned if it was removed, is denied, is not among the allowed, or is of the user's
own past with exclude_seen; these are kept out before the retrievers choose, so that a list stays full. Caps on
a column are kept while the list is written. A list is shorter than k only where the rules leave no more items.

New items. A retriever that was fitted before an item came knows nothing of it. In a life it reads the item
whose vector is nearest in its place; and in an answer a new item stands right behind that nearest item, or where
TIGER and the networks put it, who know it by its content. One in ten of a list is new at most, but at least
one, unless nothing else is left.

Time. With a budget, TIGER, the ranker and the language model are left out when what they usually take does not
fit into what is left of it: the neighbours answer alone. Requests that are asked together share the work, but
never at the cost of one's budget: of those with a budget only such as have time for none of the slow steps.

Threads. A request keeps the catalogue that it began with; a change makes the next one.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl
import polars.selectors as cs

from tiglon.errors import (
    ConfigError,
    DataError,
    LanguageModelError,
    SchemaError,
    StorageError,
    UnknownIdError,
    did_you_mean,
)
from tiglon.llm.recommender import Listwise, Pointwise
from tiglon.ranking.model import LifelongRanker
from tiglon.retrieval.neighbours import CatalogueScorer
from tiglon.serving.bundle import Bundle
from tiglon.serving.catalogue import Catalogue
from tiglon.serving.funnel import Funnel, Pool, best_first, features, gather
from tiglon.serving.messages import (
    Asked,
    Attention,
    BeamResponse,
    Event,
    EventsRequest,
    EventsResponse,
    Explanation,
    Filtered,
    FindResponse,
    ForgetResponse,
    Id,
    ItemDetails,
    ItemsRequest,
    ItemsResponse,
    LookupResponse,
    RankRequest,
    RankResponse,
    RecommendedItem,
    RecommendRequest,
    RecommendResponse,
    SimilarItem,
    SimilarRequest,
    SimilarResponse,
    Source,
    TreeItem,
    TreeResponse,
    UserResponse,
)
from tiglon.serving.state import Life, State
from tiglon.serving.tree import beam_of, node_of
from tiglon.types import MISSING, Histories

NEW_SHARE = 10  # one new item in so many of a list
FORGET = 0.995  # of a stage's usual time, for each request that skips it: one in hundreds tries it again
RERANKED = 20  # candidates that a language model reads
STATE_DOWN = "state down: only what the bundle holds was read"


@dataclass(eq=False)
class _Asking:
    """One request on its way: who asks, what was found, what was left out."""

    request: Asked
    life: Histories  # of one user
    degraded: list[str]
    began: float
    pool: Pool | None = None
    features: np.ndarray | None = None  # (T, F)
    score: np.ndarray = field(default_factory=lambda: np.empty(0))  # (T,)
    moved: float | np.ndarray = 0.0  # (T,) what of the score is the language model's

    @property
    def stranger(self) -> bool:
        return not len(self.life.item)


class Engine:
    """Answers requests on a bundle. Safe to use from several threads.

    state: what users did since; None: only the bundle's own lives, and no events are taken.
    ranker: orders the best of the funnel anew; None: the bundle's, if it has one.
    reranker: a language model that orders the first 20 of that anew, within the time it has; None: none.
    reranker_text: what it reads of an item, such as "{title}"; None: what the bundle reads. SchemaError for a
        column that the items lack.
    on_stage: told the seconds of each stage, by its name.
    """

    def __init__(
        self,
        bundle: Bundle,
        state: State | None = None,
        ranker: LifelongRanker | None = None,
        on_stage: Callable[[str, float], None] = lambda name, seconds: None,
        reranker: Listwise | Pointwise | None = None,
        reranker_text: str | None = None,
    ) -> None:
        self.state, self._reranker, self._reranker_text = state, reranker, reranker_text
        self.pace: dict[str, float] = {}  # stage → seconds that it usually takes
        self._on_stage = on_stage
        self._catalogue = Catalogue(bundle if ranker is None else replace(bundle, ranker=ranker))
        self._catalogue.describe(np.arange(len(self._catalogue))[:1], reranker_text)
        self._change = threading.Lock()

    @property
    def bundle(self) -> Bundle:
        """With all changes of the catalogue."""
        return self._catalogue.bundle

    # -- recommend ---------------------------------------------------------------------------------

    def recommend(self, request: RecommendRequest) -> RecommendResponse:
        """The k best items. Raises ConfigError for a column that does not exist."""
        return self.recommend_many([request])[0]

    def recommend_many(self, requests: Sequence[RecommendRequest]) -> list[RecommendResponse]:
        """The same answers; requests without lists of their own share the work."""
        now = self._catalogue
        began = time.perf_counter()
        for request in requests:
            _require_columns(now, request.at_most)
        askings = [self._asking(now, request, began) for request in requests]
        for group in self._groups(now, askings):
            self._find(now, group)
        return [self._answer(now, asking, request) for asking, request in zip(askings, requests, strict=True)]

    def _groups(self, now: Catalogue, askings: Sequence[_Asking]) -> list[list[_Asking]]:
        """Those that can be answered by the same work."""
        groups: dict[Any, list[_Asking]] = {}
        for i, asking in enumerate(askings):
            r = _recommend(asking)
            together = self._shares(now, r, self._left(asking))
            groups.setdefault((r.k, r.exclude_seen, r.budget_ms is None) if together else i, []).append(
                asking
            )
        return list(groups.values())

    def shares(self, request: RecommendRequest) -> bool:
        """Whether it would be answered by the same work as others, and not by a network of its own."""
        left = np.inf if request.budget_ms is None else request.budget_ms / 1e3
        return self._shares(self._catalogue, request, left)

    def _shares(self, now: Catalogue, request: RecommendRequest, left: float) -> bool:
        """left: seconds of its budget, which leave no time for any slow stage, or are endless."""
        if request.budget_ms is None or not shares_work(request):
            return shares_work(request)
        funnel = now.funnels[_hidden(now, request)]
        stages = [*_slow(funnel), *(["ranker"] if funnel.asks_ranker else [])]
        return all(left < self.pace.get(stage, 0.0) for stage in stages)

    def _find(self, now: Catalogue, askings: Sequence[_Asking]) -> None:
        """Candidates and their scores, for requests that share hidden items, lists and k."""
        request = _recommend(askings[0])
        hidden, allowed = _hidden(now, request), _allowed(now, request)
        strange = [asking for asking in askings if asking.stranger]
        for some, stranger in ((strange, True), ([a for a in askings if not a.stranger], False)):
            if some:
                width = request.k if not request.at_most else 4 * request.k
                self._gather(now, some, hidden, stranger, k=width, allowed=allowed)

    def _gather(
        self, now: Catalogue, askings: Sequence[_Asking], hidden: bool, stranger: bool, **rules: Any
    ) -> None:
        """Ask the retrievers for some lives at once; of strangers only popularity has anything to say."""
        funnel = now.funnels[hidden]
        skip = {r.name for r in funnel.retrievers[1:]}
        if not stranger:
            skip = {name for name in _slow(funnel) if self._too_slow(name, askings)}
        lives = _together([asking.life for asking in askings])
        stand_in, allowed = None, rules.pop("allowed", None)
        if len(now) > now.trained:
            stand_in = now.stand_in
            if now.silent.any():  # networks would make something up
                allowed = ~now.silent if allowed is None else allowed & ~now.silent
        pool = gather(
            funnel.retrievers,
            lives,
            len(now),
            funnel.config,
            exclude_seen=hidden,
            stand_in=stand_in,
            skip=skip,
            spent=lambda name, seconds: self._spent(name, seconds, len(askings)),
            remembered=now.remembered,
            allowed=allowed,
            **rules,
        )
        began = time.perf_counter()
        values = features(pool, lives, funnel.popularity)
        score = pool.score[:, 0] if stranger else funnel.fusion.score(values)
        score = np.nan_to_num(score)
        self._spent("fusion", time.perf_counter() - began, len(askings))
        if funnel.asks_ranker and not stranger and not self._too_slow("ranker", askings):
            began = time.perf_counter()
            score = funnel.reranked(pool, score, lives)
            self._spent("ranker", time.perf_counter() - began, len(askings))
        for b, asking in enumerate(askings):
            rows = slice(pool.offsets[b], pool.offsets[b + 1])
            asking.pool, asking.features = pool.only(b), values[rows]
            asking.score = score[rows]

    def _rerank(self, now: Catalogue, asking: _Asking) -> None:
        """Give the scores of the first to the items in the order of the language model."""
        pool, stage, left = asking.pool, "language model", self._left(asking)
        if self._reranker is None or pool is None or asking.stranger or self._too_slow(stage, [asking]):
            return
        best = best_first(pool, asking.score)[:RERANKED]
        began = time.perf_counter()
        try:
            life, items = (
                now.describe(some, self._reranker_text)
                for some in (asking.life.item[-RERANKED:], pool.item[best])
            )
            order = self._reranker.rank(life, items, None if left == np.inf else left).order
        except (LanguageModelError, StorageError, DataError):
            asking.degraded.append(f"{stage} skipped: no answer of use in time")
        else:
            falling = asking.score[best] - 1e-6 * np.arange(len(best))  # equal ones stay in the new order
            before, asking.score = asking.score, asking.score.copy()
            asking.score[best[order]] = falling
            asking.moved = asking.score - before
        self._spent(stage, time.perf_counter() - began, 1)

    def _too_slow(self, stage: str, askings: Sequence[_Asking]) -> bool:
        """Whether the budget leaves no time for a stage; if so, `degraded` says it."""
        if min(self._left(asking) for asking in askings) >= self.pace.get(stage, 0.0):
            return False
        for asking in askings:
            if stage in self.pace:
                self.pace[stage] *= FORGET  # a stage that was slow once is tried again
            asking.degraded.append(f"{stage} skipped: time budget")
        return True

    def _left(self, asking: _Asking) -> float:
        """Seconds of the budget; endless without one."""
        budget = asking.request.budget_ms
        return np.inf if budget is None else budget / 1e3 - (time.perf_counter() - asking.began)

    def _spent(self, stage: str, seconds: float, requests: int) -> None:
        """Keep the pace of requests that were answered alone, as those with a budget are."""
        usual = self.pace.get(stage)
        if requests > 1:
            pass
        elif usual is None:
            self.pace[stage] = 0.0  # the first time, kernels are compiled: it tells nothing
        else:
            self.pace[stage] = usual + 0.1 * (seconds - usual) if usual else seconds
        self._on_stage(stage, seconds)

    # -- whose life ----------------------------------------------------------------------------------

    def _asking(self, now: Catalogue, request: Asked, began: float) -> _Asking:
        degraded: list[str] = []
        if request.history is not None:
            dense = now.items.encode(request.history)
            if unknown := int((dense == MISSING).sum()):
                degraded.append(f"{unknown} of the history's items unknown: left out")
            life = Histories.of([dense[dense != MISSING]])
        else:
            assert request.user_id is not None
            life = self._life(now, request.user_id, degraded)
        if isinstance(request, RecommendRequest):
            for ids, what in ((request.allow or (), "allowed"), (request.deny, "denied")):
                if unknown := int((now.items.encode(ids) == MISSING).sum()):
                    degraded.append(f"{unknown} of the {what} items unknown: left out")
        if not len(life.item):
            whose = "unknown user" if request.history is None else "empty history"
            degraded.append(f"{whose}: popularity")
        return _Asking(request, life, degraded, began)

    def _life(self, now: Catalogue, user_id: Id, degraded: list[str]) -> Histories:
        """What bundle and state know of one user, oldest first."""
        store = now.bundle.histories
        base = store.before(store.users.encode([user_id]))
        try:
            later = None if self.state is None else self.state.life(user_id)
        except StorageError:
            degraded.append(STATE_DOWN)
            later = None
        if later is None:
            return base
        if later.forgotten:
            base = replace(base, offsets=np.zeros(2, np.int64), item=base.item[:0], time=base.time[:0])
        dense = now.items.encode(later.item_ids)
        late = base.time >= min(later.times, default=0)  # a training may have had some of the state's
        stored = set(zip(base.item[late].tolist(), base.time[late].tolist(), strict=True))
        told = zip(dense.tolist(), later.times, strict=True)
        new = np.array([i != MISSING and (i, t) not in stored for i, t in told], bool)
        item = np.concatenate([base.item, dense[new]])
        moment = np.concatenate([base.time, np.array(later.times, np.int64)[new]])
        order = np.argsort(moment, kind="stable")
        return Histories(np.array([0, len(item)]), item[order], moment[order], user=base.user)

    # -- the answer ------------------------------------------------------------------------------------

    def _answer(self, now: Catalogue, asking: _Asking, request: RecommendRequest) -> RecommendResponse:
        pool = asking.pool
        assert pool is not None
        self._rerank(now, asking)
        chosen = self._chosen(now, asking, request)
        row_of = {int(item): row for row, item in enumerate(pool.item)}
        found = []
        for (item, like), raw in zip(chosen, now.items.decode([i for i, _ in chosen]), strict=True):
            row = row_of.get(item if like is None else like)
            found.append(self._item(now, asking, raw, item, row, like is not None and item not in row_of))
        asked = zip(pool.names, (pool.rank > 0).sum(axis=0).tolist(), strict=True)
        return RecommendResponse(
            request_id=request.request_id or new_id(),
            bundle=now.bundle.version,
            user_id=request.user_id,
            items=found,
            degraded=asking.degraded,
            sources={name: count for name, count in asked if count},
            filtered=self._filtered(now, asking, request) if request.explain else [],
        )

    def _chosen(
        self, now: Catalogue, asking: _Asking, request: RecommendRequest
    ) -> list[tuple[int, int | None]]:
        """(dense item, the one behind which it stands as a new one) of the answer."""
        barred = np.zeros(len(now), bool)
        if _hidden(now, request):
            barred[asking.life.item] = True
        if (allowed := _allowed(now, request)) is not None:
            barred |= ~allowed
        room, taken = _Caps(now, request.at_most), set[int]()
        new_left = max(1, request.k // NEW_SHARE)
        answer: list[tuple[int, int, int | None]] = []
        waiting: list[tuple[int, int, int | None]] = []  # new ones beyond their share

        def take(place: int, item: int, like: int | None) -> bool:
            if len(answer) == request.k or item in taken or not room.take(item):
                return False
            taken.add(item)
            answer.append((place, item, like))
            return True

        for place, (item, like) in enumerate(self._in_order(now, asking, now.newcomers(barred))):
            if len(answer) == request.k:
                break
            if barred[item]:
                continue
            if item < now.trained:
                take(place, item, like)
            elif not new_left:
                waiting.append((place, item, like))
            elif take(place, item, like):
                new_left -= 1
        for late in waiting:
            take(*late)
        return [(item, like) for _, item, like in sorted(answer, key=lambda found: found[0])]

    def _in_order(
        self, now: Catalogue, asking: _Asking, newcomers: Mapping[int, list[int]]
    ) -> Iterator[tuple[int, int | None]]:
        """Candidates, best first, each followed by the new items that are like it; then everything else."""
        assert asking.pool is not None
        for item in asking.pool.item[best_first(asking.pool, asking.score)].tolist():
            yield item, None
            for new in newcomers.get(item, ()):
                yield new, item
        for item in now.popular.tolist():
            yield item, None

    def _item(
        self, now: Catalogue, asking: _Asking, raw: Id, item: int, row: int | None, new: bool
    ) -> RecommendedItem:
        """row: of the pool, where the item or its like is in it."""
        pool = asking.pool
        assert pool is not None
        score = float(asking.score.min(initial=0)) if row is None else float(asking.score[row])
        if new or row is None or not pool.rank[row].any():
            source = "new item" if item >= now.trained else "popularity"
        else:
            rank = np.where(pool.rank[row] > 0, pool.rank[row], np.iinfo(np.int32).max)
            source = pool.names[int(rank.argmin())]
        reasons = self._reasons(now, asking, item, row) if asking.request.explain else None
        return RecommendedItem(item_id=raw, score=score, source=source, reasons=reasons)

    def _reasons(self, now: Catalogue, asking: _Asking, item: int, row: int | None) -> Explanation:
        pool, values = asking.pool, asking.features
        assert pool is not None
        assert values is not None
        if row is None:
            return Explanation(sources=[])
        sources = [
            Source(name=name, rank=int(rank), score=float(score))
            for name, rank, score in zip(pool.names, pool.rank[row], pool.score[row], strict=True)
            if rank
        ]
        funnel = now.funnels["repeats" not in pool.names]
        shares = {} if asking.stranger else funnel.fusion.shares(values[row])
        attended = []
        lifelong = now.bundle.lifelong
        if lifelong is not None and funnel.asks_ranker and not asking.stranger:
            shares["ranker"] = float((asking.score - asking.moved)[row]) - sum(shares.values())
            read = lifelong.attended(asking.life, item)
            raws = now.items.decode([i for i, _, _ in read])
            attended = [
                Attention(item_id=r, timestamp=t, weight=w) for r, (_, t, w) in zip(raws, read, strict=True)
            ]
        if isinstance(asking.moved, np.ndarray):
            shares["language model"] = float(asking.moved[row])
        shares = {name: share for name, share in shares.items() if share}
        return Explanation(sources=sources, features=shares, attended=attended)

    def _filtered(self, now: Catalogue, asking: _Asking, request: RecommendRequest) -> list[Filtered]:
        """What would stand among the first k without the rules, and which rule kept it out."""
        free = _Asking(request, asking.life, [], asking.began)  # within the same budget
        hidden = _hidden(now, request)
        self._gather(now, [free], False, asking.stranger, k=request.k)
        assert free.pool is not None
        first = free.pool.item[best_first(free.pool, free.score)][: request.k]
        own, deny = set(asking.life.item.tolist()), set(now.items.encode(request.deny).tolist())
        allow = None if request.allow is None else set(now.items.encode(request.allow).tolist())
        room = _Caps(now, request.at_most)
        found = []
        for item, raw in zip(first.tolist(), now.items.decode(first), strict=True):
            if not now.alive[item]:
                rule = "removed"
            elif hidden and item in own:
                rule = "seen"
            elif item in deny:
                rule = "denied"
            elif allow is not None and item not in allow:
                rule = "not allowed"
            elif not room.take(item):
                rule = f"at_most: {room.full}"
            else:
                continue
            found.append(Filtered(item_id=raw, rule=rule))
        return found

    # -- rank, similar ---------------------------------------------------------------------------------

    def rank(self, request: RankRequest) -> RankResponse:
        """Given items in the order of the funnel, seen ones too; of a new item its like is scored."""
        now = self._catalogue
        asking = self._asking(now, request, time.perf_counter())
        given = list(dict.fromkeys(request.items))
        dense = now.items.encode(given)
        known = [(raw, int(i)) for raw, i in zip(given, dense, strict=True) if i != MISSING and now.alive[i]]
        of = np.array([now.stand_in[i] for _, i in known], np.int64)
        scored = np.unique(of[of != MISSING])
        self._gather(now, [asking], False, asking.stranger, extra=scored)
        assert asking.pool is not None
        row_of = {int(item): row for row, item in enumerate(asking.pool.item)}
        found = [
            self._item(now, asking, raw, item, row_of.get(int(like)), item != like)
            for (raw, item), like in zip(known, of, strict=True)
        ]
        missing = {raw for raw, _ in known}
        return RankResponse(
            request_id=request.request_id or new_id(),
            bundle=now.bundle.version,
            user_id=request.user_id,
            items=sorted(found, key=lambda item: -item.score),
            unknown=[raw for raw in given if raw not in missing],
            degraded=asking.degraded,
        )

    def similar(self, request: SimilarRequest) -> SimilarResponse:
        """Neighbours by text and by co-occurrence; of a new item, by its vector. Raises UnknownIdError."""
        now = self._catalogue
        item = int(now.items.require([request.item_id], "item")[0])
        if item < now.trained:
            gone = int((~now.alive).sum())
            pairs = now.bundle.neighbours.similar_items([request.item_id], request.k + gone)[0]
            source = now.bundle.neighbours.name
        else:
            near, cosine = now.nearest(np.array([item]), request.k, alive=True)
            real = near[0] != MISSING
            pairs = list(zip(now.items.decode(near[0][real]), cosine[0][real].tolist(), strict=True))
            source = "vectors"
        alive = now.alive[now.items.encode([raw for raw, _ in pairs])]
        kept = [pair for pair, there in zip(pairs, alive, strict=True) if there][: request.k]
        return SimilarResponse(
            request_id=request.request_id or new_id(),
            bundle=now.bundle.version,
            item_id=request.item_id,
            items=[SimilarItem(item_id=raw, score=score, source=source) for raw, score in kept],
        )

    # -- what changes ----------------------------------------------------------------------------------

    def events(self, request: EventsRequest) -> EventsResponse:
        """Store events, all or none; the next request sees them. Raises UnknownIdError, DataError, StorageError."""
        now, state = self._catalogue, self._require_state()
        dense = now.items.encode([event.item_id for event in request.events])
        for place, (event, item) in enumerate(zip(request.events, dense, strict=True)):
            if item == MISSING:
                raise UnknownIdError(
                    f"events[{place}] with the item {event.item_id!r}, which is not in the catalogue",
                    rule="An event is about an item of the catalogue; nothing of the request was stored",
                    fix="Add the item first, or leave the event out",
                )
        unit, earliest, latest = _moments(now.bundle.histories.time)
        for place, event in enumerate(request.events):
            if not earliest <= event.timestamp <= latest:
                when = "more than a day ahead" if event.timestamp > latest else "long before there were logs"
                raise DataError(
                    f"events[{place}] with the timestamp {event.timestamp}, {when}",
                    rule="An event has happened; nothing of the request was stored",
                    fix=f"Send the time in the unit of the log that the bundle was trained on: {unit}",
                )
        new = state.append(request.events)
        return EventsResponse(
            request_id=request.request_id or new_id(), accepted=sum(new), duplicates=len(new) - sum(new)
        )

    def items(self, request: ItemsRequest) -> ItemsResponse:
        """Add, change and remove items: all of it or nothing. The next request sees it.

        Raises SchemaError, DataError, CapacityError.
        """
        with self._change:
            now, added, changed = self._catalogue, 0, 0
            if request.add:
                now, added, changed = now.with_rows(request.add)
            dense = now.items.encode(request.remove)
            unknown = [raw for raw, i in zip(request.remove, dense, strict=True) if i == MISSING]
            there = np.unique(dense[dense != MISSING])
            there = there[now.alive[there]]
            if len(there):
                now = now.without(there)
            if now is not self._catalogue:
                _ = (
                    now.behind_nearest,
                    now.stand_in,
                    now.popular,
                    now.funnels,
                    now.remembered,
                )  # made before the first request needs them
            self._catalogue = now
        return ItemsResponse(
            request_id=request.request_id or new_id(),
            bundle=now.bundle.version,
            added=added,
            changed=changed,
            removed=len(there),
            unknown=unknown,
        )

    def user(self, user_id: Id) -> UserResponse:
        """A user's whole life, oldest first, each event once; empty for a stranger. Raises StorageError."""
        now = self._catalogue
        later = None if self.state is None else self.state.life(user_id)
        later = Life() if later is None else later
        events = [] if later.forgotten else self._base_events(now, user_id)
        stored = {(event.item_id, event.timestamp) for event in events}
        events += [
            Event(user_id=user_id, item_id=item, timestamp=time, features=values, event_id=event_id)
            for item, time, values, event_id in zip(
                later.item_ids, later.times, later.features, later.event_ids, strict=True
            )
            if (item, time) not in stored
        ]
        events.sort(key=lambda event: event.timestamp)
        return UserResponse(user_id=user_id, known=bool(events), events=events)

    def _base_events(self, now: Catalogue, user_id: Id) -> list[Event]:
        store = now.bundle.histories
        base = store.before(store.users.encode([user_id]))
        columns = {name: column.tolist() for name, column in base.features.items()}
        return [
            Event(
                user_id=user_id,
                item_id=item,
                timestamp=moment,
                features={name: float(column[n]) for name, column in columns.items()},
            )
            for n, (item, moment) in enumerate(
                zip(now.items.decode(base.item), base.time.tolist(), strict=True)
            )
        ]

    def forget(self, user_id: Id) -> ForgetResponse:
        """Delete what the state has of a user, and hide what the bundle has. Raises ConfigError, StorageError."""
        now, state = self._catalogue, self._require_state()
        later = state.life(user_id)
        hidden = 0
        if later is None or not later.forgotten:
            store = now.bundle.histories
            hidden = int(store.lengths(store.users.encode([user_id]))[0])
        return ForgetResponse(user_id=user_id, events=state.forget(user_id) + hidden)

    def _require_state(self) -> State:
        if self.state is None:
            raise ConfigError(
                "no state to keep events in",
                rule="An engine without a state knows only what its bundle holds",
                fix='Make it with one: Engine(bundle, LmdbState("runs/state"))',
            )
        return self.state

    # -- to be looked at -------------------------------------------------------------------------------

    def tree(self, prefix: Sequence[int] = ()) -> TreeResponse:
        """A node of the tree of semantic IDs. Raises ConfigError, UnknownIdError."""
        return node_of(self._catalogue, prefix)

    def beam(self, request: RecommendRequest) -> BeamResponse:
        """Where TIGER's beam goes for a request: for each depth the k best prefixes that it kept."""
        now = self._catalogue
        asking = self._asking(now, request, time.perf_counter())
        depths = beam_of(now, asking.life, request.k, exclude_seen=_hidden(now, request))
        return BeamResponse(bundle=now.bundle.version, user_id=request.user_id, depths=depths)

    # -- what is there ---------------------------------------------------------------------------

    def lookup(self, item_ids: Sequence[Id]) -> LookupResponse:
        """What the catalogue says of these items; those that are unknown or removed are left out."""
        now = self._catalogue
        dense = now.items.encode(list(item_ids))
        dense = dense[dense != MISSING]
        dense = dense[now.alive[dense]]
        table = now.bundle.items.table.select(~cs.by_dtype(pl.List(pl.Float64), pl.List(pl.Float32)))
        rows = table[dense.tolist()].to_dicts()
        codes = now.bundle.tiger.ids.codes[dense].tolist()
        items = [
            ItemDetails(item_id=row.pop("item_id"), text=text, columns=row, code=code)
            for row, text, code in zip(rows, now.describe(dense), codes, strict=True)
        ]
        return LookupResponse(bundle=now.bundle.version, items=items)

    def find(self, text: str, k: int = 8) -> FindResponse:
        """Users by the beginning of their id, items by that or by a part of their text; at most k of each."""
        now = self._catalogue
        users = pl.Series(now.bundle.histories.users.raw)
        users = users.filter(users.cast(pl.String).str.starts_with(text)).head(k)
        found = now.find(text, k)
        items = [
            TreeItem(item_id=raw, text=words)
            for raw, words in zip(now.items.decode(found), now.describe(found), strict=True)
        ]
        return FindResponse(bundle=now.bundle.version, users=users.to_list(), items=items)


def new_id() -> str:
    """An id for a request that came without one."""
    return uuid.uuid4().hex[:16]


class _Caps:
    """Category caps, counted while a list is written. full: the cap that refused last."""

    def __init__(self, now: Catalogue, at_most: Mapping[str, int]) -> None:
        table = now.bundle.items.table
        self.caps = [(name, table[name], most, Counter[Any]()) for name, most in at_most.items()]
        self.full = ""

    def take(self, item: int) -> bool:
        """Whether there is room for a dense item, which then takes it; an item without a category needs none."""
        found = []
        for name, column, most, count in self.caps:
            value = column[item]
            if value is None:
                continue
            value = tuple(value) if isinstance(value, (list, type(column))) else value
            if count[value] >= most:
                self.full = name
                return False
            found.append((count, value))
        for count, value in found:
            count[value] += 1
        return True


def _require_columns(now: Catalogue, at_most: Mapping[str, int]) -> None:
    known = now.bundle.items.table.columns
    for name in at_most:
        if name not in known:
            raise SchemaError(
                f"at_most with the column '{name}'",
                rule="Caps are on columns of the item table",
                fix=did_you_mean(name, known),
            )


def _hidden(now: Catalogue, request: RecommendRequest) -> bool:
    return now.bundle.exclude_seen if request.exclude_seen is None else request.exclude_seen


def _allowed(now: Catalogue, request: RecommendRequest) -> np.ndarray | None:
    """(N,) bool, or None where every item is."""
    if now.whole and request.allow is None and not request.deny:
        return None
    allowed = now.alive.copy()
    if request.allow is not None:
        named = np.zeros(len(now), bool)
        dense = now.items.encode(request.allow)
        named[dense[dense != MISSING]] = True
        allowed &= named
    dense = now.items.encode(request.deny)
    allowed[dense[dense != MISSING]] = False
    return allowed


def shares_work(request: RecommendRequest) -> bool:
    """Whether it can be asked together with others of the same k and exclude_seen."""
    return request.allow is None and not request.deny and not request.at_most


def _recommend(asking: _Asking) -> RecommendRequest:
    assert isinstance(asking.request, RecommendRequest)
    return asking.request


def _slow(funnel: Funnel) -> list[str]:
    """The retrievers that a budget may leave out: all but those without training."""
    return [r.name for r in funnel.retrievers if not isinstance(r, CatalogueScorer)]


def _together(lives: Sequence[Histories]) -> Histories:
    """Lives of one user each as one object."""
    lengths = [len(life.item) for life in lives]
    names = [np.array([MISSING]) if life.user is None else life.user for life in lives]
    return Histories(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.concatenate([life.item for life in lives]),
        np.concatenate([life.time for life in lives]),
        user=np.concatenate(names),
    )


def _moments(times: np.ndarray) -> tuple[str, int, int]:
    """(unit, earliest, latest) of what may be an event's time, by the times of the log.

    Where the newest looks like Unix time, from 1985 until a day from now; else anything from 0 on.
    """
    newest = int(times.max(initial=0))
    for name, unit in (
        ("seconds", 1),
        ("milliseconds", 10**3),
        ("microseconds", 10**6),
        ("nanoseconds", 10**9),
    ):
        if 5 * 10**8 * unit <= newest < 5 * 10**9 * unit:
            return f"{name} since 1970", 5 * 10**8 * unit, int((time.time() + 86_400) * unit)
    return f"whole numbers from 0, {newest} the newest", 0, 2**63 - 1
