"""TIGER as published: a T5 that reads the semantic IDs of the last items and writes that of the next.

Paper: Rajput et al., "Recommender Systems with Generative Retrieval", NeurIPS 2023,
https://arxiv.org/abs/2305.05065, section 3.2 and the implementation details of section 4.
Idea: [user token][ID of item 1] … [ID of item n] → bidirectional encoder; decoder with teacher forcing,
token cross-entropy; each code position has tokens of its own (code 7 of level 1 ≠ code 7 of level 2).
Cost: every target encodes its own history again, at S tokens an item.

Deviations:
- 4.85 M parameters at the published sizes, not the 13 M that the paper states;
- the user token is optional, and off by default: reproductions find it no better;
- an optional separator after each item, which reproductions find to help;
- AdamW with a falling rate and averaged weights, and the loss and the beam over codes that exist (`TigerConfig`);
- of a basket, whose order says nothing, no item is read for another.
With the weights of a Hugging Face T5 of the same sizes the logits are the same.

Letters: B rows, L items, S code positions, K encoder tokens, D width, V codes a position, W beams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiglon.errors import require_counts, require_dropout
from tiglon.nn.transformer import (
    HIDDEN,
    PADDING,
    DecoderLayer,
    Dropout,
    EncoderLayer,
    KeysValues,
    t5_bucket,
)
from tiglon.retrieval.windows import windows_of_events


@dataclass(frozen=True)
class PaperConfig:
    width: int = 128  # paper: 128
    heads: int = 6  # paper: 6
    head_width: int = 64  # paper: 64
    hidden: int = 1024  # paper: 1,024
    encoder_layers: int = 4  # paper: 4
    decoder_layers: int = 4  # paper: 4
    dropout: float = 0.1  # paper: 0.1
    user_tokens: int = 0  # paper: 2,000, users hashed onto them
    separators: bool = False  # paper: none

    def __post_init__(self) -> None:
        require_counts(self, "width", "heads", "head_width", "hidden", "encoder_layers", "decoder_layers")
        require_dropout(self)


class Memory(NamedTuple):
    """What the decoder reads: keys and values of each layer, and the bias that hides padding."""

    layers: list[KeysValues]
    bias_B11K: Tensor


class PaperTiger(nn.Module):
    """sizes: codes at each of the S positions, the collision digit last."""

    def __init__(self, sizes: tuple[int, ...], config: PaperConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or PaperConfig()
        self.sizes = sizes
        S = len(sizes)
        # token 0 starts the decoder and pads; then the codes, position after position; separator; users
        offsets = torch.tensor([1 + sum(sizes[:s]) for s in range(S)])
        self.offsets: Tensor
        self.register_buffer("offsets", offsets, persistent=False)
        self.separator = 1 + sum(sizes)
        self.token = nn.Embedding(self.separator + 1 + c.user_tokens + (c.user_tokens > 0), c.width)
        nn.init.normal_(self.token.weight, std=1.0)
        block = (c.width, c.heads, c.head_width, c.hidden, c.dropout)
        encoder = [EncoderLayer(*block) for _ in range(c.encoder_layers)]
        self.encoder: Sequence[EncoderLayer] = nn.ModuleList(encoder)  # type: ignore[assignment]
        decoder = [DecoderLayer(*block) for _ in range(c.decoder_layers)]
        self.decoder: Sequence[DecoderLayer] = nn.ModuleList(decoder)  # type: ignore[assignment]
        self.norm_encoder = nn.RMSNorm(c.width, eps=1e-6)
        self.norm_decoder = nn.RMSNorm(c.width, eps=1e-6)
        self.bias_encoder = nn.Embedding(32, c.heads)
        self.bias_decoder = nn.Embedding(32, c.heads)
        for bias in (self.bias_encoder, self.bias_decoder):
            nn.init.normal_(bias.weight, std=c.width**-0.5)
        self.dropout = Dropout(c.dropout)

    @staticmethod
    def windows(offsets: np.ndarray, moment: np.ndarray, window: int) -> np.ndarray:
        """Rows (start, stop, first target) of a log: every event that has a past is the target of one row."""
        return windows_of_events(offsets, moment, window)[moment > 0]

    def embed_codes(self, codes_NS: Tensor) -> Tensor:
        """(N, S, D)."""
        return self.token(codes_NS + self.offsets)

    # -- history → memory ----------------------------------------------------------------------

    def tokens(self, codes_BLS: Tensor, visible_BL: Tensor, user_B: Tensor | None) -> tuple[Tensor, Tensor]:
        """Encoder tokens (B, K) and which of them are real (B, K)."""
        token = codes_BLS + self.offsets
        real = visible_BL[..., None].expand_as(token)
        if self.config.separators:
            token, real = F.pad(token, (0, 1), value=self.separator), F.pad(real, (0, 1), value=True)
            real = real & visible_BL[..., None]
        token, real = token.flatten(1), real.flatten(1)
        if users := self.config.user_tokens:  # the row after them is the unknown user's
            named = torch.full((len(token),), -1) if user_B is None else user_B
            number = torch.where(named < 0, users, named % users)
            token = torch.cat([self.separator + 1 + number[:, None], token], dim=1)
            real = F.pad(real, (1, 0), value=True)
        return token, real

    def encode(self, codes_BLS: Tensor, moment_BL: Tensor, user_B: Tensor | None = None) -> Memory:
        """Memory of L items a row, oldest first, padding (moment PADDING) last."""
        token, real = self.tokens(codes_BLS, moment_BL < PADDING, user_B)
        if token.shape[1] == 0:  # nobody has a past: one hidden-from-nobody padding token
            token, real = token.new_zeros(len(token), 1), real.new_ones(len(token), 1)
        token = torch.where(real, token, 0)
        real[:, 0] |= ~real.any(dim=1)  # an empty history reads one padding token, the same for all
        x = self.dropout(self.token(token))
        at = torch.arange(x.shape[1])
        bias = self.bias_encoder(t5_bucket(at[None, :] - at[:, None])).permute(2, 0, 1)
        hidden_B11K = torch.zeros(len(x), 1, 1, x.shape[1]).masked_fill(~real[:, None, None, :], HIDDEN)
        for layer in self.encoder:
            x, _ = layer(x, bias + hidden_B11K)
        x = self.dropout(self.norm_encoder(x))
        return Memory([layer.cross_attention.keys_values(x) for layer in self.decoder], hidden_B11K)

    # -- memory → codes ------------------------------------------------------------------------

    def bias_self(self, S: int) -> Tensor:
        """(H, S, S) causal."""
        at = torch.arange(S)
        bias = self.bias_decoder(t5_bucket(at[None, :] - at[:, None], both_ways=False)).permute(2, 0, 1)
        return bias.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), HIDDEN)

    def forward(self, memory: Memory, codes_BS: Tensor) -> Tensor:
        """(B, S, tokens) logits over the whole vocabulary, teacher forced."""
        token = F.pad(codes_BS[:, :-1] + self.offsets[:-1], (1, 0))
        x = self.dropout(self.token(token))
        bias = self.bias_self(token.shape[1])
        for layer, kv in zip(self.decoder, memory.layers, strict=True):
            x, _ = layer.over_codes(x, bias)
            x = layer.over_history(x, kv, memory.bias_B11K)
        return self.logits(self.dropout(self.norm_decoder(x)))

    def logits(self, x: Tensor) -> Tensor:
        """Tied to the embedding, scaled as T5 does."""
        return F.linear(x * self.config.width**-0.5, self.token.weight)

    def loss(
        self,
        codes_BLS: Tensor,
        moment_BL: Tensor,
        target_BL: Tensor,
        allowed: list[Tensor] | None,
        user_B: Tensor | None = None,
    ) -> Tensor:
        """(B, S) −log p of each code of each row's one target; `allowed` as in `CausalTiger.loss`."""
        at = target_BL.int().argmax(dim=1)
        rows = torch.arange(len(at))
        past = torch.where(moment_BL < moment_BL[rows, at][:, None], moment_BL, PADDING)
        width = int((past < PADDING).sum(dim=1).max())
        truth_BS = codes_BLS[rows, at]
        logits = self(self.encode(codes_BLS[:, :width], past[:, :width], user_B), truth_BS).float()
        losses = []
        for s, (offset, size) in enumerate(zip(self.offsets.tolist(), self.sizes, strict=True)):
            here, goal = logits[:, s], truth_BS[:, s] + offset
            if allowed is not None:
                here, goal = here[:, offset : offset + size].masked_fill(~allowed[s], HIDDEN), truth_BS[:, s]
            losses.append(F.cross_entropy(here, goal, reduction="none"))
        return torch.stack(losses, dim=1)

    def decoder_for(self, memory: Memory, moment_B: Tensor) -> PaperDecoder:
        """A step function for `beam_search`."""
        return PaperDecoder(self, memory)


class PaperDecoder:
    """One code at a time for B users × W beams; what all beams of a user share is held once."""

    def __init__(self, model: PaperTiger, memory: Memory) -> None:
        self.model, self.memory = model, memory
        self.layers = [(k.contiguous(), v.contiguous()) for k, v in memory.layers]  # once, not at every step
        self.bias = model.bias_self(len(model.sizes))
        self.past: list[KeysValues | None] = [None] * len(model.decoder)

    @torch.inference_mode()
    def __call__(self, depth: int, beam: np.ndarray | None, code: np.ndarray | None) -> np.ndarray:
        """Logits of the position's own codes, and in one more column all other tokens together."""
        model, B = self.model, len(self.memory.bias_B11K)
        if beam is None or code is None:
            token = torch.zeros(B, 1, dtype=torch.int64)
        else:
            before = 1 if self.past[0] is None else self.past[0][0].shape[0] // B
            rows = (torch.from_numpy(beam) + torch.arange(B)[:, None] * before).flatten()
            self.past = [kv and (kv[0][rows], kv[1][rows]) for kv in self.past]
            token = torch.from_numpy(code) + model.offsets[depth - 1]
        x, W = model.token(token), token.shape[1]
        bias = self.bias[:, depth : depth + 1, : depth + 1]
        for i, (layer, kv) in enumerate(zip(model.decoder, self.layers, strict=True)):
            x, self.past[i] = layer.over_codes(x.reshape(B * W, 1, -1), bias, self.past[i])
            x = layer.over_history(x.reshape(B, W, -1), kv, self.memory.bias_B11K)
        logits = model.logits(model.norm_decoder(x)).float()
        low, high = int(model.offsets[depth]), int(model.offsets[depth]) + model.sizes[depth]
        own = logits[..., low:high].clone()
        logits[..., low:high] = HIDDEN
        return torch.cat([own, logits.logsumexp(-1, keepdim=True)], dim=-1).numpy()
