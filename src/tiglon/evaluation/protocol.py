"""How a retriever is measured: the whole catalogue ranked, hits on the item, users without truth counted.

    found = evaluate(retriever, split.test, popularity=counts)
    print_json(to_json([found, …], split="test")); Console().print(table([found, …]))

Two modes that must not be mixed: `exclude_seen=True` masks the items of a user's own history ("masked"),
`False` ranks them too, as papers on sequences do. A true item that the mask hides counts as missed.
Nothing is sampled: 99 random negatives can turn the order of two models around (Krichene and Rendle 2020).

Letters: B users, K ranks, N items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from rich.table import Table

from tiglon.errors import ConfigError, DataError, did_you_mean
from tiglon.evaluation.metrics import (
    USER_METRICS,
    bootstrap,
    bootstrap_difference,
    category_diversity,
    category_entropy,
    coverage,
    gini,
    judge,
    pooled_recall,
    recall_by_popularity,
)
from tiglon.types import MISSING, Candidates, Histories, Targets, Vocabulary


class Retriever(Protocol):
    """What can be evaluated."""

    @property
    def name(self) -> str: ...

    @property
    def items(self) -> Vocabulary: ...

    def retrieve(self, histories: Histories, k: int, *, exclude_seen: bool = True) -> Candidates: ...


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The numbers of one retriever over B users, by names such as "recall@10".

    metrics: means over users, and numbers of all lists (coverage@10, gini@10, pooled_recall@10,
        recall@10[head] by popularity bin).
    intervals: 95% bootstrap intervals of those that are means over users.
    per_user: their values (B,), in the order of `users`, so that two retrievers can be paired.
    skipped: users without truth, who count in no mean.
    """

    name: str
    exclude_seen: bool
    users: np.ndarray
    skipped: int
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    per_user: dict[str, np.ndarray]

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in list(self.metrics.items())[:6])
        return f"Evaluation({self.name}, {self.mode}, {len(self.users)} users: {shown} …)"

    @property
    def mode(self) -> str:
        return "masked" if self.exclude_seen else "unmasked"


def evaluate(
    retriever: Retriever,
    targets: Targets,
    *,
    ks: Sequence[int] = (5, 10, 20),
    exclude_seen: bool = True,
    popularity: np.ndarray | None = None,
    categories: np.ndarray | None = None,
    batch: int = 256,
    progress: Callable[[int, int], None] | None = None,
    seed: int = 0,
) -> Evaluation:
    """Rank the whole catalogue for every user who has truth, and measure the first k of each list.

    exclude_seen: mask the items of each user's history.
    popularity: (N,) events an item in training; adds recall by popularity bin.
    categories: (N,) one label an item; adds the entropy and the diversity of categories in a list.
    batch: users asked at once.   progress: called with (users done, users in all).   seed: of the bootstrap.
    Raises DataError where a list is invalid or nobody has truth, ConfigError for a bad k.
    """
    if not len(ks) or min(ks) < 1 or batch < 1:
        raise ConfigError(
            f"ks={tuple(ks)}, batch={batch}", rule="At least one k, each of at least 1, as is batch"
        )
    n_items = len(retriever.items)
    for name, column in (("popularity", popularity), ("categories", categories)):
        if column is not None and len(column) != n_items:
            raise DataError(f"{name} of {len(column)} items for a catalogue of {n_items}")
    asked = targets.truth.lengths > 0
    if not asked.any():
        raise DataError(
            f"{len(targets)} users, none of them with truth",
            rule="A user is measured by what came next",
            fix="Split so that some users have a last event of their own",
        )
    truth = targets.truth.take(asked)
    ranked = rank(retriever, targets.histories.take(asked), max(ks), exclude_seen, batch, progress)
    hit, relevant = judge(ranked, truth)

    per_user = {f"{name}@{k}": metric(hit, relevant, k) for name, metric in USER_METRICS.items() for k in ks}
    if categories is not None:
        per_user |= {f"category_entropy@{k}": category_entropy(ranked, categories, k) for k in ks}
        per_user |= {f"category_diversity@{k}": category_diversity(ranked, categories, k) for k in ks}
    low, high = bootstrap(np.stack(list(per_user.values()), axis=1), seed=seed)
    intervals = {name: (float(a), float(b)) for name, a, b in zip(per_user, low, high, strict=True)}

    metrics = {name: float(values.mean()) for name, values in per_user.items()}
    for k in ks:
        metrics[f"pooled_recall@{k}"] = pooled_recall(hit, relevant, k)
        metrics[f"coverage@{k}"] = coverage(ranked, n_items, k)
        metrics[f"gini@{k}"] = gini(ranked, n_items, k)
        if popularity is not None:
            bins = recall_by_popularity(ranked, truth, popularity, k)
            metrics |= {f"recall@{k}[{name}]": value for name, (value, _) in bins.items()}
    skipped = len(targets) - len(truth)
    return Evaluation(
        retriever.name, exclude_seen, targets.user[asked], skipped, metrics, intervals, per_user
    )


def difference(a: Evaluation, b: Evaluation, metric: str, seed: int = 0) -> tuple[float, float, float]:
    """Mean of a − b over the users of both, with its 95% paired bootstrap interval: (difference, low, high).

    Raises DataError unless both measured the same users.
    """
    for evaluation in (a, b):
        if metric not in evaluation.per_user:
            raise ConfigError(f"no metric '{metric}' of users", fix=did_you_mean(metric, evaluation.per_user))
    _require_same_users([a, b])
    low, high = bootstrap_difference(a.per_user[metric], b.per_user[metric], seed=seed)
    return a.metrics[metric] - b.metrics[metric], float(low), float(high)


def lead(evaluations: Sequence[Evaluation], by: str = "ndcg@10") -> dict[str, Any] | None:
    """By how much the best retriever leads the next one that was measured the same way; None for one alone, or
    where nobody measured that.

    {"name": …, "over": …, "recall@10": [difference, low, high], "ndcg@10": …}: intervals as of `difference`.
    """
    best, *others = sorted(evaluations, key=lambda e: -e.metrics.get(by, 0.0))
    others = [e for e in others if e.exclude_seen == best.exclude_seen and by in e.metrics]
    if not others:
        return None
    metrics = dict.fromkeys(("recall@10", by))
    return {"name": best.name, "over": others[0].name} | {
        metric: list(difference(best, others[0], metric)) for metric in metrics
    }


# -- to be read --------------------------------------------------------------------------------------------


def table(
    evaluations: Sequence[Evaluation],
    metrics: Sequence[str] = ("recall@5", "ndcg@5", "recall@10", "ndcg@10", "recall@20", "ndcg@20"),
    *,
    title: str = "",
    intervals: bool = False,
) -> Table:
    """One row an evaluation; with `intervals`, the 95% interval below each number."""
    _require_same_users(evaluations)
    users, skipped = len(evaluations[0].users), evaluations[0].skipped
    caption = f"{users:,} users" + (f", {skipped:,} more without truth left out" if skipped else "")
    rows = Table(title=title or None, caption=caption, show_lines=intervals)
    rows.add_column("retriever")
    rows.add_column("seen items")
    for metric in metrics:
        rows.add_column(metric, justify="right")
    for evaluation in evaluations:
        cells = []
        for metric in metrics:
            if metric not in evaluation.metrics:
                raise ConfigError(f"no metric '{metric}'", fix=did_you_mean(metric, evaluation.metrics))
            cell = _short(evaluation.metrics[metric])
            if intervals and metric in evaluation.intervals:
                cell += "\n" + "–".join(map(_short, evaluation.intervals[metric]))
            cells.append(cell)
        rows.add_row(evaluation.name, evaluation.mode, *cells)
    return rows


def to_json(evaluations: Sequence[Evaluation], split: str) -> dict[str, Any]:
    """{"split": …, "users": …, "skipped": …, "rows": [{"name": …, "exclude_seen": …, "recall@10": …, …}], "lead": …}; null for NaN."""
    _require_same_users(evaluations)
    rows = [
        {"name": e.name, "exclude_seen": e.exclude_seen}
        | {name: None if math.isnan(value) else value for name, value in e.metrics.items()}
        for e in evaluations
    ]
    first = evaluations[0]
    return {
        "split": split,
        "users": len(first.users),
        "skipped": first.skipped,
        "rows": rows,
        "lead": lead(evaluations),
    }


# -- inside ------------------------------------------------------------------------------------------------


def rank(
    retriever: Retriever,
    histories: Histories,
    k: int,
    exclude_seen: bool = True,
    batch: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """(B, k) int64, the lists of all users, MISSING after the last item; asked and told as in `evaluate`.

    Raises DataError for lists of another shape, or with items that the retriever does not have.
    """
    n_items = len(retriever.items)
    ranked = np.full((len(histories), k), MISSING, np.int64)
    for start in range(0, len(histories), batch):
        some = histories.take(slice(start, start + batch))
        found = retriever.retrieve(some, k, exclude_seen=exclude_seen).item
        if len(found) != len(some) or found.shape[1] > k or found.max(initial=MISSING) >= n_items:
            raise DataError(
                f"'{retriever.name}' answered {len(some)} users, k={k}, {n_items} items "
                f"with lists of shape {found.shape} up to item {found.max(initial=MISSING)}",
                rule="A retriever gives each user one list of at most k items of its catalogue",
            )
        ranked[start : start + len(some), : found.shape[1]] = found
        if progress is not None:
            progress(start + len(some), len(histories))
    return ranked


def _require_same_users(evaluations: Sequence[Evaluation]) -> None:
    if not evaluations:
        raise DataError("no evaluations", rule="A table has at least one row")
    for other in evaluations[1:]:
        if not np.array_equal(evaluations[0].users, other.users):
            raise DataError(
                f"'{evaluations[0].name}' and '{other.name}' measured different users",
                rule="Rows of one table are about the same users",
                fix="Evaluate both on the same targets",
            )


def _short(value: float) -> str:
    """.0648, as papers print it."""
    return "–" if math.isnan(value) else f"{value:.4f}".removeprefix("0")
