import dataclasses
import json
import re
import shutil

import numpy as np
import polars as pl
import pytest

from tiglon.data.histories import HistoryStore
from tiglon.data.split import leave_last_out
from tiglon.errors import (
    BundleChangedError,
    BundleDamagedError,
    BundleVersionError,
    CapacityError,
    ConfigError,
    DataError,
    SchemaError,
    UnknownIdError,
)
from tiglon.evaluation.protocol import evaluate, to_json
from tiglon.retrieval.neighbours import Repeats
from tiglon.retrieval.retriever import Retriever
from tiglon.serving import bundle as bundles
from tiglon.serving.bundle import Bundle, matching_id, require_free, revise
from tiglon.serving.engine import Engine
from tiglon.serving.messages import RecommendRequest
from tiglon.types import Vocabulary


@pytest.fixture(scope="module")
def bundle(bundle_path):
    return Bundle.load(bundle_path)


@pytest.fixture
def copy(bundle_path, tmp_path):
    """A bundle that a test may damage."""
    return shutil.copytree(bundle_path, tmp_path / "copy")


# -- answers -----------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_engine_in_raw_ids(bundle):
    engine = Engine(bundle)
    found = bundle.recommend([3, np.int64(7)], 5)
    for user, row in zip((3, 7), found, strict=True):
        expected = engine.recommend(RecommendRequest(user_id=user, k=5)).items
        assert [(r.item_id, r.source) for r in row] == [(i.item_id, i.source) for i in expected]
        assert [r.score for r in row] == pytest.approx([i.score for i in expected], abs=1e-4)
        assert [r.score for r in row] == sorted((r.score for r in row), reverse=True)


def test_seen_items_are_hidden_as_the_bundle_was_made_or_as_asked(bundle):
    seen = set(bundle.histories.before([3]).item.tolist())  # raw ids are 0 … n−1 in this world
    assert bundle.exclude_seen
    assert not seen & {r.item_id for r in bundle.recommend([3], 30)[0]}
    assert seen < {r.item_id for r in bundle.recommend([3], 40, exclude_seen=False)[0]}


def test_who_is_not_known_gets_what_is_popular_and_is_told(bundle):
    popular = bundle.recommend([123456], 4)[0]
    assert {r.source for r in popular} == {"popularity"}
    counts = bundle.popularity.counts[[r.item_id for r in popular]]
    assert counts.tolist() == np.sort(bundle.popularity.counts)[::-1][:4].tolist()
    nothing, unknown = bundle.recommend(history=[[], ["wibble", 10**18]], k=4)
    assert nothing == unknown == popular


def test_a_history_given_stands_for_a_user(bundle):
    life = bundle.histories.before([5])
    times_differ = bundle.recommend(history=[life.item.tolist()], k=5)[0]
    assert [r.item_id for r in times_differ] == [r.item_id for r in bundle.recommend([5], 5)[0]]


def test_k_larger_than_the_catalogue_gives_the_catalogue(bundle):
    found = bundle.recommend([1, 999], 1000, exclude_seen=False)
    assert [sorted(r.item_id for r in row) for row in found] == [list(range(40))] * 2


def test_the_funnel_asks_what_the_bundle_holds(bundle):
    names = [retriever.name for retriever in bundle.sources(exclude_seen=True)]
    assert names == [
        "popularity",
        "text neighbours",
        "co-occurrence",
        "text + co-occurrence",
        "tiger",
        "sasrec",
        "two_tower",
    ]
    assert list(bundle.others) == bundle.manifest["retrievers"] == ["sasrec", "two_tower"]


@pytest.mark.parametrize("k", [0, -1, 2.5])
def test_a_bad_k_is_refused(bundle, k):
    with pytest.raises(ConfigError, match="k is a whole number of at least 1"):
        bundle.recommend([1], k)


def test_someone_must_be_asked_for(bundle):
    with pytest.raises(ConfigError, match="neither users nor a history"):
        bundle.recommend()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"users": 7}, "users of 7. It is a list. Pass users=[…]."),
        ({"users": "00003"}, "users of '00003'. It is a list. Pass users=[…]."),
        ({"users": [3, None]}, "users[1] of None. An id is a whole number or a string, as in the log."),
        ({"users": [1.5]}, "users[0] of 1.5. An id is a whole number or a string, as in the log."),
        (
            {"users": np.array([True])},
            "users[0] of True. An id is a whole number or a string, as in the log.",
        ),
        ({"history": "ab"}, "history of 'ab'. It is a list. Pass history=[[item ids], …]."),
        ({"history": ["a", "b"]}, "history[0] of 'a'. It is a list. Pass history=[[item ids], …]."),
        ({"history": [[1], 2]}, "history[1] of 2. It is a list. Pass history=[[item ids], …]."),
        (
            {"history": [[1, np.nan]]},
            "history[0][1] of nan. An id is a whole number or a string, as in the log.",
        ),
        (
            {"users": [3], "exclude_seen": "no"},
            "exclude_seen='no'. It is True, False, or None for as the bundle was made.",
        ),
    ],
)
def test_what_are_no_ids_is_refused(bundle, given, message):
    with pytest.raises(ConfigError) as error:
        bundle.recommend(**given)
    assert str(error.value) == message


def test_lists_of_every_kind_are_taken(bundle):
    expected = bundle.recommend([3, 7], 4)
    for users in ((3, 7), np.array([3, 7]), pl.Series([3, 7]), iter([3, 7])):
        assert bundle.recommend(users, 4) == expected
    lives = [[1, 2], [5, 6]]
    assert bundle.recommend(history=np.array(lives), k=4) == bundle.recommend(history=lives, k=4)


def test_ids_typed_on_a_command_line_take_the_vocabularys_type():
    assert matching_id(Vocabulary([2**60, 5]), str(2**60)) == 2**60
    assert matching_id(Vocabulary(["Müller", "007"]), "007") == "007"
    with pytest.raises(UnknownIdError, match=r"the id 'x'\. Ids here are whole numbers, such as 5\."):
        matching_id(Vocabulary([5]), "x")
    for other in ("05", " 5", "+5", "1_0", "٥", "-0"):
        with pytest.raises(UnknownIdError, match="Ids here are whole numbers"):
            matching_id(Vocabulary([5]), other)
    assert matching_id(Vocabulary([5]), "-5") == -5
    for vocabulary, text in (
        (Vocabulary(["a"]), ""),
        (Vocabulary(["a"]), "x" * 257),
        (Vocabulary(["a"]), "\udcff"),
        (Vocabulary([5]), str(2**63)),
    ):
        with pytest.raises(
            ConfigError, match="An id is a whole number of 64 bits, or a string of 1 … 256 char"
        ):
            matching_id(vocabulary, text)


# -- evaluation --------------------------------------------------------------------------------------------


def test_evaluating_again_gives_the_metrics_of_the_training(bundle):
    asked = []
    rows = bundle.evaluate(progress=lambda name, done, users: asked.append((name, done / users)))
    stored = {key: bundle.metrics[key] for key in ("split", "users", "skipped", "rows", "lead")}
    assert to_json(rows, "test") == stored
    assert stored["users"] + stored["skipped"] == len(bundle.histories)
    assert asked[-1] == ("funnel", 1.0)


def test_evaluating_asks_a_network_once_and_says_what_it_says_alone(bundle, monkeypatch):
    asked = []
    real = type(bundle.tiger).retrieve

    def counted(self, histories, k, **options):
        asked.append(len(histories))
        return real(self, histories, k, **options)

    monkeypatch.setattr(type(bundle.tiger), "retrieve", counted)
    rows = {row.name: row for row in bundle.evaluate()}
    test = leave_last_out(bundle.log()).test
    assert sum(asked) == (test.truth.lengths > 0).sum()
    for retriever in bundle.retrievers(bundle.exclude_seen):
        alone = evaluate(retriever, test, exclude_seen=bundle.exclude_seen)
        for metric, values in alone.per_user.items():
            assert np.array_equal(values, rows[retriever.name].per_user[metric]), (retriever.name, metric)


def test_a_split_is_test_or_validation(bundle):
    with pytest.raises(ConfigError, match=r"split 'foo'\. It is test or validation\."):
        bundle.evaluate("foo")
    with pytest.raises(ConfigError, match=r"exclude_seen='no'\. It is True, False"):
        bundle.evaluate(exclude_seen="no")


def test_repeats_stand_in_the_table_where_seen_items_do(bundle):
    rows = bundle.evaluate("validation")
    assert not {"repeats", "funnel"} & {row.name for row in rows}  # the funnel learned from these users
    assert "repeats" in {row.name for row in bundle.evaluate("validation", exclude_seen=False)}


def test_retrievers_are_retrievers(bundle):
    assert all(isinstance(retriever, Retriever) for retriever in bundle.retrievers(exclude_seen=False))


# -- new items ---------------------------------------------------------------------------------------------


def newcomers(bundle):
    """Two items that read like items 0 and 1, one that is known, in another order of columns."""
    title = bundle.items.table["title"]
    return pl.DataFrame({"title": [title[1], "known", title[0]], "item_id": [900, 7, 500]})


def test_new_items_are_recommended_at_once_and_old_ids_stay(bundle):
    later = bundle.add_items(newcomers(bundle))
    old = len(bundle.items)
    assert later.items.vocabulary.raw.to_pylist()[old:] == [500, 900]
    assert np.array_equal(later.tiger.ids.codes[:old], bundle.tiger.ids.codes)
    assert np.array_equal(later.tiger.ids.codes[old:, 0], bundle.tokenizer.encode(later.vectors[old:])[:, 0])
    assert later.tiger.ids.parent == bundle.tiger.ids.version
    everything = later.recommend([1], 100, exclude_seen=False)[0]
    assert {500, 900} < {r.item_id for r in everything}
    assert len(bundle.items) == len(bundle.tiger.trie) == 40


def test_new_items_enter_behind_their_likes_up_to_their_share(bundle):
    later = bundle.add_items(newcomers(bundle))
    plain = [r.item_id for r in bundle.recommend([1], 10, exclude_seen=False)[0]]
    mixed = later.recommend([1], 10, exclude_seen=False)[0]
    assert sum(r.source == "new item" for r in mixed) <= 1
    assert len({r.item_id for r in mixed}) == 10
    assert len({r.item_id for r in mixed if r.item_id < 40} & set(plain)) >= 7


def test_a_new_item_in_a_history_is_read_by_every_retriever(bundle):
    later = bundle.add_items(newcomers(bundle))
    (alone,) = later.recommend(history=[[500]], k=10)
    assert len(alone) == 10
    assert 500 not in {r.item_id for r in alone}
    assert {r.item_id for r in alone} != {r.item_id for r in later.recommend(history=[[]], k=10)[0]}


class Grown(Repeats):
    """A retriever that new items can join."""

    name = "grown"

    def add_items(self, items, vectors):
        self.items, self.joined = items, vectors


def test_new_items_join_every_retriever_that_takes_them(bundle):
    other = Grown()
    other.items, other.counts = bundle.items.vocabulary, bundle.popularity.counts
    whole = dataclasses.replace(bundle, others={"grown": other})
    later = whole.add_items(newcomers(bundle))
    assert later.others["grown"].items == later.items.vocabulary
    assert np.array_equal(later.others["grown"].joined, later.vectors[40:])
    assert other.items == bundle.items.vocabulary  # the one before is as it was


def test_any_number_of_items_without_words_can_join(bundle):
    """Their vectors are one, so a tokenizer would give all of them the same codes, and their groups are small."""
    grown = bundle.add_items(pl.DataFrame({"item_id": range(1_000, 1_300), "title": [None] * 300}))
    assert len(grown.items) == len(bundle.items) + 300
    ids = grown.tiger.ids.codes
    np.testing.assert_array_equal(ids[: len(bundle.items)], bundle.tiger.ids.codes)
    assert len(np.unique(ids, axis=0)) == len(ids)
    again = bundle.add_items(pl.DataFrame({"item_id": range(1_299, 999, -1), "title": [""] * 300}))
    assert again.tiger.ids.version == grown.tiger.ids.version


def test_a_full_group_says_what_to_do(bundle):
    digits = bundle.tiger.ids.sizes[-1]
    twins = pl.DataFrame({"item_id": range(1_000, 1_001 + digits), "title": ["lagoba"] * (digits + 1)})
    with pytest.raises(CapacityError, match=r"Give items texts that tell them apart, or train anew"):
        bundle.add_items(twins)


def test_items_that_are_known_already_change_nothing(bundle):
    assert bundle.add_items(newcomers(bundle)[1:2]) is bundle


def test_a_saved_update_is_a_new_version_with_the_same_answers(bundle, tmp_path):
    later = bundle.add_items(newcomers(bundle))
    later.save(tmp_path / "later")
    loaded = Bundle.load(tmp_path / "later")
    assert loaded.version != bundle.version
    assert loaded.recommend([1, 2], 20) == later.recommend([1, 2], 20)
    assert "repeats" not in {row.name for row in loaded.evaluate()}
    assert loaded.add_items(newcomers(bundle)) is loaded


@pytest.mark.parametrize(
    "table, error, message",
    [
        (
            {"item_id": ["a"], "title": ["x"]},
            SchemaError,
            "The two tables name an item by the same id of the same type",
        ),
        (
            {"item_id": [77], "colour": ["red"]},
            SchemaError,
            "The bundle's items have item_id, title, category",
        ),
        ({"item_id": [77, 77], "title": ["x", "y"]}, DataError, "stand more than once"),
        ({"id": [77], "title": ["x"]}, SchemaError, "no column 'item_id'"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(bundle, table, error, message):
    with pytest.raises(error, match=re.escape(message)):
        bundle.add_items(pl.DataFrame(table))


# -- files -------------------------------------------------------------------------------------------------


def test_a_bundle_comes_back_as_it_was(bundle, tmp_path):
    bundle.save(tmp_path / "again")
    again = Bundle.load(tmp_path / "again")
    assert again.version == bundle.version
    assert again.recommend([1, 2, 3], 10) == bundle.recommend([1, 2, 3], 10)
    assert again.items.table.equals(bundle.items.table)
    assert isinstance(again.histories, HistoryStore)


def test_a_bundle_that_is_replaced_while_it_is_read_is_read_again(bundle, copy, monkeypatch):
    """Else answers would name the old version and come from new networks."""
    new = bundle.add_items(pl.DataFrame({"item_id": [500], "title": ["x"]}))
    real, turns = bundles._checked_manifest, []

    def checked(path):
        manifest = real(path)
        turns.append(manifest["version"])
        if len(turns) == 1:
            new.save(copy)
        return manifest

    monkeypatch.setattr(bundles, "_checked_manifest", checked)
    found = Bundle.load(copy)
    assert len(turns) == 2
    assert turns[0] == bundle.version != found.version == turns[1]
    assert len(found.items) == len(bundle.items) + 1


def test_two_changes_at_once_are_both_kept(bundle, copy):
    first, second = (pl.DataFrame({"item_id": [i], "title": ["x"]}) for i in (500, 501))
    turns = []

    def change(one):
        turns.append(one)
        if len(turns) == 1:
            revise(copy, lambda other: other.add_items(second))
        return one.add_items(first)

    revise(copy, change)
    assert len(turns) == 2
    assert Bundle.load(copy).items.table["item_id"].to_list()[-2:] == [501, 500]
    with pytest.raises(BundleChangedError, match="A change takes the place of what it was made of"):
        bundle.add_items(first).save(copy, instead_of=bundle.version)


def test_the_manifest_lists_every_file(bundle, bundle_path):
    there = {p.relative_to(bundle_path).as_posix() for p in bundle_path.rglob("*") if p.is_file()}
    assert there == {*bundle.manifest["files"], "manifest.json"}
    assert all(name.endswith((".json", ".npy", ".parquet", ".safetensors", ".txt")) for name in there)
    assert bundle.manifest["recipe"]["tiger"]["train"]["epochs"] == 2
    assert bundle.manifest["data"]["items"] == 40
    assert {(bundle_path / name).stat().st_mode & 0o777 for name in there} == {0o644}


def test_every_damaged_file_is_named(copy):
    for name in Bundle.load(copy).manifest["files"]:
        file = copy / name
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[len(damaged) // 2] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(BundleDamagedError, match=re.escape(f"{name} in {copy} is damaged")):
            Bundle.load(copy)
        file.unlink()
        with pytest.raises(BundleDamagedError, match=re.escape(f"{name} is missing from {copy}")):
            Bundle.load(copy)
        file.write_bytes(whole)
    Bundle.load(copy)


def test_a_retriever_that_could_not_be_read_again_is_not_saved(bundle, tmp_path):
    whole = dataclasses.replace(bundle, others={"grown": Grown()})
    with pytest.raises(ConfigError) as error:
        whole.save(tmp_path / "whole")
    assert str(error.value).startswith(
        "the retriever 'grown', a Grown. A bundle keeps what it can read again: "
    )
    assert str(error.value).endswith("Enter its load into tiglon.serving.bundle.READERS.")
    assert not list(tmp_path.iterdir())


def test_a_retriever_of_a_kind_that_is_not_known_asks_for_a_newer_tiglon(bundle, tmp_path, monkeypatch):
    bundle.save(tmp_path / "b")
    monkeypatch.setattr("tiglon.serving.bundle.READERS", {})
    with pytest.raises(BundleVersionError, match=r"a retriever of the kind SasRec in .*Update Tiglon"):
        Bundle.load(tmp_path / "b")


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda text: text[: len(text) // 2], "manifest.json cannot be read"),
        (lambda text: "[]", "manifest.json cannot be read"),
        (
            lambda text: text.replace('"exclude_seen": true', '"exclude_seen": false'),
            "not what its version says",
        ),
    ],
)
def test_a_damaged_manifest_is_named(copy, edit, message):
    manifest = copy / "manifest.json"
    manifest.write_text(edit(manifest.read_text()))
    with pytest.raises(BundleDamagedError, match=message):
        Bundle.load(copy)


def test_a_newer_bundle_asks_for_a_newer_tiglon(copy):
    manifest = copy / "manifest.json"
    content = json.loads(manifest.read_text()) | {"format": 2, "tiglon": "7.0.0"}
    manifest.write_text(json.dumps(content))
    with pytest.raises(BundleVersionError) as error:
        Bundle.load(copy)
    assert str(error.value).startswith("a bundle of format 2, written by Tiglon 7.0.0. This is Tiglon ")
    assert str(error.value).endswith("reads formats up to 1. Update Tiglon: pip install --upgrade tiglon.")


def test_what_is_no_bundle_is_no_bundle(tmp_path):
    with pytest.raises(BundleDamagedError, match=r"no bundle at .*tiglon train"):
        Bundle.load(tmp_path / "nothing")
    with pytest.raises(BundleDamagedError, match=r"has no manifest.json"):
        Bundle.load(tmp_path)


@pytest.mark.parametrize(
    "file, what", [("ranker.json", "is a ranker"), ("CURRENT", "is a home of published")]
)
def test_a_ranker_and_a_home_are_named_as_such(bundle, tmp_path, file, what):
    (tmp_path / file).touch()
    with pytest.raises(BundleDamagedError, match=f"{tmp_path} {what}"):
        Bundle.load(tmp_path)
    for call in (lambda: bundle.save(tmp_path), lambda: require_free(tmp_path, overwrite=False)):
        with pytest.raises(ConfigError, match=f"{tmp_path}, which {what}"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == [file]
