"""What slow retrievers answered lately, for the same life: people ask several times between two events.

It belongs to one moment of the catalogue (`serving.catalogue`), so nothing in it is of another bundle or of
items that left since. The life is the key, so an event makes the next question a new one.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

import numpy as np

from tiglon.retrieval.retriever import Retriever
from tiglon.types import MISSING, Candidates, Histories

Row = tuple[np.ndarray, np.ndarray]  # items and scores, best first


class Remembered:
    """Safe to use from several threads.   most: lists that are kept, the ones asked for lately."""

    def __init__(self, most: int = 4_096) -> None:
        self._most = most
        self._rows: OrderedDict[tuple[str, int, bool, bytes, bytes], Row] = OrderedDict()
        self._lock = threading.Lock()

    def retrieve(
        self,
        retriever: Retriever,
        lives: Histories,
        k: int,
        *,
        exclude_seen: bool,
        deny: np.ndarray | None = None,
    ) -> tuple[Candidates, int]:
        """What the retriever finds, and for how many of the lives it had to be asked."""
        denied = (
            b"" if deny is None else hashlib.blake2b(np.packbits(deny).tobytes(), digest_size=16).digest()
        )
        keys = [(retriever.name, k, exclude_seen, denied, life) for life in _digests(lives)]
        with self._lock:
            known = [self._rows.get(key) for key in keys]
        new = [b for b, row in enumerate(known) if row is None]
        rows = {b: row for b, row in enumerate(known) if row is not None}
        if new:
            some = lives.take(np.array(new))
            found = retriever.retrieve(some, k, exclude_seen=exclude_seen, deny=deny)
            rows |= {b: (found.item[i], found.score[i]) for i, b in enumerate(new)}
        with self._lock:
            for key, row in zip(keys, (rows[b] for b in range(len(lives))), strict=True):
                self._rows[key] = row
                self._rows.move_to_end(key)
            while len(self._rows) > self._most:
                self._rows.popitem(last=False)
        width = max((len(item) for item, _ in rows.values()), default=0)
        item = np.full((len(lives), width), MISSING, np.int64)
        score = np.full((len(lives), width), -np.inf, np.float32)
        for b, (its, scores) in rows.items():
            item[b, : len(its)], score[b, : len(its)] = its, scores
        return Candidates(item, score, retriever.name), len(new)


class Remembering(Retriever):
    """A retriever that is always asked for `most` items and remembers them; the first k are the answer.

    So what asks it for `most` later, of the same lives, is told at once.
    """

    def __init__(self, inner: Retriever, remembered: Remembered, most: int) -> None:
        self.inner, self.remembered, self.most = inner, remembered, most
        self.name, self.items, self.log = inner.name, inner.items, inner.log

    def retrieve(
        self, histories: Histories, k: int, *, exclude_seen: bool = True, deny: np.ndarray | None = None
    ) -> Candidates:
        most = max(k, self.most)
        found, _ = self.remembered.retrieve(self.inner, histories, most, exclude_seen=exclude_seen, deny=deny)
        return Candidates(found.item[:, :k], found.score[:, :k], self.name)


def _digests(lives: Histories) -> list[bytes]:
    """(B,) a name for what each life holds: items, times and whose it is."""
    who = np.full(len(lives), MISSING) if lives.user is None else lives.user
    names = []
    for a, b, user in zip(lives.offsets[:-1], lives.offsets[1:], who, strict=True):
        digest = hashlib.blake2b(lives.item[a:b].tobytes(), digest_size=16)
        digest.update(lives.time[a:b].tobytes())
        digest.update(int(user).to_bytes(8, "little", signed=True))
        names.append(digest.digest())
    return names
