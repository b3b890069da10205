"""Dense retrieval: a user's vectors, an index of the items' vectors. What SASRec, two towers, MIND and ComiRec
share: windows, training, selection, answers, items that arrive later, files.

Letters: B users, K interests, N items, C width of the content, D width.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from tiglon.data.folders import reading, written_aside
from tiglon.errors import BundleDamagedError, DataError, require_counts, require_dropout
from tiglon.retrieval.index import ExactIndex, FaissIndex, Index, empty_faiss, merge, most_alike
from tiglon.retrieval.learning import learn, sampled
from tiglon.retrieval.repetition import padded
from tiglon.retrieval.retriever import Retriever, item_matrix, require_k
from tiglon.retrieval.softmax import UnigramSampler
from tiglon.retrieval.topk import require_dense, tie_order
from tiglon.retrieval.towers import DenseNetwork, Past
from tiglon.retrieval.windows import (
    REMEMBERED,
    checksum,
    padded_histories,
    windows_of_events,
)
from tiglon.train.loop import Progress, TrainConfig
from tiglon.types import MISSING, Candidates, Histories, Interactions, Targets, Vocabulary

if TYPE_CHECKING:
    from typing import Self

FORMAT = 2


@dataclass(frozen=True)
class DenseConfig:
    """What every dense retriever sets."""

    width: int = 128
    dropout: float = 0.2
    window: int = 50  # most recent events read
    batch_targets: int = 512
    whole: int = 50_000  # catalogues up to this size are trained with a softmax over all items …
    negatives: int = 8192  # … larger ones with so many drawn a step, corrected for how often they are drawn
    validation_users: int = 3000  # drawn by the seed; the score that selects is their NDCG@10
    index: str = ""  # what finds items: empty, the exact search; or an index of faiss, such as HNSW32
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=5))

    def __post_init__(self) -> None:
        require_counts(self, "width", "window", "batch_targets", "negatives", "validation_users")
        require_dropout(self)
        if self.index:
            empty_faiss(self.width, self.index)


class DenseRetriever(Retriever):
    """Retrieve by the best product of a user's vectors with an item's.

    Retriever(items.vocabulary, config, vectors).fit(split.train, split.validation)
    """

    Config: ClassVar[type[DenseConfig]]

    def __init__(
        self, items: Vocabulary, config: DenseConfig | None = None, vectors: np.ndarray | None = None
    ) -> None:
        """vectors: (N, C) of the items' content; None for ids alone."""
        if vectors is not None:
            vectors = item_matrix(vectors, len(items))
        self.items, self.config = items, config or self.Config()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.train.seed)
            self.network = self._network(vectors).eval()
        self._searched: tuple[torch.Tensor, np.ndarray, Index] | None = None

    @abc.abstractmethod
    def _network(self, content: np.ndarray | int | None) -> DenseNetwork:
        """A new network; `content` as in `ItemTower`."""

    def _windows(self, offsets: np.ndarray, moment: np.ndarray) -> np.ndarray:
        """The rows of training, as `WindowBatches` takes them; here one a target."""
        return windows_of_events(offsets, moment, self.config.window)

    def _samples(self) -> bool:
        """Whether negatives are drawn in training."""
        return len(self.items) > self.config.whole

    # -- learning ------------------------------------------------------------------------------

    def fit(
        self,
        interactions: Interactions,
        validation: Targets | None = None,
        *,
        directory: Path | None = None,
        report: Callable[[Progress], None] | None = None,
    ) -> Self:
        """As `Tiger.fit`: learn from the training events, keep the weights that are best on `validation`.

        Raises DataError where the log numbers items otherwise or is empty.
        """
        c, content = self.config, self.network.items.content
        counts = np.bincount(interactions.item, minlength=len(self.items))
        sampler = UnigramSampler(counts, c.negatives) if self._samples() else None
        sample = sampled(validation, c)

        def search_anew(sample: Targets) -> None:
            self._searched = self._made(ExactIndex)
            self._learn_last(sample)

        try:
            self.history, self.log = learn(
                self,
                interactions,
                sample,
                self._windows,
                lambda batch: self.network.loss(batch, sampler.draw() if sampler else None),
                about={"vectors": None if content is None else checksum(content.numpy())},
                directory=directory,
                report=report,
                before_validation=search_anew,
            )
        finally:
            self._searched = None  # it was of the weights that the last validation saw
        if sample is not None:
            self._learn_last(sample)
        return self

    def _learn_last(self, targets: Targets) -> None:
        """What is learned of the validation once all else is; the score that selects knows it. Here nothing is."""

    # -- answering -----------------------------------------------------------------------------

    @torch.inference_mode()
    def vectors(self) -> np.ndarray:
        """(N, D) float32 of the items, as an index takes them."""
        return self.network.vectors().float().numpy()

    @torch.inference_mode()
    def users(self, histories: Histories) -> tuple[np.ndarray, np.ndarray]:
        """Interests (B, K, D) float32 and which of them each user has (B, K) bool."""
        require_dense(histories, len(self.items))
        item, moment, now = padded_histories(histories.last(self.config.window))
        user = np.full(len(histories), -1) if histories.user is None else histories.user
        past = Past(item, moment, now, torch.from_numpy(user))
        interests, present = self.network.users(past, self._ready()[0])
        return interests.float().numpy(), present.numpy()

    def score(self, histories: Histories) -> np.ndarray:
        """Scores (B, N) float32 of the whole catalogue, in memory at once."""
        interests, present = self.users(histories)
        scores = interests @ self.vectors().T
        scores[~present] = -np.inf
        best = scores.max(axis=1)
        owner, item, offset = self.network.repetition.of(histories)
        best[owner, item] += self.network.temperature * offset
        return best

    def retrieve(
        self, histories: Histories, k: int, *, exclude_seen: bool = True, deny: np.ndarray | None = None
    ) -> Candidates:
        """As `Retriever.retrieve`."""
        require_k(k)
        item, score = [], []
        for start in range(0, max(len(histories), 1), 256):
            some = histories.take(slice(start, start + 256))
            interests, present = self.users(some)
            hidden = some if exclude_seen else some.last(REMEMBERED)  # the latter join by their own scores
            best = self._ready()[2].search(interests, k, present=present, seen=hidden, deny=deny)
            if not exclude_seen:
                best = self._with_had(best, some, interests, present, deny)
            item.append(best.item)
            score.append(best.score)
        return Candidates(np.concatenate(item), np.concatenate(score), self.name)

    def _with_had(
        self,
        found: Candidates,
        histories: Histories,
        interests: np.ndarray,
        present: np.ndarray,
        deny: np.ndarray | None,
    ) -> Candidates:
        """The best of what was found and of what the user had, as far as that is remembered."""
        owner, had, fit = self._had(histories, interests, present, deny)
        item = padded(owner, len(histories), had, MISSING)
        score = padded(owner, len(histories), fit, -np.inf)
        both = np.concatenate([found.item, item], axis=1), np.concatenate([found.score, score], axis=1)
        return Candidates(*merge(*both, found.item.shape[1], tie_order(len(self.items))), found.source)

    def _had(
        self, histories: Histories, interests: np.ndarray, present: np.ndarray, deny: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What each user had, as far as it is remembered, and may get: owner (S,) ascending, item (S,), score (S,) float32."""
        owner, item, offset = self.network.repetition.of(histories)
        if deny is not None:
            allowed = ~deny[item]
            owner, item, offset = owner[allowed], item[allowed], offset[allowed]
        product = np.einsum("skd,sd->sk", interests[owner], self._ready()[1][item])
        product[~present[owner]] = -np.inf
        return owner, item, product.max(axis=1, initial=-np.inf) + self.network.temperature * offset

    def alike(self, items: np.ndarray, k: int) -> Candidates:
        """As `Retriever.alike`, by the cosine of the items' vectors."""
        return most_alike(self._ready()[1], items, k, self.name)

    def _ready(self) -> tuple[torch.Tensor, np.ndarray, Index]:
        """Vectors of the items as histories are read (N, D), those that are searched, and the index; until they change."""
        if self._searched is None:
            name = self.config.index
            self._searched = self._made(partial(FaissIndex, factory=name) if name else ExactIndex)
        return self._searched

    @torch.inference_mode()
    def _made(self, index: Callable[[np.ndarray], Index]) -> tuple[torch.Tensor, np.ndarray, Index]:
        """`_ready`, of the weights of now."""
        vectors = self.vectors()
        return self.network.items.table(), vectors, index(vectors)

    # -- items that arrive later ---------------------------------------------------------------

    def add_items(self, items: Vocabulary, vectors: np.ndarray) -> None:
        """Make new items recommendable at once, by their content (M, C). Nothing is learned.

        items: the whole new vocabulary, old ids first.
        Raises DataError where old ids moved or vectors do not fit, ConfigError where content is not known.
        """
        old = len(self.items)
        if not items.raw.slice(0, old).equals(self.items.raw):
            raise DataError("a vocabulary that renumbers old items", rule="New items come after the old")
        width = None if self.network.items.mean is None else len(self.network.items.mean)
        self.network.items.add(item_matrix(vectors, len(items) - old, "vectors of new items", width))
        self.items, self._searched = items, None

    # -- files ---------------------------------------------------------------------------------

    def save(self, directory: str | Path) -> None:
        """Write the folder, all of it or nothing; `log` is not part of it. Raises StorageError."""
        with written_aside(Path(directory), "retriever.json") as aside:
            about = {"format": FORMAT, "kind": type(self).__name__, "config": asdict(self.config)}
            (aside / "retriever.json").write_text(json.dumps(about), encoding="utf-8")
            pq.write_table(pa.table({"item_id": self.items.raw}), aside / "items.parquet")
            save_file(self.network.state_dict(), aside / "network.safetensors")

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """What `save` wrote, with the same answers. Raises BundleDamagedError, BundleVersionError."""
        directory = Path(directory)
        with reading(
            directory,
            "retriever.json",
            FORMAT,
            oldest=FORMAT,
            what="a retriever",
            rule=f"A {cls.__name__} has retriever.json, items.parquet and network.safetensors",
            fix="Copy the folder again, or fit anew",
        ) as about:
            if about["kind"] != cls.__name__:
                raise BundleDamagedError(
                    f"{directory} holds a {about['kind']}", rule=f"{cls.__name__}.load reads its own kind"
                )
            items = Vocabulary(pq.read_table(directory / "items.parquet")["item_id"])
            tensors = load_file(directory / "network.safetensors")
            self = cls(items, cls._config_of(about["config"]))
            if "items.content" in tensors:
                with torch.random.fork_rng(devices=[]):  # to be overwritten
                    self.network = self._network(tensors["items.content"].shape[1]).eval()
            self.network.load_state_dict(tensors)
        return self

    @classmethod
    def _config_of(cls, settings: dict[str, Any]) -> DenseConfig:
        training = settings.pop("train")
        training["betas"] = tuple(training["betas"])
        return cls.Config(**settings, train=TrainConfig(**training))
