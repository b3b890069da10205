"""Dynamic weights: who asks, and where, decides how a network computes; in date order.

    LHUC     Swietojanski, Li and Renals, "Learning Hidden Unit Contributions", TASLP 2016,
             https://arxiv.org/abs/1601.02828
    POSO     Dai et al., "POSO: Personalized Cold Start Modules for Large-scale Recommender Systems", 2021,
             https://arxiv.org/abs/2108.04690
    M2M      Zhang et al., "Leaving No One Behind: A Multi-Scenario Multi-Task Meta Learning Approach for
             Advertiser Modeling", WSDM 2022, https://arxiv.org/abs/2201.06814
    APG      Yan et al., "APG: Adaptive Parameter Generation Network for Click-Through Rate Prediction",
             NeurIPS 2022, https://arxiv.org/abs/2203.16218
    PEPNet   Chang et al., "PEPNet: Parameter and Embedding Personalized Network", KDD 2023,
             https://arxiv.org/abs/2302.01115: EPNet, PPNet and both

Where a flag "new user" is one input among many and true for one sample in twenty, a network learns to do without
it: `submergence` measures by how much turning it over moves the hidden layers. A gate multiplies instead.

LHUC, POSO, PPNet, EPNet and PEPNet are gates of the shell (`ranker.Ranker`): they give multipliers of the MLP's input
and of its hidden layers. All begin as the network without a gate, to the bit: 2σ(0) = 1. M2M and APG are trunks of the shell:
they take the MLP's place. What either reads stands in the profile, by its column; code 0 is the unknown id, which adds
nothing (it has the vector 0). POSO's other forms are for networks of your own.

Deviations
- POSO's last layer of g begins at zero, so that C·g = 1 from the start; the paper has C = 2.0 for about that.
- PPNet reads the ids' vectors from a table of its own and the candidate's from the shared one; the shell has one
  tower. For several towers pass the widths of their layers, one tower after the other: each entry has a gate.
- The gates' inner layers are `inner` wide; PEPNet does not say how wide its are.
- M2M's non-linearity is LeakyReLU throughout; its scenario is the columns' vectors, without a layer between; the
  shell's M2M reads no sequence, as the interest units do.
- The shell's APG is group-wise: its condition is who asks.

Letters: B requests, K candidates, X profile columns, H width of an item, W width of the MLP's input, P width of
a condition, E experts, T tasks, L positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiglon.errors import ConfigError, DataError
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.ranking.ranker import Gate, RankerConfig
from tiglon.ranking.tasks import mlp

GAMMA = 2.0  # of LHUC, POSO (there C) and PEPNet (there γ)
EXPERTS = 4  # of M2M where the shell says nothing


class Conditions(nn.Module):
    """Profile columns → one vector (B, P), by tables of the gate's own; code 0 is the vector 0."""

    def __init__(self, embed: FeatureEmbedding, columns: Sequence[int], width: int = 8) -> None:
        super().__init__()
        self.columns = _require_columns(embed, columns)
        self.width = width * len(columns)
        self.tables = nn.ModuleList(
            nn.Embedding(embed.profiles[x].num_embeddings, width, padding_idx=0) for x in columns
        )

    def forward(self, profile_BX: Tensor) -> Tensor:
        """(B, P)."""
        parts = [table(profile_BX[:, x]) for x, table in zip(self.columns, self.tables, strict=True)]
        return torch.cat(parts, dim=-1)


class GateNU(nn.Module):
    """2σ(W_2 relu(W_1 x)), 1 everywhere at the start (PEPNet's gate neural unit; POSO's C·g)."""

    def __init__(self, inputs: int, width: int, inner: int = 32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, inner), nn.Linear(inner, width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) in 0 … 2."""
        return GAMMA * torch.sigmoid(self.second(torch.relu(self.first(x))))


# -- LHUC ------------------------------------------------------------------------------------------------------


class LHUC(nn.Module):
    """h ← 2σ(r_s) ⊙ h, with a vector r_s for each hidden layer and value s of one profile column.

    shared: the share of training samples that are taken for the unknown id, which so learns an r_0 of its own
    (the paper's SAT-LHUC); 0 leaves the unknown id the network without a gate.
    """

    def __init__(
        self,
        embed: FeatureEmbedding,
        widths: Sequence[int],
        columns: Sequence[int],
        shared: float = 0.0,
    ) -> None:
        super().__init__()
        if len(columns) != 1:
            raise ConfigError(
                f"LHUC by {len(columns)} columns", rule="It has one vector an id: pass one column"
            )
        if not 0 <= shared < 1:
            raise ConfigError(f"shared={shared}", rule="It is a share of the samples, 0 or above and below 1")
        (self.column,) = _require_columns(embed, columns)
        self.hidden, self.shared = list(widths[1:]), shared
        ids = embed.profiles[self.column].num_embeddings
        self.r = nn.Embedding(ids, sum(self.hidden), padding_idx=None if shared else 0)
        nn.init.zeros_(self.r.weight)

    def forward(self, profile_BX: Tensor, candidate_BKH: Tensor, x_BKW: Tensor) -> list[Tensor]:
        """1, then (B, 1, width) of each hidden layer."""
        code = profile_BX[:, self.column]
        if self.training and self.shared:
            code = torch.where(torch.rand(code.shape) < self.shared, 0, code)
        scale = GAMMA * torch.sigmoid(self.r(code))
        return [scale.new_ones(1), *scale[:, None].split(self.hidden, dim=-1)]


def adapt_only(network: nn.Module, gate: nn.Module) -> list[nn.Parameter]:
    """Freeze all of a network but its gate; the parameters that are left to learn.

    The network is set to read (`eval`), so that no dropout and no running mean changes it. For LHUC, of what is left
    only the rows of the ids in a batch have a gradient: use an optimizer without weight decay.
    """
    network.eval().requires_grad_(False)
    gate.requires_grad_(True)
    return list(gate.parameters())


# -- POSO ------------------------------------------------------------------------------------------------------


class POSO(nn.Module):
    """x̂ = C · g(x^pc) ⊙ σ(W x) at every layer of the MLP; g reads the condition x^pc alone."""

    def __init__(
        self, embed: FeatureEmbedding, widths: Sequence[int], columns: Sequence[int], inner: int = 32
    ) -> None:
        super().__init__()
        self.conditions = Conditions(embed, columns)
        self.gates = nn.ModuleList(GateNU(self.conditions.width, width, inner) for width in widths[1:])

    def forward(self, profile_BX: Tensor, candidate_BKH: Tensor, x_BKW: Tensor) -> list[Tensor]:
        """1, then (B, 1, width) of each hidden layer."""
        pc_B1P = self.conditions(profile_BX)[:, None]
        return [x_BKW.new_ones(1), *(gate(pc_B1P) for gate in self.gates)]


class PosoMMoE(nn.Module):
    """x̂^t = C Σ_i g_i(x^pc) g_i^t(x) e_i(x): experts weighed by task, and by who asks."""

    def __init__(self, inputs: int, width: int, experts: int, tasks: int, condition: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(inputs, width) for _ in range(experts))
        self.of_task = nn.ModuleList(nn.Linear(inputs, experts) for _ in range(tasks))
        self.gate = GateNU(condition, experts)

    def forward(self, x: Tensor, pc: Tensor) -> Tensor:
        """(…, inputs), (…, P) → (…, T, width)."""
        found = torch.relu(torch.stack([expert(x) for expert in self.experts], dim=-2))
        of_task = torch.stack([gate(x).softmax(dim=-1) for gate in self.of_task], dim=-2)
        return (of_task * self.gate(pc)[..., None, :]) @ found


class PosoAttention(nn.Module):
    """Multi-head attention whose values are gated one by one, whose keys by position, and whose queries are not.

    length: positions at most.
    """

    def __init__(self, width: int, heads: int, length: int, condition: int) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"width={width}, heads={heads}", rule="Heads divide the width")
        self.heads, self.length = heads, length
        self.project = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(3))
        self.of_key, self.of_value = GateNU(condition, length), GateNU(condition, width)

    def forward(self, query_BKD: Tensor, x_BLD: Tensor, pc_BP: Tensor, mask_BL: Tensor) -> Tensor:
        """(B, K, width); zeros where nothing may be read. Raises DataError for more than `length` positions."""
        L, most = x_BLD.shape[1], self.length
        if most < L:
            raise DataError(f"{L} positions", rule=f"This layer gates {most}", fix="Pass a larger length=")
        to_query, to_key, to_value = self.project
        key_BLD = to_key(x_BLD) * self.of_key(pc_BP)[:, :L, None]
        value_BLD = to_value(x_BLD) * self.of_value(pc_BP)[:, None]
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (to_query(query_BKD), key_BLD, value_BLD)
        )
        found = F.scaled_dot_product_attention(query, key, value, mask_BL[:, None, None])
        readable = mask_BL.any(dim=-1)[:, None, None]
        return torch.where(readable, found.transpose(1, 2).flatten(-2), 0.0)


# -- M2M -------------------------------------------------------------------------------------------------------


class MetaUnit(nn.Module):
    """K layers h ← act(W h + b) whose W and b are linear functions of the scenario s̃."""

    def __init__(self, scenario: int, width: int, layers: int = 1) -> None:
        super().__init__()
        self.width = width
        self.weights = nn.ModuleList(nn.Linear(scenario, width * width) for _ in range(layers))
        self.biases = nn.ModuleList(nn.Linear(scenario, width) for _ in range(layers))

    def forward(self, h: Tensor, s: Tensor) -> Tensor:
        """(…, width), (…, P) → (…, width)."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            W = weight(s).unflatten(-1, (self.width, self.width))
            h = F.leaky_relu(torch.einsum("...ij,...j->...i", W, h) + bias(s))
        return h


class MetaAttention(nn.Module):
    """A task weighs the experts by the scenario: softmax_e vᵀ Meta([E_e | T_t])."""

    def __init__(self, scenario: int, width: int, layers: int = 1) -> None:
        super().__init__()
        self.meta = MetaUnit(scenario, 2 * width, layers)
        self.v = nn.Linear(2 * width, 1, bias=False)

    def weights(self, expert: Tensor, task: Tensor, s: Tensor) -> Tensor:
        """(…, E, width), (…, width), (…, P) → (…, E), which sum to 1."""
        pairs = torch.cat([expert, task[..., None, :].expand_as(expert)], dim=-1)
        return self.v(self.meta(pairs, s[..., None, :])).squeeze(-1).softmax(dim=-1)

    def forward(self, expert: Tensor, task: Tensor, s: Tensor) -> Tensor:
        """(…, width)."""
        return (self.weights(expert, task, s)[..., None, :] @ expert).squeeze(-2)


class MetaTower(nn.Module):
    """Residual layers of a task: h ← act(Meta(h) + h)."""

    def __init__(self, scenario: int, width: int, layers: int = 2) -> None:
        super().__init__()
        self.units = nn.ModuleList(MetaUnit(scenario, width) for _ in range(layers))

    def forward(self, h: Tensor, s: Tensor) -> Tensor:
        """(…, width), (…, P) → (…, width)."""
        for unit in self.units:
            h = F.leaky_relu(unit(h, s) + h)
        return h


class M2M(nn.Module):
    """The trunk: experts, which a task weighs by the scenario, and its tower of the scenario."""

    by_task = True

    def __init__(
        self,
        embed: FeatureEmbedding,
        widths: Sequence[int],
        columns: Sequence[int],
        tasks: int,
        config: RankerConfig,
    ) -> None:
        super().__init__()
        self.conditions = Conditions(embed, columns)
        inputs, *hidden = widths
        width, scenario = widths[-1], self.conditions.width
        self.experts = nn.ModuleList(
            mlp(inputs, hidden, config.dropout) for _ in range(config.experts or EXPERTS)
        )
        self.attention = MetaAttention(scenario, width)
        self.task = nn.Parameter(torch.randn(tasks, width) * width**-0.5)
        self.towers = nn.ModuleList(MetaTower(scenario, width) for _ in range(tasks))

    def forward(self, profile_BX: Tensor, x_BKW: Tensor) -> list[Tensor]:
        """(B, K, T, width) alone."""
        s_B1P = self.conditions(profile_BX)[:, None]
        said = torch.stack([expert(x_BKW.flatten(0, 1)) for expert in self.experts], dim=-2)
        expert = said.unflatten(0, x_BKW.shape[:2])
        found = [
            tower(self.attention(expert, task.expand(*x_BKW.shape[:-1], -1), s_B1P), s_B1P)
            for task, tower in zip(self.task, self.towers, strict=True)
        ]
        return [torch.stack(found, dim=-2)]

    def own(self) -> list[nn.Parameter]:
        """The tasks' vectors and towers."""
        return [self.task, *self.towers.parameters()]


# -- APG -------------------------------------------------------------------------------------------------------


class APGLinear(nn.Module):
    """W_i x = U S_i V x, with S_i of rank R made from the condition z_i, never as one matrix.

    z: the input itself (self-wise), who asks (group-wise), or both end to end (mix-wise).
    over: P of U = U^l U^r and V = V^l V^r, wider than R so that they learn better; None has U and V alone.
    """

    def __init__(
        self, inputs: int, width: int, condition: int, rank: int, over: int | None = None, inner: int = 32
    ) -> None:
        super().__init__()
        if min(inputs, width, rank) < 1 or (over is not None and over < rank):
            raise ConfigError(f"rank={rank}, over={over}", rule="rank is at least 1, and over at least rank")
        self.rank = rank
        self.U = _chain(width, over, rank)
        self.V = _chain(rank, over, inputs)
        self.bias = nn.Parameter(torch.zeros(width))
        last = nn.Linear(inner, rank * rank)
        self.make = nn.Sequential(nn.Linear(condition, inner), nn.ReLU(), last)
        nn.init.normal_(last.weight, std=0.1 * inner**-0.5)
        with torch.no_grad():
            last.bias.copy_(torch.eye(rank).flatten())

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """(…, inputs), (…, P) → (…, width)."""
        inner = torch.einsum("...ij,...j->...i", self.core(z), x @ _product(self.V).T)
        return inner @ _product(self.U).T + self.bias

    def core(self, z: Tensor) -> Tensor:
        """S: (…, R, R)."""
        return self.make(z).unflatten(-1, (self.rank, self.rank))

    @torch.no_grad()
    def merge(self) -> APGLinear:
        """Multiply the over-parameterised factors out, for serving; the same function."""
        self.U, self.V = (nn.ParameterList([nn.Parameter(_product(chain))]) for chain in (self.U, self.V))
        return self


class APG(nn.Module):
    """The trunk: an MLP of layers U S V whose S is made for who asks; factors twice as wide as its rank.

    rank: of every layer, at most.   Raises ConfigError for experts, which have their layers apart.
    """

    by_task = False

    def __init__(
        self,
        embed: FeatureEmbedding,
        widths: Sequence[int],
        columns: Sequence[int],
        tasks: int,
        config: RankerConfig,
        rank: int = 32,
    ) -> None:
        super().__init__()
        if config.experts:
            raise ConfigError(
                f"apg and {config.experts} experts", rule="It makes one MLP", fix="Set experts=0"
            )
        self.conditions = Conditions(embed, columns)
        self.layers, self.between = nn.ModuleList(), nn.ModuleList()
        for inputs, width in pairwise(widths):
            r = min(rank, inputs, width)
            self.layers.append(APGLinear(inputs, width, self.conditions.width, r, over=2 * r))
            self.between.append(nn.Sequential(nn.PReLU(width, init=0.25), nn.Dropout(config.dropout)))

    def forward(self, profile_BX: Tensor, x_BKW: Tensor) -> list[Tensor]:
        """(B, K, width) of each hidden layer."""
        z_B1P, found = self.conditions(profile_BX)[:, None], [x_BKW]
        for layer, between in zip(self.layers, self.between, strict=True):
            h = layer(found[-1], z_B1P)
            found.append(between(h.flatten(0, 1)).unflatten(0, h.shape[:2]))
        return found[1:]

    def own(self) -> list[nn.Parameter]:
        """Nothing: all tasks read all of it."""
        return []


def _chain(rows: int, over: int | None, columns: int) -> nn.ParameterList:
    sizes = [rows, columns] if over is None else [rows, over, columns]
    return nn.ParameterList(nn.Parameter(torch.randn(a, b) * b**-0.5) for a, b in pairwise(sizes))


def _product(chain: nn.ParameterList) -> Tensor:
    """The factors as one matrix."""
    first, *rest = chain
    for factor in rest:
        first = first @ factor
    return first


# -- PEPNet ----------------------------------------------------------------------------------------------------


class EPNet(nn.Module):
    """O = U_ep([E(domain), sg(E)]) ⊙ E: the MLP's input for this domain. sg stops the gradient."""

    def __init__(
        self, embed: FeatureEmbedding, widths: Sequence[int], columns: Sequence[int], inner: int = 32
    ) -> None:
        super().__init__()
        self.conditions = Conditions(embed, columns)
        self.gate = GateNU(self.conditions.width + widths[0], widths[0], inner)
        self.hidden = len(widths) - 1

    def forward(self, profile_BX: Tensor, candidate_BKH: Tensor, x_BKW: Tensor) -> list[Tensor]:
        """(B, K, W), then 1 for each hidden layer."""
        domain_BKP = self.conditions(profile_BX)[:, None].expand(*x_BKW.shape[:-1], -1)
        scale = self.gate(torch.cat([domain_BKP, x_BKW.detach()], dim=-1))
        return [scale, *[scale.new_ones(1)] * self.hidden]


class PPNet(nn.Module):
    """δ^l = U_pp([E(ids), sg(O)]) for every hidden layer l; the ids are the columns' and the candidate's."""

    def __init__(
        self, embed: FeatureEmbedding, widths: Sequence[int], columns: Sequence[int], inner: int = 32
    ) -> None:
        super().__init__()
        self.conditions = Conditions(embed, columns)
        inputs = self.conditions.width + embed.inherent_width + widths[0]
        self.gates = nn.ModuleList(GateNU(inputs, width, inner) for width in widths[1:])

    def forward(self, profile_BX: Tensor, candidate_BKH: Tensor, x_BKW: Tensor) -> list[Tensor]:
        """1, then (B, K, width) of each hidden layer."""
        who_BKP = self.conditions(profile_BX)[:, None].expand(*x_BKW.shape[:-1], -1)
        prior = torch.cat([who_BKP, candidate_BKH, x_BKW.detach()], dim=-1)
        return [x_BKW.new_ones(1), *(gate(prior) for gate in self.gates)]


class PEPNet(nn.Module):
    """EPNet on the input, and PPNet, which reads what EPNet made of it, on the hidden layers."""

    def __init__(
        self, embed: FeatureEmbedding, widths: Sequence[int], columns: Sequence[int], inner: int = 32
    ) -> None:
        super().__init__()
        self.embeddings = EPNet(embed, widths, columns, inner)
        self.parameters_of = PPNet(embed, widths, columns, inner)

    def forward(self, profile_BX: Tensor, candidate_BKH: Tensor, x_BKW: Tensor) -> list[Tensor]:
        """(B, K, W), then (B, K, width) of each hidden layer."""
        scale = self.embeddings(profile_BX, candidate_BKH, x_BKW)[0]
        return [scale, *self.parameters_of(profile_BX, candidate_BKH, scale * x_BKW)[1:]]


# -- what a flag does ------------------------------------------------------------------------------------------


@torch.inference_mode()
def submergence(
    hidden: Callable[[Tensor], Sequence[Tensor]], profile_BX: Tensor, column: int, codes: tuple[int, int]
) -> list[float]:
    """By how much a network moves if a flag is turned over and all else stays: mean |h − h'| / mean |h|, layer by layer.

    hidden: profile codes → hidden layers, such as `lambda profile: ranker.hidden(batch._replace(profile=profile))`.
    column: of the flag.   codes: its two values. Near 0, the flag is submerged.
    """
    first, second = (profile_BX.clone(), profile_BX.clone())
    first[:, column], second[:, column] = codes
    return [
        ((a - b).abs().mean() / a.abs().mean().clamp(min=1e-12)).item()
        for a, b in zip(hidden(first), hidden(second), strict=True)
    ]


# the shell's embedding, widths of the MLP's input and hidden layers, profile columns → gate
MakeGate: TypeAlias = Callable[[FeatureEmbedding, Sequence[int], Sequence[int]], Gate]

GATES: dict[str, MakeGate] = {"lhuc": LHUC, "poso": POSO, "epnet": EPNet, "ppnet": PPNet, "pepnet": PEPNet}

# the same, number of tasks and the shell's settings → what takes the MLP's place
MakeTrunk: TypeAlias = Callable[
    [FeatureEmbedding, Sequence[int], Sequence[int], int, RankerConfig], nn.Module
]

TRUNKS: dict[str, MakeTrunk] = {"m2m": M2M, "apg": APG}


def _require_columns(embed: FeatureEmbedding, columns: Sequence[int]) -> list[int]:
    count = len(embed.profiles)
    if not columns or not all(0 <= x < count for x in columns):
        raise ConfigError(
            f"a gate by the profile columns {list(columns)}",
            rule=f"It reads at least one, and there are {count}",
            fix="Give the schema a user or context feature that says who asks",
        )
    return list(columns)
