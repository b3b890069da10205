"""How a ranker is measured: does it order a user's candidates, and does it say how likely they are.

    found = measure("twin", score, label, user=user, request=request, length=length)
    Console().print(table([found, …])); json.dumps(to_json([found, …], split="test"))

GAUC = Σ_g n_g · AUC_g / Σ_g n_g over the groups g with labels of both classes, n_g being the impressions
(candidates with a label) of group g. The group is the user, as in DIN (Zhou et al. 2018, §5.2) and TWIN;
"gauc/request" groups by request. Groups whose labels are of one class have no AUC: they are dropped, and the
result says how many. Equal scores count one half in every AUC (mid-ranks), and share the gains of their ranks
in NDCG, so that the order of the rows never matters.

Letters: C candidates with a label (impressions), G groups, R requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tiglon.errors import ConfigError, DataError, did_you_mean

SEGMENTS = (50, 200, 1_000)  # history lengths at which segments end
_BINS = 20  # of the calibration error
_RESAMPLES = 1_000
_RESAMPLES_AT_ONCE = 20


@dataclass(frozen=True, eq=False)
class RankingEvaluation:
    """The numbers of one ranker over C impressions.

    metrics: gauc, gauc/request, auc, ndcg@K (mean over the requests with a positive label), and of scores
        that are probabilities log_loss, calibration (mean prediction / mean label, best 1) and
        calibration_error; "gauc[51–200]" is that of the requests with so many behaviours. NaN where undefined.
    interval: 95% bootstrap interval of gauc, over users.
    groups, group_auc, impressions: (G,) the users that have an AUC, with it and their weight, so that two
        rankers can be compared user by user.
    dropped, dropped_requests: users and requests whose labels are of one class.   unlabelled: candidates without
        a label.
    """

    name: str
    task: str
    metrics: dict[str, float]
    interval: tuple[float, float]
    groups: np.ndarray
    group_auc: np.ndarray
    impressions: np.ndarray
    dropped: int
    dropped_requests: int
    unlabelled: int
    rows: int
    positives: int

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in list(self.metrics.items())[:4])
        return f"RankingEvaluation({self.name}, {self.task}, {self.rows:,} impressions: {shown} …)"


def measure(
    name: str,
    score: np.ndarray,
    label: np.ndarray,
    *,
    user: np.ndarray,
    request: np.ndarray,
    length: np.ndarray | None = None,
    task: str = "label",
    ks: Sequence[int] = (5, 10),
    probability: bool = True,
    segments: Sequence[int] = SEGMENTS,
    seed: int = 0,
) -> RankingEvaluation:
    """Measure the scores of candidates, all in arrays of equal length.

    score: higher is better.   label: 0 or 1, NaN where there is none (left out and counted).
    user, request: whose candidate it is, and of which request.   length: behaviours before the request.
    probability: whether scores are probabilities, so that log loss and calibration mean something.
    seed: of the bootstrap. Raises DataError for columns that do not fit, scores that are NaN or, where
    `probability`, outside 0 … 1, labels other than 0 and 1, no label at all; ConfigError for a bad K.
    """
    columns = {"score": score, "label": label, "user": user, "request": request}
    columns |= {} if length is None else {"length": length}
    for column, values in columns.items():
        if np.shape(values) != (len(score),):
            raise DataError(
                f"{column} of shape {np.shape(values)} for {len(score)} scores", rule="One value a candidate"
            )
    label = np.asarray(label, np.float64)
    known = ~np.isnan(label)
    score, label, user, request = (np.asarray(x)[known] for x in (score, label, user, request))
    _require_scores(score, probability)
    _require_labels(label)

    groups, group_auc, size = auc_by_group(score, label, user)
    both = ~np.isnan(group_auc)
    _, request_auc, request_size = auc_by_group(score, label, request)
    asked = ~np.isnan(request_auc)
    metrics = {
        "gauc": weighted_mean(group_auc[both], size[both]),
        "gauc/request": weighted_mean(request_auc[asked], request_size[asked]),
        "auc": auc(score, label),
    }
    for k in ks:
        gains = ndcg(score, label, request, k)
        metrics[f"ndcg@{k}"] = float(np.nanmean(gains)) if (~np.isnan(gains)).any() else float("nan")
    if probability:
        metrics["log_loss"] = log_loss(score, label)
        metrics["calibration"] = float(score.mean() / label.mean()) if label.any() else float("nan")
        metrics["calibration_error"] = calibration_error(score, label)
    if length is not None:
        behind = np.asarray(length)[known]
        for title, rows in _segments(behind, segments).items():
            metrics[f"gauc[{title}]"] = gauc(score[rows], label[rows], user[rows])
    return RankingEvaluation(
        name,
        task,
        metrics,
        bootstrap_mean(group_auc[both], size[both], seed=seed),
        groups[both],
        group_auc[both],
        size[both],
        dropped=int((~both).sum()),
        dropped_requests=int((~asked).sum()),
        unlabelled=int((~known).sum()),
        rows=len(score),
        positives=int(label.sum()),
    )


def difference(a: RankingEvaluation, b: RankingEvaluation, seed: int = 0) -> tuple[float, float, float]:
    """GAUC of a − b with its 95% paired bootstrap interval over users: (difference, low, high).

    Raises DataError unless both measured the same users' same candidates.
    """
    if not (np.array_equal(a.groups, b.groups) and np.array_equal(a.impressions, b.impressions)):
        raise DataError(
            f"'{a.name}' and '{b.name}' measured different users or candidates",
            rule="A paired difference needs the same",
            fix="Evaluate both on the same task",
        )
    delta = a.group_auc - b.group_auc
    return weighted_mean(delta, a.impressions), *bootstrap_mean(delta, a.impressions, seed=seed)


# -- order -----------------------------------------------------------------------------------------------


def auc(score: np.ndarray, label: np.ndarray) -> float:
    """P(score of a positive > of a negative) + ½ P(equal); NaN where the labels are of one class."""
    return float(auc_by_group(score, label, np.zeros(len(score), np.int64))[1][0]) if len(score) else math.nan


def gauc(score: np.ndarray, label: np.ndarray, group: np.ndarray) -> float:
    """The mean AUC of groups, weighted by impressions; groups of one class are left out, NaN if all are."""
    _, values, size = auc_by_group(score, label, group)
    both = ~np.isnan(values)
    return weighted_mean(values[both], size[both])


def auc_by_group(
    score: np.ndarray, label: np.ndarray, group: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The groups (G,), sorted; the AUC (G,) of each, NaN where its labels are of one class; its impressions (G,).

    AUC = (Σ ranks of the positives − n₊(n₊ + 1)/2) / (n₊ n₋), equal scores at the mean of their ranks.
    """
    groups, code = np.unique(group, return_inverse=True)
    order, first, last, start = _tied(score, code)
    middle = (first + last) / 2 - start + 1  # ranks in the group, from 1
    positive = np.asarray(label)[order] > 0
    size = np.bincount(code, minlength=len(groups))
    n = np.bincount(code[order], weights=positive, minlength=len(groups))
    ranks = np.bincount(code[order], weights=middle * positive, minlength=len(groups))
    pairs = n * (size - n)
    value = np.divide(ranks - n * (n + 1) / 2, pairs, out=np.full(len(groups), np.nan), where=pairs > 0)
    return groups, value, size


def ndcg(score: np.ndarray, label: np.ndarray, request: np.ndarray, k: int) -> np.ndarray:
    """(R,) NDCG@K of each request's candidates, requests sorted; NaN where none is positive.

    Candidates of equal score share the gains 1/log2(r + 1), r ≤ K, of the ranks that they hold together: the
    mean over all orders of them (McSherry and Najork 2008). The ideal puts the positives first.
    """
    if k < 1:
        raise ConfigError(f"k of {k}", rule="NDCG looks at the first k ≥ 1 ranks")
    requests, code = np.unique(request, return_inverse=True)
    order, first, last, start = _tied(-np.asarray(score), code)
    until = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))])  # gains of the first r ranks
    gain = until[np.minimum(last - start + 1, k)] - until[np.minimum(first - start, k)]
    gain = gain / (last - first + 1)
    positive = np.asarray(label)[order] > 0
    found = np.bincount(code[order], weights=gain * positive, minlength=len(requests))
    n = np.bincount(code[order], weights=positive, minlength=len(requests)).astype(np.int64)
    ideal = until[np.minimum(n, k)]
    return np.divide(found, ideal, out=np.full(len(requests), np.nan), where=n > 0)


def _tied(value: np.ndarray, code: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows sorted by (code, value): the order (C,), and for each sorted row the first and the last place of
    those that tie with it, and the first place of its code."""
    order = np.lexsort((value, code))
    value, code = np.asarray(value)[order], code[order]
    place = np.arange(len(order))
    new_code = np.ones(len(order), bool)
    new_code[1:] = code[1:] != code[:-1]
    new = new_code.copy()
    new[1:] |= value[1:] != value[:-1]
    starts = np.flatnonzero(new)
    block = np.cumsum(new) - 1
    last = np.append(starts[1:], len(order))[block] - 1
    return order, starts[block], last, np.maximum.accumulate(np.where(new_code, place, 0))


# -- probability -----------------------------------------------------------------------------------------


def log_loss(probability: np.ndarray, label: np.ndarray) -> float:
    """−mean[y log p + (1 − y) log(1 − p)], in nats; p is kept one float32 step from 0 and 1."""
    step = float(np.finfo(np.float32).eps)
    p = np.clip(np.asarray(probability, np.float64), step, 1 - step)
    return float(-np.where(np.asarray(label) > 0, np.log(p), np.log1p(-p)).mean())


def calibration_error(probability: np.ndarray, label: np.ndarray, bins: int = _BINS) -> float:
    """Expected calibration error: Σ_b n_b/C · |mean prediction − mean label| over bins of about equal n.

    Bins end at quantiles of the predictions, and equal predictions share a bin: with bins of equal width
    (Guo et al. 2017) nearly all candidates, whose labels are mostly 0, would fall into the first.
    """
    p = np.asarray(probability, np.float64)
    inner = np.quantile(p, np.arange(1, bins) / bins)
    code = np.searchsorted(inner, p, side="right")
    return float(np.abs(np.bincount(code, weights=p - label, minlength=bins)).sum() / len(p))


# -- means and how sure they are -------------------------------------------------------------------------


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> float:
    """Σ w v / Σ w; NaN without values."""
    return float(values @ weights / weights.sum()) if len(values) else math.nan


def bootstrap_mean(
    values: np.ndarray, weights: np.ndarray, n: int = _RESAMPLES, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """(low, high) of the weighted mean, by resampling groups with their weights n times (percentile method)."""
    if not len(values):
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    even = np.full(len(values), 1 / len(values))
    means = []
    for done in range(0, n, _RESAMPLES_AT_ONCE):
        times = rng.multinomial(len(values), even, size=min(_RESAMPLES_AT_ONCE, n - done))
        means.append((times @ (values * weights)) / (times @ weights))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# -- to be read ------------------------------------------------------------------------------------------

SHOWN = ("gauc", "gauc/request", "auc", "ndcg@10", "log_loss", "calibration", "calibration_error")


def table(
    evaluations: Sequence[RankingEvaluation], metrics: Sequence[str] = SHOWN, *, title: str = ""
) -> Group:
    """One column an evaluation, for names of metrics are long; the interval of its GAUC below that."""
    _require_same_rows(evaluations)
    rows = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    rows.add_column("", no_wrap=True)
    for e in evaluations:
        rows.add_column(Text(f"{e.name}\n{e.task}"), justify="right", overflow="fold")
    known = {name for e in evaluations for name in e.metrics}
    for metric in metrics:
        if metric not in known:
            raise ConfigError(f"no metric '{metric}'", fix=did_you_mean(metric, known))
        rows.add_row(Text(metric), *(_short(e.metrics.get(metric, math.nan)) for e in evaluations))
        if metric == "gauc":
            rows.add_row("95% interval", *("–".join(map(_short, e.interval)) for e in evaluations))
    caption = Text(_captions(evaluations), "table.caption")
    return Group(*([Text(title, "table.title")] if title else []), rows, caption)


def to_json(evaluations: Sequence[RankingEvaluation], split: str) -> dict[str, Any]:
    """{"split": …, "rows": [{"name": …, "task": …, "users": …, "dropped": …, "gauc": …, …}]}; null for NaN."""
    _require_same_rows(evaluations)
    return {
        "split": split,
        "rows": [
            {
                "name": e.name,
                "task": e.task,
                "impressions": e.rows,
                "users": len(e.groups),
                "dropped": e.dropped,
                "dropped_requests": e.dropped_requests,
            }
            | {name: None if math.isnan(value) else value for name, value in e.metrics.items()}
            | {"gauc_interval": [None if math.isnan(bound) else bound for bound in e.interval]}
            for e in evaluations
        ],
    }


def _captions(evaluations: Sequence[RankingEvaluation]) -> str:
    """A line for each task."""
    of_task = {e.task: _caption(e) for e in reversed(evaluations)}
    if len(of_task) == 1:
        return next(iter(of_task.values()))
    return "\n".join(f"{task}: {said}" for task, said in reversed(of_task.items()))


def _caption(e: RankingEvaluation) -> str:
    said = f"{e.rows:,} impressions, {e.positives:,} positive; {len(e.groups):,} users"
    if e.dropped:
        said += f", {e.dropped:,} more with labels of one class left out of GAUC"
    return said + (f"; {e.unlabelled:,} candidates without a label" if e.unlabelled else "")


# -- inside ----------------------------------------------------------------------------------------------


def _segments(length: np.ndarray, ends: Sequence[int]) -> dict[str, np.ndarray]:
    """Title → rows (C,) bool: 0–50, 51–200, … and the rest."""
    starts = [0, *(end + 1 for end in ends)]
    titles = [f"{a}–{b}" for a, b in zip(starts, ends, strict=False)] + [f"{starts[-1]}+"]
    code = np.searchsorted(np.asarray(ends), length, side="left")
    return {title: code == index for index, title in enumerate(titles)}


def _require_scores(score: np.ndarray, probability: bool) -> None:
    if np.isnan(score).any():
        raise DataError(
            f"{int(np.isnan(score).sum())} scores that are NaN", rule="Every candidate has a score"
        )
    if probability and len(score) and not 0 <= score.min() <= score.max() <= 1:
        raise DataError(
            f"scores between {score.min():.3g} and {score.max():.3g}",
            rule="A probability lies in 0 … 1",
            fix="Pass probability=False for scores of another kind",
        )


def _require_labels(label: np.ndarray) -> None:
    if not len(label):
        raise DataError("no candidate with a label", rule="A ranker is measured by what followed")
    if not np.isin(label, (0, 1)).all():
        raise DataError(f"labels from {label.min():g} to {label.max():g}", rule="A label is 0, 1 or NaN")


def _require_same_rows(evaluations: Sequence[RankingEvaluation]) -> None:
    if not evaluations:
        raise DataError("no evaluations", rule="A table has at least one row")
    first = evaluations[0]
    for other in evaluations[1:]:
        if other.task == first.task and not (
            np.array_equal(first.groups, other.groups) and first.rows == other.rows
        ):
            raise DataError(
                f"'{first.name}' and '{other.name}' measured different users or candidates",
                rule="Rows of one table are about the same candidates",
                fix="Evaluate both on the same task",
            )


def _short(value: float) -> str:
    """.7132, as papers print it."""
    return "–" if math.isnan(value) else f"{value:.4f}".removeprefix("0")
