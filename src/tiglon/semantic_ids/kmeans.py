"""Residual k-means: each level clusters what the levels before it left over.

The plain form of residual quantisation (Chen et al. 2010; "RQ-KMeans" in later recommender papers):
e^l = k-means(r^l), c^l = argmin_k ‖r^l − e^l_k‖², r^{l+1} = r^l − e^l_{c^l}, r^1 = x. Nothing is trained
by gradient, and reproductions of TIGER find it as good as RQ-VAE.

Every distinct vector counts once, however many items share it: copies can never be told apart by their
content, so a code spent on them is wasted. The collision digit tells them apart.

Letters: N vectors, D width, L levels, V codes a level.
"""

from __future__ import annotations

from pathlib import Path

import numba
import numpy as np

from tiglon.errors import ConfigError
from tiglon.semantic_ids import storage
from tiglon.semantic_ids.exact import nearest
from tiglon.semantic_ids.tokenizer import distinct_rows, path_in, require_sizes, require_vectors

BLOCK = 8192  # rows whose distances to all codes are held at once


class ResidualKMeans:
    """L codebooks of V codes, fitted level after level.

    standardise: bring every dimension to mean 0 and deviation 1 first. Off by default: the distance that
        the encoder was made for is the one to cluster by, and after an SVD the last dimensions are mostly
        noise, which standardising would make as loud as the first. Turn it on for encoders of which a few
        dimensions drown the rest.
    max_points: at most this many vectors, drawn by `seed`, teach the codebooks.
    """

    def __init__(
        self,
        levels: int = 3,
        codes: int = 256,
        *,
        seed: int = 0,
        standardise: bool = False,
        iterations: int = 25,
        max_points: int = 2**17,
    ) -> None:
        self.sizes = require_sizes(levels, codes)
        self.seed, self.standardise = seed, standardise
        self.iterations, self.max_points = iterations, max_points
        self.codebooks = np.empty((0, 0, 0), np.float32)  # (L, V, D)
        self.mean = self.scale = np.empty(0, np.float32)  # (D,)

    def fit(self, vectors: np.ndarray) -> ResidualKMeans:
        """Learn the codebooks from vectors (N, D). Raises DataError unless they are finite."""
        points = distinct_rows(require_vectors(vectors))
        if len(points) == 0:
            raise ConfigError("no vectors to fit on", rule="A tokenizer learns from at least one vector")
        random = np.random.default_rng(self.seed)
        if len(points) > self.max_points:
            points = points[np.sort(random.choice(len(points), self.max_points, replace=False))]
        self.mean = np.zeros(points.shape[1], np.float32)
        self.scale = np.ones(points.shape[1], np.float32)
        if self.standardise:
            self.mean = points.mean(axis=0, dtype=np.float64).astype(np.float32)
            deviation = points.std(axis=0, dtype=np.float64).astype(np.float32)
            self.scale = np.where(deviation > 0, deviation, 1).astype(np.float32)
        residual = (points - self.mean) / self.scale
        codebooks = []
        for size in self.sizes:
            codebooks.append(kmeans(residual, size, random, self.iterations))
            residual = residual - codebooks[-1][nearest(residual, codebooks[-1])]
        self.codebooks = np.stack(codebooks)
        return self

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Codes (N, L) int32; of equally near codes the lowest."""
        self._require_fitted()
        residual = (require_vectors(vectors, len(self.mean)) - self.mean) / self.scale
        codes = np.empty((len(residual), len(self.sizes)), np.int32)
        for level, codebook in enumerate(self.codebooks):
            codes[:, level] = nearest(residual, codebook)
            residual = residual - codebook[codes[:, level]]
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Σ_l e^l_{c^l}, (N, D), of codes (N, l); with fewer than L levels, the coarser vector."""
        self._require_fitted()
        levels = np.arange(codes.shape[1])
        return self.codebooks[levels, codes].sum(axis=1) * self.scale + self.mean

    def save(self, directory: Path) -> None:
        """Write the codebooks and the settings to `directory`."""
        self._require_fitted()
        arrays = {"codebooks": self.codebooks, "mean": self.mean, "scale": self.scale}
        names = ("seed", "standardise", "iterations", "max_points")
        settings = {name: getattr(self, name) for name in names}
        storage.write(path_in(directory), arrays, {"kind": "residual_kmeans", **settings})

    @classmethod
    def load(cls, directory: Path) -> ResidualKMeans:
        """What `save` wrote. Raises BundleDamagedError."""
        arrays, settings = storage.read(path_in(directory))
        with storage.reading(path_in(directory)):
            settings.pop("kind")
            levels, codes, _ = arrays["codebooks"].shape
            self = cls(levels, codes, **settings)
            self.codebooks, self.mean, self.scale = arrays["codebooks"], arrays["mean"], arrays["scale"]
        return self

    def _require_fitted(self) -> None:
        if not len(self.codebooks):
            raise ConfigError("a tokenizer without codebooks", fix="Call fit(vectors) first")


def kmeans(points: np.ndarray, size: int, random: np.random.Generator, iterations: int = 25) -> np.ndarray:
    """Centres (size, D) of points (N, D): greedy k-means++ (Arthur and Vassilvitskii 2007), then Lloyd.

    A cluster that loses all its points moves to the point that is farthest from its own centre. With no
    more distinct points than `size`, every point is a centre, and the rest repeat the first, so that no
    point ever picks them.
    """
    points = distinct_rows(points)
    if len(points) <= size:
        return np.concatenate([points, np.repeat(points[:1], size - len(points), axis=0)])
    centres = _plus_plus(points, size, random)
    norms = np.einsum("nd,nd->n", points, points)
    previous = np.full(len(points), -1)
    for _ in range(iterations):
        code, distance = _assign(points, norms, centres)
        if (code == previous).all():
            break
        previous = code
        count = np.bincount(code, minlength=size)
        total = np.zeros(centres.shape, np.float64)
        _sum_by_code(points, code, total)
        centres = (total / np.maximum(count, 1)[:, None]).astype(np.float32)
        empty = np.flatnonzero(count == 0)
        centres[empty] = points[np.argsort(-distance, kind="stable")[: len(empty)]]
    return centres


def _plus_plus(points: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    """`size` of the points (N, D), each drawn with a chance ∝ its squared distance to those before it.

    Greedy: of a few draws, the one that brings the points nearest is kept. One draw a time easily puts
    two centres into one cluster and none into another, which Lloyd does not mend.
    """
    trials = 2 + int(np.log(size))
    norms = np.einsum("nd,nd->n", points, points)

    def distances(rows: np.ndarray) -> np.ndarray:
        """(N, rows): squared distances to some of the points."""
        squared = norms[:, None] - 2 * (points @ points[rows].T) + norms[rows]
        squared[rows, np.arange(len(rows))] = 0
        return np.maximum(squared, 0)

    chosen = [int(random.integers(len(points)))]
    distance = distances(np.array(chosen))[:, 0]
    while len(chosen) < size:
        summed = np.cumsum(distance, dtype=np.float64)
        draws = np.searchsorted(summed, random.random(trials) * summed[-1], side="right")
        rows = np.minimum(draws, len(points) - 1)
        nearer = np.minimum(distances(rows), distance[:, None])
        best = int(nearer.sum(axis=0, dtype=np.float64).argmin())
        chosen.append(int(rows[best]))
        distance = nearer[:, best]
    return points[chosen]


def _assign(points: np.ndarray, norms: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(nearest centre, squared distance) of each point, by blocks of matrix products."""
    code, distance = np.empty(len(points), np.int64), np.empty(len(points), np.float32)
    half = np.einsum("vd,vd->v", centres, centres) / 2
    for start in range(0, len(points), BLOCK):
        rows = slice(start, start + BLOCK)
        score = points[rows] @ centres.T - half
        code[rows] = score.argmax(axis=1)
        distance[rows] = norms[rows] - 2 * score[np.arange(len(score)), code[rows]]
    return code, distance


@numba.njit(cache=True)
def _sum_by_code(points: np.ndarray, code: np.ndarray, total: np.ndarray) -> None:
    for n in range(len(points)):
        for d in range(points.shape[1]):
            total[code[n], d] += points[n, d]
