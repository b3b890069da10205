"""TWIN V2: TWIN over clusters of behaviours, so that a whole life fits.

"TWIN V2: Scaling Ultra-Long User Behavior Sequence Modeling for Enhanced CTR Prediction at Kuaishou"
Si et al., CIKM 2024, https://arxiv.org/abs/2407.16357

Idea. Offline, a life of up to 10^6 behaviours becomes about a tenth as many virtual items, each of which
stands for n behaviours (`clusters.py`, `cluster_store.py`). Online, both stages of TWIN read virtual items
and add ln n to what they score, by which a cluster weighs as much as its members would:

    α' = α + ln n,      α = (K_h W^h)(qᵀ W^q)ᵀ / √d + (K_c W^c) β
    search: each head ranks by α', the lists are merged to 100 unique clusters
    attention: head = softmax(α')ᵀ K W^v over these

If the members of every cluster are alike, this is attention over the raw life, exactly.

Covered: the cluster-aware target attention and search; behaviours later than the clusters are entries of
size 1. Where no sizes are given it is TWIN (Chang et al. 2023, https://arxiv.org/abs/2302.02352).

Deviations. The paper's other towers and its serving are not here. W^q and W^h begin equal (`TargetAttention`).

Cost a request: C·A·d products a candidate for C clusters, with keys that are looked up; attention over 100.

Letters: B requests, K candidates, L clusters, k chosen ones, A heads, d width of a head, V codes of all J cross
features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tiglon.nn.embedding import FeatureEmbedding
from tiglon.nn.heads import merge, search
from tiglon.nn.search import attend, require_k
from tiglon.nn.target_attention import TargetAttention
from tiglon.ranking.item_cache import ItemCache, live_keys
from tiglon.ranking.ranker import Interest
from tiglon.types import Behaviours


class TwinV2(nn.Module):
    """k: clusters that are attended to; TWIN V2: 100.   heads, head_width, width: of the attention.

    cache: what the search reads in eval mode; None computes K_h W^h afresh, as training always does.
    """

    def __init__(
        self,
        embed: FeatureEmbedding,
        *,
        k: int = 100,
        heads: int = 4,
        head_width: int = 16,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.k, self.width = require_k(k), width
        self.attention = TargetAttention(
            embed.inherent_width,
            embed.cross_count,
            embed.cross_width,
            heads=heads,
            head_width=head_width,
            width=width,
            item_std=embed.std,
        )
        self.cache: ItemCache | None = None

    def refresh(self, embed: FeatureEmbedding, storage: str = "float32") -> None:
        """Make the cache of today's weights and search in it from now on (in eval mode).

        storage: "float32", "bfloat16" or "int8".
        """
        self.use(ItemCache.build(embed, lambda item: self.keys(embed, item), storage), embed)

    def use(self, cache: ItemCache | None, embed: FeatureEmbedding) -> None:
        """Search in this cache, be it stale. Raises DataError where it was built for other items."""
        if cache is not None:
            cache.require(embed, self.attention.heads, self.attention.head_width)
        self.cache = cache

    @torch.no_grad()
    def search(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Tensor:
        """(B, K, min(k, L)) positions of the chosen clusters, shared by all heads, −1 behind."""
        attention = self.attention
        with torch.autocast("cpu", enabled=False):  # bfloat16 would tie half of a life
            query_BKAd = attention.queries(embed.inherent(item_BK)) * attention.head_width**-0.5
            table_VA, first_J = attention.bias_table(embed.crosses)
            if self.cache is not None and not self.training:
                keys, row_BL = self.cache.keys, past.item
            else:
                count = len(embed.item_codes)
                keys, row_BL = live_keys(past.item, count, lambda item: self.keys(embed, item))
        _, position_BKAk = search(query_BKAd, keys, row_BL, past, table_VA, first_J, self.k)
        return merge(position_BKAk, min(self.k, past.mask.shape[1]))

    def logits(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Tensor:
        """α' (B, K, A, L) of the exact stage for every cluster; −inf on padding."""
        return self.attention.logits(embed.inherent(item_BK), past, *embed.behaviours(past))

    def forward(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Interest:
        chosen_BKk = self.search(embed, item_BK, past)
        vector, weight_BKk = attend(
            self.attention, embed.inherent(item_BK), past, chosen_BKk, embed.behaviours
        )
        return Interest(vector, chosen=chosen_BKk, weight=weight_BKk)

    def keys(self, embed: FeatureEmbedding, item: Tensor) -> Tensor:
        """(n,) items → K_h W^h (n, A, d)."""
        return self.attention.keys(embed.inherent(item))
