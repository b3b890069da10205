"""What every request passes: an id, the key and what it may still ask, and, on the way out, a line in the log and in the metrics.

The log names the route, never the path: a path holds users' ids.
"""

from __future__ import annotations

import logging
import math
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tiglon.serving.logs import note
from tiglon.serving.messages import ErrorResponse
from tiglon.serving.metrics import Metrics
from tiglon.serving.security import Allowance, Key, Keys, host_of, is_loopback

_OPEN = re.compile(r"/health/(live|ready)|/openapi\.json|/|/console(/.*)?")  # without a key
_REQUEST_ID = re.compile(r"[!-~]{1,128}")
_METHODS = {"GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass
class Asking:
    """One request, from arrival to answer; `scope["tiglon"]`."""

    request_id: str
    arrived: float  # seconds, monotonic
    key: Key | None = None  # None where no keys are asked for
    status: int = 0
    facts: dict[str, Any] = field(default_factory=dict)  # for the log

    def take(self, request_id: str | None) -> None:
        """The id that a message names comes before that of the header."""
        self.request_id = request_id or self.request_id


class Gate:
    """ASGI middleware. Without keys it answers only who addresses this machine as itself.

    clock: seconds, by which the requests of a key are counted.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys | None,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.app, self.keys, self.metrics = app, keys, metrics
        self._allowance = Allowance(clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        asking = Asking(given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex, arrived=time.monotonic())
        scope["tiglon"] = asking

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                asking.status = message["status"]
                out = MutableHeaders(scope=message)
                out["X-Request-ID"] = asking.request_id
                out.update(_HEADERS)
                if scope["path"].startswith("/v1/"):
                    out["Cache-Control"] = "no-store"
            await send(message)

        refusal = self._refusal(scope, headers, asking)
        try:
            await (refusal or self.app)(scope, receive, sealed)
        except Exception as error:
            note("failed", logging.ERROR, trace=True, request_id=asking.request_id, kind=type(error).__name__)
            if not asking.status:
                broken = error_response(
                    500, asking, "internal", "the server failed on this request", fix="Report the request_id"
                )
                await broken(scope, receive, sealed)
        finally:
            self._tell(scope, asking)

    def _refusal(self, scope: Scope, headers: Headers, asking: Asking) -> Response | None:
        if self.keys is None:
            host = headers.get("host", "")
            if is_loopback(host_of(host)):
                return None  # else a web page could send its readers' browsers here, under its own name
            return error_response(
                421,
                asking,
                "misdirected",
                f"the host {host[:100]!r}",
                rule="A server without keys is addressed as localhost or 127.0.0.1",
                fix="Start it with --keys FILE to serve other names",
            )
        if _OPEN.fullmatch(scope["path"]):
            return None
        kind, _, token = headers.get("authorization", "").partition(" ")
        asking.key = self.keys.find(token.strip()) if kind.lower() == "bearer" else None
        if asking.key is not None:
            asking.facts["key"] = asking.key.name
            return self._limited(asking, asking.key)
        return error_response(
            401,
            asking,
            "unauthorized",
            "a key that is not known" if token else "no key",
            rule="Each request carries the header Authorization: Bearer KEY",
            fix="Ask who runs the server for a key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _limited(self, asking: Asking, key: Key) -> Response | None:
        seconds = self._allowance.wait(key)
        if not seconds:
            return None
        self.metrics.limited.labels(key.name).inc()
        return error_response(
            429,
            asking,
            "too_many_requests",
            f"more than {key.per_minute} requests a minute with the key '{key.name}'",
            rule="A key with a limit may send so many at once, and each comes back in its part of a minute",
            fix="Ask again after the seconds of Retry-After; send several requests as a batch",
            headers={"Retry-After": str(math.ceil(seconds))},
        )

    def _tell(self, scope: Scope, asking: Asking) -> None:
        seconds = time.monotonic() - asking.arrived
        route = getattr(scope.get("route"), "path", "-").replace("{user_id:id}", "{user_id}")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self.metrics.requests.labels(route, method, asking.status).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        note(
            "request",
            request_id=asking.request_id,
            method=method,
            route=route,
            status=asking.status,
            ms=round(seconds * 1e3, 2),
            **asking.facts,
        )


def error_response(
    status: int,
    asking: Asking,
    error: str,
    what: str,
    *,
    rule: str = "",
    fix: str = "",
    headers: dict[str, str] | None = None,
) -> Response:
    body = ErrorResponse(error=error, what=what, rule=rule, fix=fix, request_id=asking.request_id)
    asking.facts["error"] = error
    return Response(body.model_dump_json(), status, headers, "application/json")
