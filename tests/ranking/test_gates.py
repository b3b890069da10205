import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from tiglon.errors import ConfigError, DataError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.gates import (
    APG,
    GATES,
    LHUC,
    M2M,
    POSO,
    TRUNKS,
    APGLinear,
    EPNet,
    GateNU,
    MetaAttention,
    MetaTower,
    MetaUnit,
    PEPNet,
    PosoAttention,
    PosoMMoE,
    PPNet,
    adapt_only,
    submergence,
)
from tiglon.ranking.ranker import Ranker, RankerConfig
from tiglon.types import Behaviours, RankingBatch

B, K, W, HIDDEN = 4, 3, 10, (8, 6)
ID, FLAG = 0, 1  # profile columns
PROFILE = torch.tensor([[1, 1], [2, 2], [0, 1], [5, 0]])


@pytest.fixture
def embed():
    torch.manual_seed(0)
    return FeatureEmbedding(np.array([[1], [2], [0]]), (3,), (6,), (), (7, 3))


class Net(nn.Module):
    """An MLP whose input and hidden layers a gate multiplies."""

    def __init__(self, gate=None, widths=(W, *HIDDEN)):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.head = nn.Linear(widths[-1], 1)
        self.gate = gate

    def hidden(self, profile, candidate, x):
        scale = [1.0] * 3 if self.gate is None else self.gate(profile, candidate, x)
        h, found = x * scale[0], []
        for layer, factor in zip(self.layers, scale[1:], strict=True):
            h = nn.functional.leaky_relu(layer(h)) * factor
            found.append(h)
        return found

    def forward(self, profile, candidate, x):
        return self.head(self.hidden(profile, candidate, x)[-1])


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return PROFILE, torch.randn(B, K, 6), torch.randn(B, K, W)


def make(name, embed, columns=(ID,)):
    return GATES[name](embed, [W, *HIDDEN], columns)


def disturb(gate):
    """As training might leave it."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_(std=0.7)
        for part in gate.modules():
            if isinstance(part, nn.Embedding) and part.padding_idx == 0:
                part.weight[0] = 0


# -- what every gate promises ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GATES)
def test_a_network_begins_as_it_is_without_a_gate(name, embed, inputs):
    assert torch.equal(Net(make(name, embed))(*inputs), Net()(*inputs))


@pytest.mark.parametrize("name", GATES)
def test_a_factor_for_the_input_and_each_hidden_unit(name, embed, inputs):
    gate = make(name, embed)
    disturb(gate)
    found = gate(*inputs)
    for factor, width in zip(found, [W, *HIDDEN], strict=True):
        assert factor.expand(B, K, width).shape == (B, K, width)
        assert (factor >= 0).all()
        assert (factor <= 2).all()


@pytest.mark.parametrize("name", GATES)
def test_an_unknown_id_adds_nothing(name, embed, inputs):
    """However the ids were trained, code 0 is the gate of none of them, and never learns."""
    gate = make(name, embed)
    disturb(gate)
    tables = [part for part in gate.modules() if isinstance(part, nn.Embedding)]
    assert tables
    assert all(not table.weight[0].any() for table in tables)
    sum(factor.sum() for factor in gate(*inputs)).backward()
    assert all(not table.weight.grad[0].any() for table in tables)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("columns", [(), (2,), (-1,)])
def test_a_gate_reads_columns_that_are_there(name, columns, embed):
    with pytest.raises(ConfigError, match=r"LHUC by 0 columns|It reads at least one, and there are 2"):
        make(name, embed, columns)


def test_gates_begin_at_one_and_stay_below_two():
    gate = GateNU(5, 4)
    x = 100 * torch.randn(50, 5)
    assert torch.equal(gate(x), torch.ones(50, 4))
    nn.init.normal_(gate.second.weight)
    assert gate(x).min() >= 0
    assert gate(x).max() <= 2


# -- LHUC ------------------------------------------------------------------------------------------------------


def test_lhuc_multiplies_by_two_sigmoids(embed, inputs):
    gate = LHUC(embed, [W, *HIDDEN], (ID,))
    disturb(gate)
    scale = 2 * torch.sigmoid(gate.r.weight[PROFILE[:, ID]])
    for found, expected in zip(gate(*inputs)[1:], scale.split(HIDDEN, dim=-1), strict=True):
        torch.testing.assert_close(found[:, 0], expected)


def test_adapting_one_id_moves_no_other(embed, inputs):
    """Nor the base: |r_s| numbers move, and the answers of all others stay to the bit."""
    net = Net(LHUC(embed, [W, *HIDDEN], (ID,)))
    before, answers = copy.deepcopy(net.state_dict()), net(*inputs)
    optimizer = torch.optim.Adam(adapt_only(net, net.gate), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(PROFILE[1:2], inputs[1][1:2], inputs[2][1:2]).square().sum().backward()
        optimizer.step()
    moved = {key: (before[key] != value).nonzero() for key, value in net.state_dict().items()}
    assert {key for key, at in moved.items() if len(at)} == {"gate.r.weight"}
    assert set(moved["gate.r.weight"][:, 0].tolist()) == {2}
    assert len(moved["gate.r.weight"]) == sum(HIDDEN)
    others = [0, 2, 3]
    assert torch.equal(net(*inputs)[others], answers[others])
    assert not torch.equal(net(*inputs)[1], answers[1])


def test_an_unknown_speaker_gets_the_base(embed, inputs):
    gate = LHUC(embed, [W, *HIDDEN], (ID,))
    disturb(gate)
    assert torch.equal(Net(gate)(*inputs)[2], Net()(*inputs)[2])
    assert not torch.equal(Net(gate)(*inputs)[1], Net()(*inputs)[1])


def test_a_share_of_the_samples_teaches_the_unknown_speaker(embed):
    """SAT-LHUC: r_0 is learnt from samples of known ids, and read as it is afterwards."""
    gate = LHUC(embed, [W, *HIDDEN], (ID,), shared=0.3)
    nn.init.constant_(gate.r.weight, 1.0)
    with torch.no_grad():
        gate.r.weight[0] = -1.0
    profile = torch.ones(4_000, 2, dtype=torch.int64)
    torch.manual_seed(0)
    taken = (gate.train()(profile, None, None)[1][:, 0, 0] < 1).float().mean()
    assert abs(taken - 0.3) < 0.03
    assert (gate.eval()(profile, None, None)[1] > 1).all()


@pytest.mark.parametrize("shared", [-0.1, 1.0])
def test_a_share_is_a_share(shared, embed):
    with pytest.raises(ConfigError, match="It is a share of the samples"):
        LHUC(embed, [W, *HIDDEN], (ID,), shared)


# -- POSO ------------------------------------------------------------------------------------------------------


def test_poso_reads_nothing_but_its_condition(embed, inputs):
    gate = POSO(embed, [W, *HIDDEN], (FLAG,))
    disturb(gate)
    profile, candidate, x = inputs
    x.requires_grad_()
    candidate.requires_grad_()
    found = gate(profile, candidate, x)
    grads = torch.autograd.grad(sum(f.sum() for f in found), [x, candidate], allow_unused=True)
    assert grads == (None, None)
    other = profile.clone()
    other[:, ID] = 3
    for ours, theirs in zip(found, gate(other, candidate, x), strict=True):
        assert torch.equal(ours, theirs)


def test_poso_mmoe_is_its_formula():
    torch.manual_seed(0)
    model, x, pc = PosoMMoE(5, 4, experts=3, tasks=2, condition=2), torch.randn(7, 5), torch.randn(7, 2)
    disturb(model)
    g = 2 * torch.sigmoid(model.gate.second(torch.relu(model.gate.first(pc))))
    for t in range(2):
        of_task = model.of_task[t](x).softmax(-1)
        expected = sum(
            g[:, i, None] * of_task[:, i, None] * torch.relu(model.experts[i](x)) for i in range(3)
        )
        torch.testing.assert_close(model(x, pc)[:, t], expected)


def test_poso_mmoe_begins_as_mmoe():
    torch.manual_seed(0)
    model, x = PosoMMoE(5, 4, experts=3, tasks=2, condition=2), torch.randn(7, 5)
    found = torch.relu(torch.stack([expert(x) for expert in model.experts], dim=1))
    plain = torch.stack([gate(x).softmax(-1) for gate in model.of_task], dim=1) @ found
    assert torch.equal(model(x, torch.randn(7, 2)), plain)


@pytest.fixture
def attended():
    torch.manual_seed(0)
    model = PosoAttention(8, heads=2, length=6, condition=2)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False], [False] * 5])
    return model, torch.randn(3, 4, 8), torch.randn(3, 5, 8), torch.randn(3, 2), mask


def attend(query, key, value, mask):
    """Two heads of 4, written out."""
    heads = []
    for h in range(2):
        q, k, v = (t[..., 4 * h : 4 * h + 4] for t in (query, key, value))
        heads.append((q @ k.mT / 2).masked_fill(~mask[:, None], -torch.inf).softmax(-1).nan_to_num() @ v)
    return torch.cat(heads, dim=-1)


def test_poso_attention_begins_as_attention(attended):
    model, query, x, _, mask = attended
    of_query, of_key, of_value = model.project
    torch.testing.assert_close(model(*attended[1:]), attend(of_query(query), of_key(x), of_value(x), mask))


def test_poso_attention_gates_values_by_element_and_keys_by_position(attended):
    model, query, x, pc, mask = attended
    disturb(model)
    of_query, of_key, of_value = model.project
    key = of_key(x) * model.of_key(pc)[:, :5, None]
    value = of_value(x) * model.of_value(pc)[:, None]
    assert (model.of_key(pc).shape, model.of_value(pc).shape) == ((3, 6), (3, 8))
    torch.testing.assert_close(model(*attended[1:]), attend(of_query(query), key, value, mask))


def test_poso_attention_over_nothing_is_zero(attended):
    model, *given = attended
    assert not model(*given)[2].any()


def test_poso_attention_says_what_is_too_long(attended):
    model, query, x, pc, mask = attended
    with pytest.raises(DataError, match="10 positions"):
        model(query, torch.cat([x, x], dim=1), pc, torch.cat([mask, mask], dim=1))
    with pytest.raises(ConfigError, match="Heads divide the width"):
        PosoAttention(8, heads=3, length=6, condition=2)


# -- PEPNet ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["epnet", "ppnet", "pepnet"])
def test_no_gradient_flows_through_a_gate_to_the_shared_input(name, embed, inputs):
    """The input's gradient is that of the network whose factors are constants; the direct way stays open."""
    gate = make(name, embed)
    disturb(gate)
    profile, candidate, x = inputs
    x.requires_grad_()
    (ours,) = torch.autograd.grad(Net(gate)(profile, candidate, x).sum(), x)
    frozen = [factor.detach() for factor in gate(profile, candidate, x)]
    (constant,) = torch.autograd.grad(Net(lambda *_: frozen)(profile, candidate, x).sum(), x)
    assert torch.equal(ours, constant)
    assert ours.abs().sum() > 0


@pytest.mark.parametrize("name", ["epnet", "ppnet", "pepnet"])
def test_a_gate_does_read_the_shared_input(name, embed, inputs):
    gate = make(name, embed)
    disturb(gate)
    profile, candidate, x = inputs
    ours, theirs = (torch.cat([f.flatten() for f in gate(profile, candidate, y)]) for y in (x, -x))
    assert not torch.allclose(ours, theirs)


def test_another_user_changes_the_factors_through_the_ids_alone(embed, inputs):
    gate = PPNet(embed, [W, *HIDDEN], (ID,))
    disturb(gate)
    profile, candidate, x = inputs
    other = profile[[1, 0, 2, 3]]
    changed = [
        (a != b).flatten(1).any(1).tolist()
        for a, b in zip(gate(profile, candidate, x)[1:], gate(other, candidate, x)[1:], strict=True)
    ]
    assert changed == [[True, True, False, False]] * 2
    with torch.no_grad():
        gate.conditions.tables[0].weight.zero_()
    for a, b in zip(gate(profile, candidate, x), gate(other, candidate, x), strict=True):
        assert torch.equal(a, b)


def test_each_tower_has_factors_of_its_own(embed, inputs):
    """Two towers: the widths of their layers, one tower after the other."""
    gate = PPNet(embed, [W, *HIDDEN, *HIDDEN], (ID,))
    first, second = gate(*inputs)[1:3], gate(*inputs)[3:]
    assert [f.shape[-1] for f in first] == [f.shape[-1] for f in second] == list(HIDDEN)
    sum(f.sum() for f in second).backward()
    assert [part.second.bias.grad is None for part in gate.gates] == [True, True, False, False]


def test_epnet_gates_the_input_and_pepnet_all(embed, inputs):
    epnet, pepnet = EPNet(embed, [W, *HIDDEN], (FLAG,)), PEPNet(embed, [W, *HIDDEN], (FLAG,))
    disturb(epnet)
    disturb(pepnet)
    scale, *hidden = epnet(*inputs)
    assert scale.shape == (B, K, W)
    assert [f.tolist() for f in hidden] == [[1.0], [1.0]]
    scale, *hidden = pepnet(*inputs)
    profile, candidate, x = inputs
    for ours, theirs in zip(hidden, pepnet.parameters_of(profile, candidate, scale * x)[1:], strict=True):
        assert torch.equal(ours, theirs)


# -- APG and M2M -----------------------------------------------------------------------------------------------


def apg(over):
    torch.manual_seed(0)
    layer = APGLinear(7, 5, condition=3, rank=2, over=over)
    disturb(layer)
    return layer, torch.randn(6, 7), torch.randn(6, 3)


@pytest.mark.parametrize("over", [None, 4])
def test_apg_is_the_matrix_it_never_makes(over):
    layer, x, z = apg(over)
    U, V = (torch.linalg.multi_dot([*c]) if len(c) > 1 else c[0] for c in (layer.U, layer.V))
    for i in range(6):
        W_i = U @ layer.core(z[i]) @ V
        assert torch.linalg.matrix_rank(W_i) == 2
        torch.testing.assert_close(layer(x, z)[i], W_i @ x[i] + layer.bias)


def test_merging_changes_nothing_but_the_number_of_parameters():
    layer, x, z = apg(16)
    before, count = layer(x, z), sum(p.numel() for p in layer.parameters())
    torch.testing.assert_close(layer.merge()(x, z), before)
    assert sum(p.numel() for p in layer.parameters()) < count


def test_a_constant_condition_is_a_plain_low_rank_layer():
    layer, x, z = apg(None)
    same = z[:1].expand(6, -1)
    plain = nn.Linear(7, 5)
    with torch.no_grad():
        plain.weight.copy_(layer.U[0] @ layer.core(z[0]) @ layer.V[0])
        plain.bias.copy_(layer.bias)
    torch.testing.assert_close(layer(x, same), plain(x))


@pytest.mark.parametrize("rank, over", [(0, None), (4, 3)])
def test_apgs_ranks(rank, over):
    with pytest.raises(ConfigError, match="rank is at least 1, and over at least rank"):
        APGLinear(7, 5, condition=3, rank=rank, over=over)


@pytest.fixture
def scenario():
    torch.manual_seed(0)
    return torch.randn(6, 4), torch.randn(6, 3)


def test_a_meta_unit_is_the_layer_its_scenario_makes(scenario):
    h, s = scenario
    unit = MetaUnit(3, 4)
    for i in range(6):
        W_i = (unit.weights[0].weight @ s[i] + unit.weights[0].bias).view(4, 4)
        b_i = unit.biases[0].weight @ s[i] + unit.biases[0].bias
        torch.testing.assert_close(unit(h, s)[i], nn.functional.leaky_relu(W_i @ h[i] + b_i))


def test_scenarios_alike_compute_alike(scenario):
    h, s = scenario
    unit, tower = MetaUnit(3, 4, layers=2), MetaTower(3, 4)
    x, alike = h[:1].expand(2, -1), s[:1].expand(2, -1)
    for part in (unit, tower):
        assert torch.equal(part(x, alike)[0], part(x, alike)[1])
        assert not torch.allclose(part(x, s[:2])[0], part(x, s[:2])[1])


def test_meta_layers_compose(scenario):
    h, s = scenario
    deep, first, second = MetaUnit(3, 4, layers=2), MetaUnit(3, 4), MetaUnit(3, 4)
    for n, unit in enumerate((first, second)):
        unit.weights[0], unit.biases[0] = deep.weights[n], deep.biases[n]
    torch.testing.assert_close(deep(h, s), second(first(h, s), s))


def test_a_meta_tower_adds_what_went_in(scenario):
    h, s = scenario
    tower = MetaTower(3, 4, layers=1)
    torch.testing.assert_close(tower(h, s), nn.functional.leaky_relu(tower.units[0](h, s) + h))


def test_meta_attention_shares_itself_out_over_the_experts(scenario):
    h, s = scenario
    attention, experts = MetaAttention(3, 4), torch.randn(6, 5, 4)
    weight = attention.weights(experts, h, s)
    torch.testing.assert_close(weight.sum(-1), torch.ones(6))
    torch.testing.assert_close(attention(experts, h, s), (weight[..., None] * experts).sum(1))
    for i in range(6):
        each = [attention.v(attention.meta(torch.cat([e, h[i]]), s[i])) for e in experts[i]]
        torch.testing.assert_close(weight[i], torch.cat(each).softmax(0))


# -- the segment that is submerged -----------------------------------------------------------------------------

OLD, NEW, WIDTHS = 1, 2, (64, 64, 32)


def planted(rows, seed):
    """One sample in twenty is of a new user, for whom the opposite holds."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, WIDTHS[0])).astype(np.float32)
    new = rng.random(rows) < 0.05
    score = x[:, 0] + x[:, 1] * x[:, 2] + 0.3 * rng.normal(size=rows)
    label = (score * np.where(new, -1, 1) > 0).astype(np.float32)
    profile = torch.from_numpy(np.stack([np.ones(rows, np.int64), np.where(new, NEW, OLD)], axis=1))
    return profile, torch.from_numpy(x)[:, None], torch.from_numpy(label), new


def learn(gate, steps=80):
    """Segments' AUC on fresh rows, and how much the flag moves each layer. The flag is an input of both networks."""

    def inputs(profile, x):
        flag = (profile[:, None, FLAG:] == NEW).float()
        return profile, x, torch.cat([x[..., :-1], flag], dim=-1)

    torch.manual_seed(0)
    net = Net(gate, WIDTHS)
    optimizer = torch.optim.Adam(net.parameters(), 0.01, fused=True)
    profile, x, label, _ = planted(8_000, 0)
    for step in range(steps):
        rows = slice(400 * (step % 20), 400 * (step % 20) + 400)
        logit = net(*inputs(profile[rows], x[rows])).flatten()
        loss = nn.functional.binary_cross_entropy_with_logits(logit, label[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    profile, x, label, new = planted(8_000, 1)
    with torch.no_grad():
        logit = net(*inputs(profile, x)).flatten()
    moved = submergence(lambda p: net.hidden(*inputs(p, x)), profile, FLAG, (OLD, NEW))
    return {
        "old": roc_auc_score(label[~new], logit[~new]),
        "new": roc_auc_score(label[new], logit[new]),
        "moved": moved,
    }


def test_poso_brings_a_submerged_segment_up(embed):
    plain = learn(None)
    gated = learn(POSO(embed, WIDTHS, (FLAG,)))
    assert gated["new"] > plain["new"] + 0.2, (plain, gated)
    assert gated["old"] > plain["old"] - 0.01
    assert gated["moved"][-1] > 1.5 * plain["moved"][-1]  # the layer that decides


def test_the_probe_says_how_much_moves():
    """Hidden layers h = [1, flag]: turned from 1 to 2, one unit of two moves by 1; mean |h| was 1."""

    def hidden(profile):
        return [torch.stack([torch.ones(len(profile)), profile[:, FLAG].float()], dim=1), torch.ones(3)]

    assert submergence(hidden, PROFILE, FLAG, (1, 2)) == [0.5, 0.0]


# -- in the shell ----------------------------------------------------------------------------------------------


@pytest.fixture
def batch():
    past = Behaviours(
        torch.zeros(B, 1, dtype=torch.int64),
        torch.zeros(B, 1, 0, dtype=torch.int64),
        torch.ones(B, 1),
        torch.ones(B, 1, dtype=torch.bool),
    )
    item, label = torch.tensor([[0, 1, -1]] * B), torch.tensor([[[1.0], [0.0], [0.0]]] * B)
    return RankingBatch(item, past, PROFILE, label)


def shell(embed, gate=None, trunk=None, tasks=("label",), **settings):
    torch.manual_seed(5)
    config = RankerConfig(hidden=HIDDEN, **settings)
    return Ranker(embed, None, tasks=tasks, config=config, gate=gate, trunk=trunk).eval()


@pytest.mark.parametrize("name", GATES)
def test_a_ranker_begins_as_it_is_without_a_gate_and_learns_to_use_it(name, embed, batch):
    plain = shell(embed)
    gated = shell(embed, lambda embed, widths: GATES[name](embed, widths, (ID,)))
    gated.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(gated(batch), plain(batch))
    gated.loss(batch).sum().backward()
    learnt = {name for name, p in gated.gate.named_parameters() if p.grad is not None and p.grad.any()}
    assert learnt
    disturb(gated.gate)
    unknown = plain(batch)[2].detach() if name == "lhuc" else None  # the third request's id is unknown
    changed = gated(batch)
    assert not torch.allclose(changed[1], plain(batch)[1])
    assert unknown is None or torch.equal(changed[2], unknown)


def test_hidden_layers_are_those_that_the_heads_read(embed, batch):
    ranker = shell(embed, lambda embed, widths: POSO(embed, widths, (FLAG,)))
    disturb(ranker.gate)
    hidden = ranker.hidden(batch)
    assert [h.shape for h in hidden] == [(B * K, width) for width in HIDDEN]
    assert torch.equal(ranker.heads(hidden[-1]).view(B, K, 1), ranker(batch))
    moved = submergence(lambda p: ranker.hidden(batch._replace(profile=p)), PROFILE, FLAG, (1, 2))
    assert min(moved) > 0


def test_a_gate_and_experts_do_not_go_together(embed):
    with pytest.raises(ConfigError, match=r"a gate and 2 experts\. A gate multiplies the layers of one MLP"):
        shell(embed, lambda embed, widths: POSO(embed, widths, (FLAG,)), experts=2)


@pytest.mark.parametrize("name", TRUNKS)
def test_a_trunk_takes_the_mlps_place(name, embed, batch):
    """All of it learns, it hears who asks, and nothing but the vectors of who asks says so."""
    ranker = shell(embed, trunk=lambda *given: TRUNKS[name](*given[:2], (ID,), *given[2:]))
    assert ranker(batch).shape == (B, K, 1)
    ranker.loss(batch).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in ranker.trunk.parameters())
    everyone = [batch._replace(profile=torch.full_like(PROFILE, code)) for code in (1, 2)]
    assert not torch.allclose(*map(ranker, everyone))
    with torch.no_grad():
        for table in [*ranker.trunk.conditions.tables, *embed.profiles]:
            table.weight.zero_()
    torch.testing.assert_close(*map(ranker, everyone))


def test_apgs_trunk_is_its_layers(embed, batch):
    ranker = shell(embed, trunk=lambda *given: APG(*given[:2], (ID,), *given[2:], rank=3))
    disturb(ranker.trunk)
    x_BKW = torch.randn(B, K, ranker.trunk.layers[0].V[-1].shape[1])
    z = ranker.trunk.conditions(PROFILE)
    for b in range(B):
        h = x_BKW[b]
        for layer, between, found in zip(
            ranker.trunk.layers, ranker.trunk.between, ranker.trunk(PROFILE, x_BKW), strict=True
        ):
            matrix = layer.U[0] @ layer.U[1] @ layer.core(z[b]) @ layer.V[0] @ layer.V[1]
            h = between(h @ matrix.T + layer.bias)
            torch.testing.assert_close(found[b], h, rtol=1e-4, atol=1e-4)


def test_m2ms_tasks_read_the_same_experts(embed, batch):
    """Each task by a tower of its own: what is own moves one task's logit alone."""
    ranker = shell(
        embed, trunk=lambda *given: M2M(*given[:2], (ID,), *given[2:]), tasks=("a", "b"), experts=3
    )
    assert len(ranker.trunk.experts) == 3
    before = ranker(batch)
    with torch.no_grad():
        for parameter in ranker.trunk.towers[1].parameters():
            parameter.mul_(1.5)
        ranker.trunk.task[1] += 1.0
    after = ranker(batch)
    assert torch.equal(after[..., 0], before[..., 0])
    assert not torch.allclose(after[..., 1], before[..., 1])
    shared, own = ranker.shared_and_own()
    names = {id(p): name for name, p in ranker.named_parameters()}
    assert {names[id(p)].split(".")[0] for p in own} == {"heads", "trunk"}
    assert {names[id(p)].split(".")[1] for p in own if names[id(p)].startswith("trunk")} == {"task", "towers"}
    assert {names[id(p)].split(".")[1] for p in shared if names[id(p)].startswith("trunk")} == {
        "attention",
        "conditions",
        "experts",
    }


def test_apg_and_experts_do_not_go_together(embed):
    with pytest.raises(ConfigError, match="apg and 2 experts"):
        shell(embed, trunk=lambda *given: APG(*given[:2], (ID,), *given[2:]), experts=2)
