"""EAGER: every item has two codes, one of what it is and one of how it is used, and two decoders write them.

Wang et al., "EAGER: Two-Stream Generative Recommender with Behavior-Semantic Collaboration", KDD 2024,
https://arxiv.org/abs/2406.14017.

Idea. One encoder reads the history; a decoder a stream writes the next item's code in its own system, made by
hierarchical balanced k-means (`semantic_ids/balanced_kmeans.py`) from item vectors of its own: behaviour E^b and
semantics E^s. A summary token behind the codes is pulled towards the item's frozen vector (GCT), and an auxiliary
decoder rebuilds behaviour codes from the semantic summary (SGT):

    L = L_gen^b + L_gen^s + λ1 (L_con^b + L_con^s) + λ2 (L_recon + L_recog)

Answers come from a beam a stream, merged by confidence; the tasks have no part in them.

Covered: both streams, both tasks, both distances of GCT, both ways to rank. The network is `eager_network.py`.

Items that arrive later, which the paper does not speak of, go down both frozen trees: by their text in the
semantic one, in that of behaviour by the mean vector of the items whose text is most like theirs, for nobody
used them yet. No code moves; what the network knows of them is content, and nothing is learned.

Deviations:
- histories in true chronology, and moments (baskets) never seen by a target of their own; the released code
  zeroes the time stamps of the Amazon tables, so its histories stand in the order of the file;
- all of a user's targets in one pass, relative biases over moments, codes with vectors of their prefixes that
  carry content, a softmax over the codes that exist, odds of what one had: the decoder is that of `tiger_causal.py`;
- the encoder reads an item as the sum of its vectors in both streams, each through a matrix of its own;
- E^b are the item vectors of a SASRec that begins at an SVD of what is used together, where the paper takes those
  of a DIN-like model on the same sequences: it learns from every event of the training log rather than from drawn
  negatives, and sees no other (a DIN's, learned in the same two minutes, cost a third of the recall: docs/log.md);
- frozen vectors are centred and scaled to entries of about unit size, or smooth L1 would be next to nothing;
- L_recon is a softmax over all codes of a level, not over drawn ones;
- the first two codes are chosen together where there are at most 50,000 such pairs. Up to 65,536 items have two codes, so
  that the decoder then chooses among all items at once: with 256 means to choose from first it learned less
  in the same time (docs/log.md);
- both tasks learn from a quarter of each step's rows, drawn anew: they cost as much as all else;
- of the codes to recognise at least one is replaced, or true ones would now and then be called false; InfoNCE draws its items
  once for a batch, not for each target;
- what SGT reads of a code is its own vector, without those of its prefix: it teaches these alone. Its cross-attention has a
  single key, the summary, so one layer is a linear map of it;
- candidates are ranked by both streams (the paper's way is `ranking="own"`); a beam has 50 places or k, the larger;
- fewer and wider layers (`EagerConfig`), sized for a CPU.

Letters: B users, L history, N items, C width of item vectors, T targets, S code positions, V codes a position,
K candidates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiglon.data.folders import reading, written_aside
from tiglon.errors import ConfigError, DataError, require_counts, require_weights
from tiglon.retrieval.beam import Step, beam_search
from tiglon.retrieval.behaviour import co_occurrence_vectors
from tiglon.retrieval.eager_network import BEHAVIOUR, SEMANTIC, EagerNetwork, Stream, Tasks
from tiglon.retrieval.index import ExactIndex, most_alike
from tiglon.retrieval.learning import learn, sampled
from tiglon.retrieval.prefixes import centred, mean_vector
from tiglon.retrieval.repetition import Returns, shares
from tiglon.retrieval.retriever import Retriever, item_matrix, require_k
from tiglon.retrieval.sasrec import SasRec, SasRecConfig
from tiglon.retrieval.tiger_causal import CausalConfig
from tiglon.retrieval.topk import each_once, require_dense, require_deny, tie_keys
from tiglon.retrieval.windows import (
    Batch,
    checksum,
    overlapping_windows,
    padded_histories,
)
from tiglon.semantic_ids.balanced_kmeans import ClusterTree, balanced_codes
from tiglon.semantic_ids.catalog import SemanticIds
from tiglon.semantic_ids.trie import Trie
from tiglon.train.loop import Progress, TrainConfig
from tiglon.types import MISSING, Candidates, Histories, Interactions, Targets, Vocabulary

FORMAT = 2
DRAWN = 256  # items beside the target in InfoNCE
USERS = 64  # answered at once
ALIKE = 5  # items whose mean behaviour a new item is given


@dataclass(frozen=True)
class EagerConfig:
    model: CausalConfig = field(  # paper: 1 encoder layer, 4 decoder layers a stream, codes one by one
        default_factory=lambda: CausalConfig(encoder_layers=1, decoder_layers=1, pairs=50_000)
    )
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=6, evaluations=4))
    streams: tuple[str, ...] = (BEHAVIOUR, SEMANTIC)  # or one of them alone
    branches: int = 256  # clusters a level; paper: 256, two levels
    contrast: float = 1.0  # λ1 of GCT, paper: 1; 0 switches it off
    contrast_loss: Literal["smooth-l1", "info-nce"] = "smooth-l1"  # the paper's; the released code's
    transfer: float = 1.0  # λ2 of SGT, paper: 1; 0 switches it off; there is none with one stream
    task_share: float = 0.25  # of a step's rows, from which both tasks learn; paper: all
    ranking: Literal["own", "both"] = "both"  # log-probability by an item's own stream (paper: "own"; an item
    # of both beams has the larger one), or by both streams, added (the released code)
    window: int = 50  # most recent events read; paper: 20
    batch_targets: int = 384
    beams: int = 50  # a stream
    validation_users: int = 2000  # drawn by the seed; the score that selects is their NDCG@10

    def __post_init__(self) -> None:
        require_counts(self, "window", "batch_targets", "beams", "validation_users")
        if not 0 < self.task_share <= 1:
            raise ConfigError(f"task_share={self.task_share}", rule="It lies in 0 … 1 without 0")
        if self.branches < 2:
            raise ConfigError(f"branches={self.branches}", rule="A level has at least 2 clusters")
        if self.streams not in ((BEHAVIOUR, SEMANTIC), (BEHAVIOUR,), (SEMANTIC,)):
            raise ConfigError(
                f"streams={self.streams}", rule=f"({BEHAVIOUR!r}, {SEMANTIC!r}), or one of them"
            )
        require_weights(self, "contrast", "transfer")
        choices = {"contrast_loss": ("smooth-l1", "info-nce"), "ranking": ("own", "both")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r}", rule=f"{name} is one of {known}")


def behaviour_vectors(
    interactions: Interactions,
    config: SasRecConfig | None = None,
    *,
    start: np.ndarray | None = None,
    text: np.ndarray | None = None,
    directory: Path | None = None,
    report: Callable[[Progress], None] | None = None,
) -> np.ndarray:
    """E^b: (N, C) item vectors that a SASRec learns from training events alone, beginning at what is used together
    (`co_occurrence_vectors`), which is all that is known of an item with few events; the last weights.

    interactions: the training events alone.   start: (N, C), made before, for a checkpoint knows them to the last
        bit, and another number of threads rounds another way.   text: (N, C') semantic vectors; an item that nobody used has the mean
        vector of those most like it, as items that arrive later have.   directory, report: as `Eager.fit` takes them.
    """
    start = co_occurrence_vectors(interactions) if start is None else start
    model = SasRec(interactions.items, config, start)
    model.fit(interactions, directory=directory, report=report)
    vectors = model.vectors()
    used = np.bincount(interactions.item, minlength=len(vectors)) > 0
    if text is not None and not used.all():
        text = item_matrix(text, len(vectors), "vectors of semantic")
        vectors[~used] = _of_alike(text[~used], text[used], vectors[used])
    return vectors


def _of_alike(text: np.ndarray, known_text: np.ndarray, known_behaviour: np.ndarray) -> np.ndarray:
    """(M, C) for items with texts (M, C'): the mean behaviour of the known ones (n) whose text is most like theirs."""
    mean = mean_vector(known_text)
    index = ExactIndex(centred(known_text, mean))
    alike = index.search(centred(text, mean), min(ALIKE, len(known_text)))
    found: np.ndarray = known_behaviour[alike.item].mean(axis=1)
    return found


def eager_ids(
    vectors: Mapping[str, np.ndarray], items: Vocabulary, config: EagerConfig | None = None
) -> dict[str, SemanticIds]:
    """The codes of each stream from its item vectors (N, C); the last code is the leaf, no two items share one.

    There are twice as many last codes as items have: as much room is left for those that arrive later.
    Raises DataError unless every stream has a finite vector for each item.
    """
    config = config or EagerConfig()
    made = {}
    for name, rows in _matrices(vectors, items, config).items():
        codes = balanced_codes(rows, items, config.branches, seed=config.train.seed)
        *sizes, last = (int(size) for size in codes.max(axis=0, initial=0) + 1)
        made[name] = SemanticIds(codes, (*sizes, 2 * last), np.ones(len(items), bool))
    return made


def _matrices(
    vectors: Mapping[str, np.ndarray], items: Vocabulary, config: EagerConfig
) -> dict[str, np.ndarray]:
    """By stream (N, C) float32. Raises DataError unless every stream has a finite vector for each item."""
    for name in config.streams:
        if name not in vectors:
            raise DataError(
                f"vectors of {', '.join(vectors) or 'nothing'}",
                rule=f"EAGER has the streams {', '.join(config.streams)}",
                fix=f'Add vectors["{name}"], or leave the stream out of EagerConfig.streams',
            )
    return {name: item_matrix(vectors[name], len(items), f"vectors of {name}") for name in config.streams}


@dataclass(frozen=True, eq=False)
class CodeSystem:
    """The codes of one stream, as training and decoding look them up."""

    ids: SemanticIds

    @cached_property
    def codes(self) -> Tensor:
        """(N, S)."""
        return torch.from_numpy(self.ids.codes.astype(np.int64))

    @cached_property
    def trie(self) -> Trie:
        return Trie.build(self.ids.codes, self.ids.sizes, self.ids.alive)

    @cached_property
    def paths(self) -> list[np.ndarray]:
        """For each depth 0 … S−1 the trie's node on the way to each item (N,)."""
        return [self.trie.find(self.ids.codes[:, :depth]) for depth in range(self.trie.depth)]

    @cached_property
    def shares(self) -> Tensor:
        """(N, S), as in `repetition`."""
        return shares(self.trie, self.ids.codes)

    def allowed(self, items: Tensor) -> list[Tensor]:
        """For each position the codes (T, V) that exist below each item's prefix."""
        masks = []
        for depth, size in enumerate(self.ids.sizes):
            offsets, codes, _ = self.trie.children(self.paths[depth][items.numpy()], depth)
            mask = torch.zeros(len(items), size, dtype=torch.bool)
            row = np.repeat(np.arange(len(items)), np.diff(offsets))
            mask[torch.from_numpy(row), torch.from_numpy(codes).long()] = True
            masks.append(mask)
        return masks


class Eager(Retriever):
    """Retrieve by generating two codes of the next item, each in its own system.

    vectors = {"behaviour": behaviour_vectors(split.train, text=text_vectors), "semantic": text_vectors}
    eager = Eager(eager_ids(vectors, items.vocabulary), items.vocabulary, vectors=vectors)
    eager.fit(split.train, split.validation).recommend(["user 7"], k=10)
    """

    name = "eager"

    def __init__(
        self,
        ids: Mapping[str, SemanticIds],
        items: Vocabulary,
        config: EagerConfig | None = None,
        vectors: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """vectors: by stream (N, C), those that the codes were made of; they are needed to `fit`, and for items
        that arrive later.
        """
        self.config = config or EagerConfig()
        self.items = items
        if set(ids) != set(self.config.streams):
            raise DataError(
                f"codes of {', '.join(ids) or 'nothing'}",
                rule=f"The streams are {', '.join(self.config.streams)}",
                fix="Make them by eager_ids(vectors, items, config)",
            )
        ids = {name: ids[name] for name in self.config.streams}
        self.fitted_items = len(items)
        self.frozen: dict[str, np.ndarray] | None = None  # what GCT pulls towards, while learning
        for name, system in ids.items():
            if len(system) != len(items):
                raise DataError(f"{len(system)} semantic IDs of {name} for {len(items)} items")
        first, *others = ids.values()
        if any((system.alive != first.alive).any() for system in others):
            raise DataError("streams that disagree on which items were removed")
        self.vectors: dict[str, np.ndarray] = {}  # (n, C) of the fitted items
        if vectors is not None:
            self.vectors = vectors = _matrices(vectors, items, self.config)
            self.frozen = {name: centred(rows, mean_vector(rows)) for name, rows in vectors.items()}
        self.systems = {name: CodeSystem(system) for name, system in ids.items()}
        self._assemble({name: rows.shape[1] for name, rows in self.vectors.items()}, vectors)

    @property
    def alive(self) -> np.ndarray:
        """(N,) bool: not removed."""
        return next(iter(self.systems.values())).ids.alive

    def _assemble(self, widths: Mapping[str, int], vectors: Mapping[str, np.ndarray] | None = None) -> None:
        """A new network, with tasks where there are vectors to learn from. widths: C by stream."""
        c = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(c.train.seed)
            streams = {
                name: Stream(
                    system.ids.sizes,
                    c.model,
                    system.ids.codes[: self.fitted_items],
                    None if vectors is None else vectors[name],
                    widths.get(name, 0),
                )
                for name, system in self.systems.items()
            }
            transfer = c.transfer > 0 and len(streams) == 2
            tasks = None
            if vectors is not None and (c.contrast > 0 or transfer):
                contrast = c.contrast_loss if c.contrast > 0 else None
                tasks = Tasks(streams, widths, contrast, transfer, c.task_share)
            self.network = EagerNetwork(c.model, streams, tasks).eval()

    # -- learning ------------------------------------------------------------------------------

    def fit(
        self,
        interactions: Interactions,
        validation: Targets | None = None,
        *,
        directory: Path | None = None,
        report: Callable[[Progress], None] | None = None,
    ) -> Eager:
        """As `Tiger.fit`: learn from the training events, keep the weights that are best on `validation`.

        Raises DataError where the log numbers items otherwise or is empty, ConfigError without vectors.
        """
        if self.frozen is None:
            raise ConfigError("no item vectors to learn from", fix="Make it anew: Eager(…, vectors=vectors)")
        c = self.config
        self.history, self.log = learn(
            self,
            interactions,
            sampled(validation, c),
            lambda offsets, moment: overlapping_windows(offsets, moment, c.window),
            self.loss,
            wanted=self.alive,
            about={
                "ids": {name: system.ids.version for name, system in self.systems.items()},
                "vectors": {name: checksum(rows) for name, rows in self.frozen.items()},
            },
            directory=directory,
            report=report,
        )
        return self

    def loss(self, batch: Batch) -> Tensor:
        """(T,) L of the batch's T targets."""
        weights = {"contrast": self.config.contrast, "transfer": self.config.transfer}
        parts = self.losses(batch)
        return torch.stack([weights.get(name, 1.0) * part for name, part in parts.items()]).sum(dim=0)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """(T,) its parts: −log p(item) of each stream, and "contrast" and "transfer" where they are on."""
        target = batch.item[batch.target]
        codes = {name: system.codes[batch.item] for name, system in self.systems.items()}
        allowed = {name: system.allowed(target) for name, system in self.systems.items()}
        had = self.network.repetition.before(batch)
        returns = {
            name: Returns.before(had, system.codes, system.shares) for name, system in self.systems.items()
        }
        tasks, wanted, drawn = self.network.tasks, None, None
        if tasks is not None and tasks.contrast is not None:
            wanted = {name: self._scaled(name, target) for name in codes}
            if tasks.contrast == "info-nce":
                others = torch.randint(len(self.items), (DRAWN,))
                same = others == target[:, None]
                drawn = {name: (self._scaled(name, others), same) for name in codes}
        return self.network.losses(codes, batch.moment, batch.target, allowed, returns, wanted, drawn)

    def _scaled(self, name: str, items: Tensor) -> Tensor:
        """(n, C) frozen vectors, with entries of about unit size."""
        assert self.frozen is not None
        rows = self.frozen[name][items.numpy()]
        return torch.from_numpy(rows) * rows.shape[1] ** 0.5

    # -- answering -----------------------------------------------------------------------------

    def retrieve(
        self, histories: Histories, k: int, *, exclude_seen: bool = True, deny: np.ndarray | None = None
    ) -> Candidates:
        """The k items that the streams are most confident of; scores are log-probabilities.

        With `ranking` "both" they are the sums of two, the products of what both streams give an item.
        """
        require_k(k)
        require_dense(histories, len(self.items))
        require_deny(deny, len(self.items))
        k = min(k, int(self.alive.sum()))
        found_item = np.full((len(histories), k), MISSING, np.int64)
        found_score = np.full((len(histories), k), -np.inf, np.float32)
        if not k:
            return Candidates(found_item, found_score, self.name)
        order = np.argsort(histories.lengths, kind="stable")
        for start in range(0, len(order), USERS):
            rows = np.sort(order[start : start + USERS])
            best = self._best(histories.take(rows), k, exclude_seen, deny)
            found_item[rows, : best.item.shape[1]] = best.item
            found_score[rows, : best.item.shape[1]] = best.score
        return Candidates(found_item, found_score, self.name)

    @torch.inference_mode()
    def _best(self, histories: Histories, k: int, exclude_seen: bool, deny: np.ndarray | None) -> Candidates:
        item, moment, now = padded_histories(histories.last(self.config.window))
        streams = self.network.streams
        embedded = {name: streams[name].embed(system.codes[item]) for name, system in self.systems.items()}
        memories = self.network.encode(embedded, moment)
        width = min(max(k, self.config.beams), int(self.alive.sum()))
        returns = {
            name: Returns.of(self.network.repetition, histories, system.codes, system.trie)
            for name, system in self.systems.items()
        }

        def step(name: str) -> Step:
            return streams[name].decoder_for(memories[name], now, returns[name])

        beams = {
            name: beam_search(
                step(name),
                system.trie,
                len(histories),
                width,
                width=width,
                codes=system.ids.codes,
                seen=histories if exclude_seen else None,
                deny=deny,
            )
            for name, system in self.systems.items()
        }
        confidence = {name: beam.score.astype(np.float64) for name, beam in beams.items()}
        if self.config.ranking == "both":
            for name, beam in beams.items():
                listed = np.where(beam.item == MISSING, self.alive.argmax(), beam.item)  # any; it stays −inf
                for other, system in self.systems.items():
                    if other != name:
                        confidence[name] += item_scores(step(other), system.trie, system.ids.codes[listed])
        items, scores = each_once(
            np.concatenate([beam.item for beam in beams.values()], axis=1),
            np.concatenate(list(confidence.values()), axis=1),
        )
        order = np.lexsort((tie_keys(items), -scores), axis=1)[:, :k]
        items, scores = np.take_along_axis(items, order, axis=1), np.take_along_axis(scores, order, axis=1)
        return Candidates(items, scores.astype(np.float32), self.name)

    @torch.inference_mode()
    def alike(self, items: np.ndarray, k: int) -> Candidates:
        """As `Retriever.alike`: the mean over the streams of the cosine of what items say to the encoder."""
        streams = self.network.streams.items()
        said = [stream.items(stream.embed(self.systems[name].codes)) for name, stream in streams]
        vectors = torch.cat([F.normalize(rows, dim=1) for rows in said], dim=1)
        return most_alike(vectors.numpy(), items, k, self.name, ~self.alive)

    # -- items that arrive later -----------------------------------------------------------------

    def add_items(self, items: Vocabulary, vectors: np.ndarray) -> None:
        """Make new items recommendable at once, by their semantic vectors (M, C). Nothing is learned.

        items: the whole new vocabulary, old ids first.
        Raises DataError where old ids moved or vectors do not fit, ConfigError where text is not known,
        CapacityError where the clusters are full.
        """
        old = len(self.items)
        if not items.raw.slice(0, old).equals(self.items.raw):
            raise DataError("a vocabulary that renumbers old items", rule="New items come after the old")
        if SEMANTIC not in self.vectors:
            raise ConfigError(
                "new items for an EAGER that knows nothing of their text",
                rule="An item without events is known by its text",
                fix=f'Give the items a column of text, make vectors["{SEMANTIC}"] of it, and fit anew',
            )
        known = self.vectors[SEMANTIC]
        vectors = item_matrix(vectors, len(items) - old, "vectors of new items", known.shape[1])
        content = {SEMANTIC: vectors}
        if BEHAVIOUR in self.vectors:
            content[BEHAVIOUR] = _of_alike(vectors, known, self.vectors[BEHAVIOUR])
        grown = {}
        for name, system in self.systems.items():
            ids, fitted = system.ids, self.fitted_items
            tree = ClusterTree(ids.codes[:fitted], self.vectors[name])
            codes = np.concatenate([ids.codes, tree.place(content[name], ids.codes, ids.sizes[-1])])
            alive = np.concatenate([ids.alive, np.ones(len(codes) - old, bool)])
            grown[name] = CodeSystem(SemanticIds(codes, ids.sizes, alive, ids.version))
        if self.config.model.prefixes:
            new = {name: system.ids.codes[old:] for name, system in grown.items()}
            self.network = self.network.extended(new, content)
        self.systems, self.items, self.frozen = grown, items, None

    def remove_items(self, items: np.ndarray) -> None:
        """Never recommend these dense items again; their codes are not given to others."""
        self.systems = {name: CodeSystem(system.ids.remove(items)) for name, system in self.systems.items()}

    # -- files -----------------------------------------------------------------------------------

    def save(self, directory: str | Path) -> None:
        """Write the folder, all of it or nothing; the tasks and `log` are not part of it. Raises StorageError."""
        with written_aside(Path(directory), "retriever.json") as aside:
            about = {
                "format": FORMAT,
                "kind": "Eager",
                "config": asdict(self.config),
                "fitted_items": self.fitted_items,  # those after them arrived later
            }
            (aside / "retriever.json").write_text(json.dumps(about), encoding="utf-8")
            pq.write_table(pa.table({"item_id": self.items.raw}), aside / "items.parquet")
            for name, system in self.systems.items():
                system.ids.save(aside / name)
            vectors = {name: torch.from_numpy(rows) for name, rows in self.vectors.items()}
            save_file(vectors, aside / "vectors.safetensors")
            tensors = self.network.state_dict().items()
            kept = {name: value for name, value in tensors if not name.startswith("tasks.")}
            save_file(kept, aside / "network.safetensors")

    @classmethod
    def load(cls, directory: str | Path) -> Eager:
        """What `save` wrote, with the same answers. Raises BundleDamagedError, BundleVersionError."""
        directory = Path(directory)
        with reading(
            directory,
            "retriever.json",
            FORMAT,
            oldest=FORMAT,
            what="a retriever",
            rule="An Eager has retriever.json, items.parquet, network.safetensors, vectors.safetensors and a folder "
            "a stream",
            fix="Copy the folder again, or fit anew",
        ) as about:
            settings = about["config"]
            training = settings.pop("train")
            training["betas"] = tuple(training["betas"])
            config = EagerConfig(
                model=CausalConfig(**settings.pop("model")),
                train=TrainConfig(**training),
                streams=tuple(settings.pop("streams")),
                **settings,
            )
            items = Vocabulary(pq.read_table(directory / "items.parquet")["item_id"])
            ids = {name: SemanticIds.load(directory / name) for name in config.streams}
            self = cls(ids, items, config)
            self.fitted_items = about["fitted_items"]
            vectors = load_file(directory / "vectors.safetensors")
            self.vectors = {name: rows.numpy() for name, rows in vectors.items()}
            self._assemble({name: rows.shape[1] for name, rows in self.vectors.items()})
            if len(items) > self.fitted_items and config.model.prefixes:
                new = {name: system.codes[self.fitted_items :] for name, system in ids.items()}
                self.network = self.network.extended(new, {})
            self.network.load_state_dict(load_file(directory / "network.safetensors"))
        return self


def item_scores(step: Step, trie: Trie, codes_BKS: np.ndarray) -> np.ndarray:
    """(B, K) float64 log p of given items, all in the trie, under the softmax over codes that exist.

    step: as `beam_search` takes it, fresh. What a beam search finds has these scores.
    """
    B, K, S = codes_BKS.shape
    user, score = np.arange(B)[:, None], np.zeros((B, K))
    at, node = np.zeros((B, K), np.int64), np.full((B, 1), trie.root)  # which prefix an item has; their nodes
    for depth in range(S):
        if depth == 0:
            logits = step(0, None, None)
        else:
            nodes = trie.find(codes_BKS[..., :depth].reshape(B * K, depth)).reshape(B, K)
            first, shared = distinct(nodes)
            written = codes_BKS[user, first, depth - 1].astype(np.int64)
            logits = step(depth, at[user, first], written)
            node, at = nodes[user, first], shared
        offsets, codes, _ = trie.children(node.ravel(), depth)
        owner = np.repeat(np.arange(node.size), np.diff(offsets))
        values = logits.reshape(node.size, -1)[owner, codes].astype(np.float64)
        total = np.logaddexp.reduceat(values, offsets[:-1]).reshape(node.shape)
        score += logits[user, at, codes_BKS[..., depth]] - total[user, at]
    return score


def distinct(nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of rows (B, K): where the different values of each first stand (B, U), and which of those each is (B, K).

    A row with fewer than U of them repeats its first.
    """
    order = np.argsort(nodes, axis=1, kind="stable")
    ordered = np.take_along_axis(nodes, order, axis=1)
    new = np.ones(nodes.shape, bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    number = np.cumsum(new, axis=1) - 1
    which = np.empty_like(number)
    np.put_along_axis(which, order, number, axis=1)
    first = np.repeat(order[:, :1], number.max() + 1, axis=1)
    row, column = np.nonzero(new)
    first[row, number[row, column]] = order[row, column]
    return first, which
