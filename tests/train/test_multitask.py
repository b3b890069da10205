"""Each method by its closed form, where each ends on a front that is known, and what must never happen."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from tiglon.errors import ConfigError, DataError
from tiglon.train.loop import TrainConfig, train
from tiglon.train.multitask import (
    DWA,
    METHODS,
    MGDA,
    PELTR,
    Balanced,
    CAGrad,
    Equal,
    Fixed,
    GradNorm,
    GradVac,
    PCGrad,
    Uncertainty,
    min_norm,
)

torch.set_num_threads(1)

AB, ABC = ("a", "b"), ("a", "b", "c")


def every_method(tasks=AB):
    return [
        Equal(tasks),
        Fixed({name: 1.0 + i for i, name in enumerate(tasks)}),
        Uncertainty(tasks),
        DWA(tasks, period=3),
        GradNorm(tasks),
        MGDA(tasks),
        PELTR(dict.fromkeys(tasks, 0.1)),
        PCGrad(tasks),
        GradVac(tasks),
        CAGrad(tasks),
    ]


def title(method):
    return type(method).__name__


methods = pytest.mark.parametrize("method", every_method(), ids=title)
COMBINING = [MGDA, PCGrad, GradVac, CAGrad]


def apply(method, gradients):
    """What a shared parameter gets, of losses whose gradients on it are these."""
    x = nn.Parameter(torch.zeros(len(gradients[0]), dtype=torch.float64))
    losses = {
        name: x @ torch.tensor(g, dtype=torch.float64)
        for name, g in zip(method.tasks, gradients, strict=True)
    }
    losses = {name: loss + 1.0 for name, loss in losses.items()}
    method(losses, [x]).backward()
    return x.grad.numpy()


def worlds(T, n=30, P=5):
    """Gradients that conflict, of very different sizes."""
    rng = np.random.default_rng(T)
    for _ in range(n):
        yield rng.normal(size=(T, P)) * 10 ** rng.uniform(-2, 2, size=(T, 1)) + rng.normal(size=P) * 0.3


def simplex(T, steps):
    for cut in itertools.product(range(steps + 1), repeat=T - 1):
        if sum(cut) <= steps:
            yield np.array([*cut, steps - sum(cut)]) / steps


# -- losses, weighed ---------------------------------------------------------------------------------------


def test_uncertainty_ends_where_the_closed_form_says():
    """s* = log L for a regression, log 2L for a classification; then every weighted loss is a half."""
    method = Uncertainty(AB, regression=["a"])
    optimizer = torch.optim.Adam(method.parameters(), 0.1)
    fixed = {"a": torch.tensor(3.0), "b": torch.tensor(0.2)}
    for _ in range(300):
        optimizer.zero_grad()
        method(fixed).backward()
        optimizer.step()
    expected = [math.log(3.0), math.log(0.4)]
    np.testing.assert_allclose(method.log_variance.detach(), expected, atol=1e-3)
    assert method.weight["a"] * 3.0 == pytest.approx(0.5, abs=1e-3)
    assert method.weight["b"] * 0.2 == pytest.approx(0.5, abs=1e-3)


def test_gradnorm_makes_norms_equal():
    """L_b = c L_a and α = 0: w_a = c w_b, and Σw = 2 at every step."""
    c = 4.0
    method = GradNorm(AB, alpha=0, lr=5e-3)
    x = nn.Parameter(torch.tensor([1.0, 2.0]))
    for _ in range(300):
        method({"a": (x**2).sum(), "b": c * (x**2).sum()}, [x])
        assert float(method.weights.sum()) == pytest.approx(2, abs=1e-9)
    assert method.weight["a"] == pytest.approx(2 * c / (1 + c), abs=0.02)
    assert method.weight["b"] == pytest.approx(2 / (1 + c), abs=0.02)


def test_gradnorm_pulls_the_slow_task():
    method = GradNorm(AB, alpha=1.5, lr=1e-3)
    x, falling = nn.Parameter(torch.ones(3)), 1.0
    for _ in range(200):
        falling *= 0.99
        slow = x.sum()  # always 3, gradient of length √3
        fast = slow * 1.0 + 3.0 * (falling - 1.0)  # the same gradient, while its loss falls
        method({"a": fast, "b": slow}, [x])
    assert method.weight["b"] > 1.1 > 0.9 > method.weight["a"]


def test_gradnorm_moves_weights_and_no_network():
    """The network's gradient is that of Σ w L; L_grad adds nothing. L(0) is kept once."""
    method = GradNorm(AB)
    x = nn.Parameter(torch.tensor([1.0, 2.0]))
    for step in range(3):
        x.grad = None
        w = method.weights.tolist()
        (loss := method({"a": (x**2).sum(), "b": x.sum() + 1}, [x])).backward()
        np.testing.assert_allclose(x.grad, w[0] * 2 * x.detach() + w[1], rtol=1e-5)
        assert loss.item() == pytest.approx(
            w[0] * (x**2).sum().item() + w[1] * (x.sum().item() + 1), rel=1e-5
        )
        x.data *= 0.9
        assert method.first.tolist() == [5.0, 4.0], step
    assert not method.weights.requires_grad


def epochs(method, series):
    """Weights of each epoch of two steps, by the losses of the tasks in it."""
    found = []
    for losses in series:
        for step in range(2):
            around = 1 + (0.1 if step else -0.1)
            method({name: torch.tensor(value * around) for name, value in zip(AB, losses, strict=True)})
            found.append([method.weight[name] for name in AB])
    return np.array(found)


def test_dwa_weighs_by_how_losses_fell():
    found = epochs(DWA(AB, period=2, temperature=2.0), [(4.0, 1.0), (2.0, 0.9), (1.0, 0.9), (1.0, 0.9)])
    np.testing.assert_allclose(found[:4], 1.0)
    for epoch, ratio in ((2, (2 / 4, 0.9 / 1)), (3, (1 / 2, 0.9 / 0.9))):
        powers = np.exp(np.array(ratio) / 2)
        expected = 2 * powers / powers.sum()
        np.testing.assert_allclose(found[2 * epoch : 2 * epoch + 2], [expected] * 2, rtol=1e-6)


def test_dwa_knows_no_scale_and_a_hot_one_no_difference():
    series = [(4.0, 1.0), (2.0, 0.9), (1.0, 0.7)]
    scaled = [(1_000 * a, b) for a, b in series]
    np.testing.assert_allclose(epochs(DWA(AB, 2), series), epochs(DWA(AB, 2), scaled), rtol=1e-6)
    np.testing.assert_allclose(epochs(DWA(AB, 2, temperature=1e9), series), 1.0, rtol=1e-6)
    even = [(4.0, 1.0), (2.0, 0.5), (1.0, 0.25)]
    np.testing.assert_allclose(epochs(DWA(AB, 2), even), 1.0, rtol=1e-6)


def test_fixed_weights_and_the_plain_sum():
    gradients = [[1.0, 2.0], [-3.0, 0.5]]
    np.testing.assert_allclose(apply(Fixed({"a": 2, "b": 0.5}), gradients), [0.5, 4.25])
    np.testing.assert_allclose(apply(Equal(AB), gradients), [-2, 2.5])


# -- gradients, combined -----------------------------------------------------------------------------------


def test_pcgrad_without_a_conflict_is_the_sum():
    gradients = [[1.0, 0.0], [1.0, 1.0], [0.5, 2.0]]
    np.testing.assert_allclose(apply(PCGrad(ABC), gradients), [2.5, 3.0])


def test_pcgrad_by_its_definition():
    """Vectors rather than inner products; the order drawn from the same generator."""
    for gradients in worlds(3):
        torch.manual_seed(1)
        found = apply(PCGrad(ABC), gradients)
        torch.manual_seed(1)
        total = np.zeros(5)
        for i in range(3):
            g = gradients[i].copy()
            for j in torch.randperm(3).tolist():
                if j != i and g @ gradients[j] < 0:
                    g -= (g @ gradients[j]) / (gradients[j] @ gradients[j]) * gradients[j]
            total += g
        np.testing.assert_allclose(found, total, rtol=1e-8, atol=1e-8 * np.abs(gradients).max())


def test_pcgrad_of_two_conflicts_with_neither():
    for gradients in worlds(2):
        found = apply(PCGrad(AB), gradients)
        assert (gradients @ found >= -1e-9 * np.abs(gradients).max() ** 2).all()


def test_pcgrad_of_opposite_gradients_stands_still():
    np.testing.assert_allclose(apply(PCGrad(AB), [[1.0, -2.0], [-3.0, 6.0]]), 0, atol=1e-12)


@pytest.mark.parametrize("kind", [PCGrad, GradVac], ids=lambda kind: kind.__name__)
def test_the_order_follows_the_seed(kind):
    gradients = [[1.0, 0.0], [-0.5, 0.8], [-0.6, -0.9]]  # each against both others
    found = []
    for seed in (0, 0, 1, 2, 3, 4):
        torch.manual_seed(seed)
        found.append(apply(kind(ABC), gradients))
    np.testing.assert_array_equal(found[0], found[1])
    assert any(not np.array_equal(found[0], other) for other in found[2:])


def test_gradvac_at_zero_is_pcgrad():
    for gradients in worlds(3):
        found = []
        for method in (GradVac(ABC, beta=0.0), PCGrad(ABC)):
            torch.manual_seed(7)
            found.append(apply(method, gradients))
        np.testing.assert_allclose(*found, rtol=1e-8, atol=1e-8 * np.abs(gradients).max())


def test_gradvac_lifts_a_cosine_to_its_target():
    """Of two tasks, cos(g_i', g_j) = ρ afterwards, exactly; what lies above stays."""
    for gradients in worlds(2):
        method = GradVac(AB, beta=0.0)
        method.cosine.fill_(0.6)
        a, b = gradients
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        found = apply(method, gradients)
        if cosine >= 0.6:
            np.testing.assert_allclose(found, a + b)
            continue
        weight = method.weight  # found = (a + x b) + (b + y a)
        ours = [a + (weight["b"] - 1) * b, b + (weight["a"] - 1) * a]
        for one, other in zip(ours, (b, a), strict=True):
            assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) == pytest.approx(0.6, abs=1e-6)


def test_gradvac_remembers_what_cosines_usually_are():
    method = GradVac(AB, beta=0.25)
    for _ in range(40):
        apply(method, [[1.0, 0.0], [1.0, 1.0]])
    np.testing.assert_allclose(method.cosine, [[0, math.sqrt(0.5)], [math.sqrt(0.5), 0]], atol=1e-4)


def test_mgda_of_two_is_the_closed_form():
    for a, b in worlds(2):
        w = np.clip((b - a) @ b / ((a - b) @ (a - b)), 0, 1)
        found = apply(MGDA(AB), [a, b])
        np.testing.assert_allclose(found, w * a + (1 - w) * b, rtol=1e-6, atol=1e-9 * max(abs(a).max(), 1))


@pytest.mark.parametrize("T", [2, 3, 5])
def test_mgda_harms_no_task(T):
    """d · g_t ≥ ‖d‖² for every task: the mark of the shortest vector of a convex hull."""
    for gradients in worlds(T):
        d = apply(MGDA("abcde"[:T]), gradients)
        assert (gradients @ d >= d @ d - 1e-7 * np.abs(gradients).max() ** 2).all()


def test_mgda_stands_still_where_no_direction_helps_all():
    angles = 2 * np.pi * np.arange(3) / 3
    hull = np.stack([np.cos(angles), np.sin(angles)], axis=1) * [[1.0], [5.0], [0.2]]
    np.testing.assert_allclose(apply(MGDA(ABC), hull), 0, atol=1e-6)
    assert np.linalg.norm(apply(MGDA(ABC), hull + np.array([3.0, 0.0]))) > 0.1


def test_peltr_keeps_its_bounds_and_is_the_minimum_within_them():
    bounds = {"a": 0.2, "b": 0.1, "c": 0.05}
    c = np.array(list(bounds.values()))
    for gradients in worlds(3, n=8):
        method = PELTR(bounds)
        d = apply(method, gradients)
        w = np.array([method.weight[name] for name in ABC])
        assert w.sum() == pytest.approx(1)
        assert (w >= c - 1e-9).all()
        best = min(np.linalg.norm((c + (1 - c.sum()) * v) @ gradients) for v in simplex(3, 100))
        assert np.linalg.norm(d) <= best + 1e-9
        assert np.linalg.norm(d) == pytest.approx(best, rel=0.05)


def test_peltr_without_bounds_is_mgda():
    for gradients in worlds(3):
        np.testing.assert_allclose(
            apply(PELTR(dict.fromkeys(ABC, 0.0)), gradients), apply(MGDA(ABC), gradients), atol=1e-9
        )


def test_peltr_equals_a_fine_grid():
    for gradients in worlds(2):
        method = PELTR({"a": 0.3, "b": 0.1})
        apply(method, gradients)
        first = np.linspace(0.3, 0.9, 6_001)
        lengths = np.linalg.norm(first[:, None] * gradients[0] + (1 - first[:, None]) * gradients[1], axis=1)
        assert method.weight["a"] == pytest.approx(first[lengths.argmin()], abs=1e-3)


def test_cagrad_at_zero_is_the_mean():
    for gradients in worlds(3):
        np.testing.assert_allclose(apply(CAGrad(ABC, c=0), gradients), gradients.mean(axis=0), atol=1e-9)


def test_cagrad_serves_the_worst_task_best():
    """‖d − g₀‖ ≤ c ‖g₀‖, and no other direction in the ball gives the worst task more."""
    rng = np.random.default_rng(0)
    for gradients in worlds(3):
        d, mean = apply(CAGrad(ABC, c=0.4), gradients), gradients.mean(axis=0)
        radius = 0.4 * np.linalg.norm(mean)
        assert np.linalg.norm(d - mean) <= radius * (1 + 1e-6)
        others = rng.normal(size=(2_000, 5))
        others *= radius / np.linalg.norm(others, axis=1, keepdims=True)
        near = d - mean + others * rng.uniform(0, 0.1, size=(2_000, 1))
        near *= np.minimum(1, radius / np.linalg.norm(near, axis=1, keepdims=True))
        worst = (gradients @ (mean + np.concatenate([others, near])).T).min(axis=0).max()
        assert (gradients @ d).min() >= worst - 1e-4 * np.abs(gradients).max() ** 2


def test_min_norm_equals_a_grid():
    for gradients in worlds(3, n=8):
        w = min_norm(gradients @ gradients.T)
        best = min(np.linalg.norm(v @ gradients) for v in simplex(3, 100))
        assert np.linalg.norm(w @ gradients) <= best + 1e-9


# -- where each ends ----------------------------------------------------------------------------------------
# L_a = ‖x − (1, 0)‖², L_b = 4 ‖x + (1, 0)‖²: the Pareto front is the segment between the two minima, on which
# w_a L_a + w_b L_b ends at x = (w_a − 4 w_b) / (w_a + 4 w_b). The mean ends at −.6.

START = (0.4, 1.5)


def convex(x):
    away = torch.tensor([1.0, 0.0])
    return {"a": ((x - away) ** 2).sum(), "b": 4 * ((x + away) ** 2).sum()}


def descend(method, losses=convex, start=START, steps=120, lr=0.08):
    torch.manual_seed(0)
    x = nn.Parameter(torch.tensor(start))
    parameters = [{"params": [x]}, {"params": list(method.parameters()), "lr": 0.03}]
    optimizer = torch.optim.SGD(parameters if len(list(method.parameters())) else [x], lr)
    for _ in range(steps):
        optimizer.zero_grad()
        method(losses(x), [x]).backward()
        optimizer.step()
    return x.detach().numpy()


@methods
def test_every_method_ends_on_the_front(method):
    first, second = descend(method)
    assert abs(second) < 0.02, title(method)
    assert -1 <= first <= 1


def test_where_methods_end():
    assert descend(Equal(AB))[0] == pytest.approx(-0.6, abs=1e-3)
    assert descend(Fixed({"a": 8, "b": 0.5}))[0] == pytest.approx(0.6, abs=1e-3)
    assert descend(CAGrad(AB, c=0.5))[0] == pytest.approx(-0.6, abs=0.01)
    assert descend(PCGrad(AB))[0] > -0.6 + 0.05  # it stops where gradients are opposite


def test_mgda_stops_at_the_first_point_of_the_front_it_meets():
    """On the front already, it stays; the sum goes on to its own minimum."""
    np.testing.assert_allclose(descend(MGDA(AB), start=(0.5, 0.0)), [0.5, 0.0], atol=1e-4)
    assert descend(Equal(AB), start=(0.5, 0.0))[0] == pytest.approx(-0.6, abs=1e-3)


def test_peltr_ends_within_its_bounds():
    """w_a, w_b ≥ .45 keeps the end near the sum's, whatever the start; MGDA ends near its start."""
    ends = [descend(PELTR({"a": 0.45, "b": 0.45}), start=(side, 1.0))[0] for side in (-0.9, 0.9)]
    allowed = [(w - 4 * (1 - w)) / (w + 4 * (1 - w)) for w in (0.45, 0.55)]
    assert all(allowed[0] - 0.01 <= end <= allowed[1] + 0.01 for end in ends)
    assert descend(MGDA(AB), start=(0.9, 1.0))[0] > allowed[1] + 0.3


def valley(x):
    """Two steep walls, one a task, and between them a floor, not convex, that falls to (2, 2) for both."""
    along, across = x[0] + x[1], x[0] - x[1]
    floor = torch.log1p((along - 4) ** 2) / 2
    wall = nn.functional.softplus
    return {"a": floor + wall(20 * across), "b": floor + wall(-15 * across)}


@pytest.mark.parametrize("lr, steps", [(0.02, 250), (0.05, 100)])
def test_pcgrad_beats_the_sum_in_a_narrow_valley(lr, steps):
    """The sum is thrown from wall to wall; without what conflicts, a step goes along the floor."""
    found = {}
    for kind in (Equal, PCGrad):
        end = descend(kind(AB), valley, (-1.0, -1.2), steps=steps, lr=lr)
        found[kind] = sum(loss.item() for loss in valley(torch.tensor(end)).values())
    assert found[PCGrad] < 1.4 < 3.5 < found[Equal]


# -- what is shared, and what is not ------------------------------------------------------------------------


class Two(nn.Module):
    """A trunk that both tasks read, and a head each."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.trunk = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})

    def losses(self, x):
        hidden = self.trunk(x)
        return {
            "a": (self.heads["a"](hidden)[:, 0] - x.sum(1)) ** 2,
            "b": (self.heads["b"](hidden)[:, 0] + 3 * x[:, 0]) ** 2,
        }

    def shared_and_own(self):
        return list(self.trunk.parameters()), list(self.heads.parameters())


X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", COMBINING, ids=lambda kind: kind.__name__)
def test_heads_get_their_tasks_plain_gradient(kind):
    model, plain = Two(), Two()
    method = kind(AB)
    method(model.losses(X), *model.shared_and_own()).backward()
    sum(loss.mean() for loss in plain.losses(X).values()).backward()
    for ours, theirs in zip(model.heads.parameters(), plain.heads.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert method.passes == 2


@pytest.mark.parametrize("kind", COMBINING, ids=lambda kind: kind.__name__)
def test_what_is_shared_gets_the_weighted_gradients(kind):
    model, plain = Two(), Two()
    method = kind(AB)
    method(model.losses(X), *model.shared_and_own()).backward()
    sum(method.weight[name] * loss.mean() for name, loss in plain.losses(X).items()).backward()
    for ours, theirs in zip(model.trunk.parameters(), plain.trunk.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_a_representation_may_be_what_is_shared():
    """The trunk gets the gradient of Σ w_t L_t with weights that the representation's gradients decide."""
    model, plain, method = Two(), Two(), MGDA(AB)
    hidden = model.trunk(X)
    heads = model.heads
    losses = {
        "a": (heads["a"](hidden)[:, 0] - X.sum(1)) ** 2,
        "b": (heads["b"](hidden)[:, 0] + 3 * X[:, 0]) ** 2,
    }
    rows = [
        torch.autograd.grad(loss.mean(), hidden, retain_graph=True)[0].flatten() for loss in losses.values()
    ]
    expected = min_norm((torch.stack(rows) @ torch.stack(rows).T).double().numpy())
    method(losses, [hidden], heads.parameters()).backward()
    np.testing.assert_allclose([method.weight[name] for name in AB], expected, atol=1e-5)
    sum(w * loss.mean() for w, loss in zip(expected, plain.losses(X).values(), strict=True)).backward()
    for ours, theirs in zip(model.trunk.parameters(), plain.trunk.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@methods
def test_a_task_without_an_example_takes_no_part(method):
    """Left out or empty, the step is that of the other alone."""
    results = []
    for leave in (lambda losses: {"a": losses["a"]}, lambda losses: losses | {"b": losses["b"][:0]}):
        model = Two()
        for each in every_method():
            if title(each) == title(method):
                fresh = each
        fresh(leave(model.losses(X)), *model.shared_and_own()).backward()
        assert fresh.weight["b"] == 0
        assert fresh.weight["a"] > 0
        results.append(torch.cat([p.grad.flatten() for p in model.trunk.parameters()]))
        assert results[-1].isfinite().all()
        assert results[-1].abs().sum() > 0
    torch.testing.assert_close(*results)


@methods
def test_labels_of_one_class_are_finite(method):
    """One task without positives: its loss falls towards 0, and the other goes on."""
    torch.manual_seed(0)
    model = Two()
    optimizer = torch.optim.Adam([*model.parameters(), *method.parameters()], 0.02)
    for _ in range(60):
        hidden = model.trunk(X)
        score = {name: head(hidden)[:, 0] for name, head in model.heads.items()}
        entropy = nn.functional.binary_cross_entropy_with_logits
        losses = {
            "a": entropy(score["a"], (X[:, 0] > 0).float(), reduction="none"),
            "b": entropy(score["b"], torch.zeros(len(X)), reduction="none"),
        }
        optimizer.zero_grad()
        method(losses, *model.shared_and_own()).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert losses["b"].mean() < 0.4


@methods
def test_a_nan_is_named_and_the_step_not_taken(method):
    model = Two()
    losses = model.losses(X)
    with pytest.raises(DataError) as error:
        method({"a": losses["a"], "b": losses["b"] * float("nan")}, *model.shared_and_own())
    assert str(error.value) == (
        "a loss that is not finite, of the task b. Every loss and gradient is finite; this step was not taken. "
        "Look at the labels of the task and at what its head reads, or lower the learning rate."
    )
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", [GradNorm, *COMBINING], ids=lambda kind: kind.__name__)
def test_a_nan_in_a_gradient_is_named_too(kind):
    x = nn.Parameter(torch.zeros(2))
    with pytest.raises(DataError, match="a gradient that is not finite, of the task b"):
        kind(AB)({"a": x.sum(), "b": x.abs().sqrt().sum()}, [x])
    assert x.grad is None


def test_methods_have_names():
    """All but fixed weights, which have no default."""
    made = [make(ABC, 7) for make in METHODS.values()]
    assert {*map(type, made)} == {type(method) for method in every_method()} - {Fixed}
    assert all(method.tasks == ABC for method in made)
    weighted = METHODS["dwa"](ABC, 80)
    assert isinstance(weighted, DWA)
    assert weighted.period == 10  # an epoch is enough for it to differ from equal
    METHODS["pe_ltr"](
        [f"task {n}" for n in range(20)], 7
    )  # bounds whose sum is below 1 for any number of tasks


def test_bad_options_are_refused():
    x = nn.Parameter(torch.ones(1))
    with pytest.raises(ConfigError, match=r"a loss of the task 'clik'\. Did you mean 'click'\?"):
        Equal(("click", "buy"))({"clik": x})
    with pytest.raises(DataError, match="a batch without a label of any task"):
        Equal(AB)({"a": x[:0]})
    with pytest.raises(ConfigError, match=r"no shared parameters\. .* Pass shared="):
        MGDA(AB)({"a": x, "b": x})
    with pytest.raises(ConfigError, match=r"bounds a=0\.6, b=0\.6\. .* at most 1"):
        PELTR({"a": 0.6, "b": 0.6})
    with pytest.raises(ConfigError, match="c=1"):
        CAGrad(AB, c=1)
    with pytest.raises(ConfigError, match=r"a weight of -1"):
        Fixed({"a": -1})
    with pytest.raises(ConfigError, match="period=0"):
        DWA(AB, 0)
    with pytest.raises(ConfigError, match="the tasks a, a"):
        Equal(("a", "a"))
    with pytest.raises(ConfigError, match=r"regression 'c'"):
        Uncertainty(AB, regression=["c"])
    with pytest.raises(ConfigError, match="lr=0"):
        GradNorm(AB, lr=0)
    with pytest.raises(ConfigError, match="beta=2"):
        GradVac(AB, beta=2)


# -- in the loop --------------------------------------------------------------------------------------------


@methods
def test_it_trains_in_the_loop_and_goes_on_where_it_stopped(method, tmp_path):
    """Killed and resumed, the run ends with the same weights, the method's own memory among them."""
    config = TrainConfig(
        epochs=4, lr=0.02, evaluations=1, checkpoint_minutes=0, average=0, bfloat16=False, weight_decay=0
    )
    ends = []
    for stop in (None, 9):
        model = Two()
        fresh = next(each for each in every_method() if title(each) == title(method))
        folder, steps = tmp_path / str(stop), itertools.count()

        def loss(both, batch, stop=stop, steps=steps):
            if next(steps) == stop:
                raise KeyboardInterrupt
            return both.loss(batch)

        for _ in range(1 if stop is None else 2):
            try:
                train(Balanced(model, fresh), lambda epoch: X.split(4), loss, None, config, folder)
            except KeyboardInterrupt:
                model = Two()
                fresh = next(each for each in every_method() if title(each) == title(method))
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=0, atol=0)
    start = torch.cat([p.detach().flatten() for p in Two().parameters()])
    assert not torch.equal(ends[0], start)
