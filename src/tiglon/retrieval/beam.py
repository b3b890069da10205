"""Beam search over a trie of semantic IDs: which K items does a model that writes codes find most likely?

It knows no model. A `Step` gives the logits of the next code for every beam; the trie says which codes
exist there; what comes out is always real, never twice, and scored by its log-probability.

Two conventions, which rank differently (`renormalise`):
  mask only              log p(item) = Σ log softmax over all V codes; codes that do not exist are
                         dropped, and their probability is lost.
  mask and renormalise   the softmax at each node runs over the codes that exist there, so that the
                         probabilities of all items sum to one.

Sampling is stochastic beam search (Kool et al. 2019, https://arxiv.org/abs/1903.06059, Algorithm 1):
Gumbel noise, drawn top-down, makes the beam a sample *without replacement* from the model.

Letters: B users, W beams, V codes of a position, S positions, K candidates.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numba
import numpy as np

from tiglon.errors import ConfigError
from tiglon.semantic_ids.trie import Trie
from tiglon.types import MISSING, Candidates, Histories


class Step(Protocol):
    def __call__(self, depth: int, beam: np.ndarray | None, code: np.ndarray | None) -> np.ndarray:
        """Logits (B, W, V) float32 of position `depth`.

        beam (B, W): which of the last call's beams each one goes on from; code (B, W): by which code.
        At depth 0 both are None, and W is 1.
        """
        ...


def beam_search(
    step: Step,
    trie: Trie,
    users: int,
    k: int,
    *,
    width: int,
    codes: np.ndarray | None = None,
    seen: Histories | None = None,
    deny: np.ndarray | None = None,
    renormalise: bool = True,
    temperature: float = 1.0,
    seed: int | None = None,
    source: str = "beam",
) -> Candidates:
    """The k most likely items for each of B users, by beams of `width` (at least k).

    seen: items that a user must not get.   deny: (N,) bool, items that nobody may get.   codes: (N, S), those of
        all items, for both. A prefix is closed, too, once a user can get nothing below it, so that no beam
        is lost on it. Probabilities stay.
    temperature: divides the logits.   seed: sample rather than search.
    """
    if width < k:
        raise ConfigError(f"a beam of {width} for {k} items", rule="The beam is at least k wide")
    if not 0 < np.float32(temperature) < np.inf:
        raise ConfigError(f"a temperature of {temperature}", rule="A temperature is finite and above 0")
    if not len(trie):
        return Candidates(np.full((users, k), MISSING), np.full((users, k), -np.inf, np.float32), source)
    if codes is None and (seen is not None or deny is not None):
        raise ConfigError("seen or denied items without codes", fix="Pass the codes (N, S) of all items")
    barred = barred_nodes(trie, users, codes, seen, deny)
    random = np.random.default_rng(seed)
    node = np.full((users, 1), trie.root, np.int64)
    score = np.zeros((users, 1))  # log-probability of the prefix
    key = np.zeros((users, 1))  # what beams are ranked by: the score, perturbed when sampling
    beam = code = None
    for depth in range(trie.depth):
        logits = np.ascontiguousarray(step(depth, beam, code), np.float32)
        if temperature != 1.0:
            logits = logits / np.float32(temperature)
        offsets, code_of, children = trie.children(node.ravel(), depth)
        total = np.empty((0, 0)) if renormalise else _log_sum_exp(logits)
        noise = random.gumbel(size=len(code_of)) if seed is not None else np.empty(0)
        beam, code, node, score, key = _select(
            logits, total, node, score, key, offsets, code_of, children, noise, *barred[depth], width
        )
        used = max(1, int((key > -np.inf).sum(axis=1).max(initial=1)))
        beam, code, node, score, key = (
            np.ascontiguousarray(x[:, :used]) for x in (beam, code, node, score, key)
        )
    return _candidates(trie, node, score, key, k, source)


def _candidates(
    trie: Trie, node: np.ndarray, score: np.ndarray, key: np.ndarray, k: int, source: str
) -> Candidates:
    node, score, key = node[:, :k], score[:, :k], key[:, :k]  # best by key first, as `_select` leaves them
    real = key > -np.inf
    item = np.full((len(node), k), MISSING, np.int64)
    value = np.full((len(node), k), -np.inf, np.float32)
    found = np.where(real, trie.item(np.where(real, node, 0).ravel()).reshape(node.shape), MISSING)
    score = np.where(real, score, -np.inf)
    order = np.argsort(-score, axis=1, kind="stable")
    item[:, : node.shape[1]] = np.take_along_axis(found, order, axis=1)
    value[:, : node.shape[1]] = np.take_along_axis(score, order, axis=1)
    return Candidates(item, value, source)


class Barred(NamedTuple):
    """What is closed at one depth. Nodes ascend.

    offsets: (B+1,) of node: (n,), those that are closed to each user.
    common: (m,) nodes that are closed to everybody, or those alone that are open, with `only`.
    """

    offsets: np.ndarray
    node: np.ndarray
    common: np.ndarray
    only: bool


def barred_nodes(
    trie: Trie, users: int, codes: np.ndarray | None, seen: Histories | None, deny: np.ndarray | None
) -> list[Barred]:
    """For each depth 1 … S, the nodes below which there is nothing that a user may get. Arguments as in `beam_search`."""
    codes = np.empty((0, trie.depth), np.int64) if codes is None else np.asarray(codes)
    owner = had = listed = np.empty(0, np.int64)
    if seen is not None and len(seen.item):
        owner, had = np.unique(np.stack([seen.owner, seen.item]), axis=1)
    only = deny is not None and 2 * deny.sum() > len(deny)
    if deny is not None:
        owner, had = owner[~deny[had]], had[~deny[had]]
        listed = np.flatnonzero(~deny if only else deny)
    alive = trie.find(codes[had]) >= 0  # of two with the same prefix one may have been removed
    owner, had = owner[alive], had[alive]
    listed = listed[trie.find(codes[listed]) >= 0]
    levels = []
    for depth in range(1, trie.depth + 1):
        node, count = np.unique(trie.find(codes[listed, :depth]), return_counts=True)
        pairs, times = np.unique(
            np.stack([owner, trie.find(codes[had, :depth])], axis=1), axis=0, return_counts=True
        )
        below = _look_up(node, count, pairs[:, 1])
        shut = pairs[times == (below if only else trie.count(pairs[:, 1], depth) - below)]
        common = node if only else node[count == trie.count(node, depth)]
        levels.append(
            Barred(np.searchsorted(shut[:, 0], np.arange(users + 1)), shut[:, 1].copy(), common, only)
        )
    return levels


def _look_up(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The value of each asked (n,), 0 for one that is not among the ascending keys (m,)."""
    if not len(keys):
        return np.zeros(len(asked), np.int64)
    at = np.searchsorted(keys, asked).clip(max=len(keys) - 1)
    return np.where(keys[at] == asked, values[at], 0)


def _log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """(B, W) in float64."""
    top = logits.max(axis=-1)
    return top + np.log(np.exp(logits - top[..., None]).sum(axis=-1, dtype=np.float64))


@numba.njit(cache=True)
def _select(  # type: ignore[no-untyped-def]
    logits, total, node, score, key, offsets, codes, children, noise, shut_offsets, shut, common, only, width
):
    """The `width` best continuations of each user's beams, best first; key −inf where there are fewer.

    A min-heap of the best so far a user; equal keys keep the earlier beam, then the smaller code.
    """
    users, beams = node.shape
    out_beam = np.zeros((users, width), np.int64)
    out_code = np.zeros((users, width), np.int64)
    out_node = np.zeros((users, width), np.int64)
    out_score = np.full((users, width), -np.inf)
    out_key = np.full((users, width), -np.inf)
    heap_key = np.empty(width)
    heap_at = np.empty(width, np.int64)  # where the continuation stands among all of this user's
    for b in range(users):
        first = offsets[b * beams]
        count = offsets[(b + 1) * beams] - first
        values = np.full(count, -np.inf)
        keys = np.full(count, -np.inf)
        owner = np.empty(count, np.int64)
        for w in range(beams):
            low, high = offsets[b * beams + w], offsets[b * beams + w + 1]
            owner[low - first : high - first] = w
            if key[b, w] == -np.inf:
                continue
            row = logits[b, w]
            if len(total):
                norm = total[b, w]
            else:
                top = -np.inf
                for j in range(low, high):
                    top = max(top, row[codes[j]])
                norm = 0.0
                for j in range(low, high):
                    norm += np.exp(row[codes[j]] - top)
                norm = top + np.log(norm)
            best = -np.inf
            for j in range(low, high):
                values[j - first] = score[b, w] + row[codes[j]] - norm
                keys[j - first] = values[j - first]
                if len(noise):
                    keys[j - first] += noise[j]
                    best = max(best, keys[j - first])
            if len(noise):  # condition the children's largest key on the parent's (Kool et al., eq. 6–8)
                for j in range(low - first, high - first):
                    gap = key[b, w] - keys[j] + np.log1p(-np.exp(keys[j] - best))
                    keys[j] = key[b, w] - max(0.0, gap) - np.log1p(np.exp(-abs(gap)))
            for j in range(low, high):
                at = np.searchsorted(common, children[j])
                if (at < len(common) and common[at] == children[j]) != only:
                    keys[j - first] = -np.inf
                at = np.searchsorted(shut[shut_offsets[b] : shut_offsets[b + 1]], children[j])
                if shut_offsets[b] + at < shut_offsets[b + 1] and shut[shut_offsets[b] + at] == children[j]:
                    keys[j - first] = -np.inf
        size = 0
        for j in range(count):
            new = keys[j]
            if new == -np.inf or (size == width and new <= heap_key[0]):
                continue
            if size < width:
                at = size
                size += 1
                while at > 0 and heap_key[(at - 1) // 2] >= new:
                    heap_key[at], heap_at[at] = heap_key[(at - 1) // 2], heap_at[(at - 1) // 2]
                    at = (at - 1) // 2
            else:
                at = 0
                while 2 * at + 1 < size:
                    child = 2 * at + 1
                    if child + 1 < size and (
                        heap_key[child + 1] < heap_key[child]
                        or (heap_key[child + 1] == heap_key[child] and heap_at[child + 1] > heap_at[child])
                    ):
                        child += 1
                    if heap_key[child] >= new:
                        break
                    heap_key[at], heap_at[at] = heap_key[child], heap_at[child]
                    at = child
            heap_key[at], heap_at[at] = new, j
        kept = np.sort(heap_at[:size])
        order = np.argsort(-keys[kept], kind="mergesort")
        for w in range(size):
            j = kept[order[w]]
            out_beam[b, w] = owner[j]
            out_code[b, w] = codes[first + j]
            out_node[b, w] = children[first + j]
            out_score[b, w] = values[j]
            out_key[b, w] = keys[j]
        for w in range(size, width):  # a place to stand for beams that are not there
            out_node[b, w] = out_node[b, 0] if size else children[first]
    return out_beam, out_code, out_node, out_score, out_key
