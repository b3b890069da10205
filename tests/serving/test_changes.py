"""The file of the catalogue's changes: what every follower reads of it, through kills and compactions."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiglon.errors import StorageError
from tiglon.serving.bundle import Bundle
from tiglon.serving.changes import START, Changes, without_undone
from tiglon.serving.engine import Engine
from tiglon.serving.live import Live, _give
from tiglon.serving.messages import ItemsRequest, RankRequest, RecommendRequest
from tiglon.serving.publish import publish


def add(item, **columns):
    return ItemsRequest(add=[{"item_id": item, **columns}])


def remove(*items):
    return ItemsRequest(remove=list(items))


def keep(changes, *given):
    """Write changes as a server does; the place after them."""
    with changes.alone():
        place = changes.since(START).place
        for change in given:
            place = changes.append(change, place)
    return place


PRICES = [add("a", price=price) for price in range(8)]


# -- places ----------------------------------------------------------------------------------------------------


def test_a_place_is_followed_by_what_came_after_it(tmp_path):
    changes = Changes(tmp_path)
    assert changes.since(START) == ([], START, False)
    place = keep(changes, add("a"))
    keep(Changes(tmp_path), remove("a"))
    found = changes.since(place)
    assert (found.changes, found.anew) == ([remove("a")], False)
    assert changes.since(found.place) == ([], found.place, False)


def test_a_line_that_was_cut_short_is_not_read_and_its_place_is_taken(tmp_path):
    changes = Changes(tmp_path)
    place = keep(changes, add("a"))
    with changes.path.open("ab") as file:
        file.write(b'{"remove": ["b"')
    assert changes.since(place) == ([], place, False)
    keep(changes, remove("c"))
    assert changes.since(START).changes == [add("a"), remove("c")]


def test_who_had_read_everything_goes_on_behind_the_compacted_part(tmp_path):
    changes = Changes(tmp_path)
    place = keep(changes, *PRICES)
    assert changes.compact()
    assert changes.since(place) == ([], changes.since(START).place, False)
    keep(changes, remove("b"))
    found = changes.since(place)
    assert (found.changes, found.anew) == ([remove("b")], False)


def test_who_had_not_is_told_to_begin_anew(tmp_path):
    changes = Changes(tmp_path)
    early = keep(changes, *PRICES[:5])
    keep(changes, *PRICES[5:])
    changes.compact()
    assert changes.since(early) == ([PRICES[0], PRICES[-1]], changes.since(START).place, True)


def test_two_compactions_between_two_looks(tmp_path):
    changes = Changes(tmp_path)
    place = keep(changes, *PRICES)
    changes.compact()
    keep(changes, *PRICES)
    assert changes.compact()
    assert changes.since(place) == ([PRICES[0], PRICES[-1]], changes.since(START).place, True)


def test_a_line_that_nobody_could_have_written_is_named(tmp_path):
    changes = Changes(tmp_path)
    for line in ("not a change\n", '{"generation": "one"}\n'):
        changes.path.write_text(line)
        with pytest.raises(StorageError, match=r"no change of items.*Only a server.*delete it\."):
            changes.since(START)


# -- compaction ------------------------------------------------------------------------------------------------


def test_what_holds_stays_and_what_was_undone_goes(tmp_path):
    changes = Changes(tmp_path)
    keep(changes, *PRICES, remove("b"), add("c", title="x"), *PRICES, remove("b", "c"))
    size = changes.path.stat().st_size
    assert changes.compact()
    assert changes.path.stat().st_size < size / 2
    assert changes.since(START).changes == [PRICES[0], add("c", title="x"), PRICES[-1], remove("b", "c")]
    assert not changes.compact()  # nothing is left to leave out


def test_a_file_in_which_little_was_undone_is_left_as_it_is(tmp_path):
    changes = Changes(tmp_path)
    assert not changes.compact()  # an empty one
    keep(changes, *PRICES[:3], *(add(item) for item in range(9)))
    before = changes.path.read_bytes()
    assert not changes.compact()
    assert changes.path.read_bytes() == before


def test_a_line_that_was_cut_short_is_compacted_away(tmp_path):
    changes = Changes(tmp_path)
    place = keep(changes, *PRICES)
    with changes.path.open("ab") as file:
        file.write(b'{"remove": ["b"')
    assert changes.compact()
    assert changes.path.read_bytes().endswith(b"\n")
    assert changes.since(place).changes == []


def test_columns_and_kinds_of_values_are_told_apart():
    rows = [add(1, price=5), add("1", price=5), add(1, price=5.0), add(1, price=None), add(1, stock=2)]
    rows += [add(1, tags=["x"]), add(1, tags=[1.5])]
    assert without_undone(rows) == rows


def test_of_a_request_the_part_stays_that_still_holds():
    both = ItemsRequest(add=[{"item_id": 1, "price": 2}, {"item_id": 2, "price": 2}], remove=[3, 4])
    assert without_undone([add(1, price=1), both, add(1, price=3), remove(3)]) == [
        add(1, price=1),
        ItemsRequest(add=[{"item_id": 2, "price": 2}], remove=[4]),
        add(1, price=3),
        remove(3),
    ]


def test_a_disk_that_is_full_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    changes = Changes(tmp_path)
    keep(changes, *PRICES)
    before = changes.path.read_bytes()
    with monkeypatch.context() as patched:

        def full(_):
            raise OSError(28, "No space left on device")

        patched.setattr("tiglon.serving.changes.os.fsync", full)
        with pytest.raises(StorageError, match=r"No space left on device\. Nothing was changed there"):
            changes.compact()
    assert changes.path.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changes.jsonl", "changes.lock"]
    assert changes.compact()


def test_many_write_while_others_compact(tmp_path):
    """One file that each opens for itself; nobody's lines are lost, and a follower sees every one."""

    def write(whose):
        changes = Changes(tmp_path)
        for n in range(40):
            with changes.alone():
                changes.append(add(whose, n=n), changes.since(START).place)
            if n % 8 == 7:
                changes.compact()

    follower, place, prices = Changes(tmp_path), START, {}
    with ThreadPoolExecutor(3) as pool:
        writing = [pool.submit(write, whose) for whose in ("a", "b", "c")]
        while not all(done.done() for done in writing) or prices != dict.fromkeys("abc", 39):
            found, place, anew = follower.since(place)
            prices = {} if anew else prices
            for change in found:
                prices |= {row["item_id"]: row["n"] for row in change.add}
            for done in writing:
                assert not done.done() or done.exception() is None
    assert {row["item_id"] for change in follower.since(START).changes for row in change.add} == set("abc")
    assert json.loads(follower.path.open().readline())["generation"] > 1


# -- every bundle becomes what the whole file would have made of it ------------------------------------------------


class World:
    """A catalogue as the engine keeps one, but that an item's ID is the batch in which it came and its row."""

    def __init__(self, columns, alive):
        self.columns = columns
        self.rows = {item: {} for item in alive}
        self.alive = set(alive)
        self.ids = []

    def apply(self, change):
        fit = [
            row
            for row in change.add
            if set(row) <= {"item_id", *self.columns} and not self.dead(row["item_id"])
        ]
        new = [row for row in fit if row["item_id"] not in self.rows]
        if new:
            self.ids.append(sorted(new, key=repr))
        for row in fit:
            self.rows[row["item_id"]] = {**self.rows.get(row["item_id"], {}), **row}
            self.alive.add(row["item_id"])
        self.alive -= set(change.remove)
        return self

    def dead(self, item):
        return item in self.rows and item not in self.alive

    def shown(self):
        return {item: self.rows[item] for item in self.alive}, self.alive, set(self.rows), self.ids


ITEM = st.sampled_from([1, 2, "1", "x"])
ROW = st.fixed_dictionaries(
    {"item_id": ITEM},
    optional={"price": st.integers(0, 2), "old": st.just("o"), "new": st.sampled_from(["n", "m"])},
)
CHANGE = st.builds(
    lambda add, remove: ItemsRequest(
        add=add, remove=[item for item in remove if item not in {row["item_id"] for row in add}]
    ),
    add=st.lists(ROW, min_size=1, max_size=2, unique_by=lambda row: repr(row["item_id"])),
    remove=st.lists(ITEM, max_size=1),
) | st.builds(remove, ITEM)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.lists(CHANGE, max_size=14),
    st.sampled_from([("price",), ("price", "old"), ("price", "old", "new"), ()]),
    st.sets(ITEM),
)
def test_compaction_makes_no_difference_to_any_bundle(changes, columns, alive):
    kept = without_undone(changes)
    whole, short = World(columns, alive), World(columns, alive)
    for change in changes:
        whole.apply(change)
    for change in kept:
        short.apply(change)
    assert short.shown() == whole.shown()
    assert without_undone(kept) == kept


def test_a_bundle_gets_the_same_items_and_ids(bundle_path):
    title = Bundle.load(bundle_path).items.table["title"][0]  # one group of IDs, told apart by the last digit
    changes = [add(item, title=title) for item in (100, 101, 102)] + [add(7, title="other"), remove(100)]
    changes += [add(101, title=f"{title} {n}") for n in range(9)]
    changes += [remove(100), remove(5), add(7, title="last")]
    whole, short = Engine(Bundle.load(bundle_path)), Engine(Bundle.load(bundle_path))
    for change in changes:
        whole.items(change)
    kept = without_undone(changes)
    assert len(kept) < len(changes) / 1.5
    for change in kept:
        short.items(change)
    assert short.bundle.tiger.ids.version == whole.bundle.tiger.ids.version
    assert short.bundle.items.table.equals(whole.bundle.items.table)
    asked = RecommendRequest(user_id=3, request_id="x")
    assert short.recommend(asked) == whole.recommend(asked)


# -- workers that follow it ------------------------------------------------------------------------------------


def titles(live, *items):
    return {item.item_id: item.columns["title"] for item in live.engine.lookup(items).items}


def renamed(n):
    return add(1, title=f"title {n}")


def worker(bundle_path, folder):
    return Live(bundle_path, None, Changes(folder))


def test_a_bundle_that_cannot_be_taken_up_does_not_keep_removed_items_on_sale(
    bundle_path, tmp_path, monkeypatch
):
    publish(bundle_path, tmp_path / "home")
    one, two = worker(tmp_path / "home", tmp_path), worker(tmp_path / "home", tmp_path)
    pointer = tmp_path / "home" / "CURRENT"
    good = pointer.read_text()
    pointer.write_text("0" * 16 + "\n" + good)
    one.items(remove(2))
    for look in (two.renew, two.follow, two.renew):
        look()
    assert "0" * 16 in two.trouble
    assert titles(two, 1, 2).keys() == {1}

    def too_large(folder):
        raise MemoryError

    with monkeypatch.context() as patched:  # nothing that a bundle should raise
        patched.setattr(Bundle, "load", too_large)
        two._folder = tmp_path / "another"
        pointer.write_text(good)
        two.renew()
        assert two.trouble == "MemoryError"
    two.renew()
    assert two.trouble == ""
    assert titles(two, 1, 2).keys() == {1}


def test_of_a_change_that_does_not_fit_a_bundle_all_that_fits_is_taken(bundle_path):
    engine = Engine(Bundle.load(bundle_path))
    before = len(engine.bundle.items)
    same = [{"item_id": 1000 + n, "title": "same"} for n in range(300)]  # one group of IDs, of 256 at most
    _give(engine, ItemsRequest(add=[*same, {"item_id": 2000, "titel": "x"}, {"item_id": 3, "title": "new"}]))
    added = len(engine.bundle.items) - before
    assert 200 < added <= 256
    assert list(engine.lookup([1000, 1000 + added - 1]).items) != []
    assert [item.columns["title"] for item in engine.lookup([3]).items] == ["new"]
    _give(engine, remove(*engine.bundle.items.vocabulary.raw.to_pylist()))
    assert engine.bundle.tiger.ids.alive.sum() == 1  # a catalogue keeps one


def test_a_start_compacts_and_other_workers_follow(bundle_path, tmp_path):
    """One worker had read all of it and goes on; the other had not, and takes up everything anew."""
    one, late = worker(bundle_path, tmp_path), worker(bundle_path, tmp_path)
    for n in range(4):
        one.items(renamed(n))
    one.items(ItemsRequest(add=[{"item_id": 1000, "title": "gone soon"}]))
    late.follow()
    for n in range(4, 9):
        one.items(renamed(n))
    one.items(remove(1000, 2))
    size = (tmp_path / "changes.jsonl").stat().st_size
    third = worker(bundle_path, tmp_path)
    assert (tmp_path / "changes.jsonl").stat().st_size < size
    before = one.engine, late.engine
    third.items(remove(4))
    for live in (one, late):
        live.follow()
        assert live.trouble == ""
    assert one.engine is before[0]
    assert late.engine is not before[1]
    versions = set()
    for live in (one, late, third):
        assert titles(live, 1, 2, 3, 4, 1000).keys() == {1, 3}
        assert titles(live, 1) == {1: "title 8"}
        assert live.engine.rank(RankRequest(user_id=1, items=[2, 3, 4, 1000])).unknown == [2, 4, 1000]
        versions.add(live.engine.bundle.tiger.ids.version)
    assert len(versions) == 1  # the IDs of new items, too


def test_a_change_after_a_compaction_is_made_on_what_others_changed(bundle_path, tmp_path):
    late = worker(bundle_path, tmp_path)
    one = worker(bundle_path, tmp_path)
    for n in range(9):
        one.items(renamed(n))
    worker(bundle_path, tmp_path)  # compacts
    answer = late.items(ItemsRequest(remove=[2]))
    assert answer.removed == 1
    assert titles(late, 1, 2) == {1: "title 8"}
    assert late.items(ItemsRequest(remove=[2])).removed == 0


def test_a_compaction_that_the_disk_refuses_keeps_nobody_from_serving(bundle_path, tmp_path, monkeypatch):
    keep(Changes(tmp_path), *(renamed(n) for n in range(9)))

    def full(_):
        raise StorageError("the disk is full")

    monkeypatch.setattr(Changes, "compact", full)
    assert titles(worker(bundle_path, tmp_path), 1) == {1: "title 8"}


def test_of_a_change_the_rows_that_do_not_fit_a_bundle_are_left_out(bundle_path, tmp_path):
    rows = [
        {"item_id": 1000, "title": "new"},
        {"item_id": 1001, "colour": "red"},
        {"item_id": 3, "title": "b"},
    ]
    keep(Changes(tmp_path), ItemsRequest(add=rows, remove=[2]), add(1000, colour="red"))
    live = worker(bundle_path, tmp_path)
    assert titles(live, 1000, 1001, 2, 3) == {1000: "new", 3: "b"}
