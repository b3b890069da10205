"""Ranking as tasks: who asked, when, for which candidates, and what came of it.

A `RankingTask` holds requests and candidates beside one history store; the past of a request is read when its
batch is built, strictly before its time, and nothing padded is kept. Tasks are made from a log:

    next_basket            candidates = what is bought next, and sampled negatives
    impressions            candidates = what was shown, labels = the feedback columns
    complete_journey_task  groceries, split by household and time
    kuairand_task          videos, split by time

Letters: R requests, C candidates of all requests, T tasks, X profile features; in a batch B requests, K
candidates, L behaviours, J cross features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, overload

import numpy as np
import polars as pl
import torch

from tiglon.data.events import align, read_interactions, read_items, require_columns
from tiglon.data.features import ACTIVITY, Buckets, Feature, FeatureSchema, FittedFeatures, fit, gaps
from tiglon.data.histories import CLUSTER_SIZE, offsets_of
from tiglon.data.sources import KUAIRAND_LABELS, Source, complete_journey
from tiglon.data.split import moment_starts
from tiglon.errors import ConfigError, DataError, did_you_mean
from tiglon.types import MISSING, Behaviours, Histories, Interactions, RankingBatch, Vocabulary


class Lives(Protocol):
    """What a task reads the past from: a HistoryStore, or one that clusters. A feature CLUSTER_SIZE (T,) says how
    many behaviours an entry stands for."""

    @property
    def users(self) -> Vocabulary: ...

    @property
    def items(self) -> Vocabulary: ...

    def before(self, users: np.ndarray, time: np.ndarray, last: int | None = None) -> Histories: ...

    def lengths(self, users: np.ndarray, time: np.ndarray, last: int | None = None) -> np.ndarray: ...

    def behaviours(self, users: np.ndarray, time: np.ndarray) -> np.ndarray:
        """(B,) how many there are before `time`, each by itself."""
        ...


@dataclass(frozen=True, eq=False)
class RankingTask:
    """R requests; request r has the candidates offsets[r]:offsets[r+1].

    store: its features hold the codes of the cross features.   user: (R,) dense, −1 unknown.   time: (R,).
    offsets: (R+1,).   item: (C,) dense, −1 unknown.   label: (C, T) float32 in 0 … 1, NaN where there is none.
    profile: (R, X) codes of user and context.   Raises DataError.
    """

    store: Lives
    features: FittedFeatures
    user: np.ndarray
    time: np.ndarray
    offsets: np.ndarray
    item: np.ndarray
    label: np.ndarray
    profile: np.ndarray
    tasks: tuple[str, ...]

    def __post_init__(self) -> None:
        R, C = len(self.user), len(self.item)
        if not len(self.time) == len(self.offsets) - 1 == len(self.profile) == R:
            raise DataError(
                f"{R} users, {len(self.time)} times, {len(self.profile)} profiles, {len(self.offsets)} offsets",
                rule="There is one of each a request, and one offset more",
            )
        if self.offsets[0] != 0 or self.offsets[-1] != C or (np.diff(self.offsets) < 0).any():
            raise DataError("offsets that do not run from 0 to the number of candidates without falling")
        if self.label.shape != (C, len(self.tasks)):
            raise DataError(
                f"labels of shape {self.label.shape} for {C} candidates and the tasks {', '.join(self.tasks)}"
            )
        if self.profile.shape[1] != len(self.features.profile_sizes):
            raise DataError(
                f"{self.profile.shape[1]} profile codes", rule=f"{len(self.features.profile_sizes)} features"
            )
        items = len(self.features.item_codes) - 1
        if len(self.store.items) != items:
            raise DataError(
                f"lives of {len(self.store.items)} items, where the features know {items}",
                rule="Both are of one catalogue",
                fix="Pass log and items through align, and fit the features on what it gives",
            )
        if C and not MISSING <= self.item.min() <= self.item.max() < items:
            raise DataError(f"a candidate outside −1 … {items - 1}")
        if ((self.label < 0) | (self.label > 1)).any():
            raise DataError("labels outside 0 … 1", rule="NaN stands for no label")

    def __len__(self) -> int:
        """How many requests."""
        return len(self.user)

    @property
    def owner(self) -> np.ndarray:
        """(C,) the request of each candidate."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    @property
    def lengths(self) -> np.ndarray:
        """(R,) how many behaviours lie before each request."""
        return self.store.lengths(self.user, self.time)

    def select(self, rows: np.ndarray) -> RankingTask:
        """Only these requests: a bool mask (R,) or row numbers."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        offsets, of = _gather(self.offsets, rows)
        return RankingTask(
            self.store,
            self.features,
            self.user[rows],
            self.time[rows],
            offsets,
            self.item[of],
            self.label[of],
            self.profile[rows],
            self.tasks,
        )

    def batches(
        self, requests: int = 32, last: int | None = None, seed: int | None = None, cells: int = 400_000
    ) -> Batches:
        """Every request once, `requests` in a batch, or fewer where B × L would exceed `cells`.

        last: only so many of the newest behaviours.   seed: None keeps the order of the requests; otherwise
        they are shuffled, then those of similar length share a batch, and the batches come at random.
        """
        if requests < 1 or cells < 1:
            raise ConfigError(f"requests={requests}, cells={cells}", rule="Both are at least 1")
        lengths = self.store.lengths(self.user, self.time, last)
        if seed is None:
            return Batches(self, _cut(np.arange(len(self)), lengths, requests, cells), last)
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(self))
        rows: list[np.ndarray] = []
        for begin in range(0, len(order), _NEIGHBOURS * requests):
            chunk = order[begin : begin + _NEIGHBOURS * requests]
            rows += _cut(chunk[np.argsort(lengths[chunk], kind="stable")], lengths, requests, cells)
        return Batches(self, [rows[i] for i in rng.permutation(len(rows))], last)


_NEIGHBOURS = 32  # batches' worth of requests that are sorted by length together


def _cut(order: np.ndarray, lengths: np.ndarray, requests: int, cells: int) -> list[np.ndarray]:
    """`order` in runs of at most `requests` whose number × longest is at most `cells`, or of one."""
    runs, begin, longest = [], 0, 1
    for i, length in enumerate(lengths[order].tolist()):
        longest = max(longest, length)
        if i > begin and (i - begin == requests or (i - begin + 1) * longest > cells):
            runs.append(order[begin:i])
            begin, longest = i, max(length, 1)
    return [*runs, order[begin:]] if len(order) else runs


class Batches(Sequence[RankingBatch]):
    """Batches that are built when they are asked for.   rows: the requests of each."""

    def __init__(self, task: RankingTask, rows: list[np.ndarray], last: int | None = None) -> None:
        self.task, self.rows, self.last = task, rows, last

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> RankingBatch: ...

    @overload
    def __getitem__(self, index: slice) -> Batches: ...

    def __getitem__(self, index: int | slice) -> RankingBatch | Batches:
        """Raises LeakageError where a store gives anything at or after a request's time."""
        if isinstance(index, slice):
            return Batches(self.task, self.rows[index], self.last)
        task, rows = self.task, self.rows[index]
        time = task.time[rows]
        past = task.store.before(task.user[rows], time, self.last)
        offsets, of = _gather(task.offsets, rows)
        return RankingBatch(
            item=_padded(offsets, task.item[of].astype(np.int64), MISSING),
            past=_behaviours(task.features, past, time),
            profile=torch.from_numpy(_profile(task, rows)),
            label=_padded(offsets, task.label[of], float("nan")),
        )


def _profile(task: RankingTask, rows: np.ndarray) -> np.ndarray:
    """(B, X) int64. The activity counts whole lives, behaviour by behaviour, whatever is read of them."""
    profile = task.profile[rows].astype(np.int64)
    if (column := task.features.activity) is not None:
        coder = task.features.coders[ACTIVITY]
        assert isinstance(coder, Buckets)
        before = task.store.behaviours(task.user[rows], task.time[rows])
        profile[:, column] = coder.of(before.astype(np.float64))
    return profile


def _behaviours(features: FittedFeatures, past: Histories, time: np.ndarray) -> Behaviours:
    size = past.features.get(CLUSTER_SIZE)
    return Behaviours(
        item=_padded(past.offsets, past.item, MISSING),
        cross=_padded(past.offsets, features.cross_codes(past, time), 0),
        gap=_padded(past.offsets, gaps(past, time).astype(np.float32), 1.0),
        mask=_padded(past.offsets, np.ones(len(past.item), bool), False),
        size=None if size is None else _padded(past.offsets, size.astype(np.float32), 1.0),
    )


def _padded(offsets: np.ndarray, values: np.ndarray, fill: float) -> torch.Tensor:
    """(n, …) values end to end → (B, longest or 1, …)."""
    lengths = np.diff(offsets)
    table = np.full((len(lengths), max(lengths.max(initial=0), 1), *values.shape[1:]), fill, values.dtype)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    table[owner, np.arange(len(values)) - offsets[owner]] = values
    return torch.from_numpy(table)


def _gather(offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of these rows alone, and where what they hold stands now."""
    lengths = offsets[rows + 1] - offsets[rows]
    own = offsets_of(lengths)
    return own, np.arange(own[-1]) + np.repeat(offsets[rows] - own[:-1], lengths)


# -- the next basket ---------------------------------------------------------------------------------------

NEXT_BASKET, WITHIN_30_DAYS, QUANTITY_2 = "next_basket", "within_30_days", "quantity_2"
BASKET_TASKS = (NEXT_BASKET, WITHIN_30_DAYS, QUANTITY_2)


@dataclass(frozen=True)
class BasketConfig:
    first: int = 5  # baskets that a user has before the first request
    positives: int = 20  # of a basket, at most, drawn at random
    negatives: int = 20  # a request
    power: float = 1.0  # negatives are drawn by (training lines of the item)^power
    requests: int | None = None  # at most, drawn at random
    day: int = 86_400  # in the log's unit of time
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.first, self.negatives) < 0 or min(self.positives, self.day) < 1:
            raise ConfigError(
                f"first={self.first}, positives={self.positives}, negatives={self.negatives}, day={self.day}",
                rule="first and negatives are at least 0, positives and day at least 1",
            )
        require_requests(self.requests)


def require_requests(requests: int | None) -> None:
    """ConfigError for less than one."""
    if requests is not None and requests < 1:
        raise ConfigError(f"requests={requests}", rule="At least one is drawn; None: all")


def next_basket(
    log: Interactions,
    features: FittedFeatures,
    counts: np.ndarray,
    asked: np.ndarray | None = None,
    config: BasketConfig | None = None,
    *,
    tasks: Sequence[str] = (NEXT_BASKET,),
    hard: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    store: Lives | None = None,
) -> RankingTask:
    """One request a basket (all lines of a user at one time), at its time.

    Positives are the basket's distinct items. Negatives are `config.negatives` distinct others, drawn by
    counts^power; where a small catalogue has not enough, fewer. Items without training lines are left out
    on both sides: sampled negatives always have some, so that being unknown would tell a positive. Requests
    without a positive are left out. Candidates come in random order.

    counts: (N,) training lines of each item.   asked: (E,) bool, the lines whose baskets may be requests; of a
    basket all or none.   tasks: of
        next_basket      in this basket
        within_30_days   bought by this user in the 30 days from the request on; NaN for all candidates of a
                         request less than 30 days before the log ends
        quantity_2       two or more of it in this basket (column `quantity`)
    hard: (user (n,), time (n,)) → (n, H) more negatives, −1 for none; those of the basket are left out.
    store: the lives of `log`, where they are already built.
    Raises ConfigError for an unknown task, SchemaError for a missing column, DataError without a request.
    """
    config = config or BasketConfig()
    for name in tasks:
        if name not in BASKET_TASKS:
            raise ConfigError(f"task '{name}'", fix=did_you_mean(name, BASKET_TASKS))
    rng = np.random.default_rng(config.seed)
    N = len(log.items)
    request, line = _basket_requests(log, counts, asked, config, rng)
    truth = _distinct(request * N + log.item[line])
    first_line = line[np.searchsorted(request, np.arange(request[-1] + 1))]
    user, time = log.user[first_line].astype(np.int64), log.time[first_line]

    kept = truth[_some(truth // N, config.positives, rng)]
    extra = _hard(hard, user, time, counts, truth)
    chance = np.where(counts > 0, np.asarray(counts, np.float64) ** config.power, 0.0)
    drawn = _draw(len(user), config.negatives, chance, _distinct(np.concatenate([truth, extra])), rng)
    candidate = np.concatenate([kept, extra, drawn])
    candidate = candidate[np.lexsort((rng.random(len(candidate)), candidate // N))]
    owner, item = candidate // N, candidate % N

    labels = {NEXT_BASKET: lambda: _among(candidate, truth).astype(np.float32)}
    labels[WITHIN_30_DAYS] = lambda: _bought_within(log, user[owner], item, time[owner], 30 * config.day)
    labels[QUANTITY_2] = lambda: _among(candidate, _several(log, request, line)).astype(np.float32)
    return RankingTask(
        store=store or features.store(log),
        features=features,
        user=user,
        time=time,
        offsets=offsets_of(np.bincount(owner, minlength=len(user))),
        item=item,
        label=np.stack([labels[name]() for name in tasks], axis=1),
        profile=features.profile_codes(user, log.extra[first_line] if log.extra.width else None),
        tasks=tuple(tasks),
    )


def _basket_requests(
    log: Interactions,
    counts: np.ndarray,
    asked: np.ndarray | None,
    config: BasketConfig,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """(n,), (n,): request number, rising without a hole, and row of every line that is a positive."""
    start = moment_starts(log)
    owner = log.user[start]
    nth = np.arange(len(start)) - np.searchsorted(owner, owner)
    basket = np.repeat(np.arange(len(start)), np.diff(start, append=len(log)))
    use = (nth >= config.first)[basket] & (counts[log.item] > 0)
    if asked is not None:
        use &= asked
    chosen = _distinct(basket[use])
    if not len(chosen):
        raise DataError(
            "no basket to ask for",
            rule=f"A request is a basket after a user's first {config.first} with an item known in training",
            fix="Lower `first`, or look at the times and users that are asked",
        )
    if config.requests is not None and len(chosen) > config.requests:
        chosen = np.sort(rng.choice(chosen, config.requests, replace=False))
    line = np.flatnonzero(use & _among(basket, chosen))
    return np.searchsorted(chosen, basket[line]), line


def _some(owner: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of at most `most` entries of each owner, at random. owner: rising."""
    order = np.lexsort((rng.random(len(owner)), owner))
    return np.sort(order[np.arange(len(owner)) - np.searchsorted(owner, owner) < most])


def _draw(
    requests: int, n: int, chance: np.ndarray, taken: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """request × N + item, rising: n distinct items a request by `chance` (N,), none of `taken`.

    What was drawn before or is taken is drawn anew, a hundred times; then it is fewer.
    """
    N, share = len(chance), np.cumsum(chance)
    found = np.empty(0, np.int64)
    for _ in range(100):
        request = np.repeat(np.arange(requests), n - np.bincount(found // N, minlength=requests))
        if not len(request) or not share[-1]:
            break
        item = np.searchsorted(share, rng.random(len(request)) * share[-1], side="right")
        drawn = _distinct(request * N + np.minimum(item, np.flatnonzero(chance)[-1]))
        found = _distinct(np.concatenate([found, drawn[~_among(drawn, taken)]]))
    return found


def _hard(
    hard: Callable[[np.ndarray, np.ndarray], np.ndarray] | None,
    user: np.ndarray,
    time: np.ndarray,
    counts: np.ndarray,
    truth: np.ndarray,
) -> np.ndarray:
    """request × N + item of the hard negatives with training lines, without those of `truth`."""
    if hard is None:
        return np.empty(0, np.int64)
    item, N = np.asarray(hard(user, time), np.int64), len(counts)
    if (
        item.ndim != 2
        or len(item) != len(user)
        or (item.size and not MISSING <= item.min() <= item.max() < N)
    ):
        raise DataError(
            f"hard negatives of shape {item.shape} for {len(user)} requests",
            rule=f"They are dense items (requests, any number), −1 … {N - 1}",
        )
    keys = _distinct((np.arange(len(user))[:, None] * N + item)[(item != MISSING) & (counts[item] > 0)])
    return keys[~_among(keys, truth)]


def _bought_within(
    log: Interactions, user: np.ndarray, item: np.ndarray, time: np.ndarray, period: int
) -> np.ndarray:
    """(n,) 1 where the user bought the item at time … time + period, NaN where the log ends before that."""
    lines = pl.DataFrame({"user": log.user, "item": log.item, "time": log.time, "bought": log.time})
    asked = pl.DataFrame({"user": user.astype(np.int32), "item": item.astype(np.int32), "time": time})
    found = (
        asked.with_row_index()
        .sort("time")
        .join_asof(
            lines.sort("time"), on="time", by=["user", "item"], strategy="forward", check_sortedness=False
        )
        .sort("index")
    )
    within = (found["bought"] - found["time"] < period).fill_null(False).to_numpy()
    return np.where(time + period > log.time.max(), np.nan, within).astype(np.float32)


def _distinct(keys: np.ndarray) -> np.ndarray:
    """Rising, each once; keys ≥ 0. (np.unique hashes, which is slower on millions.)"""
    keys = np.sort(keys)
    return keys[np.diff(keys, prepend=-1) != 0]


def _among(keys: np.ndarray, table: np.ndarray) -> np.ndarray:
    """bool, which keys are in the rising table."""
    if not len(table):
        return np.zeros(len(keys), bool)
    return table[np.minimum(np.searchsorted(table, keys), len(table) - 1)] == keys


def _several(log: Interactions, request: np.ndarray, line: np.ndarray) -> np.ndarray:
    """request × N + item of the lines of two or more pieces, rising."""
    require_columns(log.extra.columns, ["quantity"])
    several = (log.extra["quantity"] >= 2).fill_null(False).to_numpy()[line]
    return _distinct(request[several] * len(log.items) + log.item[line[several]])


class Tasks(NamedTuple):
    """Learn from `train`, select on `validation`, read `test` once; `note` goes beside every result."""

    train: RankingTask
    validation: RankingTask
    test: RankingTask
    note: str


COMPLETE_JOURNEY = FeatureSchema(
    [
        Feature("item_id", "inherent", width=64),
        Feature("product_type", "inherent", width=16),
        Feature("product_category", "inherent"),
        Feature("department", "inherent"),
        Feature("brand", "inherent"),
        Feature("manufacturer_id", "inherent"),
        Feature("gap", "cross", "number"),
        Feature("quantity", "cross", "number", buckets=8),
        Feature("sales_value", "cross", "number"),
        Feature("hour", "context"),
        Feature("weekday", "context"),
    ]
)
_WEEK = 7 * 86_400


def complete_journey_task(
    seed: int = 0,
    *,
    source: Source | None = None,
    schema: FeatureSchema = COMPLETE_JOURNEY,
    tasks: Sequence[str] = (NEXT_BASKET,),
    validation_weeks: int = 4,
    test_weeks: int = 8,
    train_requests: int | None = 40_000,
    first: int = 5,
    negatives: int = 20,
    power: float = 1.0,
    hard: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> Tasks:
    """The next basket of Complete Journey, split by household and by time.

    test         a fifth of the households, drawn by the seed, in the last `test_weeks` of the log
    validation   another tenth, in the `validation_weeks` before those
    train        the other households, in the time before that; at most `train_requests`, drawn at random

    Households of validation and test teach nothing: boundaries, vocabularies, the counts by which negatives
    are drawn and the requests of training come from the others' lines before the validation. A request's
    history is all of its household's lines before it, from the log's first day on. A household's first
    `first` baskets are no requests. Lines of one basket share a time and are stored in random order (the
    source sorts them by product). Negatives are drawn by plain popularity (`power` 1), so that popularity
    alone tells little; `hard` adds others, as `next_basket` takes them. What a training household bought within
    30 days of its last requests is of the weeks of validation; of no household that is asked there. hour and weekday are those of the basket, 0 … 23 and Monday = 1.
    """
    source = source or complete_journey()
    lines = source.interactions.sample(fraction=1.0, shuffle=True, seed=seed)
    moment = pl.from_epoch("timestamp", time_unit="s")
    lines = lines.with_columns(hour=moment.dt.hour(), weekday=moment.dt.weekday())
    log, items, _ = align(read_interactions(lines), read_items(source.items))

    rng = np.random.default_rng(seed)
    group = np.zeros(len(log.users), np.int64)  # 0 train, 1 validation, 2 test
    order = rng.permutation(len(group))
    fifth, tenth = len(group) // 5, len(group) // 10
    group[order[:fifth]], group[order[fifth : fifth + tenth]] = 2, 1
    test_from = int(log.time.max()) + 1 - test_weeks * _WEEK
    validation_from = test_from - validation_weeks * _WEEK
    period = np.searchsorted([validation_from, test_from], log.time, side="right")
    asked = [(group[log.user] == part) & (period == part) for part in range(3)]

    training = log.take(asked[0])
    features = fit(schema, items, training)
    counts = np.bincount(training.item, minlength=len(items))
    store = features.store(log)
    made = [
        next_basket(
            log,
            features,
            counts,
            asked[part],
            BasketConfig(
                first=first,
                negatives=negatives,
                power=power,
                requests=train_requests if part == 0 else None,
                seed=seed + part,
            ),
            tasks=tasks,
            hard=hard,
            store=store,
        )
        for part in range(3)
    ]
    return Tasks(made[0], made[1], made[2], source.note)


# -- what was shown ----------------------------------------------------------------------------------------


def impressions(
    log: Interactions,
    features: FittedFeatures,
    labels: dict[str, str],
    asked: np.ndarray | None = None,
    *,
    requests: int | None = None,
    seed: int = 0,
    store: Lives | None = None,
) -> RankingTask:
    """One request a moment (all lines of a user at one time); its lines are the candidates.

    labels: task → column of the log, 0 or 1; null is no label.   asked: (E,) bool, of a moment all lines or
    none.   requests: at most, drawn at random.   store: the lives of `log`, where they are already built.
    Nothing else of a candidate's own line is read but its context features. Raises SchemaError, DataError.
    """
    require_requests(requests)
    require_columns(log.extra.columns, list(labels.values()))
    start = moment_starts(log)
    chosen = np.arange(len(start)) if asked is None else np.flatnonzero(asked[start])
    if not len(chosen):
        raise DataError("no moment to ask for", fix="Look at the times that are asked")
    if requests is not None and len(chosen) > requests:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, requests, replace=False))
    offsets, line = _gather(np.append(start, len(log)), chosen)
    first = start[chosen]
    lines = log.extra[line]
    label = [lines[column].cast(pl.Float32).fill_null(float("nan")).to_numpy() for column in labels.values()]
    return RankingTask(
        store=store or features.store(log),
        features=features,
        user=log.user[first].astype(np.int64),
        time=log.time[first],
        offsets=offsets,
        item=log.item[line].astype(np.int64),
        label=np.stack(label, axis=1),
        profile=features.profile_codes(log.user[first], log.extra[first]),
        tasks=tuple(labels),
    )


KUAIRAND = FeatureSchema(
    [
        Feature("item_id", "inherent", width=64),
        Feature("author_id", "inherent", width=64, min_count=2),
        Feature("topic", "inherent"),
        Feature("video_duration", "inherent", "number"),
        Feature("gap", "cross", "number"),
        Feature("completion", "cross", "number"),
        Feature("label_click", "cross"),
        Feature("label_like", "cross"),
        Feature("tab", "context"),
        Feature("hour", "context"),
    ]
)
_DAY_MS = 86_400_000


def completion(play: str = "play_time_ms", duration: str = "duration_ms") -> pl.Expr:
    """How much of a video was seen, 0 … 1: what was played again counts as 1 (the ratio is clipped).

    Null, and so code 0, where either number is missing or negative, or the duration is zero.
    """
    ratio = pl.col(play).cast(pl.Float64) / pl.col(duration).cast(pl.Float64)
    known = (pl.col(duration) > 0) & (pl.col(play) >= 0) & ratio.is_not_nan()
    return pl.when(known).then(ratio.clip(0.0, 1.0))


def kuairand_task(
    source: Source,
    seed: int = 0,
    *,
    schema: FeatureSchema = KUAIRAND,
    labels: Sequence[str] = ("is_click", "long_view", "is_like"),
    validation_days: int = 1,
    test_days: int = 1,
    train_requests: int | None = None,
) -> Tasks:
    """What KuaiRand's users did with what they were shown, split by time.

    test is the last `test_days` of the log, validation the `validation_days` before, train the rest, at most
    `train_requests` drawn at random. Boundaries and vocabularies come from the time of training alone.
    source: of `tiglon.data.sources.kuairand`.   topic: a video's first tag.   hour: of the request, in China.
    completion, clicks and likes are those of past behaviours; of a request's own lines nothing is read but
    labels, tab and hour. (`is_click` can mean "played longer than 7 s", so its play time would tell.)
    """
    unknown = [name for name in labels if name not in KUAIRAND_LABELS]
    if unknown:
        raise ConfigError(f"label '{unknown[0]}'", fix=did_you_mean(unknown[0], KUAIRAND_LABELS))
    require_columns(source.interactions.columns, ["play_time_ms", "duration_ms"])
    china = pl.from_epoch("timestamp", time_unit="ms") + pl.duration(hours=8)
    lines = source.interactions.with_columns(completion=completion(), hour=china.dt.hour())
    table = source.items.with_columns(topic=pl.col("tag").cast(pl.String).str.split(",").list.first())
    log, items, _ = align(read_interactions(lines), read_items(table))

    test_from = int(log.time.max()) + 1 - test_days * _DAY_MS
    period = np.searchsorted([test_from - validation_days * _DAY_MS, test_from], log.time, side="right")
    if not (period == 0).any():
        raise DataError(
            f"a log that is shorter than {validation_days + test_days} days",
            rule="Training comes before validation and test",
        )
    features = fit(schema, items, log.take(period == 0))
    store = features.store(log)
    made = [
        impressions(
            log,
            features,
            {name: KUAIRAND_LABELS[name] for name in labels},
            period == part,
            requests=train_requests if part == 0 else None,
            seed=seed,
            store=store,
        )
        for part in range(3)
    ]
    return Tasks(made[0], made[1], made[2], source.note)
