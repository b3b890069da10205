"""Cold start: an item that arrived after training is recommended at once, and no ID changes.

python examples/cold_start.py [FOLDER]
"""

import sys
from pathlib import Path

import polars as pl

from tiglon.data.synthetic import synthetic
from tiglon.recipes import train


def main(folder: Path, changes: dict[str, str] | None = None) -> None:
    world = synthetic(users=200, items=100, events_per_user=10).source()
    bundle = train(world.interactions, world.items, folder / "cold-start", changes=changes)

    # It reads like what user 7 would get anyway.
    favourite = bundle.recommend([7], k=1)[0][0].item_id
    title = world.items.filter(pl.col("item_id") == favourite)["title"][0]
    new = pl.DataFrame({"item_id": [1000], "title": [title]})

    later = bundle.add_items(new)  # IDs by the frozen tokenizer; the network is left as it is
    print("old IDs stay:", (later.tiger.ids.codes[:100] == bundle.tiger.ids.codes).all())
    print("the new one's:", later.tiger.ids.codes[100].tolist())

    # Decoded over the updated trie like every other item ...
    everything = [item.item_id for item in later.recommend([7], k=101, exclude_seen=False)[0]]
    print("its rank for user 7:", everything.index(1000) + 1)
    # ... and right behind the item that it is most like: new items may take a tenth of a list.
    print("ten:", [item.item_id for item in later.recommend([7], k=10)[0]])

    later.save(folder / "cold-start")  # a new version in the same place
    print(f"version {bundle.version} became {later.load(folder / 'cold-start').version}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
