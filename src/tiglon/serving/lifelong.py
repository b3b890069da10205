"""A lifelong ranker inside the funnel: it reads the life that the request has, new events too.

The ranker numbers users and items by its own training; the funnel speaks the bundle's dense ids. A life that
begins with what the ranker was trained on takes its cross features from there; of other behaviours they are
unknown, which is code 0.

Letters: N items of the bundle, K candidates, L behaviours.
"""

from __future__ import annotations

import numpy as np
import polars as pl
import torch

from tiglon.data.histories import HistoryStore
from tiglon.data.ranking import RankingTask
from tiglon.ranking.model import LifelongRanker
from tiglon.types import MISSING, Histories, Vocabulary


class Lifelong:
    """items: the bundle's, of which the ranker may know fewer."""

    def __init__(self, ranker: LifelongRanker, items: Vocabulary) -> None:
        self.ranker = ranker
        self._own = ranker.histories.items.encode(items.raw)  # (N,) the ranker's number of each item
        self._names = items
        times = ranker.histories.time
        self._oldest, self._newest = int(times.min(initial=0)), int(times.max(initial=-1))

    def log_odds(self, user_id: int | str | None, life: Histories, item: np.ndarray) -> np.ndarray:
        """(K,) float32 of the first task, for dense candidates of one user."""
        chance = self.ranker.score(self._task(user_id, life, item))[:, 0].clip(1e-7, 1 - 1e-7)
        return np.log(chance / (1 - chance))

    @torch.inference_mode()
    def attended(
        self, user_id: int | str | None, life: Histories, item: int, k: int = 5
    ) -> list[tuple[int, int, float]]:
        """(dense item of the bundle, time, share of the attention) of the k behaviours that counted most.

        Empty where the ranker's unit does not attend to single behaviours.
        """
        task = self._task(user_id, life, np.array([item]))
        network, longest = self.ranker.network.eval(), self.ranker.config.longest
        read = task.store.before(task.user, task.time, longest)
        found = network.score(task.batches(1, last=longest)[0])[1] if len(read.item) else []
        if not found or found[-1].chosen is None or found[-1].weight is None:
            return []
        at, weight = found[-1].chosen[0, 0].numpy(), found[-1].weight[0, 0].numpy()
        if network.long is None:  # positions among the most recent
            at = np.where(at >= 0, at + max(len(read.item) - network.config.recent, 0), at)
        best = [i for i in np.argsort(-weight, kind="stable") if at[i] >= 0][:k]
        dense = self._names.encode(self.ranker.histories.items.decode(read.item[at[best]]))
        return [(int(d), int(read.time[at[i]]), float(weight[i])) for d, i in zip(dense, best, strict=True)]

    def _task(self, user_id: int | str | None, life: Histories, item: np.ndarray) -> RankingTask:
        """One request on the life that it has, right after the newest event that is known of anybody.

        A history without times of its own is read as if it had just ended.
        """
        ranker = self.ranker
        own = self._own[life.item]
        there = own != MISSING
        own, time = own[there], life.time[there]
        who = ranker.histories.users.encode([user_id])
        lived = ranker.histories.before(who)
        n = len(lived.item)
        same = np.array_equal(lived.item, own[:n]) and np.array_equal(lived.time, time[:n])
        codes = {}
        for name, column in lived.features.items():
            codes[name] = np.zeros(len(own), column.dtype)
            if same:
                codes[name][:n] = column
        newest = int(time.max(initial=-1))
        now = (newest if newest < self._oldest else max(newest, self._newest)) + 1
        context = [feature.name for feature in ranker.features.schema.of("context")]
        return RankingTask(
            store=HistoryStore(
                Vocabulary([0]),
                ranker.histories.items,
                np.array([0, len(own)]),
                own.astype(np.int32),
                time,
                codes,
            ),
            features=ranker.features,
            user=np.zeros(1, np.int64),
            time=np.array([now]),
            offsets=np.array([0, len(item)]),
            item=self._own[item],
            label=np.full((len(item), len(ranker.tasks)), np.nan, np.float32),
            profile=ranker.features.profile_codes(who, pl.DataFrame({name: [None] for name in context})),
            tasks=ranker.tasks,
        )
