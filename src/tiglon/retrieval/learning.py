"""What every network's learning shares: a log cut into windows, and users whose next items choose the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from tiglon.data.histories import HistoryStore
from tiglon.errors import DataError
from tiglon.evaluation.protocol import Retriever, evaluate
from tiglon.retrieval.windows import Batch, WindowBatches, checksum, moments, windows_wanted
from tiglon.train.loop import Progress, train
from tiglon.types import Interactions, Targets, user_names


class Learner(Retriever, Protocol):
    """A retriever with a network and its settings: `batch_targets`, `validation_users`, `train` and its own."""

    config: Any
    network: Any


def sampled(validation: Targets | None, config: Any) -> Targets | None:
    """The users who choose the weights: `validation_users` of them, drawn by the seed. None where there is nobody."""
    if validation is None or not len(validation):
        return None
    drawn = np.random.default_rng(config.train.seed).permutation(len(validation))
    return validation.take(np.sort(drawn[: config.validation_users]))


def learn(
    learner: Learner,
    interactions: Interactions,
    sample: Targets | None,
    windows: Callable[[np.ndarray, np.ndarray], np.ndarray],
    loss: Callable[[Batch], Tensor],
    *,
    wanted: np.ndarray | None = None,
    about: dict[str, Any],
    directory: Path | None = None,
    report: Callable[[Progress], None] | None = None,
    before_validation: Callable[[Targets], object] | None = None,
) -> tuple[dict[str, Any], HistoryStore]:
    """Train the network and leave its best weights in it; the history of losses and scores, and the stored lives.

    sample: of `sampled`; their NDCG@10, nothing masked, selects.
    windows: (offsets (U+1,), moment (E,)) → the rows (W, 3) of `WindowBatches`.
    loss: (n,) of a batch's n examples.
    wanted: (N,) bool, the items to predict; others are read alone. None: all.
    about: what else the run depends on beside the log and the settings, as in `train`.
    before_validation: called with the sample each time before it is asked.
    Raises DataError where the log numbers items otherwise or holds nothing to predict.
    """
    if interactions.items != learner.items:
        raise DataError(
            "a log whose items are not those of this retriever",
            fix="Call tiglon.data.events.align(interactions, items) first",
        )
    c, log, moment = learner.config, HistoryStore.build(interactions), moments(interactions)
    user = user_names(interactions.users)[interactions.user]
    aim = np.ones(len(log.item), bool) if wanted is None else wanted[log.item]
    rows = windows_wanted(windows(log.offsets, moment), aim)
    if not len(rows):
        raise DataError("a log without any event to predict")

    def epoch_batches(epoch: int) -> Sequence[Batch]:
        return WindowBatches(log.item, moment, aim, user, rows, c.batch_targets, [c.train.seed, epoch])

    def validate() -> float:
        assert sample is not None
        if before_validation is not None:
            before_validation(sample)
        return evaluate(learner, sample, ks=(10,), exclude_seen=False, batch=512).metrics["ndcg@10"]

    history = train(
        learner.network,
        epoch_batches,
        lambda _, batch: loss(batch),
        validate if sample is not None else None,
        c.train,
        directory,
        report,
        about={
            "retriever": type(learner).__name__,
            "events": checksum(log.item, moment, log.offsets, aim, user),
            **about,
            **{key: value for key, value in asdict(c).items() if key not in ("train", "index")},
        },
    )
    return history, log
