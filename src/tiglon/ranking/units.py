"""Interest units by their names, as the command line and saved rankers spell them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tiglon.errors import ConfigError, did_you_mean, require_counts
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.bst import BST
from tiglon.ranking.can import CAN
from tiglon.ranking.dare import Dare
from tiglon.ranking.dien import DIEN
from tiglon.ranking.din import DIN
from tiglon.ranking.eta import Eta
from tiglon.ranking.mimn import MIMN
from tiglon.ranking.pooling import ChunkPooling, FullAttention, MeanPooling, MostRecent
from tiglon.ranking.ranker import InterestUnit
from tiglon.ranking.sdim import Sdim
from tiglon.ranking.sim import SimHard, SimSoft
from tiglon.ranking.twin import Twin
from tiglon.ranking.twin_v2 import TwinV2


@dataclass(frozen=True)
class UnitConfig:
    """A unit reads what it knows; what is not here is as its paper has it."""

    heads: int = 4  # TWIN: 4
    head_width: int = 16
    width: int = 64  # of an interest
    chosen: int = 100  # behaviours that a two-stage unit attends to, and `recent`; TWIN: 100
    category: str | None = None  # inherent feature of SIM's search and of CAN; None: see `model.category_of`
    l2: float = 0.0  # DIN: λ of the mini-batch-aware L2; paper: 0.01
    bits: int = 64  # ETA: of a fingerprint; published code: 32
    slots: int = 8  # MIMN: of its memory, and channels; paper: 4 to 8

    def __post_init__(self) -> None:
        require_counts(self, "heads", "head_width", "width", "chosen", "bits", "slots")
        if self.l2 < 0:
            raise ConfigError(f"l2={self.l2}", rule="l2 is 0 or above")


# embed, settings, the column of `embed.item_codes` that is the category → unit
MakeUnit = Callable[[FeatureEmbedding, UnitConfig, int], InterestUnit]

UNITS: dict[str, MakeUnit] = {
    "twin": lambda embed, c, _: Twin(embed, k=c.chosen, **_attention(c)),
    "twin_v2": lambda embed, c, _: TwinV2(embed, k=c.chosen, **_attention(c)),
    "dare": lambda embed, c, _: Dare(embed, k=c.chosen),
    "full_attention": lambda embed, c, _: FullAttention(embed, **_attention(c)),
    "sim_hard": lambda embed, c, category: SimHard(embed, category=category, k=c.chosen, **_attention(c)),
    "sim_soft": lambda embed, c, _: SimSoft(embed, k=c.chosen, **_attention(c)),
    "eta": lambda embed, c, _: Eta(embed, k=c.chosen, bits=c.bits, **_attention(c)),
    "sdim": lambda embed, c, _: Sdim(embed),
    "din": lambda embed, c, _: DIN(embed, l2=c.l2),
    "dien": lambda embed, c, _: DIEN(embed),
    "can": lambda embed, c, category: CAN(embed, feature=category),
    "bst": lambda embed, c, _: BST(embed, width=c.width),
    "mimn": lambda embed, c, _: MIMN(embed, slots=c.slots),
    "mean_pooling": lambda embed, c, _: MeanPooling(embed),
    "chunk_pooling": lambda embed, c, _: ChunkPooling(embed, **_attention(c)),
    "recent": lambda embed, c, _: MostRecent(embed, k=c.chosen, **_attention(c)),
}
NONE = "none"


def require_unit(name: str) -> str:
    """The name, or ConfigError unless it is that of a unit or "none"."""
    if name not in UNITS and name != NONE:
        raise ConfigError(f"no interest unit named '{name}'", fix=did_you_mean(name, [*UNITS, NONE]))
    return name


def make_unit(name: str, embed: FeatureEmbedding, config: UnitConfig, category: int) -> InterestUnit | None:
    """A unit with fresh weights; None for "none"."""
    return None if require_unit(name) == NONE else UNITS[name](embed, config, category)


def _attention(c: UnitConfig) -> dict[str, Any]:
    return {"heads": c.heads, "head_width": c.head_width, "width": c.width}
