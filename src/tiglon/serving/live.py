"""The engine that answers now: changed under running requests, none of which notices.

A request takes `live.engine` once and keeps it to its end, so no answer mixes two bundles. When CURRENT names
another bundle, that one is loaded and verified beside the old, given the changes of the catalogue, asked once
so that nothing is cold, and only then put in its place: twice the memory for a moment, and no pause. A bundle
that cannot be loaded leaves the old one answering, and `trouble` says why.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from tiglon.errors import DataError, TiglonError
from tiglon.serving.bundle import Bundle
from tiglon.serving.changes import Changes
from tiglon.serving.engine import Engine
from tiglon.serving.logs import note
from tiglon.serving.messages import ItemsRequest, ItemsResponse, RecommendRequest
from tiglon.serving.publish import bundle_folder
from tiglon.serving.reranking import Reranking
from tiglon.serving.state import State


class Live:
    """Loads at once. Raises BundleError, StorageError.

    source: a bundle, or a home whose CURRENT names one.
    on_swap: called with the old version and the new one; an empty new one is a change that failed.
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
        self.trouble = ""
        self._on_swap, self._on_stage, self._reranking = on_swap, on_stage, reranking
        self._lock = threading.Lock()  # held by who changes the engine
        self._folder = bundle_folder(source)
        self.engine, self._place = self._load(self._folder)
        on_swap("", self.engine.bundle.version)

    def items(self, change: ItemsRequest) -> ItemsResponse:
        """Change the catalogue of all workers, and of every bundle that comes. All of it or nothing."""
        with self._lock:
            if self.changes is None:
                return self.engine.items(change)
            with self.changes.alone():
                self._place = self._apply(self.engine, self._place)
                answer = self.engine.items(change)
                try:
                    self._place = self.changes.append(change, self._place)
                except TiglonError:  # what is not kept must not be shown
                    self.engine, self._place = self._load(self._folder)
                    raise
            return answer

    def refresh(self) -> None:
        """Take up what another process changed: the catalogue, the bundle."""
        try:
            folder = bundle_folder(self.source)
            if folder != self._folder:
                self._swap(folder)
            with self._lock:
                self._place = self._apply(self.engine, self._place)
            self.trouble = ""
        except (TiglonError, OSError) as error:
            if str(error) != self.trouble:  # once, not twice a second
                note(
                    f"the change was not taken up: {error}", logging.ERROR, bundle=self.engine.bundle.version
                )
                self._on_swap(self.engine.bundle.version, "")
            self.trouble = str(error)

    def _swap(self, folder: Path) -> None:
        engine, place = self._load(folder)
        engine.recommend(RecommendRequest.model_validate({"history": [], "k": 1, "request_id": "warm"}))
        with self._lock:
            place = self._apply(engine, place)
            old, self.engine, self._place, self._folder = self.engine, engine, place, folder
        note("bundle swapped", old=old.bundle.version, new=engine.bundle.version)
        self._on_swap(old.bundle.version, engine.bundle.version)

    def _load(self, folder: Path) -> tuple[Engine, int]:
        asks = self._reranking
        engine = Engine(
            Bundle.load(folder),
            self.state,
            on_stage=self._on_stage,
            reranker=None if asks is None else asks.reranker(),
            reranker_text=None if asks is None else asks.text,
        )
        return engine, self._apply(engine, 0)

    def _apply(self, engine: Engine, place: int) -> int:
        """Give an engine the changes after `place`; the place after them."""
        if self.changes is None:
            return 0
        found, place = self.changes.since(place)
        for change in found:
            try:
                engine.items(change)
            except DataError as error:  # columns that this bundle does not have
                note(f"an earlier change does not fit this bundle: {error}", logging.ERROR)
                if change.remove:
                    engine.items(ItemsRequest(remove=change.remove))
        return place
