"""The whole funnel on real data: log → semantic IDs → TIGER → funnel → evaluation → ten recommendations.

Command   tiglon demo
Hardware  two cores, idle: 8 minutes in all
Score     next basket, seen items shown, test: Recall@10 .1791, NDCG@10 .1963 (repeats: .1702, .1910)
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shlex import quote

import numpy as np
import polars as pl
from rich.console import Console
from rich.text import Text

from tiglon.data.sources import Source, complete_journey
from tiglon.data.split import moment_starts
from tiglon.recipes import Recipe, Reporter, tiger, train
from tiglon.retrieval.tiger_causal import CausalConfig
from tiglon.serving.bundle import Bundle, is_bundle
from tiglon.serving.engine import Engine
from tiglon.serving.messages import RecommendRequest
from tiglon.terminal import describe, metrics_table, recommendation_table

HOUSEHOLDS = 10  # a product enters the demo's catalogue when at least so many bought it


def recipe(events: int, items: int) -> Recipe:
    """Small enough for one pass over a million events in minutes."""
    settings = tiger(events, items)
    model = CausalConfig(
        width=96, heads=2, hidden=256, encoder_layers=2, decoder_layers=1, dropout=0.0
    )  # in one pass nothing is seen twice, so there is nothing to overfit to
    training = replace(settings.tiger.train, epochs=4, lr=2e-3, average=0.99, evaluations=4)
    shape = replace(
        settings.tiger, model=model, train=training, window=64, batch_targets=512, validation_users=400
    )
    funnel = replace(settings.funnel, users=1_000)  # half a minute
    return replace(settings, name="demo", tiger=shape, funnel=funnel)


def run(out: Path, minutes: float, reporter: Reporter, console: Console) -> Bundle:
    """Train, or take what an earlier run left at `out`; then show what there is to see."""
    if is_bundle(out):
        reporter.say(f"{out} is there from an earlier run and is reused; delete it to begin anew")
        bundle = Bundle.load(out)
    else:
        source = groceries(reporter)
        bundle = train(source.interactions, source.items, out, recipe, minutes=minutes, reporter=reporter)
    show(bundle, console)
    return bundle


def groceries(reporter: Reporter) -> Source:
    """Complete Journey with the products that at least ten households bought."""
    source = complete_journey()
    reporter.say(source.note)
    buyers = source.interactions.group_by("item_id").agg(pl.col("user_id").n_unique().alias("buyers"))
    known = buyers.filter(pl.col("buyers") >= HOUSEHOLDS)
    log = source.interactions.join(known, on="item_id", how="semi")
    items = source.items.join(known, on="item_id", how="semi")
    reporter.say(
        f"{source.items.height:,} products, {len(buyers):,} of them bought; kept: the {items.height:,} that at "
        f"least {HOUSEHOLDS} households bought, {log.height / source.interactions.height:.0%} of the lines"
    )
    return Source(log, items, source.note)


def show(bundle: Bundle, console: Console) -> None:
    """The evaluation, a household's last basket and what is recommended to it, and how to go on."""
    console.print()
    console.print(metrics_table(bundle.metrics, "The next basket of every household (simulated shoppers)"))
    console.print(_verdict(bundle), soft_wrap=True)
    household, basket = _household(bundle)
    bought = set(bundle.items.vocabulary.decode(_life(bundle, household)))
    console.print(f"\nHousehold {household} bought last:")
    for item, words in zip(basket, describe(bundle, basket), strict=True):
        console.print(Text(f"  {item:>9}  {words}"))
    found = Engine(bundle).recommend(RecommendRequest(user_id=household, k=10)).items
    console.print()
    console.print(recommendation_table(bundle, found, f"Ten recommendations for household {household}"))
    again = sum(r.item_id in bought for r in found)
    console.print(f"{again} of the ten it has bought before: groceries repeat, so seen items are not hidden.")
    where = quote(str(bundle.path))
    console.print(
        Text(f"""
The bundle (version {bundle.version}) lies in {bundle.path}. How to go on (. .venv/bin/activate, in a new shell):
  tiglon recommend {where} --user {household} --k 10
  tiglon evaluate {where} --json
  tiglon ids report {where} --plot ids.png
  tiglon train --interactions YOURS.parquet --items ITEMS.parquet --out my-bundle"""),
        soft_wrap=True,
    )


def _verdict(bundle: Bundle) -> str:
    """Who leads the table, said plainly."""
    score = {row["name"]: row["ndcg@10"] for row in bundle.metrics["rows"]}
    best = max(score, key=score.__getitem__)
    if best == "tiger":
        return "TIGER leads this table."
    share = score["tiger"] / score[best]
    return f"'{best}' leads this table; so short a training (--minutes) brings TIGER to {share:.0%} of its ndcg@10."


def _household(bundle: Bundle) -> tuple[int | str, list[object]]:
    """The first household whose last basket has five to ten lines, and that basket's raw items."""
    log = bundle.log()
    starts = moment_starts(log)
    last = np.searchsorted(log.user[starts], np.arange(len(log.users)), side="right") - 1
    ends = np.append(starts, len(log))[last + 1]
    size = ends - starts[last]
    user = int(np.flatnonzero((size >= 5) & (size <= 10))[0])
    basket = bundle.items.vocabulary.decode(log.item[starts[last[user]] : ends[user]])
    return log.users.decode([user])[0], basket


def _life(bundle: Bundle, user: object) -> np.ndarray:
    return bundle.histories.before(bundle.histories.users.encode([user])).item
