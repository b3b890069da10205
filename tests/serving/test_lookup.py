"""What the catalogue says when it is asked: items by id, users and items by a few letters."""

import json

from tiglon.serving.bundle import Bundle
from tiglon.serving.engine import Engine
from tiglon.serving.messages import ItemsRequest, as_json


def test_items_are_told_by_id_in_the_order_asked(bundle_path):
    bundle = Bundle.load(bundle_path)
    engine = Engine(bundle)
    ids = bundle.items.vocabulary.raw.to_pylist()
    told = engine.lookup([ids[4], "no such item", ids[1]])
    assert told.bundle == bundle.version
    assert [item.item_id for item in told.items] == [ids[4], ids[1]]
    row = bundle.items.table.row(4, named=True)
    assert told.items[0].columns == {name: value for name, value in row.items() if name != "item_id"}
    assert told.items[0].code == bundle.tiger.ids.codes[4].tolist()
    assert told.items[0].text
    json.dumps(as_json(told))


def test_removed_items_are_neither_told_nor_found(bundle_path):
    engine = Engine(Bundle.load(bundle_path))
    gone = engine.bundle.items.vocabulary.raw[0].as_py()
    text = engine.lookup([gone]).items[0].text
    assert gone in [item.item_id for item in engine.find(text, 50).items]
    engine.items(ItemsRequest(remove=[gone]))
    assert engine.lookup([gone]).items == []
    assert gone not in [item.item_id for item in engine.find(text, 50).items]


def test_users_and_items_are_found_by_a_few_letters(bundle_path):
    engine = Engine(Bundle.load(bundle_path))
    user = engine.bundle.histories.users.raw[3].as_py()
    assert user in engine.find(str(user), 8).users
    item = engine.lookup([engine.bundle.items.vocabulary.raw[5].as_py()]).items[0]
    word = item.text.split()[0]
    found = engine.find(word.upper(), 50)
    assert all(word.lower() in one.text.lower() or str(one.item_id).startswith(word) for one in found.items)
    assert found.items
    assert len(engine.find(word, 1).items) == 1
    assert engine.find("no such words anywhere").items == []
