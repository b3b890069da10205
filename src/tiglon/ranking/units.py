"""Interest units by their names, as the command line and saved rankers spell them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tiglon.errors import ConfigError, did_you_mean
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.pooling import FullAttention, MeanPooling
from tiglon.ranking.ranker import InterestUnit


@dataclass(frozen=True)
class UnitConfig:
    """What units have in common; a unit reads what it knows. The rest is as its paper has it."""

    heads: int = 4  # TWIN: 4
    head_width: int = 16
    width: int = 64  # of an interest
    chosen: int = 100  # behaviours that a two-stage unit attends to; TWIN: 100
    category: str | None = None  # inherent feature by which SIM searches; None: see `model.category_of`

    def __post_init__(self) -> None:
        for name in ("heads", "head_width", "width", "chosen"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}", rule=f"{name} is at least 1")


# embed, settings, the column of `embed.item_codes` that is the category → unit
MakeUnit = Callable[[FeatureEmbedding, UnitConfig, int], InterestUnit]


def _full_attention(embed: FeatureEmbedding, c: UnitConfig, category: int) -> InterestUnit:
    return FullAttention(embed, heads=c.heads, head_width=c.head_width, width=c.width)


UNITS: dict[str, MakeUnit] = {
    "mean_pooling": lambda embed, c, category: MeanPooling(embed),
    "full_attention": _full_attention,
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
