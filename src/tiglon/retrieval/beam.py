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

from typing import Protocol

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
    seen: Histories | None = None,
    seen_codes: np.ndarray | None = None,
    renormalise: bool = True,
    temperature: float = 1.0,
    seed: int | None = None,
    source: str = "beam",
) -> Candidates:
    """The k most likely items for each of B users, by beams of `width` (at least k).

    seen, seen_codes: items that a user must not get, with their codes (T, S); prefixes below which a
        user has seen everything are closed too, so that no beam is lost on them. Probabilities stay.
    temperature: divides the logits.   seed: sample rather than search.
    """
    if width < k:
        raise ConfigError(f"a beam of {width} for {k} items", rule="The beam is at least k wide")
    if temperature <= 0:
        raise ConfigError(f"a temperature of {temperature}", rule="A temperature is above 0")
    closed = closed_nodes(trie, seen, seen_codes) if seen is not None and seen_codes is not None else None
    random = np.random.default_rng(seed)
    node = np.full((users, 1), trie.root, np.int64)
    score = np.zeros((users, 1))  # log-probability of the prefix
    key = np.zeros((users, 1))  # what beams are ranked by: the score, perturbed when sampling
    beam = code = None
    for depth in range(trie.depth):
        logits = np.ascontiguousarray(step(depth, beam, code), np.float32)
        if temperature != 1.0:
            logits = logits / np.float32(temperature)
        offsets, codes, children = trie.children(node.ravel(), depth)
        total = np.empty((0, 0)) if renormalise else _log_sum_exp(logits)
        noise = random.gumbel(size=len(codes)) if seed is not None else np.empty(0)
        shut = closed[depth] if closed else (np.zeros(users + 1, np.int64), np.empty(0, np.int64))
        beam, code, node, score, key = _select(
            logits, total, node, score, key, offsets, codes, children, noise, shut[0], shut[1], width
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


def closed_nodes(trie: Trie, seen: Histories, codes: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each depth 1 … S, the nodes below which a user has seen every item.

    codes: (T, S) of the T seen items. Each entry: (B+1,) offsets and (n,) ascending node handles a user.
    """
    pair = np.stack([seen.owner, seen.item], axis=1)
    first = np.unique(pair, axis=0, return_index=True)[1] if len(pair) else np.empty(0, np.int64)
    owner, codes = seen.owner[first], np.asarray(codes)[first]
    levels = []
    for depth in range(1, trie.depth + 1):
        nodes = trie.find(codes[:, :depth])
        there = nodes >= 0
        pairs, counts = np.unique(
            np.stack([owner[there], nodes[there]], axis=1).reshape(-1, 2), axis=0, return_counts=True
        )
        full = counts == trie.count(pairs[:, 1], depth)
        shut_owner, shut = pairs[full, 0], pairs[full, 1]
        levels.append((np.searchsorted(shut_owner, np.arange(len(seen) + 1)), shut))
    return levels


def _log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """(B, W) in float64."""
    top = logits.max(axis=-1)
    return top + np.log(np.exp(logits - top[..., None]).sum(axis=-1, dtype=np.float64))


@numba.njit(cache=True)
def _select(  # type: ignore[no-untyped-def]
    logits, total, node, score, key, offsets, codes, children, noise, shut_offsets, shut, width
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
