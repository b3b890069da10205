"""One JSON object a line: what a program reads, and what no id, path or header can break out of.

    {"time": "2026-11-22T10:00:00.123Z", "level": "info", "message": "request", "request_id": …, "ms": 7.1}

Everything beyond ASCII and every control character is escaped, so a line is a line on any terminal.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any

log = logging.getLogger("tiglon.serving")


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc)
        line: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            "process": record.process,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def note(message: str, level: int = logging.INFO, *, trace: bool = False, **fields: Any) -> None:
    """A line in the log; `trace` adds the exception that is being handled."""
    log.log(level, message, extra={"fields": fields}, exc_info=trace)


def write_json_lines() -> None:
    """Everything that is logged in this process, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
