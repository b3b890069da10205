"""Vectors of code prefixes: what is common, what is particular, and what the item says of itself.

    vector of (c_1 … c_s)  =  vector of c_s at position s  +  own vector of the prefix  +  content of the prefix

The own vector remembers what is particular, down to the item itself; every prefix of a trained item has
one, beginning at zero. Content is the mean item vector below the prefix less that of the prefix one code
shorter, through one learned projection: along an item's path the parts add up to its own projected vector.
So what the projection learns from items with many events holds for those with few, and for one that
arrives tomorrow, whose own vectors are the mean of those that are known.

Letters: N items, S code positions, V codes a position, C width of item vectors, D width, R prefixes (rows).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor, nn

QUIET = 0.1  # size of a code's first random vector where content speaks from the start


class Prefixes(nn.Module):
    """sizes: codes at each of the S positions.   codes: (N, S) of the trained items; None for no vectors of
    prefixes.   vectors: (N, C) of the same items, or None for no content.
    content_width: C where the content is to come from a file rather than from `vectors`.

    Row 0 is for prefixes that no trained item has; rows 1 … V are the first codes.
    """

    def __init__(
        self,
        sizes: tuple[int, ...],
        width: int,
        codes: np.ndarray | None = None,
        vectors: np.ndarray | None = None,
        content_width: int = 0,
    ) -> None:
        super().__init__()
        self.sizes = sizes
        content_width = content_width if vectors is None or codes is None else vectors.shape[1]
        self.offsets = [sum(sizes[1:s]) for s in range(len(sizes))]  # of a position's codes in `code`
        self.keys, self.rows, paths = _number(codes, sizes)
        count = 1 + sizes[0] + sum(map(len, self.keys))
        self.code = nn.Embedding(sum(sizes[1:]), width)
        self.own = nn.Embedding(count, width)
        std = (QUIET if content_width else 1.0) * width**-0.5
        nn.init.normal_(self.code.weight, std=std)
        nn.init.zeros_(self.own.weight)
        nn.init.normal_(self.own.weight[1 : 1 + sizes[0]], std=std)
        self.content: Tensor | None = None  # (R, C), while learning
        self.projected: Tensor | None  # (R, D), content through the projection, while answering
        self.register_buffer("projected", torch.zeros(count, width) if content_width else None)
        if content_width:
            self.project = nn.Parameter(torch.zeros(content_width, width))
            self.mean: Tensor
            self.register_buffer("mean", torch.zeros(content_width))
        if codes is not None and vectors is not None:
            self.mean += torch.from_numpy(mean_vector(vectors))
            content = centred(vectors, self.mean.numpy())
            self.content = torch.from_numpy(_residual_means(content, paths, count))
            with torch.no_grad():  # at first, products are those of the item vectors
                self.project.copy_(torch.from_numpy(principal_axes(content, width)))
        self._vectors: list[Tensor] = []  # of the parameters as they are; a list, as it is no state
        self._pairs: list[Tensor] = []  # the same
        self._place: list[Tensor] = []  # (R,) of each row in `_vectors` while some are held

    # -- vectors -------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Prefixes:
        """As torch's; entering evaluation fixes the projected content."""
        if not mode and self.content is not None:
            with torch.no_grad():
                self.projected = self.content @ self.project
        self.forget()
        return super().train(mode)

    def forget(self) -> None:
        """The parameters changed."""
        self._vectors, self._pairs, self._place = [], [], []

    @contextmanager
    def holding(self, codes: Tensor, pairs: bool) -> Iterator[None]:
        """Inside, only the vectors exist that items of these codes (…, S) read, or are told apart by, and those
        of all `pairs`: only the cost changes. The gradient of a look-up is as large as its table, and a step
        makes many."""
        self.forget()
        path = self.nodes(codes)
        held = [torch.arange(1 + self.sizes[0])]
        for s in range(1, len(self.sizes)):
            parents = held[0] if s == 1 and pairs else path[..., s - 1].unique()
            child, _ = self._children(parents[parents > 0], s)
            held.append(self.rows[s - 1][child])
        row = torch.cat(held)
        self._vectors = [self._made(row)]
        self._place = [torch.zeros(len(self.own.weight), dtype=torch.int64)]
        self._place[0][row] = torch.arange(len(row))
        try:
            yield
        finally:
            self.forget()

    def _children(self, row: Tensor, s: int) -> tuple[Tensor, Tensor]:
        """Of prefixes of s codes (T,): where their children stand in `keys` and `rows` of s − 1, and whose each is."""
        low, high = (torch.searchsorted(self.keys[s - 1], (row + more) * self.sizes[s]) for more in (0, 1))
        count = torch.where(row > 0, high - low, 0)
        owner = torch.repeat_interleave(torch.arange(len(count)), count)
        return torch.arange(len(owner)) + (low - (count.cumsum(0) - count))[owner], owner

    def _of(self, row: Tensor) -> Tensor:
        """Rows (…) → (…, D)."""
        return F.embedding(self._place[0][row] if self._place else row, self.vectors())

    def vectors(self) -> Tensor:
        """(R, D) own vectors with content; those of the last position's code are not in them."""
        if not self._vectors:
            self._vectors = [self._made(slice(None))]
        return self._vectors[0]

    def _made(self, row: Tensor | slice) -> Tensor:
        """(R, D) vectors of rows, afresh."""
        own = self.own.weight[row] if isinstance(row, slice) else self.own(row)
        if self.training and self.content is not None:
            own = own + self.content[row] @ self.project
        elif self.projected is not None:
            own = own + self.projected[row]
        return own.float()

    def pairs(self) -> Tensor:
        """(P, D) vectors of the first two codes together, of each pair that exists."""
        if not self._pairs:
            first, second = self.keys[0] // self.sizes[1], self.keys[0] % self.sizes[1]
            self._pairs = [self._of(first) + self._of(self.rows[0]) + self.code(second)]
        return self._pairs[0]

    def nodes(self, codes: Tensor) -> Tensor:
        """(…, s) codes → (…, s) rows of their prefixes; 0 where no trained item has it."""
        row = codes[..., 0] + 1
        rows = [row]
        for s in range(1, codes.shape[-1]):
            keys = self.keys[s - 1]
            key = row * self.sizes[s] + codes[..., s]
            if len(keys):
                at = torch.searchsorted(keys, key).clamp(max=len(keys) - 1)
                row = torch.where((keys[at] == key) & (row > 0), self.rows[s - 1][at], 0)
            else:
                row = torch.zeros_like(row)
            rows.append(row)
        return torch.stack(rows, dim=-1)

    def forward(self, codes: Tensor) -> Tensor:
        """(…, s) codes of the first s positions → (…, s, D) vectors of the prefixes that end there."""
        own = self._of(self.nodes(codes))
        if codes.shape[-1] == 1:
            return own
        offsets = torch.tensor(self.offsets[1 : codes.shape[-1]])
        return own + F.pad(self.code(codes[..., 1:] + offsets), (0, 0, 1, 0))

    # -- logits --------------------------------------------------------------------------------

    def logits(self, x_TD: Tensor, before: Tensor) -> Tensor:
        """(T, V) products of states with the vectors of each code after `before` (T, s)."""
        s = before.shape[1]
        vectors = self.vectors()
        if s == 0:
            return (x_TD @ vectors[1 : 1 + self.sizes[0]].T).float()
        own = self.code.weight[self.offsets[s] : self.offsets[s] + self.sizes[s]]
        logits = x_TD @ own.T
        keys = self.keys[s - 1]
        child, owner = self._children(self.nodes(before)[:, -1], s)
        row, code = self.rows[s - 1][child], keys[child] % self.sizes[s]
        if not torch.is_grad_enabled():
            row = self._place[0][row] if self._place else row
            logits = logits.float().contiguous()
            parts = (x_TD.float().contiguous(), vectors, owner, code, row)
            _add_products(logits.numpy(), *(part.detach().numpy() for part in parts))
            return logits
        product = (x_TD[owner] * self._of(row)).sum(dim=-1)
        return logits.index_put((owner, code), product.to(logits.dtype), accumulate=True).float()

    def first_logits(self, x_TD: Tensor) -> Tensor:
        """(T, V) of the first code: log of what its pairs with a second code have together.

        With these, p(c_1)·p(c_2 | c_1) is one softmax over all pairs: a first code is as likely as the
        items below it make it, rather than as their mean vector does. One without pairs has its own product.
        """
        alone_TV = (x_TD @ self.vectors()[1 : 1 + self.sizes[0]].T).float()
        # Pairs come first, so that those of one code are added up row by row, and so are their gradients.
        logits_PT = (self.pairs() @ x_TD.T).float()
        top_T = logits_PT.detach().amax(dim=0)
        first_P = self.keys[0] // self.sizes[1] - 1
        mass_VT = torch.zeros_like(alone_TV.T).index_add(0, first_P, (logits_PT - top_T).exp())
        together_TV = (mass_VT.clamp(min=1e-30).log() + top_T).T
        paired_V = torch.zeros(self.sizes[0], dtype=torch.bool).index_fill(0, first_P, True)
        return torch.where(paired_V, together_TV, alone_TV)

    # -- items that arrive later -----------------------------------------------------------------

    @torch.no_grad()
    def extended(self, codes: np.ndarray, vectors: np.ndarray | None) -> Prefixes:
        """These with rows for the new prefixes of new items (M, S): content from `vectors` (M, C), and as own vectors
        the means of their length, in which a softmax has put that most prefixes are wanted little (`ItemTower.add`).
        Rows are numbered in the order of the items, so all at once or one by one is the same.
        """
        count, width = self.own.weight.shape
        projected = self.projected if vectors is not None else None
        goal = torch.zeros(len(codes), width)
        if projected is not None and vectors is not None:
            goal = torch.from_numpy(centred(vectors, self.mean.numpy())) @ self.project
        known = [
            dict(zip(keys.tolist(), rows.tolist(), strict=True))
            for keys, rows in zip(self.keys, self.rows, strict=True)
        ]
        mean = [mean_row(self.own.weight[rows]) if len(rows) else torch.zeros(width) for rows in self.rows]
        content, own = [torch.zeros(width)][:0], [self.own.weight]
        for item, rest in zip(codes.tolist(), goal, strict=True):
            row = item[0] + 1
            for s, code in enumerate(item):
                if s:
                    key = row * self.sizes[s] + code
                    row = known[s - 1].setdefault(key, count + len(content))
                    if row == count + len(content):
                        content.append(rest)
                        own.append(mean[s - 1][None])
                if projected is not None:
                    rest = rest - (projected[row] if row < count else content[row - count])
        more = torch.stack(content) if content else torch.zeros(0, width)
        new = copy.copy(self)
        new._parameters, new._buffers = dict(self._parameters), dict(self._buffers)
        new._modules = dict(self._modules)
        ordered = [sorted(mapping.items()) for mapping in known]
        new.keys = [torch.tensor([key for key, _ in pairs], dtype=torch.int64) for pairs in ordered]
        new.rows = [torch.tensor([row for _, row in pairs], dtype=torch.int64) for pairs in ordered]
        new.own = nn.Embedding.from_pretrained(torch.cat(own), freeze=False)
        new.projected = None if self.projected is None else torch.cat([self.projected, more])
        new.content = None  # from here on it is fixed
        new.forget()
        return new


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _add_products(
    logits: np.ndarray,
    x: np.ndarray,
    vectors: np.ndarray,
    owner: np.ndarray,
    code: np.ndarray,
    row: np.ndarray,
) -> None:
    """logits[owner, code] += x[owner] · vectors[row], without the copies of both that torch would gather."""
    for i in range(len(owner)):
        own, vector, product = x[owner[i]], vectors[row[i]], np.float32(0)
        for d in range(len(own)):
            product += own[d] * vector[d]
        logits[owner[i], code[i]] += product


def mean_row(vectors: Tensor) -> Tensor:
    """(D,) of vectors (N, D), N above 0: with copies of it added, it is the same to the last bit."""
    return vectors.mean(dim=0, dtype=torch.float64).to(vectors.dtype)


def mean_vector(vectors: np.ndarray) -> np.ndarray:
    """(C,) float32 of vectors (N, C), N above 0."""
    mean: np.ndarray = vectors.mean(axis=0, dtype=np.float64)
    return mean.astype(np.float32)


def centred(vectors: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """(N, C) float32 less the mean (C,), each of length 1; what is not told from the mean by more than rounding is
    shorter, down to 0. The same for vectors of any unit.
    """
    rounding = 1e-6 * (np.abs(vectors).max(axis=1, keepdims=True, initial=0) + np.abs(mean).max(initial=0))
    vectors = vectors - mean
    largest = np.abs(vectors).max(axis=1, keepdims=True, initial=0)
    vectors = vectors / np.maximum(np.maximum(largest, rounding), np.finfo(np.float32).tiny)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(length, 1)).astype(np.float32)


def principal_axes(vectors: np.ndarray, width: int) -> np.ndarray:
    """(C, width): the first principal axes of vectors (N, C) as columns; zeros where there are fewer."""
    _, _, axes = np.linalg.svd(vectors.T @ vectors)
    axes = axes[:width].T
    padded = np.pad(axes, ((0, 0), (0, width - axes.shape[1])))
    return np.ascontiguousarray(padded, np.float32)


def _number(
    codes: np.ndarray | None, sizes: tuple[int, ...]
) -> tuple[list[Tensor], list[Tensor], np.ndarray]:
    """For each length 2 … S: keys of the prefixes, ascending, and their rows; and rows (N, S) of each item.

    A key is the row of the prefix one code shorter · V + code.
    """
    if codes is None:
        empty = torch.empty(0, dtype=torch.int64)
        return [empty for _ in sizes[1:]], [empty for _ in sizes[1:]], np.empty((0, len(sizes)), np.int64)
    row, count = codes[:, 0].astype(np.int64) + 1, 1 + sizes[0]
    keys, rows, paths = [], [], [row]
    for s, size in enumerate(sizes[1:], start=1):
        distinct, at = np.unique(row * size + codes[:, s], return_inverse=True)
        keys.append(torch.from_numpy(distinct))
        rows.append(torch.arange(count, count + len(distinct)))
        row, count = count + at.ravel(), count + len(distinct)
        paths.append(row)
    return keys, rows, np.stack(paths, axis=1)


def _residual_means(vectors: np.ndarray, paths: np.ndarray, count: int) -> np.ndarray:
    """(R, C): the mean vector of the items below each prefix, less that of the prefix one code shorter."""
    means = np.zeros((count, vectors.shape[1]), np.float32)
    residual = np.zeros_like(means)
    parent = np.zeros_like(vectors)
    for rows in paths.T:
        np.add.at(means, rows, vectors)
        means[rows] /= np.bincount(rows, minlength=count)[rows][:, None]
        residual[rows] = means[rows] - parent
        parent = means[rows]
    return residual
