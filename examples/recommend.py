"""One request, one answer: rules, reasons, a new event, a new item; the same messages as over HTTP.

python examples/recommend.py [FOLDER]
"""

import sys
from pathlib import Path

from tiglon.data.synthetic import synthetic
from tiglon.recipes import train
from tiglon.serving.engine import Engine
from tiglon.serving.messages import Event, EventsRequest, ItemsRequest, RecommendRequest
from tiglon.serving.state import LmdbState


def main(folder: Path, changes: dict[str, str] | None = None) -> None:
    world = synthetic(users=200, items=100, events_per_user=10).source()
    bundle = train(world.interactions, world.items, folder / "recommend", changes=changes)
    engine = Engine(bundle, LmdbState(folder / "state"))

    print("for user 7, at most two of a category, without item 3, with reasons")
    answer = engine.recommend(
        RecommendRequest(user_id=7, k=3, deny=[3], at_most={"category": 2}, explain=True)
    )
    for item in answer.items:
        found = ", ".join(f"{s.name} (place {s.rank})" for s in item.reasons.sources)
        print(f"  {item.item_id:>4}  {item.score:6.2f}  {found}")

    print("user 7 takes the first; the next answer knows")
    taken = Event(user_id=7, item_id=answer.items[0].item_id, timestamp=1_700_000_000, event_id="order 1")
    print(f"  {engine.events(EventsRequest(events=[taken])).accepted} event stored")
    print(f"  {[item.item_id for item in engine.recommend(RecommendRequest(user_id=7, k=5)).items]}")

    print("a new item that reads like the best one")
    title = bundle.items.table["title"][int(bundle.items.vocabulary.encode([answer.items[0].item_id])[0])]
    engine.items(ItemsRequest(add=[{"item_id": 1000, "title": title}]))
    print(f"  {[item.item_id for item in engine.recommend(RecommendRequest(history=[12, 3], k=5)).items]}")

    print("somebody who was never seen")
    stranger = engine.recommend(RecommendRequest(user_id="nobody", k=3))
    print(f"  {[item.item_id for item in stranger.items]}  {stranger.degraded}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
