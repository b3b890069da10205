"""CAN: a candidate is a small network, and behaviours are what goes through it.

Paper: Bian et al., "CAN: Feature Co-Action Network for Click-Through Rate Prediction", WSDM 2022,
https://arxiv.org/abs/2011.05625

Idea: a cross-ID of (behaviour, candidate) has a vector for each pair and learns nothing of pairs that are rare.
CAN gives each candidate the weights of a micro-MLP and each behaviour an input to it: as free as a product
of two independent parts can be, with N parameters a side in place of N².
Covers: the co-action unit, powers of its input ("multi-orders"), tables apart from those of the rest ("parameter
independence").

Deviations
- tanh between the layers for all orders (the paper has SeLU for the first).
- No combination independence: one micro-MLP serves all pairs of features there are, which is one.
- One feature of candidate and behaviour is crossed, by its code; all values that training never saw share code 0.

Cost: B·K·L·(16·8 + 8·4) products an order, and 160 + 16 parameters a code, which is why one crosses by a feature of
some thousand codes rather than by the item.

Letters: B requests, K candidates, L behaviours, N codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from tiglon.errors import ConfigError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.ranker import Interest
from tiglon.types import Behaviours


class CAN(nn.Module):
    """Σ over behaviours and orders c of the micro-MLP's layers, [h_1 | h_2], for the input P^c; zeros without a past.

    feature: which inherent feature is crossed.   widths: of the micro-MLP's input and layers (paper: 16, 8, 4).
    orders: powers 1 … `orders` of the input (paper: 3).
    """

    def __init__(
        self,
        embed: FeatureEmbedding,
        *,
        feature: int = 0,
        widths: Sequence[int] = (16, 8, 4),
        orders: int = 3,
    ) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1 or orders < 1:
            raise ConfigError(
                f"widths={tuple(widths)}, orders={orders}",
                rule="A micro-MLP has an input and a layer, each at least 1 wide, and at least one order",
            )
        self.feature, self.orders = feature, orders
        self.shapes = list(pairwise(widths))
        self.width = sum(widths[1:])
        codes = embed.items[feature].num_embeddings
        self.micro = nn.Embedding(codes, sum(a * b for a, b in self.shapes))
        self.inputs = nn.Embedding(codes, widths[0])
        nn.init.normal_(self.inputs.weight, std=0.3)
        with torch.no_grad():
            parts = [torch.randn(codes, a * b) * a**-0.5 for a, b in self.shapes]
            self.micro.weight.copy_(torch.cat(parts, dim=1))

    def forward(self, embed: FeatureEmbedding, item_BK: Tensor, past: Behaviours) -> Interest:
        weights = self.weights(embed.item_codes[item_BK, self.feature])
        counted_BL = past.mask.float() if past.size is None else past.mask * past.size
        input_BLP = self.inputs(embed.item_codes[past.item, self.feature])
        total: list[Tensor | int] = [0] * len(weights)
        for order in range(1, self.orders + 1):
            x_BKLP = (input_BLP**order)[:, None]
            for layer, weight in enumerate(weights):
                x_BKLP = x_BKLP @ weight
                if layer < len(weights) - 1:
                    x_BKLP = torch.tanh(x_BKLP)
                total[layer] = total[layer] + (counted_BL[:, None, None] @ x_BKLP).squeeze(-2)
        return Interest(torch.cat(total, dim=-1))  # type: ignore[arg-type]

    def weights(self, code: Tensor) -> list[Tensor]:
        """The micro-MLP of each candidate: (…, inputs, outputs) of every layer."""
        parts = self.micro(code).split([a * b for a, b in self.shapes], dim=-1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, self.shapes, strict=True)]
