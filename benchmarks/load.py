"""How a server holds a constant rate: requests/s, and milliseconds from when a request was due.

    python benchmarks/load.py BUNDLE [--rates 10 50 100 200] [--seconds 20] [--workers 2] [--json FILE]

Open-loop: requests leave on a clock, whether the ones before were answered or not, and a latency counts from
the moment at which the clock said so. A server that falls behind therefore shows it, where a client that waits
for its answers would wait along. What it refuses (503) has no latency and is counted.

    quick     a budget of one millisecond, which leaves the neighbours and the fusion
    funnel    no budget: the networks and, where the bundle has one, the ranker answer too
    again     the same for fifty lives in turn: what the networks found for them is remembered

`quick` and `funnel` ask with lives of the log that end at random places, no two alike, so that nothing is
remembered. Client and server share the machine. Below the table: where the time goes, by the engine's own clock;
a call answers all requests that waited together. With the defaults it takes about five minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from machine import machine, machine_line

from tiglon.serving.bundle import Bundle

REQUESTS = {"quick": {"k": 10, "budget_ms": 1}, "funnel": {"k": 10}, "again": {"k": 10}}
LONGEST = 1_000  # items of a life that is sent
CONNECTIONS = 256  # that may be open at once; beyond them a request waits, and its clock runs


@dataclass
class Run:
    """latency: (n,) seconds from when a request was due. held: answers a second until the last one came."""

    latency: np.ndarray
    held: float
    refused: int

    def row(self) -> dict[str, float]:
        p50, p99 = np.percentile(self.latency, (50, 99)) * 1e3 if len(self.latency) else (np.nan, np.nan)
        return {"held": self.held, "p50_ms": float(p50), "p99_ms": float(p99), "refused": self.refused}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rates", type=float, nargs="+", default=[10, 50, 100, 200])
    parser.add_argument("--seconds", type=float, default=20, help="of each rate")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    print(machine_line())
    random = np.random.default_rng(0)
    bundle = Bundle.load(options.bundle)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        port, server = started(options.bundle, Path(folder), options.workers, options.threads)
        try:
            users = len(bundle.histories)
            print(f"{options.workers} workers, {options.threads} threads each, {users:,} users")
            print(f"{'':<10} {'asked/s':>8} {'held/s':>8} {'p50 ms':>8} {'p99 ms':>8} {'refused':>8}")
            for name, request in REQUESTS.items():
                kept = lives(bundle, 50, random) if name == "again" else None
                for rate, seconds in [(10, 5.0), *((rate, options.seconds) for rate in options.rates)]:
                    chosen = lives(bundle, round(rate * seconds), random) if kept is None else kept
                    bodies = [
                        json.dumps({**request, "history": chosen[n % len(chosen)]}).encode()
                        for n in range(round(rate * seconds))
                    ]
                    found = asyncio.run(asked(port, bodies, rate)).row()
                    if seconds != options.seconds:
                        continue  # so that nothing is cold
                    rows.append({"what": name, "rate": rate, **found})
                    print(
                        f"{name:<10} {rate:>8.0f} {found['held']:>8.1f} {found['p50_ms']:>8.1f} "
                        f"{found['p99_ms']:>8.1f} {found['refused']:>8}",
                        flush=True,
                    )
            stages = stage_times(port)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    print("\nstage                     mean ms      calls")
    for stage, (mean, count) in stages.items():
        print(f"{stage:<24} {mean * 1e3:>8.2f} {count:>10,.0f}")
    if options.json:
        report = {"machine": machine(), "rows": rows, "stages": stages}
        options.json.write_text(json.dumps(report, indent=1))


def lives(bundle: Bundle, count: int, random: np.random.Generator) -> list[list[object]]:
    """Raw item ids of lives that end at a random place."""
    store = bundle.histories
    begin = store.offsets[random.integers(0, len(store), count)]
    end = store.offsets[np.searchsorted(store.offsets, begin, side="right")]
    end = random.integers(begin + 1, end + 1)
    return [store.items.decode(store.item[max(a, z - LONGEST) : z]) for a, z in zip(begin, end, strict=True)]


async def asked(port: int, bodies: list[bytes], rate: float) -> Run:
    """Send the bodies, `rate` of them a second."""
    idle: asyncio.LifoQueue[Connection] = asyncio.LifoQueue()
    for _ in range(CONNECTIONS):
        idle.put_nowait(Connection(port))
    latency, refused, start = [], 0, time.perf_counter() + 0.1

    async def one(due: float, body: bytes) -> None:
        nonlocal refused
        connection = await idle.get()
        status = await connection.post("/v1/recommend", body)
        idle.put_nowait(connection)
        if status == 200:
            latency.append(time.perf_counter() - due)
        else:
            refused += 1

    tasks = []
    for number, body in enumerate(bodies):
        due = start + number / rate
        if (ahead := due - time.perf_counter()) > 0:
            await asyncio.sleep(ahead)
        tasks.append(asyncio.create_task(one(due, body)))
    await asyncio.gather(*tasks)
    took = time.perf_counter() - start
    while not idle.empty():
        await idle.get_nowait().close()
    return Run(np.array(latency), len(latency) / took, refused)


class Connection:
    """One keep-alive connection: the least of HTTP that a server on this machine needs."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: bytes) -> int:
        """The status; the body is read and dropped."""
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        for again in (True, False):  # a server may close what was idle
            if self.streams is None:
                self.streams = await asyncio.open_connection("127.0.0.1", self.port)
            reader, writer = self.streams
            try:
                writer.write(head.encode() + body)
                answer = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", answer, re.IGNORECASE)
                await reader.readexactly(int(length[1]) if length else 0)
                return int(answer[9:12])
            except (OSError, asyncio.IncompleteReadError):
                await self.close()
                if not again:
                    raise
        raise AssertionError

    async def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
            with suppress(OSError):
                await self.streams[1].wait_closed()
            self.streams = None


def started(bundle: Path, folder: Path, workers: int, threads: int) -> tuple[int, subprocess.Popen[bytes]]:
    """A server of one bundle, once every worker of it is ready."""
    log = folder / "log"
    command = [
        *(sys.executable, "-m", "tiglon.cli", "serve", str(bundle), "--port", "0"),
        *("--workers", str(workers), "--threads", str(threads)),
        *("--state", str(folder / "state")),
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stderr=out)
    while log.read_text().count('"message": "ready"') < workers:
        if process.poll() is not None:
            sys.exit(log.read_text())
        time.sleep(0.1)
    port = re.search(r"running on http://[\d.]+:(\d+)", log.read_text())
    assert port
    return int(port[1]), process


def stage_times(port: int) -> dict[str, tuple[float, float]]:
    """Stage → (mean seconds, how often), of everything that was asked."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        page = answer.read().decode()
    found = {}
    for kind in ("sum", "count"):
        for stage, value in re.findall(
            rf'^tiglon_stage_seconds_{kind}{{stage="(.*?)"}} (\S+)', page, re.MULTILINE
        ):
            found[stage, kind] = float(value)
    stages = dict.fromkeys(stage for stage, _ in found)
    return {s: (found[s, "sum"] / max(found[s, "count"], 1), found[s, "count"]) for s in stages}


if __name__ == "__main__":
    main()
