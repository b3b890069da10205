"""Raw ids to dense ids, by both ways."""

import numpy as np
import pytest

from tiglon import types
from tiglon.errors import UnknownIdError
from tiglon.types import MISSING, Vocabulary


@pytest.mark.parametrize(
    "raw", [range(7, 4007, 4), [f"né {i}" for i in range(1000)]], ids=["numbers", "texts"]
)
def test_few_ids_are_found_as_many_are(raw):
    """A request's few ids take another way than a log's."""
    vocabulary, raw = Vocabulary(list(raw)), list(raw)
    strange = [-1, 8, 2**62] if isinstance(raw[0], int) else ["", "né", "né 1000"]
    some = [raw[3], strange[0], raw[999], raw[3], strange[1], raw[0], strange[2]]
    assert vocabulary.encode(some).tolist() == [3, MISSING, 999, 3, MISSING, 0, MISSING]
    assert vocabulary.encode(raw + strange).tolist() == [*range(1000), *[MISSING] * 3]
    assert vocabulary.encode(some[:1]).tolist() == [3]
    assert vocabulary.encode(strange).tolist() == [MISSING] * 3
    assert vocabulary.encode([None, raw[5], 1.5]).tolist() == [MISSING, 5, MISSING]
    assert vocabulary.encode([]).tolist() == []


def test_two_ids_of_one_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr(types, "_hash", lambda raw: np.full(len(raw), 7, np.uint64))
    vocabulary = Vocabulary(list(range(100)))
    assert vocabulary.encode([50, 101]).tolist() == [50, MISSING]


@pytest.mark.parametrize(
    "known, told",
    [
        ([3, 5], "There are 2 known items, with integer ids. Pass an id from the log, such as 3."),
        (["", "a"], "There are 2 known items, with string ids. Pass an id from the log, such as 'a'."),
        ([], "There are 0 known items, with string ids."),
    ],
)
def test_an_unknown_id_is_told_what_ids_are_like(known, told):
    with pytest.raises(UnknownIdError) as error:
        Vocabulary(known).require(["never"], "item")
    assert str(error.value) == f"unknown item 'never'. {told}"
