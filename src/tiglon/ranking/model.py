"""A ranker that answers with your ids: a network, the features it reads, every user's life.

    ranker = LifelongRanker.of(task, LifelongConfig(long="twin")).fit(task, validation)
    ranker.evaluate(test)                                   GAUC, AUC, log loss … of each task head
    ranker.predict(["user 7"], [["milk", "bread"]])         probabilities, on the stored lives
    ranker.explain("user 7", "milk")                        the behaviours that were attended to
    ranker.cluster(groups=ranker.groups("completion"))      from now on on virtual items (TWIN V2)

Who is unknown. An unknown user has no past and an unknown profile. A candidate that is unknown, or had no
event in training, is known by its other features, if any. Both get a probability. A request without a time
comes one unit of time after the newest event that is stored.

Letters: R requests, C candidates of all of them, T tasks.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from safetensors.torch import load_file, save_file

from tiglon.data.features import ITEM, Buckets, FittedFeatures
from tiglon.data.folders import reading, written_aside
from tiglon.data.histories import HistoryStore, offsets_of
from tiglon.data.ranking import NEXT_BASKET, Lives, RankingTask
from tiglon.errors import BundleDamagedError, ConfigError, DataError, did_you_mean, require_counts
from tiglon.evaluation.ranking import RankingEvaluation, gauc, measure
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.cluster_store import ClusterStore
from tiglon.ranking.clusters import ClusterConfig, Groups
from tiglon.ranking.crosses import CROSSES
from tiglon.ranking.din import DIN
from tiglon.ranking.gates import GATES, TRUNKS
from tiglon.ranking.ranker import Gate, Interest, Ranker, RankerConfig
from tiglon.ranking.twin_v2 import TwinV2
from tiglon.ranking.units import NONE, UnitConfig, make_unit, require_unit
from tiglon.train.loop import Progress, TrainConfig, train
from tiglon.train.multitask import METHODS, Balanced, MultiTask
from tiglon.types import ItemVectors, RankingBatch

FORMAT = 1


@dataclass(frozen=True)
class LifelongConfig:
    long: str = "full_attention"  # the unit that reads the whole life, by its name in `units`; or "none"
    short: str = "full_attention"  # the unit that reads the most recent `network.recent`; or "none"
    cross: str = NONE  # a crossing layer, by its name in `crosses`
    gate: str = NONE  # a gate or trunk, by its name in `gates`
    gate_by: tuple[str, ...] = ()  # the user and context features that it reads
    method: str = (
        NONE  # what each task's loss counts, by its name in `multitask`; none: the mean of all labels
    )
    tasks: tuple[str, ...] = (NEXT_BASKET,)  # that a recipe makes of a log; a task of your own brings its own
    unit: UnitConfig = field(default_factory=UnitConfig)
    network: RankerConfig = field(default_factory=RankerConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=3, lr=3e-3, bfloat16=False))
    longest: int | None = None  # behaviours read at most, the most recent; None: all
    requests: int = 32  # a step, fewer where lives are long
    validation_requests: int = 2_000  # drawn by the seed; the score that selects is their GAUC

    def __post_init__(self) -> None:
        require_unit(self.long)
        require_unit(self.short)
        for kind, name, known in (
            ("crossing layer", self.cross, CROSSES),
            ("gate", self.gate, GATES | TRUNKS),
            ("multi-task method", self.method, METHODS),
        ):
            if name not in (NONE, *known):
                raise ConfigError(f"no {kind} named '{name}'", fix=did_you_mean(name, [*known, NONE]))
        require_counts(self, "requests", "validation_requests")
        if self.longest is not None and self.longest < 1:
            raise ConfigError(
                f"longest={self.longest}", rule="At least one behaviour is read", fix="Pass None for all"
            )


class Attended(NamedTuple):
    """A behaviour that an answer rests on. weight: its share of the attention, the mean over heads."""

    item_id: Any
    time: int
    weight: float


class LifelongRanker:
    """Scores candidates by a user's whole life.

    features, histories: of training; the histories may be replaced by longer ones of the same items, to which the
    clusters then belong. Raises DataError for histories of other items, of other users where features are theirs, or
    whose past is not the one that was clustered.
    """

    def __init__(
        self,
        features: FittedFeatures,
        histories: HistoryStore,
        tasks: Sequence[str] = ("label",),
        config: LifelongConfig | None = None,
    ) -> None:
        self.config = c = config or LifelongConfig()
        self.features, self.tasks = features, tuple(tasks)
        self.clusters: ClusterStore | None = None
        self.histories = histories
        category = category_of(features, c.unit.category)
        cross = None if c.cross == NONE else CROSSES[c.cross]
        gate = self._gate if c.gate in GATES else None
        trunk = self._trunk if c.gate in TRUNKS else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(c.train.seed)
            embed = FeatureEmbedding(**features.embedding())
            long, short = (make_unit(name, embed, c.unit, category) for name in (c.long, c.short))
            self.network = Ranker(embed, long, short, self.tasks, c.network, cross, gate, trunk).eval()
        self.history: dict[str, Any] = {}

    @classmethod
    def of(cls, task: RankingTask, config: LifelongConfig | None = None) -> LifelongRanker:
        """An untrained ranker for the features, lives and labels of a task."""
        if not isinstance(task.store, HistoryStore):
            raise DataError("a task that reads the past from another store than a HistoryStore")
        return cls(task.features, task.store, task.tasks, config)

    def _gate(self, embed: FeatureEmbedding, widths: Sequence[int]) -> Gate:
        return GATES[self.config.gate](embed, widths, self._columns())

    def _trunk(
        self, embed: FeatureEmbedding, widths: Sequence[int], tasks: int, config: RankerConfig
    ) -> torch.nn.Module:
        return TRUNKS[self.config.gate](embed, widths, self._columns(), tasks, config)

    def _columns(self) -> list[int]:
        """Of what a gate reads, in the profile."""
        names = [feature.name for feature in self.features.schema.of("user", "context")]
        for name in self.config.gate_by:
            if name not in names:
                raise ConfigError(
                    f"a gate by '{name}'",
                    rule="Gates read user and context features",
                    fix=did_you_mean(name, names),
                )
        return [names.index(name) for name in self.config.gate_by]

    @property
    def name(self) -> str:
        return self.config.long if self.config.long != "none" else f"recent {self.config.network.recent}"

    @property
    def histories(self) -> HistoryStore:
        return self._histories

    @histories.setter
    def histories(self, histories: HistoryStore) -> None:
        self.features.require(histories.users, histories.items)
        if self.clusters is not None:
            self.clusters = self.clusters.onto(histories)
        self._histories = histories

    @property
    def lives(self) -> Lives:
        """What `predict` reads: the clustered lives where there are any, else every behaviour."""
        return self.histories if self.clusters is None else self.clusters

    @property
    def version(self) -> str:
        """Names the weights: 16 hex digits of a hash over them."""
        digest = hashlib.sha256()
        for key, value in self.network.state_dict().items():
            digest.update(key.encode() + value.numpy().tobytes())
        return digest.hexdigest()[:16]

    # -- learning --------------------------------------------------------------------------------

    def fit(
        self,
        task: RankingTask,
        validation: RankingTask | None = None,
        *,
        method: MultiTask | None = None,
        directory: Path | None = None,
        report: Callable[[Progress], None] | None = None,
    ) -> LifelongRanker:
        """Learn from the task's labels; keep the weights whose GAUC of the first label is best on `validation`.

        method: what each label's loss counts, of `train.multitask`, in place of the one that the settings name; then
            the mean GAUC of all labels selects. Without any the mean over all labels is minimised.
        directory: for checkpoints; the same call on the same directory goes on where it stopped.
        Raises DataError for a task of other labels, items or features, or with a label that is always 0 or always 1.
        """
        c = self.config
        for given in (task, validation):
            if given is not None:
                self._require_fit(given)
        _require_both_classes(task)
        labelled = np.unique(task.owner[~np.isnan(task.label).all(axis=1)])
        if len(labelled) < len(task):
            task = task.select(labelled)  # the others teach nothing
        for unit in self._searching():
            unit.use(None, self.network.embed)
        for unit in (self.network.long, self.network.short):
            if isinstance(unit, DIN) and unit.l2:
                unit.count(self.network.embed, torch.from_numpy(occurrences(task, c.longest)))
        sample = None
        if validation is not None and len(validation):
            rows = np.random.default_rng(c.train.seed).permutation(len(validation))[: c.validation_requests]
            sample = validation.select(np.sort(rows))

        def epoch_batches(epoch: int) -> Sequence[RankingBatch]:
            return task.batches(c.requests, last=c.longest, seed=c.train.seed * 1_000_003 + epoch)

        if method is None and c.method != NONE:
            method = METHODS[c.method](self.tasks, len(epoch_batches(0)))

        def validate() -> float:
            assert sample is not None
            score, user = self.score(sample), sample.user[sample.owner]
            found = []
            for t, label in enumerate(sample.label.T[: 1 if method is None else None]):
                known = ~np.isnan(label)
                found.append(gauc(score[known, t], label[known], user[known]))
            found = [value for value in found if value == value]
            return float(np.mean(found)) if found else 0.0

        self.history = train(
            self.network if method is None else Balanced(self.network, method),
            epoch_batches,
            lambda model, batch: model.loss(batch),
            validate if sample is not None else None,
            c.train,
            directory,
            report,
            about={
                "labels": self.tasks,
                "requests_learned": f"{len(task)} requests, checksum {_checksum(task)}",
                "requests_selecting": "none" if sample is None else f"checksum {_checksum(sample)}",
                **{key: value for key, value in asdict(c).items() if key != "train"},
                **({} if method is None else {"method": type(method).__name__}),
            },
        )
        return self

    def _require_fit(self, task: RankingTask) -> None:
        if task.tasks != self.tasks:
            raise DataError(
                f"a task with the labels {', '.join(task.tasks)}",
                rule=f"This ranker has a head for {', '.join(self.tasks)}",
                fix="Make a ranker for the task: LifelongRanker.of(task)",
            )
        if task.store.items != self.histories.items or task.features.version != self.features.version:
            raise DataError(
                "a task of other items or features than the ranker's",
                fix="Make a ranker for the task: LifelongRanker.of(task)",
            )

    def groups(self, column: str, groups: int = 5) -> Groups:
        """Groups by a number of the log: equal shares where all of it lies in 0 … 1, as a completion ratio does, else
        quantiles of the stored lives. Raises ConfigError where the lives have no such number."""
        coders = {name: self.features.coders[name] for name in self.histories.features}
        numbers = {name: coder for name, coder in coders.items() if isinstance(coder, Buckets)}
        if column not in numbers:
            raise ConfigError(
                f"groups by '{column}'",
                rule=f"Groups are of a number of each behaviour: {', '.join(numbers) or 'these lives have none'}",
                fix=did_you_mean(column, numbers),
            )
        cuts = numbers[column].boundaries
        if len(cuts) and cuts[0] >= 0 and cuts[-1] <= 1:
            return Groups.by_completion(column, groups)
        return Groups.by_quantile(column, numbers[column].values[self.histories.features[column]], groups)

    def cluster(
        self,
        until: int | None = None,
        groups: Groups | None = None,
        *,
        by_keys: bool = False,
        config: ClusterConfig | None = None,
        threads: int = 1,
        work: str | Path | None = None,
        report: Callable[[float], None] | None = None,
    ) -> ClusterStore:
        """Put virtual items in the place of the behaviours before `until` (None: all), by this ranker's item vectors.

        Whatever asks from now on reads the clustered lives (TWIN V2 §4.2), which `save` keeps. The arguments are
        those of `ClusterStore.build`. A number is stored as its bucket, so that groups and averages take the
        bucket's middle for it; `ClusterStore.build(…).coded(ranker.features)` takes the numbers of a log.

        by_keys: what is alike to TWIN V2's search, K_h W^h, rather than items' vectors as published: in lives of
        10^5 and more the search then finds more of what decides (docs/log.md).
        """
        embed, unit = self.network.embed, self.network.long
        if not isinstance(unit, TwinV2):
            raise ConfigError(
                f"clustered lives for '{self.name}'",
                rule="It would count a virtual item as one behaviour; twin_v2 knows how many it stands for",
                fix="Train twin_v2",
            )
        with torch.inference_mode():
            if by_keys:
                table = unit.keys(embed, torch.arange(len(embed.item_codes))).flatten(1)
            else:
                table = embed.catalogue()
            vectors = ItemVectors(table.numpy(), f"ranker {self.version}{' keys' if by_keys else ''}")
        codes = self.histories.features
        coders = ((name, self.features.coders[name]) for name in codes)
        numbers = {name: coder for name, coder in coders if isinstance(coder, Buckets)}
        of_numbers = {name: coder.values[codes[name]] for name, coder in numbers.items()}
        store = ClusterStore.build(
            replace(self.histories, features=codes | of_numbers),
            vectors,
            until=until,
            groups=groups,
            config=config,
            categorical=[name for name in codes if name not in numbers],
            threads=threads,
            work=work,
            report=report,
        )
        self.clusters = store.as_codes(
            lambda values: {
                name: (numbers[name].of(column) if name in numbers else column).astype(codes[name].dtype)
                for name, column in values.items()
            }
        )
        return self.clusters

    def refresh(self) -> LifelongRanker:
        """Look up from now on what a search reads of every item (TWIN's K_h W^h, fingerprints), in place of making it
        of the weights at each question: the same answers. `fit` forgets it."""
        for unit in self._searching():
            unit.refresh(self.network.embed)
        return self

    def _searching(self) -> list[Any]:
        """The units that can read stored tables of all items."""
        units = (self.network.long, self.network.short)
        return [unit for unit in units if hasattr(unit, "refresh")]

    # -- answering -------------------------------------------------------------------------------

    @torch.inference_mode()
    def score(self, task: RankingTask) -> np.ndarray:
        """(C, T) probabilities of a task's candidates, in its order."""
        network = self.network.eval()
        order = np.argsort(task.lengths, kind="stable")  # lives of like length together: little padding
        counts = np.diff(task.offsets)[order]
        found, row = [], 0
        for batch in task.select(order).batches(self.config.requests, last=self.config.longest):
            B, K = batch.item.shape
            real = np.arange(K) < counts[row : row + B, None]
            found.append(torch.sigmoid(network(batch)).numpy()[real])
            row += B
        score = np.empty((len(task.item), len(self.tasks)), np.float32)
        score[_places(task.offsets, order)] = np.concatenate(found) if found else score
        return score

    def evaluate(self, task: RankingTask, name: str | None = None) -> list[RankingEvaluation]:
        """One evaluation a label."""
        self._require_fit(task)
        return measure_task(name or self.name, task, self.score(task))

    def predict(
        self,
        users: Sequence[Any],
        candidates: Sequence[Sequence[Any]],
        time: int | Sequence[int] | None = None,
        *,
        context: pl.DataFrame | None = None,
        task: str | None = None,
    ) -> list[np.ndarray]:
        """For each user the probability of each of their candidates, by raw ids, on the stored lives.

        time: when they ask, one for all or one a user; behaviours strictly before it are read. None: now.
        context: a line a user with the context features; None leaves them unknown.
        task: whose head answers; None: the first. Raises DataError, ConfigError.
        """
        head = 0 if task is None else self._head(task)
        if len(users) != len(candidates):
            raise DataError(
                f"{len(candidates)} lists of candidates for {len(users)} users", rule="One list a user"
            )
        asked = self.asked(users, candidates, time, context)
        score = self.score(asked)[:, head]
        return [score[a:b] for a, b in zip(asked.offsets[:-1], asked.offsets[1:], strict=True)]

    def explain(
        self,
        user: Any,
        candidate: Any,
        time: int | None = None,
        *,
        k: int = 10,
        context: pl.DataFrame | None = None,
    ) -> list[Attended]:
        """The k behaviours that counted most when the long unit (or else the short one) read a candidate.

        Raises ConfigError where the unit does not attend to single behaviours.
        """
        asked = self.asked([user], [[candidate]], time, context)
        batch = asked.batches(1, last=self.config.longest)[0]
        with torch.inference_mode():
            found = self.network.eval().score(batch)[1]
        interest = found[-1] if found else Interest(torch.empty(0))
        if interest.chosen is None or interest.weight is None:
            raise ConfigError(
                f"'{self.name}' does not say which behaviours it attends to",
                rule="Units that pool or read in order weigh no single behaviour",
                fix="Ask a ranker whose unit attends, such as twin",
            )
        life = self.lives.before(asked.user, asked.time, self.config.longest)
        at, weight = interest.chosen[0, 0].numpy(), interest.weight[0, 0].numpy()
        if self.network.long is None:
            at = np.where(at >= 0, at + max(len(life.item) - self.config.network.recent, 0), at)
        best = np.argsort(-weight, kind="stable")
        best = best[at[best] >= 0][:k]
        items = self.histories.items.decode(life.item[at[best]])
        return [
            Attended(item, int(life.time[i]), float(w))
            for item, i, w in zip(items, at[best], weight[best], strict=True)
        ]

    def _head(self, task: str) -> int:
        if task not in self.tasks:
            raise ConfigError(f"no task '{task}'", fix=did_you_mean(task, self.tasks))
        return self.tasks.index(task)

    def asked(
        self,
        users: Sequence[Any],
        candidates: Sequence[Sequence[Any]],
        time: int | Sequence[int] | None = None,
        context: pl.DataFrame | None = None,
    ) -> RankingTask:
        """What is asked, as a task without labels; arguments as of `predict`."""
        store = self.histories
        if time is None:
            time = int(store.time.max(initial=-1)) + 1
        moment = np.asarray(time, np.int64)
        if moment.shape not in ((), (len(users),)):
            raise DataError(f"{moment.shape} times for {len(users)} users", rule="One time, or one a user")
        if context is not None and context.height != len(users):
            raise DataError(f"{context.height} lines of context for {len(users)} users", rule="One a user")
        if context is None:
            names = self.features.schema.columns("context")
            context = pl.DataFrame({name: [None] * len(users) for name in names})
        if any(isinstance(given, (str, bytes)) for given in candidates):
            raise DataError("a string in the place of a list of candidates", rule="One list of ids a user")
        user = store.users.encode(list(users))
        item = store.items.encode([item for given in candidates for item in given])
        return RankingTask(
            store=self.lives,
            features=self.features,
            user=user,
            time=np.broadcast_to(moment, user.shape).copy(),
            offsets=offsets_of(np.array([len(given) for given in candidates], np.int64)),
            item=item,
            label=np.full((len(item), len(self.tasks)), np.nan, np.float32),
            profile=self.features.profile_codes(user, context),
            tasks=self.tasks,
        )

    # -- files -----------------------------------------------------------------------------------

    def save(self, directory: str | Path, requests: Mapping[str, RankingTask] | None = None) -> None:
        """Write the folder, all of it or nothing; `requests` are kept, by name, to measure again later.

        Raises StorageError.
        """
        with written_aside(Path(directory), "ranker.json") as aside:
            for name, task in (requests or {}).items():
                _write_requests(task, aside / "requests" / name)
            save_file(self.network.state_dict(), aside / "network.safetensors")
            self.features.save(aside / "features")
            self.histories.save(aside / "histories")
            if self.clusters is not None:
                self.clusters.save(aside / "clusters")
            about = {
                "format": FORMAT,
                "kind": "LifelongRanker",
                "version": self.version,
                "tasks": self.tasks,
                "config": asdict(self.config),
                "history": self.history,
            }
            (aside / "ranker.json").write_text(json.dumps(about), encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> LifelongRanker:
        """What `save` wrote, with the same answers. Raises BundleDamagedError, BundleVersionError."""
        directory = Path(directory)
        with reading(
            directory,
            "ranker.json",
            FORMAT,
            what="a ranker",
            rule="A ranker has ranker.json, network.safetensors, features, histories and perhaps clusters",
            fix="Copy the folder again, or train anew",
        ) as about:
            features = FittedFeatures.load(directory / "features")
            histories = HistoryStore.load(directory / "histories")
            self = cls(features, histories, about["tasks"], _config(about["config"]))
            self.network.load_state_dict(load_file(directory / "network.safetensors"))
            self.history = about["history"]
            if (directory / "clusters").is_dir():
                self.clusters = ClusterStore.load(directory / "clusters", histories)
            if self.version != about["version"]:
                raise ValueError(f"weights {self.version} where {about['version']} were saved")
        return self

    def requests(self, directory: str | Path, name: str) -> RankingTask:
        """Requests that `save` kept, on this ranker's lives. Raises ConfigError, BundleDamagedError."""
        folder = Path(directory) / "requests" / name
        known = [path.name for path in folder.parent.glob("*")]
        if name not in known:
            raise ConfigError(f"no requests named '{name}' in {directory}", fix=did_you_mean(name, known))
        try:
            asked = pl.read_parquet(folder / "requests.parquet", glob=False)
            candidates = pl.read_parquet(folder / "candidates.parquet", glob=False)
            return RankingTask(
                store=self.lives,
                features=self.features,
                user=asked["user"].to_numpy(),
                time=asked["time"].to_numpy(),
                offsets=offsets_of(asked["candidates"].to_numpy()),
                item=candidates[:, 0].to_numpy(),
                label=candidates[:, 1:].select(self.tasks).to_numpy().astype(np.float32),
                profile=np.load(folder / "profile.npy"),
                tasks=self.tasks,
            )
        except (OSError, ValueError, KeyError, pl.exceptions.PolarsError) as error:
            raise BundleDamagedError(
                f"the requests in {folder} cannot be read: {error}", fix="Copy the folder again"
            ) from error


def is_ranker(path: str | Path) -> bool:
    """Whether a folder says of itself that it is one."""
    return (Path(path) / "ranker.json").is_file()


def measure_task(
    name: str, task: RankingTask, score: np.ndarray, *, probability: bool = True
) -> list[RankingEvaluation]:
    """One evaluation a label of a task, by scores (C, T), or (C, 1) for all labels."""
    owner = task.owner
    return [
        measure(
            name,
            score[:, min(t, score.shape[1] - 1)],
            task.label[:, t],
            user=task.user[owner],
            request=owner,
            length=task.lengths[owner],
            task=title,
            probability=probability,
        )
        for t, title in enumerate(task.tasks)
        if not np.isnan(task.label[:, t]).all()
    ]


def _checksum(task: RankingTask) -> int:
    """Of all that is learned from."""
    past = task.store.histories if isinstance(task.store, ClusterStore) else task.store
    assert isinstance(past, HistoryStore)
    found = zlib.crc32(task.features.version.encode())
    for array in (
        task.item,
        task.label,
        task.user,
        task.time,
        task.offsets,
        task.profile,
        past.item,
        past.time,
    ):
        found = zlib.crc32(np.ascontiguousarray(array).data, found)
    return found


def _require_both_classes(task: RankingTask) -> None:
    """A label that never differs teaches nothing, and no ranking can be measured by it."""
    for name, label in zip(task.tasks, task.label.T, strict=True):
        known = label[~np.isnan(label)]
        if not len(known) or known.min() == known.max():
            always = f"always {known[0]:g}" if len(known) else "never given"
            raise DataError(
                f"the label '{name}' is {always} in the {len(task):,} requests to learn from",
                rule="A task has positives and negatives",
                fix="Leave the task out, or give it requests of a longer time",
            )


def occurrences(task: RankingTask, longest: int | None = None) -> np.ndarray:
    """(N + 1,) how often each item, the unknown one last, stands in the samples of an epoch: as a candidate, and as a
    behaviour of every request that reads it. Raises DataError for lives that are not a HistoryStore."""
    store, N = task.store, len(task.store.items)
    if not isinstance(store, HistoryStore):
        raise DataError(
            "occurrences of items in clustered lives", rule="They are counted behaviour by behaviour"
        )
    stop = store.offsets[task.user] + store.lengths(task.user, task.time)
    change = np.zeros(len(store.item) + 1, np.int64)
    np.add.at(change, stop - store.lengths(task.user, task.time, longest), 1)
    np.add.at(change, stop, -1)
    candidates = np.bincount(task.item % (N + 1), minlength=N + 1)  # the unknown item is −1
    return candidates + np.bincount(store.item % (N + 1), change.cumsum()[:-1], N + 1).astype(np.int64)


def category_of(features: FittedFeatures, name: str | None) -> int:
    """Which inherent feature SIM's hard search filters by: the named one, or the finest category with at most
    1,000 codes that is not the item itself, or the first. Raises ConfigError for an unknown name."""
    inherent = features.schema.of("inherent")
    names = [feature.name for feature in inherent]
    if name is not None:
        if name not in names:
            raise ConfigError(f"no inherent feature '{name}'", fix=did_you_mean(name, names))
        return names.index(name)
    coarse = [
        (size, f)
        for f, (feature, size) in enumerate(zip(inherent, features.item_sizes, strict=True))
        if feature.name != ITEM and feature.kind == "category" and size <= 1_000
    ]
    return max(coarse)[1] if coarse else 0


def _places(offsets: np.ndarray, order: np.ndarray) -> np.ndarray:
    """(C,) where in the task each candidate of its requests in `order` stands."""
    counts = np.diff(offsets)[order]
    starts = offsets_of(counts)
    return np.arange(starts[-1]) + np.repeat(offsets[order] - starts[:-1], counts)


def _write_requests(task: RankingTask, folder: Path) -> None:
    folder.mkdir(parents=True)
    counts = np.diff(task.offsets)
    pl.DataFrame({"user": task.user, "time": task.time, "candidates": counts}).write_parquet(
        folder / "requests.parquet"
    )
    labels = pl.DataFrame({name: task.label[:, t] for t, name in enumerate(task.tasks)})
    name = "item"
    while name in task.tasks:
        name += "_"
    labels.insert_column(0, pl.Series(name, task.item)).write_parquet(folder / "candidates.parquet")
    np.save(folder / "profile.npy", task.profile)


def _config(saved: dict[str, Any]) -> LifelongConfig:
    """The settings that `asdict` made JSON of."""
    network, training = saved.pop("network"), saved.pop("train")
    for name in ("hidden", "tower"):
        network[name] = tuple(network.get(name, ()))
    training["betas"] = tuple(training["betas"])
    saved |= {name: tuple(saved[name]) for name in ("gate_by", "tasks") if name in saved}
    unit = UnitConfig(**saved.pop("unit"))
    return LifelongConfig(unit=unit, network=RankerConfig(**network), train=TrainConfig(**training), **saved)
