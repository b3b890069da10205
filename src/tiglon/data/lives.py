"""Synthetic lives as long as KuaiRand's, and worlds in which it is known which behaviours matter.

    lives(100)                  a log in KuaiRand's columns: 11.8 thousand events a user, a tail to a million
    planted(10_000, 500, k=20)  a ranking task with, for each candidate, the k behaviours that decide it

KuaiRand-27K has 27,285 users with 322 M events, 11.8 thousand a user (Gao et al. 2022,
https://arxiv.org/abs/2208.10696). The other shapes (log-normal lengths, Zipf within a topic, five topics a
user that drift into five others, how long a video is watched) are this file's own choice.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import polars as pl

from tiglon.data.features import Feature, FeatureSchema, FittedFeatures, fit
from tiglon.data.histories import offsets_of
from tiglon.data.ranking import RankingTask
from tiglon.data.sources import Source
from tiglon.errors import ConfigError
from tiglon.types import MISSING, Interactions, Items, Vocabulary

_INTERESTS = 5  # topics that a user begins with, and as many to end with
_FAITHFUL = 0.8  # share of events in them
_EPOCH_S = 1_649_347_200  # 2022-04-08 in China, the day KuaiRand begins


# -- a log in KuaiRand's columns ---------------------------------------------------------------------------


def lives(
    users: int,
    items: int = 50_000,
    *,
    topics: int = 60,
    events_per_user: float = 11_800,
    longest: int = 1_000_000,
    days: int = 30,
    seed: int = 0,
) -> Source:
    """A log as `tiglon.data.sources.kuairand` gives it: times in ms, play_time_ms, duration_ms, tab, labels.

    Lengths are log-normal (σ = 1.3: the median is .43 of the mean, one user in a thousand beyond 20 times
    the mean), at least 1 and at most `longest`. A video of a user's interests is watched longer; one in a
    hundred has no duration, and some are played more than once (play time above the duration).
    Raises ConfigError.
    """
    if min(users, longest, days) < 1 or events_per_user < 1 or not 2 * _INTERESTS <= topics <= items:
        raise ConfigError(
            f"{users} users, {items} items, {topics} topics, {events_per_user} events a user, {days} days",
            rule=f"All are at least 1, and there are {2 * _INTERESTS} … items topics",
        )
    rng = np.random.default_rng(seed)
    topic, duration = np.arange(items) % topics, 1000 * rng.lognormal(2.8, 0.8, items)
    duration[rng.random(items) < 0.01] = 0
    sigma = 1.3
    drawn = events_per_user * rng.lognormal(-(sigma**2) / 2, sigma, users)
    lengths = np.clip(np.round(drawn), 1, longest).astype(np.int64)
    offsets, user = offsets_of(lengths), np.repeat(np.arange(users), lengths)
    age = (np.arange(len(user)) - offsets[user] + rng.random(len(user))) / lengths[user]  # 0 … 1, rising

    liked = np.argsort(rng.random((users, topics)), axis=1)[:, : 2 * _INTERESTS]
    column = _interest(age, rng)
    theirs = column >= 0
    of = np.where(theirs, liked[user, column], rng.integers(topics, size=len(user)))
    rank = _zipf(items // topics, len(user), rng)  # the last items of an uneven catalogue are never shown
    item = of + topics * rank

    watched = rng.beta(np.where(theirs, 1.6, 0.7), 1.2) * np.where(rng.random(len(user)) < 0.1, 2.5, 1.05)
    play = watched * np.where(duration[item] > 0, duration[item], 5_000)
    time = 1000 * _EPOCH_S + (age * days * 86_400_000).astype(np.int64)
    log = pl.DataFrame(
        {
            "user_id": user,
            "item_id": item,
            "timestamp": time,
            "play_time_ms": play.astype(np.int64),
            "duration_ms": duration[item].astype(np.int64),
            "tab": rng.integers(4, size=len(user)),
            "label_click": (play > 7_000).astype(np.int8),
            "label_long_view": (play >= np.minimum(duration[item], 18_000)).astype(np.int8),
            "label_like": (rng.random(len(user)) < 0.04 * watched).astype(np.int8),
        }
    )
    table = pl.DataFrame(
        {
            "item_id": np.arange(items),
            "author_id": rng.integers(max(items // 10, 1), size=items),
            "video_duration": duration,
            "tag": pl.Series(topic).cast(pl.String),
        }
    )
    return Source(log, table, "Synthetic lives after KuaiRand's published statistics.")


def _interest(age: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Which of a user's 2 × _INTERESTS topics an event is of, the later half the more the older; −1 for none."""
    drifted = rng.random(age.shape) < age
    column = rng.integers(_INTERESTS, size=age.shape) + _INTERESTS * drifted
    return np.where(rng.random(age.shape) < _FAITHFUL, column, -1)


def _zipf(n: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """(size,) ranks 0 … n − 1 with chances 1/(rank + 1)."""
    share = np.cumsum(1 / np.arange(1, n + 1))
    return np.searchsorted(share[:-1], rng.random(size) * share[-1], side="right")


# -- planted truth -----------------------------------------------------------------------------------------

PLANTED = FeatureSchema(
    [
        Feature("item_id", "inherent", width=16),
        Feature("topic", "inherent", width=16),
        Feature("gap", "cross", "number"),
        Feature("completion", "cross", "number", buckets=10),
    ]
)
_SEEN_WHOLE = 0.9  # a completion from here on counts
_RECENT = 50  # the newest behaviours tell nothing
_TOPICS, _ITEMS_A_TOPIC = 100, 20
_YEAR_S = 365 * 86_400


class Planted(NamedTuple):
    """positions: (C, k), which behaviours of its request's history decide a candidate, 0 the oldest, rising;
    −1 for candidates that nothing speaks for."""

    task: RankingTask
    positions: np.ndarray


def planted(
    L: int,
    requests: int,
    k: int = 20,
    seed: int = 0,
    *,
    candidates: int = 4,
    decoys: int | None = None,
    noise: float = 0.02,
    features: FittedFeatures | None = None,
) -> Planted:
    """Lives of L behaviours of which k decide a candidate: its topic, watched to the end.

    Each request is of a user of its own; its candidates are of different topics. For every second candidate
    k behaviours of its topic have a completion ≥ .9: its label is 1. For the others as many of their topic
    have one below .5: 0. `decoys` (by default L/100) more of every candidate's topic are below .5, too; all
    other behaviours are of other topics, .9 or more in three of ten. So neither the topic nor the completion tells
    alone, and the newest 50 behaviours, of other topics, tell nothing. A share `noise` of the labels is
    turned round. All worlds have the same 2,000 items and last a year, so that what was learned at one
    length can be asked at another: pass the `features` of the first. Raises ConfigError where L is too short.
    """
    decoys = L // 100 if decoys is None else decoys
    each = k + decoys
    free = L - _RECENT
    if not (k >= 1 and decoys >= 0 and requests >= 1 and 0 <= noise <= 1):
        raise ConfigError(
            f"k={k}, decoys={decoys}, requests={requests}, noise={noise}",
            rule="k and requests are at least 1, decoys at least 0, noise lies in 0 … 1",
        )
    if not (1 <= candidates <= _TOPICS - 2 * _INTERESTS and candidates * each <= free):
        raise ConfigError(
            f"{candidates} candidates × ({k} behaviours + {decoys} decoys) in a life of {L}",
            rule=f"They fit into all but the newest {_RECENT}; at most {_TOPICS - 2 * _INTERESTS} candidates",
            fix="Lengthen the life, or ask for fewer",
        )
    rng = np.random.default_rng(seed)
    items = _catalogue()
    by_topic = np.argsort(items.table["topic"].to_numpy(), kind="stable").reshape(_TOPICS, _ITEMS_A_TOPIC)

    # A user's topics in an order of their own: those of the candidates, early interests, late ones, others.
    order = np.argsort(rng.random((requests, _TOPICS)), axis=1)
    item = np.empty((requests, L), np.int32)
    completion = np.empty((requests, L), np.float32)
    positions = np.full((requests, candidates, k), MISSING)
    truth = np.arange(candidates) % 2 == 0
    for r in range(requests):
        column = candidates + _interest((np.arange(L) + 1) / L, rng)
        column = np.where(
            column < candidates, rng.integers(candidates, _TOPICS, size=L), column
        )  # no interest of theirs
        seen = np.where(rng.random(L) < 0.3, rng.uniform(_SEEN_WHOLE, 1, L), rng.uniform(0, _SEEN_WHOLE, L))
        place = rng.permutation(free)[: candidates * each].reshape(candidates, each)
        column[place] = np.arange(candidates)[:, None]
        seen[place] = rng.uniform(0, 0.5, place.shape)
        decisive = np.sort(place[truth, :k], axis=1)
        seen[decisive] = rng.uniform(_SEEN_WHOLE, 1, decisive.shape)
        positions[r, truth] = decisive
        item[r] = by_topic[order[r, column], rng.integers(_ITEMS_A_TOPIC, size=L)]
        completion[r] = seen

    step = rng.exponential(_YEAR_S / L, (requests, L))
    time = _EPOCH_S + np.cumsum(step, axis=1).astype(np.int64)
    log = Interactions(
        user=np.repeat(np.arange(requests, dtype=np.int32), L),
        item=item.ravel(),
        time=time.ravel(),
        users=Vocabulary(np.arange(requests)),
        items=items.vocabulary,
        extra=pl.DataFrame({"completion": completion.ravel()}),
    )
    features = features or fit(PLANTED, items, log.take(np.arange(min(len(log), 500_000))))
    shown = by_topic[order[:, :candidates], rng.integers(_ITEMS_A_TOPIC, size=(requests, candidates))]
    label = truth ^ (rng.random((requests, candidates)) < noise)
    mixed = np.argsort(rng.random((requests, candidates)), axis=1)  # the order of candidates tells nothing
    row = np.arange(requests)[:, None]
    task = RankingTask(
        store=features.store(log),
        features=features,
        user=np.arange(requests),
        time=time[:, -1] + 1 + rng.integers(3600, size=requests),
        offsets=np.arange(requests + 1) * candidates,
        item=shown[row, mixed].ravel().astype(np.int64),
        label=label[row, mixed].ravel().astype(np.float32)[:, None],
        profile=np.zeros((requests, 0), np.int64),
        tasks=("label",),
    )
    return Planted(task, positions[row, mixed].reshape(-1, k))


def _catalogue() -> Items:
    """2,000 items of 100 topics, the same in every world."""
    n = _TOPICS * _ITEMS_A_TOPIC
    topic = np.random.default_rng(0).permutation(np.arange(n) % _TOPICS)
    return Items(Vocabulary(np.arange(n)), pl.DataFrame({"item_id": np.arange(n), "topic": topic}))
