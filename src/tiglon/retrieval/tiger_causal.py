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
- prefixes have vectors (`prefixes.py`): of their last code, of their own, and of the content of the items
  below; reading and writing share them, as sequential recommenders share item embeddings;
- the decoder starts from the encoder's state of the latest moment, so that with content an untrained
  network already recommends what is like the last item;
- the first two codes are predicted from one state by one softmax over the pairs that exist, which is both
  better than one softmax after the other and a decoder position less;
- the softmax runs over the codes that exist below the prefix, so that the probabilities of the
  catalogue's items sum to one and no capacity goes to learning which IDs exist;
- codes of what one had before are likelier or less likely by a learned weight (`repetition`);
- no user token (reproductions find none is better).

Letters: B users, L history, D width, S code positions, P positions of the decoder, V codes a level,
T targets, H heads, K keys, W beams.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiglon.errors import require_counts, require_dropout
from tiglon.nn.moments import START, MomentBias, latest
from tiglon.nn.transformer import HIDDEN, DecoderLayer, Dropout, EncoderLayer, KeysValues
from tiglon.retrieval.prefixes import Prefixes
from tiglon.retrieval.repetition import Repetition, Returns
from tiglon.retrieval.windows import overlapping_windows

if TYPE_CHECKING:
    from typing import Self


@dataclass(frozen=True)
class CausalConfig:
    width: int = 192  # paper: 128
    heads: int = 6  # paper: 6
    head_width: int = 32  # paper: 64
    hidden: int = 512  # paper: 1,024
    encoder_layers: int = 2  # paper: 4
    decoder_layers: int = 1  # paper: 4
    dropout: float = 0.3  # paper: 0.1
    distances: int = 32  # buckets of the relative bias, in moments; farther ones share the last
    prefixes: bool = True  # vectors of their own for the prefixes of trained items; paper: none
    content: bool = True  # and of the content of the items below; paper: none
    pairs: int = 16_384  # predict the first two codes together if no more pairs of them exist; paper: 0

    def __post_init__(self) -> None:
        counts = ("width", "heads", "head_width", "hidden", "encoder_layers", "decoder_layers", "distances")
        require_counts(self, *counts)
        require_dropout(self)


class Memory(NamedTuple):
    """What the decoder reads of B users: states, their keys and values for each layer, their moments."""

    states_BKD: Tensor
    layers: list[KeysValues]
    moment_BK: Tensor  # −1 for the start state, later than everything for padding

    def rows(self, row_R: Tensor) -> Memory:
        """Of some of the users."""
        layers = [(k[row_R], v[row_R]) for k, v in self.layers]
        return Memory(self.states_BKD[row_R], layers, self.moment_BK[row_R])


class CodeDecoder(nn.Module):
    """The half of a network that writes codes. What it shares with the other half, or draws after it, is declared
    here and made by the network.

    sizes: codes at each of the S positions, the collision digit last.
    codes, vectors, content_width: as `Prefixes` takes them.
    """

    begin: nn.Parameter  # (D,), the first input
    decoder: Sequence[DecoderLayer]
    norm_decoder: nn.RMSNorm
    bias_cross: MomentBias  # of P positions
    bias_self: nn.Parameter  # (H, P, P)
    dropout: Dropout

    def __init__(
        self,
        sizes: tuple[int, ...],
        config: CausalConfig,
        codes: np.ndarray | None = None,
        vectors: np.ndarray | None = None,
        content_width: int = 0,
    ) -> None:
        super().__init__()
        self.sizes, self.config = sizes, config
        codes = codes if config.prefixes else None
        if codes is None or not config.content:
            vectors, content_width = None, 0
        self.prefixes = Prefixes(sizes, config.width, codes, vectors, content_width)
        # The decoder's positions: one a code, or the first two codes share the first.
        self.paired = int(len(sizes) > 1 and 0 < len(self.prefixes.keys[0]) <= config.pairs)

    # -- codes ↔ vectors --------------------------------------------------------------------------

    def embed(self, codes: Tensor) -> Tensor:
        """(…, s) codes of the first s positions → (…, s, D), entries of about unit size."""
        return self.prefixes(codes) * self.config.width**0.5

    def written(self, x: Tensor) -> Tensor:
        """(…, s, D) embedded codes → the decoder's inputs after the first, one for each position that they fill."""
        if not self.paired:
            return x
        if x.shape[-2] < 2:
            return x[..., :0, :]
        return torch.cat([x[..., :2, :].sum(dim=-2, keepdim=True) * 2**-0.5, x[..., 2:, :]], dim=-2)

    def logits(self, x_TD: Tensor, before: Tensor) -> Tensor:
        """(T, V) of the code after `before` (T, s), from the state of the decoder's position for it."""
        if self.paired and before.shape[1] == 0:
            return self.prefixes.first_logits(x_TD)
        return self.prefixes.logits(x_TD, before)

    def position(self, s: int) -> int:
        """The decoder's position that predicts code s (0 … S−1)."""
        return max(s - self.paired, 0)

    def extended(self, codes: np.ndarray, vectors: np.ndarray | None) -> Self:
        """This network where new items (M, S) have prefixes, and content from `vectors` (M, C), too."""
        new = copy.copy(self)
        new._modules = self._modules | {"prefixes": self.prefixes.extended(codes, vectors)}
        return new

    # -- memory → codes ---------------------------------------------------------------------------

    def forward(self, memory: Memory, codes_BLS: Tensor, moment_BL: Tensor) -> Tensor:
        """(B, L, P, D) states at the decoder's P positions for L targets a user, each from its own past."""
        return self.states(memory, self.embed(codes_BLS[..., :-1]), moment_BL)[0]

    def states(self, memory: Memory, known: Tensor, moment_BL: Tensor) -> tuple[Tensor, list[KeysValues]]:
        """As `forward`, from the embedded codes (B, L, S − 1, D); and the keys and values of each layer."""
        written, P = self.written(known), self.bias_self.shape[-1]
        x = torch.cat([self.begin.expand(*moment_BL.shape, 1, -1), written], dim=2)
        x = x + latest(memory.states_BKD, memory.moment_BK, moment_BL)[:, :, None]
        later = torch.ones(P, P, dtype=torch.bool).triu(1)
        bias_self = self.bias_self.masked_fill(later, HIDDEN)
        bias_cross = self.bias_cross(moment_BL, memory.moment_BK, own=False)
        return self.positions(x, memory, bias_self, bias_cross, [None] * len(self.decoder))

    def positions(
        self,
        x_BLPD: Tensor,
        memory: Memory,
        bias_self: Tensor,
        bias_cross: Tensor,
        past: Sequence[KeysValues | None],
    ) -> tuple[Tensor, list[KeysValues]]:
        """The decoder over inputs that follow those of `past`: states, and all keys and values."""
        B, L, P, _ = x_BLPD.shape
        x = self.dropout(x_BLPD)
        seen = []
        for layer, kv, before in zip(self.decoder, memory.layers, past, strict=True):
            x, now = layer.over_codes(x.reshape(B * L, P, -1), bias_self, before)
            x = layer.over_history(x.reshape(B, L * P, -1), kv, bias_cross)
            seen.append(now)
        return self.dropout(self.norm_decoder(x)).reshape(B, L, P, -1), seen

    def losses(
        self,
        states_TPD: Tensor,
        truth_TS: Tensor,
        allowed: Sequence[Tensor] | None,
        returns: Returns | None = None,
    ) -> Tensor:
        """(T, S) −log p of each true code, given those before it; the rest as `CausalTiger.loss` takes it."""
        found = []
        for s in range(len(self.sizes)):
            logits_TV = self.logits(states_TPD[:, self.position(s)], truth_TS[:, :s])
            if returns is not None:
                logits_TV = logits_TV + returns.log_factor(truth_TS[:, :s], self.sizes[s])
            if allowed is not None:
                logits_TV = logits_TV.masked_fill(~allowed[s], HIDDEN)
            found.append(F.cross_entropy(logits_TV, truth_TS[:, s], reduction="none"))
        return torch.stack(found, dim=1)

    def decoder_for(self, memory: Memory, moment_B: Tensor, returns: Returns | None = None) -> CausalDecoder:
        """A step function for `beam_search`: B users at their present moments, and what they had."""
        return CausalDecoder(self, memory, moment_B, returns)


class CausalTiger(CodeDecoder):
    """As `CodeDecoder` takes them: sizes, config, codes, vectors, content_width."""

    def __init__(
        self,
        sizes: tuple[int, ...],
        config: CausalConfig | None = None,
        codes: np.ndarray | None = None,
        vectors: np.ndarray | None = None,
        content_width: int = 0,
    ) -> None:
        c = config or CausalConfig()
        super().__init__(sizes, c, codes, vectors, content_width)
        S = len(sizes) - self.paired
        self.start = nn.Parameter(torch.randn(c.width))  # state of an empty history
        self.begin = nn.Parameter(torch.randn(c.width))  # the decoder's first input
        block = (c.width, c.heads, c.head_width, c.hidden, c.dropout)
        encoder = [EncoderLayer(*block) for _ in range(c.encoder_layers)]
        self.encoder: Sequence[EncoderLayer] = nn.ModuleList(encoder)  # type: ignore[assignment]
        decoder = [DecoderLayer(*block) for _ in range(c.decoder_layers)]
        self.decoder: Sequence[DecoderLayer] = nn.ModuleList(decoder)  # type: ignore[assignment]
        self.norm_encoder = nn.RMSNorm(c.width, eps=1e-6)
        self.norm_decoder = nn.RMSNorm(c.width, eps=1e-6)
        self.bias_encoder = MomentBias(c.heads, c.distances)
        self.bias_cross = MomentBias(c.heads, c.distances, S)
        self.bias_self = nn.Parameter(torch.zeros(c.heads, S, S))
        self.dropout = Dropout(c.dropout)
        self.repetition = Repetition()

    windows = staticmethod(overlapping_windows)

    def encode(self, codes_BLS: Tensor, moment_BL: Tensor, user_B: Tensor | None = None) -> Memory:
        """Memory of L items a user, oldest first; padding comes last, at moment PADDING. Blind to `user_B`."""
        B, _, S = codes_BLS.shape
        x = self.embed(codes_BLS).sum(dim=2) * S**-0.5
        x = self.dropout(torch.cat([self.start.expand(B, 1, -1), x], dim=1))
        moment = F.pad(moment_BL, (1, 0), value=START)
        bias = self.bias_encoder(moment, moment, own=True)
        for layer in self.encoder:
            x, _ = layer(x, bias)
        x = self.dropout(self.norm_encoder(x))
        return Memory(x, [layer.cross_attention.keys_values(x) for layer in self.decoder], moment)

    def loss(
        self,
        codes_BLS: Tensor,
        moment_BL: Tensor,
        target_BL: Tensor,
        allowed: list[Tensor] | None,
        user_B: Tensor | None = None,
        returns: Returns | None = None,
    ) -> Tensor:
        """(T, S) −log p of each code of the T targets marked in `target_BL`, given the codes before it.

        allowed: for each position the codes (T, V) that exist below the target's prefix: the softmax
            runs over them. None runs it over all V.
        returns: what came before each target; None for nothing.
        """
        with self.prefixes.holding(codes_BLS, pairs=bool(self.paired)):
            states_BLPD = self(self.encode(codes_BLS, moment_BL), codes_BLS, moment_BL)
            return self.losses(states_BLPD[target_BL], codes_BLS[target_BL], allowed, returns)


class CausalDecoder:
    """One code at a time for B users × W beams; what all beams of a user share is held once."""

    def __init__(
        self, model: CodeDecoder, memory: Memory, moment_B: Tensor, returns: Returns | None = None
    ) -> None:
        self.model, self.returns = model, returns
        self.layers = [(k.contiguous(), v.contiguous()) for k, v in memory.layers]  # once, not at every step
        self.bias_BHPK = model.bias_cross(moment_B[:, None], memory.moment_BK, own=False)
        self.past: list[KeysValues | None] = [None] * len(model.decoder)
        self.latest_B1D = latest(memory.states_BKD, memory.moment_BK, moment_B[:, None])
        self.written = torch.zeros(len(moment_B), 1, 0, dtype=torch.int64)  # (B, W, s) codes of each beam
        self.state_BWD = self.latest_B1D  # of the position that was computed last

    @torch.inference_mode()
    def __call__(self, depth: int, beam: np.ndarray | None, code: np.ndarray | None) -> np.ndarray:
        """Logits (B, W, V) of the code at `depth`, after `code` (B, W) was written by `beam` (B, W)."""
        model, (B, before, _) = self.model, self.written.shape
        if beam is not None and code is not None:
            rows = (torch.from_numpy(beam) + torch.arange(B)[:, None] * before).flatten()
            self.past = [kv and (kv[0][rows], kv[1][rows]) for kv in self.past]
            self.state_BWD = self.state_BWD.flatten(0, 1)[rows].unflatten(0, beam.shape)
            written = self.written.flatten(0, 1)[rows].unflatten(0, beam.shape)
            self.written = torch.cat([written, torch.from_numpy(code)[..., None]], dim=2)
        if depth == 0 or model.position(depth) > model.position(depth - 1):
            self.state_BWD = self._advance(model.position(depth))
        logits = model.logits(self.state_BWD.flatten(0, 1), self.written.flatten(0, 1))
        logits = logits.unflatten(0, self.written.shape[:2])
        if self.returns is not None:
            logits = logits + self.returns.log_factor(self.written, logits.shape[-1])
        return logits.numpy()

    def _advance(self, position: int) -> Tensor:
        """(B, W, D) states of the decoder's next position."""
        model, (B, W, _) = self.model, self.written.shape
        x = model.written(model.embed(self.written))[..., -1, :] if position else model.begin.expand(B, 1, -1)
        x = x + self.latest_B1D
        bias_self = model.bias_self[:, position : position + 1, : position + 1]
        bias = self.bias_BHPK[:, :, position : position + 1]
        for i, (layer, kv) in enumerate(zip(model.decoder, self.layers, strict=True)):
            x, self.past[i] = layer.over_codes(x.reshape(B * W, 1, -1), bias_self, self.past[i])
            x = layer.over_history(x.reshape(B, W, -1), kv, bias)
        return model.norm_decoder(x)
