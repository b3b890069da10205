"""Retrievers without training: popularity, text neighbours, co-occurrence, the two added, and repeats.

They answer in milliseconds, explain themselves, and are hard to beat: a trained model that loses to
`NeighbourSum` on the same users is not worth serving.

    history     the last 20 moments; an event weighs .75^age, its age being the number of later moments.
    text        TF-IDF of the title (twice), brand and categories, words and word pairs; cosine.
    together    pairs of items within 10 moments of a user's life weigh 1 / distance, backwards × .7; each
                column is scaled by 1 / √(its sum + 5), so that popular items do not win everywhere.
    sum         both, each scaled to its maximum, then added.
    ties        at random, see `topk`.

A *moment* is all events of a user at one time: one click, or a basket. Inside a basket nothing came first:
its items have the same age, and are at distance 1 from each other, both ways without the backward factor.

Scores compare the items of one user, not users: the best item of the catalogue, seen or not, has 1, an item
without any evidence 0. (The sum lies in 0 … 2.) Where a history is empty or tells nothing (all scores 0),
the answer is popularity.

Letters: E events, B users, T events of a batch, N items, V terms.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp
from numba import njit
from safetensors.numpy import load_file, save_file
from sklearn.feature_extraction.text import TfidfVectorizer

from tiglon.data.folders import reading, written_aside
from tiglon.data.histories import HistoryStore
from tiglon.data.split import moment_starts
from tiglon.data.text import render
from tiglon.errors import BundleDamagedError, ConfigError, DataError
from tiglon.retrieval.retriever import Retriever, require_k
from tiglon.retrieval.topk import best_places, require_dense, require_deny, tie_order, top_items
from tiglon.types import Candidates, Histories, Interactions, Items, Vocabulary

if TYPE_CHECKING:
    from typing import Self

FORMAT = 1
_SCORES_AT_ONCE = 1 << 24  # of a batch, B × N, 64 MiB


@dataclass(frozen=True)
class TextConfig:
    template: str | None = (
        None  # of the item table's columns, as in data.text.render; None: see text_template
    )
    ngrams: int = 2  # words; single words and pairs
    min_df: int = 2  # texts that share a term; a term of one text links no two items
    last: int = 20  # moments of history read
    decay: float = 0.75  # weight of each moment relative to the next

    def __post_init__(self) -> None:
        _require_counts(ngrams=self.ngrams, min_df=self.min_df)
        _require_history(self.last, self.decay)


@dataclass(frozen=True)
class CoOccurrenceConfig:
    window: int = 10  # moments
    backward: float = 0.7  # weight of a pair against the direction of time
    shrink: float = 5.0  # added to a column's sum before the root
    neighbours: int = 1000  # kept for each item, the strongest ones; bounds memory
    last: int = 20  # moments of history read
    decay: float = 0.75  # weight of each moment relative to the next

    def __post_init__(self) -> None:
        _require_counts(window=self.window, neighbours=self.neighbours)
        _require_history(self.last, self.decay)
        if self.backward < 0 or self.shrink <= 0:
            raise ConfigError(
                f"backward={self.backward}, shrink={self.shrink}",
                rule="backward is at least 0 and shrink more than 0",
            )


@dataclass(frozen=True)
class RepeatsConfig:
    last: int = 1000  # moments of history read
    decay: float = 0.97  # weight of each moment relative to the next

    def __post_init__(self) -> None:
        _require_history(self.last, self.decay)


class CatalogueScorer(Retriever):
    """What these retrievers share: a score for every item of the catalogue, and the k best of them."""

    counts: np.ndarray  # (N,) events in training

    @property
    def _popularity(self) -> np.ndarray:
        """(N,) float32: the counts, 0 … 1."""
        if self._shares is None or self._shares[0] is not self.counts:
            self._shares = self.counts, (self.counts / max(self.counts.max(initial=0), 1)).astype(np.float32)
        return self._shares[1]

    _shares: tuple[np.ndarray, np.ndarray] | None = None  # the counts, and what was made of them

    def fit(self, interactions: Interactions, items: Items) -> Self:
        """Learn from the training events alone; `interactions` also becomes the `log` that users are read from.

        Give the retriever a longer log to serve from: `retriever.log = HistoryStore.build(everything)`.
        Raises DataError where log and catalogue number the items differently.
        """
        if interactions.items != items.vocabulary:
            raise DataError(
                f"a log of {len(interactions.items)} items and a catalogue of {len(items)}",
                rule="Both number the items by one vocabulary",
                fix="Call tiglon.data.events.align(interactions, items) first",
            )
        self.items = items.vocabulary
        self.log = HistoryStore.build(interactions)
        self.counts = np.bincount(interactions.item, minlength=len(items))
        self._learn(interactions, items)
        return self

    def score(self, histories: Histories) -> np.ndarray:
        """Scores (B, N) float32 of the whole catalogue, 0 … 1 (or 2), in memory at once."""
        return self.or_popularity(self.evidence(histories))

    def evidence(self, histories: Histories) -> np.ndarray:
        """The same, but all 0 in a row where the history tells nothing."""
        self._require_fitted()
        require_dense(histories, len(self.items))
        return self._evidence(histories)

    def or_popularity(self, evidence: np.ndarray) -> np.ndarray:
        """Evidence (B, N) as scores: popularity stands where there is none."""
        silent = evidence.max(axis=1, initial=0) <= 0
        return np.where(silent[:, None], self._popularity, evidence) if silent.any() else evidence

    def retrieve(
        self, histories: Histories, k: int, *, exclude_seen: bool = True, deny: np.ndarray | None = None
    ) -> Candidates:
        """As `Retriever.retrieve`."""
        require_k(k)
        self._require_fitted()
        require_deny(deny, len(self.items))
        width = min(k, len(self.items))
        item = np.empty((len(histories), width), np.int64)
        score = np.empty((len(histories), width), np.float32)
        step = max(1, _SCORES_AT_ONCE // max(len(self.items), 1))
        for start in range(0, len(histories), step):
            rows = slice(start, start + step)
            some = histories.take(rows)
            scores = self.score(some) if deny is None else np.where(deny, -np.inf, self.score(some))
            best = top_items(scores, k, some if exclude_seen else None)
            item[rows], score[rows] = best.item, best.score
        return Candidates(item, score, self.name)

    def save(self, directory: str | Path) -> None:
        """Write the folder, all of it or nothing; `log` is not part of it. Raises StorageError."""
        self._require_fitted()
        with written_aside(Path(directory), "retriever.json") as aside:
            about = {"format": FORMAT, "kind": type(self).__name__, "config": self._settings()}
            (aside / "retriever.json").write_text(json.dumps(about), encoding="utf-8")
            pq.write_table(pa.table({"item_id": self.items.raw}), aside / "items.parquet")
            save_file({"counts": self.counts, **self._arrays()}, aside / "arrays.safetensors")

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """What `save` wrote, with the same answers. Raises BundleDamagedError, BundleVersionError."""
        directory = Path(directory)
        with reading(
            directory,
            "retriever.json",
            FORMAT,
            what="a retriever",
            rule="A retriever has retriever.json, items.parquet and arrays.safetensors",
            fix="Copy the folder again, or fit anew",
        ) as about:
            if about["kind"] != cls.__name__:
                raise BundleDamagedError(
                    f"{directory} holds a {about['kind']}", rule=f"{cls.__name__}.load reads its own kind"
                )
            self = cls._of(about["config"])
            self.items = Vocabulary(pq.read_table(directory / "items.parquet")["item_id"])
            arrays = load_file(directory / "arrays.safetensors")
            self.counts = arrays.pop("counts")
            self._restore(arrays)
        return self

    def _learn(self, interactions: Interactions, items: Items) -> None:
        """What `fit` learns beyond the counts."""

    @abc.abstractmethod
    def _evidence(self, histories: Histories) -> np.ndarray:
        """Scores (B, N) float32 ≥ 0; all 0 in a row where the history tells nothing."""

    def _settings(self) -> dict[str, Any]:
        """The configuration as JSON; `_of` makes the retriever from it."""
        return {}

    @classmethod
    def _of(cls, settings: dict[str, Any]) -> Self:
        return cls(**settings)

    def _arrays(self) -> dict[str, np.ndarray]:
        """What was learned, as named arrays; `_restore` takes them back."""
        return {}

    def _restore(self, arrays: dict[str, np.ndarray]) -> None:
        pass

    def _require_fitted(self) -> None:
        if not hasattr(self, "counts"):
            raise ConfigError(
                f"{self.name} that has learned nothing yet", fix="Call fit(interactions, items)"
            )


class Popularity(CatalogueScorer):
    """The items with the most training events; the same for everyone, but for what they have seen."""

    name = "popularity"

    def _evidence(self, histories: Histories) -> np.ndarray:
        return np.zeros((len(histories), len(self.items)), np.float32)  # no history tells anything


class Repeats(CatalogueScorer):
    """A user's own past items by count, recent ones weighing more; after them the popular ones.

    Own items score .5 … 1, others below .5. With `exclude_seen` nothing but popularity is left.
    """

    name = "repeats"

    def __init__(self, config: RepeatsConfig | None = None) -> None:
        self.config = config or RepeatsConfig()

    def _evidence(self, histories: Histories) -> np.ndarray:
        own = np.zeros((len(histories), len(self.items)), np.float32)
        _add(*recent(histories, self.config.last, self.config.decay), own)
        own = _scaled(own)
        top = self.counts.max(initial=0)
        popular = self._popularity * np.float32(top / (1 + top))
        return np.where(own > 0, 1 + own, popular) / 2

    def _settings(self) -> dict[str, Any]:
        return asdict(self.config)

    @classmethod
    def _of(cls, settings: dict[str, Any]) -> Self:
        return cls(RepeatsConfig(**settings))


class Neighbours(CatalogueScorer):
    """Retrievers whose evidence is the neighbourhood of each item of the history."""

    def alike(self, items: np.ndarray, k: int) -> Candidates:
        """As `Retriever.alike`; only true neighbours."""
        require_k(k)
        self._require_fitted()
        alone = Histories.of([[i] for i in items])
        require_dense(alone, len(self.items))
        scores = self._evidence(alone)
        return top_items(np.where(scores > 0, scores, -np.inf), k, alone, source=self.name)


class TextNeighbours(Neighbours):
    """Items whose text resembles what the user read: reaches every item with a text, new ones too."""

    name = "text neighbours"

    def __init__(self, config: TextConfig | None = None) -> None:
        self.config = config or TextConfig()

    def _learn(self, interactions: Interactions, items: Items) -> None:
        self._read(_tfidf(render(items, self.config.template or text_template(items)), self.config))

    def _read(self, weights: sp.csr_matrix) -> None:
        self.weights = weights  # (N, V) float32, rows of length 1
        self.items_of_term = weights.T.tocsr()  # (V, N)

    def _evidence(self, histories: Histories) -> np.ndarray:
        out = np.zeros((len(histories), len(self.items)), np.float32)
        weights = recent(histories, self.config.last, self.config.decay)
        _add_through(*weights, _rows(self.weights), _rows(self.items_of_term), self.weights.shape[1], out)
        return _scaled(out)

    def _settings(self) -> dict[str, Any]:
        return asdict(self.config)

    @classmethod
    def _of(cls, settings: dict[str, Any]) -> Self:
        return cls(TextConfig(**settings))

    def _arrays(self) -> dict[str, np.ndarray]:
        return _to_arrays(self.weights)

    def _restore(self, arrays: dict[str, np.ndarray]) -> None:
        self._read(_from_arrays(arrays))


class CoOccurrence(Neighbours):
    """Items that stand near those of the history in other users' lives; items without events have none."""

    name = "co-occurrence"

    def __init__(self, config: CoOccurrenceConfig | None = None) -> None:
        self.config = config or CoOccurrenceConfig()

    def _learn(self, interactions: Interactions, items: Items) -> None:
        self.together = co_occurrence(interactions, self.config)  # (N, N) sparse

    def _evidence(self, histories: Histories) -> np.ndarray:
        out = np.zeros((len(histories), len(self.items)), np.float32)
        _add_rows(*recent(histories, self.config.last, self.config.decay), _rows(self.together), out)
        return _scaled(out)

    def _settings(self) -> dict[str, Any]:
        return asdict(self.config)

    @classmethod
    def _of(cls, settings: dict[str, Any]) -> Self:
        return cls(CoOccurrenceConfig(**settings))

    def _arrays(self) -> dict[str, np.ndarray]:
        return _to_arrays(self.together)

    def _restore(self, arrays: dict[str, np.ndarray]) -> None:
        self.together = _from_arrays(arrays)


class NeighbourSum(Neighbours):
    """Text neighbours and co-occurrence added, each scaled to its maximum: the baseline to beat."""

    name = "text + co-occurrence"

    def __init__(self, text: TextConfig | None = None, together: CoOccurrenceConfig | None = None) -> None:
        self.text = TextNeighbours(text)
        self.together = CoOccurrence(together)

    def _learn(self, interactions: Interactions, items: Items) -> None:
        self.text.fit(interactions, items)
        self.together.fit(interactions, items)

    def _evidence(self, histories: Histories) -> np.ndarray:
        return self.text._evidence(histories) + self.together._evidence(histories)

    def _settings(self) -> dict[str, Any]:
        return {"text": asdict(self.text.config), "together": asdict(self.together.config)}

    @classmethod
    def _of(cls, settings: dict[str, Any]) -> Self:
        return cls(TextConfig(**settings["text"]), CoOccurrenceConfig(**settings["together"]))

    def _arrays(self) -> dict[str, np.ndarray]:
        parts = {"text": self.text, "together": self.together}
        return {f"{part}.{name}": a for part, r in parts.items() for name, a in r._arrays().items()}

    def _restore(self, arrays: dict[str, np.ndarray]) -> None:
        for name, part in (("text", self.text), ("together", self.together)):
            part.items, part.counts = self.items, self.counts
            part._restore(
                {key.removeprefix(name + "."): a for key, a in arrays.items() if key.startswith(name)}
            )


# -- history -----------------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """What each of B users did: rows start[b]:start[b+1] are user b's, several of one item among them."""

    start: np.ndarray  # (B+1,)
    item: np.ndarray  # (T,)
    weight: np.ndarray  # (T,) float32


def recent(histories: Histories, last: int, decay: float) -> Weights:
    """decay^age of each user's events in the `last` moments."""
    age = histories.moments_ago
    keep = age < last
    weight = (decay ** age[keep]).astype(np.float32)
    start = np.concatenate([[0], np.cumsum(keep)])[histories.offsets]
    return Weights(start, histories.item[keep], weight)


# -- text --------------------------------------------------------------------------------------------------

_HEADLINES = ("title", "name", "short_text")
_DETAILS = ("brand", "brand_id", "categories", "category", "genres")


def text_template(items: Items) -> str | None:
    """The title (or name, or short_text) twice, then brand and categories: "{title} {title} {brand} {categories}".

    None, which is every text column, for a table without any such title.
    """
    columns = items.table.columns
    headline = next((name for name in _HEADLINES if name in columns), None)
    if headline is None:
        return None
    return " ".join(f"{{{name}}}" for name in (headline, headline, *(d for d in _DETAILS if d in columns)))


def _tfidf(texts: Sequence[str], config: TextConfig) -> sp.csr_matrix:
    """(N, V) float32: (1 + ln tf) · idf, rows of length 1, or 0 where no term is shared."""
    terms = TfidfVectorizer(
        ngram_range=(1, config.ngrams), min_df=config.min_df, sublinear_tf=True, dtype=np.float32
    )
    try:
        return terms.fit_transform(texts).tocsr()
    except ValueError:  # no term stands in min_df texts, so no two items are neighbours
        return sp.csr_matrix((len(texts), 1), dtype=np.float32)


# -- co-occurrence -----------------------------------------------------------------------------------------


def co_occurrence(interactions: Interactions, config: CoOccurrenceConfig) -> sp.csr_matrix:
    """(N, N) float32 sparse: how strongly the row's item calls for the column's.

    Pair (i, j) sums, over all pairs of events of one user at most `window` moments apart, 1 / distance
    where j is not before i, `backward` / distance where it is. Column j is scaled by 1 / √(its sum + shrink);
    of each row the `neighbours` strongest are kept.
    """
    log = _index(interactions, config.window)
    sums, kept = _column_sums(log, config.backward, config.neighbours)
    scale = 1 / np.sqrt(sums + config.shrink)
    offsets = np.concatenate([[0], np.cumsum(kept)])
    index, value = _strongest(log, config.backward, scale, offsets, tie_order(len(sums)))
    together = sp.csr_matrix((value, index, offsets), shape=(len(sums), len(sums)))
    together.sort_indices()
    return together


class _Log(NamedTuple):
    """A log as the kernels below read it. E events in M moments, both by (user, time)."""

    item: np.ndarray  # (E,)
    moment: np.ndarray  # (E,) each event's
    start: np.ndarray  # (M+1,) rows start[m]:start[m+1] are moment m
    low: np.ndarray  # (M,) moments low[m]:high[m] are those of the same user in reach of m
    high: np.ndarray  # (M,)
    event: np.ndarray  # (E,) all events by item
    of_item: np.ndarray  # (N+1,) event[of_item[i]:of_item[i+1]] are those of item i


def _index(interactions: Interactions, window: int) -> _Log:
    first = moment_starts(interactions)
    start = np.append(first, len(interactions))
    moment = np.arange(len(first))
    user = interactions.user[first]
    event = np.argsort(interactions.item, kind="stable")
    return _Log(
        interactions.item,
        np.repeat(moment, np.diff(start)),
        start,
        np.maximum(moment - window, np.searchsorted(user, user)),
        np.minimum(moment + window + 1, np.searchsorted(user, user, side="right")),
        event,
        np.searchsorted(interactions.item[event], np.arange(len(interactions.items) + 1)),
    )


@njit(cache=True)
def _pairs(log: _Log, item: int, backward: float, row: np.ndarray, touched: np.ndarray) -> int:
    """Add the pairs (item, j) to row[j], which was 0; touched[:n] lists these j. Returns n."""
    n = 0
    for event in log.event[log.of_item[item] : log.of_item[item + 1]]:
        here = log.moment[event]
        for there in range(log.low[here], log.high[here]):
            weight = 1.0 / max(abs(there - here), 1) * (backward if there < here else 1.0)
            for other in range(log.start[there], log.start[there + 1]):
                if other != event and weight > 0:
                    j = log.item[other]
                    if row[j] == 0:
                        touched[n] = j
                        n += 1
                    row[j] += weight
    return n


@njit(cache=True)
def _column_sums(log: _Log, backward: float, neighbours: int) -> tuple[np.ndarray, np.ndarray]:
    """(N,) the sum of each column, and (N,) how many pairs of each row will be kept."""
    n_items = len(log.of_item) - 1
    sums, kept = np.zeros(n_items), np.zeros(n_items, np.int64)
    row, touched = np.zeros(n_items), np.empty(n_items, np.int64)
    for item in range(n_items):
        n = _pairs(log, item, backward, row, touched)
        for j in touched[:n]:
            sums[j] += row[j]
            row[j] = 0
        kept[item] = min(n, neighbours)
    return sums, kept


@njit(cache=True)
def _strongest(
    log: _Log, backward: float, scale: np.ndarray, offsets: np.ndarray, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The kept columns and their scaled values, row after row."""
    n_items = len(scale)
    index, value = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.float32)
    row, touched = np.zeros(n_items), np.empty(n_items, np.int64)
    for item in range(n_items):
        n = _pairs(log, item, backward, row, touched)
        columns = touched[:n]
        scaled = row[columns] * scale[columns]
        row[columns] = 0
        start, end = offsets[item], offsets[item + 1]
        if n > end - start:
            best = best_places(scaled.reshape(1, n), end - start, order[columns])[0]
            columns, scaled = columns[best], scaled[best]
        index[start:end] = columns
        value[start:end] = scaled
    return index, value


# -- sparse arithmetic -------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """A sparse matrix as the kernels below read it."""

    start: np.ndarray
    column: np.ndarray
    value: np.ndarray


def _rows(matrix: sp.csr_matrix) -> _Rows:
    return _Rows(matrix.indptr, matrix.indices, matrix.data)


@njit(cache=True, nogil=True)
def _add(start: np.ndarray, item: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
    """out[b, item] += weight, of each of user b's events."""
    for row in range(len(out)):
        for p in range(start[row], start[row + 1]):
            out[row, item[p]] += weight[p]


@njit(cache=True, nogil=True)
def _add_rows(
    start: np.ndarray, item: np.ndarray, weight: np.ndarray, matrix: _Rows, out: np.ndarray
) -> None:
    """out[b] += weight · matrix[item], of each of user b's events."""
    for row in range(len(out)):
        for p in range(start[row], start[row + 1]):
            for q in range(matrix.start[item[p]], matrix.start[item[p] + 1]):
                out[row, matrix.column[q]] += weight[p] * matrix.value[q]


@njit(cache=True, nogil=True)
def _add_through(
    start: np.ndarray,
    item: np.ndarray,
    weight: np.ndarray,
    first: _Rows,
    then: _Rows,
    width: int,
    out: np.ndarray,
) -> None:
    """out[b] += weight · first[item] · then, of each of user b's events. width: columns of `first`."""
    middle, touched = np.zeros(width, np.float32), np.empty(width, np.int64)
    for row in range(len(out)):
        n = 0
        for p in range(start[row], start[row + 1]):
            for q in range(first.start[item[p]], first.start[item[p] + 1]):
                term, value = first.column[q], weight[p] * first.value[q]
                if value == 0:  # of an age whose weight underflows: it would touch the term again and again
                    continue
                if middle[term] == 0:
                    touched[n] = term
                    n += 1
                middle[term] += value
        for term in touched[:n]:
            for q in range(then.start[term], then.start[term + 1]):
                out[row, then.column[q]] += middle[term] * then.value[q]
            middle[term] = 0


def _scaled(scores: np.ndarray) -> np.ndarray:
    """Each row divided by its maximum; rows of zeros stay."""
    top = scores.max(axis=1, initial=0, keepdims=True)
    return np.divide(scores, top, out=scores, where=top > 0)


def _to_arrays(matrix: sp.csr_matrix) -> dict[str, np.ndarray]:
    shape = np.array(matrix.shape, np.int64)
    return {"start": matrix.indptr, "index": matrix.indices, "value": matrix.data, "shape": shape}


def _from_arrays(arrays: dict[str, np.ndarray]) -> sp.csr_matrix:
    shape = tuple(arrays["shape"].tolist())
    return sp.csr_matrix((arrays["value"], arrays["index"], arrays["start"]), shape=shape)


def _require_counts(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise ConfigError(f"{name}={value}", rule=f"{name} is at least 1")


def _require_history(last: int, decay: float) -> None:
    _require_counts(last=last)
    if not 0 < decay <= 1:
        raise ConfigError(f"decay={decay}", rule="decay is more than 0 and at most 1")
