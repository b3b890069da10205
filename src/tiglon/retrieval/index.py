"""The k items with the largest product, for users of one vector or of several.

    ExactIndex(vectors).search(interests_BKD, 100, seen=histories, deny=sold_out)

An item counts once, by the best of a user's interests. What a user has seen and what nobody may get is left
out inside the search, so that k items come back wherever the catalogue has them. `ExactIndex` computes every
product, a block of items at a time, and is what all others are measured by; `FaissIndex` answers the same call
from any index of faiss (`pip install 'tiglon[faiss]'`), with fewer items where that looks at too few.

Letters: B users, K interests, N items, D width, n items of a block.
"""

from __future__ import annotations

import re
from typing import Any, Protocol

import numpy as np
import torch

from tiglon.errors import ConfigError, DataError, MissingExtraError
from tiglon.retrieval.retriever import require_k
from tiglon.retrieval.topk import best_places, each_once, require_dense, require_deny, tie_order
from tiglon.types import MISSING, Candidates, Histories

_BLOCK = 1 << 13  # items
_SCORES = 1 << 21  # held at once: users × interests × items of a block, 8 MiB


class Index(Protocol):
    """What finds items by their vectors."""

    def search(
        self,
        interests: np.ndarray,
        k: int,
        *,
        present: np.ndarray | None = None,
        seen: Histories | None = None,
        deny: np.ndarray | None = None,
        source: str = "index",
    ) -> Candidates:
        """The k best items of each user; ties as in `topk`.

        interests: (B, K, D) float32, or (B, D) for one each.   present: (B, K) bool, which interests there are.
        seen: items that each user may not get.   deny: (N,) bool, items that nobody may get.
        """


class ExactIndex:
    """vectors: (N, D) float32. Raises DataError where one is not finite."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = torch.from_numpy(_finite(vectors, "item vectors"))
        self.order = tie_order(len(vectors))

    def search(
        self,
        interests: np.ndarray,
        k: int,
        *,
        present: np.ndarray | None = None,
        seen: Histories | None = None,
        deny: np.ndarray | None = None,
        source: str = "index",
    ) -> Candidates:
        """As `Index.search`, by every product. Raises ConfigError, DataError."""
        n_items, width = self.vectors.shape
        interests, present = _checked(interests, k, present, seen, deny, n_items, width)
        k = min(k, n_items)
        item = np.full((len(interests), k), MISSING, np.int64)
        score = np.full((len(interests), k), -np.inf, np.float32)
        users, many = present.shape
        at_once = max(1, _SCORES // (min(_BLOCK, n_items) * max(many, 1)))
        for start in range(0, users if many else 0, at_once):
            rows = slice(start, start + at_once)
            banned = None if seen is None else seen.take(rows)
            self._search(interests[rows], present[rows], banned, deny, item[rows], score[rows])
        return Candidates(item, score, source)

    def _search(
        self,
        interests: np.ndarray,
        present: np.ndarray,
        seen: Histories | None,
        deny: np.ndarray | None,
        item: np.ndarray,
        score: np.ndarray,
    ) -> None:
        """The best of a few users, into item and score (B, k)."""
        users, many, width = interests.shape
        query, absent = torch.from_numpy(interests.reshape(-1, width)), torch.from_numpy(~present)
        if seen is not None:
            by_item = np.argsort(seen.item, kind="stable")
            seen_item, seen_owner = seen.item[by_item], seen.owner[by_item]
        for start in range(0, len(self.vectors), _BLOCK):
            block = self.vectors[start : start + _BLOCK]
            product = (query @ block.T).view(users, many, len(block))
            if absent.any():
                product[absent] = -torch.inf
            best = product.amax(dim=1) if many > 1 else product[:, 0]
            if deny is not None:
                best[:, torch.from_numpy(deny[start : start + _BLOCK])] = -torch.inf
            found = best.numpy()
            if seen is not None:
                low, high = np.searchsorted(seen_item, (start, start + len(block)))
                found[seen_owner[low:high], seen_item[low:high] - start] = -np.inf
            better = np.flatnonzero(best.amax(dim=1).numpy() >= score[:, -1])  # the others gain nothing here
            places = best_places(found[better], item.shape[1], self.order[start : start + len(block)])
            new = np.where(places == MISSING, -np.inf, np.take_along_axis(found[better], places, axis=1))
            places[places != MISSING] += start
            item[better], score[better] = merge(
                np.concatenate([item[better], places], axis=1),
                np.concatenate([score[better], new], axis=1),
                item.shape[1],
                self.order,
            )


class FaissIndex:
    """vectors: (N, D) float32.   factory: which index, in the words of faiss's `index_factory`, and after a blank
    how it searches, "HNSW32 efSearch=64" or "IVF256,Flat nprobe=32"; what needs training is trained on the vectors.

    A list of each interest is asked for, longer ones until k items are left of each, then they are merged.
    With "Flat" the answer is the exact one, but for ties.
    """

    def __init__(self, vectors: np.ndarray, factory: str = "Flat") -> None:
        vectors = _finite(vectors, "item vectors")
        self.index = empty_faiss(vectors.shape[1], factory)
        try:
            self.index.train(vectors)
            self.index.add(vectors)
        except RuntimeError as error:
            raise ConfigError(
                f"an index '{factory}' of {len(vectors):,} items: {error}",
                rule="faiss can make it of the items there are",
                fix="Take HNSW32, or leave the index out for the exact search",
            ) from error
        self.order = tie_order(len(vectors))

    def search(
        self,
        interests: np.ndarray,
        k: int,
        *,
        present: np.ndarray | None = None,
        seen: Histories | None = None,
        deny: np.ndarray | None = None,
        source: str = "index",
    ) -> Candidates:
        """As `Index.search`, as near to it as the index is. Raises ConfigError, DataError."""
        n_items = len(self.order)
        interests, present = _checked(interests, k, present, seen, deny, n_items, self.index.d)
        users, many, width = interests.shape
        k = min(k, n_items)
        if not users or not many:
            return Candidates(np.full((users, k), MISSING), np.full((users, k), -np.inf, np.float32), source)
        flat = interests.reshape(-1, width)
        keys = np.empty(0, np.int64)
        if seen is not None:
            keys = np.unique(seen.owner * n_items + seen.item)
        owner = np.repeat(np.arange(users), many)[:, None]
        asked = min(n_items, k + (0 if seen is None else int(seen.lengths.max(initial=0))))
        while True:
            score, item = self.index.search(flat, asked)
            allowed = (item != MISSING) & present.reshape(-1, 1)
            if deny is not None:
                allowed &= ~deny[item]
            allowed &= ~np.isin(owner * n_items + item, keys)
            more = item[:, -1] != MISSING  # the others have told all that they look at
            short = present.reshape(-1) & (allowed.sum(axis=1) < k) & more
            if asked == n_items or not short.any():
                break
            asked = min(2 * asked, n_items)
        item = np.where(allowed, item, MISSING).reshape(users, -1)
        score = np.where(allowed, score, -np.inf).astype(np.float32).reshape(users, -1)
        item, score = each_once(item, score)
        return Candidates(*merge(item, score, k, self.order), source)


def empty_faiss(width: int, factory: str) -> Any:
    """faiss's index of inner products that `factory` names. Raises MissingExtraError, ConfigError."""
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError(
            f"an index '{factory}', but faiss is not installed",
            rule="Every index but the exact search is faiss's",
            fix="pip install 'tiglon[faiss]'",
        ) from error
    links = re.search(r"HNSW(\d+)", factory)
    try:
        if links and int(links[1]) < 2:
            raise RuntimeError("HNSW has at least two links an item")  # faiss ends the process
        kind, _, search = factory.partition(" ")
        index = faiss.index_factory(width, kind, faiss.METRIC_INNER_PRODUCT)
        if re.search(r"=\s*(0|-)", search):
            raise RuntimeError(f"{search}: a search looks at one thing at least")
        faiss.ParameterSpace().set_index_parameters(index, search)  # type: ignore[arg-type]  # stubs: int
        return index
    except RuntimeError as error:
        raise ConfigError(
            f"an index '{factory}' of vectors {width} wide: {error}",
            rule="It is named in the words of faiss's index_factory, and after a blank nprobe=… or efSearch=…",
            fix="Take HNSW32, or leave the index out for the exact search",
        ) from error


def most_alike(
    vectors: np.ndarray, items: np.ndarray, k: int, source: str, deny: np.ndarray | None = None
) -> Candidates:
    """The k rows of (N, D) float32 whose cosine with each of these rows (B,) is largest, but for itself.

    deny: (N,) bool, rows that are never found.
    """
    require_k(k)
    themselves = Histories.of([[i] for i in items])
    require_dense(themselves, len(vectors))
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
    return ExactIndex(vectors).search(vectors[items], k, seen=themselves, deny=deny, source=source)


def merge(item: np.ndarray, score: np.ndarray, k: int, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The k best of lists (B, m) without repetitions, best first. order: (N,) `tie_order`."""
    ranks = np.lexsort((order[item], -score), axis=1)[:, :k]
    return np.take_along_axis(item, ranks, axis=1), np.take_along_axis(score, ranks, axis=1)


# -- inside ------------------------------------------------------------------------------------------------


def _finite(vectors: np.ndarray, what: str) -> np.ndarray:
    if what == "item vectors" and not len(vectors):
        raise DataError("an index of no items", rule="There is something to search")
    if what == "item vectors" and vectors.ndim != 2:
        raise DataError(
            f"item vectors of shape {vectors.shape}", rule="An index takes a matrix (items, width)"
        )
    if vectors.dtype != np.float32 or not np.isfinite(vectors).all():
        raise DataError(
            f"{what} of type {vectors.dtype}, {int((~np.isfinite(vectors)).any(axis=-1).sum())} not finite",
            rule="Vectors are float32 and finite",
        )
    return np.ascontiguousarray(vectors)


def _checked(
    interests: np.ndarray,
    k: int,
    present: np.ndarray | None,
    seen: Histories | None,
    deny: np.ndarray | None,
    n_items: int,
    width: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Interests (B, K, D) and which of them are present (B, K)."""
    require_k(k)
    if interests.ndim == 2:
        interests = interests[:, None]
    if interests.ndim != 3 or interests.shape[2] != width:
        raise DataError(
            f"interests of shape {interests.shape} for items of width {width}",
            rule="Interests are (users, interests, width) or (users, width)",
        )
    if present is None:
        present = np.ones(interests.shape[:2], bool)
    if present.shape != interests.shape[:2] or present.dtype != bool:
        raise DataError(
            f"presence of shape {present.shape} and type {present.dtype} for interests of shape {interests.shape}",
            rule="present is one bool for each interest of each user",
        )
    if seen is not None:
        if len(seen) != len(interests):
            raise DataError(f"seen items of {len(seen)} users for interests of {len(interests)}")
        require_dense(seen, n_items)
    require_deny(deny, n_items)
    return _finite(interests, "interests"), present
