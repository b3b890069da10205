"""Attention of a candidate over behaviours, as TWIN scores it; shared by the lifelong rankers.

    α_a = (K_h W_a^h)(qᵀ W_a^q)ᵀ / √d + (K_c W^c) β_a + ln n        one head a, one behaviour a row
    head_a = softmax(α_a)ᵀ K W_a^v        interest = concat(head) W^o

K_h are a behaviour's inherent features, the same for every user; K_c its cross features (when, at what
price …), whose part is one number a feature and head: (K_{c,j} w_j) β_{a,j}. n is how many behaviours an
entry stands for: n entries with the same features count as much as one with ln n (TWIN V2).
Source: Chang et al. 2023, https://arxiv.org/abs/2302.02352, §4.2–4.4.

Letters: B requests, K candidates, L behaviours, k chosen ones, A heads, d width of a head, H width of an
item, J cross features, C width of a cross feature, D width of the interest.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiglon.types import Behaviours

HIDDEN = float("-inf")
_SELF = 4.0  # α of an item with itself as training begins


class TargetAttention(nn.Module):
    """`score`, then `mix`: search and attention share the first.

    identity: W^q and W^h begin as the same random orthonormal projection, so that α begins as a similarity of
        items, and so large that an item scores 4 with itself; otherwise both are drawn apart, as linear layers
        are. The published form leaves this open, and it decides whether attention is learned at all: from
        projections apart, or from scores near 0, where the softmax is a mean and the cross features' random
        bias outweighs the items, a planted behaviour among 300 was not found (docs/log.md).
    item_std: standard deviation of the item vectors' numbers as they begin.
    """

    def __init__(
        self,
        item_width: int,
        cross_count: int,
        cross_width: int,
        *,
        heads: int = 4,
        head_width: int = 16,
        width: int = 64,
        identity: bool = True,
        item_std: float = 1.0,
    ) -> None:
        super().__init__()
        self.heads, self.head_width, self.width = heads, head_width, width
        inner = heads * head_width
        self.query = nn.Linear(item_width, inner, bias=False)  # W^q
        self.key = nn.Linear(item_width, inner, bias=False)  # W^h
        self.cross = nn.Parameter(torch.randn(cross_count, cross_width) * cross_width**-0.5)  # w_j
        self.beta = nn.Parameter(torch.ones(heads, cross_count))  # β
        self.value = nn.Linear(item_width + cross_count * cross_width, inner, bias=False)  # W^v
        self.out = nn.Linear(inner, width, bias=False)  # W^o
        if identity:
            # A head keeps min(inner, H) / A of an item's H numbers, each of variance item_std².
            norm = item_std**2 * min(inner, item_width) / heads
            nn.init.orthogonal_(self.key.weight, (_SELF * head_width**0.5 / norm) ** 0.5)
            with torch.no_grad():
                self.query.weight.copy_(self.key.weight)

    def keys(self, inherent: Tensor) -> Tensor:
        """(…, H) → (…, A, d): K_h W^h, what a cache holds for every item."""
        return self.key(inherent).unflatten(-1, (self.heads, self.head_width))

    def queries(self, inherent_BKH: Tensor) -> Tensor:
        """(B, K, H) → (B, K, A, d)."""
        return self.query(inherent_BKH).unflatten(-1, (self.heads, self.head_width))

    def bias(self, cross: Tensor) -> Tensor:
        """(…, L, J, C) → (…, A, L): (K_c W^c) β."""
        return torch.einsum("...ljc,jc,aj->...al", cross, self.cross, self.beta)

    def bias_table(self, crosses: Iterable[nn.Embedding]) -> tuple[Tensor, Tensor]:
        """The same bias as a number a code and head, for the search to look up.

        crosses: one table of V_j codes a cross feature. Returns (V, A), one feature's codes after the other's,
        and (J,) where each feature's begin.
        """
        tables = [
            (table.weight @ self.cross[j])[:, None] * self.beta[:, j] for j, table in enumerate(crosses)
        ]
        sizes = torch.tensor([len(table) for table in tables], dtype=torch.int64)
        return torch.cat([*tables, torch.zeros(0, self.heads)]), sizes.cumsum(0) - sizes

    def score(
        self, query_BKAd: Tensor, key: Tensor, bias: Tensor, mask: Tensor, size: Tensor | None
    ) -> Tensor:
        """α, (B, K, A, L); −inf on padding.

        key, bias, mask, size: (B, L, A, d), (B, A, L), (B, L), (B, L); where candidates have their own, each for
        itself, (B, K, A, L, d), (B, K, A, L), (B, K, L), (B, K, L).
        """
        # α is the largest tensor of a step: one product and one addition pass over it.
        query_BKAd = query_BKAd * self.head_width**-0.5
        bias = bias[:, None] if bias.dim() == 3 else bias
        if size is not None:
            bias = bias + _for_heads(size.clamp(min=1).log())
        bias = bias.masked_fill(~_for_heads(mask), HIDDEN)
        if key.dim() == 4:
            alpha = torch.einsum("bkad,blad->bakl", query_BKAd, key).transpose(1, 2)
        else:
            alpha = (key @ query_BKAd[..., None]).squeeze(-1)
        return alpha.add_(bias)

    def logits(self, item_BKH: Tensor, past: Behaviours, inherent: Tensor, cross: Tensor) -> Tensor:
        """α, (B, K, A, L), of behaviours with these features, all projections live."""
        query = self.queries(item_BKH)
        return self.score(query, self.keys(inherent), self.bias(cross), past.mask, past.size)

    def mix(self, alpha: Tensor, inherent: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
        """softmax(α) over behaviours → interest (B, K, D) and weights (B, K, A, L); zeros without any.

        inherent, cross: (B, L, H), (B, L, J, C).
        """
        return self.read(alpha, self.values(inherent, cross))

    def values(self, inherent: Tensor, cross: Tensor) -> Tensor:
        """(…, H) and (…, J, C) → (…, A, d): K W^v, over the unsplit features."""
        value = self.value(torch.cat([inherent, cross.flatten(-2)], dim=-1))
        return value.unflatten(-1, (self.heads, self.head_width))

    def read(self, alpha: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """`mix` with values (B, L, A, d), or (B, K, A, L, d) where candidates have their own."""
        L = alpha.shape[-1]
        empty = alpha.detach().amax(dim=-1, keepdim=True) == HIDDEN if L else torch.zeros(1, dtype=torch.bool)
        some = bool(empty.any())
        if some:
            alpha = alpha.masked_fill(empty, 0.0)
        weight = F.softmax(alpha.transpose(1, 2), dim=-1).transpose(1, 2)
        if some:
            weight = weight.masked_fill(empty, 0.0)
        if value.dim() == 4:
            mixed = torch.einsum("bkal,blad->bkad", weight, value)
        else:
            mixed = (weight[..., None, :] @ value).squeeze(-2)
        return self.out(mixed.flatten(-2)), weight


def _for_heads(x: Tensor) -> Tensor:
    """(B, L) or (B, K, L) → (B, 1 or K, 1, L)."""
    return (x[:, None] if x.dim() == 2 else x)[..., None, :]
