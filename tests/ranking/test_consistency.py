import numpy as np
import pytest
import torch

from tiglon.errors import ConfigError, DataError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.consistency import consistency, consistency_by_age, consistency_of, true_top
from tiglon.ranking.eta import Eta
from tiglon.ranking.ranker import Ranker
from tiglon.ranking.sim import SimHard, SimSoft
from tiglon.ranking.twin import Twin
from tiglon.types import Behaviours, RankingBatch

N, B, K, L = 60, 4, 5, 40


@pytest.fixture
def embed():
    torch.manual_seed(0)
    item = np.arange(N)
    codes = np.concatenate([np.stack([item + 1, 1 + item % 3], axis=1), [[0, 0]]])
    return FeatureEmbedding(codes, (N + 1, 4), (8, 4), (4,), std=1.0)


@pytest.fixture
def requests():
    torch.manual_seed(1)
    past = Behaviours(
        torch.randint(0, N, (B, L)),
        torch.randint(0, 4, (B, L, 1)),
        1 + torch.rand(B, L),
        torch.arange(L) < torch.tensor([[40], [30], [5], [0]]),
    )
    label = (torch.rand(B, K, 1) < 0.4).float()
    return RankingBatch(torch.randint(0, N, (B, K)), past, torch.zeros(B, 0, dtype=torch.int64), label)


def test_by_hand():
    found = torch.tensor([[[4, 2, 9], [1, 0, -1]], [[-1, -1, -1], [5, -1, -1]]])
    truth = torch.tensor([[[2, 9, 7], [0, 1, -1]], [[3, 2, 1], [-1, -1, -1]]])
    assert consistency(found, truth) == pytest.approx((2 / 3 + 1 + 0) / 3)  # what has no truth does not count
    assert consistency(found, truth, torch.tensor([[True, False], [True, True]])) == pytest.approx(
        (2 / 3 + 0) / 2
    )


@pytest.mark.parametrize("shape", [(1, 2, 3), (0, 0, 0), (1, 2, 0)])
def test_nothing_to_find_is_told(shape):
    nothing = torch.full(shape, -1)
    with pytest.raises(
        DataError, match=r"no candidate with a behaviour to find\. Consistency is a mean over such"
    ):
        consistency(nothing, nothing)


def test_the_truth_takes_the_heads_in_turn(embed, requests):
    unit = SimSoft(embed, heads=3)
    truth = true_top(unit, embed, requests.item, requests.past, k=7)
    alpha = unit.logits(embed, requests.item, requests.past)
    for b in range(B):
        real = range(int(requests.past.lengths[b]))
        for q in range(K):
            ranked = [sorted(real, key=lambda at, a=head: (-a[at].item(), -at)) for head in alpha[b, q]]
            merged = list(dict.fromkeys(at for turn in zip(*ranked, strict=True) for at in turn))[:7]
            assert truth[b, q].tolist() == merged + [-1] * (7 - len(merged))


class Oracle(SimSoft):
    """Searches by what its attention wants."""

    def search(self, embed, item_BK, past):
        return true_top(self, embed, item_BK, past)


def test_a_search_by_the_attentions_own_scores_is_consistent(embed, requests):
    assert consistency_of(Oracle(embed, k=10), embed, requests) == 1


def test_whatever_is_all_found_is_consistent(embed, requests):
    for unit in (SimSoft(embed, k=L), Eta(embed, k=L)):
        assert consistency_of(unit, embed, requests) == 1


def test_two_scorers_disagree(embed, requests):
    for unit in (SimSoft(embed, k=10), SimHard(embed, category=1, k=10), Eta(embed, k=10)):
        assert 0 < consistency_of(unit, embed, requests) < 1


def test_candidates_without_labels_do_not_count(embed, requests):
    unit = SimSoft(embed, k=10)
    label = requests.label.clone()
    label[:, 2:] = float("nan")
    fewer = RankingBatch(requests.item[:, :2], requests.past, requests.profile, requests.label[:, :2])
    padded = requests._replace(label=label)
    assert consistency_of(unit, embed, padded) == consistency_of(unit, embed, fewer)


def test_the_unit_is_measured_as_it_answers_and_left_as_it_was(embed, requests):
    unit = SimSoft(embed, k=10).train()
    consistency_of(unit, embed, requests)
    assert unit.training


@pytest.fixture
def twin_like(embed):
    """A soft search that scores as the attention does, so that nothing but age can come between the two."""
    torch.manual_seed(2)
    unit = SimSoft(embed, k=10, heads=1, head_width=32, search_width=32)
    attention = unit.esu.attention
    with torch.no_grad():
        unit.query.weight.copy_(attention.query.weight)
        unit.key.weight.copy_(attention.key.weight)
        attention.cross.zero_()
    return unit


def drift(embed):
    """An update of the weights that is worth measuring."""
    with torch.no_grad():
        for table in embed.items:
            table.weight.add_(0.3 * torch.randn_like(table.weight))


def test_old_tables_find_less(twin_like, embed, requests):
    by_age = consistency_by_age(twin_like, embed, requests, lambda: drift(embed))
    assert list(by_age) == [0, 1, 2, 4]
    assert by_age[0] == 1
    assert 1 > by_age[1] > by_age[4] > 0
    assert consistency_of(twin_like, embed, requests) == 1  # fresh again


def test_twin_is_consistent_until_its_cache_is_old(embed, requests):
    by_age = consistency_by_age(Twin(embed, k=10), embed, requests, lambda: drift(embed))
    assert by_age[0] == 1
    assert 1 > by_age[1] > by_age[4]


def test_what_reads_no_stored_tables_does_not_age(twin_like, embed, requests):
    for _ in range(3):
        drift(embed)
        assert consistency_of(twin_like, embed, requests) == 1


def test_ages_are_updates(twin_like, embed, requests):
    calls = []
    fresh = consistency_of(twin_like, embed, requests)
    by_age = consistency_by_age(twin_like, embed, requests, lambda: calls.append(1), ages=(3, 0))
    assert len(calls) == 3
    assert by_age == {0: fresh, 3: fresh}


def test_a_training_step_is_an_update(embed, requests):
    unit = Eta(embed, k=10)
    model = Ranker(embed, unit)
    optimizer = torch.optim.SGD(model.parameters(), 3.0)

    def update():
        optimizer.zero_grad()
        model.train().loss(requests).mean().backward()
        optimizer.step()

    by_age = consistency_by_age(unit, embed, requests, update, ages=(0, 1))
    assert unit.training  # as the update left it
    assert all(0 < share < 1 for share in by_age.values())


@pytest.mark.parametrize("ages", [(), (0, -1)])
def test_bad_ages_are_told(embed, requests, ages):
    with pytest.raises(ConfigError, match=r"ages=\(.*\). Ages are numbers of updates"):
        consistency_by_age(SimSoft(embed), embed, requests, lambda: None, ages)
