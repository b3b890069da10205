"""TIGER as a retriever: learn to write the semantic ID of the next item, then decode it over the trie.

The network is one of two: `CausalTiger` (all of a user's targets in one pass; the default) or
`PaperTiger` (the paper's T5). This file is what both share: windows over the log, batches, training,
decoding, items that arrive later, files.

Letters: E events, B rows, L events of a row, S code positions, T targets, K candidates.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiglon.data.folders import reading, written_aside
from tiglon.errors import ConfigError, DataError, require_counts
from tiglon.retrieval.beam import beam_search
from tiglon.retrieval.index import most_alike
from tiglon.retrieval.learning import learn, sampled
from tiglon.retrieval.repetition import Returns, shares
from tiglon.retrieval.retriever import Retriever, item_matrix, require_k
from tiglon.retrieval.tiger_causal import CausalConfig, CausalTiger
from tiglon.retrieval.tiger_paper import PaperConfig, PaperTiger
from tiglon.retrieval.topk import require_dense, require_deny
from tiglon.retrieval.windows import Batch, checksum, padded_histories
from tiglon.semantic_ids.catalog import SemanticIds
from tiglon.semantic_ids.trie import Trie
from tiglon.train.loop import Progress, TrainConfig
from tiglon.types import MISSING, Candidates, Histories, Interactions, Targets, Vocabulary

FORMAT = 2


@dataclass(frozen=True)
class TigerConfig:
    model: CausalConfig | PaperConfig = field(default_factory=CausalConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    window: int = 50  # most recent events read; paper: 20
    batch_targets: int = 384  # targets a step; paper: 256
    beams: int = 50  # width when decoding; reproductions of the paper need 30 or more
    renormalise: bool = True  # see `beam`; the training loss uses the same convention
    validation_users: int = 3000  # drawn by the seed; the score that selects is their NDCG@10

    def __post_init__(self) -> None:
        require_counts(self, "window", "batch_targets", "beams", "validation_users")


class Tiger(Retriever):
    """Retrieve by generating semantic IDs.

    tiger = Tiger(ids, items.vocabulary).fit(split.train, split.validation)
    tiger.recommend(["user 7"], k=10)
    """

    name = "tiger"

    def __init__(
        self,
        ids: SemanticIds,
        items: Vocabulary,
        config: TigerConfig | None = None,
        trained: np.ndarray | None = None,
        vectors: np.ndarray | None = None,
    ) -> None:
        """trained: (N,) bool, the items that the network learns from; by default all that are alive.
        vectors: (N, C) of the items, whose content `CausalTiger` reads and writes; None for codes alone.
        """
        if len(ids) != len(items):
            raise DataError(f"{len(ids)} semantic IDs for {len(items)} items")
        self.config = config or TigerConfig()
        self.ids, self.items = ids, items
        self.trie = Trie.build(ids.codes, ids.sizes, ids.alive)
        self.trained = ids.alive.copy() if trained is None else trained
        if vectors is not None:
            vectors = item_matrix(vectors, len(ids))
        self.fitted_items = len(ids)
        self._digest = None if vectors is None else checksum(vectors)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.train.seed)
            self.network: CausalTiger | PaperTiger = (
                PaperTiger(ids.sizes, self.config.model)
                if isinstance(self.config.model, PaperConfig)
                else CausalTiger(
                    ids.sizes,
                    self.config.model,
                    ids.codes[self.trained],
                    None if vectors is None else vectors[self.trained],
                )
            ).eval()

    @cached_property
    def _codes(self) -> Tensor:
        return torch.from_numpy(self.ids.codes.astype(np.int64))

    # -- learning ------------------------------------------------------------------------------

    def fit(
        self,
        interactions: Interactions,
        validation: Targets | None = None,
        *,
        directory: Path | None = None,
        report: Callable[[Progress], None] | None = None,
    ) -> Tiger:
        """Learn from the training events; keep the weights that are best on `validation`.

        directory: for checkpoints; the same call on the same directory goes on where it stopped.
        Raises DataError where the log numbers items otherwise or holds nothing to learn from.
        """
        c = self.config
        self.history, self.log = learn(
            self,
            interactions,
            sampled(validation, c),
            lambda offsets, moment: self.network.windows(offsets, moment, c.window),
            lambda batch: self.loss(batch).sum(dim=1),
            wanted=self.ids.alive & self.trained,
            about={"ids": self.ids.version, "vectors": self._digest},
            directory=directory,
            report=report,
        )
        return self

    def loss(self, batch: Batch) -> Tensor:
        """(T, S) −log p of each code of the batch's T targets; a row's sum is −log p(item)."""
        allowed = self._allowed(batch.item[batch.target]) if self.config.renormalise else None
        sequences = self._codes[batch.item], batch.moment, batch.target, allowed, batch.user
        if isinstance(self.network, PaperTiger):
            return self.network.loss(*sequences)
        had = self.network.repetition.before(batch)
        return self.network.loss(*sequences, Returns.before(had, self._codes, self._shares))

    def _allowed(self, items: Tensor) -> list[Tensor]:
        """For each position the codes (T, V) that exist below each item's prefix."""
        masks = []
        rows = items.numpy()
        for depth, size in enumerate(self.ids.sizes):
            offsets, codes, _ = self.trie.children(self._paths[depth][rows], depth)
            mask = torch.zeros(len(rows), size, dtype=torch.bool)
            mask[
                torch.from_numpy(np.repeat(np.arange(len(rows)), np.diff(offsets))),
                torch.from_numpy(codes).long(),
            ] = True
            masks.append(mask)
        return masks

    @cached_property
    def _paths(self) -> list[np.ndarray]:
        """For each depth 0 … S−1 the trie's node on the way to each item (N,)."""
        return [self.trie.find(self.ids.codes[:, :depth]) for depth in range(self.trie.depth)]

    @cached_property
    def _shares(self) -> Tensor:
        return shares(self.trie, self.ids.codes)

    # -- answering -----------------------------------------------------------------------------

    def retrieve(
        self,
        histories: Histories,
        k: int,
        *,
        exclude_seen: bool = True,
        deny: np.ndarray | None = None,
        temperature: float = 1.0,
        seed: int | None = None,
    ) -> Candidates:
        """The k most likely next items, as `Retriever.retrieve`; scores are log-probabilities (under `temperature`).

        seed: draw the items without replacement from the model, for variety, in place of the best.
        """
        require_k(k)
        require_dense(histories, len(self.items))
        require_deny(deny, len(self.items))
        k = min(k, len(self.trie))
        found_item = np.full((len(histories), k), MISSING, np.int64)
        found_score = np.full((len(histories), k), -np.inf, np.float32)
        order = np.argsort(histories.lengths, kind="stable")
        for start in range(0, len(order), 64):
            rows = np.sort(order[start : start + 64])
            some = histories.take(rows)
            step = self._step(some)
            best = beam_search(
                step,
                self.trie,
                len(some),
                k,
                width=max(k, self.config.beams),
                codes=self.ids.codes,
                seen=some if exclude_seen else None,
                deny=deny,
                renormalise=self.config.renormalise,
                temperature=temperature,
                seed=None if seed is None else seed + start,
                source=self.name,
            )
            found_item[rows], found_score[rows] = best.item, best.score
        return Candidates(found_item, found_score, self.name)

    @torch.inference_mode()
    def _step(self, histories: Histories) -> Any:
        item, moment, now = padded_histories(histories.last(self.config.window))
        network: Any = self.network
        user = None if histories.user is None else torch.from_numpy(histories.user)
        memory = network.encode(self._codes[item], moment, user)
        if isinstance(network, PaperTiger):
            return network.decoder_for(memory, now)
        returns = Returns.of(network.repetition, histories, self._codes, self.trie)
        return network.decoder_for(memory, now, returns)

    @torch.inference_mode()
    def alike(self, items: np.ndarray, k: int) -> Candidates:
        """As `Retriever.alike`, by the cosine of what items say to the encoder, the sum of their codes' vectors."""
        network: Any = self.network
        embed = network.embed if isinstance(network, CausalTiger) else network.embed_codes
        vectors = torch.cat([embed(codes).sum(dim=1) for codes in self._codes.split(1 << 16)])
        return most_alike(vectors.numpy(), items, k, self.name, ~self.ids.alive)

    # -- items that arrive later -----------------------------------------------------------------

    def add_items(self, items: Vocabulary, codes: np.ndarray, vectors: np.ndarray | None = None) -> None:
        """Make new items recommendable at once, by their codes (M, S−1) of the frozen tokenizer and, where
        the network knows content, by their vectors (M, C). Nothing is learned.

        items: the whole new vocabulary, old ids first.
        Raises DataError where old ids moved or vectors do not fit, CapacityError where a collision group is full.
        """
        old = len(self.items)
        if not items.raw.slice(0, old).equals(self.items.raw):
            raise DataError("a vocabulary that renumbers old items", rule="New items come after the old")
        ids, network = self.ids.add(codes, Vocabulary(items.raw.slice(old))), self.network
        trie = self.trie.add(ids.codes[old:], np.arange(old, len(items)))
        if isinstance(network, CausalTiger) and network.config.prefixes:
            if vectors is not None and network.prefixes.projected is not None:
                width = len(network.prefixes.mean)
                vectors = item_matrix(vectors, len(items) - old, "vectors of new items", width)
            network = network.extended(ids.codes[old:], vectors)
        self.trained = np.concatenate([self.trained, np.zeros(len(items) - old, bool)])
        self.ids, self.items, self.trie, self.network = ids, items, trie, network
        self._forget()

    def remove_items(self, items: np.ndarray) -> None:
        """Never recommend these dense items again; their IDs are not given to others."""
        self.ids, self.trie = self.ids.remove(items), self.trie.remove(items)
        self._forget()

    def _forget(self) -> None:
        for name in ("_codes", "_paths", "_shares"):
            self.__dict__.pop(name, None)

    def with_unseen(self, found: Candidates, share: float, histories: Histories | None = None) -> Candidates:
        """TIGER's rule for new items (§4.3): one whose codes, but for the collision digit, begin those of
        a generated item enters the list right after it; at most ⌊share · K⌋ of the K.

        found: what `retrieve` gave; items that came after training are dropped from it first.
        histories: of the same users, whose items then do not join.
        """
        if not 0 <= share <= 1:
            raise ConfigError(f"a share of {share}", rule="A share lies in 0 … 1")
        users, k = found.item.shape
        lives = None if histories is None else list(histories)
        room = int(share * k + 1e-9)
        item, score = np.full_like(found.item, MISSING), np.full_like(found.score, -np.inf)
        prefixes = self.ids.codes[:, :-1]
        new = np.flatnonzero(~self.trained & self.ids.alive)
        under: dict[bytes, list[int]] = {}
        for i in new:
            under.setdefault(prefixes[i].tobytes(), []).append(int(i))
        for b in range(users):
            row: list[tuple[int, float]] = []
            had = set() if lives is None else set(lives[b].tolist())
            added: set[int] = set()
            for i, s in zip(found.item[b], found.score[b], strict=True):
                if i == MISSING or not self.trained[i]:
                    continue
                row.append((int(i), float(s)))
                for j in under.get(prefixes[i].tobytes(), ()):
                    if len(added) < room and j not in added and j not in had:
                        added.add(j)
                        row.append((j, float(s)))
            row = row[:k]
            item[b, : len(row)] = [i for i, _ in row]
            score[b, : len(row)] = [s for _, s in row]
        return Candidates(item, score, found.source)

    # -- files -----------------------------------------------------------------------------------

    def save(self, directory: str | Path) -> None:
        """Write the folder, all of it or nothing; `log` is not part of it. Raises StorageError."""
        with written_aside(Path(directory), "retriever.json") as aside:
            kind = "paper" if isinstance(self.config.model, PaperConfig) else "causal"
            about = {"format": FORMAT, "kind": "Tiger", "network": kind, "config": asdict(self.config)}
            about["fitted_items"] = self.fitted_items  # those after them arrived later
            (aside / "retriever.json").write_text(json.dumps(about), encoding="utf-8")
            pq.write_table(
                pa.table({"item_id": self.items.raw, "trained": self.trained}), aside / "items.parquet"
            )
            self.ids.save(aside)
            save_file(self.network.state_dict(), aside / "network.safetensors")

    @classmethod
    def load(cls, directory: str | Path) -> Tiger:
        """What `save` wrote, with the same answers. Raises BundleDamagedError, BundleVersionError."""
        directory = Path(directory)
        with reading(
            directory,
            "retriever.json",
            FORMAT,
            oldest=FORMAT,
            what="a retriever",
            rule="A Tiger has retriever.json, items.parquet, ids.safetensors and network.safetensors",
            fix="Copy the folder again, or fit anew",
        ) as about:
            settings = about["config"]
            model = (PaperConfig if about["network"] == "paper" else CausalConfig)(**settings.pop("model"))
            training = settings.pop("train")
            training["betas"] = tuple(training["betas"])
            config = TigerConfig(model=model, train=TrainConfig(**training), **settings)
            table = pq.read_table(directory / "items.parquet")
            trained = table["trained"].to_numpy()
            tensors = load_file(directory / "network.safetensors")
            self = cls(SemanticIds.load(directory), Vocabulary(table["item_id"]), config, trained)
            self.fitted_items = about["fitted_items"]
            if isinstance(model, CausalConfig) and model.prefixes:
                width = len(tensors.get("prefixes.mean", ()))
                with torch.random.fork_rng(devices=[]):  # to be overwritten
                    network = CausalTiger(self.ids.sizes, model, self.ids.codes[trained], content_width=width)
                    self.network = network.extended(self.ids.codes[self.fitted_items :], None).eval()
            self.network.load_state_dict(tensors)
        return self
