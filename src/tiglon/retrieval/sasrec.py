"""SASRec: self-attention over what a user did, a product with every item, nothing generated.

Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018, https://arxiv.org/abs/1808.09781

Idea. The state after each event predicts the next one: its product with an item's vector is the item's
score. All events of a life are targets of one causal pass. It is the baseline that generative retrieval must beat.

Covered: §III-A embedding (shared between input and prediction), §III-B self-attention, point-wise
feed-forward, residual connections; §III-D prediction.

Deviations:
- the loss is the cross-entropy over the whole catalogue (eq. 7 has one drawn negative), which later studies
  find decides the comparison (Klenitskiy and Vasilev, https://arxiv.org/abs/2309.07602);
- relative biases over moments rather than absolute positions; events of one moment (a basket) see each other
  but no target of their own moment; T5's blocks (pre-norm, RMSNorm);
- a start state, so that first events are targets too and an empty history has an answer;
- with `vectors`, an item's vector is its own plus its content through one projection that begins as the
  principal axes, as TIGER's prefix vectors do (`prefixes.py`); without, ids alone, as published.

Cost: a product with N items a target, in training and in answering.

Letters: B users, L history, N items, D width, C width of item vectors, T targets.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tiglon.data.histories import HistoryStore, written_aside
from tiglon.errors import BundleDamagedError, BundleVersionError, ConfigError, DataError
from tiglon.evaluation.protocol import evaluate
from tiglon.nn.moments import START, MomentBias, latest
from tiglon.nn.transformer import Dropout, EncoderLayer, Linear
from tiglon.retrieval.prefixes import centred, principal_axes
from tiglon.retrieval.retriever import Retriever, require_k
from tiglon.retrieval.topk import require_dense, top_items
from tiglon.retrieval.windows import Batch, WindowBatches, moments, overlapping_windows, padded_histories
from tiglon.train.loop import Progress, TrainConfig, train
from tiglon.types import Candidates, Histories, Interactions, Targets, Vocabulary, user_names

FORMAT = 1


@dataclass(frozen=True)
class SasRecConfig:
    width: int = 128  # paper: 50
    heads: int = 4  # paper: 1
    hidden: int = 512  # paper: the width
    layers: int = 2  # paper: 2
    dropout: float = 0.3  # paper: 0.5 on sparse data
    distances: int = 32  # buckets of the relative bias, in moments
    window: int = 50  # most recent events read; paper: 50
    batch_targets: int = 512
    validation_users: int = 3000  # drawn by the seed; the score that selects is their NDCG@10
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=5))

    def __post_init__(self) -> None:
        for name in ("width", "heads", "layers", "window", "batch_targets", "validation_users"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}", rule=f"{name} is at least 1")
        if self.width % self.heads:
            raise ConfigError(f"width={self.width}, heads={self.heads}", rule="The heads share the width")


class SasRecNetwork(nn.Module):
    """items: N.   content: (N, C) centred vectors of length 1, or None."""

    def __init__(self, items: int, config: SasRecConfig, content: np.ndarray | None = None) -> None:
        super().__init__()
        c = config
        self.width = c.width
        self.item = nn.Embedding(items, c.width)
        nn.init.normal_(self.item.weight, std=(0.2 if content is not None else 1.0) * c.width**-0.5)
        self.content: Tensor | None
        self.register_buffer("content", None if content is None else torch.from_numpy(content))
        if content is not None:
            self.project = nn.Parameter(torch.from_numpy(principal_axes(content, c.width)))
        self.start = nn.Parameter(torch.randn(c.width))
        block = (c.width, c.heads, c.width // c.heads, c.hidden, c.dropout)
        self.layers = nn.ModuleList(EncoderLayer(*block) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.width, eps=1e-6)
        self.bias = MomentBias(c.heads, c.distances)
        self.query = Linear(c.width, c.width, 0.0)
        nn.init.eye_(self.query.weight)
        self.dropout = Dropout(c.dropout)

    def vectors(self) -> Tensor:
        """(N, D) of the items, read and scored alike."""
        own = self.item.weight
        return own if self.content is None else own + self.content @ self.project

    def states(self, vectors_ND: Tensor, item_BL: Tensor, moment_BL: Tensor, query_BQ: Tensor) -> Tensor:
        """(B, Q, D): what is known strictly before each moment of `query_BQ`."""
        x = F.embedding(item_BL, vectors_ND) * self.width**0.5
        x = self.dropout(torch.cat([self.start.expand(len(x), 1, -1), x], dim=1))
        moment = F.pad(moment_BL, (1, 0), value=START)
        bias = self.bias(moment, moment, own=True)
        for layer in self.layers:
            x, _ = layer(x, bias)
        return self.query(latest(self.dropout(self.norm(x)), moment, query_BQ))

    def loss(self, batch: Batch) -> Tensor:
        """(T,) −log p(item) over the whole catalogue."""
        vectors = self.vectors()
        states_TD = self.states(vectors, batch.item, batch.moment, batch.moment)[batch.target]
        return F.cross_entropy((states_TD @ vectors.T).float(), batch.item[batch.target], reduction="none")


class SasRec(Retriever):
    """Retrieve by the product of a user's state with every item.

    SasRec(items.vocabulary, vectors=vectors).fit(split.train, split.validation)
    """

    name = "sasrec"

    def __init__(
        self, items: Vocabulary, config: SasRecConfig | None = None, vectors: np.ndarray | None = None
    ) -> None:
        """vectors: (N, C) of the items' content; None for ids alone."""
        if vectors is not None and len(vectors) != len(items):
            raise DataError(f"{len(vectors)} item vectors for {len(items)} items")
        self.items, self.config = items, config or SasRecConfig()
        torch.manual_seed(self.config.train.seed)
        content = None if vectors is None else centred(vectors, vectors.mean(axis=0))
        self.network = SasRecNetwork(len(items), self.config, content).eval()

    def fit(
        self,
        interactions: Interactions,
        validation: Targets | None = None,
        *,
        directory: Path | None = None,
        report: Callable[[Progress], None] | None = None,
    ) -> SasRec:
        """As `Tiger.fit`: learn from the training events, keep the weights that are best on `validation`.

        Raises DataError where the log numbers items otherwise or is empty.
        """
        if interactions.items != self.items:
            raise DataError(
                "a log whose items are not those of this retriever",
                fix="Call tiglon.data.events.align(interactions, items) first",
            )
        if not len(interactions):
            raise DataError("a log without any event to predict")
        c, log = self.config, HistoryStore.build(interactions)
        moment, user = moments(interactions), user_names(interactions.users)[interactions.user]
        windows = overlapping_windows(log.offsets, moment, c.window)
        wanted = np.ones(len(interactions), bool)
        sample = None
        if validation is not None and len(validation):
            rows = np.random.default_rng(c.train.seed).permutation(len(validation))[: c.validation_users]
            sample = validation.take(np.sort(rows))

        def epoch_batches(epoch: int) -> Sequence[Batch]:
            seed = [c.train.seed, epoch]
            return WindowBatches(log.item, moment, wanted, user, windows, c.batch_targets, seed)

        def validate() -> float:
            assert sample is not None
            return evaluate(self, sample, ks=(10,), exclude_seen=False, batch=512).metrics["ndcg@10"]

        self.history = train(
            self.network,
            epoch_batches,
            lambda network, batch: network.loss(batch),
            validate if sample is not None else None,
            c.train,
            directory,
            report,
            about={
                "events": f"{len(log.item)} events, checksum {zlib.crc32(log.item.tobytes())}",
                **{key: value for key, value in asdict(c).items() if key != "train"},
            },
        )
        self.log = log
        return self

    @torch.inference_mode()
    def score(self, histories: Histories) -> np.ndarray:
        """Scores (B, N) float32 of the whole catalogue: logits of the next item."""
        require_dense(histories, len(self.items))
        item, moment, now = padded_histories(histories.last(self.config.window))
        vectors = self.network.vectors()
        states = self.network.states(vectors, item, moment, now[:, None])[:, 0]
        return (states @ vectors.T).numpy()

    def retrieve(self, histories: Histories, k: int, *, exclude_seen: bool = True) -> Candidates:
        """The k best items for each history."""
        require_k(k)
        item, score = [], []
        for start in range(0, max(len(histories), 1), 256):
            some = histories.take(slice(start, start + 256))
            best = top_items(self.score(some), k, some if exclude_seen else None)
            item.append(best.item)
            score.append(best.score)
        return Candidates(np.concatenate(item), np.concatenate(score), self.name)

    def similar_items(self, items: np.ndarray, k: int) -> Candidates:
        """The k items whose learned vectors are most alike (cosine) to each of these dense items (B,)."""
        require_k(k)
        with torch.inference_mode():
            vectors = F.normalize(self.network.vectors(), dim=1)
            scores = (vectors[torch.from_numpy(items)] @ vectors.T).numpy()
        return top_items(scores, k, Histories.of([[i] for i in items]))

    def save(self, directory: str | Path) -> None:
        """Write the folder, all of it or nothing; `log` is not part of it. Raises StorageError."""
        with written_aside(Path(directory)) as aside:
            about = {"format": FORMAT, "kind": "SasRec", "config": asdict(self.config)}
            (aside / "retriever.json").write_text(json.dumps(about), encoding="utf-8")
            pq.write_table(pa.table({"item_id": self.items.raw}), aside / "items.parquet")
            save_file(self.network.state_dict(), aside / "network.safetensors")

    @classmethod
    def load(cls, directory: str | Path) -> SasRec:
        """What `save` wrote, with the same answers. Raises BundleDamagedError, BundleVersionError."""
        directory = Path(directory)
        try:
            about = json.loads((directory / "retriever.json").read_text(encoding="utf-8"))
            if about["format"] > FORMAT:
                raise BundleVersionError(
                    f"a retriever of format {about['format']} in {directory}",
                    rule=f"This Tiglon reads formats up to {FORMAT}",
                    fix="Update Tiglon",
                )
            settings = about["config"]
            training = settings.pop("train")
            training["betas"] = tuple(training["betas"])
            config = SasRecConfig(**settings, train=TrainConfig(**training))
            tensors = load_file(directory / "network.safetensors")
            self = cls(Vocabulary(pq.read_table(directory / "items.parquet")["item_id"]), config)
            content = tensors.get("content")
            if content is not None:
                self.network = SasRecNetwork(len(self.items), config, content.numpy()).eval()
            self.network.load_state_dict(tensors)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            if isinstance(error, BundleVersionError):
                raise
            raise BundleDamagedError(
                f"the retriever in {directory} cannot be read: {error}",
                rule="A SasRec has retriever.json, items.parquet and network.safetensors",
                fix="Copy the folder again, or fit anew",
            ) from error
        return self
