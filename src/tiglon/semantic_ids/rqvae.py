"""RQ-VAE: an autoencoder whose bottleneck is a sum of L code vectors, one from each of L codebooks.

Papers: van den Oord et al. 2017, "Neural Discrete Representation Learning" (the losses, eq. 3); Zeghidour
et al. 2021, "SoundStream" (residual levels, k-means initialisation, revival of dead codes); Rajput et al.
2023, TIGER, §3.1 (the sizes, the losses summed over the levels).

Idea: z = E(x), r_1 = z; at every level c_l = argmin_k ‖r_l − e^l_k‖², r_{l+1} = r_l − e^l_{c_l};
ẑ = Σ_l e^l_{c_l}; x̂ = D(z + sg(ẑ − z)).
Loss: ‖x − x̂‖² + Σ_l ‖sg(r_l) − e^l_{c_l}‖² + β ‖r_l − sg(e^l_{c_l})‖².
The residual subtracts e itself, never its straight-through copy: with the copy, r_2, r_3 … would not
depend on z, and their commitment would teach the encoder nothing.

Deviations from TIGER
- AdamW with a cosine down to 0 for 100 epochs, in place of Adagrad at 0.4 for 20,000: minutes on a CPU.
- k-means initialises every level on all residuals rather than on those of the first batch.
- Inputs are centred and divided by one number, so that one learning rate fits every text encoder.
- A code that no item used for an epoch moves to the residual of a random item (SoundStream §III-C).
Cost: 12,000 vectors of width 256 take about a minute and a half on one CPU core.

Letters: B rows of a batch, D width of a vector, W width of a code, L levels, V codes a level.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tiglon.errors import ConfigError
from tiglon.semantic_ids import exact, storage
from tiglon.semantic_ids.kmeans import kmeans
from tiglon.semantic_ids.tokenizer import distinct_rows, path_in, require_sizes, require_vectors


@dataclass(frozen=True)
class RQVAEConfig:
    levels: int = 3
    """L. Paper: 3."""
    codes: int = 256
    """V, codes a level. Paper: 256."""
    width: int = 32
    """W, width of a code vector. Paper: 32."""
    hidden: tuple[int, ...] = (512, 256, 128)
    """Widths of the encoder's hidden layers, mirrored in the decoder. Paper: 512, 256, 128."""
    beta: float = 0.25
    """Weight of the commitment. Paper: 0.25."""
    epochs: int = 100
    """Passes over the distinct vectors. Paper: 20,000."""
    batch: int = 1024
    """Vectors a step. Paper: 1,024."""
    learning_rate: float = 1e-3
    """Of AdamW, falling to 0 as a cosine. Paper: 0.4 (Adagrad)."""
    weight_decay: float = 1e-4
    """Of AdamW. Paper: not given."""
    standardise: bool = False
    """Bring every dimension to deviation 1 rather than all by one number. Off: the reconstruction then
    weighs dimensions as the text encoder does, and not the noise of the last as much as the first."""
    seed: int = 0


@dataclass(frozen=True)
class Quantised:
    """code_BL int64; residual_BLW before each level, chosen_BLW the code vectors picked there."""

    code_BL: Tensor
    residual_BLW: Tensor
    chosen_BLW: Tensor


class RQVAE(nn.Module):
    def __init__(self, config: RQVAEConfig, dim: int) -> None:
        super().__init__()
        widths = (dim, *config.hidden, config.width)
        self.encoder: nn.Module = _mlp(widths)
        self.decoder: nn.Module = _mlp(widths[::-1])
        self.codebook_LVW = nn.Parameter(torch.randn(config.levels, config.codes, config.width))

    def quantise(self, z_BW: Tensor) -> Quantised:
        """The nearest code vector of every level's residual; residuals carry gradient to z alone."""
        residual_BW, codes, residuals, chosen = z_BW, [], [], []
        for codebook_VW in self.codebook_LVW:
            with torch.no_grad():
                norm_V = codebook_VW.square().sum(dim=1)
                code_B = (norm_V - 2 * residual_BW @ codebook_VW.T).argmin(dim=1)
            codes.append(code_B)
            residuals.append(residual_BW)
            chosen.append(codebook_VW[code_B])
            residual_BW = residual_BW - chosen[-1].detach()
        return Quantised(torch.stack(codes, 1), torch.stack(residuals, 1), torch.stack(chosen, 1))

    def forward(self, x_BD: Tensor) -> tuple[Tensor, Quantised]:
        """(x̂_BD, what was quantised); the decoder's gradient passes straight through to the encoder."""
        z_BW = self.encoder(x_BD)
        quantised = self.quantise(z_BW)
        return self.decoder(straight_through(z_BW, quantised)), quantised

    @torch.no_grad()
    def initialise(self, x_ND: Tensor, random: np.random.Generator) -> None:
        """Set every codebook to the k-means centres of its residuals."""
        residual = self.encoder(x_ND).cpu().numpy()
        for codebook_VW in self.codebook_LVW:
            centres = kmeans(residual, len(codebook_VW), random)
            codebook_VW.copy_(torch.from_numpy(centres))
            residual = residual - centres[exact.nearest(residual, centres)]

    @torch.no_grad()
    def revive(self, used_LV: Tensor, residual_BLW: Tensor, generator: torch.Generator) -> None:
        """Move codes that were not `used` to residuals of random rows, of their own level."""
        for codebook_VW, used_V, residual_BW in zip(
            self.codebook_LVW, used_LV, residual_BLW.unbind(1), strict=True
        ):
            dead = (~used_V).nonzero()[:, 0]
            rows = torch.randint(len(residual_BW), (len(dead),), generator=generator)
            codebook_VW[dead] = residual_BW[rows]


def straight_through(z_BW: Tensor, quantised: Quantised) -> Tensor:
    """ẑ_BW = Σ_l e^l_{c_l} in value, z in gradient."""
    return z_BW + (quantised.chosen_BLW.sum(dim=1) - z_BW).detach()


def loss(x_BD: Tensor, guess_BD: Tensor, quantised: Quantised, beta: float) -> dict[str, Tensor]:
    """The three terms to add up: squared lengths, summed over the levels, averaged over the rows."""
    residual_BLW, chosen_BLW = quantised.residual_BLW, quantised.chosen_BLW
    return {
        "reconstruction": (x_BD - guess_BD).square().sum(dim=1).mean(),
        "codebook": (residual_BLW.detach() - chosen_BLW).square().sum(dim=(1, 2)).mean(),
        "commitment": beta * (residual_BLW - chosen_BLW.detach()).square().sum(dim=(1, 2)).mean(),
    }


class RQVAETokenizer:
    """Trains an RQVAE on item vectors and encodes with it."""

    def __init__(self, config: RQVAEConfig | None = None) -> None:
        self.config = config or RQVAEConfig()
        self.sizes = require_sizes(self.config.levels, self.config.codes)
        self.model: RQVAE | None = None
        self.mean = self.scale = np.empty(0, np.float32)  # (D,)

    def fit(
        self, vectors: np.ndarray, on_epoch: Callable[[int, dict[str, float]], None] | None = None
    ) -> RQVAETokenizer:
        """Train on the distinct vectors of (N, D).

        on_epoch: called with the epoch, from 0, and its mean losses, the share of codes used
            (`usage_1` …) and the perplexity of each level (`perplexity_1` …).
        """
        points = distinct_rows(require_vectors(vectors))
        if len(points) == 0:
            raise ConfigError("no vectors to fit on", rule="A tokenizer learns from at least one vector")
        config = self.config
        self.mean = points.mean(axis=0, dtype=np.float64).astype(np.float32)
        spread = points.std(axis=0, dtype=np.float64)
        if not config.standardise:
            spread = np.full_like(spread, np.sqrt((spread**2).mean()))
        self.scale = np.where(spread > 0, spread, 1).astype(np.float32)
        x_ND = torch.from_numpy((points - self.mean) / self.scale)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = RQVAE(config, points.shape[1])
        model.initialise(x_ND, np.random.default_rng(config.seed))
        _train(model, x_ND, config, on_epoch)
        self.model = model
        return self

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Codes (N, L) int32; of equally near codes the lowest."""
        model = self._fitted()
        hidden = (require_vectors(vectors, len(self.mean)) - self.mean) / self.scale
        for layer in model.encoder.children():
            if isinstance(layer, nn.Linear):
                hidden = exact.affine(hidden, layer.weight.detach().numpy(), layer.bias.detach().numpy())
            else:
                hidden = np.maximum(hidden, 0)
        codes = np.empty((len(hidden), len(self.sizes)), np.int32)
        for level, codebook in enumerate(model.codebook_LVW.detach().numpy()):
            codes[:, level] = exact.nearest(hidden, codebook)
            hidden = hidden - codebook[codes[:, level]]
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """x̂ (N, D) of codes (N, l); with fewer than L levels, the coarser vector."""
        model = self._fitted()
        with torch.no_grad():
            levels = torch.arange(codes.shape[1])
            summed = model.codebook_LVW[levels, torch.as_tensor(codes, dtype=torch.int64)].sum(dim=1)
            return model.decoder(summed).numpy() * self.scale + self.mean

    def save(self, directory: Path) -> None:
        """Write the weights and the settings to `directory`."""
        arrays = {name: value.numpy() for name, value in self._fitted().state_dict().items()}
        arrays |= {"mean": self.mean, "scale": self.scale}
        storage.write(path_in(directory), arrays, {"kind": "rqvae", "config": asdict(self.config)})

    @classmethod
    def load(cls, directory: Path) -> RQVAETokenizer:
        """What `save` wrote. Raises BundleDamagedError."""
        arrays, settings = storage.read(path_in(directory))
        with storage.reading(path_in(directory)):
            config = settings["config"]
            self = cls(RQVAEConfig(**{**config, "hidden": tuple(config["hidden"])}))
            self.mean, self.scale = arrays.pop("mean"), arrays.pop("scale")
            self.model = RQVAE(self.config, len(self.mean))
            self.model.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()})
        return self

    def _fitted(self) -> RQVAE:
        if self.model is None:
            raise ConfigError("a tokenizer without a model", fix="Call fit(vectors) first")
        return self.model


def _train(
    model: RQVAE,
    x_ND: Tensor,
    config: RQVAEConfig,
    on_epoch: Callable[[int, dict[str, float]], None] | None,
) -> None:
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    steps = -(-len(x_ND) // config.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * steps)
    for epoch in range(config.epochs):
        count_LV = torch.zeros(config.levels, config.codes)
        sums: dict[str, float] = {}
        order = torch.randperm(len(x_ND), generator=generator)
        for rows in order.split(config.batch):
            x_BD = x_ND[rows]
            guess_BD, quantised = model(x_BD)
            terms = loss(x_BD, guess_BD, quantised, config.beta)
            optimizer.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
            optimizer.step()
            schedule.step()
            ones = torch.ones_like(quantised.code_BL.T, dtype=torch.float32)
            count_LV.scatter_add_(1, quantised.code_BL.T, ones)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(rows)
        if epoch < config.epochs // 2:  # later moves would find no time to settle
            _, quantised = model(x_ND[order[: config.batch]])  # the last batch may be of one row
            model.revive(count_LV > 0, quantised.residual_BLW.detach(), generator)
        if on_epoch:
            on_epoch(epoch, {name: value / len(x_ND) for name, value in sums.items()} | _usage(count_LV))


def _usage(count_LV: Tensor) -> dict[str, float]:
    share_LV = count_LV / count_LV.sum(dim=1, keepdim=True)
    perplexity_L = torch.special.entr(share_LV).sum(dim=1).exp()
    usage_L = (count_LV > 0).float().mean(dim=1)
    return {f"usage_{level}": u.item() for level, u in enumerate(usage_L, 1)} | {
        f"perplexity_{level}": p.item() for level, p in enumerate(perplexity_L, 1)
    }


def _mlp(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
