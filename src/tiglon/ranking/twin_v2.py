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

Letters: B requests, K candidates, L clusters, k chosen ones, A heads, d width of a head, V codes of all cross
features.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tiglon.errors import DataError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.nn.heads import Keys, merge, search
from tiglon.nn.search import attend, require_k
from tiglon.nn.target_attention import TargetAttention
from tiglon.ranking.ranker import Interest
from tiglon.types import Behaviours


@dataclass(frozen=True, eq=False)
class KeyCache:
    """K_h W^h of every item and head, as it was when the cache was made; the unknown item last.

    catalogue: of which item table.   version: of which weights.
    """

    keys: Keys
    catalogue: str
    version: str

    @classmethod
    @torch.no_grad()
    def build(cls, embed: FeatureEmbedding, attention: TargetAttention, storage: str = "float32") -> KeyCache:
        """storage: "float32", "bfloat16" or "int8"; the exact stage computes its keys afresh in any case."""
        with torch.autocast("cpu", enabled=False):
            keys = Keys.of(attention.keys(embed.catalogue()), storage)
        return cls(keys, _digest(embed.item_codes), _digest(keys.decode()))


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]


class TwinV2(nn.Module):
    """k: clusters that are attended to; TWIN V2: 100.   heads, head_width, width: of the attention.

    cache: what the search reads in eval mode; None computes the keys afresh, as training always does.
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
        )
        self.cache: KeyCache | None = None

    def refresh(self, embed: FeatureEmbedding, storage: str = "float32") -> None:
        """Make the cache of today's weights and search in it from now on (in eval mode)."""
        self.use(KeyCache.build(embed, self.attention, storage), embed)

    def use(self, cache: KeyCache | None, embed: FeatureEmbedding) -> None:
        """Search in this cache. Raises DataError where it was made for other items."""
        if cache is not None and cache.catalogue != _digest(embed.item_codes):
            raise DataError(
                f"a cache of catalogue {cache.catalogue} for items of catalogue {_digest(embed.item_codes)}",
                rule="A cache holds the very items that the ranker embeds",
                fix="Call refresh(embed)",
            )
        self.cache = cache

    @torch.no_grad()
    def search(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Tensor:
        """(B, K, ≤ k) positions of the chosen clusters, in the order the heads' lists give them, −1 behind."""
        attention = self.attention
        with torch.autocast("cpu", enabled=False):
            query_BKAd = attention.queries(embed.inherent(item_BK)) * attention.head_width**-0.5
            if self.cache is not None and not self.training:
                keys, row_BL = self.cache.keys, past.item
            else:
                item, row_BL = past.item.unique(return_inverse=True)
                keys = Keys.of(attention.keys(embed.inherent(item)))
            table_VA, first_J = self._cross_table(embed)
        _, at_BKAn = search(query_BKAd, keys, row_BL, past, table_VA, first_J, self.k)
        return merge(at_BKAn, self.k)

    def _cross_table(self, embed: FeatureEmbedding) -> tuple[Tensor, Tensor]:
        """(V, A): what each code adds, (K_c W^c) β, one feature after the other; and (J,) where each begins."""
        tables = [
            (table.weight @ self.attention.cross[j])[:, None] * self.attention.beta[:, j]
            for j, table in enumerate(embed.crosses)
        ]
        sizes = torch.tensor([len(table) for table in tables], dtype=torch.int64)
        return torch.cat([*tables, torch.zeros(0, self.attention.heads)]), sizes.cumsum(0) - sizes

    def logits(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Tensor:
        """α' (B, K, A, L) of the exact stage for every cluster; −inf on padding."""
        return self.attention.logits(embed.inherent(item_BK), past, *embed.behaviours(past))

    def forward(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Interest:
        chosen_BKk = self.search(embed, item_BK, past)
        vector, weight_BKk = attend(
            self.attention, embed.inherent(item_BK), past, chosen_BKk, embed.behaviours
        )
        return Interest(vector, chosen=chosen_BKk, weight=weight_BKk)
