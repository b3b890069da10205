"""kill −9 at any moment: is a bundle ever broken, an acknowledged change ever lost, an answer ever mixed?

    python benchmarks/faults.py [--kills 40] [--only KIND …] [--seed 0] [--bundle BUNDLE]

Five kinds of work, each killed so many times, at moments drawn from the seed between 0 and twice what one piece
of the work takes:

    publish    three bundles take turns in a home, older ones are pruned: CURRENT names a whole one, and none
               before the last that was acknowledged
    events     batches are appended to an LMDB state: whole batches only, every acknowledged one
    items      an item is added to the current bundle and that published: acknowledged ones stay, no ID moves
    changes    items are added, changed and removed while serving, and the file of that (changes.jsonl) is compacted
               on the way: it says all that was acknowledged, and to a follower the same as to who reads it anew
    swap       a reader takes up what a publisher publishes and prunes; one is killed, the other must go on, and
               is killed, too: each answer is that of the version which it names

A worker tells on a pipe what is done; the script looks at the files after its death. kill −9 does not empty the
page cache: what a loss of power would leave rests on the order of the flushes, which the tests of
`serving/publish.py` state. Exit status 1 where anything was broken, lost or mixed. Needs no data: without
--bundle it trains a small one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import polars as pl
import torch
from machine import machine_line

from tiglon.errors import BundleError, TiglonError
from tiglon.serving.bundle import Bundle
from tiglon.serving.changes import START, Changes
from tiglon.serving.messages import Event, ItemsRequest
from tiglon.serving.publish import current, prune, publish
from tiglon.serving.state import LmdbState

# Workers are copies of a process that has imported everything and done nothing else: they start at once.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tiglon.serving.engine", "tiglon.serving.publish", "tiglon.serving.changes"])
FIRST_NEW = 10**6  # an item id; the synthetic catalogue stays below
BATCH, USERS = 20, 5
SMALL = {
    "ids.codes": "8",
    "text.dim": "16",
    "model.width": "16",
    "model.heads": "1",
    "model.head_width": "16",
    "model.hidden": "32",
    "model.encoder_layers": "1",
    "model.decoder_layers": "1",
    "train.epochs": "1",
    "train.evaluations": "1",
    "beams": "10",
    "sasrec.train.epochs": "1",
}

Tell = Callable[[Any], None]
Answer = tuple[str, list[tuple[Any, float]]]


@dataclass
class Tally:
    kills: int = 0
    acknowledged: int = 0
    broken: int = 0
    lost: int = 0
    mixed: int = 0

    def __str__(self) -> str:
        return (
            f"{self.kills:4} kills {self.acknowledged:7,} acknowledged "
            f"{self.broken:3} broken {self.lost:3} lost {self.mixed:3} mixed"
        )


# -- workers: each goes on until it is killed --------------------------------------------------------------


def publisher(tell: Tell, home: Path, bundles: list[Path]) -> None:
    while True:
        for bundle in bundles:
            tell(publish(bundle, home).name)
            prune(home, keep=2)


def appender(tell: Tell, folder: Path, batch: int) -> None:
    state = LmdbState(folder, map_bytes=1 << 16)  # grows on the way
    while True:
        state.append([Event(user_id=i % USERS, item_id=i, timestamp=batch) for i in range(BATCH)])
        tell(batch)
        batch += 1


def updater(tell: Tell, home: Path, item: int) -> None:
    while True:
        publish(with_item(Bundle.load(current(home)), item), home)
        tell(item)
        prune(home, keep=2)
        item += 1


def changer(tell: Tell, folder: Path, n: int) -> None:
    changes = Changes(folder)
    while True:
        changes.compact()  # by now half of it may be undone
        with changes.alone():
            changes.append(change(n), changes.since(START).place)
        tell(n)
        n += 1


def change(n: int) -> ItemsRequest:
    """The n-th: a new title of one item, an item that stays, and at times one that goes."""
    rows = [{"item_id": 0, "title": f"{n} " * 200}]
    if n % 8 == 0:
        rows.append({"item_id": FIRST_NEW + n, "title": "new"})
    return ItemsRequest(add=rows, remove=[FIRST_NEW + n - 8] if n % 16 == 8 else [])


def effect(changes: Iterable[ItemsRequest]) -> tuple[dict[Any, Any], set[Any]]:
    """What a bundle is told by all of them: the row of each item, and which ones went."""
    rows: dict[Any, Any] = {}
    gone: set[Any] = set()
    for one in changes:
        rows |= {row["item_id"]: row for row in one.add}
        gone |= set(one.remove)
    return rows, gone


def reader(tell: Tell, home: Path) -> None:
    while True:
        place = current(home)
        try:
            tell(answer(Bundle.load(place)))
        except BundleError:
            if current(home) == place:  # or it was pruned before it was opened
                raise


def with_item(bundle: Bundle, item: int) -> Bundle:
    """One item more, with the words of an old one."""
    table = bundle.items.table
    row = table[item % 7].with_columns(pl.lit(item, table.schema["item_id"]).alias("item_id"))
    return bundle.add_items(row)


def answer(bundle: Bundle) -> Answer:
    """What must go together: a version, and what it recommends."""
    return bundle.version, [(r.item_id, r.score) for r in bundle.recommend([1], 10, exclude_seen=False)[0]]


# -- killing -----------------------------------------------------------------------------------------------


def _start(work: Callable[..., None], pipe: Connection, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    work(pipe.send, *arguments)


@contextmanager
def started(work: Callable[..., None], *arguments: Any) -> Iterator[tuple[Connection, Callable[[], None]]]:
    """A worker: the pipe on which it tells, and how to kill it."""
    ours, theirs = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_start, args=(work, theirs, arguments), daemon=True)
    process.start()
    theirs.close()

    def kill() -> None:
        process.kill()  # SIGKILL
        process.join()

    try:
        yield ours, kill
    finally:
        kill()
        ours.close()


def heard(pipe: Connection, seconds: float | None = None) -> list[Any]:
    """What is told in so many seconds; None: until the end of the worker."""
    end = None if seconds is None else time.monotonic() + seconds
    found = []
    while pipe.poll(None if end is None else max(0.0, end - time.monotonic())):
        try:
            found.append(pipe.recv())
        except EOFError:
            break
    return found


def killed(chance: random.Random, work: Callable[..., None], *arguments: Any) -> list[Any]:
    """What a worker told until it was killed. EOFError where it died before of itself."""
    with started(work, *arguments) as (pipe, kill):
        found = [pipe.recv()]
        begin = time.monotonic()
        found.append(pipe.recv())
        found += heard(pipe, chance.uniform(0, 2) * (time.monotonic() - begin))
        kill()
        return found + heard(pipe)


# -- what must hold, one kill after the other ----------------------------------------------------------------


def kill_publish(folder: Path, bundles: list[Path], chance: random.Random, tally: Tally) -> Iterator[None]:
    right = dict(answer(Bundle.load(bundle)) for bundle in bundles)
    turn = list(right)
    while True:
        told = killed(chance, publisher, folder / "home", bundles)
        tally.acknowledged += len(told)
        version, items = answer(Bundle.load(current(folder / "home")))
        tally.lost += version not in (told[-1], turn[(turn.index(told[-1]) + 1) % len(turn)])
        tally.mixed += items != right[version]
        yield


def kill_events(folder: Path, bundles: list[Path], chance: random.Random, tally: Tally) -> Iterator[None]:
    acknowledged: set[int] = set()
    following = 0
    while True:
        acknowledged |= set(killed(chance, appender, folder / "state", following))
        tally.acknowledged = len(acknowledged) * BATCH
        state = LmdbState(folder / "state")
        lives = [state.life(user) for user in range(USERS)]
        state.close()
        times = [life.times if life else [] for life in lives]
        stored = {time for life in times for time in life}
        per_user = BATCH // USERS
        tally.mixed += any(life != [t for t in sorted(stored) for _ in range(per_user)] for life in times)
        tally.lost += len(acknowledged - stored)
        following = max(stored) + 1
        yield


def kill_items(folder: Path, bundles: list[Path], chance: random.Random, tally: Tally) -> Iterator[None]:
    home = folder / "home"
    publish(bundles[0], home)
    acknowledged: set[int] = set()
    codes: dict[Any, list[int]] = {}
    following = FIRST_NEW
    while True:
        acknowledged |= set(killed(chance, updater, home, following))
        tally.acknowledged = len(acknowledged)
        bundle = Bundle.load(current(home))
        found = dict(
            zip(bundle.items.vocabulary.raw.to_pylist(), bundle.tiger.ids.codes.tolist(), strict=True)
        )
        tally.lost += len(acknowledged - set(found))
        tally.mixed += any(found.get(item) != code for item, code in codes.items())
        codes, following = found, max(max(found) + 1, FIRST_NEW)
        yield


def kill_changes(folder: Path, bundles: list[Path], chance: random.Random, tally: Tally) -> Iterator[None]:
    acknowledged: set[int] = set()
    followed: list[ItemsRequest] = []
    place, following = START, 0
    while True:
        acknowledged |= set(killed(chance, changer, folder / "changes", following))
        tally.acknowledged = len(acknowledged)
        changes = Changes(folder / "changes")
        news, place, anew = changes.since(place)
        followed = news if anew else followed + news
        found = effect(changes.since(START).changes)
        newest = int(found[0].get(0, {"title": "-1"})["title"].split()[0])
        tally.lost += newest < max(acknowledged)
        tally.mixed += not found == effect(followed) == effect(map(change, range(newest + 1)))
        following = newest + 1
        yield


def kill_swap(folder: Path, bundles: list[Path], chance: random.Random, tally: Tally) -> Iterator[None]:
    home = folder / "home"
    right = dict(answer(Bundle.load(bundle)) for bundle in bundles)
    publish(bundles[0], home)
    while True:
        for first in ("publisher", "reader"):
            with (
                started(publisher, home, bundles) as (versions, kill_publisher),
                started(reader, home) as (answers, kill_reader),
            ):
                told = [answers.recv()]
                versions.recv()
                told += heard(answers, chance.uniform(0, 1))
                (kill_publisher if first == "publisher" else kill_reader)()
                survivor = answers if first == "publisher" else versions
                more = [survivor.recv(), *heard(survivor, chance.uniform(0, 0.5))]
                (kill_reader if first == "publisher" else kill_publisher)()
                told += (more if first == "publisher" else []) + heard(answers)
            tally.acknowledged += len(told)
            tally.mixed += sum(items != right[version] for version, items in told)
            version, items = answer(Bundle.load(current(home)))
            tally.mixed += items != right[version]
            yield
            yield  # two were killed


WORK = {
    "publish": kill_publish,
    "events": kill_events,
    "items": kill_items,
    "changes": kill_changes,
    "swap": kill_swap,
}


def measure(name: str, folder: Path, bundles: list[Path], kills: int, seed: int) -> Tally:
    tally, chance = Tally(), random.Random(f"{name} {seed}")
    rounds = WORK[name](folder, bundles, chance, tally)
    while tally.kills < kills:
        try:
            next(rounds)
        except (TiglonError, EOFError) as error:  # what was left cannot be read, or a worker died of itself
            print(f"{name}: {error!r}", file=sys.stderr)
            tally.broken += 1
            return tally
        tally.kills += 1
    return tally


def small_bundle(folder: Path) -> Path:
    from tiglon.data.synthetic import synthetic
    from tiglon.recipes import train

    source = synthetic(60, 40, 10, seed=3, clusters=5).source()
    train(source.interactions, source.items, folder / "small", changes=SMALL)
    return folder / "small"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=40, help="of each of the five kinds of work")
    parser.add_argument("--only", choices=WORK, nargs="+", default=list(WORK), metavar="KIND")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundle", type=Path, help="whole-number item ids below a million")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine_line())
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundles = [arguments.bundle or small_bundle(folder)]
        for item in (1, 2):
            bundles.append(folder / f"and_{item}")
            with_item(Bundle.load(bundles[-2]), FIRST_NEW - item).save(bundles[-1])
        for work in arguments.only:
            begin = time.monotonic()
            tally = measure(work, folder / work, bundles, arguments.kills, arguments.seed)
            print(f"{work:8} {tally}  {time.monotonic() - begin:5.0f} s", flush=True)
            bad += tally.broken + tally.lost + tally.mixed
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
