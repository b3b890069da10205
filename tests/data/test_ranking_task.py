import functools
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiglon.data.events import read_interactions, read_items
from tiglon.data.features import Feature, FeatureSchema, fit
from tiglon.data.ranking import (
    BASKET_TASKS,
    BasketConfig,
    RankingTask,
    complete_journey_task,
    completion,
    impressions,
    kuairand_task,
    next_basket,
)
from tiglon.data.sources import Source, kuairand
from tiglon.errors import ConfigError, DataError, LeakageError, SchemaError
from tiglon.types import Histories, Vocabulary

SCHEMA = FeatureSchema(
    [
        Feature("item_id", "inherent", width=16),
        Feature("gap", "cross", "number"),
        Feature("price", "cross", "number", buckets=4),
        Feature("hour", "context"),
    ]
)
DAY = 86_400


def log_of(users=12, items=30, events=600, seed=0):
    """Baskets at random hours of 100 days, and their catalogue."""
    rng = np.random.default_rng(seed)
    time = 1_500_000_000 + DAY * rng.integers(100, size=events) + 3600 * rng.integers(3, size=events)
    frame = pl.DataFrame(
        {
            "user_id": rng.integers(users, size=events),
            "item_id": np.minimum(rng.geometric(0.1, events), items) - 1,
            "timestamp": time,
            "price": rng.random(events),
            "quantity": rng.integers(0, 4, size=events),
            "hour": time // 3600 % 24,
        }
    )
    catalogue = read_items(pl.DataFrame({"item_id": np.arange(items)}))
    return read_interactions(frame, items=catalogue.vocabulary), catalogue


@functools.cache
def basket_task(seed=0, tasks=BASKET_TASKS, counts=None, hard=None, **settings):
    log, items = log_of()
    counts = np.bincount(log.item, minlength=len(items)) if counts is None else counts
    config = BasketConfig(seed=seed, **{"first": 2, "negatives": 5} | settings)
    return log, next_basket(
        log, fit(SCHEMA, items, log), np.array(counts), config=config, tasks=tasks, hard=hard
    )


def rows_of(batch, b):
    """What request b of a batch holds, without padding."""
    past, n = batch.past, int(batch.past.mask[b].sum())
    kept = ~batch.label[b].isnan().all(dim=1)
    assert past.mask[b, :n].all()
    return [
        past.item[b, :n],
        past.cross[b, :n],
        past.gap[b, :n],
        batch.profile[b],
        batch.item[b][kept],
        batch.label[b][kept].nan_to_num(-1.0),
    ]


# -- batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("last", [None, 4])
def test_every_request_is_in_one_batch_as_it_is_alone(seed, last):
    log, task = basket_task(tasks=("next_basket",))
    batches = task.batches(7, last=last, seed=seed)
    assert sorted(np.concatenate(batches.rows)) == list(range(len(task)))
    if seed is None:
        np.testing.assert_array_equal(np.concatenate(batches.rows), np.arange(len(task)))
    for rows, batch in zip(batches.rows, batches, strict=True):
        assert len(rows) <= 7
        for b, r in list(enumerate(rows))[::3]:
            alone = task.select(np.array([r])).batches(last=last)[0]
            for value, expected in zip(rows_of(batch, b), rows_of(alone, 0), strict=True):
                assert torch.equal(value, expected)
            lines = np.flatnonzero((log.user == task.user[r]) & (log.time < task.time[r]))
            lines = lines if last is None else lines[-last:]
            np.testing.assert_array_equal(rows_of(batch, b)[0], log.item[lines])
            np.testing.assert_array_equal(rows_of(batch, b)[2], task.time[r] - log.time[lines])


def test_shuffling_saves_padding_and_is_repeatable():
    _, task = basket_task()
    assert all(
        torch.equal(a.item, b.item)
        for a, b in zip(task.batches(5, seed=1), task.batches(5, seed=1), strict=True)
    )
    first, second = (np.concatenate(task.batches(5, seed=s).rows) for s in (1, 2))
    assert not np.array_equal(first, second)
    at_random = task.select(np.random.default_rng(0).permutation(len(task)))
    sorted_cells, cells = (
        sum(len(rows) * t.lengths[rows].max() for rows in t.batches(5, seed=seed).rows)
        for t, seed in ((task, 1), (at_random, None))
    )
    assert sorted_cells < 0.8 * cells


@settings(max_examples=50, deadline=None, derandomize=True)
@given(requests=st.integers(1, 9), cells=st.integers(1, 300), seed=st.none() | st.integers(0, 3))
def test_long_lives_share_a_batch_with_few(requests, cells, seed):
    _, task = basket_task(requests=40)
    batches = task.batches(requests, seed=seed, cells=cells)
    assert sorted(np.concatenate(batches.rows)) == list(range(40))
    for rows in batches.rows:
        assert len(rows) <= requests
        assert len(rows) == 1 or len(rows) * task.lengths[rows].max() <= cells


def test_a_slice_of_batches_is_batches():
    _, task = basket_task()
    batches = task.batches(5, seed=0)
    rest = batches[3:]
    assert len(rest) == len(batches) - 3
    assert torch.equal(rest[0].item, batches[3].item)
    assert len(list(batches)) == len(batches)
    with pytest.raises(ConfigError, match="requests=0"):
        task.batches(0)


def empty_past(task, user):
    """One request for the first two items, by someone before anything happened."""
    return RankingTask(
        task.store, task.features, np.array([user]), np.array([0]), np.array([0, 2]), np.array([0, -1]),
        np.array([[1.0], [0.0]], np.float32), np.zeros((1, 1), np.int64), ("next_basket",),
    )  # fmt: skip


@pytest.mark.parametrize("user", [-1, 0])
def test_an_empty_history_is_one_column_of_padding(user):
    _, task = basket_task()
    batch = empty_past(task, user).batches()[0]
    assert batch.past.mask.tolist() == [[False]]
    assert batch.past.gap.tolist() == [[1.0]]
    assert batch.item.tolist() == [[0, -1]]
    assert len(empty_past(task, user).select(np.array([False])).batches()) == 0


def test_an_unknown_item_is_a_behaviour():
    _, task = basket_task()
    item = task.store.item.copy()
    item[:] = -1
    batch = replace(task, store=replace(task.store, item=item)).batches(4)[0]
    assert (batch.past.item[batch.past.mask] == -1).all()
    assert torch.equal(batch.past.mask, task.batches(4)[0].past.mask)


class Leaky:
    """A store that gives whole lives."""

    def __init__(self, store):
        self.store, self.users, self.items = store, store.users, store.items

    def before(self, users, time, last=None):
        return self.store.before(users, None, last)

    def lengths(self, users, time, last=None):
        return self.store.lengths(users, None, last)


def test_the_future_is_never_in_a_batch():
    _, task = basket_task()
    with pytest.raises(LeakageError, match="behaviours at or after the time of their request"):
        replace(task, store=Leaky(task.store)).batches()[0]


def test_clusters_say_how_many_they_stand_for():
    _, task = basket_task()
    n = len(task.store.item)
    sized = replace(task.store, features=task.store.features | {"cluster_size": np.arange(n)})
    past = replace(task, store=sized).batches(3)[0].past
    assert past.size.dtype == torch.float32
    plain = task.batches(3)[0].past
    assert plain.size is None
    assert torch.equal(past.cross, plain.cross)
    np.testing.assert_array_equal(
        past.size[past.mask], sized.before(task.user[:3], task.time[:3]).features["cluster_size"]
    )


def test_the_activity_counts_whole_lives():
    """Those before the request, however few of them are read."""
    log, items = log_of()
    features = fit(FeatureSchema([*SCHEMA.features, Feature("activity", "context", "number")]), items, log)
    task = next_basket(log, features, np.bincount(log.item, minlength=len(items)))
    coder, column = features.coders["activity"], features.activity
    before = [
        int(((log.user == user) & (log.time < time)).sum())
        for user, time in zip(task.user, task.time, strict=True)
    ]
    assert not task.profile[:, column].any()
    for last in (None, 3):
        found = np.concatenate([batch.profile[:, column] for batch in task.batches(7, last=last)])
        np.testing.assert_array_equal(found, coder.of(np.array(before, float)))
    assert not task.profile[:, column].any()  # a batch's codes are its own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time": np.zeros(3, np.int64)}, "3 times"),
        ({"offsets": np.zeros(0, np.int64)}, "0 offsets"),
        ({"label": np.zeros((2, 1), np.float32)}, r"labels of shape \(2, 1\)"),
        ({"profile": lambda t: np.zeros((len(t), 5), np.int64)}, "5 profile codes"),
        ({"item": lambda t: t.item + 30}, r"a candidate outside −1 … 29"),
        ({"label": lambda t: t.label + 1.5}, r"labels outside 0 … 1\. NaN stands for no label"),
        ({"offsets": lambda t: t.offsets + 1}, "offsets that do not run from 0"),
        (
            {"store": lambda t: replace(t.store, items=Vocabulary(range(31)))},
            "lives of 31 items, where the features know 30. Both are of one catalogue",
        ),
    ],
)
def test_a_task_that_does_not_fit_together_says_so(change, message):
    _, task = basket_task()
    change = {name: value(task) if callable(value) else value for name, value in change.items()}
    with pytest.raises(DataError, match=message):
        replace(task, **change)


# -- the next basket ---------------------------------------------------------------------------------------


def test_candidates_and_labels_are_those_of_the_definition():
    log, task = basket_task()
    assert task.tasks == BASKET_TASKS
    quantity = log.extra["quantity"].to_numpy()
    end = log.time.max()
    baskets = {u: np.unique(log.time[log.user == u]) for u in range(len(log.users))}
    asked = sorted((u, t) for u, times in baskets.items() for t in times[2:])
    assert sorted(zip(task.user, task.time, strict=True)) == asked
    for r, (user, time) in enumerate(zip(task.user, task.time, strict=True)):
        rows = slice(task.offsets[r], task.offsets[r + 1])
        item, label = task.item[rows], task.label[rows]
        assert len(set(item)) == len(item)
        own = log.user == user
        basket = own & (log.time == time)
        assert set(item[label[:, 0] == 1]) == set(log.item[basket])
        assert (label[:, 0] == 0).sum() == 5
        month = own & (log.time >= time) & (log.time < time + 30 * DAY)
        for i, (_, within, several) in zip(item, label, strict=True):
            bought = basket & (log.item == i)
            assert several == (bought & (quantity >= 2)).any()
            if time + 30 * DAY > end:
                assert np.isnan(within)
            else:
                assert within == (month & (log.item == i)).any()


def test_tasks_are_a_function_of_the_seed():
    first, again, other = (basket_task(seed)[1] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.item, again.item)
    assert not np.array_equal(first.item, other.item)


def test_the_order_of_candidates_tells_nothing():
    _, task = basket_task()
    first = task.label[task.offsets[:-1], 0].mean()
    assert abs(first - task.label[:, 0].mean()) < 0.1


def test_caps():
    _, task = basket_task(positives=1, requests=50)
    assert len(task) == 50
    np.testing.assert_array_equal(np.bincount(task.owner, task.label[:, 0]), 1)
    np.testing.assert_array_equal(np.diff(task.offsets), 6)


def test_items_without_training_lines_are_no_candidates():
    log, _ = log_of()
    counts = np.bincount(log.item, minlength=30)
    counts[[0, 3]] = 0
    every = np.arange(30)
    _, task = basket_task(counts=tuple(counts), hard=lambda user, time: np.tile(every, (len(user), 1)))
    assert set(task.item) == set(np.flatnonzero(counts))
    # Everything that is known is a candidate of each request, once: positive or hard.
    assert (np.diff(task.offsets) == (counts > 0).sum()).all()


def test_hard_negatives_join():
    _, task = basket_task(negatives=0, hard=lambda user, time: np.stack([user % 30, user * 0 - 1], axis=1))
    for r in range(len(task)):
        item = task.item[task.offsets[r] : task.offsets[r + 1]]
        label = task.label[task.offsets[r] : task.offsets[r + 1], 0]
        assert task.user[r] in item
        assert set(item[label == 0]) <= {task.user[r]}
    with pytest.raises(DataError, match=r"hard negatives of shape \(2,\)"):
        basket_task(hard=lambda user, time: np.zeros(2))


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_negatives_follow_popularity(power):
    """With more chances than candidates taken, the first draw of many requests has the stated shares."""
    counts = np.zeros(30, np.int64)
    counts[:4] = 1, 2, 3, 30
    log, items = log_of()
    log = replace(log, item=np.full_like(log.item, 0))
    task = next_basket(
        log, fit(SCHEMA, items, log), counts, config=BasketConfig(first=0, negatives=1, power=power)
    )
    drawn = np.bincount(task.item[task.label[:, 0] == 0], minlength=30)
    share = np.where(counts > 0, counts.astype(float) ** power, 0)
    share[0] = 0  # in every basket
    np.testing.assert_allclose(drawn / drawn.sum(), share / share.sum(), atol=0.07)


def test_small_catalogues_give_fewer_negatives():
    log, items = log_of(items=3)
    counts = np.bincount(log.item, minlength=3)
    task = next_basket(log, fit(SCHEMA, items, log), counts, config=BasketConfig(negatives=20))
    assert (np.diff(task.offsets) == 3).all()


def test_wrong_wishes_are_refused():
    with pytest.raises(ConfigError, match=r"task 'next_baskt'\. Did you mean 'next_basket'\?"):
        basket_task(tasks=("next_baskt",))
    with pytest.raises(ConfigError, match="negatives=-1"):
        basket_task(negatives=-1)
    for requests in (0, -1):
        with pytest.raises(ConfigError, match=f"requests={requests}"):
            basket_task(requests=requests)
        log, items = log_of()
        with pytest.raises(ConfigError, match=f"requests={requests}"):
            impressions(log, fit(SCHEMA, items, log), {"x": "quantity"}, requests=requests)
    with pytest.raises(DataError, match=r"no basket to ask for.*Lower `first`"):
        basket_task(first=10_000)
    log, items = log_of()
    log = replace(log, extra=log.extra.drop("quantity"))
    with pytest.raises(SchemaError, match="no column 'quantity'"):
        next_basket(log, fit(SCHEMA, items, log), np.ones(30), tasks=("quantity_2",))


# -- Complete Journey --------------------------------------------------------------------------------------


def groceries(users=40, events=4000) -> Source:
    rng = np.random.default_rng(1)
    start = 1_483_272_000
    lines = pl.DataFrame(
        {
            "user_id": rng.integers(users, size=events),
            "item_id": rng.integers(200, size=events),
            "timestamp": start + DAY * rng.integers(364, size=events),
            "quantity": rng.integers(1, 4, size=events),
            "sales_value": rng.random(events).round(2),
        }
    )
    names = ("product_type", "product_category", "department", "brand", "manufacturer_id")
    items = pl.DataFrame({"item_id": np.arange(200)} | dict.fromkeys(names, "x"))
    return Source(lines, items, "say this")


def test_complete_journey_is_split_by_household_and_time():
    source = groceries()
    tasks = complete_journey_task(source=source, train_requests=300, negatives=3)
    assert tasks.note == "say this"
    end = source.interactions["timestamp"].max() + 1
    groups = [set(task.user) for task in tasks[:3]]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert [len(group) for group in groups[1:]] == [4, 8]
    week = 7 * DAY
    assert len(tasks.train) == 300
    assert tasks.train.time.max() < end - 12 * week <= tasks.validation.time.min()
    assert tasks.validation.time.max() < end - 8 * week <= tasks.test.time.min()
    assert tasks.train.store is tasks.test.store
    batch = tasks.test.batches(4)[0]
    assert batch.past.cross.shape[2] == 3
    assert batch.profile.shape[1] == 2


def test_what_held_out_households_do_teaches_nothing():
    source = groceries()
    one = complete_journey_task(source=source, negatives=3)
    users = list(one.train.store.users.decode(np.unique(one.train.user)))
    strange = pl.when(pl.col("user_id").is_in(users)).then("sales_value").otherwise(1000.0)
    other = complete_journey_task(
        source=replace(source, interactions=source.interactions.with_columns(sales_value=strange)),
        negatives=3,
    )
    np.testing.assert_array_equal(one.train.item, other.train.item)
    for a, b in zip(one.train.batches(64), other.train.batches(64), strict=True):
        assert torch.equal(a.past.cross, b.past.cross)


# -- KuaiRand ----------------------------------------------------------------------------------------------

LINES = """user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab
0,3,20220408,1200,1649390400123,1,0,0,0,0,0,1,9000,8000,0,0,0,0,1
0,5,20220408,1201,1649390460123,0,1,0,0,0,0,0,100,60000,0,0,1,0,4
0,4,20220408,1201,1649390460123,1,0,0,0,0,0,0,500,0,0,0,1,0,4
1,3,20220409,1201,1649476860000,0,0,0,0,0,0,0,,8000,0,0,1,0,4
1,4,20220410,1201,1649548740000,1,0,0,0,0,0,1,30000,60000,0,0,1,0,2
0,3,20220411,0800,1649635200000,0,0,0,0,0,0,0,4000,8000,0,0,0,0,1
0,4,20220412,0800,1649721600000,1,1,0,0,0,0,1,{play},60000,0,0,0,0,1
"""
VIDEOS = """video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,music_id,music_type,tag
3,441,NORMAL,2020-07-08,ShortImport,1.0,8000.0,720,1280,989,9.0,12
4,441,NORMAL,2020-07-08,ShortImport,1.0,,720,1280,989,9.0,12
5,7,AD,2020-07-09,LongImport,1.0,60000.0,720,1280,990,4.0,"3,8"
"""


@pytest.fixture
def videos(tmp_path):
    def read(play=60_000):
        (tmp_path / "log_standard_4_08_to_4_21_pure.csv").write_text(LINES.format(play=play))
        (tmp_path / "video_features_basic_pure.csv").write_text(VIDEOS)
        return kuairand(tmp_path)

    return read


def everything(task):
    return [value for batch in task.batches() for b in range(len(batch.item)) for value in rows_of(batch, b)]


def test_kuairand_is_split_by_time(videos):
    train, validation, test, note = kuairand_task(videos())
    assert "CC BY-SA" in note
    assert train.tasks == ("is_click", "long_view", "is_like")
    assert len(train) == 4  # five lines, of which two are one moment
    np.testing.assert_array_equal(validation.label, [[0, 0, 0]])
    np.testing.assert_array_equal(test.label, [[1, 1, 1]])
    # Topics 12 and 3, two authors of whom one has two training lines.
    codes = dict(zip((3, 4, 5), test.features.item_codes, strict=False))
    assert codes[5][1] == 0 < codes[3][1] == codes[4][1]
    assert codes[4][3] == 0 < codes[3][3] < codes[5][3]
    completion_code = test.batches()[0].past.cross[0, :, 1]
    # 9000/8000 counts as 1, 100/60000 is next to nothing, zero duration is unknown, 4000/8000 is between.
    assert completion_code[2] == 0 < completion_code[1] <= completion_code[3] <= completion_code[0]
    assert completion_code[1] < completion_code[0]


@pytest.mark.parametrize("play", [0, 60_000, 10**9, ""])
def test_the_targets_own_play_time_is_never_read(videos, play):
    expected = everything(kuairand_task(videos(12_345)).test)
    found = everything(kuairand_task(videos(play)).test)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_completion_is_a_share_of_what_can_be_watched():
    frame = pl.DataFrame(
        {
            "play_time_ms": [500, 900, 0, 5, None, 5, -1],
            "duration_ms": [1000, 300, 70, 0, 10, None, 10],
        }
    )
    assert frame.select(completion()).to_series().to_list() == [0.5, 1.0, 0.0, None, None, None, None]


def test_kuairand_says_what_it_cannot_do(videos):
    with pytest.raises(ConfigError, match=r"label 'is_clik'\. Did you mean 'is_click'\?"):
        kuairand_task(videos(), labels=["is_clik"])
    with pytest.raises(DataError, match="shorter than 60 days"):
        kuairand_task(videos(), validation_days=30, test_days=30)
    source = videos()
    source = replace(source, interactions=source.interactions.drop("duration_ms"))
    with pytest.raises(SchemaError, match="no column 'duration_ms'"):
        kuairand_task(source)


def test_impressions_without_a_label_stay_without():
    log, items = log_of(events=50)
    log = replace(
        log, extra=log.extra.with_columns(label=pl.Series([None, 1] * (len(log) // 2) + [0] * (len(log) % 2)))
    )
    task = impressions(log, fit(SCHEMA, items, log), {"seen": "label"}, requests=5)
    assert len(task) == 5
    assert np.isnan(task.label).any() or (task.label == 1).any()
    with pytest.raises(DataError, match="no moment to ask for"):
        impressions(log, task.features, {"seen": "label"}, np.zeros(len(log), bool))


def test_histories_of_equal_times_and_equal_items():
    """A life of one item at two times: the request of the second sees all of the first."""
    frame = pl.DataFrame(
        {
            "user_id": [1, 1, 1],
            "item_id": [7, 7, 8],
            "timestamp": [5, 9, 5],
            "hour": [0, 0, 0],
            "price": [1.0, 1.0, 1.0],
        }
    )
    log, items = read_interactions(frame), read_items(pl.DataFrame({"item_id": [7, 8]}))
    task = next_basket(log, fit(SCHEMA, items, log), np.ones(2), config=BasketConfig(first=1))
    past = task.batches()[0].past
    assert past.item.tolist() == [[0, 1]]
    assert past.gap.tolist() == [[4, 4]]
    assert isinstance(task.store.before(task.user, task.time), Histories)
