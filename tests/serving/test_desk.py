"""The desk of a worker: who waits, who shares work, and that each gets an answer of its own."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest

from tiglon.serving.desk import Desk, Overloaded, Settings
from tiglon.serving.gate import Asking
from tiglon.serving.messages import RecommendRequest, RecommendResponse
from tiglon.serving.metrics import Metrics


class Shown:
    """An engine that shows what it is asked, and answers while `open` is set."""

    def __init__(self):
        self.asked, self.open, self.failing = [], threading.Event(), set()

    def shares(self, request):
        return request.budget_ms is None

    def recommend(self, request):
        return self.recommend_many([request])[0]

    def recommend_many(self, requests):
        self.asked.append([request.user_id for request in requests])
        assert self.open.wait(60)
        if self.failing & {request.user_id for request in requests}:
            raise ValueError("one that fails")
        return [
            RecommendResponse(request_id=r.request_id, bundle="b", user_id=r.user_id, items=[], degraded=[])
            for r in requests
        ]


def desk_of(engine, **settings):
    return Desk(SimpleNamespace(engine=engine), Metrics(), Settings(**settings))


async def ask(desk, user, budget_ms=None):
    response = await desk.recommend(
        Asking(f"r{user}", time.monotonic()), RecommendRequest(user_id=user, budget_ms=budget_ms)
    )
    return RecommendResponse.model_validate_json(response.body).user_id


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


async def waiting(desk, engine, users, budget_ms=None):
    """One request that holds the only thread, and others that wait behind it."""
    held = asyncio.create_task(ask(desk, 0))
    await until(lambda: engine.asked)
    tasks = [asyncio.create_task(ask(desk, user, budget_ms)) for user in users]
    await asyncio.sleep(0)
    return held, tasks


def test_who_has_time_for_a_network_waits_for_no_company():
    async def main():
        engine = Shown()
        desk = desk_of(engine, threads=1)
        held, tasks = await waiting(desk, engine, range(1, 6), budget_ms=60_000)
        engine.open.set()
        assert await asyncio.gather(held, *tasks) == list(range(6))
        assert engine.asked == [[user] for user in range(6)]
        desk.close()

    asyncio.run(main())


def test_who_shares_work_is_answered_together_but_for_one_that_fails():
    async def main():
        engine = Shown()
        engine.failing = {3}
        desk = desk_of(engine, threads=1)
        held, tasks = await waiting(desk, engine, range(1, 6))
        engine.open.set()
        found = await asyncio.gather(held, *tasks, return_exceptions=True)
        assert [repr(f) if isinstance(f, Exception) else f for f in found] == [
            0, 1, 2, "ValueError('one that fails')", 4, 5,
        ]  # fmt: skip
        assert engine.asked == [[0], [1, 2, 3, 4, 5], [1], [2], [3], [4], [5]]
        desk.close()

    asyncio.run(main())


@pytest.mark.parametrize("budget_ms", [None, 60_000])
def test_who_goes_away_keeps_nobody_waiting(budget_ms):
    async def main():
        engine = Shown()
        desk = desk_of(engine, threads=1)
        held, tasks = await waiting(desk, engine, range(1, 6), budget_ms)
        tasks[1].cancel()
        await asyncio.sleep(0)
        engine.open.set()
        found = await asyncio.gather(held, *tasks, return_exceptions=True)
        assert [f for f in found if not isinstance(f, BaseException)] == [0, 1, 3, 4, 5]
        assert all(2 not in users for users in engine.asked)
        assert await ask(desk, 9) == 9
        desk.close()

    asyncio.run(main())


def test_who_is_refused_leaves_nothing_behind():
    async def main():
        engine = Shown()
        desk = desk_of(engine, threads=1, waiting=2)
        held, tasks = await waiting(desk, engine, (1, 2))
        for _ in range(100):
            with pytest.raises(Overloaded, match="a worker with 3 requests inside"):
                await ask(desk, 7)
        engine.open.set()
        assert await asyncio.gather(held, *tasks) == [0, 1, 2]
        assert engine.asked == [[0], [1, 2]]
        assert await ask(desk, 8) == 8
        desk.close()

    asyncio.run(main())
