"""How target attention should begin: W^q = W^h or apart, and how large the first scores are.

    python benchmarks/attention_start.py [--length 300] [--deciding 20] [--steps 400] [--seeds 0 1]

A planted world (`tiglon.data.lives.planted`): --deciding behaviours of its topic decide a candidate. The ranker is TWIN in its
shell, Adam, 16 requests a step. "score of itself" is α of an item with itself, the mean over items, before
training. Shown: AUC on 400 new requests as training goes on, and how many of the deciding behaviours of
positive candidates the search finds at the end.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator

import torch
from machine import machine_line

from tiglon.data.lives import Planted, planted
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.nn.target_attention import TargetAttention
from tiglon.ranking.ranker import Ranker
from tiglon.ranking.twin import Twin

BATCH, HEADS, HEAD_WIDTH, BEGINS_AT = 16, 4, 16, 4.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=300)
    parser.add_argument("--deciding", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--stds", type=float, nargs="+", default=[0.3])
    parser.add_argument("--scores", type=float, nargs="+", default=[0.4, 2, 4, 6, 12])
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(machine_line())
    learn = planted(given.length, BATCH * given.steps // 4, given.deciding, seed=1)
    test = planted(given.length, 400, given.deciding, seed=2, features=learn.task.features)
    shown = " ".join(f"{step:>5}" for step in checkpoints(given.steps))
    print(f"{'projections':<12} {'std':>5} {'itself':>6} {'seed':>4}   AUC at {shown}   found")
    for std in given.stds:
        for same, score in [*((True, score) for score in given.scores), (False, None)]:
            for seed in given.seeds:
                *auc, found = run(learn, test, given.steps, given.lr, std, same, score, seed)
                line = " ".join(f"{value:5.3f}" for value in auc)
                itself = "–" if score is None else f"{score:g}"
                name = "the same" if same else "apart"
                print(f"{name:<12} {std:>5} {itself:>6} {seed:>4}          {line}   {found:.3f}", flush=True)


def checkpoints(steps: int) -> list[int]:
    return [steps * part // 4 for part in (1, 2, 3, 4)]


def run(
    learn: Planted,
    test: Planted,
    steps: int,
    lr: float,
    std: float,
    same: bool,
    score: float | None,
    seed: int,
) -> Iterator[float]:
    """AUC at each checkpoint, then the share of deciding behaviours found."""
    torch.manual_seed(seed)
    embed = FeatureEmbedding(**learn.task.features.embedding(), std=std)
    unit = Twin(embed, k=100, heads=HEADS, head_width=HEAD_WIDTH)
    unit.attention = TargetAttention(
        embed.inherent_width,
        embed.cross_count,
        embed.cross_width,
        heads=HEADS,
        head_width=HEAD_WIDTH,
        identity=same,
        item_std=std * (BEGINS_AT / (score or BEGINS_AT)) ** 0.5,
    )
    model = Ranker(embed, unit)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    order = (batch for epoch in itertools.count() for batch in learn.task.batches(BATCH, seed=epoch))
    for step, batch in enumerate(itertools.islice(order, steps), 1):
        optimizer.zero_grad()
        model.loss(batch).mean().backward()
        optimizer.step()
        if step in checkpoints(steps):
            area, found = measure(model, unit, test)
            yield area
    yield found


@torch.no_grad()
def measure(model: Ranker, unit: Twin, test: Planted) -> tuple[float, float]:
    """AUC, and the share of the deciding behaviours that the search finds."""
    logits, labels, chosen = [], [], []
    for batch in test.task.batches(BATCH):
        logits.append(model(batch)[..., 0].flatten())
        labels.append(batch.label[..., 0].flatten())
        chosen.append(unit.search(model.embed, batch.item, batch.past).flatten(0, 1))
    logit, positive = torch.cat(logits), torch.cat(labels) > 0
    area = (logit[positive][:, None] > logit[~positive]).float().mean()
    true = torch.from_numpy(test.positions)
    hit = (true[..., None] == torch.cat(chosen)[:, None]).any(-1)
    return float(area), float(hit[true[:, 0] >= 0].float().mean())


if __name__ == "__main__":
    main()
