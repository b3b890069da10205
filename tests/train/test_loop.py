"""The training loop: its schedule, what it keeps, and runs that are killed at any point.

Run as a script it is the process that gets killed: `test_loop.py FOLDER`.
"""

import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tiglon.errors import BundleDamagedError, ConfigError, DataError, StorageError
from tiglon.nn.transformer import Dropout
from tiglon.train import checkpoint, loop
from tiglon.train.loop import TrainConfig, train

torch.set_num_threads(1)

CONFIG = TrainConfig(
    epochs=3, lr=0.02, evaluations=4, checkpoint_minutes=0.0, average=0.9, bfloat16=True, seed=5
)


def network(width=8):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), Dropout(0.3), nn.Linear(width, 1))


def epoch_batches(epoch):
    """Seven batches of five examples, others in each epoch."""
    random = torch.Generator().manual_seed(100 + epoch)
    x = torch.randn(7, 5, 4, generator=random)
    return list(zip(x, x.sum(dim=2).sin(), strict=True))


def squared(model, batch):
    x, y = batch
    return (model(x)[:, 0].float() - y) ** 2


def run(directory, config=CONFIG, width=8, on_validation=lambda: None, **options):
    """The weights at the end and the history of a run that depends on nothing but its arguments."""
    model = network(width)
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))

    def validate():
        torch.rand(3)  # a validation may use the generator without changing the run
        on_validation()
        assert not model.training
        with torch.no_grad():
            return -((model(x)[:, 0] - x.sum(dim=1).sin()) ** 2).mean().item()

    found = train(model, epoch_batches, squared, validate, config, directory, **options)
    return {name: p.detach() for name, p in model.named_parameters()}, found


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- runs that are killed ----------------------------------------------------------------------------


def killed_again_and_again(directory):
    """Fork, train, and be killed: at chosen points by its own hand, then at random ones from outside."""
    points = [
        ("before step 3", lambda: kill_at(loop._Run, "update", 3)),
        ("in the middle of an epoch", lambda: kill_at(loop._Run, "update", 5)),
        ("with a checkpoint half written", lambda: kill_at(os, "fsync", 4)),
        ("with a checkpoint written, not yet in place", lambda: kill_at(os, "replace", 3)),
        ("while it validates", lambda: kill_at(loop._Run, "evaluate", 1)),
        ("at the end of an epoch", lambda: kill_at(loop._Run, "update", 2)),
    ]
    run(None)  # what torch imports at its first step is then there for all
    steps = []
    for _, arm in points:
        pid = os.fork()
        if pid == 0:
            arm()
            run(directory)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        steps.append(checkpoint.load(directory / "checkpoint.safetensors")[1]["step"])
    while True:
        pid = os.fork()
        if pid == 0:
            run(directory)
            os._exit(0)
        time.sleep(random.uniform(0.002, 0.06))
        os.kill(pid, signal.SIGKILL)
        if os.WIFEXITED(os.waitpid(pid, 0)[1]) or len(steps) > 25:
            break
        steps.append(checkpoint.load(directory / "checkpoint.safetensors")[1]["step"])
    weights, _ = run(directory)
    checkpoint.save(directory / "final.safetensors", weights, {"steps": steps})


def kill_at(owner, name, nth):
    """Kill this process where it calls owner.name for the nth time."""
    whole, calls = getattr(owner, name), iter(range(1, 10_000))

    def counted(*arguments, **options):
        if next(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments, **options)

    setattr(owner, name, counted)


def test_a_run_that_was_killed_ends_as_one_that_was_not(tmp_path):
    unbroken, found = run(tmp_path / "unbroken")
    subprocess.run([sys.executable, __file__, tmp_path / "killed"], check=True, timeout=1000)
    weights, head = checkpoint.load(tmp_path / "killed" / "final.safetensors")
    assert equal(weights, unbroken)
    steps = head["steps"]
    assert steps == sorted(steps)
    assert 0 < steps[0] < steps[5] < found["steps"]  # it went on, rather than began anew
    lines = [
        [
            {key: value for key, value in json.loads(line).items() if key != "seconds"}
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("unbroken", "killed")
    ]
    assert len(lines[0]) == CONFIG.evaluations
    assert lines[1] == lines[0]


def test_a_finished_run_gives_its_weights_again_without_training(tmp_path):
    weights, found = run(tmp_path)

    def fail():
        raise AssertionError("nothing is left to do")

    again, after = run(tmp_path, on_validation=fail)
    assert equal(again, weights)
    assert after == found


def test_without_a_folder_the_result_is_the_same(tmp_path):
    assert equal(run(None)[0], run(tmp_path)[0])
    assert not equal(run(None)[0], run(None, TrainConfig(**{**vars(CONFIG), "seed": 6}))[0])


@pytest.mark.parametrize(
    "changed, width, about, message",
    [
        ({"lr": 0.03, "epochs": 9}, 8, {}, r"a checkpoint of another training \(epochs, lr differ\)"),
        ({}, 8, {"events": 12}, r"a checkpoint of another training \(events differ\)"),
        ({}, 9, {}, "a checkpoint of another network"),
    ],
)
def test_a_checkpoint_of_another_run_is_told(tmp_path, changed, width, about, message):
    run(tmp_path)
    with pytest.raises(ConfigError, match=message + r".*Delete the checkpoint to start anew\."):
        run(tmp_path, TrainConfig(**{**vars(CONFIG), **changed}), width, about=about)


def test_a_damaged_checkpoint_is_told(tmp_path):
    run(tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleDamagedError, match=r"cannot read .*Delete it to start anew"):
        run(tmp_path)


def test_a_full_disk_stops_the_run_and_it_goes_on_later(tmp_path, monkeypatch):
    unbroken, _ = run(None)
    whole, calls = checkpoint.save_file, iter(range(100))

    def full(*arguments):
        if next(calls) == 6:
            raise OSError(28, "No space left on device")
        whole(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(StorageError, match="No space left on device"):
        run(tmp_path)
    assert checkpoint.load(tmp_path / "checkpoint.safetensors")[1]["step"] == 6
    assert not list(tmp_path.glob("*.part"))
    monkeypatch.undo()
    assert equal(run(tmp_path)[0], unbroken)


# -- what is kept ------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_the_weights_of_the_best_validation_are_kept(average):
    model, seen = network(), []
    scores = iter([0.1, 0.3, 0.7, 0.7, 0.2])

    def validate():
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return next(scores)

    config = TrainConfig(epochs=2, evaluations=5, average=average)
    found = train(model, epoch_batches, squared, validate, config)
    assert equal({name: p.detach() for name, p in model.named_parameters()}, seen[2])
    assert not equal(seen[2], seen[4])
    assert found["best"] == 0.7
    assert [line["score"] for line in found["history"]] == [0.1, 0.3, 0.7, 0.7, 0.2]
    assert [line["step"] for line in found["history"]] == [3, 6, 9, 12, 14]
    assert not model.training


def test_the_average_is_what_is_validated():
    """w̄ ← w̄ + (1 − d)(w − w̄) after every step, d = min(decay, (1 + t) / (10 + t)); training goes on with w."""
    model, path, validated = network(), [], []

    def losses(model, batch):
        path.append([p.detach().clone() for p in model.parameters()])  # before step len(path)
        return squared(model, batch)

    def validate():
        validated.append((len(path), [p.detach().clone() for p in model.parameters()]))
        return 0.0

    train(model, epoch_batches, losses, validate, TrainConfig(epochs=2, evaluations=2, average=0.4))
    average = [w.clone() for w in path[0]]
    for t in range(1, validated[0][0] + 1):
        decay = min(0.4, (1 + t) / (10 + t))
        average = [a + (1 - decay) * (w - a) for a, w in zip(average, path[t], strict=True)]
    for found, expected, now in zip(validated[0][1], average, path[validated[0][0]], strict=True):
        torch.testing.assert_close(found, expected)
        assert not torch.equal(found, now)


def test_without_a_validation_the_last_weights_are_kept():
    model, path = network(), []

    def losses(model, batch):
        path.append([p.detach().clone() for p in model.parameters()])
        return squared(model, batch)

    found = train(model, epoch_batches, losses, None, TrainConfig(epochs=1, average=0.0, bfloat16=False))
    assert found["best"] is None
    assert found["history"][-1]["score"] is None
    assert not any(torch.equal(p, w) for p, w in zip(model.parameters(), path[-1], strict=True))


def test_it_learns_and_reports(tmp_path):
    told = []
    config = TrainConfig(epochs=60, lr=0.02, evaluations=3, average=0.9)
    _, found = run(tmp_path, config, report=told.append)
    scores = [line["score"] for line in found["history"]]
    assert scores[-1] > scores[0] > -1.0
    assert told[-1].share == 1.0
    assert told[-1].best == max(scores)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == found["history"]


def test_the_speed_is_that_of_the_steps_alone(monkeypatch):
    """Two seconds a batch of five, whatever a validation takes."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(loop, "time", clock)
    told = []

    def slow(model, batch):
        clock.now += 2.0
        return squared(model, batch)

    def validate():
        clock.now += 1_000.0
        return 0.0

    train(network(), epoch_batches, slow, validate, CONFIG, report=told.append)
    assert len(told) == 21
    assert {progress.examples_per_second for progress in told} == {2.5}


# -- schedule ----------------------------------------------------------------------------------------


def rates(config, steps_per_epoch=10, seconds=0.0, validation=0.0):
    """The learning rate of each step: under a constant gradient AdamW moves a weight by just that."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    scores = itertools.count()
    model, places = nn.Linear(1, 1, bias=False).double(), []

    def losses(model, batch):
        clock.now += seconds
        places.append(model.weight.item())
        return model.weight[0]

    def validate():
        clock.now += validation
        return next(scores)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "time", clock)
        train(model, lambda epoch: [None] * steps_per_epoch, losses, validate, config)
    places.append(model.weight.item())
    return [a - b for a, b in itertools.pairwise(places)]


def test_the_rate_warms_up_and_falls_as_a_cosine():
    config = TrainConfig(
        epochs=5, lr=0.3, final_lr=0.1, warmup=0.2, weight_decay=0.0, average=0.0, bfloat16=False
    )
    found = rates(config)
    assert len(found) == 50
    for step, rate in enumerate(found):
        share = step / 50
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2
        assert rate == pytest.approx(0.3 * min(1, (share + 1e-3) / 0.2) * cosine, rel=1e-3)
    assert found[-1] == pytest.approx(0.03, rel=0.02)


def test_a_budget_of_minutes_is_kept_and_the_rate_falls_all_the_way():
    config = TrainConfig(
        epochs=10**6,
        minutes=2.0,
        lr=0.3,
        final_lr=0.1,
        weight_decay=0.0,
        average=0.0,
        bfloat16=False,
        evaluations=4,
    )
    found = rates(config, seconds=1.0, validation=500.0)  # validation is not training time
    assert len(found) == 120
    assert max(found) > 0.28
    assert found[-1] == pytest.approx(0.03, rel=0.02)


def test_the_epochs_end_a_run_that_has_minutes_left():
    config = TrainConfig(epochs=2, minutes=100.0, weight_decay=0.0, average=0.0, bfloat16=False)
    assert len(rates(config, seconds=1.0)) == 20


def test_only_matrices_decay():
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(1.0)
    config = TrainConfig(epochs=1, weight_decay=0.5, average=0.0, bfloat16=False)
    train(
        model, lambda epoch: [None] * 5, lambda m, b: (m.weight.sum() + m.bias.sum())[None] * 0, None, config
    )
    assert (model.weight < 1).all()
    assert (model.bias == 1).all()


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"evaluations": 0}, {"minutes": 0}, {"lr": 0.0}, {"average": 1.0}]
)
def test_bad_settings_are_told(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}=.*(above 0|lr > 0 and 0 ≤ average < 1)"):
        TrainConfig(**wrong)


def test_nothing_to_learn_from_is_told():
    with pytest.raises(DataError, match="an epoch without batches"):
        train(network(), lambda epoch: [], squared, None, CONFIG)


def test_running_statistics_are_resumed_and_kept_with_the_best_weights(tmp_path):
    """Batch normalisation: its buffers move at every step, and belong to the weights that were validated."""

    def run_with_statistics(directory, steps):
        torch.manual_seed(1)
        model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
        left, scores, seen = iter(range(steps)), iter([3.0, 2.0, 1.0, 0.0]), []

        def limited(model, batch):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return squared(model, batch)

        def validate():
            seen.append(model[0].running_mean.clone())
            return next(scores)

        try:
            train(model, epoch_batches, limited, validate, CONFIG, directory)
        except KeyboardInterrupt:
            return None
        return model.state_dict(), seen

    whole, seen = run_with_statistics(tmp_path / "whole", 1000)
    assert torch.equal(whole["0.running_mean"], seen[0])
    assert not torch.equal(seen[0], seen[1])
    assert run_with_statistics(tmp_path / "killed", 4) is None
    resumed, _ = run_with_statistics(tmp_path / "killed", 1000)
    assert equal(resumed, whole)


if __name__ == "__main__":
    killed_again_and_again(Path(sys.argv[1]))


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step():
    model = network()
    steps = itertools.count()

    def poisoned(model, batch):
        return squared(model, batch) * (float("nan") if next(steps) == 3 else 1.0)

    with pytest.raises(DataError, match=r"a loss of nan at step 3\. A loss is finite"):
        train(model, epoch_batches, poisoned, None, CONFIG)
    assert all(torch.isfinite(p).all() for p in model.parameters())
