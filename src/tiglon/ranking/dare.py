"""DARE: TWIN's two stages on two sets of embeddings, one to search with and one to describe with.

Feng et al., "Long-Sequence Recommendation Models Need Decoupled Embeddings", ICLR 2025,
https://arxiv.org/abs/2410.02604

Idea. One embedding cannot say both "how much does this behaviour matter" and "what does it mean": the
gradients of the second drown those of the first, and projections such as TWIN's W^q, W^h do not part them.
So attention has tables of its own, without projections, which may also be narrower, and the search cheaper.

Covered: attention by the inner product of attention embeddings in search and softmax alike, target-aware
representation Σ_i w_i (r_i ⊙ r_t), narrower attention embeddings. Read from the abstract, the published code
and summaries; equation numbers are therefore not given.

Deviations. A cross feature's attention embedding is one number a code (the paper has a table of time
intervals whose product with the target's counts; a target's interval is always the same, so that product is
a number a code). Its representation embeddings are those of the shell, the interest is
[Σ w r_i ⊙ r_t, Σ w r_i, Σ w c_i] with c_i the cross features, one head.

Cost a request: that of TWIN with one head of width d; no projection of behaviours anywhere.

Letters: B requests, K candidates, L behaviours, k chosen ones, F inherent features, d width of the attention
embeddings, H width of an item in the shell, J cross features, C their width there, V codes of all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tiglon.errors import ConfigError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.nn.heads import search
from tiglon.nn.search import gather, require_k
from tiglon.nn.target_attention import HIDDEN
from tiglon.ranking.item_cache import ItemCache, live_keys
from tiglon.ranking.ranker import Interest
from tiglon.types import Behaviours


class Dare(nn.Module):
    """k: behaviours that are attended to.   search_width: of each inherent feature's attention embedding.

    cache: what the search reads in eval mode; None looks the attention embeddings up afresh.
    """

    def __init__(self, embed: FeatureEmbedding, *, k: int = 100, search_width: int = 32) -> None:
        super().__init__()
        if search_width < 1:
            raise ConfigError(f"search_width={search_width}", rule="An embedding is at least 1 wide")
        self.k = require_k(k)
        self.width = 2 * embed.inherent_width + embed.cross_count * embed.cross_width
        self.search_width = search_width * len(embed.items)  # d
        # α begins with variance 1: d products of two numbers of variance 1, over √d.
        self.items = _tables(embed.items, search_width, std=1.0)
        self.crosses = _tables(embed.crosses, 1, std=0.0)
        self.cache: ItemCache | None = None

    def refresh(self, embed: FeatureEmbedding, storage: str = "float32") -> None:
        """Make the cache of today's attention embeddings and search in it from now on (in eval mode).

        storage: "float32", "bfloat16" or "int8".
        """
        self.use(ItemCache.build(embed, lambda item: self._keys(embed, item), storage), embed)

    def use(self, cache: ItemCache | None, embed: FeatureEmbedding) -> None:
        """Search in this cache, be it stale. Raises DataError where it was built for other items."""
        if cache is not None:
            cache.require(embed, 1, self.search_width)
        self.cache = cache

    @torch.no_grad()
    def search(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Tensor:
        """(B, K, min(k, L)) positions, best first, −1 behind."""
        if self.cache is not None and not self.training:
            keys, row_BL = self.cache.keys, past.item
        else:
            keys, row_BL = live_keys(past.item, len(embed.item_codes), lambda item: self._keys(embed, item))
        query_BK1d = self._keys(embed, item_BK) * self.search_width**-0.5
        sizes = torch.tensor([len(table.weight) for table in self.crosses], dtype=torch.int64)
        table_V1 = torch.cat([*(table.weight for table in self.crosses), torch.zeros(0, 1)])
        _, at_BK1k = search(query_BK1d, keys, row_BL, past, table_V1, sizes.cumsum(0) - sizes, self.k)
        return at_BK1k[:, :, 0]

    def logits(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Tensor:
        """α (B, K, 1, L) for every behaviour; −inf on padding."""
        key_BLd, bias_BL = self._keys(embed, past.item)[..., 0, :], self._bias(past)
        dot_BKL = torch.einsum("bkd,bld->bkl", self._keys(embed, item_BK)[..., 0, :], key_BLd)
        alpha_BKL = dot_BKL * self.search_width**-0.5 + bias_BL[:, None]
        return alpha_BKL.masked_fill(~past.mask[:, None], HIDDEN)[:, :, None]

    def forward(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Interest:
        chosen_BKk = self.search(embed, item_BK, past)
        own = gather(past, chosen_BKk)
        query_BKd = self._keys(embed, item_BK)[..., 0, :]
        key_BKkd = self._keys(embed, own.item)[..., 0, :]
        alpha_BKk = torch.einsum("bkd,bknd->bkn", query_BKd, key_BKkd) * self.search_width**-0.5
        alpha_BKk = (alpha_BKk + self._bias(own)).masked_fill(~own.mask, HIDDEN)
        empty_BK1 = ~own.mask.any(dim=-1, keepdim=True)
        weight_BKk = alpha_BKk.masked_fill(empty_BK1, 0.0).softmax(dim=-1).masked_fill(empty_BK1, 0.0)
        inherent, cross = embed.behaviours(own)
        mean_BKH = torch.einsum("bkn,bknh->bkh", weight_BKk, inherent)
        mean_BKJC = torch.einsum("bkn,bknc->bkc", weight_BKk, cross.flatten(-2))
        vector = torch.cat([mean_BKH * embed.inherent(item_BK), mean_BKH, mean_BKJC], dim=-1)
        return Interest(vector, chosen=chosen_BKk, weight=weight_BKk)

    def _keys(self, embed: FeatureEmbedding, item: Tensor) -> Tensor:
        """(…) items → (…, 1, d): attention embeddings, the same for behaviours and candidates."""
        codes = embed.item_codes[item]
        return torch.cat([table(codes[..., f]) for f, table in enumerate(self.items)], dim=-1)[..., None, :]

    def _bias(self, past: Behaviours) -> Tensor:
        """Behaviours of shape (…) → (…): what their cross features and sizes add to α."""
        bias = torch.zeros(past.mask.shape)
        for j, table in enumerate(self.crosses):
            bias = bias + table(past.cross[..., j])[..., 0]
        return bias if past.size is None else bias + past.size.clamp(min=1).log()


def _tables(like: Any, width: int, std: float) -> Any:
    """One embedding table for each of `like`, with as many codes."""
    tables = nn.ModuleList(nn.Embedding(len(table.weight), width) for table in like)
    for table in tables:
        nn.init.normal_(table.weight, std=std)  # type: ignore[arg-type]
    return tables
