"""From the command line to worker processes.

Each worker loads the bundle itself; what is large in it is memory-mapped, so that all share one copy. They also
share the state, the file of the catalogue's changes and, through a folder of counters, /metrics. SIGTERM and
SIGINT close the port, let what runs be answered, and end.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.supervisors import Multiprocess

from tiglon.errors import BundleDamagedError, ConfigError
from tiglon.serving.api import create_app
from tiglon.serving.bundle import is_bundle
from tiglon.serving.desk import Settings
from tiglon.serving.logs import log, write_json_lines
from tiglon.serving.publish import bundle_folder
from tiglon.serving.reranking import Reranking
from tiglon.serving.security import Keys, require_keys_beyond_loopback
from tiglon.serving.state import LmdbState, RedisState, State

DRAIN_SECONDS = 30  # that running requests get when the server ends
_ENVIRONMENT = "TIGLON_SERVE"  # how a worker process learns what it serves


def serve(
    source: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    workers: int = 1,
    state: str | None = None,
    settings: Settings | None = None,
) -> None:
    """Serve until a signal ends it.

    source: a bundle, or a home whose CURRENT names one. port: 0 takes a free one, which the log tells.
    state: a folder, or redis://…; by default `state` in a home, and BUNDLE-state beside a bundle. The
    catalogue's changes are kept in that folder.
    Raises ConfigError for a host that needs keys, keys that cannot be read, or a port that is taken, BundleError for
    no bundle.
    """
    settings = settings or Settings()
    require_keys_beyond_loopback(host, settings.keys)
    if workers < 1:
        raise ConfigError(f"workers={workers}", rule="workers is at least 1")
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"port={port}", rule="A port is between 0 and 65535")
    if settings.keys is not None:
        Keys(settings.keys)
    folder = bundle_folder(source)
    if not is_bundle(folder):
        raise BundleDamagedError(
            f"no bundle at {source}",
            rule="It is a folder that `tiglon train` wrote, or a home with a CURRENT",
            fix="Check the path",
        )
    beside = source / "state" if folder != source else source.with_name(f"{source.name}-state")
    remote = state is not None and "://" in state
    kept = beside if state is None or remote else Path(state)
    settings = replace(settings, changes=kept)
    about = {"source": str(source), "state": state if remote else str(kept), "settings": asdict(settings)}
    shared = free_port(host, port)
    os.environ[_ENVIRONMENT] = json.dumps(about, default=str)
    write_json_lines()
    with tempfile.TemporaryDirectory(prefix="tiglon-metrics-") as counters:
        if workers > 1:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = counters
        options: dict[str, Any] = {
            "factory": True,
            "log_config": None,
            "access_log": False,
            "http": "h11",  # it bounds the headers
            "loop": "asyncio",
            "ws": "none",
            "lifespan": "on",
            "proxy_headers": False,
            "server_header": False,
            "timeout_graceful_shutdown": DRAIN_SECONDS,
            "timeout_worker_healthcheck": 60,  # imports may take long on a busy machine
        }
        if workers == 1:
            shared.close()  # it was to refuse a port that is taken before the bundle is read
            uvicorn.run(f"{__name__}:worker", host=host, port=port, **options)
        else:
            name = f"[{host}]" if ":" in host else host
            log.info("%d workers running on http://%s:%d", workers, name, shared.getsockname()[1])
            config = uvicorn.Config(f"{__name__}:worker", workers=workers, **options)
            Multiprocess(config, sockets=[shared]).run()


class SharedPort(socket.socket):
    """A socket that each process binds anew: sent to another one it goes as its address alone.

    Linux gives each connection to one of the processes, by a hash. Of one socket for all, the process that wakes
    first takes every connection that waits, and while those are kept alive the others have nothing to do.
    """

    @classmethod
    def at(cls, family: int, address: Any) -> SharedPort:
        """One more on an address whose other sockets are of this kind, too. Raises OSError."""
        port = cls(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        port.bind(address)
        return port

    def __reduce__(self) -> Any:
        return SharedPort.at, (self.family, self.getsockname())


def free_port(host: str, port: int) -> socket.socket:
    """A socket for several processes, on a port that nobody has; 0 takes any. Raises ConfigError.

    Its protocol is said: where it is 0, as in a socket of uvicorn's, asyncio leaves Nagle's algorithm on, which
    holds the second part of each answer back for 40 ms.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        alone = socket.socket(family, kind, socket.IPPROTO_TCP)
        alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        alone.bind(address)
        if sys.platform != "linux":
            return alone
        with alone:
            address = alone.getsockname()
        return SharedPort.at(family, address)
    except OSError as error:
        raise ConfigError(
            f"the address {host}:{port}: {error.strerror}",
            rule="A server listens on an address of this machine, on a port that nobody else has",
            fix="Choose another --port; 0 takes any",
        ) from error


def worker() -> FastAPI:
    """The app of a worker process, from what `serve` left in the environment."""
    write_json_lines()
    about: dict[str, Any] = json.loads(os.environ[_ENVIRONMENT])
    paths = {k: Path(v) for k, v in about["settings"].items() if k in ("keys", "changes") and v is not None}
    asks = about["settings"].pop("reranking")
    reranking = None if asks is None else Reranking(**asks)
    settings = Settings(**{**about["settings"], **paths}, reranking=reranking)
    return create_app(Path(about["source"]), open_state(about["state"]), settings)


def open_state(where: str) -> State:
    """A folder's LMDB, or Redis for an address."""
    return RedisState(where) if "://" in where else LmdbState(where)
