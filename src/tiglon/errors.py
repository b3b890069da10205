"""Every error that Tiglon raises on purpose.

    TiglonError
    ├── DataError (ValueError)            a table breaks a rule
    │   ├── SchemaError                   a column is missing or holds the wrong type
    │   └── LeakageError                  the future is visible where only the past may be
    ├── ConfigError (ValueError)          an option is unknown or out of its range
    ├── UnknownIdError (KeyError)         a user or an item that was never seen
    ├── CapacityError (RuntimeError)      a semantic-ID space is full
    ├── BundleError (RuntimeError)        a bundle cannot be read
    │   ├── BundleDamagedError            a file is missing or its checksum differs
    │   ├── BundleVersionError            a newer Tiglon wrote it
    │   └── BundleChangedError            another process put something else in its place
    ├── StorageError (OSError)            the disk refused; nothing half-written is left
    ├── LanguageModelError (RuntimeError) a language model gave no answer, or one of no use
    └── MissingExtraError (ImportError)   an optional dependency is not installed

A message has up to three sentences: what was given, the rule it breaks, and what to do next.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any


class TiglonError(Exception):
    """Base of the tree. `given` says what came in, `rule` what is required, `fix` what to do next."""

    def __init__(self, given: str, *, rule: str = "", fix: str = "") -> None:
        self.given, self.rule, self.fix = given, rule, fix
        super().__init__(given)

    def __str__(self) -> str:
        parts = [self.given, self.rule, self.fix]
        return " ".join(part if part.endswith("?") else part.rstrip(".") + "." for part in parts if part)


class DataError(TiglonError, ValueError):
    """A table breaks a rule."""


class SchemaError(DataError):
    """A column is missing or holds the wrong type."""


class LeakageError(DataError):
    """The future is visible where only the past may be."""


class ConfigError(TiglonError, ValueError):
    """An option is unknown or out of its range."""


class UnknownIdError(TiglonError, KeyError):
    """A user or an item that was never seen."""


class CapacityError(TiglonError, RuntimeError):
    """A semantic-ID space is full."""


class BundleError(TiglonError, RuntimeError):
    """A bundle cannot be read."""


class BundleDamagedError(BundleError):
    """A file of a bundle is missing or its checksum differs."""


class BundleVersionError(BundleError):
    """A bundle was written by a newer Tiglon."""


class BundleChangedError(BundleError):
    """Another process put something else in the place of a bundle that was being changed."""


class StorageError(TiglonError, OSError):
    """The disk refused a write; nothing half-written is left behind."""


class LanguageModelError(TiglonError, RuntimeError):
    """A language model gave no answer in time, or one that cannot be used."""


class MissingExtraError(TiglonError, ImportError):
    """An optional dependency is not installed."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A `fix` sentence: the closest known word, or all of them."""
    known = sorted(known)
    close = closest(word, known)
    return f"Did you mean '{close}'?" if close else f"Known: {', '.join(known)}"


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is written most like it, whatever its case, if one is."""
    plain = {name.lower(): name for name in sorted(known)}
    close = difflib.get_close_matches(word.lower(), plain, n=1)
    return plain[close[0]] if close else None


def require_counts(settings: Any, *names: str) -> None:
    """Raise ConfigError unless each of these settings is at least 1."""
    for name in names:
        value = getattr(settings, name)
        if value < 1:
            raise ConfigError(f"{name}={value}", rule=f"{name} is at least 1")


def require_weights(settings: Any, *names: str) -> None:
    """Raise ConfigError unless each of these settings is at least 0 and finite."""
    for name in names:
        value = getattr(settings, name)
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name}={value}", rule=f"{name} is at least 0 and finite")


def require_dropout(settings: Any) -> None:
    """Raise ConfigError unless the setting `dropout` leaves something."""
    value = settings.dropout
    if not 0 <= value < 1:
        raise ConfigError(f"dropout={value}", rule="dropout lies in 0 … 1, 1 excluded")
