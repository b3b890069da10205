"""Your own tables: look at them, train, save nothing but the bundle, load it elsewhere.

    python examples/own_tables.py [FOLDER]

polars, pandas and Arrow tables and paths to .parquet, .csv and .jsonl files are all taken.
"""

import sys
from pathlib import Path

import polars as pl

from tiglon.data.inspect import inspect, is_valid
from tiglon.recipes import train
from tiglon.serving.bundle import Bundle

BOOKS = {"Emma": "Austen", "Persuasion": "Austen", "Dracula": "Stoker", "Carmilla": "Le Fanu"}


def main(folder: Path, changes: dict[str, str] | None = None) -> None:
    items = pl.DataFrame({"item_id": list(BOOKS), "title": list(BOOKS), "author": list(BOOKS.values())})
    lives = [["Emma", "Persuasion", "Dracula"], ["Dracula", "Carmilla", "Emma"]] * 10
    log = pl.DataFrame(
        {
            "user_id": [f"reader {u}" for u, life in enumerate(lives) for _ in life],
            "item_id": [book for life in lives for book in life],
            "timestamp": [f"2024-05-0{day} 12:00:00" for life in lives for day in range(1, len(life) + 1)],
        }
    )
    verdicts = inspect(log, items)
    for verdict in verdicts:
        print(verdict)
    if not is_valid(verdicts):
        sys.exit(1)

    train(log, items, folder / "books", changes=changes)

    bundle = Bundle.load(folder / "books")  # later, in another process
    for item in bundle.recommend(["reader 0"], k=3)[0]:
        print(item.item_id, round(item.score, 2), item.source)
    print("somebody new:", [item.item_id for item in bundle.recommend(["nobody"], k=3)[0]])


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
