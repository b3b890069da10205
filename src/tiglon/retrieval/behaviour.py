"""Item vectors that know what is used together: text beside co-occurrence, for the tokenizer to cluster.

Items whose texts agree are not always wanted by the same people. Here an item's vector is its text's, of
length 1, beside `weight` times a vector of length 1 from behaviour: truncated SVD of the co-occurrence
matrix of the training events (`neighbours.co_occurrence`, both directions, symmetric). After EAGER and
LETTER (Wang et al. 2024, https://arxiv.org/abs/2406.14017 and https://arxiv.org/abs/2405.07314), which
bring behaviour into IDs by other means.

An item without training events, such as one that arrives tomorrow, gets the behaviour that its text
predicts (ridge regression), so that a frozen tokenizer can place it.

Letters: N items, D width of the text vectors, W width of the behaviour vectors.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from sklearn.decomposition import TruncatedSVD

from tiglon.errors import BundleDamagedError, ConfigError
from tiglon.retrieval.neighbours import CoOccurrenceConfig, co_occurrence
from tiglon.retrieval.retriever import item_matrix
from tiglon.types import Interactions


class BehaviourVectors:
    """weight: of behaviour beside text, whose weight is 1.   width: W, at most N − 1."""

    def __init__(self, weight: float = 0.7, width: int = 128, *, ridge: float = 1.0, seed: int = 0) -> None:
        if weight < 0 or width < 1 or ridge <= 0:
            raise ConfigError(
                f"weight={weight}, width={width}, ridge={ridge}",
                rule="A weight is at least 0, a width at least 1 and a ridge above 0",
            )
        self.weight, self.width, self.ridge, self.seed = weight, width, ridge, seed
        self.from_text = np.empty((0, 0), np.float32)  # (D + 1, W), the last row for the constant

    def fit_encode(self, interactions: Interactions, text: np.ndarray) -> np.ndarray:
        """(N, D + W) vectors of the catalogue, and learn what a text says about behaviour.

        interactions: the training events alone, or the IDs would know the future.   text: (N, D).
        """
        text = unit(item_matrix(text, len(interactions.items), "text vectors"))
        behaviour = co_occurrence_vectors(interactions, self.width, seed=self.seed)
        known = behaviour.any(axis=1)
        inputs = with_constant(text[known])
        gram = inputs.T @ inputs + self.ridge * np.eye(inputs.shape[1], dtype=np.float32)
        self.from_text = np.linalg.solve(gram, inputs.T @ behaviour[known]).astype(np.float32)
        behaviour[~known] = self._predict(text[~known])
        return self._beside(text, behaviour)

    def encode(self, text: np.ndarray) -> np.ndarray:
        """(M, D + W) vectors of new items from their text vectors (M, D) alone."""
        text = unit(item_matrix(text, len(text), "text vectors", len(self.from_text) - 1))
        return self._beside(text, self._predict(text))

    def _predict(self, text: np.ndarray) -> np.ndarray:
        return unit(with_constant(text) @ self.from_text)

    def _beside(self, text: np.ndarray, behaviour: np.ndarray) -> np.ndarray:
        return np.concatenate([text, np.float32(self.weight) * behaviour], axis=1)

    def save(self, directory: Path) -> None:
        """Write behaviour.safetensors to `directory`."""
        arrays = {"from_text": self.from_text, "weight": np.array([self.weight])}
        save_file(arrays, Path(directory) / "behaviour.safetensors")

    @classmethod
    def load(cls, directory: Path) -> BehaviourVectors:
        """What `save` wrote, able to `encode`. Raises BundleDamagedError."""
        path = Path(directory) / "behaviour.safetensors"
        try:
            arrays = load_file(path)
            self = cls(float(arrays["weight"][0]), max(arrays["from_text"].shape[1], 1))
            self.from_text = arrays["from_text"]
        except (OSError, KeyError, ValueError, SafetensorError, ConfigError) as error:
            raise BundleDamagedError(f"cannot read {path}: {error}", fix="Copy the bundle again") from error
        return self


def co_occurrence_vectors(interactions: Interactions, width: int = 128, *, seed: int = 0) -> np.ndarray:
    """(N, W) truncated SVD of what is used together, each row of length 1, or zero for an item without neighbours.

    W is `width`, or N − 1 where that is less, and at least 1.
    """
    together = co_occurrence(interactions, CoOccurrenceConfig(backward=1.0))
    together = together + together.T
    N = len(interactions.items)
    width = min(width, N - 1)
    if width < 1 or not together.nnz:
        return np.zeros((N, max(width, 1)), np.float32)
    found: np.ndarray = unit(
        TruncatedSVD(width, random_state=seed).fit_transform(together).astype(np.float32)
    )
    found[np.asarray(together.sum(axis=1)).ravel() == 0] = 0
    return found


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1; rows of zeros stay."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-9))


def with_constant(vectors: np.ndarray) -> np.ndarray:
    return np.concatenate([vectors, np.ones((len(vectors), 1), vectors.dtype)], axis=1)
