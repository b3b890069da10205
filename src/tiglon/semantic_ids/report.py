"""How good a set of semantic IDs is, before anything is trained on it: a table and a picture.

A tokenizer that has collapsed uses few of its codes, and puts many items under the same ones. One whose
prefixes mean something has pairs of items that grow more alike with every code they share.

Letters: N items that are alive, L levels of the tokenizer (the collision digit is not one), V codes.
"""

from __future__ import annotations

import io
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tiglon.errors import ConfigError, DataError, StorageError
from tiglon.semantic_ids.catalog import SemanticIds
from tiglon.semantic_ids.tokenizer import Tokenizer

PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True, eq=False)
class IdReport:
    """counts: per level, (V,) how many items have each code.
    groups: (G,) how many items share each of the G distinct rows of L codes.
    digits: how many items the collision digit can tell apart.
    error: (L,) ‖x − x̂‖² / ‖x − mean‖² after each level; None where codes stand for no vector.
    similarity: (L + 1,) mean cosine of pairs of items that share exactly their first 0 … L codes;
        NaN where there are no such pairs.
    """

    items: int
    counts: tuple[np.ndarray, ...]
    groups: np.ndarray
    digits: int
    error: np.ndarray | None
    similarity: np.ndarray

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(count) for count in self.counts)

    @property
    def capacity(self) -> int:
        """How many different rows of L codes there are."""
        return math.prod(self.sizes)

    @property
    def usage(self) -> np.ndarray:
        """(L,) share of each level's codes that some item has."""
        return np.array([(count > 0).mean() for count in self.counts])

    @property
    def entropy(self) -> np.ndarray:
        """(L,) bits: −Σ p log2 p over a level's codes; at most log2 V."""
        return np.array([_entropy(count) for count in self.counts])

    @property
    def perplexity(self) -> np.ndarray:
        """(L,) 2^entropy: as many codes, evenly used, would say as much."""
        return 2**self.entropy

    @property
    def colliding(self) -> float:
        """Share of items whose L codes another item has too."""
        return float(self.groups[self.groups > 1].sum() / max(self.items, 1))

    @property
    def largest_group(self) -> int:
        return int(self.groups.max(initial=0))

    def table(self) -> str:
        """The report as text."""
        levels = Table(title=f"Semantic IDs of {self.items:,} items", title_justify="left")
        for column in ("level", "codes", "used", "entropy, bits", "perplexity", "relative error"):
            levels.add_column(column, justify="right")
        for level, size in enumerate(self.sizes):
            error = "–" if self.error is None else f"{self.error[level]:.3f}"
            usage, entropy, perplexity = self.usage[level], self.entropy[level], self.perplexity[level]
            row = (f"{usage:.1%}", f"{entropy:.2f} of {math.log2(size):.2f}", f"{perplexity:.0f}", error)
            levels.add_row(str(level + 1), str(size), *row)
        shared = Table(title="Mean cosine by shared prefix", title_justify="left")
        shared.add_column("codes shared", justify="right")
        shared.add_column("mean cosine", justify="right")
        for length, cosine in enumerate(self.similarity.tolist()):
            shared.add_row(str(length), "no pairs" if np.isnan(cosine) else f"{cosine:.3f}")
        text = io.StringIO()
        console = Console(file=text, width=100, color_system=None)
        console.print(levels)
        console.print(
            f"Capacity {self.capacity:,} · {self.colliding:.1%} of items share all {len(self.sizes)} codes "
            f"with another · largest group {self.largest_group:,} of {self.digits:,} digits",
            soft_wrap=True,
        )
        console.print(shared)
        return text.getvalue()

    def plot(self, path: Path) -> None:
        """The report as a picture of four panels: .png, .svg or .pdf. Raises ConfigError, StorageError."""
        kind = path.suffix.lower()
        if kind not in PICTURES:
            raise ConfigError(
                f"a picture named '{path.name}'",
                rule=f"Its name ends in {', '.join(PICTURES)}",
                fix="Name it FILE.png",
            )
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, PercentFormatter

        figure = Figure(figsize=(11, 7.5), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(f"Semantic IDs of {self.items:,} items", fontsize=15, fontweight="bold")
        (use, collide), (error, alike) = figure.subplots(2, 2)
        colours = [f"C{level}" for level in range(len(self.sizes))]

        for level, count in enumerate(self.counts):
            share = np.sort(count[count > 0])[::-1] / max(self.items, 1)
            label = f"level {level + 1}: {self.perplexity[level]:.0f} of {len(count)} effective"
            use.plot(np.arange(1, len(share) + 1), share, color=colours[level], label=label, lw=2)
        use.axhline(1 / max(self.sizes), color="grey", ls=":", lw=1.2, label="all used alike")
        use.set(
            yscale="log",
            title="How evenly codes are used",
            xlabel="code, most frequent first",
            ylabel="share of items",
        )
        use.yaxis.set_major_formatter(PercentFormatter(1, decimals=2))
        use.legend(frameon=False)

        size, groups = np.unique(self.groups, return_counts=True)
        collide.scatter(size, size * groups / max(self.items, 1), color="C3", zorder=3)
        collide.vlines(size, 1e-9, size * groups / max(self.items, 1), color="C3", lw=2)
        collide.set(
            title=f"{self.colliding:.1%} of items share all {len(self.sizes)} codes",
            xlabel="items in the group",
            ylabel="share of items",
            xscale="log",
            xlim=(0.8, max(2, self.largest_group) * 1.3),
            ylim=(0, None),
        )
        collide.xaxis.set_major_formatter("{x:.0f}")
        collide.yaxis.set_major_formatter(PercentFormatter(1))

        levels = np.arange(1, len(self.sizes) + 1)
        if self.error is None:
            error.text(0.5, 0.5, "These codes stand for no vector", ha="center", transform=error.transAxes)
        else:
            error.bar(levels, self.error, color=colours, width=0.6)
            for level, value in enumerate(self.error.tolist(), 1):
                error.annotate(
                    f"{value:.3f}", (level, value), (0, 3), textcoords="offset points", ha="center"
                )
        error.set(title="What is left unexplained", xlabel="after level", ylabel="relative squared error")
        error.margins(y=0.15)
        error.xaxis.set_major_locator(MaxNLocator(integer=True))

        lengths = np.arange(len(self.similarity))
        alike.plot(lengths, self.similarity, "o-", color="C2", lw=2, ms=8)
        for length, cosine in enumerate(self.similarity.tolist()):
            if not np.isnan(cosine):
                alike.annotate(
                    f"{cosine:.2f}", (length, cosine), (0, 8), textcoords="offset points", ha="center"
                )
        alike.set(
            title="Do prefixes mean something?", xlabel="codes that two items share", ylabel="mean cosine"
        )
        alike.margins(y=0.2)
        alike.xaxis.set_major_locator(MaxNLocator(integer=True))

        for axes in (use, collide, error, alike):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", alpha=0.3)
        drawn = io.BytesIO()
        figure.savefig(drawn, format=kind.removeprefix("."), dpi=130)
        aside = path.with_name(f".{path.name}.new")
        try:
            aside.write_bytes(drawn.getvalue())
            aside.replace(path)
        except OSError as error:
            with suppress(OSError):
                aside.unlink()
            raise StorageError(
                f"{path} could not be written: {error.strerror}",
                rule="Nothing was changed there",
                fix="Name a file in a folder that is there and has room",
            ) from error


def report(
    ids: SemanticIds,
    vectors: np.ndarray,
    tokenizer: Tokenizer | None = None,
    *,
    pairs: int = 20_000,
    seed: int = 0,
) -> IdReport:
    """Measure the living items of `ids`.

    vectors: (N, D), row i being dense item i.   tokenizer: what made the codes, for the error.
    pairs: how many pairs to draw for each length of shared prefix.
    """
    if len(vectors) != len(ids):
        raise DataError(f"{len(vectors)} vectors for {len(ids)} items")
    codes, x = ids.codes[ids.alive, :-1], np.asarray(vectors)[ids.alive]
    counts = tuple(np.bincount(code, minlength=size) for code, size in zip(codes.T, ids.sizes, strict=False))
    groups = np.unique(codes, axis=0, return_counts=True)[1]
    error = None if tokenizer is None else _errors(codes, x, tokenizer)
    similarity = _similarity(codes, x, pairs, np.random.default_rng(seed))
    return IdReport(len(codes), counts, groups, ids.sizes[-1], error, similarity)


def _errors(codes: np.ndarray, x: np.ndarray, tokenizer: Tokenizer) -> np.ndarray | None:
    spread = float(np.square(x - x.mean(axis=0)).sum()) or 1.0
    errors = []
    for length in range(1, codes.shape[1] + 1):
        guess = tokenizer.decode(codes[:, :length])
        if guess is None:
            return None
        errors.append(float(np.square(x - guess).sum()) / spread)
    return np.array(errors)


def _similarity(codes: np.ndarray, x: np.ndarray, pairs: int, random: np.random.Generator) -> np.ndarray:
    """(L + 1,): sort the items, so that those with a common prefix are neighbours, and draw within."""
    order = np.lexsort(codes.T[::-1])
    codes, x = codes[order], x[order]
    norm = np.linalg.norm(x, axis=1)
    new = np.zeros(len(codes), bool)
    new[:1] = True
    means = np.full(codes.shape[1] + 1, np.nan)
    for length in range(codes.shape[1] + 1):
        if length:
            new[1:] |= codes[1:, length - 1] != codes[:-1, length - 1]
        first = np.flatnonzero(new)
        group = np.cumsum(new) - 1
        size = np.diff(np.append(first, len(codes)))
        able = np.flatnonzero(size[group] > 1)
        if not len(able):
            break
        one = random.choice(able, pairs)
        step = random.integers(1, size[group[one]])
        other = first[group[one]] + (one - first[group[one]] + step) % size[group[one]]
        if length < codes.shape[1]:
            exact = codes[one, length] != codes[other, length]
            one, other = one[exact], other[exact]
        if len(one):
            lengths = norm[one] * norm[other]
            dots = np.einsum("pd,pd->p", x[one], x[other])
            means[length] = (dots / np.where(lengths > 0, lengths, 1)).mean()
    return means


def _entropy(count: np.ndarray) -> float:
    share = count[count > 0] / max(count.sum(), 1)
    return float((share * np.log2(1 / share)).sum())  # so that one code has 0 bits, not −0
