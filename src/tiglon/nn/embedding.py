"""Coded features → vectors: one table a feature, shared by everything that reads an item or a behaviour.

Letters: B users, L behaviours, K candidates, N items, F inherent features, J cross features,
H width of an item, P width of what is known of user and context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiglon.types import Behaviours


class FeatureEmbedding(nn.Module):
    """Code 0 of every feature is "unknown"; item −1 is the unknown item.

    item_codes: (N + 1, F), the codes of every item's inherent features, the unknown item last.
    item_sizes, item_widths: codes and width of each inherent feature; H is the sum of the widths.
    cross_sizes: codes of each cross feature of a behaviour, all `cross_width` wide (TWIN §4.1: 8).
    profile_sizes: codes of each feature of the user and of the request, 8 wide.
    catalogue: names the items' ids, which codes do not tell.
    """

    def __init__(
        self,
        item_codes: np.ndarray,
        item_sizes: Sequence[int],
        item_widths: Sequence[int],
        cross_sizes: Sequence[int] = (),
        profile_sizes: Sequence[int] = (),
        *,
        cross_width: int = 8,
        profile_width: int = 8,
        std: float = 0.3,
        catalogue: str = "",
    ) -> None:
        super().__init__()
        self.item_codes: Tensor
        self.register_buffer("item_codes", torch.from_numpy(np.ascontiguousarray(item_codes, np.int64)))
        self.items = _tables(item_sizes, item_widths, std)
        self.crosses = _tables(cross_sizes, [cross_width] * len(cross_sizes), std)
        self.profiles = _tables(profile_sizes, [profile_width] * len(profile_sizes), std)
        self._row: Tensor  # (N + 1,) of each item in `_held`, −1 for those that are not
        self.register_buffer("_row", torch.full((len(item_codes),), -1), persistent=False)
        self._held: Tensor | None = None
        self.catalogue_name = catalogue
        self.std = std  # of the tables as they begin
        self.inherent_width = sum(item_widths)  # H
        self.cross_count, self.cross_width = len(cross_sizes), cross_width  # J
        self.profile_width = profile_width * len(profile_sizes)  # P

    def inherent(self, item: Tensor) -> Tensor:
        """(…) dense items → (…, H): K_h of behaviours, q of candidates."""
        if self._held is not None and torch.is_grad_enabled():
            row = self._row[item]
            if (row >= 0).all():
                return F.embedding(row, self._held)
        codes = self.item_codes[item]
        return torch.cat([table(codes[..., f]) for f, table in enumerate(self.items)], dim=-1)

    @contextmanager
    def holding(self, *items: Tensor) -> Iterator[None]:
        """Inside, `inherent` reads these items from one look-up; only the cost changes.

        The gradient of a look-up is as large as its table, so that with many items a few look-ups a step cost
        more than all else.
        """
        distinct = torch.unique(torch.cat([item.flatten() for item in items]))
        held = self.inherent(distinct)
        self._row[distinct] = torch.arange(len(distinct))
        self._held = held
        try:
            yield
        finally:
            self._held = None
            self._row[distinct] = -1

    def catalogue(self) -> Tensor:
        """(N + 1, H) of every item, the unknown one last, so that −1 finds it."""
        return self.inherent(torch.arange(len(self.item_codes)))

    def cross(self, code: Tensor) -> Tensor:
        """(…, J) codes → (…, J, cross_width): K_c."""
        if not self.cross_count:
            return torch.zeros(*code.shape[:-1], 0, self.cross_width)
        return torch.stack([table(code[..., j]) for j, table in enumerate(self.crosses)], dim=-2)

    def behaviours(self, past: Behaviours) -> tuple[Tensor, Tensor]:
        """Behaviours of shape (…) → K_h (…, H) and K_c (…, J, cross_width)."""
        return self.inherent(past.item), self.cross(past.cross)

    def profile(self, code_BX: Tensor) -> Tensor:
        """(B, X) codes of user and request features → (B, P)."""
        parts = [table(code_BX[:, x]) for x, table in enumerate(self.profiles)]
        return torch.cat(parts, dim=-1) if parts else torch.zeros(len(code_BX), 0)


def _tables(sizes: Sequence[int], widths: Sequence[int], std: float) -> Any:
    tables = nn.ModuleList(nn.Embedding(size, width) for size, width in zip(sizes, widths, strict=True))
    for table in tables:
        nn.init.normal_(table.weight, std=std)  # type: ignore[arg-type]
    return tables
