"""Quickstart: a world with known answers, a bundle trained on it, recommendations for a user and a history.

python examples/quickstart.py [FOLDER]
"""

import sys
from pathlib import Path

from tiglon.data.synthetic import synthetic
from tiglon.recipes import train


def main(folder: Path, changes: dict[str, str] | None = None) -> None:
    world = synthetic(users=200, items=100, events_per_user=10).source()
    bundle = train(world.interactions, world.items, folder / "quickstart", changes=changes)

    print("test ndcg@10")
    for row in bundle.metrics["rows"]:
        print(f"  {row['name']:<22}{row['ndcg@10']:.4f}")

    print("for user 7")
    for item in bundle.recommend([7], k=5)[0]:
        print(f"  {item.item_id:>4}  {item.score:6.2f}  {item.source}")

    print("for somebody who looked at items 12, 3 and 44")
    for item in bundle.recommend(history=[[12, 3, 44]], k=5)[0]:
        print(f"  {item.item_id:>4}  {item.score:6.2f}  {item.source}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
