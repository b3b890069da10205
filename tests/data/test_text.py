"""Texts from columns, vectors from texts."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from tiglon.data.text import (
    SentenceTransformer,
    TfidfSvd,
    VectorColumn,
    encode_items,
    render,
    template_of,
    text_columns,
)
from tiglon.errors import (
    BundleDamagedError,
    ConfigError,
    DataError,
    MissingExtraError,
    SchemaError,
    StorageError,
)
from tiglon.types import Items, Vocabulary


def items_of(**columns: object) -> Items:
    table = pl.DataFrame(columns)
    table = table.with_columns(item_id=pl.int_range(table.height)).select("item_id", *columns)
    return Items(Vocabulary(table["item_id"]), table)


@pytest.fixture
def shop() -> Items:
    return items_of(
        title=["Red lipstick", None, "Shampoo", None],
        brand=["Acme", "Beta", "", None],
        categories=[["Beauty", "Lips"], ["Hair", None], [], None],
        price=[1.5, 2.0, None, None],
    )


class Counting:
    """An encoder that remembers what it was asked."""

    name = "counting/1"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        self.asked += texts
        return np.array([[len(text), text.count("e")] for text in texts], np.float32)


# -- columns of words --


def test_text_columns_leave_identifiers_and_blanks_out() -> None:
    table = items_of(
        asin=["B01", "B02"],
        title=["Soap", None],
        brand_id=["12", "13"],
        image_url=["a", "b"],
        page=["http://a.b/c", "https://d.e"],
        categories=[["Bath"], []],
        price=[1.0, 2.0],
        lexical_id=[["a"], ["b"]],
        width=["wide", "narrow"],
        subtitle=pl.Series([None, None], dtype=pl.String),
        note=["", " "],
        tags=[[], [" ", None]],
    )
    assert text_columns(table) == ["title", "categories", "width"]


# -- render --


def test_a_template_is_filled_in_and_missing_columns_leave_no_trace(shop: Items) -> None:
    assert render(shop, "{title}. {brand}. {categories}") == [
        "Red lipstick. Acme. Beauty, Lips",
        "Beta. Hair",
        "Shampoo",
        "",
    ]
    assert render(shop, "Title: {title}; by {brand}, for {price}!") == [
        "Title: Red lipstick; by Acme, for 1.5!",
        "by Beta, for 2.0!",
        "Title: Shampoo!",
        "",
    ]


def test_without_a_template_all_columns_of_text_are_taken_in_order(shop: Items) -> None:
    assert render(shop) == render(shop, "{title}. {brand}. {categories}")
    assert render(items_of(price=[1, 2])) == ["", ""]
    nested = items_of(tags=[[["a", "b"], ["c"]], []])
    assert render(nested) == ["a, b, c", ""]


def test_a_column_may_have_any_name_without_braces() -> None:
    table = items_of(**{"og:title": ["Soap"], "wow!": ["good"], "": ["x"], "a b": ["y"]})
    assert render(table) == ["Soap. good. x. y"]
    assert render(table, template_of(text_columns(table))) == render(table)
    assert render(table, "{wow!}: {og:title}") == ["good: Soap"]
    with pytest.raises(SchemaError, match=r"named 'size \{cm\}'. Its name has no braces. Rename it"):
        render(items_of(**{"size {cm}": ["3"]}))


def test_a_string_id_is_no_text() -> None:
    table = pl.DataFrame({"item_id": ["x1", "x2"], "title": ["One", "Two"]})
    assert render(Items(Vocabulary(table["item_id"]), table)) == ["One", "Two"]


def test_a_wrong_template_says_so(shop: Items) -> None:
    with pytest.raises(SchemaError, match=r"no column 'titel'.*Did you mean 'title'\?"):
        render(shop, "{titel}")
    for template in ("{title", "{}", "{title!r}", "{price:.2f}"):
        with pytest.raises(ConfigError, match="Columns stand in braces"):
            render(shop, template)


# -- TF-IDF and SVD --

TEXTS = [
    "red lipstick by acme",
    "dark red lipstick",
    "hair shampoo for dry hair",
    "shampoo for oily hair",
    "oily skin cream",
    "cream for dry skin by acme",
    "type a",
    "type b",
]


def test_all_directions_give_the_cosines_of_another_tf_idf() -> None:
    other = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, min_df=2, token_pattern=r"(?u)\b\w+\b"
    ).fit_transform(TEXTS)
    ours = TfidfSvd(dim=100).fit(TEXTS).encode(TEXTS)
    np.testing.assert_allclose(ours @ ours.T, (other @ other.T).toarray(), atol=1e-5)


def test_vectors_have_length_1_and_an_unknown_text_is_zero() -> None:
    vectors = TfidfSvd(dim=4).fit(TEXTS).encode([*TEXTS, "", "xyzzy", "???"])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1] * 8 + [0] * 3, atol=1e-6)


def test_order_and_repeats_change_nothing_and_a_text_alone_is_as_in_a_batch() -> None:
    encoder = TfidfSvd(dim=5).fit(TEXTS)
    again = TfidfSvd(dim=5).fit(TEXTS[::-1] + TEXTS[:3])
    assert encoder.name == again.name
    vectors = encoder.encode(TEXTS)
    assert np.array_equal(vectors, again.encode(TEXTS))
    assert np.array_equal(vectors, np.concatenate([encoder.encode([text]) for text in TEXTS]))


@pytest.mark.parametrize("texts", [["one text"], ["", ""], [], ["a b", "c d"], ["same", "same"]])
def test_small_corpora_are_no_trouble(texts: list[str]) -> None:
    encoder = TfidfSvd(dim=256).fit(texts)
    vectors = encoder.encode([*texts, "new"])
    assert vectors.shape[0] == len(texts) + 1
    assert 1 <= vectors.shape[1] <= 256
    assert np.isfinite(vectors).all()


def test_the_name_changes_with_whatever_the_vectors_depend_on() -> None:
    names = {
        TfidfSvd(dim=4).fit(TEXTS).name,
        TfidfSvd(dim=5).fit(TEXTS).name,
        TfidfSvd(dim=4, ngrams=1).fit(TEXTS).name,
        TfidfSvd(dim=4).fit(TEXTS[:-1]).name,
    }
    assert len(names) == 4


def test_a_loaded_encoder_gives_the_same_bits(tmp_path: Path) -> None:
    encoder = TfidfSvd(dim=4, seed=2).fit([*TEXTS, "crème brûlée", "crème fraîche"])
    encoder.save(tmp_path / "text")
    back = TfidfSvd.load(tmp_path / "text")
    assert back.name == encoder.name
    assert np.array_equal(back.encode(TEXTS), encoder.encode(TEXTS))
    (tmp_path / "text" / "tfidf_svd.safetensors").unlink()
    with pytest.raises(BundleDamagedError, match="holds no text encoder"):
        TfidfSvd.load(tmp_path / "text")


def test_an_encoder_that_is_not_fitted_or_impossible_says_so() -> None:
    with pytest.raises(ConfigError, match=r"Call fit\(texts\) first"):
        TfidfSvd().encode(["a"])
    with pytest.raises(ConfigError, match="dim 0"):
        TfidfSvd(0)


# -- sentence-transformers --


def test_without_the_library_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tiglon\[text\]'"):
        SentenceTransformer("all-MiniLM-L6-v2")


if importlib.util.find_spec("sentence_transformers"):

    def test_a_model_folder_is_read_and_named_by_its_weights(tmp_path: Path) -> None:
        from sentence_transformers import SentenceTransformer as Model
        from sentence_transformers.models import Pooling, Transformer
        from transformers import BertConfig, BertModel, BertTokenizerFast

        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "lipstick", "shampoo"]
        names = []
        for seed in (0, 1):
            folder = tmp_path / f"bert{seed}"
            folder.mkdir()
            (folder / "vocab.txt").write_text("\n".join(words))
            BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
            import torch

            torch.manual_seed(seed)
            sizes = {
                "hidden_size": 8,
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "intermediate_size": 8,
            }
            BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
            body = Transformer(str(folder))
            Model(modules=[body, Pooling(8)]).save(str(tmp_path / f"model{seed}"))
            encoder = SentenceTransformer(tmp_path / f"model{seed}")
            vectors = encoder.encode(["red lipstick", "shampoo"])
            assert vectors.shape == (2, 8)
            np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
            names.append(encoder.name)
            assert SentenceTransformer(tmp_path / f"model{seed}").name == names[-1]
        assert names[0].rsplit("-", 1)[1] != names[1].rsplit("-", 1)[1]


# -- vectors of the table --


@pytest.mark.parametrize("dtype", [pl.List(pl.Float64), pl.Array(pl.Float32, 2), pl.List(pl.Int16)])
def test_a_column_of_vectors_is_taken_as_it_is(dtype: pl.DataType) -> None:
    items = items_of(vector=pl.Series([[1, 2], [3, 4]], dtype=dtype))
    vectors = encode_items(items, VectorColumn("vector"))
    assert vectors.values.tolist() == [[1, 2], [3, 4]]
    assert vectors.values.dtype == np.float32


def test_a_column_that_is_not_of_vectors_is_refused() -> None:
    with pytest.raises(SchemaError, match=r"no column 'vectors'.*Did you mean 'vector'"):
        VectorColumn("vectors").read(items_of(vector=[[1.0]]))
    for values in ([[1.0, 2.0], [3.0]], [[1.0], None], [[1.0], [None]]):
        with pytest.raises(SchemaError, match="Every item has a vector, and all are equally long"):
            VectorColumn("vector").read(items_of(vector=values))
    with pytest.raises(SchemaError, match="A vector column holds lists of numbers"):
        VectorColumn("title").read(items_of(title=["a"]))
    with pytest.raises(DataError, match="1 item vectors with NaN"):
        VectorColumn("vector").read(items_of(vector=[[1.0], [float("nan")]]))


# -- encoding a catalogue --


def test_each_distinct_text_is_encoded_once() -> None:
    encoder = Counting()
    items = items_of(title=["tree", "stone", "tree", None])
    vectors = encode_items(items, encoder)
    assert sorted(encoder.asked) == ["", "stone", "tree"]
    assert vectors.values.tolist() == [[4, 2], [5, 1], [4, 2], [0, 0]]
    assert vectors.encoder == "counting/1"


def test_the_cache_asks_for_new_texts_only(tmp_path: Path) -> None:
    first = encode_items(items_of(title=["tree", "stone"]), Counting(), cache=tmp_path / "cache")
    encoder = Counting()
    items = items_of(title=["stone", "leaf", "tree"])
    vectors = encode_items(items, encoder, cache=tmp_path / "cache")
    assert encoder.asked == ["leaf"]
    assert np.array_equal(vectors.values[[2, 0]], first.values)
    assert np.array_equal(vectors.values, encode_items(items, Counting()).values)
    other = Counting()
    other.name = "counting/2"
    encode_items(items, other, cache=tmp_path / "cache")
    assert len(other.asked) == 3, "another version has its own vectors"
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_damaged_cache_is_made_anew_and_a_full_disk_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = items_of(title=["tree"])
    encode_items(items, Counting(), cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"half a fi")
    assert encode_items(items, Counting(), cache=tmp_path).values.tolist() == [[4, 2]]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = file.read_bytes()
    monkeypatch.setattr("tiglon.data.text.save_file", full)
    with pytest.raises(StorageError, match=r"No space left.*Free some space"):
        encode_items(items_of(title=["stone"]), Counting(), cache=tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]
