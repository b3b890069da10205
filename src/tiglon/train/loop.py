"""The training loop: one function that knows neither models nor data.

Determinism. A run is a function of its seed: the batches of an epoch are a function of (seed, epoch), and
the generator's state travels in the checkpoint, so a run that was killed and resumed ends with the same
weights as one that was not (unless `minutes` is set: then the clock decides how long the schedule is).

Mixed precision is torch's autocast to bfloat16; weights, gradients and optimizer stay float32.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tiglon.errors import ConfigError, DataError, require_weights
from tiglon.train import checkpoint, memory

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = 40
    minutes: float | None = None  # stop, fully annealed, when the first of the two is reached
    lr: float = 1e-3
    final_lr: float = 0.05  # share of lr at the end of the cosine
    warmup: float = 0.05  # share of the run
    weight_decay: float = 0.05  # on matrices
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0  # norm of the whole gradient
    average: float = (
        0.999  # decay of the weights' moving average, which is what is validated and kept; 0: none
    )
    bfloat16: bool = True
    evaluations: int = 8  # times the validation is read, evenly spaced
    checkpoint_minutes: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.evaluations < 1 or (self.minutes is not None and self.minutes <= 0):
            raise ConfigError(
                f"epochs={self.epochs}, evaluations={self.evaluations}, minutes={self.minutes}",
                rule="All are above 0",
            )
        if self.lr <= 0 or not 0 <= self.average < 1:
            raise ConfigError(f"lr={self.lr}, average={self.average}", rule="lr > 0 and 0 ≤ average < 1")
        if not 0 < self.clip < math.inf or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"clip={self.clip}, betas={self.betas}", rule="clip > 0 and 0 ≤ betas < 1")
        require_weights(self, "final_lr", "warmup", "weight_decay", "seed")


@dataclass(frozen=True)
class Progress:
    """What a caller may show: `share` of the run done (0 … 1), the running loss, examples a second."""

    share: float
    epoch: int
    loss: float | None
    examples_per_second: float
    score: float | None  # of the last validation
    best: float | None


def train(
    model: nn.Module,
    epoch_batches: Callable[[int], Sequence[Batch]],
    loss_fn: Callable[[Any, Batch], Tensor],
    validate: Callable[[], float] | None,
    config: TrainConfig,
    directory: Path | None = None,
    report: Callable[[Progress], None] | None = None,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train `model` in place and leave its best weights in it; the history of losses and scores.

    epoch_batches: the batches of an epoch (0, 1, …), the same whenever asked.
    loss_fn: (model, batch) → (n,) losses of the batch's n examples; their mean is minimised.
    validate: reads the model as it is at that moment (averaged weights, eval mode); higher is better.
        None keeps the last weights.
    directory: for checkpoint.safetensors, from which a later call goes on, and metrics.jsonl.
    about: what else the run depends on (data, sizes …), as JSON; a checkpoint of another is refused.
    Raises DataError where there is nothing to learn from or a loss is not finite, ConfigError for a checkpoint of another run,
    BundleDamagedError for a damaged one, StorageError where the disk refuses.
    """
    with memory.kept(), torch.random.fork_rng(devices=[]):
        try:
            return _train(model, epoch_batches, loss_fn, validate, config, directory, report, about or {})
        finally:
            model.eval()


def _train(
    model: nn.Module,
    epoch_batches: Callable[[int], Sequence[Batch]],
    loss_fn: Callable[[Any, Batch], Tensor],
    validate: Callable[[], float] | None,
    config: TrainConfig,
    directory: Path | None,
    report: Callable[[Progress], None] | None,
    about: dict[str, Any],
) -> dict[str, Any]:
    torch.manual_seed(config.seed)
    run = _Run(model, config, about)
    path = directory / "checkpoint.safetensors" if directory else None
    if path and path.exists():
        run.restore(*checkpoint.load(path))
    total = len(epoch_batches(0)) * config.epochs
    if not total:
        raise DataError("an epoch without batches", rule="There is at least one example to learn from")
    batches = epoch_batches(run.epoch)
    milestone = math.floor(run.share(total) * config.evaluations + 1e-9) + 1
    began, saved, shown = time.monotonic() - run.seconds, time.monotonic(), time.monotonic()
    examples = since = 0
    while not run.done:
        model.train()
        for batch in batches[run.step - run.epoch_start :]:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
                losses = loss_fn(model, batch)
            mean, n = losses.mean(), len(losses)
            value = mean.item()
            if not math.isfinite(value):
                raise DataError(
                    f"a loss of {value} at step {run.step}",
                    rule="A loss is finite; this step was not taken",
                    fix="Lower train.lr, or look for bad values in the data",
                )
            run.update(mean, run.share(total))
            run.loss = value if run.loss is None else run.loss + 0.05 * (value - run.loss)
            examples += n
            run.seconds = time.monotonic() - began
            share = run.share(total)
            if share >= milestone / config.evaluations or share >= 1.0:
                paused = time.monotonic()
                run.evaluate(validate)
                shown += time.monotonic() - paused
                began = time.monotonic() - run.seconds  # validation is not training time
                milestone = math.floor(share * config.evaluations + 1e-9) + 1
                model.train()
                run.done = share >= 1.0
                if directory:
                    lines = "".join(json.dumps(line) + "\n" for line in run.history)
                    checkpoint.write_text(directory / "metrics.jsonl", lines)
            now = time.monotonic()
            if report and (now - shown > 1.0 or run.done):
                speed = (examples - since) / max(now - shown, 1e-9)
                shown, since = now, examples
                score = run.history[-1]["score"] if run.history else None
                report(Progress(min(share, 1.0), run.epoch, run.loss, speed, score, run.best_score))
            if path and (run.done or now - saved > 60 * config.checkpoint_minutes):
                checkpoint.save(path, *run.state())
                saved = time.monotonic()
            if run.done:
                break
        run.epoch, run.epoch_start = run.epoch + 1, run.step
        if not run.done:
            batches = epoch_batches(run.epoch)
    run.finish()
    return {"history": run.history, "steps": run.step, "seconds": run.seconds, "best": run.best_score}


class _Run:
    """All that changes while training, and how it is put into a checkpoint and taken out again."""

    PLAIN = ("epoch", "epoch_start", "step", "seconds", "done", "loss", "best_score", "history")

    def __init__(self, model: nn.Module, config: TrainConfig, about: dict[str, Any]) -> None:
        self.model = model
        self.settings = json.loads(json.dumps({**asdict(config), **about}))
        self.config = config
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        kept = model.state_dict().keys()
        self.buffers = {name: b for name, b in model.named_buffers() if name in kept}  # running statistics
        matrices = [p for name, p in self.named.items() if p.ndim > 1 and "bias" not in name]
        others = [p for name, p in self.named.items() if p.ndim <= 1 or "bias" in name]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
        self.average = {name: p.detach().clone() for name, p in self.named.items()} if config.average else {}
        self.best: dict[str, Tensor] = {}
        self.best_buffers: dict[str, Tensor] = {}
        self.best_score: float | None = None
        self.epoch = self.epoch_start = self.step = 0
        self.loss: float | None = None  # running mean
        self.seconds = 0.0
        self.done = False
        self.history: list[dict[str, Any]] = []

    def share(self, total: int) -> float:
        """How much of the run is over, by steps or by the clock, whichever is further."""
        by_clock = self.seconds / (60 * self.config.minutes) if self.config.minutes else 0.0
        return max(self.step / total, by_clock)

    def update(self, loss: Tensor, share: float) -> None:
        c = self.config
        cosine = c.final_lr + (1 - c.final_lr) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
        warm = min(1.0, (share + 1e-3) / c.warmup) if c.warmup else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = c.lr * warm * cosine
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.named.values(), c.clip)
        self.optimizer.step()
        self.step += 1
        if self.average:
            decay = min(c.average, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.values()), list(self.named.values()), 1 - decay)

    def evaluate(self, validate: Callable[[], float] | None) -> None:
        current = {name: p.detach().clone() for name, p in self.named.items()}
        kept = self.average or current
        self._put(kept)
        self.model.eval()
        generator = torch.get_rng_state()
        score = validate() if validate else None
        torch.set_rng_state(generator)
        self._put(current)
        if score is None or self.best_score is None or score > self.best_score:
            self.best_score = score
            self.best = {name: value.clone() for name, value in kept.items()}
            self.best_buffers = {name: value.clone() for name, value in self.buffers.items()}
        self.history.append(
            {
                "step": self.step,
                "epoch": self.epoch,
                "loss": self.loss,
                "score": score,
                "seconds": self.seconds,
            }
        )

    def finish(self) -> None:
        self._put(self.best)
        _copy(self.best_buffers, self.buffers)
        self.model.eval()

    def _put(self, values: dict[str, Tensor]) -> None:
        _copy(values, self.named)

    # -- checkpoint ----------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"generator": torch.get_rng_state()}
        for prefix, group in (
            ("now", self.named),
            ("average", self.average),
            ("best", self.best),
            ("buffer", self.buffers),
            ("best_buffer", self.best_buffers),
        ):
            tensors |= {f"{prefix}/{name}": value.detach() for name, value in group.items()}
        for name, p in self.named.items():
            tensors |= {f"adam/{key}/{name}": value for key, value in self.optimizer.state[p].items()}
        head = {name: getattr(self, name) for name in self.PLAIN}
        return tensors, head | {"settings": self.settings}

    def restore(self, tensors: dict[str, Tensor], head: dict[str, Any]) -> None:
        ours, theirs = self.settings, head.get("settings", {})
        if ours != theirs:
            changed = sorted(key for key in ours.keys() | theirs if ours.get(key) != theirs.get(key))
            raise ConfigError(
                f"a checkpoint of another training ({', '.join(changed)} differ)",
                rule="A run goes on with the settings and the data it began with",
                fix="Delete the checkpoint to start anew",
            )
        for name in self.PLAIN:
            setattr(self, name, head[name])
        groups: dict[str, dict[str, Tensor]] = {
            prefix: {} for prefix in ("now", "average", "best", "buffer", "best_buffer")
        }
        for key, value in tensors.items():
            prefix, _, name = key.partition("/")
            if prefix in groups:
                groups[prefix][name] = value
        shapes = {name: value.shape for name, value in groups["now"].items()}
        if shapes != {name: p.shape for name, p in self.named.items()}:
            raise ConfigError("a checkpoint of another network", fix="Delete the checkpoint to start anew")
        if self.average:  # in the order of `named`, which a file does not keep
            self.average = {name: groups["average"][name] for name in self.named}
        self.best, self.best_buffers = groups["best"], groups["best_buffer"]
        self._put(groups["now"])
        _copy(groups["buffer"], self.buffers)
        for key, value in tensors.items():
            prefix, _, name = key.partition("/")
            if prefix == "adam":
                state, _, name = name.partition("/")
                self.optimizer.state[self.named[name]][state] = value
        torch.set_rng_state(tensors["generator"])


def _copy(values: dict[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """In place; `into` may hold more."""
    with torch.no_grad():
        for name, value in values.items():
            into[name].copy_(value)
