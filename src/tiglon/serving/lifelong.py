"""A lifelong ranker inside the funnel: it reads the life that the request has, new events too.

The ranker numbers users and items by its own training; the funnel speaks the bundle's dense ids. A life that
begins as the one that the ranker was trained on takes the cross features of that beginning from there; of other
behaviours they are unknown, which is code 0.

Letters: B users, N items of the bundle, T candidates of all users, L behaviours.
"""

from __future__ import annotations

import numpy as np
import polars as pl
import torch

from tiglon.data.histories import HistoryStore, offsets_of
from tiglon.data.ranking import RankingTask
from tiglon.ranking.model import LifelongRanker
from tiglon.types import MISSING, Histories, Vocabulary, user_names


class Lifelong:
    """items: the bundle's, of which the ranker may know fewer."""

    def __init__(self, ranker: LifelongRanker, items: Vocabulary) -> None:
        self.ranker = ranker.refresh()
        self._own = ranker.histories.items.encode(items.raw)  # (N,) the ranker's number of each item
        self._items = items
        names = user_names(ranker.histories.users)
        self._users = np.argsort(names)
        self._names = names[self._users]
        times = ranker.histories.time
        self._oldest, self._newest = int(times.min()) if len(times) else 0, int(times.max(initial=-1))

    def log_odds(self, lives: Histories, offsets: np.ndarray, item: np.ndarray) -> np.ndarray:
        """(T,) float32 of the first task for dense candidates (T,), of which user b has offsets[b]:offsets[b+1]."""
        chance = self.ranker.score(self._task(lives, offsets, item))[:, 0].clip(1e-7, 1 - 1e-7)
        return np.log(chance / (1 - chance))

    @torch.inference_mode()
    def attended(self, life: Histories, item: int, k: int = 5) -> list[tuple[int, int, float]]:
        """(dense item of the bundle, time, share of the attention) of the k behaviours that counted most.

        Empty where the ranker's unit does not attend to single behaviours.
        """
        task = self._task(life, np.array([0, 1]), np.array([item]))
        network, longest = self.ranker.network.eval(), self.ranker.config.longest
        read = task.store.before(task.user, task.time, longest)
        found = network.score(task.batches(1, last=longest)[0])[1] if len(read.item) else []
        if not found or found[-1].chosen is None or found[-1].weight is None:
            return []
        at, weight = found[-1].chosen[0, 0].numpy(), found[-1].weight[0, 0].numpy()
        if network.long is None:  # positions among the most recent
            at = np.where(at >= 0, at + max(len(read.item) - network.config.recent, 0), at)
        best = [i for i in np.argsort(-weight, kind="stable") if at[i] >= 0][:k]
        dense = self._items.encode(self.ranker.histories.items.decode(read.item[at[best]]))
        return [(int(d), int(read.time[at[i]]), float(weight[i])) for d, i in zip(dense, best, strict=True)]

    def _task(self, lives: Histories, offsets: np.ndarray, item: np.ndarray) -> RankingTask:
        """Requests on the lives as they are, right after the newest event that is known of anybody.

        A history without times of its own is read as if it had just ended.
        """
        ranker, B = self.ranker, len(lives)
        own = self._own[lives.item]
        there = own != MISSING
        own, time, owner = own[there], lives.time[there], lives.owner[there]
        begin = offsets_of(np.bincount(owner, minlength=B))
        who = self._who(lives)
        newest = np.full(B, -1)
        np.maximum.at(newest, owner, time)
        now = np.where(newest < self._oldest, newest, np.maximum(newest, self._newest)) + 1
        context = ranker.features.schema.columns("context")
        return RankingTask(
            store=HistoryStore(
                Vocabulary(range(B)),
                ranker.histories.items,
                begin,
                own.astype(np.int32),
                time,
                self._cross(who, begin, own, time),
            ),
            features=ranker.features,
            user=np.arange(B),
            time=now,
            offsets=offsets,
            item=self._own[item],
            label=np.full((len(item), len(ranker.tasks)), np.nan, np.float32),
            profile=ranker.features.profile_codes(who, pl.DataFrame({name: [None] * B for name in context})),
            tasks=ranker.tasks,
        )

    def _who(self, lives: Histories) -> np.ndarray:
        """(B,) the ranker's number of each user, MISSING for who it does not know."""
        if lives.user is None or not len(self._names):
            return np.full(len(lives), MISSING)
        at = np.searchsorted(self._names, lives.user).clip(max=len(self._names) - 1)
        return np.where(self._names[at] == lives.user, self._users[at], MISSING)

    def _cross(
        self, who: np.ndarray, begin: np.ndarray, own: np.ndarray, time: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Codes of the cross features, as far as each life is the one of the training."""
        lived = self.ranker.histories.before(who)
        codes = {name: np.zeros(len(own), column.dtype) for name, column in lived.features.items()}
        for b in range(len(who) if codes else 0):
            n = min(begin[b + 1] - begin[b], lived.lengths[b])
            here, there = slice(begin[b], begin[b] + n), slice(lived.offsets[b], lived.offsets[b] + n)
            same = (own[here] == lived.item[there]) & (time[here] == lived.time[there])
            n = n if same.all() else int(same.argmin())
            for name, column in lived.features.items():
                codes[name][begin[b] : begin[b] + n] = column[lived.offsets[b] : lived.offsets[b] + n]
        return codes
