"""Residual k-means, RQ-VAE, LSH and random IDs under one small budget: which IDs teach the most?

    python benchmarks/id_tokenizers.py DATA/amazon2014-beauty --minutes 10 [--seed 0] [--json FILE]

The same vectors, network, seed and minutes of training for each; the test is read once for each. The network
sees codes alone: with content in its vectors it would hardly need IDs to mean something.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiger import TOKENIZERS, arguments, changes_of, run


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--out", type=Path, metavar="DIR", help="one folder a tokenizer, for checkpoints")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.set_defaults(minutes=10.0)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    report = {
        name: run(
            given.folder,
            given.recipe,
            {"model.content": "false"} | changes_of(given) | {"ids.tokenizer": name},
            given.out and given.out / name,
            users=given.users,
            test=not given.no_test,
            baselines=False,
        )
        for name in TOKENIZERS
    }
    part = "validation" if given.no_test else "test"
    print(f"\n{given.folder.name}, {part}, {given.minutes:g} minutes of training each, recall@10 / ndcg@10")
    print(f"{'IDs':<18} {'unmasked':>15} {'seen masked':>15}")
    for name, result in report.items():
        cells = [f"{row['recall@10']:.4f} / {row['ndcg@10']:.4f}" for row in result[part]["rows"]]
        print(f"{name:<18} {cells[0]:>15} {cells[1]:>15}")
    if given.json:
        given.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
