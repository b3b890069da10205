"""Several tasks, one network: what each task's loss, or its gradient, counts on the parameters that tasks share.

    method = PCGrad(("click", "buy"))
    for batch in batches:
        loss = method({"click": …, "buy": …}, shared=model.trunk.parameters(), own=model.heads.parameters())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

A loss is a tensor of any shape, whose mean is meant. A task without an example in a batch (left out, or of
no elements) takes no part in that step. Every method is a module: what it remembers travels in a checkpoint.

    Equal, Fixed         Σ_t w_t L_t
    Uncertainty          Kendall, Gal, Cipolla. CVPR 2018, arXiv:1705.07115, eq. 7 and 10
    DWA                  Liu, Johns, Davison: End-to-End Multi-Task Learning with Attention. CVPR 2019,
                         arXiv:1803.10704, eq. 7
    GradNorm             Chen, Badrinarayanan, Lee, Rabinovich. ICML 2018, arXiv:1711.02257, eq. 1 and 2
    MGDA                 Sener, Koltun: Multi-Task Learning as Multi-Objective Optimization. NeurIPS 2018,
                         arXiv:1810.04650, eq. 3
    PELTR                Lin et al.: A Pareto-Efficient Algorithm for Multiple Objective Optimization in
                         E-Commerce Recommendation. RecSys 2019, doi:10.1145/3298689.3346998
    PCGrad               Yu et al.: Gradient Surgery for Multi-Task Learning. NeurIPS 2020, arXiv:2001.06782
    GradVac              Wang, Tsvetkov, Firat, Cao: Gradient Vaccine. ICLR 2021, arXiv:2010.05874
    CAGrad               Liu et al.: Conflict-Averse Gradient Descent. NeurIPS 2021, arXiv:2110.14048

The first four weigh losses: the weights hold for all parameters, and a step has one backward pass (GradNorm: 1 + T). The others
combine the tasks' gradients on the shared parameters alone; those of its own get their task's plain gradient.
Each combination is Σ_t w_t g_t with weights that follow from the inner products of the gradients, the Gram
matrix G = (g_i · g_j), so a method is a function from T × T numbers to T; a step has T backward passes and
holds T gradients. `shared` may also be a representation that all tasks read (the upper bound of MGDA, §3.3):
its combined gradient is then propagated once, and the T passes are those of the heads.

Deviations. Rows with a dagger solve their small problem exactly, where the papers iterate or approximate.
    GradNorm †   the gradient of L_grad on w is divided by the mean norm, so that `lr` means the same for
                 losses of any size; a weight is at least .01. W is `shared`.
    DWA          an epoch is `period` steps.
    MGDA †       the QP is solved as non-negative least squares, not by Frank-Wolfe.
    PELTR †      the bounds are substituted away, which makes it MGDA's problem; the paper solves without them
                 and projects, which is not the minimum where a bound is active. Heads keep their gradient.
    GradVac      one ρ_ij for all of `shared`, not one a layer.
    CAGrad †     the dual by SLSQP, with the gradients scaled to mean norm 1 in it.

Letters: T tasks (of a batch), P shared parameters.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy.optimize import minimize, nnls
from torch import Tensor, nn

from tiglon.errors import ConfigError, DataError, did_you_mean


class MultiTask(nn.Module, abc.ABC):
    """Makes one loss of several.   tasks: their names.

    weight: task → what it counted in the last step, 0 where it took no part.
    passes: backward passes through what is shared, of the last step.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        if not tasks or len(set(tasks)) != len(tasks):
            raise ConfigError(
                f"the tasks {', '.join(tasks) or '(none)'}", rule="One name a task, at least one"
            )
        self.tasks = tuple(tasks)
        self.weight = dict.fromkeys(self.tasks, 0.0)
        self.passes = 0

    def forward(
        self, losses: Mapping[str, Tensor], shared: Iterable[Tensor] = (), own: Iterable[Tensor] = ()
    ) -> Tensor:
        """A scalar whose `backward` gives every parameter what the method wants it to get.

        losses: task → its loss, whose mean is meant.   shared: parameters that all tasks read, or one
        representation.   own: the other parameters. Methods that weigh losses need neither, and GradNorm
        `shared` alone; of the others only what is in one of the two gets a gradient. Raises ConfigError for an unknown task, DataError for a loss that is not finite.
        """
        for name in losses:
            if name not in self.tasks:
                raise ConfigError(f"a loss of the task '{name}'", fix=did_you_mean(name, self.tasks))
        present = [t for t, name in enumerate(self.tasks) if name in losses and losses[name].numel()]
        if not present:
            raise DataError("a batch without a label of any task", rule="A step needs at least one loss")
        means = [losses[self.tasks[t]].float().mean() for t in present]
        self._require_finite("loss", torch.stack(means).detach(), present)
        with torch.autocast("cpu", enabled=False):
            trained = ([p for p in given if p.requires_grad] for given in (shared, own))
            total, weight = self.balance(means, present, *trained)
        self.weight = dict.fromkeys(self.tasks, 0.0)
        self.weight |= {self.tasks[t]: float(w) for t, w in zip(present, weight, strict=True)}
        return total

    @abc.abstractmethod
    def balance(
        self, means: list[Tensor], present: list[int], shared: list[Tensor], own: list[Tensor]
    ) -> tuple[Tensor, Sequence[float]]:
        """The scalar, and the weight of each task that is present (numbers into `tasks`).

        means: the loss of each. (A gradient of an entry of their stack would walk all tasks' graphs.)
        """

    def _require_finite(self, what: str, value_T: Tensor | np.ndarray, present: list[int]) -> None:
        bad = [self.tasks[t] for t, v in zip(present, value_T.tolist(), strict=True) if not math.isfinite(v)]
        if bad:
            raise DataError(
                f"a {what} that is not finite, of the task {', '.join(bad)}",
                rule="Every loss and gradient is finite; this step was not taken",
                fix="Look at the labels of the task and at what its head reads, or lower the learning rate",
            )


# -- losses, weighed ---------------------------------------------------------------------------------------


class Fixed(MultiTask):
    """Weights given once.   weights: task → w_t ≥ 0."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__(tuple(weights))
        for name, w in weights.items():
            if not 0 <= w < math.inf:
                raise ConfigError(f"a weight of {w} for the task '{name}'", rule="A weight is at least 0")
        self.given = list(weights.values())

    def balance(
        self, means: list[Tensor], present: list[int], shared: list[Tensor], own: list[Tensor]
    ) -> tuple[Tensor, Sequence[float]]:
        self.passes = 1
        weight = [self.given[t] for t in present]
        return torch.stack(means) @ torch.tensor(weight), weight


class Equal(Fixed):
    """The plain sum."""

    def __init__(self, tasks: Sequence[str]) -> None:
        if len(set(tasks)) != len(tasks):
            raise ConfigError(f"the tasks {', '.join(tasks)}", rule="One name a task, at least one")
        super().__init__(dict.fromkeys(tasks, 1.0))


class Uncertainty(MultiTask):
    """Σ_t e^{−s_t} L_t + s_t / 2, of a regression ½ e^{−s_t} L_t + s_t / 2, where s_t = log σ_t² is learned.

    s is a parameter: give it to the optimizer. regression: which of the tasks have a squared error.
    """

    def __init__(self, tasks: Sequence[str], regression: Sequence[str] = ()) -> None:
        super().__init__(tasks)
        for name in regression:
            if name not in self.tasks:
                raise ConfigError(f"the regression '{name}'", fix=did_you_mean(name, self.tasks))
        self.scale = [0.5 if name in regression else 1.0 for name in self.tasks]
        self.log_variance = nn.Parameter(torch.zeros(len(self.tasks)))  # s

    def balance(
        self, means: list[Tensor], present: list[int], shared: list[Tensor], own: list[Tensor]
    ) -> tuple[Tensor, Sequence[float]]:
        self.passes = 1
        s = self.log_variance[present]
        weight = torch.exp(-s) * s.new_tensor([self.scale[t] for t in present])
        return (weight * torch.stack(means) + s / 2).sum(), weight.tolist()


class DWA(MultiTask):
    """w = T softmax(λ / τ), λ_t = L_t of the last epoch / L_t of the one before; 1 in the first two epochs.

    period: steps of an epoch.   temperature: τ; the paper's is 2.
    """

    sums: Tensor
    counts: Tensor
    before: Tensor
    last: Tensor
    step: Tensor

    def __init__(self, tasks: Sequence[str], period: int, temperature: float = 2.0) -> None:
        super().__init__(tasks)
        if period < 1 or temperature <= 0:
            raise ConfigError(
                f"period={period}, temperature={temperature}", rule="An epoch has a step, and τ is above 0"
            )
        self.period, self.temperature = period, temperature
        for name in ("sums", "counts", "before", "last"):  # mean losses of two epochs; 0 where unknown
            self.register_buffer(name, torch.zeros(len(self.tasks), dtype=torch.float64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def balance(
        self, means: list[Tensor], present: list[int], shared: list[Tensor], own: list[Tensor]
    ) -> tuple[Tensor, Sequence[float]]:
        self.passes = 1
        if self.step and self.step % self.period == 0:
            seen = self.counts > 0
            self.before.copy_(torch.where(seen, self.last, self.before))
            self.last.copy_(torch.where(seen, self.sums / self.counts.clamp(min=1), self.last))
            self.sums.zero_()
            self.counts.zero_()
        self.step += 1
        self.sums[present] += torch.stack(means).detach().double()
        self.counts[present] += 1
        known = (self.before > 0) & (self.last > 0)
        ratio = torch.where(known, self.last / self.before.clamp(min=1e-300), 1.0)
        weight = len(self.tasks) * torch.softmax(ratio / self.temperature, dim=0)[present]
        return torch.stack(means) @ weight.float(), weight.tolist()


class GradNorm(MultiTask):
    """Weights under which tasks that learn at one speed have gradients of one size on `shared`.

    G_t = ‖∇ w_t L_t‖, r_t = (L_t / L_t(0)) / their mean, L_grad = Σ_t |G_t − Ḡ r_t^α| moves w alone, with the
    target held; then Σ w = T.   alpha: how strongly slow tasks are pulled (the paper: .12 … 1.5).
    lr: of w.   `shared` is the paper's W; the last shared layer is enough, and cheaper than all.
    """

    weights: Tensor
    first: Tensor

    def __init__(self, tasks: Sequence[str], alpha: float = 1.5, lr: float = 0.025) -> None:
        super().__init__(tasks)
        if lr <= 0 or alpha < 0:
            raise ConfigError(f"alpha={alpha}, lr={lr}", rule="alpha is at least 0, and lr above 0")
        self.alpha, self.lr = alpha, lr
        self.register_buffer("weights", torch.ones(len(self.tasks), dtype=torch.float64))
        self.register_buffer("first", torch.zeros(len(self.tasks), dtype=torch.float64))  # L(0); 0: not yet

    def balance(
        self, means: list[Tensor], present: list[int], shared: list[Tensor], own: list[Tensor]
    ) -> tuple[Tensor, Sequence[float]]:
        _require_shared(shared)
        self.passes = len(present) + 1
        norms = [_flat(torch.autograd.grad(one, shared, retain_graph=True, allow_unused=True), shared).norm()
                 for one in means]  # fmt: skip
        norm_T = torch.stack(norms).double()
        self._require_finite("gradient", norm_T, present)
        w = self.weights[present].clone()
        total = torch.stack(means) @ w.float()

        value = torch.stack(means).detach().double()
        self.first[present] = torch.where(self.first[present] > 0, self.first[present], value)
        ratio = value / self.first[present].clamp(min=1e-12)
        rate = ratio / ratio.mean().clamp(min=1e-12)
        mean = (w * norm_T).mean()
        if mean > 0:
            slope = torch.sign(w * norm_T - mean * rate**self.alpha) * norm_T / mean
            self.weights[present] = (w - self.lr * slope).clamp(min=0.01)
            self.weights *= len(self.tasks) / self.weights.sum()
        return total, w.tolist()


# -- gradients, combined -----------------------------------------------------------------------------------


class SharedGradients(MultiTask):
    """Each task's gradient g_t on `shared`, combined; `own` gets the sum of the plain gradients."""

    def balance(
        self, means: list[Tensor], present: list[int], shared: list[Tensor], own: list[Tensor]
    ) -> tuple[Tensor, Sequence[float]]:
        _require_shared(shared)
        everything, n = [*shared, *own], len(shared)
        rows, rest = [], torch.zeros(())
        for i, one in enumerate(means):
            keep = i + 1 < len(means)
            found = torch.autograd.grad(one, everything, retain_graph=keep, allow_unused=True)
            rows.append(_flat(found[:n], shared))
            rest = rest + _flat(found[n:], own)
        self.passes = len(present)
        gradient_TP = torch.stack(rows)
        gram = _gram(gradient_TP)
        self._require_finite("gradient", np.diag(gram), present)
        weight = self.combine(gram, present)
        combined = torch.as_tensor(weight, dtype=gradient_TP.dtype) @ gradient_TP
        gradients = [*_shaped(combined, shared), *_shaped(rest, own)]
        return _Given.apply(torch.stack(means).detach().sum(), gradients, *everything), list(weight)

    @abc.abstractmethod
    def combine(self, gram: np.ndarray, present: list[int]) -> np.ndarray:
        """(T,) weights of the gradients with these inner products (T, T), float64."""


class MGDA(SharedGradients):
    """The shortest vector of the gradients' convex hull: along it no task's loss grows, and where it is 0
    no direction helps all tasks."""

    def combine(self, gram: np.ndarray, present: list[int]) -> np.ndarray:
        return min_norm(gram)


class PELTR(SharedGradients):
    """MGDA with w_t ≥ c_t.   bounds: task → c_t ≥ 0, of sum at most 1."""

    def __init__(self, bounds: Mapping[str, float]) -> None:
        super().__init__(tuple(bounds))
        if min(bounds.values()) < 0 or sum(bounds.values()) > 1:
            raise ConfigError(
                f"the bounds {', '.join(f'{n}={c:g}' for n, c in bounds.items())}",
                rule="Bounds are at least 0, and their sum is at most 1",
            )
        self.bounds = np.array(list(bounds.values()))

    def combine(self, gram: np.ndarray, present: list[int]) -> np.ndarray:
        """w = c + (1 − Σc) v, so that v is the shortest convex combination of (1 − Σc) g_t + Σ c_s g_s."""
        c = self.bounds[present]
        move = (1 - c.sum()) * np.eye(len(c)) + c
        return c + (1 - c.sum()) * min_norm(move @ gram @ move.T)


class PCGrad(SharedGradients):
    """Of each gradient, what points against another task's is taken away; then the sum.

    The others come in random order (torch's generator), each as it was before.
    """

    def combine(self, gram: np.ndarray, present: list[int]) -> np.ndarray:
        part = np.eye(len(gram))  # row i: g_i' as a combination of the gradients
        for i, j in _pairs(len(gram)):
            product = part[i] @ gram[:, j]
            if product < 0:
                part[i, j] -= product / gram[j, j]
        return part.sum(axis=0)


class GradVac(SharedGradients):
    """Like PCGrad, but cosines are lifted to what they usually are: to ρ_ij, a moving average.

    beta: share of the newest cosine in ρ; the paper's is .01. ρ begins at 0; with beta 0 this is PCGrad.
    """

    cosine: Tensor

    def __init__(self, tasks: Sequence[str], beta: float = 0.01) -> None:
        super().__init__(tasks)
        if not 0 <= beta <= 1:
            raise ConfigError(f"beta={beta}", rule="beta is a share, 0 … 1")
        self.beta = beta
        self.register_buffer("cosine", torch.zeros(len(self.tasks), len(self.tasks), dtype=torch.float64))

    def combine(self, gram: np.ndarray, present: list[int]) -> np.ndarray:
        part = np.eye(len(gram))
        target = self.cosine.numpy()
        for i, j in _pairs(len(gram)):
            length = math.sqrt(max(part[i] @ gram @ part[i], 0.0) * gram[j, j])
            if length == 0:
                continue
            usual = target[present[i], present[j]]
            cosine = float(np.clip(part[i] @ gram[:, j] / length, -1, 1))
            if cosine < usual:
                lift = usual * math.sqrt(1 - cosine**2) - cosine * math.sqrt(1 - usual**2)
                part[i, j] += length / gram[j, j] * lift / math.sqrt(1 - usual**2)
            target[present[i], present[j]] += self.beta * (cosine - usual)
        return part.sum(axis=0)


class CAGrad(SharedGradients):
    """The direction d that serves the worst task best, max min_t g_t · d, with ‖d − g₀‖ ≤ c ‖g₀‖, where g₀ is
    the mean gradient.   c: 0 gives the mean; below 1 it ends where the mean loss does. The paper's is .4."""

    def __init__(self, tasks: Sequence[str], c: float = 0.4) -> None:
        super().__init__(tasks)
        if not 0 <= c < 1:
            raise ConfigError(f"c={c}", rule="0 ≤ c < 1: from 1 on it need not end anywhere")
        self.c = c

    def combine(self, gram: np.ndarray, present: list[int]) -> np.ndarray:
        """d = g₀ + √φ g_w / ‖g_w‖, w = argmin g_w · g₀ + √φ ‖g_w‖ on the simplex, √φ = c ‖g₀‖."""
        T = len(gram)
        mean = np.full(T, 1 / T)
        size = np.trace(gram) / T
        if T == 1 or self.c == 0 or size == 0:
            return mean
        gram = gram / size
        radius = self.c * math.sqrt(max(mean @ gram @ mean, 0.0))

        def dual(w: np.ndarray) -> tuple[float, np.ndarray]:
            towards = gram @ w
            length = math.sqrt(max(w @ towards, 0.0) + 1e-16)
            return mean @ towards + radius * length, gram @ mean + radius * towards / length

        w = minimize(
            dual,
            mean,
            jac=True,
            method="SLSQP",
            bounds=[(0, 1)] * T,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
            options={"ftol": 1e-12, "maxiter": 200},
        ).x
        length = math.sqrt(max(w @ gram @ w, 0.0))
        return mean + (radius / length * w if length > 1e-8 else 0.0)


def min_norm(gram: np.ndarray) -> np.ndarray:
    """(T,) w ≥ 0, Σw = 1, of the least ‖Σ_t w_t g_t‖, from the inner products (T, T).

    min over x ≥ 0 of ‖Σ x_t g_t‖² + (Σ x − 1)², a non-negative least squares: with x = a w its minimum over a
    is m / (1 + m), m = ‖Σ w_t g_t‖², which grows with m.
    """
    T = len(gram)
    size = np.trace(gram) / T
    if size == 0:
        return np.full(T, 1 / T)
    values, vectors = np.linalg.eigh(gram / size)
    root = np.sqrt(values.clip(min=0))[:, None] * vectors.T
    x, _ = nnls(np.vstack([root, np.ones(T)]), np.append(np.zeros(T), 1.0))
    return x / x.sum()


# -- by name ---------------------------------------------------------------------------------------------------

# tasks, steps of an epoch → method, with its paper's settings; rankers learn for an epoch or three, in which DWA would
# hardly begin: for it an eighth of one counts as an epoch
MakeMethod: TypeAlias = Callable[[Sequence[str], int], MultiTask]

METHODS: dict[str, MakeMethod] = {
    "equal": lambda tasks, _: Equal(tasks),
    "uncertainty": lambda tasks, _: Uncertainty(tasks),
    "dwa": lambda tasks, steps: DWA(tasks, max(steps // 8, 1)),
    "gradnorm": lambda tasks, _: GradNorm(tasks),
    "mgda": lambda tasks, _: MGDA(tasks),
    "pe_ltr": lambda tasks, _: PELTR(dict.fromkeys(tasks, 0.3 / len(tasks))),
    "pcgrad": lambda tasks, _: PCGrad(tasks),
    "gradvac": lambda tasks, _: GradVac(tasks),
    "cagrad": lambda tasks, _: CAGrad(tasks),
}


# -- with the training loop ----------------------------------------------------------------------------------


class Balanced(nn.Module):
    """A network with its method, as `train` takes them: `train(Balanced(network, method), …, Balanced.loss, …)`.

    network: has `losses(batch)` → {task: losses} and `shared_and_own()` → two lists of parameters.
    """

    def __init__(self, network: Any, method: MultiTask) -> None:
        super().__init__()
        self.network, self.method = network, method

    def loss(self, batch: Any) -> Tensor:
        """(n,) equal values for the n losses of a batch, for the loop takes their mean."""
        losses = self.network.losses(batch)
        shared, own = self.network.shared_and_own()
        return self.method(losses, shared, own).expand(sum(loss.numel() for loss in losses.values()))


# -- inside ------------------------------------------------------------------------------------------------


class _Given(torch.autograd.Function):
    """A value whose gradients are given."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        return None, None, *(gradient * outputs[0] for gradient in ctx.gradients)


def _flat(gradients: Sequence[Tensor | None], of: Sequence[Tensor]) -> Tensor:
    """(P,) end to end; 0 for what a task does not read."""
    parts = [
        torch.zeros(p.numel(), dtype=p.dtype) if g is None else g.flatten()
        for g, p in zip(gradients, of, strict=True)
    ]
    return torch.cat(parts) if parts else torch.zeros(0)


def _shaped(flat: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([p.numel() for p in of]) if of else []
    return [part.view_as(p) for part, p in zip(parts, of, strict=True)]


def _gram(gradient_TP: Tensor) -> np.ndarray:
    """(T, T) inner products, float64."""
    chunks = (chunk.double() for chunk in gradient_TP.split(1 << 20, dim=1))
    return sum(((chunk @ chunk.T).numpy() for chunk in chunks), np.zeros((len(gradient_TP),) * 2))


def _pairs(T: int) -> Iterable[tuple[int, int]]:
    """Every i with every other j, the j in random order."""
    for i in range(T):
        for j in torch.randperm(T).tolist():
            if j != i:
                yield i, j


def _require_shared(shared: Sequence[Tensor]) -> None:
    if not shared:
        raise ConfigError(
            "no shared parameters",
            rule="This method compares the tasks' gradients on what they share",
            fix="Pass shared=, the parameters that all tasks read",
        )
