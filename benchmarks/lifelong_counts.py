"""How much a long history says before anything is learned: GAUC of simple counts, by events kept.

    python benchmarks/lifelong_counts.py [--negatives 20] [--power 1] [--seeds 3] [--json FILE]

The test of `complete_journey_task`: held-out households, the last eight weeks. A candidate's score is how often
it stands among the last n events before the request; GAUC is over requests, weighted by their candidates.
Beside it popularity: how often anybody bought the item before the test began.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import cast

import numpy as np

from tiglon.data.histories import HistoryStore
from tiglon.data.ranking import RankingTask, complete_journey_task
from tiglon.data.sources import complete_journey
from tiglon.evaluation.ranking import gauc

KEPT = (50, 100, 200, 500, 1000, 2000, None)
REQUESTS = 512


def counts(task: RankingTask, last: int | None) -> np.ndarray:
    """(C,) how often each candidate stands among the last events before its request."""
    N, found = len(task.store.items), np.empty(len(task.item), np.int64)
    for begin in range(0, len(task), REQUESTS):
        part = slice(begin, begin + REQUESTS)
        past = task.store.before(task.user[part], task.time[part], last)
        bought = np.sort(past.owner * N + past.item)
        rows = slice(task.offsets[begin], task.offsets[min(begin + REQUESTS, len(task))])
        asked = (task.owner[rows] - begin) * N + task.item[rows]
        found[rows] = np.searchsorted(bought, asked, "right") - np.searchsorted(bought, asked, "left")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--negatives", type=int, default=20, help="a request")
    parser.add_argument("--power", type=float, default=1.0, help="of the counts by which they are drawn")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    source, rows = complete_journey(), []
    for seed in range(args.seeds):
        begin = time.perf_counter()
        tasks = complete_journey_task(seed, source=source, negatives=args.negatives, power=args.power)
        seconds = time.perf_counter() - begin
        test = tasks.test
        label, store = test.label[:, 0], cast(HistoryStore, test.store)
        popularity = np.bincount(store.item[store.time < test.time.min()], minlength=len(store.items))
        scores = {str(n or "all"): counts(test, n).astype(np.float64) for n in KEPT}
        scores["popularity"] = popularity[test.item].astype(np.float64)
        row = {name: float(gauc(score, label, test.owner)) for name, score in scores.items()}
        rows.append(
            {"seed": seed, "requests": len(test), "candidates": len(test.item), "seconds": seconds} | row
        )
        print(" · ".join(f"{name} {value:.3f}" for name, value in row.items()), flush=True)
    print(f"\n{rows[0]['requests']:,} requests, {rows[0]['candidates']:,} candidates; {tasks.note}")
    for name in scores:
        values = np.array([row[name] for row in rows])
        print(f"{name:>10}  {values.mean():.4f} ± {values.std(ddof=min(1, len(rows) - 1)):.4f}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
