"""What people see: progress, tables, lists. Plain lines where the output is no terminal.

Ids, titles and paths are `Text`: rich would read a string such as "[refurbished]" as markup.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from tiglon.ranking.probe import Moved
from tiglon.recipes import Reporter, text_columns
from tiglon.serving.bundle import Bundle, Recommendation
from tiglon.serving.messages import RecommendedItem

_METRICS = ("recall@5", "recall@10", "recall@20", "ndcg@10", "ndcg@20")
_QUIET_SECONDS = 20  # between two plain lines of one task


class Terminal(Reporter):
    """Facts as lines; long tasks as bars on a terminal, else as a line now and then."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._bars: Progress | None = None
        self._task: tuple[str, Any] | None = None
        self._shown = 0.0

    def say(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=True)

    def share(self, task: str, share: float, note: str = "") -> None:
        if self.console.is_terminal:
            self._draw(task, share, note)
            return
        if self._task is None or self._task[0] != task:
            self._task, self._shown = (task, None), time.monotonic()
        if share >= 1 or time.monotonic() - self._shown > _QUIET_SECONDS:
            self._shown = time.monotonic()
            self.console.print(Text(f"{task} {share:.0%} {note}".rstrip()), soft_wrap=True)

    def _draw(self, task: str, share: float, note: str) -> None:
        if self._bars is None:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            self._bars = Progress(*columns, console=self.console)
            self._bars.start()
        if self._task is None or self._task[0] != task:
            self._task = task, self._bars.add_task(task, total=1.0, note=note)
        self._bars.update(self._task[1], completed=share, note=note)
        if share >= 1:
            self._bars.stop()
            self._bars = self._task = None


def metrics_table(metrics: dict[str, Any], title: str = "") -> Table:
    """The evaluation (see `evaluation.protocol.to_json`) as rows a retriever."""
    caption = f"{metrics['users']:,} users, the whole catalogue ranked"
    if skipped := metrics.get("skipped"):  # bundles made before have none, nor a lead
        caption += f"\n{skipped:,} more had no moment to be tested on"
    if lead := metrics.get("lead"):
        caption += f"\n{lead['name']} − {lead['over']}, 95% interval: " + "; ".join(
            f"{name} {lead[name][0]:+.4f} ({lead[name][1]:+.4f} … {lead[name][2]:+.4f})"
            for name in ("recall@10", "ndcg@10")
        )
    rows = Table(
        title=_title(title), caption=Text(caption, "table.caption"), box=box.SIMPLE_HEAD, padding=(0, 1)
    )
    rows.add_column("retriever", no_wrap=True)
    for name in _METRICS:
        rows.add_column(name, justify="right")
    for row in metrics["rows"]:
        values = [row.get(name) for name in _METRICS]
        rows.add_row(Text(row["name"]), *("–" if v is None or math.isnan(v) else f"{v:.4f}" for v in values))
    return rows


def recommendation_table(
    bundle: Bundle, found: Sequence[Recommendation | RecommendedItem], title: str = ""
) -> Table:
    """A line an item: id, what it is, score, source."""
    rows = Table(title=_title(title), title_justify="left", box=box.SIMPLE_HEAD)
    rows.add_column("item", no_wrap=True)
    rows.add_column("what it is")
    rows.add_column("score", justify="right")
    rows.add_column("source", no_wrap=True)
    described = describe(bundle, [r.item_id for r in found])
    for r, words in zip(found, described, strict=True):
        rows.add_row(Text(str(r.item_id)), Text(words), f"{r.score:.3f}", Text(r.source))
    return rows


def probe_table(found: Sequence[tuple[str, Moved]]) -> Table:
    """A line a ranker and feature."""
    rows = Table(title="What turning a feature over moves", box=box.SIMPLE_HEAD, padding=(0, 1))
    rows.add_column("ranker")
    rows.add_column("feature", no_wrap=True)
    for name in ("values", "last hidden layer", "answers"):
        rows.add_column(name, justify="right")
    for whose, moved in found:
        hidden = "–" if math.isnan(moved.hidden) else f"{moved.hidden:.1%}"
        rows.add_row(Text(whose), Text(moved.feature), f"{moved.values:,}", hidden, f"{moved.logit:.3f}")
    rows.caption = "the layer: of its own size; answers: mean change of the log-odds"
    return rows


def describe(bundle: Bundle, items: Sequence[Any]) -> list[str]:
    """What the catalogue says about raw ids: the first of its columns of text, joined."""
    columns = text_columns(bundle.items)[:4]
    rows = bundle.items.table[bundle.items.vocabulary.encode(list(items)).tolist()]
    words = [" · ".join(_plain(row[c]) for c in columns if row[c]) for row in rows.iter_rows(named=True)]
    return [text or "(no description)" for text in words]


def _title(text: str) -> Text | None:
    return Text(text, "table.title") if text else None


def _plain(value: Any) -> str:
    text = value[-1] if isinstance(value, list) else value
    return " ".join(str(text).split())
