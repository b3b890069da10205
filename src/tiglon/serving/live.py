"""The engine that answers now: changed under running requests, none of which notices.

A request takes `live.engine` once and keeps it to its end, so no answer mixes two bundles. When CURRENT names
another bundle, that one is loaded and verified beside the old, given the changes of the catalogue, asked once
so that nothing is cold, and only then put in its place: twice the memory for a moment, and no pause. A bundle
that cannot be loaded leaves the old one answering, and `trouble` says why; the catalogue is followed all the same.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiglon.errors import CapacityError, DataError, StorageError, TiglonError
from tiglon.serving.bundle import Bundle
from tiglon.serving.changes import START, Changes, Place
from tiglon.serving.engine import Engine
from tiglon.serving.logs import note
from tiglon.serving.messages import ItemsRequest, ItemsResponse, RecommendRequest
from tiglon.serving.publish import bundle_folder
from tiglon.serving.reranking import Reranking
from tiglon.serving.state import State

_BUNDLE = "the bundle"


class Live:
    """Loads at once. Raises BundleError, StorageError.

    source: a bundle, or a home whose CURRENT names one.
    on_swap: called with the old version and the new one; an empty new one could not be taken up.
    on_stage: called with each stage of the funnel and its seconds.
    reranking: the language model that orders the first of every answer; None: none.
    """

    def __init__(
        self,
        source: Path,
        state: State | None,
        changes: Changes | None,
        on_swap: Callable[[str, str], None] = lambda old, new: None,
        on_stage: Callable[[str, float], None] = lambda name, seconds: None,
        reranking: Reranking | None = None,
    ) -> None:
        self.source, self.state, self.changes = source, state, changes
        self._troubles: dict[str, str] = {}
        self._on_swap, self._on_stage, self._reranking = on_swap, on_stage, reranking
        self._lock = threading.Lock()  # held by who changes the engine
        self._folder = bundle_folder(source)
        self._compact()
        self.engine, self._place = self._load(self._folder)
        on_swap("", self.engine.bundle.version)

    def items(self, change: ItemsRequest) -> ItemsResponse:
        """Change the catalogue of all workers, and of every bundle that comes. All of it or nothing."""
        with self._lock:
            if self.changes is None:
                return self.engine.items(change)
            with self.changes.alone():
                self._follow()
                answer = self.engine.items(change)
                try:
                    self._place = self.changes.append(change, self._place)
                except TiglonError:  # what is not kept must not be shown
                    self.engine, self._place = self._load(self._folder)
                    raise
            return answer

    @property
    def trouble(self) -> str:
        """What could not be taken up, and why; empty where all was."""
        return "; ".join(filter(None, self._troubles.values()))

    def follow(self) -> None:
        """Take up what another process changed in the catalogue."""

        def work() -> None:
            with self._lock:
                self._follow()

        self.attempt("the change of the catalogue", work)

    def renew(self) -> None:
        """Take up another bundle, if the home names one. It takes as long as loading does."""

        def work() -> None:
            folder = bundle_folder(self.source)
            if folder != self._folder:
                self._swap(folder)

        self.attempt(_BUNDLE, work)

    def attempt(self, what: str, work: Callable[[], None]) -> None:
        """Do it. Whatever goes wrong is told once, and stands in `trouble` until it goes well."""
        try:
            work()
            self._troubles[what] = ""
        except Exception as error:  # who watches must go on watching
            text = str(error) or type(error).__name__
            if text != self._troubles.get(what):  # once, not twice a second
                expected = isinstance(error, (TiglonError, OSError))
                version = self.engine.bundle.version
                note(f"{what} was not taken up: {text}", logging.ERROR, trace=not expected, bundle=version)
                if what == _BUNDLE:
                    self._on_swap(version, "")
            self._troubles[what] = text

    def _swap(self, folder: Path) -> None:
        self._compact()
        engine, place = self._load(folder)
        lived = engine.bundle.items.vocabulary.raw.slice(0, 1).to_pylist()  # a life, so that all is compiled
        engine.recommend(RecommendRequest.model_validate({"history": lived, "k": 1, "request_id": "warm"}))
        with self._lock:
            engine, place = self._caught_up(engine, place, folder)
            self._troubles[_BUNDLE] = ""  # before the bundle that ends it can be seen
            old, self.engine, self._place, self._folder = self.engine, engine, place, folder
        note("bundle swapped", old=old.bundle.version, new=engine.bundle.version)
        self._on_swap(old.bundle.version, engine.bundle.version)

    def _load(self, folder: Path) -> tuple[Engine, Place]:
        asks = self._reranking
        engine = Engine(
            Bundle.load(folder),
            self.state,
            on_stage=self._on_stage,
            reranker=None if asks is None else asks.reranker(),
            reranker_text=None if asks is None else asks.text,
        )
        return self._caught_up(engine, START, folder)

    def _follow(self) -> None:
        """Take up what other workers changed in the catalogue."""
        self.engine, self._place = self._caught_up(self.engine, self._place, self._folder)

    def _caught_up(self, engine: Engine, place: Place, folder: Path) -> tuple[Engine, Place]:
        """An engine of a folder's bundle that was given the changes up to `place`, with those after it."""
        if self.changes is None:
            return engine, place
        found, now, anew = self.changes.since(place)
        if anew and place != START:  # the file was compacted, and what this engine lacks is not told apart
            return self._load(folder)
        for change in found:
            _give(engine, change)
        return engine, now

    def _compact(self) -> None:
        """Shorten the file of changes. That the disk refuses is no reason not to serve."""
        try:
            if self.changes is not None and self.changes.compact():
                note("the changes of the catalogue were compacted")
        except StorageError as error:
            note(f"the changes of the catalogue were not compacted: {error}", logging.ERROR)


def _give(engine: Engine, change: ItemsRequest) -> None:
    """Make a change that another bundle took; of its rows and removals, those that this bundle takes."""
    try:
        engine.items(change)
    except (DataError, CapacityError) as error:
        parts = [ItemsRequest.model_construct(add=part) for part in _halves(change.add)]
        parts += [ItemsRequest.model_construct(remove=part) for part in _halves(change.remove)]
        if len(parts) > 1:
            for part in parts:
                _give(engine, part)
        else:  # a column that this bundle does not have, an item that it removed, a group of IDs that is full
            note(f"an earlier change does not fit this bundle: {error}", logging.ERROR)


def _halves(whole: list[Any]) -> list[list[Any]]:
    middle = len(whole) // 2
    return [half for half in (whole[:middle], whole[middle:]) if half]
