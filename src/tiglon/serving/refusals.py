"""Every way in which a request fails, as an ErrorResponse: what was given, the rule, what to do next.

400 malformed          401 unauthorized    403 forbidden    404 not_found, unknown_id    405    413 too_large
409 full               421 misdirected     422 invalid      500 internal
429 too_many_requests  503 overloaded, storage, bundle      both with Retry-After
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from tiglon.errors import (
    BundleError,
    CapacityError,
    ConfigError,
    DataError,
    StorageError,
    TiglonError,
    UnknownIdError,
)
from tiglon.serving.desk import Overloaded
from tiglon.serving.gate import Asking, error_response
from tiglon.serving.logs import note
from tiglon.serving.messages import ErrorResponse

RETRY = {"Retry-After": "1"}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": what}
    for status, what in {
        400: "The body is no JSON",
        401: "No key, or one that is not known",
        403: "The key may not do this",
        404: "An id that is not known",
        409: "The space of semantic IDs is full",
        413: "The body is too large",
        415: "The body does not say that it is application/json",
        421: "A server without keys was addressed by another name than localhost",
        422: "A value breaks a rule",
        429: "More requests a minute than the key may send; ask again after Retry-After",
        503: "Too many requests, or a store that is down; ask again after Retry-After",
    }.items()
}  # fmt: skip

_KINDS: list[tuple[type[TiglonError], int, str]] = [
    (UnknownIdError, 404, "unknown_id"),
    (CapacityError, 409, "full"),
    (DataError, 422, "invalid"),
    (ConfigError, 422, "invalid"),
    (Overloaded, 503, "overloaded"),
    (StorageError, 503, "storage"),
    (BundleError, 503, "bundle"),
]
_RULES = {
    400: ("malformed", "A body is JSON in UTF-8"),
    403: ("forbidden", "A key that may write is made by `tiglon key --write`"),
    404: ("not_found", "There is no such address"),
    405: ("method_not_allowed", "This address does not take this method"),
    413: ("too_large", "Send large things in parts"),
    415: ("no_json", "A body carries the header Content-Type: application/json"),
}
_UNION = re.compile(
    r"(constrained-|function-|list\[).*|int|str|bool|float"
)  # pydantic's names of alternatives
_MOST_PLACES = 3


def answer_errors(app: FastAPI) -> None:
    """Let an app answer all of these."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(TiglonError, _tiglon)


def _asking(request: Request) -> Asking:
    return request.scope["tiglon"]


def _tiglon(request: Request, error: Exception) -> Response:
    assert isinstance(error, TiglonError)
    asking = _asking(request)
    status, kind = next(((s, k) for t, s, k in _KINDS if isinstance(error, t)), (500, "internal"))
    if kind in ("overloaded", "unknown_id", "full", "invalid"):
        retry = RETRY if status == 503 else None
        return error_response(
            status, asking, kind, error.given, rule=error.rule, fix=error.fix, headers=retry
        )
    note(
        f"{error}", logging.ERROR, trace=True, request_id=asking.request_id
    )  # it names files: for the log alone
    return error_response(
        status,
        asking,
        kind,
        "the server cannot do this now",
        rule="Nothing was stored",
        fix="Ask again after the seconds of Retry-After; the server's log has the cause",
        headers=RETRY,
    )


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code
    given = f"{request.method} {request.scope['path'][:200]}" if status in (404, 405) else error.detail
    kind, rule = _RULES.get(status, ("refused", ""))
    return error_response(
        status,
        _asking(request),
        kind,
        given,
        rule=rule,
        fix="See /openapi.json",
        headers=dict(error.headers or {}),
    )


def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    what, rule = said(error.errors())
    return error_response(422, _asking(request), "invalid", what, rule=rule, fix="See /openapi.json")


def said(errors: Sequence[Any]) -> tuple[str, str]:
    """(what, rule) of pydantic's errors: the first places, each with the value that was given there.

    >>> said([{"loc": ("body", "k"), "msg": "Input should be at least 1", "input": 0}])
    ('body.k: 0', 'body.k: should be at least 1')
    """
    given: dict[str, str] = {}
    rules: dict[str, list[str]] = {}
    for error in errors:
        place = _place(error["loc"])
        given.setdefault(place, _shown(error.get("input")))
        message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
        rules.setdefault(place, []).append(message)
    places = list(given)[:_MOST_PLACES]
    more = f"; and {len(given) - len(places)} more" if len(given) > len(places) else ""
    what = "; ".join(f"{place}: {given[place]}" for place in places) + more
    return what, "; ".join(f"{place}: {', or '.join(dict.fromkeys(rules[place]))}" for place in places)


def _place(loc: Sequence[str | int]) -> str:
    """body.events[0].user_id"""
    parts = list(loc)
    while len(parts) > 1 and isinstance(parts[-1], str) and _UNION.fullmatch(parts[-1]):
        parts.pop()
    text = "".join(f"[{p}]" if isinstance(p, int) else f".{p[:64]}" for p in parts)
    return text.removeprefix(".")


def _shown(value: Any) -> str:
    text = f"{value!r}"
    return text if len(text) <= 80 else f"{text[:77]}…"
