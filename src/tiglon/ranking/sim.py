"""SIM: search the user's life for what concerns the candidate, then attend to that alone.

Pi et al., "Search-based User Interest Modeling with Lifelong Sequential Behavior Data", CIKM 2020,
https://arxiv.org/abs/2006.05639

Idea. A general search unit (GSU) keeps the behaviours that look relevant to the candidate: those of its
category (hard), or those whose learned score is highest (soft). An exact search unit (ESU) is target
attention over what is left, which knows how long ago each was.

Covered: eq. 1 (r_i, hard and soft), the auxiliary CTR task of the soft search on U_r = Σ r_i e_i (§3.1), the
time-interval embedding z_i = [e_i; e_Δt], multi-head attention (eqs. 2–3), L = α L_GSU + β L_ESU (eq. 4;
β = 1), the two-level user → category → behaviours index of the hard search, the offline index of the soft one.

Deviations. The ESU is `TargetAttention`, that of all two-stage units here: a candidate meets z's item part in
a dot product, the time interval and the other cross features in a bias. Δt is cut at powers of two. The soft
search is exact; ALSH is left out. U_r is divided by the number of behaviours, else its size would be that of
the history (the paper trains on samples of a long one). W_a and W_b begin as one orthonormal projection: the
product of two random ones has no sign, r_i e_i means the same with both signs, and a search for the least alike
never learns better. The index of categories is made of the life that a request brings. An unknown category
matches nothing. Beyond the newest k of its category, the hard search drops the rest.

Cost a request: hard, K·(log L + k) after one sort of the L categories; soft, K·L·w products over keys that are
looked up (w = search_width); both, attention over K·k behaviours.

Letters: B requests, K candidates, L behaviours, k chosen ones, N items, w width of the search, H width of an
item, J cross features, C width of a cross feature.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tiglon.errors import ConfigError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.nn.heads import search as search_heads
from tiglon.nn.search import attend, require_k
from tiglon.nn.target_attention import TargetAttention
from tiglon.ranking.item_cache import ItemCache, live_keys
from tiglon.ranking.ranker import Interest
from tiglon.types import MISSING, Behaviours


class TimeInterval(nn.Module):
    """e_Δt: how long before the request, cut at powers of two from 2^−16 to 2^46 units."""

    LOW, SIZE = -16, 64

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(self.SIZE, width)
        nn.init.normal_(self.table.weight, std=0.05)

    def forward(self, gap: Tensor) -> Tensor:
        """(…) intervals above 0 → (…, C)."""
        power = torch.frexp(gap.float()).exponent.long() - self.LOW
        return self.table(power.clamp(0, self.SIZE - 1))


class ExactSearchUnit(nn.Module):
    """Target attention of each candidate over its chosen behaviours z_i = [e_i; cross features; e_Δt]."""

    def __init__(self, embed: FeatureEmbedding, heads: int, head_width: int, width: int) -> None:
        super().__init__()
        self.interval = TimeInterval(embed.cross_width)
        self.attention = TargetAttention(
            embed.inherent_width,
            embed.cross_count + 1,
            embed.cross_width,
            heads=heads,
            head_width=head_width,
            width=width,
            item_std=embed.std,
        )

    def features(self, embed: FeatureEmbedding, past: Behaviours) -> tuple[Tensor, Tensor]:
        """Behaviours of shape (…) → e (…, H) and cross features (…, J + 1, C), the interval last."""
        inherent, cross = embed.behaviours(past)
        return inherent, torch.cat([cross, self.interval(past.gap)[..., None, :]], dim=-2)

    def logits(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Tensor:
        """α (B, K, A, L) of every behaviour, chosen or not; −inf on padding."""
        return self.attention.logits(embed.inherent(item_BK), past, *self.features(embed, past))

    def forward(
        self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours, chosen_BKk: Tensor
    ) -> Interest:
        query = embed.inherent(item_BK)
        vector, weight_BKk = attend(
            self.attention, query, past, chosen_BKk, lambda chosen: self.features(embed, chosen)
        )
        return Interest(vector, chosen=chosen_BKk, weight=weight_BKk)


# -- hard search -----------------------------------------------------------------------------------------------


_LAST = torch.iinfo(torch.int64).max  # sorts after every category


class CategoryIndex(NamedTuple):
    """user → category → behaviours, newest first. It does not know the candidates: make it once a user.

    category: (B, L) ascending; what has none (unknown, padding) comes last.   at: (B, L) where each stands.
    """

    category: Tensor
    at: Tensor

    @classmethod
    def build(cls, category_BL: Tensor, mask_BL: Tensor) -> CategoryIndex:
        """category_BL: int64 codes, 0 for unknown."""
        newest_first = category_BL.masked_fill(~mask_BL | (category_BL == 0), _LAST).flip(1)
        category, order = newest_first.sort(dim=1, stable=True)
        return cls(category, category_BL.shape[1] - 1 - order)

    def search(self, category_BK: Tensor, k: int) -> Tensor:
        """(B, K, min(k, L)) positions of the newest k of each category, newest first; −1 after the last."""
        begin = torch.searchsorted(self.category, category_BK)[..., None]
        end = torch.searchsorted(self.category, category_BK, right=True)[..., None]
        L = self.at.shape[1]
        place = begin + torch.arange(min(k, L))
        users = torch.arange(len(self.at))[:, None, None]
        return self.at[users, place.clamp(max=L - 1)].masked_fill(place >= end, MISSING)


class SimHard(nn.Module):
    """Attention over the newest k behaviours of the candidate's own category; zeros where there is none.

    category: which inherent feature of the items, a column of `embed.item_codes`. Raises ConfigError.
    """

    def __init__(
        self,
        embed: FeatureEmbedding,
        *,
        category: int,
        k: int = 100,
        heads: int = 4,
        head_width: int = 16,
        width: int = 64,
    ) -> None:
        super().__init__()
        features = embed.item_codes.shape[1]
        if not 0 <= category < features:
            raise ConfigError(
                f"category={category}",
                rule=f"Items have inherent features 0 … {features - 1}",
                fix="Pass the number of the one that names their category",
            )
        self.category, self.k, self.width = category, require_k(k), width
        self.esu = ExactSearchUnit(embed, heads, head_width, width)

    def index(self, embed: FeatureEmbedding, past: Behaviours) -> CategoryIndex:
        return CategoryIndex.build(embed.item_codes[past.item, self.category], past.mask)

    def search(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Tensor:
        """(B, K, min(k, L)) positions."""
        return self.index(embed, past).search(embed.item_codes[item_BK, self.category], self.k)

    def logits(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Tensor:
        """α (B, K, A, L) of the exact search unit for every behaviour; −inf on padding."""
        return self.esu.logits(embed, item_BK, past)

    def forward(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Interest:
        return self.esu(embed, item_BK, past, self.search(embed, item_BK, past))


# -- soft search -----------------------------------------------------------------------------------------------


class SimSoft(nn.Module):
    """Attention over the k behaviours with the highest r_i = (W_b e_i)·(W_a e_a).

    alpha: weight of the auxiliary task, by which alone W_a and W_b learn: choosing k has no gradient.
    index: W_b e of every item, which the search reads in eval mode; it is made offline and as old as its last
        refresh. None computes W_b e afresh, as training always does.
    """

    def __init__(
        self,
        embed: FeatureEmbedding,
        *,
        k: int = 100,
        search_width: int = 32,
        alpha: float = 1.0,
        hidden: int = 64,
        heads: int = 4,
        head_width: int = 16,
        width: int = 64,
    ) -> None:
        super().__init__()
        if alpha < 0:
            raise ConfigError(f"alpha={alpha}", rule="The weight of the auxiliary task is at least 0")
        H = embed.inherent_width
        self.k, self.alpha, self.width = require_k(k), alpha, width
        self.query = nn.Linear(H, search_width, bias=False)  # W_a
        self.key = nn.Linear(H, search_width, bias=False)  # W_b
        nn.init.orthogonal_(self.query.weight)
        with torch.no_grad():
            self.key.weight.copy_(self.query.weight)
        self.auxiliary = nn.Sequential(nn.Linear(2 * H, hidden), nn.PReLU(init=0.25), nn.Linear(hidden, 1))
        self.esu = ExactSearchUnit(embed, heads, head_width, width)
        self.index: ItemCache | None = None

    def refresh(self, embed: FeatureEmbedding, storage: str = "float32") -> None:
        """Make the index of today's weights and search in it from now on (in eval mode).

        storage: "float32", "bfloat16" or "int8".
        """
        self.use(ItemCache.build(embed, lambda item: self._keys(embed, item), storage), embed)

    def use(self, index: ItemCache | None, embed: FeatureEmbedding) -> None:
        """Search in this index, be it stale. Raises DataError where it was made for other items."""
        if index is not None:
            index.require(embed, 1, self.key.out_features)
        self.index = index

    @torch.no_grad()
    def search(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Tensor:
        """(B, K, min(k, L)) positions, best first; float32 whatever the precision of training."""
        with torch.autocast("cpu", enabled=False):
            query_BK1w = self.query(embed.inherent(item_BK))[:, :, None]
            if self.index is not None and not self.training:
                keys, row_BL = self.index.keys, past.item
            else:
                count = len(embed.item_codes)
                keys, row_BL = live_keys(past.item, count, lambda item: self._keys(embed, item))
        no_cross = torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64)
        _, at_BK1k = search_heads(query_BK1w, keys, row_BL, past._replace(size=None), *no_cross, self.k)
        return at_BK1k[:, :, 0]

    def logits(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Tensor:
        """α (B, K, A, L) of the exact search unit for every behaviour; −inf on padding."""
        return self.esu.logits(embed, item_BK, past)

    def forward(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Interest:
        found = self.esu(embed, item_BK, past, self.search(embed, item_BK, past))
        if not self.training:
            return found
        return found._replace(logit=self.auxiliary_logit(embed, item_BK, past), logit_weight=self.alpha)

    def auxiliary_logit(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Tensor:
        """(B, K): a click predicted from U_r = Σ r_i e_i / n and e_a."""
        e_BLH, item_BKH = embed.inherent(past.item), embed.inherent(item_BK)
        r_BKL = self.query(item_BKH) @ self.key(e_BLH).transpose(1, 2)
        r_BKL = r_BKL.masked_fill(~past.mask[:, None], 0.0)
        n_B11 = past.lengths.clamp(min=1)[:, None, None]
        return self.auxiliary(torch.cat([r_BKL @ e_BLH / n_B11, item_BKH], dim=-1))[..., 0]

    def _keys(self, embed: FeatureEmbedding, item: Tensor) -> Tensor:
        """(n,) items → W_b e, (n, 1, w): one head."""
        return self.key(embed.inherent(item))[:, None]
