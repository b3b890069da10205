"""The engine over HTTP: the messages of `serving.messages` as JSON, under /v1.

    create_app(Path("home"), LmdbState("home/state"), Settings(keys=Path("keys.json")))  →  an ASGI app

`recommend`, `rank` and `similar`, one by one or in batches, `events`, `items`, `users`; `tree` and `beam`, which
the console draws; /health/live, /health/ready, /metrics, /openapi.json. Every answer carries a request id, every
error what was given, the rule and what to do. No endpoint takes a path of the server's or an address.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
from fastapi import APIRouter, Body, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from pydantic import Field, ValidationError
from starlette.convertors import Convertor, register_url_convertor
from starlette.responses import PlainTextResponse, RedirectResponse

import tiglon
from tiglon.errors import ConfigError
from tiglon.serving.changes import Changes
from tiglon.serving.desk import Desk, Settings, StrictRoute
from tiglon.serving.engine import Engine
from tiglon.serving.gate import Asking, Gate
from tiglon.serving.live import Live
from tiglon.serving.logs import note
from tiglon.serving.messages import (
    ID,
    BeamResponse,
    EventsRequest,
    EventsResponse,
    FindRequest,
    FindResponse,
    ForgetResponse,
    ItemsRequest,
    ItemsResponse,
    LookupRequest,
    LookupResponse,
    Message,
    RankRequest,
    RankResponse,
    RecommendRequest,
    RecommendResponse,
    SimilarRequest,
    SimilarResponse,
    TreeResponse,
    UserResponse,
)
from tiglon.serving.metrics import Metrics
from tiglon.serving.refusals import RESPONSES, answer_errors
from tiglon.serving.security import Keys, Scope
from tiglon.serving.state import State

WEB = Path(__file__).parent / "web"
MOST_REQUESTS = 64  # in a batch


def create_app(source: Path, state: State | None, settings: Settings | None = None) -> FastAPI:
    """A worker of a server. It loads the bundle when it starts, and closes the state when it ends.

    source: a bundle, or a home whose CURRENT names one. Raises ConfigError for a file of keys that is none.
    """
    settings = settings or Settings()
    keys = Keys(settings.keys) if settings.keys is not None else None
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        changes = Changes(settings.changes) if settings.changes is not None else None
        live = Live(source, state, changes, metrics.swapped, metrics.staged, settings.reranking)
        app.state.desk = desk = Desk(live, metrics, settings)
        note("ready", bundle=live.engine.bundle.version)
        ended = asyncio.Event()
        small, large = (
            asyncio.create_task(_again_and_again(look, settings.poll_seconds, ended))
            for look in (lambda: _follow(live, keys), live.renew)
        )
        yield
        ended.set()
        await small
        await large
        desk.close()
        if state is not None:
            state.close()
        note("stopped")

    app = FastAPI(
        title="Tiglon",
        version=tiglon.__version__,
        description='Recommendations with your ids, which are never converted: 5 and "5" are two ids.',
        lifespan=lifespan,
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
    )
    app.include_router(open_to_all)
    app.include_router(v1)
    if WEB.is_dir():
        app.mount("/console", StaticFiles(directory=WEB, html=True), name="console")
    app.add_middleware(Gate, keys=keys, metrics=metrics)
    answer_errors(app)
    return app


def _follow(live: Live, keys: Keys | None) -> None:
    """Take up what changes at once: the catalogue, the keys."""

    def read_keys() -> None:
        if keys is not None and keys.refresh():
            note("keys read again")

    live.follow()
    live.attempt("the new file of keys", read_keys)


async def _again_and_again(look: Callable[[], None], seconds: float, ended: asyncio.Event) -> None:
    while not ended.is_set():
        await asyncio.to_thread(look)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(ended.wait(), seconds)


# -- what routes are given ---------------------------------------------------------------------------------


async def _desk(request: Request) -> Desk:  # async, as all of these: others are run in a thread
    return request.app.state.desk


async def _asking(request: Request) -> Asking:
    return request.scope["tiglon"]


def _may(scope: Scope) -> Any:
    async def check(asking: Annotated[Asking, Depends(_asking)]) -> None:
        if asking.key is not None and scope not in asking.key.scopes:
            raise HTTPException(403, f"the key '{asking.key.name}', which may not {scope}")

    return Depends(check)


READ, WRITE = _may("read"), _may("write")
Here = Annotated[Desk, Depends(_desk)]
Now = Annotated[Asking, Depends(_asking)]


def _examples(**named: Any) -> Any:
    return Body(openapi_examples={name.replace("_", " "): {"value": value} for name, value in named.items()})


# -- the routes --------------------------------------------------------------------------------------------


class _AnyText(Convertor[str]):
    """An id in a path: a slash and a line break are letters of it."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("id", _AnyText())
open_to_all = APIRouter(tags=["health"])
v1 = APIRouter(
    prefix="/v1",
    route_class=StrictRoute,
    responses=RESPONSES,
    dependencies=[
        Depends(
            HTTPBearer(auto_error=False, description="A key, where the server asks for one; see `tiglon key`")
        )
    ],
)


class RecommendBatch(Message):
    requests: Annotated[list[RecommendRequest], Field(min_length=1, max_length=MOST_REQUESTS)]


class RecommendBatchResponse(Message):
    responses: list[RecommendResponse]


class RankBatch(Message):
    requests: Annotated[list[RankRequest], Field(min_length=1, max_length=MOST_REQUESTS)]


class RankBatchResponse(Message):
    responses: list[RankResponse]


class SimilarBatch(Message):
    requests: Annotated[list[SimilarRequest], Field(min_length=1, max_length=MOST_REQUESTS)]


class SimilarBatchResponse(Message):
    responses: list[SimilarResponse]


@v1.post("/recommend", response_model=RecommendResponse, dependencies=[READ])
async def recommend(
    desk: Here,
    now: Now,
    asked: Annotated[
        RecommendRequest,
        _examples(
            a_user={"user_id": 7, "k": 5},
            a_history={"history": [12, 3, 44], "k": 5, "explain": True},
            with_rules={"user_id": 7, "deny": [3], "at_most": {"category": 2}, "budget_ms": 40},
        ),
    ],
) -> Response:
    """The k best items for a user, or for a history."""
    now.take(asked.request_id)
    return await desk.recommend(now, asked)


@v1.post("/recommend/batch", response_model=RecommendBatchResponse, dependencies=[READ])
async def recommend_batch(
    desk: Here,
    now: Now,
    asked: Annotated[RecommendBatch, _examples(two_users={"requests": [{"user_id": 7}, {"user_id": 8}]})],
) -> Response:
    """Many at once, all answered by one bundle."""

    def work(engine: Engine) -> Message:
        requests = [desk.prepared(one, now) for one in asked.requests]
        return RecommendBatchResponse(responses=engine.recommend_many(requests))

    return await desk.answer(now, work)


@v1.post("/rank", response_model=RankResponse, dependencies=[READ])
async def rank(
    desk: Here,
    now: Now,
    asked: Annotated[RankRequest, _examples(four_items={"user_id": 7, "items": [3, 12, 44, 8]})],
) -> Response:
    """Your items in the order in which this user would take them."""
    now.take(asked.request_id)
    return await desk.answer(now, lambda engine: engine.rank(desk.prepared(asked, now)))


@v1.post("/rank/batch", response_model=RankBatchResponse, dependencies=[READ])
async def rank_batch(
    desk: Here,
    now: Now,
    asked: Annotated[RankBatch, _examples(one={"requests": [{"user_id": 7, "items": [3, 12]}]})],
) -> Response:
    def work(engine: Engine) -> Message:
        return RankBatchResponse(responses=[engine.rank(desk.prepared(one, now)) for one in asked.requests])

    return await desk.answer(now, work)


@v1.post("/similar", response_model=SimilarResponse, dependencies=[READ])
async def similar(
    desk: Here, now: Now, asked: Annotated[SimilarRequest, _examples(five={"item_id": 12, "k": 5})]
) -> Response:
    """Items near an item."""
    now.take(asked.request_id)
    return await desk.answer(now, lambda engine: engine.similar(desk.prepared(asked, now)))


@v1.post("/similar/batch", response_model=SimilarBatchResponse, dependencies=[READ])
async def similar_batch(
    desk: Here,
    now: Now,
    asked: Annotated[SimilarBatch, _examples(two={"requests": [{"item_id": 12}, {"item_id": 3}]})],
) -> Response:
    def work(engine: Engine) -> Message:
        return SimilarBatchResponse(
            responses=[engine.similar(desk.prepared(one, now)) for one in asked.requests]
        )

    return await desk.answer(now, work)


@v1.post("/events", response_model=EventsResponse, dependencies=[WRITE])
async def events(
    desk: Here,
    now: Now,
    asked: Annotated[
        EventsRequest,
        _examples(
            one={"events": [{"event_id": "e-1", "user_id": 7, "item_id": 12, "timestamp": 1_700_000_000}]}
        ),
    ],
) -> Response:
    """What users did. All of it is on the disk when this answers, or none; the next request sees it.

    Sent again, it is stored once: by event_id, or by user, item and timestamp. What the bundle's own log holds
    counts once, too.
    """
    now.take(asked.request_id)
    return await desk.answer(now, lambda engine: engine.events(desk.prepared(asked, now)))


@v1.post("/items", response_model=ItemsResponse, dependencies=[WRITE])
async def items(
    desk: Here,
    now: Now,
    asked: Annotated[
        ItemsRequest,
        _examples(add_and_remove={"add": [{"item_id": 1000, "title": "A new one"}], "remove": [3]}),
    ],
) -> Response:
    """Add, change and remove items. All workers know within a second; the IDs of other items do not move."""
    now.take(asked.request_id)
    return await desk.answer(now, lambda _: desk.live.items(desk.prepared(asked, now)))


IdType = Annotated[
    Literal["auto", "integer", "string"],
    Query(
        description="How to read the id of the path. auto: as a whole number where the bundle's users are "
        "whole numbers and it looks like one, else as a string"
    ),
]


@v1.get("/users/{user_id:id}", response_model=UserResponse, dependencies=[READ])
async def user(desk: Here, now: Now, user_id: str, id_type: IdType = "auto") -> Response:
    """A user's whole life, oldest first."""
    return await desk.answer(now, lambda engine: engine.user(_typed(engine, user_id, id_type)))


@v1.delete("/users/{user_id:id}", response_model=ForgetResponse, dependencies=[WRITE])
async def forget(desk: Here, now: Now, user_id: str, id_type: IdType = "auto") -> Response:
    """Delete what is known of a user, and hide what the bundle knows."""
    return await desk.answer(now, lambda engine: engine.forget(_typed(engine, user_id, id_type)))


_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,18}")


def _typed(engine: Engine, text: str, id_type: str) -> int | str:
    """The id that a path means."""
    whole = bool(_WHOLE.fullmatch(text))
    if id_type == "integer" and not whole:
        raise ConfigError(
            f"the user id {text[:80]!r}", rule="id_type=integer reads whole numbers", fix="Try id_type=string"
        )
    if id_type == "auto" and whole and pa.types.is_integer(engine.bundle.histories.users.raw.type):
        id_type = "integer"
    try:
        return ID.validate_python(int(text) if id_type == "integer" else text)
    except ValidationError as error:
        found = [{**e, "loc": ("path", "user_id")} for e in error.errors(include_url=False)]
        raise RequestValidationError(found) from error


@v1.get("/tree", response_model=TreeResponse, dependencies=[READ])
async def tree(
    desk: Here,
    now: Now,
    prefix: Annotated[
        list[Annotated[int, Field(ge=0, lt=2**31)]],
        Query(max_length=16, description="codes from the root: ?prefix=3&prefix=14"),
    ] = [],  # noqa: B006
) -> Response:
    """A node of the tree of semantic IDs: its children, with what lies below each."""
    return await desk.answer(now, lambda engine: engine.tree(prefix))


@v1.post("/beam", response_model=BeamResponse, dependencies=[READ])
async def beam(
    desk: Here, now: Now, asked: Annotated[RecommendRequest, _examples(a_user={"user_id": 7, "k": 5})]
) -> Response:
    """Where TIGER's beam went for this request, depth by depth."""
    now.take(asked.request_id)
    return await desk.answer(now, lambda engine: engine.beam(desk.prepared(asked, now)))


@v1.post("/lookup", response_model=LookupResponse, dependencies=[READ])
async def lookup(
    desk: Here, now: Now, asked: Annotated[LookupRequest, _examples(two={"item_ids": [3, 12]})]
) -> Response:
    """What the catalogue says of items: text, columns, semantic ID."""
    return await desk.answer(now, lambda engine: engine.lookup(asked.item_ids))


@v1.post("/find", response_model=FindResponse, dependencies=[READ])
async def find(
    desk: Here, now: Now, asked: Annotated[FindRequest, _examples(some={"text": "1", "k": 5})]
) -> Response:
    """Users and items by the beginning of an id, items also by a part of their text."""
    return await desk.answer(now, lambda engine: engine.find(asked.text, asked.k))


class Health(Message):
    """trouble: why a newer bundle, a change of the catalogue or of the keys could not be taken up; the old one
    answers. It names files, so a server with keys says only where it stands."""

    ready: bool
    bundle: str
    items: int
    users: int
    trouble: str


@open_to_all.get("/health/live")
async def live() -> dict[str, bool]:
    """The process runs."""
    return {"live": True}


@open_to_all.get("/health/ready")
async def ready(desk: Here) -> Health:
    """A bundle is loaded and answers."""
    bundle = desk.live.engine.bundle
    return Health(
        ready=True,
        bundle=bundle.version,
        items=len(bundle.items),
        users=len(bundle.histories),
        trouble=desk.live.trouble if desk.settings.keys is None else desk.live.trouble and "see the log",
    )


@open_to_all.get("/metrics", response_class=PlainTextResponse, dependencies=[READ])
async def metrics(desk: Here) -> Response:
    """For Prometheus."""
    page = await asyncio.to_thread(desk.metrics.page)
    return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")


@open_to_all.get("/", include_in_schema=False)
async def root() -> Response:
    return RedirectResponse("/console/" if WEB.is_dir() else "/openapi.json")
