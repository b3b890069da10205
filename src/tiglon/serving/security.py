"""Who may ask: API keys, what each may do, and where a server without keys may listen.

    {"keys": [{"name": "shop", "sha256": "9f86d081…", "scopes": ["read", "write"], "per_minute": 600}]}

`per_minute`, requests that a key may send, is left out where nothing bounds them. A key is 256 random bits. Nobody guesses that, so one SHA-256 is enough to keep it: who reads the file cannot
ask with what it says. A key is withdrawn by deleting its entry; a running server sees that within a second.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tiglon.errors import ConfigError

Scope = Literal["read", "write"]  # write: events, items, forgetting a user

_FORM = (
    '{"keys": [{"name": …, "sha256": 64 hex digits, "scopes": ["read", "write"], "per_minute": 1 or more}]}'
)
_MAKE = "Make one: tiglon key FILE --name NAME"


class Key(BaseModel):
    """What is known of a key: everything but itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]  # it is written to logs
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    scopes: frozenset[Scope]
    per_minute: Annotated[int, Field(ge=1, strict=True)] | None = None  # requests; None: as many as it likes


class KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: list[Key]


class Keys:
    """The keys of a file. Raises ConfigError where there is no such file, or no key in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = _stamp(path)
        self._keys = _read(path)
        if not self._keys:
            raise ConfigError(f"{path}, which holds no key", fix=_MAKE)

    def find(self, token: str) -> Key | None:
        """The key that `token` is. It takes as long for every token."""
        digest = hashlib.sha256(token.encode()).hexdigest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def refresh(self) -> bool:
        """Read the file again if it changed; True where it did. Raises ConfigError; the old keys stay then."""
        stamp = _stamp(self.path)
        if stamp == self._stamp:
            return False
        self._keys = _read(self.path)
        self._stamp = stamp  # once it was read: what cannot be read now is tried again
        return True


class Allowance:
    """What each key may still ask: a bucket that holds `per_minute` requests and fills in a minute.

    So a key that was quiet may ask that often at once, and then as fast as the bucket fills.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds."""
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}  # sha256 → requests left, and when that was

    def wait(self, key: Key) -> float:
        """0.0, and a request is taken; or the seconds until there is one."""
        if key.per_minute is None:
            return 0.0
        now, rate = self._clock(), key.per_minute / 60
        left, then = self._left.get(key.sha256, (key.per_minute, now))
        left = min(key.per_minute, left + (now - then) * rate)
        allowed = left > 1 - 1e-9  # who waited just as long as was said has it
        self._left[key.sha256] = (left - allowed, now)
        return 0.0 if allowed else (1 - left) / rate


def add_key(path: Path, name: str, scopes: frozenset[Scope], per_minute: int | None = None) -> str:
    """A new key, which is told only now: the file, made where it is missing, keeps its hash.

    per_minute: requests; None: no limit. Raises ConfigError.
    """
    if per_minute is not None and per_minute < 1:
        raise ConfigError(
            f"per_minute={per_minute}",
            rule="A key may send at least one request a minute",
            fix="Leave it out for no limit",
        )
    known = _read(path) if path.exists() else []
    if any(key.name == name for key in known):
        raise ConfigError(f"a key named {name}, which {path} has", fix="Choose another name")
    token = secrets.token_urlsafe(32)
    try:
        new = Key(
            name=name, sha256=hashlib.sha256(token.encode()).hexdigest(), scopes=scopes, per_minute=per_minute
        )
    except ValidationError as error:
        raise ConfigError(
            f"a key named {name!r}", rule="A name is up to 64 letters, digits, '.', '_' and '-'"
        ) from error
    text = KeyFile(keys=[*known, new]).model_dump_json(indent=1, exclude_none=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.touch(mode=0o600)
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise ConfigError(
            f"{path}, which cannot be written: {error.strerror}", fix="Choose another path"
        ) from error
    return token


def require_keys_beyond_loopback(host: str, keys: Path | None) -> None:
    """Raise ConfigError where a server would answer other machines without asking who they are."""
    if keys is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host} without keys",
            rule="Without keys a server listens on this machine alone",
            fix=f"Pass --keys FILE. {_MAKE}",
        )


def is_loopback(host: str) -> bool:
    """Whether a host name or address, as in an URL, means this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def host_of(header: str) -> str:
    """The host of a Host header: without the port."""
    return re.sub(r":\d*$", "", header)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_ino


def _read(path: Path) -> list[Key]:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}, which cannot be read: {error.strerror}", fix=_MAKE) from error
    try:
        return KeyFile.model_validate_json(text).keys
    except ValidationError as error:
        raise ConfigError(f"{path}, which is no file of keys", rule=f"It holds {_FORM}", fix=_MAKE) from error
