"""Crossing layers: what two or more fields of a request mean together, in date order.

    FM               Rendle, "Factorization Machines", ICDM 2010, eq. 1 and Lemma 3.1
    IPNN, OPNN       Qu et al., "Product-based Neural Networks", ICDM 2016, https://arxiv.org/abs/1611.00144
    DeepFM           Guo et al., IJCAI 2017, https://arxiv.org/abs/1703.04247, eq. 1–4
    DCN              Wang et al., "Deep & Cross Network", ADKDD 2017, https://arxiv.org/abs/1708.05123, eq. 3
    XDeepFM          Lian et al., KDD 2018, https://arxiv.org/abs/1803.05170: the CIN, eq. 6
    AutoInt          Song et al., CIKM 2019, https://arxiv.org/abs/1810.11921, eq. 5–8
    FiBiNET          Huang et al., RecSys 2019, https://arxiv.org/abs/1905.09433, §3.3 and §3.4
    DCNV2            Wang et al., "DCN V2", WWW 2021, https://arxiv.org/abs/2008.13535, eq. 1
    DCNV2LowRank     the same, eq. 2–4

CAN, of 2021, crosses the candidate with each behaviour and is an interest unit: `can.py`.

Each is made for F fields of width D and maps (…, F, D) to (…, width). A layer is for any network; in
`ranker.Ranker` the fields are what the shell embeds for everything else: the features of the candidate, of the
user and of the request, and the interests. `beside` says where a paper joins its layer with the MLP: True, the
output goes to the heads beside the MLP's last layer, which adds the two up to one logit; False, it is input of
the MLP. The shell has the MLP, so that a comparison compares the layers; only DeepFM has a network of its own.

Deviations
- The first-order term w·x of FM and DeepFM is a linear function of the embeddings, not a table of its own.
- FiBiNET uses the same bilinear matrices for raw and for reweighted fields, and with "each" none for the last
  field, which stands on the left of no pair. No other layer adds the wide or linear part of its paper's full model.
- Sizes are for some ten fields: 32 feature maps a layer in the CIN (paper: 100 to 200), two heads of 8 in AutoInt (paper:
  of 32).

Cost of one sample: FM F·D, IPNN and FiBiNET F²·D (FiBiNET ·D for its matrices), OPNN D², DCN F·D a layer,
DCN-V2 (F·D)², its low-rank form F·D·rank·experts, CIN F·H²·D, AutoInt F²·width.

Letters: F fields, D width of a field, H feature maps, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from tiglon.errors import ConfigError, did_you_mean
from tiglon.ranking.ranker import CrossLayer

Bilinear: TypeAlias = Literal["all", "each", "interaction"]


class FM(nn.Module):
    """Σ_f w_f·v_f + Σ_{i<j} ⟨v_i, v_j⟩, the pairs in O(F·D) as ½ Σ_d [(Σ_f v_fd)² − Σ_f v_fd²]."""

    beside = True

    def __init__(self, fields: int, width: int) -> None:
        super().__init__()
        _require_pairs(fields)
        self.width = 1
        self.first_order = nn.Linear(fields * width, 1)

    def forward(self, fields: Tensor) -> Tensor:
        """(…, 1)."""
        return self.first_order(fields.flatten(-2)) + self.pairs(fields)

    @staticmethod
    def pairs(fields: Tensor) -> Tensor:
        """(…, 1), Σ_{i<j} ⟨v_i, v_j⟩."""
        square_of_sum, sum_of_squares = fields.sum(dim=-2).square(), fields.square().sum(dim=-2)
        return 0.5 * (square_of_sum - sum_of_squares).sum(dim=-1, keepdim=True)


class IPNN(nn.Module):
    """The inner product of each of the F(F − 1)/2 pairs of fields."""

    beside = False
    left: Tensor
    right: Tensor

    def __init__(self, fields: int, width: int) -> None:
        super().__init__()
        left, right = _pairs(fields)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)
        self.width = len(left)

    def forward(self, fields: Tensor) -> Tensor:
        """(…, F(F − 1)/2)."""
        return (fields[..., self.left, :] * fields[..., self.right, :]).sum(dim=-1)


class OPNN(nn.Module):
    """Σ_i Σ_j v_i v_jᵀ, the sum of all outer products, as f fᵀ with f = Σ_i v_i."""

    beside = False

    def __init__(self, fields: int, width: int) -> None:
        super().__init__()
        _require_pairs(fields)
        self.width = width * width

    def forward(self, fields: Tensor) -> Tensor:
        """(…, D²)."""
        total = fields.sum(dim=-2)
        return (total[..., :, None] * total[..., None, :]).flatten(-2)


class DeepFM(nn.Module):
    """FM + MLP of the same fields, added up: one embedding serves both."""

    beside = True

    def __init__(self, fields: int, width: int, hidden: Sequence[int] = (64, 32)) -> None:
        super().__init__()
        self.width = 1
        self.fm = FM(fields, width)
        layers: list[nn.Module] = []
        before = fields * width
        for after in hidden:
            layers += [nn.Linear(before, after), nn.ReLU()]
            before = after
        self.deep = nn.Sequential(*layers, nn.Linear(before, 1))

    def forward(self, fields: Tensor) -> Tensor:
        """(…, 1)."""
        return self.fm(fields) + self.deep(fields.flatten(-2))


class DCN(nn.Module):
    """x_{l+1} = x_0 (x_lᵀ w_l) + b_l + x_l: polynomials of degree L + 1 of the fields, end to end."""

    beside = True

    def __init__(self, fields: int, width: int, layers: int = 3) -> None:
        super().__init__()
        _require_pairs(fields)
        self.width = fields * width
        self.weights = nn.ModuleList(nn.Linear(self.width, 1, bias=False) for _ in range(layers))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(self.width)) for _ in range(layers))

    def forward(self, fields: Tensor) -> Tensor:
        """(…, F·D)."""
        x_0 = x = fields.flatten(-2)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = x_0 * weight(x) + bias + x
        return x


class XDeepFM(nn.Module):
    """The Compressed Interaction Network: X^k_h = Σ_i Σ_j W^{k,h}_ij (X^{k−1}_i ∘ X^0_j), pooled by a sum over D.

    Crosses whole vectors: dimension d of every X^k depends on dimension d of the fields alone.
    maps: H_k of each layer; layer k has order k + 1.
    """

    beside = True

    def __init__(self, fields: int, width: int, maps: Sequence[int] = (32, 32)) -> None:
        super().__init__()
        _require_pairs(fields)
        self.width = sum(maps)
        self.layers = nn.ModuleList(
            nn.Linear(before * fields, after, bias=False)
            for before, after in zip([fields, *maps[:-1]], maps, strict=True)
        )

    def maps(self, fields: Tensor) -> list[Tensor]:
        """X^1 … X^L, each (…, H_k, D)."""
        found, x = [], fields
        for layer in self.layers:
            products = x[..., :, None, :] * fields[..., None, :, :]
            x = layer(products.flatten(-3, -2).mT).mT
            found.append(x)
        return found

    def forward(self, fields: Tensor) -> Tensor:
        """(…, Σ_k H_k)."""
        return torch.cat([x.sum(dim=-1) for x in self.maps(fields)], dim=-1)


class AutoInt(nn.Module):
    """Fields attend to fields: relu(softmax(Q Kᵀ) V + W_res x), unscaled, some layers deep."""

    beside = True

    def __init__(self, fields: int, width: int, layers: int = 3, heads: int = 2, head_width: int = 8) -> None:
        super().__init__()
        _require_pairs(fields)
        self.heads, self.width = heads, fields * heads * head_width
        inputs = [width] + [heads * head_width] * (layers - 1)
        self.project = nn.ModuleList(nn.Linear(n, 4 * heads * head_width, bias=False) for n in inputs)

    def attention(self, fields: Tensor) -> list[Tensor]:
        """(…, heads, F, F) of each layer; rows sum to 1."""
        return self._run(fields)[1]

    def forward(self, fields: Tensor) -> Tensor:
        """(…, F · heads · head_width)."""
        return self._run(fields)[0].flatten(-2)

    def _run(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        weights = []
        for project in self.project:
            query, key, value, residual = project(x).chunk(4, dim=-1)
            query, key, value = (
                t.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for t in (query, key, value)
            )
            weights.append((query @ key.mT).softmax(dim=-1))
            x = torch.relu((weights[-1] @ value).transpose(-3, -2).flatten(-2) + residual)
        return x, weights


class FiBiNET(nn.Module):
    """Bilinear products of the fields, v_i W ⊙ v_j, raw and reweighted by SENET.

    bilinear: whose W it is: of "all" pairs one, of "each" left field one, of each "interaction" one.
    reduction: SENET's r; its inner layer has F / r units (paper: 3).
    """

    beside = False
    left: Tensor
    right: Tensor
    of_pair: Tensor

    def __init__(
        self, fields: int, width: int, bilinear: Bilinear = "interaction", reduction: int = 3
    ) -> None:
        super().__init__()
        left, right = _pairs(fields)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)
        self.width = 2 * len(left) * width
        matrix_of_pair = {
            "all": torch.zeros_like(left),
            "each": left,
            "interaction": torch.arange(len(left)),
        }
        if bilinear not in matrix_of_pair:
            raise ConfigError(f"bilinear='{bilinear}'", fix=did_you_mean(bilinear, matrix_of_pair))
        self.register_buffer("of_pair", matrix_of_pair[bilinear], persistent=False)
        inner = max(fields // reduction, 1)
        self.excitation = nn.Sequential(
            nn.Linear(fields, inner, bias=False),
            nn.ReLU(),
            nn.Linear(inner, fields, bias=False),
            nn.ReLU(),
        )
        count = int(self.of_pair.max()) + 1
        self.matrices = nn.Parameter(torch.empty(count, width, width))
        nn.init.normal_(self.matrices, std=width**-0.5)

    def forward(self, fields: Tensor) -> Tensor:
        """(…, 2 · F(F − 1)/2 · D)."""
        reweighted = fields * self.excitation(fields.mean(dim=-1))[..., None]
        return torch.cat([self.products(fields), self.products(reweighted)], dim=-1)

    def products(self, fields: Tensor) -> Tensor:
        """(…, F(F − 1)/2 · D)."""
        left = fields[..., self.left, None, :] @ self.matrices[self.of_pair]
        return (left.squeeze(-2) * fields[..., self.right, :]).flatten(-2)


class DCNV2(nn.Module):
    """x_{l+1} = x_0 ⊙ (W_l x_l + b_l) + x_l: each coordinate is crossed by weights of its own."""

    beside = True

    def __init__(self, fields: int, width: int, layers: int = 3) -> None:
        super().__init__()
        _require_pairs(fields)
        self.width = fields * width
        self.layers = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(layers))

    def forward(self, fields: Tensor) -> Tensor:
        """(…, F·D)."""
        x_0 = x = fields.flatten(-2)
        for layer in self.layers:
            x = x_0 * layer(x) + x
        return x


class DCNV2LowRank(nn.Module):
    """DCN-V2 by a mixture of low-rank experts: x_{l+1} = Σ_i G_i(x_l) E_i(x_l) + x_l with
    E_i(x) = x_0 ⊙ (U_i g(C_i g(V_iᵀ x)) + b) and G a softmax, g = tanh."""

    beside = True

    def __init__(self, fields: int, width: int, layers: int = 3, rank: int = 16, experts: int = 4) -> None:
        super().__init__()
        _require_pairs(fields)
        self.width = n = fields * width
        self.V, self.C, self.U = (
            nn.ParameterList(
                nn.Parameter(torch.randn(experts, *shape) * shape[0] ** -0.5) for _ in range(layers)
            )
            for shape in ((n, rank), (rank, rank), (rank, n))
        )
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(n)) for _ in range(layers))
        self.gates = nn.ModuleList(nn.Linear(n, experts) for _ in range(layers))

    def forward(self, fields: Tensor) -> Tensor:
        """(…, F·D)."""
        x_0 = x = fields.flatten(-2)
        for V, C, U, bias, gate in zip(self.V, self.C, self.U, self.biases, self.gates, strict=True):
            inner = torch.tanh(torch.einsum("...n,enr->...er", x, V))
            inner = torch.tanh(torch.einsum("...er,ers->...es", inner, C))
            inner = inner * gate(x).softmax(dim=-1)[..., None]  # Σ_i G_i = 1, so that b stays whole
            x = x_0 * (torch.einsum("...es,esn->...n", inner, U) + bias) + x
        return x


# fields, width of a field → layer
MakeCross: TypeAlias = Callable[[int, int], CrossLayer]

CROSSES: dict[str, MakeCross] = {
    "fm": FM,
    "ipnn": IPNN,
    "opnn": OPNN,
    "deepfm": DeepFM,
    "dcn": DCN,
    "xdeepfm": XDeepFM,
    "autoint": AutoInt,
    "fibinet": FiBiNET,
    "dcn_v2": DCNV2,
    "dcn_v2_low_rank": DCNV2LowRank,
}


def _require_pairs(fields: int) -> None:
    if fields < 2:
        raise ConfigError(
            f"a crossing layer over {fields} field" + "s" * (fields != 1),
            rule="There is nothing to cross with fewer than two",
            fix="Add a feature, or leave the layer out",
        )


def _pairs(fields: int) -> tuple[Tensor, Tensor]:
    """i and j of every i < j."""
    _require_pairs(fields)
    left, right = torch.triu_indices(fields, fields, offset=1)
    return left, right
