"""Transformer blocks after T5 (Raffel et al. 2020, https://arxiv.org/abs/1910.10683), shared by the papers.

Pre-norm with RMSNorm, no biases, unscaled dot products (the initialiser carries the scale), learned
relative-position biases, ReLU feed-forward. With the weights of a Hugging Face T5 these blocks give
the same numbers. Attention takes keys and values as an argument, so that whoever calls decides what
is computed once and what is cached.

Letters: B rows, Q queries, K keys, D width, H heads, d head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]  # each (B, H, K, d)
HIDDEN = float("-inf")  # the bias of a key that may not be seen
PADDING = 1 << 20  # the moment of a place where there is no event: later than any, so seen by none


def attend(q_BHQd: Tensor, kv: KeysValues, bias: Tensor) -> Tensor:
    """softmax(q·k + bias)·v → (B, Q, H·d). `bias` broadcasts to (B, H, Q, K); −inf hides a key."""
    k_BHKd, v_BHKd = kv
    score_BHQK = q_BHQd @ k_BHKd.transpose(-1, -2) + bias
    mixed_BHQd = F.softmax(score_BHQK, dim=-1) @ v_BHKd
    return mixed_BHQd.transpose(1, 2).flatten(2)


class Linear(nn.Module):
    """x W with W (in, out), drawn with standard deviation `std`.

    torch's own keeps (out, in). For the few rows of one request's beams its product takes 1.5 to 3.4 times as
    long on a CPU (docs/log.md); for the many rows of a training batch there is no difference.
    """

    def __init__(self, width_in: int, width_out: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width_in, width_out) * std)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Attention(nn.Module):
    """Multi-head attention of x over memory; `keys_values(memory)` is separate so that it can be kept."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, head_width
        inner = heads * head_width
        self.q = Linear(width, inner, (width * head_width) ** -0.5)
        self.kv = Linear(width, 2 * inner, width**-0.5)
        self.o = Linear(inner, width, inner**-0.5)

    def queries(self, x_BQD: Tensor) -> Tensor:
        """(B, H, Q, d)."""
        return self.q(x_BQD).unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)

    def keys_values(self, memory_BKD: Tensor) -> KeysValues:
        """Keys and values, each (B, H, K, d)."""
        kv = self.kv(memory_BKD).unflatten(-1, (2, self.heads, self.head_width))
        k_BKHd, v_BKHd = kv.unbind(dim=2)
        return k_BKHd.transpose(1, 2), v_BKHd.transpose(1, 2)

    def forward(self, x_BQD: Tensor, kv: KeysValues, bias: Tensor) -> Tensor:
        return self.o(attend(self.queries(x_BQD), kv, bias))


class Dropout(nn.Module):
    """Inverted dropout with one random byte an element; the rate is rounded to 1/256.

    On a CPU torch draws its Bernoulli masks one element at a time on one thread, which costs more than
    the matrix products at these widths; eight elements share a 64-bit draw here.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.dropped = round(rate * 256)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.dropped:
            return x
        draws = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        keep = draws.view(torch.uint8)[: x.numel()].view(x.shape) >= self.dropped
        return x * keep.to(x.dtype).mul_(256 / (256 - self.dropped))


class FeedForward(nn.Module):
    """W₂ relu(W₁ x)."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.wi = Linear(width, hidden, width**-0.5)
        self.wo = Linear(hidden, width, hidden**-0.5)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(self.dropout(F.relu(self.wi(x), inplace=True)))


class EncoderLayer(nn.Module):
    """x + attention(norm x), then + feed-forward(norm x)."""

    def __init__(self, width: int, heads: int, head_width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm_attention = nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, head_width)
        self.norm_ff = nn.RMSNorm(width, eps=1e-6)
        self.ff = FeedForward(width, hidden, dropout)
        self.dropout = Dropout(dropout)

    def forward(
        self, x_BLD: Tensor, bias: Tensor, past: KeysValues | None = None
    ) -> tuple[Tensor, KeysValues]:
        """New states, and the keys and values of `past` and x together (for who reads on from here)."""
        normed = self.norm_attention(x_BLD)
        kv = self.attention.keys_values(normed)
        if past is not None:
            kv = (torch.cat([past[0], kv[0]], dim=2), torch.cat([past[1], kv[1]], dim=2))
        x_BLD = x_BLD + self.dropout(self.attention(normed, kv, bias))
        return x_BLD + self.dropout(self.ff(self.norm_ff(x_BLD))), kv


class DecoderLayer(nn.Module):
    """Self-attention over the codes so far, cross-attention over the history, feed-forward."""

    def __init__(self, width: int, heads: int, head_width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm_self = nn.RMSNorm(width, eps=1e-6)
        self.self_attention = Attention(width, heads, head_width)
        self.norm_cross = nn.RMSNorm(width, eps=1e-6)
        self.cross_attention = Attention(width, heads, head_width)
        self.norm_ff = nn.RMSNorm(width, eps=1e-6)
        self.ff = FeedForward(width, hidden, dropout)
        self.dropout = Dropout(dropout)

    def over_codes(
        self, x_MSD: Tensor, bias: Tensor, past: KeysValues | None = None
    ) -> tuple[Tensor, KeysValues]:
        """The self-attention half-step on M code sequences; `past` holds their earlier positions."""
        normed = self.norm_self(x_MSD)
        kv = self.self_attention.keys_values(normed)
        if past is not None:
            kv = (torch.cat([past[0], kv[0]], dim=2), torch.cat([past[1], kv[1]], dim=2))
        return x_MSD + self.dropout(self.self_attention(normed, kv, bias)), kv

    def over_history(self, x_BQD: Tensor, memory: KeysValues, bias: Tensor) -> Tensor:
        """The cross-attention and feed-forward half-steps; a user's queries share one memory."""
        x_BQD = x_BQD + self.dropout(self.cross_attention(self.norm_cross(x_BQD), memory, bias))
        return x_BQD + self.dropout(self.ff(self.norm_ff(x_BQD)))


def t5_bucket(distance: Tensor, buckets: int = 32, longest: int = 128, both_ways: bool = True) -> Tensor:
    """T5's relative-position bucket of key position − query position (Raffel et al., section 2.1).

    Half of the buckets are exact small distances, the others grow logarithmically up to `longest`.
    With `both_ways` later keys have buckets of their own; without, they share bucket 0.
    """
    if both_ways:
        buckets //= 2
        later = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        later = torch.zeros_like(distance)
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    far = exact + (
        torch.log(distance.clamp(min=1).float() / exact) / math.log(longest / exact) * (buckets - exact)
    ).long().clamp(min=-exact, max=buckets - 1 - exact)
    return later + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))
