import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
from rich.console import Console

from tiglon.errors import ConfigError, DataError
from tiglon.evaluation.protocol import difference, evaluate, lead, table, to_json
from tiglon.retrieval.topk import top_items
from tiglon.types import MISSING, Candidates, Histories, Targets, Vocabulary

N = 12


@dataclass
class Fixed:
    """Scores that depend on the last item of the history alone."""

    scores: np.ndarray  # (N, N)
    name: str = "fixed"
    items: Vocabulary = None

    def __post_init__(self):
        self.items = Vocabulary(list(range(len(self.scores))))

    def retrieve(self, histories, k, *, exclude_seen=True):
        last = np.array([items[-1] for items in histories])
        return top_items(self.scores[last], k, histories if exclude_seen else None)


@dataclass
class Answers:
    """Whatever it is told to answer."""

    item: np.ndarray
    name: str = "told"

    @property
    def items(self):
        return Vocabulary(list(range(N)))

    def retrieve(self, histories, k, *, exclude_seen=True):
        return Candidates(self.item, np.where(self.item == MISSING, -np.inf, 0).astype(np.float32), self.name)


def targets(histories, truths):
    past, future = Histories.of(histories), Histories.of(truths)
    return Targets(
        np.arange(100, 100 + len(past)), past, Histories(future.offsets, future.item, future.time + 1000)
    )


def random_targets(users, seed=0):
    rng = np.random.default_rng(seed)
    pairs = [rng.permutation(N)[:4] for _ in range(users)]
    return targets([p[:3] for p in pairs], [p[3:] for p in pairs])


SCORES = np.random.default_rng(0).random((N, N))


# -- the protocol ------------------------------------------------------------------------------------------


def test_users_without_truth_are_left_out_and_counted():
    asked = targets([[0], [1], [2], [3]], [[5], [], [6, 7], []])
    found = evaluate(Fixed(SCORES), asked, ks=[N])
    assert found.users.tolist() == [100, 102]
    assert found.skipped == to_json([found], "test")["skipped"] == 2
    assert found.metrics[f"recall@{N}"] == 1
    alone = evaluate(Fixed(SCORES), targets([[0], [2]], [[5], [6, 7]]), ks=[N])
    assert alone.metrics == found.metrics


def test_masked_and_unmasked_by_hand():
    asked = targets([[0]], [[2]])
    scores = np.zeros((N, N))
    scores[0] = [9, 8, 7, *range(-9, 0)]  # the seen item first, the true one third
    retriever = Fixed(scores)
    masked = evaluate(retriever, asked, ks=(1, 2, 3))
    unmasked = evaluate(retriever, asked, ks=(1, 2, 3), exclude_seen=False)
    assert [masked.metrics[f"recall@{k}"] for k in (1, 2, 3)] == [0, 1, 1]
    assert [unmasked.metrics[f"recall@{k}"] for k in (1, 2, 3)] == [0, 0, 1]
    assert masked.metrics["ndcg@3"] == pytest.approx(1 / math.log2(3))
    assert (masked.mode, unmasked.mode) == ("masked", "unmasked")


def test_a_repeat_that_the_mask_hides_is_a_miss():
    asked = targets([[0, 1]], [[0]])
    assert evaluate(Fixed(SCORES), asked, ks=[N]).metrics[f"recall@{N}"] == 0
    assert evaluate(Fixed(SCORES), asked, ks=[N], exclude_seen=False).metrics[f"recall@{N}"] == 1


def test_batches_do_not_matter_and_progress_is_told():
    asked, calls = random_targets(23), []
    whole = evaluate(Fixed(SCORES), asked, batch=100)
    parts = evaluate(Fixed(SCORES), asked, batch=5, progress=lambda done, users: calls.append((done, users)))
    assert parts.metrics == whole.metrics
    assert parts.intervals == whole.intervals
    assert calls == [(5, 23), (10, 23), (15, 23), (20, 23), (23, 23)]


@pytest.mark.parametrize("monotone", [np.exp, lambda x: 3 * x - 7, lambda x: np.log(x) * 1e-3])
def test_monotone_transforms_of_scores_change_nothing(monotone):
    asked = random_targets(40)
    assert evaluate(Fixed(monotone(SCORES)), asked).metrics == evaluate(Fixed(SCORES), asked).metrics


def test_constant_scores_recall_what_ties_at_random_do():
    everyone = targets([[0]] * N, [[i] for i in range(N)])  # each item is true once
    constant = Fixed(np.ones((N, N)))
    found = evaluate(constant, everyone, ks=(1, 4, N), exclude_seen=False)
    assert [found.metrics[f"recall@{k}"] for k in (1, 4, N)] == [1 / N, 4 / N, 1]


def test_numbers_of_all_lists_stand_beside_the_means():
    asked = targets([[0], [1]], [[2], [3]])
    told = Answers(np.array([[2, 4, 5], [4, 2, MISSING]]))
    counts = np.array([0, 0, 9, 0, 1, 1, 1, 0, 0, 0, 0, 0])
    found = evaluate(told, asked, ks=(3,), popularity=counts, categories=np.arange(N) // 2)
    assert found.metrics["coverage@3"] == 3 / N
    assert found.metrics["pooled_recall@3"] == 1 / 2
    assert found.metrics["recall@3[head]"] == 1
    assert found.metrics["recall@3[new]"] == 0
    assert math.isnan(found.metrics["recall@3[tail]"])
    assert found.metrics["category_entropy@3"] == pytest.approx((math.log2(3) - 2 / 3 + 1) / 2)
    assert found.metrics["gini@3"] > 0


def test_intervals_hold_their_means_and_users_can_be_paired():
    asked = random_targets(200)
    good, bad = SCORES.copy(), np.random.default_rng(1).random((N, N))
    a, b = evaluate(Fixed(good, "a"), asked), evaluate(Fixed(bad, "b"), asked)
    for name, (low, high) in a.intervals.items():
        assert low <= a.metrics[name] <= high
        assert a.per_user[name].shape == (200,)
    delta, low, high = difference(a, b, "recall@5")
    assert delta == pytest.approx(a.metrics["recall@5"] - b.metrics["recall@5"])
    assert low <= delta <= high
    assert difference(a, a, "ndcg@10") == (0, 0, 0)


# -- lists that break the rules ----------------------------------------------------------------------------


def test_a_duplicate_is_caught():
    with pytest.raises(DataError, match="listed twice"):
        evaluate(Answers(np.array([[1, 1]])), targets([[0]], [[2]]), ks=[2])


@pytest.mark.parametrize(
    "item",
    [
        np.array([[1, N]]),  # an item that the catalogue lacks
        np.array([[1, 2, 3]]),  # more than k
        np.array([[1, 2], [3, 4]]),  # a list too many
    ],
)
def test_an_invalid_list_is_caught(item):
    with pytest.raises(DataError, match="one list of at most k items of its catalogue"):
        evaluate(Answers(item), targets([[0]], [[2]]), ks=[2])


def test_bad_arguments_are_told():
    asked = targets([[0]], [[2]])
    with pytest.raises(ConfigError, match="each of at least 1"):
        evaluate(Fixed(SCORES), asked, ks=(0, 5))
    with pytest.raises(DataError, match="popularity of 3 items for a catalogue of 12"):
        evaluate(Fixed(SCORES), asked, popularity=np.ones(3))
    with pytest.raises(DataError, match="1 users, none of them with truth"):
        evaluate(Fixed(SCORES), targets([[0]], [[]]))


# -- to be read --------------------------------------------------------------------------------------------


def text_of(rows):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(rows)
    return capture.get()


def test_table_shows_a_row_an_evaluation():
    asked = random_targets(30)
    evaluations = [evaluate(Fixed(SCORES), asked), evaluate(Fixed(SCORES), asked, exclude_seen=False)]
    text = text_of(table(evaluations, ["recall@10", "coverage@5"], title="Test", intervals=True))
    assert "30 users" in text
    assert "unmasked" in text
    assert f"{evaluations[0].metrics['recall@10']:.4f}".removeprefix("0") in text
    assert f"{evaluations[0].intervals['recall@10'][0]:.4f}".removeprefix("0") in text
    with pytest.raises(ConfigError, match=r"no metric .recal@10.\. Did you mean .recall@10."):
        table(evaluations, ["recal@10"])


def test_table_tells_of_users_left_out():
    found = evaluate(Fixed(SCORES), targets([[0], [1]], [[5], []]))
    assert "1 users, 1 more without truth left out" in text_of(table([found]))


def test_json_has_the_stated_form():
    asked = random_targets(30)
    counts = np.arange(N) * 0 + 1
    found = to_json([evaluate(Fixed(SCORES), asked, popularity=counts)], split="test")
    assert list(found) == ["split", "users", "skipped", "rows", "lead"]
    assert found["lead"] is None  # of whom?
    assert (found["split"], found["users"]) == ("test", 30)
    (row,) = found["rows"]
    assert row["name"] == "fixed"
    assert row["exclude_seen"] is True
    assert 0 <= row["ndcg@10"] <= row["recall@10"] <= 1
    assert row["recall@10[new]"] is None  # no item is new, and JSON knows no NaN
    json.dumps(found, allow_nan=False)


def test_the_best_is_set_against_the_next_best_user_by_user():
    asked = targets([[i] for i in range(N)], [[(i + 1) % N] for i in range(N)])
    right = np.roll(np.eye(N), 1, axis=1)  # the wanted item first

    def knows(users, name, **options):
        return evaluate(Fixed(np.where(np.arange(N)[:, None] < users, right, -right), name), asked, **options)

    best, better, worst = knows(9, "best"), knows(6, "better"), knows(0, "worst")
    found = lead([worst, best, better])
    assert (found["name"], found["over"]) == ("best", "better")
    assert found["ndcg@10"] == list(difference(best, better, "ndcg@10"))
    assert found["recall@10"][0] == pytest.approx(3 / N)
    assert found["recall@10"][1] <= found["recall@10"][0] <= found["recall@10"][2]
    assert lead([best, knows(6, "shown", exclude_seen=False)]) is None  # another question
    assert lead([evaluate(Fixed(SCORES), asked, ks=[3])] * 2) is None


def test_rows_of_one_table_are_about_the_same_users():
    a, b = evaluate(Fixed(SCORES), random_targets(3)), evaluate(Fixed(SCORES), random_targets(4))
    for put_together in (table, lambda e: to_json(e, "test"), lambda e: difference(*e, "recall@5")):
        with pytest.raises(DataError, match="measured different users"):
            put_together([a, b])
