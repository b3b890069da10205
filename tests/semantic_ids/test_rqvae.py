"""RQ-VAE: gradients against their closed forms, codes against residual k-means."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tiglon.semantic_ids.kmeans import ResidualKMeans
from tiglon.semantic_ids.rqvae import RQVAE, RQVAEConfig, RQVAETokenizer, loss, straight_through
from tiglon.semantic_ids.tokenizer import distinct_rows

torch.set_num_threads(1)
CONFIG = RQVAEConfig(levels=3, codes=8, width=4, hidden=(16,), epochs=30, batch=64, learning_rate=1e-2)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    random = np.random.default_rng(0)
    centres = random.normal(size=(12, 6))
    return (centres[random.integers(0, 12, 300)] + 0.3 * random.normal(size=(300, 6))).astype(np.float32)


@pytest.fixture
def model() -> RQVAE:
    torch.manual_seed(0)
    return RQVAE(CONFIG, 6).double()


def quantised_z(model: RQVAE) -> tuple[torch.Tensor, object]:
    z = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    return z, model.quantise(z)


def test_residuals_and_choices_follow_the_definition(model: RQVAE) -> None:
    z, q = quantised_z(model)
    residual = z.detach()
    for level, codebook in enumerate(model.codebook_LVW.detach()):
        torch.testing.assert_close(q.residual_BLW[:, level], residual)
        nearest = torch.cdist(residual, codebook).argmin(dim=1)
        assert (q.code_BL[:, level] == nearest).all()
        residual = residual - codebook[nearest]
    torch.testing.assert_close(residual, (z - q.chosen_BLW.sum(1)).detach())  # r_{m+1} = z − ẑ


def test_the_decoders_gradient_passes_straight_through(model: RQVAE) -> None:
    x = torch.randn(5, 6, dtype=torch.float64)
    z, q = quantised_z(model)
    summed = straight_through(z, q)
    torch.testing.assert_close(summed, q.chosen_BLW.sum(1))  # ẑ in value
    summed.retain_grad()
    loss(x, model.decoder(summed), q, 0.25)["reconstruction"].backward()
    assert summed.grad.abs().sum() > 0
    assert torch.equal(z.grad, summed.grad)


def test_without_it_the_reconstruction_would_not_move_with_z(model: RQVAE) -> None:
    x = torch.randn(5, 6, dtype=torch.float64)
    z = torch.randn(5, 4, dtype=torch.float64)
    step = torch.randn_like(z) * 1e-7
    values = [
        (x - model.decoder(model.quantise(at).chosen_BLW.sum(1))).square().sum() for at in (z, z + step)
    ]
    assert values[0] == values[1]


def test_commitment_of_every_level_reaches_the_encoder(model: RQVAE) -> None:
    z, q = quantised_z(model)
    loss(torch.zeros(5, 6), torch.zeros(5, 6), q, 0.25)["commitment"].backward()
    expected = 2 * 0.25 * (q.residual_BLW - q.chosen_BLW).sum(dim=1).detach() / len(z)
    torch.testing.assert_close(z.grad, expected)
    assert model.codebook_LVW.grad is None, "commitment does not move the codebooks"


def test_the_codebook_loss_moves_the_codebooks_alone(model: RQVAE) -> None:
    z, q = quantised_z(model)
    loss(torch.zeros(5, 6), torch.zeros(5, 6), q, 0.25)["codebook"].backward()
    assert z.grad is None
    expected = torch.zeros_like(model.codebook_LVW)
    for row in range(5):
        for level in range(3):
            gap = q.residual_BLW[row, level] - q.chosen_BLW[row, level]
            expected[level, q.code_BL[row, level]] += (-2 * gap / 5).detach()
    torch.testing.assert_close(model.codebook_LVW.grad, expected)


def test_with_no_network_and_kmeans_codebooks_it_is_residual_kmeans(vectors: np.ndarray) -> None:
    points = distinct_rows(vectors)
    config = RQVAEConfig(levels=3, codes=8, width=6, hidden=())
    model = RQVAE(config, 6)
    model.encoder = model.decoder = nn.Identity()
    model.initialise(torch.from_numpy(points), np.random.default_rng(0))
    plain = ResidualKMeans(3, 8, seed=0).fit(vectors)
    assert np.array_equal(model.codebook_LVW.detach().numpy(), plain.codebooks)
    quantised = model.quantise(torch.from_numpy(vectors))
    assert (quantised.code_BL.numpy() == plain.encode(vectors)).all()
    left = quantised.residual_BLW.square().sum(dim=(0, 2))
    assert (left.diff() < 0).all()


def test_only_dead_codes_are_revived_each_at_its_own_level(model: RQVAE) -> None:
    before = model.codebook_LVW.detach().clone()
    _, q = quantised_z(model)
    used = torch.ones(3, 8, dtype=torch.bool)
    used[1, 2] = used[2, 5] = False
    model.revive(used, q.residual_BLW.detach(), torch.Generator().manual_seed(0))
    assert torch.equal(model.codebook_LVW[used], before[used])
    for level, code in ((1, 2), (2, 5)):
        assert (q.residual_BLW[:, level] == model.codebook_LVW[level, code]).all(dim=1).any()


def test_dead_codes_are_revived_from_more_than_a_last_batch_of_one(monkeypatch) -> None:
    moved_to = []
    revive = RQVAE.revive
    monkeypatch.setattr(
        RQVAE, "revive", lambda model, *given: (moved_to.append(len(given[1])), revive(model, *given))
    )
    points = np.random.default_rng(0).normal(size=(65, 6)).astype(np.float32)
    RQVAETokenizer(replace(CONFIG, batch=64, epochs=2)).fit(points)
    assert moved_to == [64]


def test_training_lowers_the_loss_and_keeps_codes_in_use(vectors: np.ndarray) -> None:
    seen: list[dict[str, float]] = []
    tokenizer = RQVAETokenizer(CONFIG).fit(vectors, lambda epoch, metrics: seen.append(metrics))
    assert len(seen) == 30
    assert seen[-1]["reconstruction"] < 0.5 * seen[0]["reconstruction"]
    for level in (1, 2, 3):
        assert seen[-1][f"usage_{level}"] >= 0.8
        assert 1 <= seen[-1][f"perplexity_{level}"] <= 8
    codes = tokenizer.encode(vectors)
    error = np.square(vectors - tokenizer.decode(codes)).sum() / np.square(vectors - vectors.mean(0)).sum()
    assert error < 0.6
    x = torch.from_numpy((vectors - tokenizer.mean) / tokenizer.scale)
    with torch.no_grad():
        assert (tokenizer.model(x)[1].code_BL.numpy() == codes).mean() > 0.99, "as in training"


def test_training_leaves_the_global_random_state_alone(vectors: np.ndarray) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    RQVAETokenizer(RQVAEConfig(codes=8, hidden=(8,), epochs=1)).fit(vectors)
    assert torch.equal(torch.rand(3), expected)
