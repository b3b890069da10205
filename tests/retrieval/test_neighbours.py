import json
import math

import numpy as np
import polars as pl
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from tiglon.errors import BundleDamagedError, BundleVersionError, ConfigError, DataError, UnknownIdError
from tiglon.retrieval.neighbours import (
    CoOccurrence,
    CoOccurrenceConfig,
    NeighbourSum,
    Popularity,
    Repeats,
    RepeatsConfig,
    TextConfig,
    TextNeighbours,
    co_occurrence,
    recent,
    text_template,
)
from tiglon.types import Histories, Interactions, Items, Vocabulary

TITLES = ["red soap", "red soap bar", "blue brush", "blue brush set", "oak table"]


def catalogue(**columns):
    n = len(next(iter(columns.values())))
    ids = [f"i{i}" for i in range(n)]
    return Items(Vocabulary(ids), pl.DataFrame({"item_id": ids, **columns}))


def log_of(lives, n_items, times=None):
    """One list of items a user; times are positions unless given."""
    times = [list(range(len(life))) for life in lives] if times is None else times
    return Interactions(
        user=np.repeat(np.arange(len(lives)), [len(life) for life in lives]).astype(np.int32),
        item=np.array([i for life in lives for i in life], np.int32),
        time=np.array([t for life in times for t in life], np.int64),
        users=Vocabulary([f"u{u}" for u in range(len(lives))]),
        items=Vocabulary([f"i{i}" for i in range(n_items)]),
    )


def histories_of(lives, times):
    found = Histories.of(lives)
    return Histories(found.offsets, found.item, np.array([t for life in times for t in life], np.int64))


# -- history -----------------------------------------------------------------------------------------------


def test_a_weight_that_underflows_counts_as_nothing():
    items = catalogue(title=[" ".join(f"w{(i + j) % 30}" for j in range(4)) for i in range(30)])
    life = np.random.default_rng(0).integers(0, 30, 3000)
    log = log_of([life], 30)
    for n in (700, 3000):  # .75^age is 0 in float32 from an age of 362 on
        many = TextNeighbours(TextConfig(last=n)).fit(log, items).score(Histories.of([life]))
        few = TextNeighbours(TextConfig(last=360)).fit(log, items).score(Histories.of([life]))
        np.testing.assert_allclose(many, few, rtol=1e-5)


def test_age_counts_later_moments_not_later_events():
    histories = histories_of([[0, 1, 2, 3], [], [4], [5, 6]], [[1, 5, 5, 9], [], [9], [9, 9]])
    assert histories.moments_ago.tolist() == [2, 1, 1, 0, 0, 0, 0]


def test_recent_weighs_by_age_and_adds_repeats():
    start, item, weight = recent(Histories.of([[0, 1, 0, 2], [], [1]]), last=3, decay=0.5)
    found = sp.csr_matrix((weight, item, start), shape=(3, 3)).toarray()
    np.testing.assert_allclose(found, [[0.5, 0.25, 1], [0, 0, 0], [0, 1, 0]])  # the first event is too old


# -- co-occurrence -----------------------------------------------------------------------------------------


def together(lives, n, times=None, **options):
    return co_occurrence(log_of(lives, n, times), CoOccurrenceConfig(**options)).toarray()


def test_co_occurrence_by_hand():
    pairs = np.array([[0, 1, 1 / 2], [0.7, 0, 1], [0.35, 0.7, 0]])
    expected = pairs / np.sqrt(pairs.sum(axis=0) + 5)
    np.testing.assert_allclose(together([[0, 1, 2]], 3), expected, rtol=1e-6)


def test_inside_a_basket_nothing_came_first():
    found = together([[0, 1, 2]], 3, times=[[4, 4, 8]])
    pairs = np.array([[0, 1, 1], [1, 0, 1], [0.7, 0.7, 0]])
    np.testing.assert_allclose(found, pairs / np.sqrt(pairs.sum(axis=0) + 5), rtol=1e-6)


def by_definition(lives, times, n, config):
    pairs = np.zeros((n, n))
    for life, time in zip(lives, times, strict=True):
        moment = [sorted(set(time)).index(t) for t in time]
        for a, (i, m) in enumerate(zip(life, moment, strict=True)):
            for b, (j, o) in enumerate(zip(life, moment, strict=True)):
                if a != b and abs(o - m) <= config.window:
                    pairs[i, j] += (config.backward if o < m else 1) / max(abs(o - m), 1)
    return pairs / np.sqrt(pairs.sum(axis=0) + config.shrink)


LIVES = st.lists(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), min_size=1, max_size=12), min_size=1, max_size=4
)


@settings(deadline=None)
@given(LIVES, st.integers(1, 4), st.sampled_from([0, 0.3, 1]))
def test_co_occurrence_equals_its_definition(world, window, backward):
    lives = [[i for i, _ in life] for life in world]
    times = [sorted(t for _, t in life) for life in world]
    config = CoOccurrenceConfig(window=window, backward=backward)
    found = co_occurrence(log_of(lives, 6, times), config).toarray()
    np.testing.assert_allclose(found, by_definition(lives, times, 6, config), rtol=1e-5)


@settings(deadline=None)
@given(LIVES, st.integers(1, 4))
def test_only_the_strongest_neighbours_are_kept(world, neighbours):
    lives = [[i for i, _ in life] for life in world]
    whole = together(lives, 6)
    some = together(lives, 6, neighbours=neighbours)
    assert ((some == 0) | (some == whole)).all()
    for all_of_row, kept in zip(whole, some, strict=True):
        expected = sorted(all_of_row[all_of_row > 0])[::-1][:neighbours]
        assert sorted(kept[kept > 0])[::-1] == expected


def test_lives_of_different_users_never_meet():
    found = together([[0, 1], [2, 3]], 4)
    assert (found[:2, 2:] == 0).all()
    assert (found[2:, :2] == 0).all()


# -- text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "columns, template",
    [
        (["title", "brand", "categories"], "{title} {title} {brand} {categories}"),
        (["asin", "title", "short_text", "brand_id"], "{title} {title} {brand_id}"),
        (["brand", "short_text"], "{short_text} {short_text} {brand}"),
        (["department", "brand"], None),
    ],
)
def test_text_is_the_title_twice_and_what_else_there_is(columns, template):
    assert text_template(catalogue(**{name: ["x"] for name in columns})) == template


def test_similarity_is_the_cosine_of_tfidf():
    items = catalogue(title=["a1 b1", "a1 c1", "b1 c1", "zz"])
    retriever = TextNeighbours(TextConfig(template="{title}", ngrams=1)).fit(log_of([[0]], 4), items)
    ((first, score), *_) = retriever.similar_items(["i0"], k=3)[0]
    # All three terms stand in two texts: equal weights, one of two in common.
    assert first in ("i1", "i2")
    assert score == pytest.approx(0.5, rel=1e-5)
    assert retriever.similar_items(["i3"], k=3) == [[]]


def test_repeated_words_weigh_one_plus_log():
    items = catalogue(title=["a1 a1 b1", "a1", "b1"])
    retriever = TextNeighbours(TextConfig(template="{title}", ngrams=1)).fit(log_of([[0]], 3), items)
    (one, two) = retriever.similar_items(["i0"], k=2)[0]
    assert [one[0], two[0]] == ["i1", "i2"]
    assert one[1] / two[1] == pytest.approx(1 + math.log(2), rel=1e-5)


def test_new_items_are_reached_by_text_alone():
    items = catalogue(title=TITLES)
    log = log_of([[0, 2], [0, 2]], 5)  # items 1 and 3 were never bought
    text, bought = TextNeighbours().fit(log, items), CoOccurrence().fit(log, items)
    both = NeighbourSum().fit(log, items)
    assert [item for item, _ in text.similar_items(["i0"])[0]] == ["i1"]
    assert [item for item, _ in bought.similar_items(["i0"])[0]] == ["i2"]
    assert [item for item, _ in both.similar_items(["i0"])[0]] == ["i2", "i1"]


def test_missing_and_empty_text_is_no_error():
    items = catalogue(title=["red soap", None, "", "red soap"], categories=[["a"], None, [], ["a"]])
    retriever = TextNeighbours().fit(log_of([[0]], 4), items)
    assert [item for item, _ in retriever.similar_items(["i0"])[0]] == ["i3"]
    assert retriever.similar_items(["i1"]) == [[]]


def test_no_shared_word_leaves_popularity():
    items = catalogue(title=["one", "two", "three"])
    retriever = TextNeighbours().fit(log_of([[2], [2], [1]], 3), items)
    assert retriever.retrieve(Histories.of([[0]]), 2).item.tolist() == [[2, 1]]


# -- scores ------------------------------------------------------------------------------------------------


def test_the_sum_adds_both_scaled_to_their_maximum():
    items = catalogue(title=TITLES)
    log = log_of([[0, 2, 4], [1, 2], [3, 4]], 5)
    histories = Histories.of([[0, 2], [3], [4, 1]])
    parts = [TextNeighbours().fit(log, items), CoOccurrence().fit(log, items)]
    scores = [part.score(histories) for part in parts]
    for score in scores:
        np.testing.assert_allclose(score.max(axis=1), 1)
    np.testing.assert_allclose(NeighbourSum().fit(log, items).score(histories), sum(scores), rtol=1e-6)


def test_popularity_counts_events():
    retriever = Popularity().fit(log_of([[0, 1, 1], [1, 2, 2]], 4), catalogue(title=["x"] * 4))
    found = retriever.retrieve(Histories.of([[], [1]]), 2)
    assert found.item.tolist() == [[1, 2], [2, 0]]
    np.testing.assert_allclose(found.score, [[1, 2 / 3], [2 / 3, 1 / 3]])


@pytest.mark.parametrize("kind", [TextNeighbours, CoOccurrence, NeighbourSum, Repeats])
def test_an_empty_history_gets_the_popular_items(kind):
    retriever = kind().fit(log_of([[0, 1, 1], [1, 2, 2]], 4), catalogue(title=["x"] * 4))
    assert retriever.retrieve(Histories.of([[]]), 3).item.tolist() == [[1, 2, 0]]


def test_repeats_put_own_items_first_recent_and_frequent_ones_before_others():
    retriever = Repeats(RepeatsConfig(decay=0.5)).fit(log_of([[3, 3, 3, 4]], 5), catalogue(title=["x"] * 5))
    own = Histories.of([[0, 0, 1, 2]])  # ages 3, 2, 1, 0: weights 0 → 3/8, 1 → 1/2, 2 → 1
    assert retriever.retrieve(own, 5, exclude_seen=False).item.tolist() == [[2, 1, 0, 3, 4]]
    assert retriever.retrieve(own, 5).item.tolist() == [[3, 4, -1, -1, -1]]


def test_repeats_count_whole_baskets_alike():
    retriever = Repeats().fit(log_of([[3]], 4), catalogue(title=["x"] * 4))
    scores = retriever.score(histories_of([[0, 1, 2]], [[5, 5, 5]]))[0]
    assert scores[0] == scores[1] == scores[2] > scores[3]


# -- bad input ---------------------------------------------------------------------------------------------


def test_log_and_catalogue_must_share_a_vocabulary():
    with pytest.raises(DataError, match=r"a log of 3 items and a catalogue of 2.*align"):
        Popularity().fit(log_of([[0]], 3), catalogue(title=["x", "y"]))


def test_it_learns_first():
    with pytest.raises(ConfigError, match=r"co-occurrence that has learned nothing yet.*fit"):
        CoOccurrence().retrieve(Histories.of([[0]]), 1)


def test_histories_of_another_catalogue_are_told():
    retriever = CoOccurrence().fit(log_of([[0, 1]], 2), catalogue(title=["x", "y"]))
    for item in (2, -1):
        with pytest.raises(DataError, match="a dense item outside 0 … 1"):
            retriever.retrieve(Histories.of([[item]]), 1)


def test_similar_items_of_an_unknown_item_are_told():
    retriever = CoOccurrence().fit(log_of([[0, 1]], 2), catalogue(title=["x", "y"]))
    with pytest.raises(UnknownIdError, match="unknown item 'nothing'"):
        retriever.similar_items(["nothing"])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TextConfig(min_df=0), "min_df=0. min_df is at least 1"),
        (lambda: TextConfig(decay=0), "decay=0. decay is more than 0 and at most 1"),
        (lambda: CoOccurrenceConfig(window=0), "window=0. window is at least 1"),
        (lambda: CoOccurrenceConfig(shrink=0), "shrink more than 0"),
        (lambda: RepeatsConfig(last=0), "last=0. last is at least 1"),
    ],
)
def test_a_bad_option_is_told(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# -- on disk -----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    config = CoOccurrenceConfig(window=3)
    retriever = NeighbourSum(together=config).fit(log_of([[0, 1, 4], [2, 1]], 5), catalogue(title=TITLES))
    retriever.save(tmp_path / "kept")
    return tmp_path / "kept"


def test_the_configuration_is_kept(saved):
    assert NeighbourSum.load(saved).together.config == CoOccurrenceConfig(window=3)


@pytest.mark.parametrize("name", ["retriever.json", "items.parquet", "arrays.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_folder_is_told(saved, name, damage):
    path = saved / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(BundleDamagedError, match=r"cannot be read.*Copy the folder again, or fit anew"):
        NeighbourSum.load(saved)


def test_another_kind_or_a_newer_format_is_told(saved):
    with pytest.raises(BundleDamagedError, match=r"holds a NeighbourSum.*TextNeighbours.load"):
        TextNeighbours.load(saved)
    about = json.loads((saved / "retriever.json").read_text())
    (saved / "retriever.json").write_text(json.dumps(about | {"format": 99}))
    with pytest.raises(BundleVersionError, match=r"format 99.*Update Tiglon"):
        NeighbourSum.load(saved)
