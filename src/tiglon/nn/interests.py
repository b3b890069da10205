"""Several interests a user: capsules by dynamic routing, what reads them out, what keeps them apart.

Capsules and routing: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", NIPS 2017,
https://arxiv.org/abs/1710.09829. Their use on behaviours, label-aware attention: MIND, Li et al., CIKM 2019,
https://arxiv.org/abs/1904.08030. Disagreement: Li et al., "Multi-Head Attention with Disagreement
Regularization", EMNLP 2018, https://arxiv.org/abs/1810.10183.

Letters: B users, K interests, L history, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiglon.nn.transformer import HIDDEN

_TINY = 1e-9  # keeps the derivative of a length finite at 0


def squash(x: Tensor, power: float = 1.0) -> Tensor:
    """(‖x‖² / (1 + ‖x‖²))^power · x / ‖x‖ along the last axis: below length 1, the more so the higher `power`.

    power: 1 is Sabour et al.'s eq. 1; 0 gives length 1.
    """
    squared = x.square().sum(dim=-1, keepdim=True) + _TINY
    return x * (squared / (1 + squared)) ** power * squared.rsqrt()


def route(
    votes_BKLD: Tensor, logits_BKL: Tensor, mask_BL: Tensor, present_BK: Tensor, iterations: int, power: float
) -> tuple[Tensor, Tensor]:
    """Capsules (B, K, D) and the weights (B, K, L) that made them, by `iterations` rounds of routing.

    votes: what each behaviour says of each interest; K may be 1, where it says the same of all.
    logits: where the weights begin.   mask: which behaviours there are.   present: which interests.

    In each round a behaviour divides itself among the interests (a softmax over K), a capsule is the squashed
    sum of what it got, and behaviours that agree with it are drawn to it. Only the last round has a gradient.
    """
    absent = ~present_BK[:, :, None]
    fixed = votes_BKLD.detach()
    for left in reversed(range(iterations)):
        weight_BKL = logits_BKL.masked_fill(absent, HIDDEN).softmax(dim=1) * mask_BL[:, None]
        votes = fixed if left else votes_BKLD
        if votes.shape[1] == 1:
            capsule_BKD = squash(weight_BKL @ votes[:, 0], power)
        else:
            capsule_BKD = squash((weight_BKL[:, :, None] @ votes)[:, :, 0], power)
        if left:
            logits_BKL = logits_BKL + (votes @ capsule_BKD[..., None])[..., 0]
    return capsule_BKD, weight_BKL


def label_aware(interests_BKD: Tensor, present_BK: Tensor, target_BD: Tensor, power: float) -> Tensor:
    """(B, D): the interests, mixed by softmax(s^power), s being their products with the target (MIND's eq. 8).

    s^power keeps the sign of s: s·|s|^(power − 1), so that a better fit always weighs more. 0 is the mean;
    infinity takes the best interest alone, and only that one gets a gradient.
    """
    score_BK = (interests_BKD @ target_BD[..., None])[..., 0].float()
    if math.isinf(power):
        best = score_BK.masked_fill(~present_BK, HIDDEN).argmax(dim=1)
        return interests_BKD[torch.arange(len(best)), best]
    most = 1e30 ** (1 / max(power, 1))  # whose power float32 still holds
    score_BK = score_BK.clamp(-most, most)
    if power == 0:
        raised = torch.zeros_like(score_BK)
    else:
        raised = score_BK * score_BK.abs().clamp(min=1e-6) ** (power - 1)
    weight_BK = raised.masked_fill(~present_BK, HIDDEN).softmax(dim=1)
    return (weight_BK[:, None].to(interests_BKD.dtype) @ interests_BKD)[:, 0]


def disagreement(interests_BKD: Tensor, present_BK: Tensor) -> Tensor:
    """(B,) minus the mean cosine of all K² pairs of interests that are present: −1 (all alike) … 0.

    To keep interests apart, minimise loss − weight · disagreement.
    """
    x = interests_BKD.float() * present_BK[..., None]
    unit = x * (x.square().sum(dim=-1, keepdim=True) + _TINY).rsqrt()
    mean = unit.sum(dim=1) / present_BK.sum(dim=1, keepdim=True).clamp(min=1)
    return -mean.square().sum(dim=-1)
