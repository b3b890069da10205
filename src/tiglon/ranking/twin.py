"""TWIN: one attention, used twice: to search a user's whole life, and to read what the search found.

Chang et al., "TWIN: TWo-stage Interest Network for Lifelong User Behavior Modeling in CTR Prediction at
Kuaishou", KDD 2023, https://arxiv.org/abs/2302.02352

Idea. A two-stage ranker loses what its cheap search (GSU) fails to find. TWIN searches with the very target
attention that reads the result (ESU), made cheap by splitting a behaviour's features: the projection of the
inherent ones, K_h W^h, is the same for every user and is looked up from a cache of items; the cross ones
become one number a feature and head.

Covered (§4): the split K = [K_h | K_c] and its projections, α = (K_h W^h)(qᵀ W^q)ᵀ / √d + (K_c W^c) β in both
stages, softmax(α)ᵀ K W^v over the unsplit features of the behaviours found, W^o over the heads, the traversal
of the heads' lists to 100 unique behaviours that all heads share, and the cache of all items' projections,
which `refresh` makes (a ranker that serves has it; training projects the items that occur).

Deviations. The paper leaves the projections' beginning open: here W^q and W^h begin as the same orthonormal
projection, scaled so that an item scores 4 with itself. Where 1 of 300 behaviours decides, that reaches AUC .90
in 400 steps, drawn apart .52 (docs/log.md). In training the search reads keys of the step's own
weights; nothing is stale there. Biases of the cross features are looked up as well: w_j β_j of every code.

Cost a request, with the cache: reading L keys of A·d numbers, K·A·d·L multiplications, no product of size L × H;
then attention over K·k behaviours, all projections live.

Letters: B requests, K candidates, L behaviours, k chosen ones, A heads, d width of a head, N items, H width
of an item, V codes of all cross features, J cross features.
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


class Twin(nn.Module):
    """k: behaviours that are attended to; TWIN: 100.   heads: TWIN: 4.   width: of the interest.
    identity: see `TargetAttention`.

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
        identity: bool = True,
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
            identity=identity,
            item_std=embed.std,
        )
        self.cache: ItemCache | None = None

    def refresh(self, embed: FeatureEmbedding, storage: str = "float32") -> None:
        """Make the cache of today's weights and search in it from now on (in eval mode).

        storage: "float32", "bfloat16" or "int8".
        """
        self.use(ItemCache.build(embed, lambda item: self._keys(embed, item), storage), embed)

    def use(self, cache: ItemCache | None, embed: FeatureEmbedding) -> None:
        """Search in this cache, be it stale. Raises DataError where it was built for other items."""
        if cache is not None:
            cache.require(embed, self.attention.heads, self.attention.head_width)
        self.cache = cache

    def search(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Tensor:
        """The general search unit: (B, K, min(k, L)) positions of the set that all heads share, −1 behind."""
        _, position_BKAk = self.search_heads(embed, item_BK, past)
        return merge(position_BKAk, min(self.k, past.mask.shape[1]))

    @torch.no_grad()
    def search_heads(
        self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours
    ) -> tuple[Tensor, Tensor]:
        """Each head's ranked list before they are merged: α and positions (B, K, A, min(k, L))."""
        attention = self.attention
        # The choice is made in float32, whatever the precision of training: bfloat16 would tie half of a life.
        with torch.autocast("cpu", enabled=False):
            query_BKAd = attention.queries(embed.inherent(item_BK)) * attention.head_width**-0.5
            table_VA, first_J = attention.bias_table(embed.crosses)
            if self.cache is not None and not self.training:
                keys, row_BL = self.cache.keys, past.item
            else:
                count = len(embed.item_codes)
                keys, row_BL = live_keys(past.item, count, lambda item: self._keys(embed, item))
        return search(query_BKAd, keys, row_BL, past, table_VA, first_J, self.k)

    def logits(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Tensor:
        """α (B, K, A, L) of the exact search unit for every behaviour, all projections live; −inf on padding."""
        return self.attention.logits(embed.inherent(item_BK), past, *embed.behaviours(past))

    def forward(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Interest:
        """The exact search unit over what the general one found."""
        chosen_BKk = self.search(embed, item_BK, past)
        vector, weight_BKk = attend(
            self.attention, embed.inherent(item_BK), past, chosen_BKk, embed.behaviours
        )
        return Interest(vector, chosen=chosen_BKk, weight=weight_BKk)

    def _keys(self, embed: FeatureEmbedding, item: Tensor) -> Tensor:
        """(n,) items → K_h W^h (n, A, d)."""
        return self.attention.keys(embed.inherent(item))
