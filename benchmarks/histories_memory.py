"""Peak memory and speed of `build_from_parquet` on a log that is made for it.

    python benchmarks/histories_memory.py --events 20000000

One process writes a synthetic log to a temporary folder, in slices of time, so that every file holds events of
every user; another builds the histories and reports its own peak (ru_maxrss, mapped pages included).
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq

SLICES = 8
EVENTS_PER_USER = 100


def write_log(folder: Path, events: int, items: int) -> None:
    """SLICES Parquet files, each later than the one before, rows shuffled within a block of users."""
    from tiglon.data.synthetic import synthetic

    world = synthetic(events // EVENTS_PER_USER, items, EVENTS_PER_USER, seed=0, clusters=50)
    rng = np.random.default_rng(0)
    writers: dict[int, pq.ParquetWriter] = {}
    with ExitStack() as stack:
        for block in world.blocks():
            block = block.with_columns(price=rng.random(block.height, dtype=np.float32))
            table = block[rng.permutation(block.height)].to_arrow()
            age = table["timestamp"].to_numpy() - 1_600_000_000
            part = np.minimum(age * SLICES // (400 * 24 * 3600), SLICES - 1)
            for number in range(SLICES):
                if number not in writers:
                    path = folder / f"{number}.parquet"
                    writers[number] = stack.enter_context(pq.ParquetWriter(path, table.schema))
                writers[number].write_table(table.filter(part == number))


def build(folder: Path) -> None:
    """Build, read a sample back, and print the figures of this process."""
    from tiglon.data.histories import build_from_parquet

    paths = sorted(folder.glob("*.parquet"))
    rows = sum(pq.ParquetFile(path).metadata.num_rows for path in paths)
    imported = peak_gib()
    begin = time.perf_counter()
    store = build_from_parquet(paths, folder / "store", features=["price"])
    seconds = time.perf_counter() - begin
    peak = peak_gib()
    print(f"events            {rows:,} of {len(store):,} users and {len(store.items):,} items")
    print(f"build             {seconds:.1f} s, {rows / seconds:,.0f} events/s")
    print(f"peak memory       {peak:.2f} GiB ({imported:.2f} GiB after the imports)")
    users = np.random.default_rng(1).integers(len(store), size=2000)
    store.before(users[:1], time=1_610_000_000, last=100)  # compiles
    reads = []
    for user in users:
        begin = time.perf_counter()
        store.before(np.array([user]), time=1_610_000_000, last=100)
        reads.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    store.before(users, time=1_610_000_000, last=100)
    whole = time.perf_counter() - begin
    print(
        f"read, one user    {np.median(reads) * 1e6:.0f} µs (median); {len(users):,} users at once {whole * 1e3:.1f} ms"
    )
    check(store, paths, users[:50])


def check(store, paths: list[Path], users: np.ndarray) -> None:  # type: ignore[no-untyped-def]
    """The lives of a few users against a plain filter of the log."""
    raw = store.users.decode(users)
    log = pl.scan_parquet(paths).filter(pl.col("user_id").is_in(raw)).collect()
    for user, life in zip(raw, store.before(users), strict=True):
        rows = log.filter(pl.col("user_id") == user).sort("timestamp")
        assert store.items.decode(life) == rows["item_id"].to_list()
    print(f"checked           {len(users)} users against the log")


def peak_gib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=20_000_000)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--folder", help="where the temporary files go")
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        for step, extra in ((write_log, (arguments.events, arguments.items)), (build, ())):
            process = spawn.Process(target=step, args=(Path(name), *extra))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
