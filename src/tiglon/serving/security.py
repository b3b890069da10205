"""Who may ask: API keys, what each may do, and where a server without keys may listen.

    {"keys": [{"name": "shop", "sha256": "9f86d081…", "scopes": ["read", "write"]}]}

A key is 256 random bits. Nobody guesses that, so one SHA-256 is enough to keep it: who reads the file cannot
ask with what it says. A key is withdrawn by deleting its entry; a running server sees that within a second.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import secrets
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tiglon.errors import ConfigError

Scope = Literal["read", "write"]  # write: events, items, forgetting a user

_FORM = '{"keys": [{"name": …, "sha256": 64 hex digits, "scopes": ["read", "write"]}]}'
_MAKE = "Make one: tiglon key FILE --name NAME"


class Key(BaseModel):
    """What is known of a key: everything but itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]  # it is written to logs
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    scopes: frozenset[Scope]


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
        self._stamp = stamp
        self._keys = _read(self.path)
        return True


def add_key(path: Path, name: str, scopes: frozenset[Scope]) -> str:
    """A new key, which is told only now: the file, made where it is missing, keeps its hash."""
    known = _read(path) if path.exists() else []
    if any(key.name == name for key in known):
        raise ConfigError(f"a key named {name}, which {path} has", fix="Choose another name")
    token = secrets.token_urlsafe(32)
    try:
        new = Key(name=name, sha256=hashlib.sha256(token.encode()).hexdigest(), scopes=scopes)
    except ValidationError as error:
        raise ConfigError(
            f"a key named {name!r}", rule="A name is up to 64 letters, digits, '.', '_' and '-'"
        ) from error
    text = KeyFile(keys=[*known, new]).model_dump_json(indent=1)
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
