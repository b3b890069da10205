"""TIGER trained on all of a user's targets in one pass.

After: Rajput et al., "Recommender Systems with Generative Retrieval", NeurIPS 2023,
https://arxiv.org/abs/2305.05065 (`tiger_paper.py` is the paper's own architecture).

Idea. The paper encodes every prefix of a sequence again for every target. Here the encoder is causal
across items, so the states of a user's whole sequence are computed once; the decoder runs for all of
the user's targets at once, each cross-attending only to items strictly earlier than itself. A target's
loss is exactly that of its prefix encoded alone, and a new event later costs only its own position.

Deviations from the paper:
- one encoder position an item rather than one a code;
- causal across moments rather than bidirectional; events of one moment (a basket) see each other but
  no target of their own moment;
- relative biases count moments between events, so that old states never change when events arrive;
- every prefix of two or more codes that a trained item has owns a vector, added to that of its last
  code: codes say what is common, prefixes remember what is particular, down to the item itself. They
  begin at zero, and a prefix that came after training has none;
- reading and writing share these vectors, as sequential recommenders share item embeddings;
- the softmax runs over the codes that exist below the prefix, so that the probabilities of the
  catalogue's items sum to one and no capacity goes to learning which IDs exist;
- no user token (reproductions find none is better).

Letters: B users, L history, D width, S code positions, V codes a level, T targets, H heads,
K beams, M = B·K code sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiglon.nn.transformer import HIDDEN, DecoderLayer, Dropout, EncoderLayer, KeysValues


@dataclass(frozen=True)
class CausalConfig:
    width: int = 128  # paper: 128
    heads: int = 4  # paper: 6
    head_width: int = 32  # paper: 64
    hidden: int = 512  # paper: 1,024
    encoder_layers: int = 3  # paper: 4
    decoder_layers: int = 2  # paper: 4
    dropout: float = 0.3  # paper: 0.1
    distances: int = 32  # buckets of the relative bias, in moments; farther ones share the last
    prefixes: bool = True  # vectors of their own for the prefixes of trained items; paper: none


class Memory(NamedTuple):
    """What the decoder reads of B users: keys and values of each layer, and the moment of each key."""

    layers: list[KeysValues]
    moment_BK: Tensor  # −1 for the start state, later than everything for padding


class CausalTiger(nn.Module):
    """sizes: codes at each of the S positions, the collision digit last.
    codes: (N, S) IDs of the trained items, whose prefixes get vectors; None for none.
    """

    def __init__(
        self, sizes: tuple[int, ...], config: CausalConfig | None = None, codes: np.ndarray | None = None
    ) -> None:
        super().__init__()
        self.config = c = config or CausalConfig()
        self.sizes = sizes
        S = len(sizes)
        self.offsets: Tensor
        self.register_buffer("offsets", torch.tensor([sum(sizes[:s]) for s in range(S)]), persistent=False)
        self.keys = _prefix_keys(codes if c.prefixes else None, sizes)
        self.code = nn.Embedding(sum(sizes), c.width)
        self.prefix = nn.Embedding(1 + sum(map(len, self.keys)), c.width)  # row 0 is no prefix's
        self.start = nn.Parameter(torch.randn(c.width))  # state of an empty history
        self.begin = nn.Parameter(torch.randn(c.width))  # the decoder's first input
        block = (c.width, c.heads, c.head_width, c.hidden, c.dropout)
        encoder = [EncoderLayer(*block) for _ in range(c.encoder_layers)]
        self.encoder: Sequence[EncoderLayer] = nn.ModuleList(encoder)  # type: ignore[assignment]
        decoder = [DecoderLayer(*block) for _ in range(c.decoder_layers)]
        self.decoder: Sequence[DecoderLayer] = nn.ModuleList(decoder)  # type: ignore[assignment]
        self.norm_encoder = nn.RMSNorm(c.width, eps=1e-6)
        self.norm_decoder = nn.RMSNorm(c.width, eps=1e-6)
        self.bias_encoder = nn.Parameter(torch.zeros(c.distances + 1, c.heads, 1))
        self.bias_cross = nn.Parameter(torch.zeros(c.distances + 1, c.heads, S))
        self.bias_self = nn.Parameter(torch.zeros(c.heads, S, S))
        nn.init.normal_(self.code.weight, std=c.width**-0.5)
        nn.init.zeros_(self.prefix.weight)
        self.dropout = Dropout(c.dropout)

    # -- codes ↔ vectors -----------------------------------------------------------------------

    def nodes(self, codes: Tensor) -> Tensor:
        """(…, s) codes → (…, s) rows of `prefix` for each prefix; 0 where no trained item has it."""
        rows = [torch.zeros_like(codes[..., 0])]  # a first code has no vector beside its own
        index, below = codes[..., 0] + 1, 1  # number of the prefix among those of its length, from 1
        for s, keys in enumerate(self.keys[: codes.shape[-1] - 1], start=1):
            key = index * self.sizes[s] + codes[..., s]
            at = torch.searchsorted(keys, key).clamp(max=max(len(keys) - 1, 0))
            known = (keys[at] == key) & (index > 0) if len(keys) else torch.zeros_like(key, dtype=torch.bool)
            index = torch.where(known, at + 1, 0)
            rows.append(torch.where(known, below + at, 0))
            below += len(keys)
        return torch.stack(rows, dim=-1)

    def embed(self, codes: Tensor) -> Tensor:
        """(…, s) codes of the first s positions → (…, s, D), entries of about unit size."""
        vectors = self.code(codes + self.offsets[: codes.shape[-1]]) + self.prefix(self.nodes(codes))
        return vectors * self.config.width**0.5

    def logits(self, x_TD: Tensor, before: Tensor) -> Tensor:
        """(T, V) of the code after `before` (T, s), from the decoder's state: products with its vector."""
        s = before.shape[1]
        offset = int(self.offsets[s])
        logits = x_TD @ self.code.weight[offset : offset + self.sizes[s]].T
        if s == 0 or not len(self.keys[s - 1]):
            return logits.float()
        keys, first = self.keys[s - 1], 1 + sum(map(len, self.keys[: s - 1]))
        row = self.nodes(before)[:, -1] - (1 + sum(map(len, self.keys[: s - 2]))) if s > 1 else before[:, 0]
        index = torch.where(row < 0, 0, row + 1)  # of the prefix `before`; 0 has no children
        low, high = (torch.searchsorted(keys, (index + more) * self.sizes[s]) for more in (0, 1))
        count = torch.where(index > 0, high - low, 0)
        owner = torch.repeat_interleave(torch.arange(len(count)), count)
        child = torch.arange(len(owner)) + (low - (count.cumsum(0) - count))[owner]
        own = (x_TD[owner] * self.prefix.weight[first + child]).sum(dim=-1)
        at = (owner, keys[child] % self.sizes[s])
        return logits.index_put(at, own.to(logits.dtype), accumulate=True).float()

    @staticmethod
    def windows(offsets: np.ndarray, moment: np.ndarray, window: int) -> np.ndarray:
        """Rows (start, stop, first target) of a log: whole lives, or overlapping halves of long ones.

        Every event is a target once, the first of a life too (from the start state alone); in a life
        longer than `window` it has at least half a window before it.
        """
        half = max(window // 2, 1)
        length = np.diff(offsets)
        pieces = np.where(length > 2 * half, -(-length // half) - 1, (length > 0).astype(np.int64))
        life = np.repeat(np.arange(len(length)), pieces)
        number = np.arange(len(life)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        start = offsets[life] + number * half
        stop = np.minimum(start + 2 * half, offsets[life + 1])
        return np.stack([start, stop, np.where(number > 0, start + half, start)], axis=1)

    # -- relative biases -----------------------------------------------------------------------

    def bucket(self, distance: Tensor) -> Tensor:
        """Moments back → bucket: exact up to half of the buckets, then logarithmic, doubling every
        sixth of the rest."""
        half = self.config.distances // 2
        far = half + (torch.log2(distance.clamp(min=1) / half) * half / 3).long()
        return torch.where(distance < half, distance.clamp(min=0), far.clamp(half, self.config.distances - 1))

    def relative(self, table: Tensor, query_BQ: Tensor, key_BK: Tensor, *, own: bool) -> Tensor:
        """Bias (B, H, Q·q, K) of a table (buckets, H, q) between moments.

        −inf on keys later than the query and, unless `own`, on those of its own moment. The start
        state (moment −1) has a bucket of its own and is always seen. B is 1 where all users agree.
        """
        if (query_BQ == query_BQ[:1]).all() and (key_BK == key_BK[:1]).all():
            query_BQ, key_BK = query_BQ[:1], key_BK[:1]
        distance = query_BQ[:, :, None] - key_BK[:, None, :]
        start = (key_BK < 0)[:, None, :]
        hidden = (distance < 0 if own else distance <= 0) & ~start
        bias = table[torch.where(start, self.config.distances, self.bucket(distance))]
        bias_BQKHq = bias.masked_fill(hidden[..., None, None], HIDDEN)
        return bias_BQKHq.permute(0, 3, 1, 4, 2).flatten(2, 3)

    # -- history → memory ----------------------------------------------------------------------

    def encode(self, codes_BLS: Tensor, moment_BL: Tensor, user_B: Tensor | None = None) -> Memory:
        """Memory of L items a user, oldest first; padding comes last, at moment PADDING. Blind to `user_B`."""
        B, _, S = codes_BLS.shape
        x = self.embed(codes_BLS).sum(dim=2) * S**-0.5
        x = self.dropout(torch.cat([self.start.expand(B, 1, -1), x], dim=1))
        moment = F.pad(moment_BL, (1, 0), value=-1)
        bias = self.relative(self.bias_encoder, moment, moment, own=True)
        for layer in self.encoder:
            x, _ = layer(x, bias)
        x = self.dropout(self.norm_encoder(x))
        return Memory([layer.cross_attention.keys_values(x) for layer in self.decoder], moment)

    # -- memory → codes ------------------------------------------------------------------------

    def forward(self, memory: Memory, codes_BLS: Tensor, moment_BL: Tensor) -> Tensor:
        """(B, L, S, D) states that predict each code of L targets a user, each from its own past."""
        B, L, S = codes_BLS.shape
        known = self.embed(codes_BLS[..., :-1])
        x = self.dropout(torch.cat([self.begin.expand(B, L, 1, -1), known], dim=2))
        later = torch.ones(S, S, dtype=torch.bool).triu(1)
        bias_self = self.bias_self.masked_fill(later, HIDDEN)
        bias = self.relative(self.bias_cross, moment_BL, memory.moment_BK, own=False)
        for layer, kv in zip(self.decoder, memory.layers, strict=True):
            x, _ = layer.over_codes(x.reshape(B * L, S, -1), bias_self)
            x = layer.over_history(x.reshape(B, L * S, -1), kv, bias)
        return self.dropout(self.norm_decoder(x)).reshape(B, L, S, -1)

    def loss(
        self,
        codes_BLS: Tensor,
        moment_BL: Tensor,
        target_BL: Tensor,
        allowed: list[Tensor] | None,
        user_B: Tensor | None = None,
    ) -> Tensor:
        """(T, S) −log p of each code of the T targets marked in `target_BL`, given the codes before it.

        allowed: for each position the codes (T, V) that exist below the target's prefix: the softmax
            runs over them. None runs it over all V.
        """
        states_TSD = self(self.encode(codes_BLS, moment_BL), codes_BLS, moment_BL)[target_BL]
        truth_TS = codes_BLS[target_BL]
        losses = []
        for s in range(len(self.sizes)):
            logits_TV = self.logits(states_TSD[:, s], truth_TS[:, :s])
            if allowed is not None:
                logits_TV = logits_TV.masked_fill(~allowed[s], HIDDEN)
            losses.append(F.cross_entropy(logits_TV, truth_TS[:, s], reduction="none"))
        return torch.stack(losses, dim=1)

    def decoder_for(self, memory: Memory, moment_B: Tensor) -> CausalDecoder:
        """A step function for `beam_search`: B users at their present moments."""
        return CausalDecoder(self, memory, moment_B)


class CausalDecoder:
    """One code at a time for B users × W beams; what all beams of a user share is held once."""

    def __init__(self, model: CausalTiger, memory: Memory, moment_B: Tensor) -> None:
        self.model = model
        self.layers = [(k.contiguous(), v.contiguous()) for k, v in memory.layers]  # once, not at every step
        self.bias_BHSK = model.relative(model.bias_cross, moment_B[:, None], memory.moment_BK, own=False)
        self.past: list[KeysValues | None] = [None] * len(model.decoder)
        self.written = torch.zeros(len(moment_B), 1, 0, dtype=torch.int64)  # (B, W, s) codes of each beam

    @torch.inference_mode()
    def __call__(self, depth: int, beam: np.ndarray | None, code: np.ndarray | None) -> np.ndarray:
        model, (B, before, _) = self.model, self.written.shape
        if beam is None or code is None:
            x = model.begin.expand(B, 1, -1)
        else:
            rows = (torch.from_numpy(beam) + torch.arange(B)[:, None] * before).flatten()
            self.past = [kv and (kv[0][rows], kv[1][rows]) for kv in self.past]
            written = self.written.flatten(0, 1)[rows].unflatten(0, beam.shape)
            self.written = torch.cat([written, torch.from_numpy(code)[..., None]], dim=2)
            x = model.embed(self.written)[..., -1, :]
        W = x.shape[1]
        bias_self = model.bias_self[:, depth : depth + 1, : depth + 1]
        bias = self.bias_BHSK[:, :, depth : depth + 1]
        for i, (layer, kv) in enumerate(zip(model.decoder, self.layers, strict=True)):
            x, self.past[i] = layer.over_codes(x.reshape(B * W, 1, -1), bias_self, self.past[i])
            x = layer.over_history(x.reshape(B, W, -1), kv, bias)
        states = model.norm_decoder(x).flatten(0, 1)
        return model.logits(states, self.written.flatten(0, 1)).unflatten(0, (B, W)).numpy()


def _prefix_keys(codes: np.ndarray | None, sizes: tuple[int, ...]) -> list[Tensor]:
    """For each length 2 … S the prefixes of `codes`, ascending: number of the shorter one · V + code.

    Prefixes of one length are numbered from 1 in this order; a first code c has the number c + 1.
    """
    if codes is None:
        return [torch.empty(0, dtype=torch.int64) for _ in sizes[1:]]
    index, keys = codes[:, 0].astype(np.int64) + 1, []
    for s, size in enumerate(sizes[1:], start=1):
        distinct, at = np.unique(index * size + codes[:, s], return_inverse=True)
        keys.append(torch.from_numpy(distinct))
        index = at + 1
    return keys
