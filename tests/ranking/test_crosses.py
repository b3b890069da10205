import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from tiglon.errors import ConfigError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.crosses import (
    CROSSES,
    DCN,
    DCNV2,
    FM,
    IPNN,
    OPNN,
    AutoInt,
    DCNV2LowRank,
    DeepFM,
    FiBiNET,
    XDeepFM,
)
from tiglon.ranking.pooling import MeanPooling
from tiglon.ranking.ranker import Ranker, RankerConfig
from tiglon.types import Behaviours, RankingBatch

F, D = 5, 4
PAIRS = list(itertools.combinations(range(F), 2))


@pytest.fixture
def fields():
    torch.manual_seed(0)
    return torch.randn(3, 2, F, D)


def inner(fields, i, j):
    return (fields[..., i, :] * fields[..., j, :]).sum(-1)


# -- what every layer promises -----------------------------------------------------------------------------


@pytest.fixture(params=CROSSES)
def layer(request):
    torch.manual_seed(1)
    return CROSSES[request.param](F, D).eval()


def test_fields_become_as_many_numbers_as_it_says(layer, fields):
    assert layer(fields).shape == (3, 2, layer.width)
    assert layer(fields[0, 0]).shape == (layer.width,)
    assert isinstance(layer.beside, bool)


def test_each_sample_is_read_alone(layer, fields):
    with torch.inference_mode():
        torch.testing.assert_close(layer(fields)[1, 1], layer(fields[1, 1]))


def test_every_field_and_every_parameter_learns(layer, fields):
    fields = fields.requires_grad_()
    layer(fields).square().sum().backward()
    assert (fields.grad.abs().sum(dim=(0, 1, 3)) > 0).all()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_numbers_stay_finite_where_there_is_nothing(layer, fields):
    assert layer(torch.zeros_like(fields)).isfinite().all()


def test_one_field_has_nothing_to_cross(layer):
    with pytest.raises(ConfigError, match=r"a crossing layer over 1 field.*fewer than two.*Add a feature"):
        type(layer)(1, D)


# -- one by one ----------------------------------------------------------------------------------------------


def test_fm_is_the_double_loop(fields):
    model = FM(F, D)
    linear = fields.flatten(-2) @ model.first_order.weight[0] + model.first_order.bias
    torch.testing.assert_close(model(fields).squeeze(-1), linear + sum(inner(fields, i, j) for i, j in PAIRS))


def test_ipnn_has_each_pair_once(fields):
    found = IPNN(F, D)(fields)
    assert found.shape[-1] == F * (F - 1) // 2
    for n, (i, j) in enumerate(PAIRS):
        torch.testing.assert_close(found[..., n], inner(fields, i, j))


def test_opnn_sums_all_outer_products(fields):
    explicit = sum(fields[..., i, :, None] * fields[..., j, None, :] for i in range(F) for j in range(F))
    torch.testing.assert_close(OPNN(F, D)(fields), explicit.flatten(-2))


def test_deepfm_without_its_network_is_fm(fields):
    model = DeepFM(F, D)
    for parameter in model.deep.parameters():
        nn.init.zeros_(parameter)
    torch.testing.assert_close(model(fields), model.fm(fields))


def test_deepfm_has_one_embedding():
    """Both halves send their gradient to the same vectors, and the layer keeps none of its own."""
    fields = torch.randn(F, D, requires_grad=True)
    model = DeepFM(F, D)
    assert not [m for m in model.modules() if isinstance(m, nn.Embedding)]
    (of_sum,) = torch.autograd.grad(model(fields).sum(), fields)
    (of_fm,) = torch.autograd.grad(model.fm(fields).sum(), fields)
    (of_deep,) = torch.autograd.grad(model.deep(fields.flatten()).sum(), fields)
    torch.testing.assert_close(of_sum, of_fm + of_deep)


def test_dcn_without_biases_scales_its_input(fields):
    found, x_0 = DCN(F, D)(fields), fields.flatten(-2)
    ratio = found / x_0
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [DCN, DCNV2])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_each_cross_layer_raises_the_degree_by_one(make, layers):
    """Along a ray t·x the output is a polynomial in t of degree layers + 1: one more difference is zero."""
    torch.manual_seed(2)
    model, x = make(F, D, layers=layers).double(), torch.randn(F, D, dtype=torch.float64)
    with torch.no_grad():
        along = torch.stack([model(t * x) for t in range(1, layers + 4)]).numpy()
    assert np.abs(np.diff(along, layers + 2, axis=0)).max() < 1e-8
    assert np.abs(np.diff(along, layers + 1, axis=0)).max() > 1e-4


def test_dcn_v2_with_rows_alike_is_dcn(fields):
    """W = 1 wᵀ."""
    old, new = DCN(F, D, layers=2), DCNV2(F, D, layers=2)
    with torch.no_grad():
        for weight, layer in zip(old.weights, new.layers, strict=True):
            layer.weight.copy_(weight.weight.expand(F * D, -1))
            layer.bias.zero_()
    torch.testing.assert_close(new(fields), old(fields))


def test_low_rank_is_its_formula(fields):
    torch.manual_seed(3)
    model = DCNV2LowRank(F, D, layers=1, rank=3, experts=2)
    with torch.no_grad():
        model.biases[0].normal_()
        x = fields.flatten(-2)
        gate = model.gates[0](x).softmax(-1)
        expected = x.clone()
        for e in range(2):
            V, C, U = (getattr(model, name)[0][e] for name in "VCU")
            expert = x * (torch.tanh(torch.tanh(x @ V) @ C) @ U + model.biases[0])
            expected += gate[..., e, None] * expert
        torch.testing.assert_close(model(fields), expected)


def test_low_rank_has_fewer_parameters():
    def count(model):
        return sum(p.numel() for p in model.parameters())

    assert count(DCNV2LowRank(20, 16, experts=1)) < count(DCNV2(20, 16)) / 5


def test_the_cin_is_its_formula(fields):
    model = XDeepFM(F, D, maps=(3, 2))
    first, second = model.maps(fields)
    W = model.layers[1].weight.unflatten(-1, (3, F))
    for h in range(2):
        explicit = sum(W[h, i, j] * first[..., i, :] * fields[..., j, :] for i in range(3) for j in range(F))
        torch.testing.assert_close(second[..., h, :], explicit)
    torch.testing.assert_close(model(fields), torch.cat([first, second], dim=-2).sum(-1))


def test_the_cin_crosses_whole_vectors(fields):
    """Dimensions in another order give the same maps in that order, and the same output."""
    model, order = XDeepFM(F, D), torch.tensor([2, 0, 3, 1])
    for ours, theirs in zip(model.maps(fields[..., order]), model.maps(fields), strict=True):
        torch.testing.assert_close(ours, theirs[..., order])
    torch.testing.assert_close(model(fields[..., order]), model(fields))


def test_a_cin_of_one_map_of_ones_is_fm(fields):
    """Twice the pairs, and the squares."""
    model = XDeepFM(F, D, maps=(1,))
    nn.init.ones_(model.layers[0].weight)
    expected = 2 * FM.pairs(fields) + fields.square().sum((-1, -2))[..., None]
    torch.testing.assert_close(model(fields), expected)


def test_autoint_shares_its_attention_out(fields):
    model = AutoInt(F, D, layers=2)
    for weight in model.attention(fields):
        assert weight.shape == (3, 2, 2, F, F)
        torch.testing.assert_close(weight.sum(-1), torch.ones(3, 2, 2, F))


def test_autoint_is_its_formula(fields):
    model = AutoInt(F, D, layers=1, heads=2, head_width=3)
    query, key, value, residual = (W.T for W in model.project[0].weight.chunk(4))
    heads = []
    for h in range(2):
        q, k, v = (fields @ W[:, 3 * h : 3 * h + 3] for W in (query, key, value))
        heads.append((q @ k.mT).softmax(-1) @ v)
    expected = torch.relu(torch.cat(heads, dim=-1) + fields @ residual)
    torch.testing.assert_close(model(fields), expected.flatten(-2))


def test_autoint_treats_fields_alike(fields):
    """Fields in another order give the same vectors in that order: no field has weights of its own."""
    model, order = AutoInt(F, D), torch.tensor([3, 1, 4, 0, 2])
    ours, theirs = (model(x).unflatten(-1, (F, -1)) for x in (fields[..., order, :], fields))
    torch.testing.assert_close(ours, theirs[..., order, :])


@pytest.mark.parametrize("bilinear, matrices", [("all", 1), ("each", F - 1), ("interaction", len(PAIRS))])
def test_fibinets_matrices(fields, bilinear, matrices):
    """As many as the type says; identities give the Hadamard product of each pair."""
    model = FiBiNET(F, D, bilinear)
    assert model.matrices.numel() == matrices * D * D
    with torch.no_grad():
        model.matrices.copy_(torch.eye(D))
    expected = torch.cat([fields[..., i, :] * fields[..., j, :] for i, j in PAIRS], dim=-1)
    torch.testing.assert_close(model.products(fields), expected)


def test_fibinet_takes_the_matrix_of_the_left_field(fields):
    model = FiBiNET(F, D, "each")
    found = model.products(fields).unflatten(-1, (len(PAIRS), D))
    for n, (i, j) in enumerate(PAIRS):
        torch.testing.assert_close(
            found[..., n, :], fields[..., i, :] @ model.matrices[i] * fields[..., j, :]
        )


def test_fibinet_reweighs_fields_by_their_means(fields):
    """SENET: a weight a field, from the means alone; its half of the output is of reweighted fields."""
    model = FiBiNET(F, D)
    raw, reweighted = model(fields).chunk(2, dim=-1)
    torch.testing.assert_close(raw, model.products(fields))
    weight = torch.relu(model.excitation[2](torch.relu(model.excitation[0](fields.mean(-1)))))
    torch.testing.assert_close(reweighted, model.products(fields * weight[..., None]))


def test_an_unknown_bilinear_is_named():
    with pytest.raises(ConfigError, match=r"bilinear='eech'\. Did you mean 'each'?"):
        FiBiNET(F, D, "eech")


# -- which order a layer reaches -----------------------------------------------------------------------------

VALUES = 6  # binary fields, of which the first `order` matter


def world(order, seed, rows=4_000):
    """A pure interaction: the label is the parity of `order` fields; fewer of them tell nothing."""
    x = np.random.default_rng(seed).integers(0, 2, (rows, VALUES))
    return torch.from_numpy(x), torch.from_numpy(x[:, :order].sum(1) % 2).float()


def auc_of(make, order, steps=60):
    """On fresh rows, after training an embedding of every value, the layer and a linear head."""
    torch.manual_seed(0)
    table = nn.Embedding(2 * VALUES, D)
    nn.init.normal_(table.weight, std=0.7)
    cross = make(VALUES, D)
    head = nn.Linear(cross.width, 1)
    place = 2 * torch.arange(VALUES)
    parameters = [*table.parameters(), *cross.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, 0.05, fused=True)
    x, y = world(order, 0)
    for step in range(steps):
        rows = slice(250 * (step % 16), 250 * (step % 16) + 250)
        logit = head(cross(table(x[rows] + place))).squeeze(-1)
        loss = nn.functional.binary_cross_entropy_with_logits(logit, y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, y = world(order, 1)
    with torch.no_grad():
        return roc_auc_score(y, head(cross(table(x + place))).squeeze(-1))


@pytest.mark.parametrize(
    "make",
    [FM, IPNN, OPNN, lambda f, d: DCN(f, d, layers=1), lambda f, d: DCNV2(f, d, layers=1), lambda f, d: XDeepFM(f, d, (8,))],
    ids=["FM", "IPNN", "OPNN", "DCN, 1 layer", "DCN-V2, 1 layer", "CIN, 1 layer"],
)  # fmt: skip
def test_order_two_learns_pairs_and_nothing_of_triples(make):
    assert auc_of(make, 2) > 0.98
    assert abs(auc_of(make, 3) - 0.5) < 0.06


@pytest.mark.parametrize(
    "make",
    [lambda f, d: DCN(f, d, layers=2), lambda f, d: DCNV2(f, d, layers=2), lambda f, d: XDeepFM(f, d, (8, 8))],
    ids=["DCN", "DCN-V2", "CIN"],
)  # fmt: skip
def test_two_layers_learn_triples(make):
    assert auc_of(make, 3) > 0.98


# -- in the shell ----------------------------------------------------------------------------------------------


def shell(make=None, **settings):
    torch.manual_seed(0)
    codes = np.array([[1, 1], [2, 1], [3, 2], [0, 0]])
    embed = FeatureEmbedding(codes, (4, 3), (6, 4), (), (5,))
    config = RankerConfig(hidden=(8,), field_width=D, **settings)
    return Ranker(embed, MeanPooling(embed), tasks=("click", "like"), config=config, cross=make).eval()


@pytest.fixture
def batch():
    item = torch.tensor([[0, 2], [1, -1]])
    nothing = torch.zeros(2, 2, 0, dtype=torch.int64)
    past = Behaviours(item, nothing, torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool))
    return RankingBatch(item, past, torch.tensor([[1], [4]]), torch.ones(2, 2, 2))


@pytest.mark.parametrize("name", CROSSES)
@pytest.mark.parametrize("settings", [{}, {"experts": 2, "tower": (3,)}], ids=["plain", "MMoE"])
def test_a_layer_joins_the_shell(name, settings, batch):
    """It reads two features of the item, one of the user and one interest, and all of them learn from it."""
    ranker = shell(CROSSES[name], **settings)
    assert ranker(batch).shape == (2, 2, 2)
    assert len(ranker.fields) == 4
    ranker.loss(batch).sum().backward()
    assert all(project.weight.grad.any() for project in ranker.fields)
    plain = shell(None, **settings)

    def inputs(part):
        return next(m.in_features for m in part.modules() if isinstance(m, nn.Linear))

    bottom = [r.trunk.experts if settings else r.trunk for r in (ranker, plain)]
    wider = [inputs(a) - inputs(b) for a, b in (bottom, (ranker.heads, plain.heads))]
    assert wider == ([0, ranker.cross.width] if ranker.cross.beside else [ranker.cross.width, 0])


def test_fm_in_the_shell_crosses_its_fields(batch):
    """The logit is linear in the MLP's last layer and in the FM of the projected fields."""
    ranker = shell(FM)
    embed, found = ranker.embed, ranker.long(ranker.embed, batch.item, batch.past).vector
    values = [table(embed.item_codes[batch.item][..., f]) for f, table in enumerate(embed.items)]
    values += [embed.profile(batch.profile)[:, None].expand(2, 2, -1), found]
    fields = [project(value) for project, value in zip(ranker.fields, values, strict=True)]
    pairs = sum((a * b).sum(-1) for a, b in itertools.combinations(fields, 2))
    linear = torch.cat(fields, -1) @ ranker.cross.first_order.weight[0] + ranker.cross.first_order.bias
    last = torch.cat([ranker.hidden(batch)[-1].view(2, 2, -1), (pairs + linear)[..., None]], -1)
    torch.testing.assert_close(ranker(batch), ranker.heads(last))
