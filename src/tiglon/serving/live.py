"""The engine that answers now: changed under running requests, none of which notices.

A request takes `live.engine` once and keeps it to its end, so no answer mixes two bundles. When CURRENT names
another bundle, that one is loaded and verified beside the old, given the changes of the catalogue, asked once
so that nothing is cold, and only then put in its place: twice the memory for a moment, and no pause. A bundle
that cannot be loaded leaves the old one answering, and `trouble` says why.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tiglon.errors import DataError, StorageError, TiglonError
from tiglon.serving.bundle import Bundle
from tiglon.serving.catalogue import Catalogue
from tiglon.serving.changes import START, Changes, Place
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

    def refresh(self) -> None:
        """Take up what another process changed: the catalogue, the bundle."""
        try:
            folder = bundle_folder(self.source)
            if folder != self._folder:
                self._swap(folder)
            with self._lock:
                self._follow()
            self.trouble = ""
        except (TiglonError, OSError) as error:
            if str(error) != self.trouble:  # once, not twice a second
                note(
                    f"the change was not taken up: {error}", logging.ERROR, bundle=self.engine.bundle.version
                )
                self._on_swap(self.engine.bundle.version, "")
            self.trouble = str(error)

    def _swap(self, folder: Path) -> None:
        self._compact()
        engine, place = self._load(folder)
        lived = engine.bundle.items.vocabulary.raw.slice(0, 1).to_pylist()  # a life, so that all is compiled
        engine.recommend(RecommendRequest.model_validate({"history": lived, "k": 1, "request_id": "warm"}))
        with self._lock:
            engine, place = self._caught_up(engine, place, folder)
            self.trouble = ""  # before the bundle that ends it can be seen
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
    """Make a change that another bundle took; of its rows, those that this bundle takes."""
    try:
        engine.items(change)
    except DataError:
        rows = [row for row in change.add if _fits(engine, row)]
        if rows or change.remove:
            engine.items(change.model_copy(update={"add": rows}))


def _fits(engine: Engine, row: Mapping[str, Any]) -> bool:
    try:
        Catalogue(engine.bundle).with_rows([row])
    except DataError as error:  # a column that this bundle does not have, or an item that it removed
        note(f"an earlier change does not fit this bundle: {error}", logging.ERROR)
        return False
    return True
