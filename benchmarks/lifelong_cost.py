"""What a request costs at length: every interest unit, 1 to 100 candidates, lives of 10^3 to 10^6 behaviours.

    python benchmarks/lifelong_cost.py [--lengths 1000 10000 100000 1000000] [--candidates 1 32 100]
           [--threads 1 2] [--items 1000000] [--units twin …] [--json FILE]

Random weights, a random life, one request at a time, everything a server would keep already there: TWIN's,
SIM's and ETA's tables of all items, SDIM's table of the user, TWIN V2's clusters. A row "search" is the first
stage alone. Median of several calls, in turns over the units, in one process; memory is what the process
grew by at most during a call. A cell is left out where candidates × behaviours exceed what its unit can
be asked (`most`); "–" says so.

"share": of the machine's limits, which are measured first (copying, float32 products of matrices, the same
threads), the one that binds: the time in which the machine could move the bytes or do the products that the
method needs at least, over the time that was taken. "hit" is the share of the float32 search's positions that
a search in smaller numbers finds.

TWIN V2 is given a tenth of the length as clusters of ten, which is what clustering leaves of a life.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from machine import machine, machine_line
from torch import Tensor, nn

from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.dare import Dare
from tiglon.ranking.din import DIN
from tiglon.ranking.eta import Eta
from tiglon.ranking.pooling import FullAttention, MeanPooling, MostRecent
from tiglon.ranking.sdim import Sdim
from tiglon.ranking.sim import SimHard, SimSoft
from tiglon.ranking.twin import Twin
from tiglon.ranking.twin_v2 import TwinV2
from tiglon.types import Behaviours

WIDTHS, CROSSES = (64, 8, 8), (16, 16, 16)  # item id, author, topic; when, how long, where
H, J, A, D = sum(WIDTHS), len(CROSSES), 4, 16
CLUSTER = 10  # behaviours a cluster of TWIN V2's

Call = Callable[[Tensor, Behaviours], Any]


class Contender(NamedTuple):
    """prepare: the unit, the life → what is called for a request; what it makes is not timed.
    flops, bytes_: that a request needs at least, of (L, K).   most: candidates × behaviours."""

    make: Callable[[FeatureEmbedding], nn.Module]
    prepare: Callable[[Any, FeatureEmbedding, Behaviours], Call]
    flops: Callable[[int, int], float] | None = None
    bytes_: Callable[[int, int], float] | None = None
    most: float = 2e8
    exact: str | None = None  # the row whose positions this one should find


def whole(unit: Any, embed: FeatureEmbedding, past: Behaviours) -> Call:
    """The unit as it answers, with its tables fresh."""
    if hasattr(unit, "refresh"):
        unit.refresh(embed)
    return lambda item, past: unit(embed, item, past).vector


def only_search(storage: str | None = None) -> Callable[[Any, FeatureEmbedding, Behaviours], Call]:
    def prepare(unit: Any, embed: FeatureEmbedding, past: Behaviours) -> Call:
        if hasattr(unit, "refresh"):
            unit.refresh(embed, *([storage] if storage else []))
        return lambda item, past: unit.search(embed, item, past)

    return prepare


def from_table(unit: Any, embed: FeatureEmbedding, past: Behaviours) -> Call:
    table = unit.table(embed, past)
    return lambda item, past: unit.read(embed, item, table)


def from_index(unit: Any, embed: FeatureEmbedding, past: Behaviours) -> Call:
    index = unit.index(embed, past)

    def call(item: Tensor, past: Behaviours) -> Tensor:
        chosen = index.search(embed.item_codes[item, unit.category], unit.k)
        return unit.esu(embed, item, past, chosen).vector

    return call


def clustered(call: Callable[[Any, FeatureEmbedding, Behaviours], Call]) -> Any:
    def prepare(unit: Any, embed: FeatureEmbedding, past: Behaviours) -> Call:
        past = clusters(past)
        inner = call(unit, embed, past)
        return lambda item, _: inner(item, past)

    return prepare


def clusters(past: Behaviours) -> Behaviours:
    """Every tenth behaviour, standing for ten."""
    few = Behaviours(*(None if part is None else part[:, ::CLUSTER].contiguous() for part in past))  # type: ignore[arg-type]
    return few._replace(size=torch.full(few.mask.shape, float(CLUSTER)))


def search_bytes(number: int) -> Callable[[int, int], float]:
    """A key, an item and the cross codes of every behaviour, once."""
    return lambda L, K: L * (A * D * number + 8 + 8 * J + 1)


def search_flops(L: int, K: int) -> float:
    return 2.0 * K * A * D * L


def full_flops(L: int, K: int) -> float:
    """Keys and values of every behaviour, products and sums for every candidate."""
    return 2.0 * L * A * D * (2 * H + J * 8) + 2 * search_flops(L, K)


CONTENDERS = {
    "full attention": Contender(FullAttention, whole, full_flops, most=2e7),
    "DIN": Contender(DIN, whole, most=1e6),
    "mean pooling": Contender(MeanPooling, whole),
    "most recent 100": Contender(MostRecent, whole),
    "SIM hard": Contender(lambda embed: SimHard(embed, category=2), whole),
    "SIM hard, index": Contender(lambda embed: SimHard(embed, category=2), from_index),
    "SIM soft": Contender(SimSoft, whole),
    "ETA": Contender(Eta, whole),
    "SDIM": Contender(Sdim, whole, most=1e8),
    "SDIM, table": Contender(Sdim, from_table),
    "DARE": Contender(Dare, whole),
    "TWIN": Contender(Twin, whole),
    "TWIN search": Contender(Twin, only_search("float32"), search_flops, search_bytes(4)),
    "TWIN search, bf16": Contender(
        Twin, only_search("bfloat16"), search_flops, search_bytes(2), exact="TWIN search"
    ),
    "TWIN search, int8": Contender(
        Twin, only_search("int8"), search_flops, search_bytes(1), exact="TWIN search"
    ),
    "TWIN V2": Contender(TwinV2, clustered(whole)),
    "TWIN V2 search": Contender(
        TwinV2,
        clustered(only_search()),
        lambda L, K: search_flops(L // CLUSTER, K),
        lambda L, K: search_bytes(4)(L // CLUSTER, K),
    ),
}


class Row(NamedTuple):
    unit: str
    threads: int
    length: int
    candidates: int
    ms: float
    mib: float
    share: float | None
    hit: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6])
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 32, 100])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--units", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--seconds", type=float, default=1.0, help="a cell, at most, after three calls")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows: list[Row] = []
    embed = catalogue(given.items)
    for threads in given.threads:
        torch.set_num_threads(threads)
        copy, multiply = limits()
        print(
            f"\n{machine_line()}\ncopying {copy / 1e9:.0f} GB/s, products {multiply / 1e9:.0f} GFLOP/s in float32"
        )
        for length in given.lengths:
            for K in given.candidates:
                cells = measure(embed, given.units, length, K, given.seconds)
                print(
                    f"\n{threads} thread{'s' * (threads > 1)}, L = {length:,}, {K} candidate{'s' * (K > 1)}"
                )
                print(f"  {'':<20} {'ms':>9} {'MiB':>7} {'share':>6} {'hit':>6}")
                for name in given.units:
                    if name not in cells:
                        print(f"  {name:<20} {'–':>9}")
                        continue
                    seconds, mib, hit = cells[name]
                    share = share_of(CONTENDERS[name], length, K, seconds, copy, multiply)
                    rows.append(Row(name, threads, length, K, 1e3 * seconds, mib, share, hit))
                    shown = "" if share is None else f"{share:.0%}"
                    print(
                        f"  {name:<20} {1e3 * seconds:>9.2f} {mib:>7.0f} {shown:>6} "
                        f"{'' if hit is None else format(hit, '.4f'):>6}",
                        flush=True,
                    )
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "rows": [row._asdict() for row in rows]}))


def catalogue(items: int) -> FeatureEmbedding:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    codes = np.stack(
        [np.arange(1, items + 1), rng.integers(1, 50_000, items), rng.integers(1, 100, items)], axis=1
    )
    return FeatureEmbedding(
        np.concatenate([codes, [[0, 0, 0]]]), (items + 1, 50_000, 100), WIDTHS, CROSSES
    ).eval()


@torch.inference_mode()
def measure(
    embed: FeatureEmbedding, names: list[str], L: int, K: int, seconds: float
) -> dict[str, tuple[float, float, float | None]]:
    """name → seconds a request, MiB it grew by, hit."""
    generator = torch.Generator().manual_seed(L)
    items = len(embed.item_codes) - 1
    past = Behaviours(
        (items * torch.rand(1, L, generator=generator) ** 2).long(),
        torch.stack([torch.randint(0, size, (1, L), generator=generator) for size in CROSSES], -1),
        torch.ones(1, L),
        torch.ones(1, L, dtype=torch.bool),
    )
    item = torch.randint(0, items, (1, K), generator=generator)
    calls: dict[str, Call] = {}
    for name in names:
        contender = CONTENDERS[name]
        if contender.most >= L * K:
            torch.manual_seed(1)
            calls[name] = contender.prepare(contender.make(embed).eval(), embed, past)
    found, grown, taken = {}, {}, {name: [] for name in calls}  # type: ignore[var-annotated]
    for name, call in calls.items():
        call(item, past)  # compiles, warms
        grown[name] = grown_by(lambda call=call: call(item, past))  # type: ignore[misc]
        found[name] = call(item, past)
    waiting = list(calls)
    while waiting:  # in turns
        for name in list(waiting):
            begin = time.perf_counter()
            calls[name](item, past)
            taken[name].append(time.perf_counter() - begin)
            if (len(taken[name]) >= 3 and sum(taken[name]) > seconds) or len(taken[name]) >= 200:
                waiting.remove(name)
    return {
        name: (statistics.median(taken[name]), grown[name], hit_of(name, found))  # type: ignore[misc]
        for name in calls
    }


def hit_of(name: str, found: dict[str, Tensor]) -> float | None:
    exact = CONTENDERS[name].exact
    if exact is None or exact not in found:
        return None
    return float((found[exact][..., None] == found[name][..., None, :]).any(-1).float().mean())


def share_of(
    contender: Contender, L: int, K: int, seconds: float, copy: float, multiply: float
) -> float | None:
    if contender.flops is None:
        return None
    least = contender.flops(L, K) / multiply
    if contender.bytes_ is not None:
        least = max(least, contender.bytes_(L, K) / copy)
    return least / seconds


def limits() -> tuple[float, float]:
    """Bytes a second read and written by a copy, float32 operations a second of a product of matrices."""
    source, target = torch.ones(1 << 26), torch.empty(1 << 26)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    copy = best(lambda: target.copy_(source))
    product = best(lambda: a @ b)
    return 2 * source.nbytes / copy, 2 * 2048**3 / product


def best(work: Callable[[], object], times: int = 5) -> float:
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return min(taken)


def grown_by(work: Callable[[], object]) -> float:
    """MiB that the process holds at most during `work`, above what it held before; Linux alone, else NaN."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else what was freed before would be taken anew without growing
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except (OSError, AttributeError):
        return float("nan")
    before = resident("VmRSS")
    work()
    return (resident("VmHWM") - before) / 1024


def resident(name: str) -> int:
    """KiB, of /proc/self/status."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(name))


if __name__ == "__main__":
    main()
