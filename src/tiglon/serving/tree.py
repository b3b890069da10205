"""Semantic IDs, to be looked at: the tree that they make, and the way of TIGER's beam through it.

Letters: W beams, V codes of a position, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tiglon.errors import ConfigError, UnknownIdError
from tiglon.retrieval.beam import beam_search
from tiglon.serving.catalogue import Catalogue
from tiglon.serving.messages import BeamPrefix, TreeChild, TreeItem, TreeResponse
from tiglon.types import MISSING, Histories

_EXAMPLES = 3  # items shown of a node


def node_of(catalogue: Catalogue, prefix: Sequence[int]) -> TreeResponse:
    """A node, its children, and some items below each. Raises ConfigError, UnknownIdError."""
    ids, depth = catalogue.bundle.tiger.ids, len(prefix)
    if depth > len(ids.sizes):
        raise ConfigError(f"a prefix of {depth} codes", rule=f"An ID has {len(ids.sizes)}")
    under = (ids.codes[:, :depth] == np.asarray(prefix, np.int64)).all(axis=1)
    below = np.flatnonzero(catalogue.alive & under)
    if not len(below):
        raise UnknownIdError(
            f"the prefix {list(prefix)}", rule="No item is below it", fix="Begin at the root, []"
        )
    children = []
    if depth < len(ids.sizes):
        code = ids.codes[below, depth]
        for value in np.unique(code):
            items = below[code == value]
            shown = items[:_EXAMPLES]
            names = zip(catalogue.items.decode(shown), catalogue.describe(shown), strict=True)
            examples = [TreeItem(item_id=raw, text=text) for raw, text in names]
            children.append(TreeChild(code=int(value), count=len(items), items=examples))
    return TreeResponse(
        bundle=catalogue.bundle.version,
        prefix=list(prefix),
        depth=len(ids.sizes),
        count=len(below),
        children=children,
    )


def beam_of(catalogue: Catalogue, life: Histories, k: int, *, exclude_seen: bool) -> list[list[BeamPrefix]]:
    """For each depth the prefixes that TIGER's beam kept for one life, best first, at most k."""
    tiger = catalogue.bundle.tiger
    watch = _Watch(tiger._step(life), tiger.trie, tiger.config.renormalise)
    found = beam_search(
        watch,
        tiger.trie,
        1,
        min(k, len(tiger.trie)),
        width=max(k, tiger.config.beams),
        codes=tiger.ids.codes,
        seen=life if exclude_seen else None,
        renormalise=tiger.config.renormalise,
    )
    item = found.item[0][found.item[0] != MISSING]
    depths = [*watch.kept, [(tiger.ids.codes[i], s) for i, s in zip(item, found.score[0], strict=False)]]
    return [_shown(catalogue, sorted(kept, key=lambda p: -p[1])[:k]) for kept in depths]


class _Watch:
    """TIGER's step, noting the prefixes that each step goes on from."""

    def __init__(self, step: Any, trie: Any, renormalise: bool) -> None:
        self.step, self.trie, self.renormalise = step, trie, renormalise
        self.kept: list[list[tuple[np.ndarray, float]]] = []
        self._prefix, self._score = np.empty((1, 0), np.int64), np.zeros(1)
        self._log_p = np.empty((1, 0))

    def __call__(self, depth: int, beam: np.ndarray | None, code: np.ndarray | None) -> np.ndarray:
        if beam is not None and code is not None:
            self._score = self._score[beam[0]] + self._log_p[beam[0], code[0]]
            self._prefix = np.concatenate([self._prefix[beam[0]], code[0][:, None]], axis=1)
            self.kept.append(list(zip(self._prefix, self._score.tolist(), strict=True)))
        logits = self.step(depth, beam, code)
        self._log_p = self._normalised(logits[0], depth)
        return logits

    def _normalised(self, logits_WV: np.ndarray, depth: int) -> np.ndarray:
        """(W, V) log-probabilities of the next codes; −inf for those that do not exist."""
        nodes = self.trie.find(self._prefix)
        offsets, codes, _ = self.trie.children(nodes, depth)
        there = np.zeros(logits_WV.shape, bool)
        there[np.repeat(np.arange(len(nodes)), np.diff(offsets)), codes] = True
        counted = np.where(there | (not self.renormalise), logits_WV.astype(np.float64), -np.inf)
        top = counted.max(axis=1, keepdims=True)
        log_p = counted - top - np.log(np.exp(counted - top).sum(axis=1, keepdims=True))
        return np.where(there, log_p, -np.inf)


def _shown(catalogue: Catalogue, kept: Sequence[tuple[np.ndarray, float]]) -> list[BeamPrefix]:
    trie = catalogue.bundle.tiger.trie
    first = [trie.below(trie.find(prefix[None])[0], len(prefix))[0] for prefix, _ in kept]
    texts = catalogue.describe(np.array(first, np.int64))
    return [
        BeamPrefix(prefix=prefix.tolist(), score=float(score), example=text)
        for (prefix, score), text in zip(kept, texts, strict=True)
    ]
