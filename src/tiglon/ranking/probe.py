"""Does a network listen to who asks? What one feature of the profile moves, if it alone is turned over.

    probe(ranker, ranker.asked(users, candidates), ["newcomer"])    before a gate, and after

A flag that is true for one request in twenty is learned to be done without: the network with the flag and the one
without it then answer alike (POSO §3, https://arxiv.org/abs/2108.04690; `gates.py`). This says so of a saved ranker.

Letters: B requests, K candidates, X profile features, V values of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch

from tiglon.data.ranking import RankingTask
from tiglon.errors import ConfigError, DataError, did_you_mean
from tiglon.ranking.gates import submergence
from tiglon.ranking.model import LifelongRanker
from tiglon.types import MISSING

MOST = 4  # values of a feature that are compared


class Moved(NamedTuple):
    """What a feature does, the mean over pairs of its values: of two, all there is; of more, `MOST` spread over them.

    values: that it has.   hidden: mean |h − h'| / mean |h| of the last hidden layer, NaN without one.
    logit: mean |Δ logit|.
    """

    feature: str
    values: int
    hidden: float
    logit: float


def probe(
    ranker: LifelongRanker, task: RankingTask, features: Sequence[str] | None = None, requests: int = 32
) -> list[Moved]:
    """One line a feature of the user or the context; None: of all that the ranker has.

    requests: of the task, its first, fewer where their lives are very long; all they have but the feature stays as
        it is.
    Raises ConfigError for a feature that the network does not read, DataError for a task without a request.
    """
    known = [feature.name for feature in ranker.features.schema.of("user", "context")]
    if not known:
        raise ConfigError(
            f"a probe of '{ranker.name}', which reads nothing of who asks",
            rule="A probe turns over a feature of the user or the context",
            fix="Train it with gate_by=activity, without a gate and with one",
        )
    for name in features or ():
        if name not in known:
            raise ConfigError(f"no feature '{name}' of who asks", fix=did_you_mean(name, known))
    if not len(task):
        raise DataError("a probe with a task of no requests", rule="It turns over a feature of some")
    return [_moved(ranker, task, name, known.index(name), requests) for name in features or known]


def stored_requests(ranker: LifelongRanker, users: int = 32, candidates: int = 20) -> RankingTask:
    """Requests of users spread over the stored log, all right after its newest event, for the most frequent items."""
    store = ranker.histories
    counts = np.bincount(store.item, minlength=len(store.items))
    often = np.argsort(-counts, kind="stable")[:candidates]
    who = np.unique(np.linspace(0, len(store.users) - 1, users).astype(np.int64))
    return ranker.asked(store.users.decode(who), [store.items.decode(often)] * len(who))


@torch.inference_mode()
def _moved(ranker: LifelongRanker, task: RankingTask, name: str, column: int, requests: int) -> Moved:
    network = ranker.network.eval()
    batch = task.select(np.arange(min(requests, len(task)))).batches(requests, last=ranker.config.longest)[0]
    values = ranker.features.profile_sizes[column] - 1  # beside code 0, the unknown one
    codes = np.unique(np.linspace(min(1, values - 1), values, MOST).round().astype(int).clip(min=0)).tolist()
    pairs = list(combinations(codes, 2))
    if not pairs:
        return Moved(name, values, 0.0, 0.0)
    logit = {}
    for code in codes:
        profile = batch.profile.clone()
        profile[:, column] = code
        logit[code] = network(batch._replace(profile=profile))[batch.item != MISSING]
    layers = [
        submergence(lambda p: network.hidden(batch._replace(profile=p)), batch.profile, column, pair)
        for pair in pairs
    ]
    hidden = np.mean([layer[-1] for layer in layers]) if layers[0] else np.nan
    change = np.mean([(logit[a] - logit[b]).abs().mean().item() for a, b in pairs])
    return Moved(name, values, float(hidden), float(change))
