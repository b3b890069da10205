import itertools

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from tiglon.data import crossing
from tiglon.data.crossing import CrossId, Multi, cartesian, fingerprints
from tiglon.data.events import align, read_interactions, read_items
from tiglon.data.features import Feature, FeatureSchema, FittedFeatures, fit
from tiglon.errors import ConfigError, DataError

A, B = (np.array(column) for column in zip(*itertools.product(range(1, 201), range(1, 201)), strict=True))


# -- cross-IDs ---------------------------------------------------------------------------------------------


def test_every_combination_has_a_code_of_its_own():
    codes = CrossId.fit([A, B]).codes([A, B])
    assert sorted(codes) == list(range(1, 40_001))


def test_the_order_of_the_fields_matters():
    cross = CrossId.fit([A, B])
    swapped, apart = cross.codes([B, A]), A != B
    assert (swapped[apart] != cross.codes([A, B])[apart]).all()


def test_names_joined_by_text_are_no_danger():
    """Codes are crossed: (1, 23) is not (12, 3)."""
    cross = CrossId.fit([np.array([1, 12]), np.array([23, 3])])
    assert len(set(cross.codes([np.array([1, 12]), np.array([23, 3])]))) == 2


def test_three_features():
    parts = [np.array(column) for column in zip(*itertools.product(range(1, 9), repeat=3), strict=True)]
    assert len(set(CrossId.fit(parts).codes(parts))) == 512


def test_rare_combinations_are_unknown():
    left, right = np.array([1, 1, 1, 2, 2]), np.array([5, 5, 6, 6, 6])
    codes = CrossId.fit([left, right], min_count=2).codes([left, right])
    assert codes[0] == codes[1] != codes[3] == codes[4]
    assert (codes > 0).tolist() == [True, True, False, True, True]


def test_rows_count_as_often_as_their_lines():
    left, right, lines = np.array([1, 2, 3]), np.array([1, 1, 1]), np.array([0, 1, 2])
    codes = CrossId.fit([left, right], lines, min_count=2).codes([left, right])
    assert (codes > 0).tolist() == [False, False, True]
    assert (CrossId.fit([left, right], lines).codes([left, right]) > 0).tolist() == [False, True, True]


def test_unseen_values_and_unseen_pairs_are_unknown():
    cross = CrossId.fit([np.array([1, 2]), np.array([1, 2])])
    asked = np.array([1, 1, 9, 0, 2]), np.array([1, 2, 1, 1, 0])  # seen, unseen pair, unseen value, unknowns
    assert (cross.codes(asked) > 0).tolist() == [True, False, False, False, False]


def test_an_unknown_part_makes_an_unknown_cross_in_training_too():
    cross = CrossId.fit([np.array([0, 0, 1]), np.array([1, 1, 1])])
    assert cross.size == 2
    assert cross.codes([np.array([0, 1]), np.array([1, 1])]).tolist() == [0, 1]


def test_the_salt_changes_the_hash_and_not_what_is_known():
    a, b = (CrossId.fit([A, B], salt=salt) for salt in (1, 2))
    assert not np.isin(a.fingerprint, b.fingerprint).any()
    assert a.size == b.size


def test_two_that_hash_alike_get_the_next_salt(monkeypatch):
    monkeypatch.setattr(
        crossing,
        "fingerprints",
        lambda parts, salt: fingerprints(parts, salt) >> np.uint64(60 if salt < 3 else 0),
    )
    cross = CrossId.fit([A, B], salt=1)
    assert cross.salt == 3
    assert cross.size == 40_001


def test_what_always_collides_is_said(monkeypatch):
    monkeypatch.setattr(crossing, "fingerprints", lambda parts, salt: np.zeros(len(parts[0]), np.uint64))
    with pytest.raises(DataError, match="40,000 combinations of which two hash alike") as error:
        CrossId.fit([A, B])
    assert "Cross fewer features" in str(error.value)


def test_the_hash_spreads_evenly():
    """Modulo any small number, as many fall into each bucket as chance allows."""
    counts = np.bincount((fingerprints([A, B], 7) % np.uint64(97)).astype(np.int64))
    assert abs(counts - 40_000 / 97).max() < 5 * np.sqrt(40_000 / 97)


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: CrossId.fit([A]), ConfigError, r"a cross of 1 features\. A cross is of at least two"),
        (lambda: CrossId.fit([A, B], min_count=0), ConfigError, "min_count=0"),
        (lambda: CrossId.fit([A, B[:3]]), DataError, "parts of 40000, 3 rows"),
        (lambda: CrossId.fit([A, B]).codes([A, -B]), DataError, "a code below 0"),
    ],
)
def test_what_cannot_be_crossed(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_nothing_to_learn_from():
    empty = np.empty(0, np.int64)
    cross = CrossId.fit([empty, empty])
    assert cross.size == 1
    assert cross.codes([np.array([1]), np.array([1])]).tolist() == [0]
    assert CrossId.fit([A, B]).codes([empty, empty]).shape == (0,)


# -- several values a row ----------------------------------------------------------------------------------

ROWS = [[1, 2], [], [3], [4, 4], [5, 6, 7]]
OTHER = [[8, 9, 10], [11], [], [12], [13, 14]]


def test_a_product_is_every_value_with_every_other():
    offsets, left, right = cartesian(Multi.of(ROWS), Multi.of(OTHER))
    for r, (a, b) in enumerate(zip(ROWS, OTHER, strict=True)):
        span = slice(offsets[r], offsets[r + 1])
        assert list(zip(left[span], right[span], strict=True)) == list(itertools.product(a, b))


def test_a_row_without_values_has_no_pairs():
    offsets, left, _ = cartesian(Multi.of([[], [1]]), Multi.of([[2], []]))
    assert offsets.tolist() == [0, 0, 0]
    assert len(left) == 0


def test_no_rows():
    assert cartesian(Multi.of([]), Multi.of([]))[0].tolist() == [0]


def test_products_of_different_rows_are_refused():
    with pytest.raises(DataError, match=r"2 rows and 1 rows\. A product is taken row by row"):
        cartesian(Multi.of([[1], [2]]), Multi.of([[1]]))


def test_a_product_is_coded_and_pooled():
    offsets, *pairs = cartesian(Multi.of(ROWS), Multi.of(OTHER))
    cross = CrossId.fit(pairs)
    torch.manual_seed(0)
    table = torch.nn.EmbeddingBag(cross.size, 3, mode="sum")
    with torch.no_grad():
        pooled = table(torch.from_numpy(cross.codes(pairs)), torch.from_numpy(offsets[:-1].astype(np.int32)))
        for r, (a, b) in enumerate(zip(ROWS, OTHER, strict=True)):
            each = [cross.codes([np.array([x]), np.array([y])])[0] for x, y in itertools.product(a, b)]
            torch.testing.assert_close(
                pooled[r], table.weight[each].sum(0)
            )  # to rounding: sums in another order


# -- declared in a schema ----------------------------------------------------------------------------------

SCHEMA = FeatureSchema(
    [
        Feature("item_id", "inherent"),
        Feature("brand", "inherent"),
        Feature("size", "inherent", "number", buckets=2),
        Feature("brand × size", "inherent", of=("brand", "size")),
        Feature("gap", "cross", "number"),
        Feature("price", "cross", "number", buckets=2),
        Feature("channel", "cross"),
        Feature("channel × price", "cross", of=("channel", "price")),
        Feature("age", "user"),
        Feature("town", "user"),
        Feature("age × town", "user", of=("age", "town")),
        Feature("hour", "context"),
        Feature("age × hour", "context", of=("age", "hour"), min_count=2),
    ]
)
LOG = pl.DataFrame(
    {
        "user_id": ["u", "u", "u", "v", "v", "v"],
        "item_id": ["a", "b", "a", "a", "c", "a"],
        "timestamp": [1, 2, 3, 4, 5, 6],
        "price": [1.0, 1.0, 9.0, 9.0, 1.0, 9.0],
        "channel": ["web", "shop", "web", "shop", None, "web"],
        "hour": [8, 8, 9, 8, 9, 9],
    }
)
ITEMS = pl.DataFrame(
    {"item_id": ["a", "b", "c", "new"], "brand": ["x", "y", "x", "y"], "size": [1.0, 1.0, 2.0, 2.0]}
)
USERS = pl.DataFrame({"user_id": ["u", "v"], "age": [20, 50], "town": ["p", "q"]})


@pytest.fixture(scope="module")
def fitted():
    log, items, _ = align(read_interactions(LOG), read_items(ITEMS))
    return log, items, fit(SCHEMA, items, log, USERS)


def column(features, name, role):
    return [feature.name for feature in features.schema.of(*role)].index(name)


def test_items_have_a_code_for_their_combination(fitted):
    _, items, features = fitted
    codes = features.item_codes[items.vocabulary.encode(["a", "b", "c", "new"]), 3]
    assert len(set(codes[:3])) == 3
    assert codes.min() == codes[3] == features.item_codes[-1, 3] == 0  # y of size 2 was never seen
    assert features.item_sizes[3] == 4


def test_behaviours_have_a_code_for_their_combination(fitted):
    log, _, features = fitted
    codes = features.store(log).features["channel × price"]
    price, channel = (features.coders[name].codes(log.extra[name]) for name in ("price", "channel"))
    assert (codes == features.coders["channel × price"].codes([channel, price])).all()
    assert (codes == 0).tolist() == log.extra["channel"].is_null().to_list()


def test_serving_codes_what_training_coded(fitted):
    """A line alone, later, from other tables: the same code as the whole log had."""
    log, _, features = fitted
    x = column(features, "age × hour", ("user", "context"))
    together = features.profile_codes(log.user, log.extra)[:, x]
    one_by_one = [
        features.profile_codes(log.user[i : i + 1], log.extra[i : i + 1])[0, x] for i in range(len(log))
    ]
    assert together.tolist() == one_by_one
    assert (together > 0).tolist() == [True, True, False, False, True, True]  # 50 at 8 and 20 at 9 came once


def test_who_is_unknown_has_an_unknown_cross(fitted):
    _, _, features = fitted
    profile = features.profile_codes(np.array([-1]), pl.DataFrame({"hour": [8]}))[0]
    assert profile.tolist() == [0, 0, 0, features.coders["hour"].codes(pl.Series("hour", [8]))[0], 0]


def test_a_batch_needs_no_column_for_a_cross(fitted):
    _, _, features = fitted
    assert features.schema.columns("inherent", "context") == ["brand", "size", "hour"]
    assert features.profile_codes(np.array([0]), pl.DataFrame({"hour": [None]})).shape == (1, 5)


def test_crosses_are_kept(fitted, tmp_path):
    log, _, features = fitted
    features.save(tmp_path / "features")
    loaded = FittedFeatures.load(tmp_path / "features")
    assert loaded.schema == features.schema
    assert (loaded.profile_codes(log.user, log.extra) == features.profile_codes(log.user, log.extra)).all()
    codes, again = features.line_codes(log.extra), loaded.line_codes(log.extra)
    assert all((codes[name] == again[name]).all() for name in codes)


@pytest.mark.parametrize(
    "features, words",
    [
        ([Feature("a", "context"), Feature("x", "context", of=("a", "b"))], "feature 'x' of 'b'"),
        ([Feature("x", "context", of=("a", "b")), Feature("a", "context")], "declared before it"),
        ([Feature("a", "context"), Feature("x", "user", of=("a", "item_id"))], "A cross is of user features"),
        ([Feature("gap", "cross", "number"), Feature("x", "cross", of=("gap", "a"))], "never of 'gap'"),
    ],
)
def test_a_cross_is_of_features_that_are_there(features, words):
    with pytest.raises(ConfigError, match=words):
        FeatureSchema([Feature("item_id", "inherent"), *features])


@pytest.mark.parametrize("of, kind", [(("a",), "category"), (("a", "a"), "category"), (("a", "b"), "number")])
def test_a_cross_is_a_category_of_two_or_more(of, kind):
    with pytest.raises(ConfigError, match="A cross is a category of at least two features, each once"):
        Feature("x", "user", kind, of=of)


# -- what it is for ----------------------------------------------------------------------------------------


def test_a_cross_lets_a_linear_model_learn_xor():
    """A pure interaction: logistic regression on the two values learns nothing, with their cross all of it."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, 3, (2, 4_000))
    label, train = (a != b).astype(int), np.arange(4_000) < 2_000
    cross = CrossId.fit([a[train], b[train]])
    one_hot = [np.eye(3)[a], np.eye(3)[b]]

    def auc(x):
        chance = LogisticRegression().fit(x[train], label[train]).predict_proba(x[~train])[:, 1]
        return roc_auc_score(label[~train], chance)

    assert auc(np.hstack([*one_hot, np.eye(cross.size)[cross.codes([a, b])]])) == 1.0
    assert abs(auc(np.hstack(one_hot)) - 0.5) < 0.03
