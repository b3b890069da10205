"""A language model that remembers, by (model, version of the prompt, hash of what was asked).

    model = Cached(Endpoint(…), "runs/answers")

One file of JSON lines a model and version; a line is written whole when an answer comes, so that a killed run
loses at most the answer that was under way. Failures are not remembered.

    {"key": "…", "text": "…"}            of `complete`
    {"key": "…", "chances": {"Yes": …}}  of `next_token`
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from pathlib import Path
from typing import Any

from tiglon.errors import StorageError
from tiglon.llm.client import Completion, LanguageModel, Prompt, Usage


class Cached:
    """The same answers, each paid for once.   folder: of the files; may be shared by models."""

    def __init__(self, model: LanguageModel, folder: str | Path) -> None:
        self.model, self.folder = model, Path(folder)
        self._known: dict[Path, dict[str, Any]] = {}
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def usage(self) -> Usage:
        return self.model.usage

    def complete(self, prompt: Prompt, *, max_tokens: int = 512, seconds: float | None = None) -> Completion:
        key = _key(prompt, max_tokens)
        known = self._look(prompt).get(key, {}).get("text")
        if isinstance(known, str):
            self.usage.add(cached=1)
            return Completion(known)
        answer = self.model.complete(prompt, max_tokens=max_tokens, seconds=seconds)
        self._keep(prompt, {"key": key, "text": answer.text})
        return answer

    def next_token(self, prompt: Prompt, *, seconds: float | None = None) -> dict[str, float]:
        key = _key(prompt, 0)
        known = self._look(prompt).get(key, {}).get("chances")
        if isinstance(known, dict):
            self.usage.add(cached=1)
            return known
        chances = self.model.next_token(prompt, seconds=seconds)
        self._keep(prompt, {"key": key, "chances": chances})
        return chances

    def _file(self, prompt: Prompt) -> Path:
        whose = f"{self.name}\n{prompt.version}"
        readable = re.sub(r"[^\w.-]+", "_", f"{self.name}-{prompt.version}")[:80]
        return self.folder / f"{readable}-{hashlib.sha256(whose.encode()).hexdigest()[:12]}.jsonl"

    def _look(self, prompt: Prompt) -> dict[str, Any]:
        path = self._file(prompt)
        with self._lock:
            if path not in self._known:
                self._known[path] = _read(path)
            return self._known[path]

    def _keep(self, prompt: Prompt, line: dict[str, Any]) -> None:
        path = self._file(prompt)
        with self._lock:
            self._known[path][line["key"]] = line
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
            except OSError as error:
                raise StorageError(
                    f"{path}: {error}", fix="Free some space or pass another folder for the answers"
                ) from error


def _key(prompt: Prompt, max_tokens: int) -> str:
    return hashlib.blake2b(f"{max_tokens}\n{prompt.text}".encode(), digest_size=16).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """key → line; lines that were cut short are left out. Ends a cut line, so that the next begins anew."""
    if not path.is_file():
        return {}
    known = {}
    text = path.read_text(encoding="utf-8", errors="replace")
    for line in text.split("\n"):  # an answer may hold other ends of lines
        try:
            entry = json.loads(line)
            known[entry["key"]] = entry
        except (ValueError, TypeError, KeyError):
            continue
    if text and not text.endswith("\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
    return known
