"""The report against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tiglon.errors import ConfigError, DataError, StorageError
from tiglon.semantic_ids.catalog import SemanticIds
from tiglon.semantic_ids.kmeans import ResidualKMeans
from tiglon.semantic_ids.lsh import LSH
from tiglon.semantic_ids.report import report


def test_a_catalogue_of_six_by_hand() -> None:
    codes = np.array([(0, 0), (0, 0), (0, 1), (1, 0), (1, 0), (2, 3), (3, 3)], np.int32)
    ids = SemanticIds.assign(codes, (4, 8), list("abcdefg")).remove([6])  # (3, 3) does not count
    x = np.array([(1, 0), (1, 0), (0, 1), (1, 1), (1, -1), (1, 0), (9, 9)], np.float32)
    found = report(ids, x)
    assert found.items == 6
    assert found.usage.tolist() == [3 / 4, 3 / 8]
    half, third, sixth = 0.5, 1 / 3, 1 / 6
    by_hand = -(half * np.log2(half) + third * np.log2(third) + sixth * np.log2(sixth))
    assert found.entropy[0] == pytest.approx(by_hand)
    assert found.perplexity[0] == pytest.approx(2**by_hand)
    assert sorted(found.groups.tolist()) == [1, 1, 2, 2]
    assert found.colliding == pytest.approx(4 / 6)
    assert found.largest_group == 2
    assert found.capacity == 32
    assert found.digits == 256
    assert found.error is None
    assert found.similarity[1] == pytest.approx(0, abs=1e-6)  # a or b with c
    assert found.similarity[2] == pytest.approx(0.5, abs=0.02)  # 1 for a, b and 0 for d, e


def test_longer_prefixes_hold_items_more_alike() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(40, 8))[random.integers(0, 40, 1500)] + 0.3 * random.normal(size=(1500, 8))
    x = x.astype(np.float32)
    tokenizer = ResidualKMeans(3, 16).fit(x)
    found = report(SemanticIds.assign(tokenizer.encode(x), tokenizer.sizes, range(1500)), x, tokenizer)
    assert (np.diff(found.similarity) > 0).all()
    assert (np.diff(found.error) < 0).all()
    spread = np.square(x - x.mean(axis=0)).sum()
    by_hand = np.square(x - tokenizer.decode(tokenizer.encode(x))).sum() / spread
    assert found.error[-1] == pytest.approx(by_hand, rel=1e-5)
    shuffled = report(
        SemanticIds.assign(tokenizer.encode(x), tokenizer.sizes, range(1500)), random.permutation(x)
    )
    assert np.abs(shuffled.similarity).max() < 0.1, "codes of other items say nothing"


@pytest.mark.parametrize("tokenizer", [ResidualKMeans(2, 8), LSH(2, 8)])
def test_it_is_readable_and_drawn(tokenizer: ResidualKMeans | LSH, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    codes = tokenizer.fit(x).encode(x)
    found = report(SemanticIds.assign(codes, tokenizer.sizes, range(60)), x, tokenizer)
    text = found.table()
    assert "Semantic IDs of 60 items" in text
    assert "Capacity 64" in text
    assert f"{found.colliding:.1%} of items share all 2 codes" in text
    found.plot(tmp_path / "ids.png")
    assert (tmp_path / "ids.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    ids = SemanticIds.assign(np.zeros((2, 2), np.int32), (4, 4), [1, 2])
    found = report(ids, np.ones((2, 2), np.float32))
    for name in ("ids.zzz", "ids"):
        with pytest.raises(ConfigError) as wrong:
            found.plot(tmp_path / name)
        assert str(wrong.value) == (
            f"a picture named '{name}'. Its name ends in .png, .svg, .pdf. Name it FILE.png."
        )
    (tmp_path / "folder.png").mkdir()
    for place in (tmp_path / "no" / "such" / "x.png", tmp_path / "folder.png"):
        with pytest.raises(
            StorageError, match=rf"{place} could not be written: .*\. Nothing was changed there"
        ):
            found.plot(place)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder.png"]
    for kind, begin in (("SVG", b"<?xml"), ("pdf", b"%PDF")):
        found.plot(tmp_path / f"ids.{kind}")
        assert (tmp_path / f"ids.{kind}").read_bytes().startswith(begin)


def test_a_level_of_one_code_has_no_entropy() -> None:
    ids = SemanticIds.assign(np.zeros((3, 2), np.int32), (64, 64), [1, 2, 3])
    found = report(ids, np.ones((3, 2), np.float32))
    assert np.signbit(found.entropy).tolist() == [False, False]
    assert "0.00 of 6.00" in found.table()
    assert "-0.00" not in found.table()


def test_one_item_has_no_pairs() -> None:
    x = np.ones((1, 3), np.float32)
    tokenizer = ResidualKMeans(2, 4).fit(x)
    found = report(SemanticIds.assign(tokenizer.encode(x), tokenizer.sizes, [5]), x, tokenizer)
    assert np.isnan(found.similarity).all()
    assert "no pairs" in found.table()


def test_vectors_of_other_items_are_refused() -> None:
    ids = SemanticIds.assign(np.zeros((2, 2), np.int32), (4, 4), [1, 2])
    with pytest.raises(DataError, match="3 vectors for 2 items"):
        report(ids, np.ones((3, 2), np.float32))
