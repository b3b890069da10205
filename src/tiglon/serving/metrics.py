"""What /metrics tells Prometheus: requests and their times, the engine's stages, what answered, what was left out.

With several workers each writes to a file of its own, and whichever is asked adds them up; the folder is
PROMETHEUS_MULTIPROC_DIR, which must be set before this module is imported.
"""

from __future__ import annotations

import os
import re
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

from tiglon.serving.messages import Message, RecommendResponse

disable_created_metrics()  # the time at which each series began, which nobody asks for

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self.requests = Counter(
            "tiglon_requests", "Requests answered", ["route", "method", "status"], registry=own
        )
        self.seconds = Histogram(
            "tiglon_request_seconds", "From arrival to answer", ["route"], buckets=_SECONDS, registry=own
        )
        self.stages = Histogram(
            "tiglon_stage_seconds", "A stage of the funnel", ["stage"], buckets=_SECONDS, registry=own
        )
        self.items = Counter("tiglon_items", "Items in answers", ["source"], registry=own)
        self.degraded = Counter("tiglon_degraded", "Answers that lack something", ["why"], registry=own)
        self.refused = Counter("tiglon_refused", "Requests refused under load", registry=own)
        self.limited = Counter("tiglon_limited", "Requests beyond a key's limit", ["key"], registry=own)
        self.inside = Gauge(
            "tiglon_requests_inside", "Running or waiting", multiprocess_mode="livesum", registry=own
        )
        self.bundle = Gauge(
            "tiglon_bundle", "1: answers now", ["version"], multiprocess_mode="livemax", registry=own
        )
        self.swaps = Counter("tiglon_swaps", "Changes of the bundle", ["result"], registry=own)

    def answered(self, message: Message) -> dict[str, Any]:
        """Count an answer, or a batch of them; what the log says of it."""
        answers = getattr(message, "responses", [message])
        degraded = [why for one in answers for why in getattr(one, "degraded", [])]
        for why in degraded:
            self.degraded.labels(re.sub(r"\d+", "n", why)).inc()  # few labels, whatever was counted
        for one in answers:
            if isinstance(one, RecommendResponse):
                for item in one.items:
                    self.items.labels(item.source).inc()
        bundle = getattr(answers[0], "bundle", "")
        return {**({"bundle": bundle} if bundle else {}), **({"degraded": degraded} if degraded else {})}

    def staged(self, name: str, seconds: float) -> None:
        self.stages.labels(name).observe(seconds)

    def swapped(self, old: str, new: str) -> None:
        """Another bundle answers; `new` is empty where it could not be taken up."""
        self.swaps.labels("done" if new else "failed").inc()
        if new:
            if old:
                self.bundle.labels(old).set(0)
            self.bundle.labels(new).set(1)

    def page(self) -> bytes:
        """Prometheus' text format, of all workers."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self._registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)
        return generate_latest(together)
