"""What several tasks share in a ranker, and what each has of its own.

    shared bottom   Caruana: Multitask Learning. Machine Learning 28, 1997.   y_t = h_t(f(x))
    MMoE            Ma et al.: Modeling Task Relationships in Multi-task Learning with Multi-gate
                    Mixture-of-Experts. KDD 2018, doi:10.1145/3219819.3220007, eq. 5 … 7.
                    y_t = h_t(Σ_e g_t(x)_e f_e(x)),   g_t(x) = softmax(W_t x)

The bottom f is the shell's MLP; MMoE has one such MLP an expert. A tower h_t is an MLP that ends in one number,
and without hidden layers a linear one: T of these are the shell's plain heads.

Deviations: the experts have the shell's PReLU rather than ReLU.

Letters: n candidates, T tasks, E experts, W width of an input, D width of an expert's output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mlp(width: int, hidden: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """(…, width) → (…, last of `hidden`); nothing at all without hidden layers."""
    layers: list[nn.Module] = []
    for wide in hidden:
        layers += [nn.Linear(width, wide), nn.PReLU(wide, init=0.25), nn.Dropout(dropout)]
        width = wide
    return nn.Sequential(*layers)


class MMoE(nn.Module):
    """(n, W) → (n, T, D): for each task its own mixture of what the experts say."""

    def __init__(
        self, width: int, tasks: int, experts: int, hidden: Sequence[int], dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(mlp(width, hidden, dropout) for _ in range(experts))
        self.gates = nn.ModuleList(nn.Linear(width, experts, bias=False) for _ in range(tasks))

    def forward(self, x_nW: Tensor) -> Tensor:
        said_nED = torch.stack([expert(x_nW) for expert in self.experts], dim=1)
        gate_nTE = torch.stack([gate(x_nW) for gate in self.gates], dim=1).softmax(dim=-1)
        return gate_nTE @ said_nED

    def own(self) -> list[nn.Parameter]:
        """What one task alone reads."""
        return [*self.gates.parameters()]


class Towers(nn.Module):
    """(n, D), the same for all tasks, or (n, T, D) → (n, T): a tower a task."""

    def __init__(self, width: int, tasks: int, hidden: Sequence[int] = (), dropout: float = 0.0) -> None:
        super().__init__()
        last = hidden[-1] if hidden else width
        self.towers = nn.ModuleList(
            nn.Sequential(*mlp(width, hidden, dropout), nn.Linear(last, 1)) for _ in range(tasks)
        )

    def forward(self, x: Tensor) -> Tensor:
        read = x.unbind(dim=1) if x.dim() == 3 else [x] * len(self.towers)
        return torch.cat([tower(part) for tower, part in zip(self.towers, read, strict=True)], dim=1)
