import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiglon.data.events import align, read_interactions, read_items
from tiglon.data.features import Buckets, Feature, FeatureSchema, FittedFeatures, fit, gaps
from tiglon.data.histories import HistoryStore
from tiglon.errors import (
    BundleDamagedError,
    BundleVersionError,
    ConfigError,
    DataError,
    LeakageError,
    SchemaError,
)
from tiglon.nn.embedding import FeatureEmbedding
from tiglon.types import Histories

SCHEMA = FeatureSchema(
    [
        Feature("item_id", "inherent", width=64),
        Feature("brand", "inherent"),
        Feature("size", "inherent", "number", buckets=2),
        Feature("gap", "cross", "number", buckets=4),
        Feature("price", "cross", "number", buckets=4),
        Feature("channel", "cross"),
        Feature("age", "user", "number", buckets=2),
        Feature("hour", "context"),
    ]
)
LOG = pl.DataFrame(
    {
        "user_id": ["u", "u", "u", "v", "v", "w"],
        "item_id": ["a", "b", "a", "a", "c", "d"],
        "timestamp": [1, 1, 9, 3, 5, 7],
        "price": [1.0, 2.0, 3.0, 4.0, None, 900.0],
        "channel": ["web", "shop", None, "web", "fax", "tv"],
        "hour": [8, 8, 9, 8, 10, 23],
    }
)
ITEMS = pl.DataFrame(
    {
        "item_id": ["a", "b", "c", "d"],
        "brand": ["x", "y", None, "z"],
        "size": [1.0, 2.0, float("nan"), 3.0],
    }
)
USERS = pl.DataFrame({"user_id": ["v", "u", "stranger"], "age": [50, 20, 1]})


def tables(log: pl.DataFrame = LOG):
    log, items, _ = align(read_interactions(log), read_items(ITEMS))
    return log, items


@pytest.fixture(scope="module")
def fitted() -> FittedFeatures:
    log, items = tables()
    return fit(SCHEMA, items, log.take(log.user < 2), USERS)  # w's line, with d, is no training


# -- the schema --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Feature("x", "crosss"), r"feature 'x' of role 'crosss'\..*Did you mean 'cross'\?"),
        (lambda: Feature("x", "cross", "float"), r"feature 'x' of kind 'float'\. A kind is category, number"),
        (lambda: Feature("x", "cross", "number", buckets=1), r"buckets=1.*at least 2 buckets"),
        (lambda: Feature("gap", "context"), r"'gap' as context category.*Rename the column"),
        (lambda: Feature("cluster_size", "cross"), r"'cluster_size' as a cross feature.*Rename the column"),
        (
            lambda: Feature("activity", "context"),
            r"'activity' as a category of the context.*Rename the column",
        ),
        (
            lambda: FeatureSchema(
                [
                    *SCHEMA.features,
                    Feature("activity", "context", "number"),
                    Feature("x", "context", of=("hour", "activity")),
                ]
            ),
            r"feature 'x' of 'activity'.*never of 'gap' or 'activity'",
        ),
        (lambda: Feature("item_id", "cross"), r"'item_id' as cross category\. It is an inherent category"),
        (lambda: FeatureSchema([Feature("b", "inherent")] * 2), r"features named 'b' twice"),
        (
            lambda: FeatureSchema([Feature("p", "cross")]),
            r"without inherent features.*Add Feature\(\"item_id\"",
        ),
    ],
)
def test_a_wrong_schema_says_so(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# -- codes -------------------------------------------------------------------------------------------------


def test_codes_of_items(fitted):
    """Rows a, b, c, d and the unknown item; d has no training line, and its brand was never seen."""
    np.testing.assert_array_equal(fitted.item_codes[:, 0], [1, 2, 3, 0, 0])
    np.testing.assert_array_equal(fitted.item_codes[:, 1], [1, 2, 0, 0, 0])
    # Training lines: a, b, a, a of sizes 1, 2, 1, 1, so the upper bucket begins at 2; c has none; d is beyond.
    np.testing.assert_array_equal(fitted.item_codes[:, 2], [1, 2, 0, 2, 0])
    assert not fitted.item_codes[-1].any()
    assert fitted.item_sizes == [5, 3, 3]
    assert fitted.item_widths == [64, 8, 8]


def test_codes_of_behaviours(fitted):
    """Prices 1, 2, 3, 4 of training lie in a quarter each; 900 is in the outer one, null is 0."""
    log, _ = tables()
    codes = fitted.line_codes(log.extra)
    np.testing.assert_array_equal(codes["price"], [1, 2, 3, 4, 0, 4])
    np.testing.assert_array_equal(codes["channel"], [3, 2, 0, 3, 1, 0])  # fax, shop, web; tv is new
    assert codes["price"].dtype == np.uint8
    assert fitted.cross_sizes == [len(fitted.coders["gap"].boundaries) + 2, 5, 4]


def test_codes_of_users_and_context(fitted):
    codes = fitted.profile_codes(np.array([0, 1, 2, -1]), pl.DataFrame({"hour": [8, 10, 23, None]}))
    np.testing.assert_array_equal(codes[:, 0], [1, 2, 0, 0])  # u, v; w is in no table; −1 is unknown
    np.testing.assert_array_equal(codes[:, 1], [2, 1, 0, 0])  # "10" < "8" < "9": text
    assert fitted.profile_sizes == [3, 4]
    with pytest.raises(SchemaError, match="no column 'hour'"):
        fitted.profile_codes(np.array([0]))


def test_what_is_not_training_changes_nothing():
    later = LOG.with_columns(
        price=pl.when(pl.col("user_id") == "w").then(-5.0).otherwise("price"),
        channel=pl.when(pl.col("user_id") == "w").then(pl.lit("web")).otherwise("channel"),
    )
    found = []
    for frame in (LOG, later):
        log, items = tables(frame)
        found.append(fit(SCHEMA, items, log.take(log.user < 2), USERS))
    np.testing.assert_array_equal(found[0].coders["price"].boundaries, found[1].coders["price"].boundaries)
    assert found[0].coders["channel"].vocabulary == found[1].coders["channel"].vocabulary


def test_rare_categories_are_unknown():
    log, items = tables()
    schema = FeatureSchema(
        [Feature("item_id", "inherent", min_count=2), Feature("channel", "cross", min_count=2)]
    )
    fitted = fit(schema, items, log)
    np.testing.assert_array_equal(fitted.item_codes[:, 0], [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(fitted.line_codes(log.extra)["channel"], [1, 0, 0, 1, 0, 0])


def test_categories_are_compared_as_text():
    log, items = tables()
    fitted = fit(FeatureSchema([Feature("brand", "inherent"), Feature("hour", "cross")]), items, log)
    whole, real, text = (pl.DataFrame({"hour": values}) for values in ([8, 9], [8.0, 9.0], ["8", "9"]))
    expected = fitted.line_codes(whole)["hour"]
    assert expected.all()
    for same in (real, text):
        np.testing.assert_array_equal(fitted.line_codes(same)["hour"], expected)
    odd = pl.DataFrame({"hour": [8.5, float("nan"), float("inf"), None]})
    np.testing.assert_array_equal(fitted.line_codes(odd)["hour"], 0)


NUMBER = st.none() | st.floats(allow_nan=True, allow_infinity=True, width=32)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(training=st.lists(NUMBER, min_size=1, max_size=30), asked=st.lists(NUMBER, max_size=10))
def test_numbers_keep_their_order(training, asked):
    log, items = tables(
        pl.concat([LOG[:1]] * len(training)).with_columns(
            timestamp=pl.int_range(len(training)), price=pl.Series(training, dtype=pl.Float64)
        )
    )
    fitted = fit(
        FeatureSchema([Feature("brand", "inherent"), Feature("price", "cross", "number", buckets=5)]),
        items,
        log,
    )
    column = pl.Series("price", asked, dtype=pl.Float64)
    codes = fitted.coders["price"].codes(column)
    value = column.to_numpy()
    assert ((codes == 0) == np.isnan(value)).all()
    assert codes.max(initial=0) < fitted.cross_sizes[0] <= 6
    known = np.flatnonzero(codes)
    assert (np.diff(codes[known[np.argsort(value[known], kind="stable")]]) >= 0).all()


# -- the gap -----------------------------------------------------------------------------------------------


def test_the_gap_is_coded_when_it_is_read(fitted):
    log, _ = tables()
    store = fitted.store(log)
    assert list(store.features) == ["price", "channel"]
    past = store.before(np.array([0, 1]), np.array([9, 6]))
    codes = fitted.cross_codes(past, np.array([9, 6]))
    np.testing.assert_array_equal(gaps(past, np.array([9, 6])), [8, 8, 3, 1])
    np.testing.assert_array_equal(codes[:, 0], fitted.coders["gap"].codes(pl.Series([8, 8, 3, 1])))
    np.testing.assert_array_equal(codes[:, 1:], [[1, 3], [2, 2], [4, 3], [0, 1]])
    later = fitted.cross_codes(past, np.array([10**6, 10**6]))
    assert (later[:, 0] == fitted.cross_sizes[0] - 1).all()  # beyond the range: the outer bucket


def test_gaps_are_fitted_evenly_in_their_logarithm():
    frame = pl.DataFrame({"user_id": ["u"] * 3000, "item_id": ["a"] * 3000, "timestamp": np.arange(3000)})
    log, items = tables(frame)
    boundaries = fit(
        FeatureSchema([Feature("brand", "inherent"), Feature("gap", "cross", "number")]), items, log
    )
    steps = np.diff(np.log(boundaries.coders["gap"].boundaries))
    assert len(steps) == 14
    np.testing.assert_allclose(steps, steps[0])


def test_nothing_at_or_after_the_request_is_coded(fitted):
    codes = {name: np.zeros(2, np.uint8) for name in ("price", "channel")}
    past = Histories(np.array([0, 2]), np.array([0, 1]), np.array([3, 7]), codes)
    assert fitted.cross_codes(past, np.array([8])).shape == (2, 3)
    with pytest.raises(LeakageError, match=r"1 behaviours at or after .* HistoryStore\.before"):
        fitted.cross_codes(past, np.array([7]))


def test_codes_of_other_features_are_refused(fitted):
    past = Histories(
        np.array([0, 1]), np.array([0]), np.array([3]), {"price": np.array([9]), "channel": np.array([0])}
    )
    with pytest.raises(
        DataError, match=r"codes 9 … 9 of 'price'\. These features know 0 … 4\. Build the store"
    ):
        fitted.cross_codes(past, np.array([7]))
    with pytest.raises(SchemaError, match="no column 'price'"):
        fitted.cross_codes(Histories.of([[0]]), np.array([7]))


@pytest.mark.parametrize("rows", [0, 1])
def test_a_log_of_hardly_any_line(rows):
    log, items = tables()
    fitted = fit(SCHEMA, items, log.take(np.arange(rows)), USERS)
    assert len(fitted.coders["gap"].boundaries) == 0
    assert (fitted.line_codes(log.extra)["price"] <= 2).all()


# -- tables that break a rule ------------------------------------------------------------------------------


def test_wrong_tables_are_refused():
    log, items = tables()
    text = FeatureSchema([Feature("brand", "inherent", "number")])
    with pytest.raises(SchemaError, match=r"column 'brand' of type String.*make the feature a category"):
        fit(text, items, log)
    nested = read_items(ITEMS.with_columns(brand=pl.lit([1, 2])))
    with pytest.raises(SchemaError, match=r"column 'brand' of type List.*one value a row"):
        fit(FeatureSchema([Feature("brand", "inherent")]), nested, log)
    with pytest.raises(SchemaError, match=r"no column 'brands'.*Did you mean 'brand'"):
        fit(FeatureSchema([Feature("brands", "inherent")]), items, log)
    with pytest.raises(SchemaError, match="no table of users for 'age'"):
        fit(SCHEMA, items, log)
    with pytest.raises(DataError, match="a user who stands twice"):
        fit(SCHEMA, items, log, pl.concat([USERS, USERS]))
    with pytest.raises(DataError, match="different vocabularies"):
        fit(SCHEMA, read_items(ITEMS[:3]), log, USERS)


# -- what others read --------------------------------------------------------------------------------------


def test_the_embedding_takes_every_code(fitted):
    embed = FeatureEmbedding(**fitted.embedding())
    assert embed.inherent_width == 64 + 8 + 8
    assert embed.catalogue().shape == (5, 80)
    for sizes, tables_of in ((fitted.cross_sizes, embed.crosses), (fitted.profile_sizes, embed.profiles)):
        assert [table.num_embeddings for table in tables_of] == sizes


def test_saved_and_loaded(fitted, tmp_path):
    fitted.save(tmp_path / "features")
    found = FittedFeatures.load(tmp_path / "features")
    log, _ = tables()
    assert found.schema == fitted.schema
    assert found.coders.keys() == fitted.coders.keys()
    for name in ("item_codes", "user_codes"):
        np.testing.assert_array_equal(getattr(found, name), getattr(fitted, name))
    for name, codes in fitted.line_codes(log.extra).items():
        np.testing.assert_array_equal(found.line_codes(log.extra)[name], codes)
    assert isinstance(found.coders["gap"], Buckets)
    np.testing.assert_array_equal(found.coders["gap"].boundaries, fitted.coders["gap"].boundaries)


def test_a_damaged_folder_is_named(fitted, tmp_path):
    folder = tmp_path / "features"
    fitted.save(folder)
    about = json.loads((folder / "features.json").read_text())
    (folder / "features.json").write_text(json.dumps(about | {"format": 9}))
    with pytest.raises(BundleVersionError, match="features of format 9"):
        FittedFeatures.load(folder)
    (folder / "features.json").write_text(json.dumps(about)[:-5])
    with pytest.raises(BundleDamagedError, match="Fit them anew"):
        FittedFeatures.load(folder)
    fitted.save(folder)
    (folder / "item_codes.npy").unlink()
    with pytest.raises(BundleDamagedError, match="cannot be read"):
        FittedFeatures.load(folder)


def test_the_store_of_the_features_is_a_history_store(fitted, tmp_path):
    log, _ = tables()
    fitted.store(log).save(tmp_path / "lives")
    found = HistoryStore.load(tmp_path / "lives")
    np.testing.assert_array_equal(found.features["price"], fitted.line_codes(log.extra)["price"])


def test_the_store_is_of_the_items_and_users_that_were_fitted(fitted, tmp_path):
    """A dense number means another item, and another user's age, in another log."""
    log, _ = tables()
    fitted.save(tmp_path / "features")
    for features in (fitted, FittedFeatures.load(tmp_path / "features")):
        assert features.version == fitted.version
        with pytest.raises(DataError, match="a log of other items than the features know"):
            features.store(read_interactions(LOG.with_columns(pl.col("item_id") + "2")))
        fewer, _ = tables(LOG.filter(pl.col("user_id") != "u"))
        with pytest.raises(DataError, match="a log of other users than the features know"):
            features.store(fewer)
    items = read_items(ITEMS)
    no_users = FeatureSchema(feature for feature in SCHEMA.features if feature.role != "user")
    fit(no_users, items, log).store(tables(LOG.filter(pl.col("user_id") != "u"))[0])
    other = fit(SCHEMA, items, log.take(log.user < 1), USERS)
    assert other.version != fitted.version


def test_numbers_are_no_codes(fitted):
    log, _ = tables()
    store = fitted.store(log)
    store = replace(store, features=store.features | {"price": np.full(len(log), 2.6)})
    with pytest.raises(DataError, match=r"numbers of 'price', float64, where codes are read\. Code them"):
        fitted.cross_codes(store.before([0]), np.array([10**6]))


# -- activity ----------------------------------------------------------------------------------------------


def test_activity_is_how_many_lines_came_before(tmp_path):
    """Of u, v and w: 0, 0, 2; 0, 1; 0. Lines of one moment do not count for each other."""
    schema = FeatureSchema([*SCHEMA.features, Feature("activity", "context", "number", buckets=6)])
    log, items = tables(LOG.with_columns(activity=pl.lit("not read")))
    found = fit(schema, items, log, USERS)
    assert found.coders["activity"].boundaries.tolist() == [1, 2]
    assert found.activity == 2  # after age and hour
    assert found.profile_sizes[2] == 4
    profile = found.profile_codes(np.array([0]), pl.DataFrame({"hour": [8]}))
    assert profile[0, 2] == 0  # until a batch reads the life
    found.save(tmp_path / "features")
    assert FittedFeatures.load(tmp_path / "features").coders["activity"].boundaries.tolist() == [1, 2]


def test_a_column_of_that_name_is_one_like_any_other_elsewhere():
    schema = FeatureSchema([Feature("item_id", "inherent"), Feature("activity", "cross")])
    log, items = tables(LOG.with_columns(activity=pl.lit("run")))
    found = fit(schema, items, log)
    assert found.activity is None
    assert found.line_codes(log.extra)["activity"].tolist() == [1] * 6
