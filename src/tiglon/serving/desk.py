"""From a request to the engine: strict JSON in, a thread to work in, the time that is left, JSON out.

A worker answers `threads` requests at once and lets `waiting` more wait; others are refused, because a queue
that grows serves nobody. What a request waited is taken off its budget. Recommendations that wait together are
answered together, which costs each a fraction: nobody waits for company, but who waits has it. Those with a budget
and those without stand in two lines, so that no network for one keeps the other waiting.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from tiglon.errors import ConfigError, TiglonError
from tiglon.serving.engine import Engine, shares_work
from tiglon.serving.gate import Asking
from tiglon.serving.live import Live
from tiglon.serving.messages import Asked, Message, RecommendRequest
from tiglon.serving.metrics import Metrics
from tiglon.serving.reranking import Reranking

M = TypeVar("M", bound=Message)


@dataclass(frozen=True)
class Settings:
    keys: Path | None = None  # a file of keys; None: nobody is asked for one
    changes: Path | None = None  # folder that keeps the catalogue's changes; None: they end with the process
    body_bytes: int = 8 << 20
    threads: int = 2  # requests answered at once, by each worker
    waiting: int = 64  # requests that wait for a thread; more are refused
    budget_ms: int | None = None  # of a request that names none
    poll_seconds: float = 0.5  # between two looks at CURRENT, the changes and the keys
    reranking: Reranking | None = None  # by a language model; its key stands in the environment

    def __post_init__(self) -> None:
        for name, least in (("body_bytes", 1), ("threads", 1), ("budget_ms", 1), ("waiting", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}={value}", rule=f"{name} is at least {least}")
        if not self.poll_seconds > 0:
            raise ConfigError(f"poll_seconds={self.poll_seconds}", rule="poll_seconds is above 0")


TOGETHER = 16  # recommendations that are answered at once


_Written = tuple[Message, str]  # an answer, and its JSON
_Line = deque[tuple[RecommendRequest, Asking, Future[_Written]]]


def _written(message: Message) -> _Written:
    return message, message.model_dump_json()


class Overloaded(TiglonError):
    """More requests are inside than may wait."""


class Desk:
    """What all routes share."""

    def __init__(self, live: Live, metrics: Metrics, settings: Settings) -> None:
        self.live, self.metrics, self.settings = live, metrics, settings
        self._pool = ThreadPoolExecutor(settings.threads, "tiglon")
        self._most = settings.threads + settings.waiting
        self._inside = 0
        self._lines: dict[bool, _Line] = {True: deque(), False: deque()}  # with a budget, and without
        self._taking = threading.Lock()  # held by who takes from a line

    async def answer(self, asking: Asking, work: Callable[[Engine], Message]) -> Response:
        """The answer of the engine of this moment, and of no other. Raises Overloaded."""
        self._require_room()
        return await self._sent(asking, self._pool.submit(lambda: _written(work(self.live.engine))))

    async def recommend(self, asking: Asking, asked: RecommendRequest) -> Response:
        """The same for a recommendation, beside others that wait."""
        if not shares_work(asked) or self.settings.reranking:  # of some together, one would wait for each
            return await self.answer(asking, lambda engine: engine.recommend(self.prepared(asked, asking)))
        self._require_room()
        line = self._lines[bool(asked.budget_ms or self.settings.budget_ms)]
        mine: Future[_Written] = Future()
        line.append((asked, asking, mine))
        self._pool.submit(self._answer_some, line)  # its own, or another that is first
        return await self._sent(asking, mine)

    def _answer_some(self, line: _Line) -> None:
        """Answer those who are first in line: all that can share the work, or one with time for a network."""
        engine = self.live.engine
        some: list[tuple[RecommendRequest, Future[_Written]]] = []
        with self._taking:
            while line and len(some) < TOGETHER:
                request = self.prepared(*line[0][:2])
                together = engine.shares(request)
                if some and not together:
                    break
                _, _, its = line.popleft()
                if its.set_running_or_notify_cancel():
                    some.append((request, its))
                if not together:
                    break
        if len(some) > 1:
            with suppress(Exception):  # of one of them; below each is told its own
                found = [_written(message) for message in engine.recommend_many([r for r, _ in some])]
                for (_, its), written in zip(some, found, strict=True):
                    its.set_result(written)
                return
        for request, its in some:
            try:
                its.set_result(_written(engine.recommend(request)))
            except Exception as error:
                its.set_exception(error)

    def _require_room(self) -> None:
        if self._inside >= self._most:
            self.metrics.refused.inc()
            raise Overloaded(
                f"a worker with {self._inside} requests inside",
                rule="It takes no more at once",
                fix="Ask again after the seconds of Retry-After",
            )

    async def _sent(self, asking: Asking, answered: Future[_Written]) -> Response:
        self._inside += 1
        self.metrics.inside.inc()
        try:
            message, text = await asyncio.wrap_future(answered)
        finally:
            self._inside -= 1
            self.metrics.inside.dec()
        asking.facts |= self.metrics.answered(message)
        return Response(text, media_type="application/json")

    def prepared(self, asked: M, asking: Asking) -> M:
        """The message with the id of its request, and with the time that is left of its budget."""
        update: dict[str, Any] = {"request_id": asking.request_id}
        if isinstance(asked, Asked) and (budget := asked.budget_ms or self.settings.budget_ms):
            waited = (time.monotonic() - asking.arrived) * 1e3
            update["budget_ms"] = max(1, round(budget - waited))
        return asked.model_copy(update=update)

    def close(self) -> None:
        """Wait for what runs."""
        self._pool.shutdown()


class StrictRequest(Request):
    """A body of bounded size, read by pydantic's parser: UTF-8 only, no NaN, at most 200 levels deep."""

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            most = self.app.state.desk.settings.body_bytes
            parts, size = [], int(self.headers.get("content-length", 0))
            if size <= most:
                size = 0
                async for part in self.stream():
                    parts.append(part)
                    size += len(part)
                    if size > most:
                        break
            if size > most:
                raise HTTPException(
                    413, f"a body of more than {most:,} bytes", headers={"Connection": "close"}
                )
            self._body = b"".join(parts)
        return self._body

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise HTTPException(400, f"a body that is no JSON: {error}") from error


class StrictRoute(APIRoute):
    """Takes JSON that says that it is JSON, which no form of another web site can send."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            kind = request.headers.get("content-type", "")
            if request.method == "POST" and kind.partition(";")[0].strip().lower() != "application/json":
                raise HTTPException(415, f"a body of the type {kind[:80]!r}")
            return await handle(StrictRequest(request.scope, request.receive))

        return strict
