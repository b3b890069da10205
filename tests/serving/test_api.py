"""Real servers, real bundles, a real LMDB. In this world raw ids are 0 … 59 of users and 0 … 39 of items."""

import asyncio
import json
import os
import pickle
import re
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace

import pytest

from tiglon.errors import BundleDamagedError, ConfigError, StorageError
from tiglon.serving.api import create_app
from tiglon.serving.bundle import Bundle
from tiglon.serving.changes import Changes
from tiglon.serving.desk import Settings
from tiglon.serving.engine import Engine
from tiglon.serving.messages import RecommendRequest
from tiglon.serving.publish import publish
from tiglon.serving.security import add_key
from tiglon.serving.server import free_port, serve
from tiglon.serving.state import LmdbState

# -- answers ---------------------------------------------------------------------------------------------------


def test_ten_items_for_a_user(server, bundle_path):
    found = server.post("/v1/recommend", {"user_id": 3})
    assert found["user_id"] == 3
    assert found["bundle"] == Bundle.load(bundle_path).version
    assert len({item["item_id"] for item in found["items"]}) == 10
    assert all(item["source"] and item["reasons"] is None for item in found["items"])
    assert found["degraded"] == []


def test_reasons_on_request(server):
    for item in server.post("/v1/recommend", {"user_id": 3, "explain": True, "k": 3})["items"]:
        assert item["reasons"]["sources"]


def test_a_batch_is_its_parts(server):
    asked = [{"user_id": 3, "k": 4}, {"history": [1, 2], "k": 2}, {"user_id": "nobody"}]
    alone = [server.post("/v1/recommend", one) for one in asked]
    together = server.post("/v1/recommend/batch", {"requests": asked})["responses"]
    assert [one["items"] for one in together] == [one["items"] for one in alone]
    assert len({one["bundle"] for one in together}) == 1


def test_the_other_batches_are_their_parts(server):
    for path, one in [("rank", {"user_id": 3, "items": [5, 1, 9]}), ("similar", {"item_id": 5, "k": 3})]:
        (found,) = server.post(f"/v1/{path}/batch", {"requests": [one]})["responses"]
        assert found["items"] == server.post(f"/v1/{path}", one)["items"]


def test_rank_returns_what_it_was_given(server):
    found = server.post("/v1/rank", {"user_id": 3, "items": [5, 1, "no such"]})
    assert {item["item_id"] for item in found["items"]} == {5, 1}
    assert found["unknown"] == ["no such"]


def test_similar_items_are_others(server):
    found = server.post("/v1/similar", {"item_id": 5, "k": 3})["items"]
    assert len(found) == 3
    assert 5 not in {item["item_id"] for item in found}


def test_the_tree_is_walked_from_its_root(server):
    root = server.get("/v1/tree")
    assert root["count"] == sum(child["count"] for child in root["children"]) == 40
    code = root["children"][0]["code"]
    assert server.get(f"/v1/tree?prefix={code}")["count"] == root["children"][0]["count"]


def test_the_beam_goes_down_the_tree(server):
    depths = server.post("/v1/beam", {"user_id": 3, "k": 5})["depths"]
    assert [len(depth[0]["prefix"]) for depth in depths] == list(range(1, len(depths) + 1))


def test_what_was_shown_is_seen_by_the_next_request(server):
    """The bundle hides what a user had."""
    asked = {"user_id": 21, "k": 5}
    best = server.post("/v1/recommend", asked)["items"][0]["item_id"]
    event = {"user_id": 21, "item_id": best, "timestamp": 1_700_000_000}
    assert server.post("/v1/events", {"events": [event]})["accepted"] == 1
    assert best not in {item["item_id"] for item in server.post("/v1/recommend", asked)["items"]}
    assert server.get("/v1/users/21")["events"][-1]["item_id"] == best


def test_a_stranger_has_a_life_from_the_first_event_on(server):
    asked = {"user_id": "new here", "k": 5}
    assert server.post("/v1/recommend", asked)["degraded"]
    server.post("/v1/events", {"events": [{"user_id": "new here", "item_id": 4, "timestamp": 1_600_000_001}]})
    assert not any("unknown user" in tag for tag in server.post("/v1/recommend", asked)["degraded"])
    server.ask("DELETE", "/v1/users/new%20here")
    assert server.post("/v1/recommend", asked)["degraded"]


def test_events_are_stored_once(server):
    event = {"user_id": 950, "item_id": 1, "timestamp": 1_600_000_005, "event_id": "e-1"}
    sent = {"events": [event, event, {**event, "event_id": None}]}
    first, again = server.post("/v1/events", sent), server.post("/v1/events", sent)
    assert (first["accepted"], first["duplicates"]) == (2, 1)
    assert (again["accepted"], again["duplicates"]) == (0, 3)


def test_an_id_in_a_path_says_how_it_is_read(server):
    for user, item in [(960, 1), ("960", 2), ("-0", 3)]:
        server.post(
            "/v1/events", {"events": [{"user_id": user, "item_id": item, "timestamp": 1_600_000_001}]}
        )

    def item_of(path):
        return [event["item_id"] for event in server.get(path)["events"]]

    assert item_of("/v1/users/960") == item_of("/v1/users/960?id_type=integer") == [1]
    assert item_of("/v1/users/960?id_type=string") == [2]
    assert item_of("/v1/users/-0") == [3]  # no way to write a whole number
    status, _, content = server.ask("GET", "/v1/users/a%20b?id_type=integer")
    assert (status, content["what"], content["rule"], content["fix"]) == (
        422,
        "the user id 'a b'",
        "id_type=integer reads whole numbers",
        "Try id_type=string",
    )


def test_a_forgotten_user_is_a_stranger(server):
    assert server.get("/v1/users/30")["events"]
    assert server.ask("DELETE", "/v1/users/30")[0] == 200
    found = server.get("/v1/users/30")
    assert (found["known"], found["events"]) == (False, [])
    assert server.post("/v1/recommend", {"user_id": 30, "k": 3})["degraded"]


# -- requests that are wrong -----------------------------------------------------------------------------------

EVENT = {"user_id": 970, "item_id": 1, "timestamp": 1_600_000_001}


@pytest.mark.parametrize(
    "path, body, what, rule",
    [
        ("recommend", {"user_id": 3, "k": 0}, "body.k: 0", "greater than or equal to 1"),
        ("recommend", {"user_id": 3, "k": -5}, "body.k: -5", "greater than or equal to 1"),
        ("recommend", {"user_id": 3, "k": 10**6}, "body.k: 1000000", "less than or equal to 1000"),
        ("recommend", {"user_id": 3, "k": "5"}, "body.k: '5'", "valid integer"),
        ("recommend", {"user_id": 3.5}, "body.user_id: 3.5", "a valid integer, or should be a valid string"),
        ("recommend", {"user_id": True}, "body.user_id: True", "valid integer"),
        ("recommend", {"user_id": 2**63}, "body.user_id", "less than"),
        ("recommend", {"user_id": ""}, "body.user_id: ''", "at least 1 character"),
        ("recommend", {}, "body: {}", "neither user_id nor history"),
        ("recommend", {"user_id": 3, "histroy": []}, "body.histroy: []", "not permitted"),
        ("recommend", {"user_id": 3, "budget_ms": 0}, "body.budget_ms: 0", "greater than or equal to 1"),
        ("recommend", {"history": [1, None]}, "body.history[1]: None", "valid integer"),
        ("recommend/batch", {"requests": []}, "body.requests: []", "at least 1 item"),
        ("recommend/batch", {"requests": [{"user_id": 1}] * 65}, "body.requests: [{", "at most 64 items"),
        ("recommend/batch", {"requests": [{"user_id": 1, "k": 0}]}, "body.requests[0].k: 0", "greater"),
        ("rank", {"user_id": 3, "items": []}, "body.items: []", "at least 1 item"),
        ("events", {"events": [EVENT, {**EVENT, "timestamp": "now"}]}, "body.events[1].timestamp: 'now'", "integer"),
        ("events", {"events": [{**EVENT, "features": {"price": "x"}}]}, "features.price: 'x'", "valid number"),
        ("events", {"events": []}, "body.events: []", "at least 1 item"),
        ("items", {}, "body: {}", "neither items to add nor items to remove"),
        ("items", {"add": [{"title": "x"}]}, "body", "add[0] has the item_id None"),
        ("items", {"add": [{"item_id": "x" * 300}]}, "body", "a string of 1 … 256 characters"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_rule(server, path, body, what, rule):
    status, _, content = server.ask("POST", f"/v1/{path}", body)
    assert (status, content["error"], content["fix"]) == (422, "invalid", "See /openapi.json")
    assert content["what"].startswith(what) or what in content["what"]
    assert rule in content["rule"]


def test_nothing_is_stored_by_halves(server):
    server.ask("POST", "/v1/events", {"events": [EVENT, {**EVENT, "timestamp": "now"}]})
    assert server.get("/v1/users/970")["events"] == []


def test_many_faults_are_not_all_told(server):
    bad = {"events": [{**EVENT, "timestamp": "x" * 500}] * 50}
    content = server.ask("POST", "/v1/events", bad)[2]
    assert content["what"].endswith("; and 47 more")
    assert len(json.dumps(content)) < 1000


def test_what_is_unknown_but_no_fault_is_answered(server):
    assert len(server.post("/v1/recommend", {"history": [], "k": 4})["items"]) == 4
    assert len(server.post("/v1/recommend", {"history": ["no such", 3], "k": 4})["items"]) == 4
    assert len(server.post("/v1/recommend", {"user_id": 10**12, "k": 4})["items"]) == 4


def test_an_event_is_about_an_item_and_has_happened(server):
    for wrong, status, what in [
        ({"item_id": "no such"}, 404, "events[1] with the item 'no such'"),
        ({"timestamp": 2**62}, 422, f"events[1] with the timestamp {2**62}"),
    ]:
        bad = {"events": [{**EVENT, "user_id": 971}, {**EVENT, "user_id": 971} | wrong]}
        found, _, content = server.ask("POST", "/v1/events", bad)
        assert found == status
        assert content["what"].startswith(what)
    assert server.get("/v1/users/971")["events"] == []


def test_an_unknown_item_has_no_like(server):
    status, _, content = server.ask("POST", "/v1/similar", {"item_id": "no such"})
    assert (status, content["error"]) == (404, "unknown_id")
    assert "no such" in content["what"]


def test_addresses_that_are_not_there(server):
    status, headers, content = server.ask("GET", "/v1/recommend")
    assert (status, content["error"], headers["Allow"]) == (405, "method_not_allowed", "POST")
    status, _, content = server.ask("GET", "/v2/recommend")
    assert (status, content["error"], content["what"]) == (404, "not_found", "GET /v2/recommend")


# -- request ids, OpenAPI, metrics -----------------------------------------------------------------------------


def test_a_request_id_is_taken_or_made(server):
    asked = {"user_id": 3, "k": 1}
    for headers, body, expected in [
        ({"X-Request-ID": "from-header"}, {}, "from-header"),
        ({"X-Request-ID": "from-header"}, {"request_id": "from-body"}, "from-body"),
        ({"X-Request-ID": "not printable \t"}, {}, None),
        ({}, {}, None),
    ]:
        _, out, content = server.ask("POST", "/v1/recommend", asked | body, headers)
        assert out["X-Request-ID"] == content["request_id"]
        if expected:
            assert content["request_id"] == expected
        else:
            assert re.fullmatch("[0-9a-f]{32}", content["request_id"])
    (line,) = [line for line in server.lines() if line.get("request_id") == "from-body"]
    assert (line["route"], line["status"], line["method"]) == ("/v1/recommend", 200, "POST")
    assert line["bundle"]
    _, out, content = server.ask("POST", "/v1/recommend", {"k": 0}, {"X-Request-ID": "a-fault"})
    assert out["X-Request-ID"] == content["request_id"] == "a-fault"


def test_openapi_has_an_example_and_the_errors_of_every_address(server):
    paths = server.get("/openapi.json")["paths"]
    assert {path for path in paths if "batch" not in path} == {
        "/v1/recommend", "/v1/rank", "/v1/similar", "/v1/events", "/v1/items", "/v1/users/{user_id}", "/v1/tree",
        "/v1/beam", "/v1/lookup", "/v1/find", "/health/live", "/health/ready", "/metrics",
    }  # fmt: skip
    for path, methods in paths.items():
        for method, about in methods.items():
            if path.startswith("/v1/"):
                error = about["responses"]["422"]["content"]["application/json"]["schema"]["$ref"]
                assert error.endswith("/ErrorResponse"), path
            if method == "post":
                examples = about["requestBody"]["content"]["application/json"]["examples"]
                for example in examples.values():
                    status, _, content = server.ask(
                        "POST", path, example["value"] if path != "/v1/items" else {"remove": ["no such"]}
                    )
                    assert status in (200, 404), (path, content)


def test_metrics_count_what_was_answered(server):
    def of(name, page):
        return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(name))

    name = 'tiglon_requests_total{method="POST",route="/v1/rank",status="200"}'
    before = of(name, server.get("/metrics"))
    server.post("/v1/rank", {"user_id": 3, "items": [1]})
    page = server.get("/metrics")
    assert of(name, page) == before + 1
    assert of('tiglon_request_seconds_count{route="/v1/rank"}', page) >= 1
    assert of("tiglon_items_total", page) > 0
    assert of("tiglon_bundle{", page) == 1
    assert "/v1/users/{user_id}" in page
    assert not re.search(r'route="/v1/users/\d', page)


# -- load, faults: a worker in this process, so that its engine can be held up -----------------------------------


def test_who_finds_no_room_is_told_to_come_again(bundle_path, working, until, monkeypatch):
    go, inside = threading.Event(), threading.Semaphore(0)
    real = Engine.recommend

    def held(self, request):
        inside.release()
        go.wait()
        return real(self, request)

    monkeypatch.setattr(Engine, "recommend", held)
    app = create_app(bundle_path, None, Settings(threads=1, waiting=1))
    with working(app) as client, ThreadPoolExecutor(2) as pool:
        try:
            asked = [pool.submit(client.ask, "POST", "/v1/recommend", {"user_id": 1})]
            inside.acquire()  # one is answered
            asked.append(pool.submit(client.ask, "POST", "/v1/recommend", {"user_id": 2}))
            until(lambda: app.state.desk._inside == 2)  # one waits
            status, headers, content = client.ask("POST", "/v1/recommend", {"user_id": 3})
            assert (status, content["error"], headers["Retry-After"]) == (503, "overloaded", "1")
            assert content["what"] == "a worker with 2 requests inside"
            assert client.get("/health/ready")["ready"]
            assert "tiglon_refused_total 1.0" in client.get("/metrics")
        finally:
            go.set()
        assert [one.result()[0] for one in asked] == [200, 200]
        assert client.ask("POST", "/v1/recommend", {"user_id": 3})[0] == 200


def test_who_waits_together_is_answered_together_and_each_as_alone(bundle_path, working, until, monkeypatch):
    go, inside, groups = threading.Event(), threading.Event(), []
    one, many = Engine.recommend, Engine.recommend_many

    def held(self, request):
        inside.set()
        go.wait()
        return one(self, request)

    def counted(self, requests):
        groups.append(len(requests))
        return many(self, requests)

    monkeypatch.setattr(Engine, "recommend", held)
    app = create_app(bundle_path, None, Settings(threads=1))
    asked = [
        *({"user_id": user, "k": 5} for user in (1, 2, 4711)),
        {"user_id": 3, "k": 3, "exclude_seen": False},
        {"user_id": 4, "deny": [1]},
        {"user_id": 5, "at_most": {"wibble": 1}},
    ]
    with working(app) as client, ThreadPoolExecutor(8) as pool:
        try:
            first = pool.submit(client.ask, "POST", "/v1/recommend", {"user_id": 9})
            assert inside.wait(30)
            monkeypatch.setattr(Engine, "recommend_many", counted)
            waiting = [pool.submit(client.ask, "POST", "/v1/recommend", body) for body in asked]
            until(lambda: app.state.desk._inside == 7)
        finally:
            go.set()
        answers = [one.result() for one in waiting]
        assert first.result()[0] == 200
    assert max(groups) == 4  # lists and caps of their own are asked alone
    engine = Engine(Bundle.load(bundle_path))
    for body, (status, headers, content) in zip(asked, answers, strict=True):
        if "at_most" in body:
            assert (status, content["error"]) == (422, "invalid")
            continue
        alone = one(engine, RecommendRequest(**body))
        assert status == 200
        assert [i["item_id"] for i in content["items"]] == [i.item_id for i in alone.items]
        assert content["user_id"] == body["user_id"]
        assert content["degraded"] == alone.degraded
        assert headers["X-Request-ID"] == content["request_id"]


def test_waiting_is_taken_off_the_budget(bundle_path, working, monkeypatch):
    budgets = []
    real = Engine.recommend
    monkeypatch.setattr(
        Engine, "recommend", lambda self, request: budgets.append(request.budget_ms) or real(self, request)
    )
    app = create_app(bundle_path, None, Settings(budget_ms=50_000))
    with working(app) as client:
        client.post("/v1/recommend", {"user_id": 1})
        client.post("/v1/recommend", {"user_id": 1, "budget_ms": 30_000})
        client.post("/v1/recommend", {"user_id": 1, "budget_ms": 1})
    assert 30_000 < budgets[0] <= 50_000
    assert 0 < budgets[1] <= 30_000
    assert budgets[2] == 1


def test_a_failure_is_not_explained_to_strangers(bundle_path, working, monkeypatch, caplog):
    def broken(self, request):
        raise RuntimeError(f"secret {bundle_path}")

    monkeypatch.setattr(Engine, "recommend", broken)
    with working(create_app(bundle_path, None)) as client:
        status, _, content = client.ask("POST", "/v1/recommend", {"user_id": 1})
        assert (status, content["error"]) == (500, "internal")
        assert content["request_id"]
        assert "secret" not in json.dumps(content)
        assert "secret" in caplog.text
        assert client.ask("POST", "/v1/similar", {"item_id": 1})[0] == 200


def test_a_store_that_is_down_is_said_and_comes_back(bundle_path, working, tmp_path, monkeypatch):
    state = LmdbState(tmp_path / "state")
    down = [True]
    for name in ("append", "life", "forget"):
        real = getattr(state, name)

        def maybe(*args, _real=real, **options):
            if down[0]:
                raise StorageError(f"{tmp_path} cannot be read: disk full")
            return _real(*args, **options)

        monkeypatch.setattr(state, name, maybe)
    with working(create_app(bundle_path, state)) as client:
        sent = {"events": [{"user_id": 1, "item_id": 1, "timestamp": 1_700_000_000}]}
        status, headers, content = client.ask("POST", "/v1/events", sent)
        assert (status, content["error"], headers["Retry-After"]) == (503, "storage", "1")
        assert str(tmp_path) not in json.dumps(content)
        assert any("state" in tag for tag in client.post("/v1/recommend", {"user_id": 1})["degraded"])
        down[0] = False
        assert client.post("/v1/events", sent)["accepted"] == 1
        assert client.post("/v1/recommend", {"user_id": 1})["degraded"] == []


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"threads": 0}, "threads=0. threads is at least 1"),
        ({"waiting": -1}, "waiting=-1. waiting is at least 0"),
        ({"budget_ms": 0}, "budget_ms=0. budget_ms is at least 1"),
        ({"poll_seconds": 0}, "poll_seconds=0. poll_seconds is above 0"),
    ],
)
def test_settings_that_cannot_be(wrong, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Settings(**wrong)


# -- the port ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers share one socket")
def test_workers_share_a_port_and_each_gets_connections():
    with ExitStack() as opened:
        port = opened.enter_context(free_port("127.0.0.1", 0))
        address = port.getsockname()
        workers = [opened.enter_context(pickle.loads(pickle.dumps(port))) for _ in range(2)]
        for worker in workers:
            worker.listen()
            worker.setblocking(False)
        for _ in range(64):
            opened.enter_context(socket.create_connection(address, timeout=10))
        found = [0, 0]
        for n, worker in enumerate(workers):
            with suppress(BlockingIOError):
                while True:
                    opened.enter_context(worker.accept()[0])
                    found[n] += 1
        assert sum(found) == 64
        assert min(found) > 5  # by a hash: about half each
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{address[1]}: Address already in use.*--port"):
            free_port(*address)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_port_that_is_taken_is_refused(workers, bundle_path):
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ConfigError, match="Address already in use"),
    ):
        serve(bundle_path, port=taken.getsockname()[1], workers=workers)
    with pytest.raises(ConfigError, match=r"the address 192\.0\.2\.1:0"):
        free_port("192.0.2.1", 0)  # an address of no machine


def test_an_answer_in_two_parts_does_not_wait_for_the_client():
    async def accepted():
        connection = asyncio.get_running_loop().create_future()

        class Protocol(asyncio.Protocol):
            def connection_made(self, transport):
                connection.set_result(transport.get_extra_info("socket"))

        with free_port("127.0.0.1", 0) as port:
            server = await asyncio.get_running_loop().create_server(Protocol, sock=port)
            async with server:
                _, writer = await asyncio.open_connection(*port.getsockname())
                nodelay = (await connection).getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                writer.close()
                return nodelay

    assert asyncio.run(accepted())


# -- bundles that change, workers, restarts ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def later(bundle_path, tmp_path_factory):
    """The same recommender, but that it shows seen items: another version, and other answers."""
    bundle = Bundle.load(bundle_path)
    folder = tmp_path_factory.mktemp("later") / "later"
    replace(bundle, exclude_seen=False).save(folder)
    return folder


def test_workers_swap_share_and_drain(served, until, bundle_path, later, tmp_path):
    """Two workers with keys: a swap under load, a change of items that both see, and an end that drains."""
    home = tmp_path / "home"
    publish(bundle_path, home)
    token = add_key(tmp_path / "keys.json", "test", frozenset({"read", "write"}))
    with served(home, tmp_path, "--workers", "2", "--keys", str(tmp_path / "keys.json")) as server:
        client = server.with_key(token)

        def processes(message):
            return {line["process"] for line in server.lines() if line["message"] == message}

        until(lambda: len(processes("ready")) == 2)
        asked = {"requests": [{"user_id": user, "k": 5} for user in (3, 4, 5, 6)]}

        def answer():
            status, _, content = client.ask("POST", "/v1/recommend/batch", asked)
            assert status == 200, content
            (version,) = {one["bundle"] for one in content["responses"]}
            return version, [[item["item_id"] for item in one["items"]] for one in content["responses"]]

        # A swap under load: every answer is wholly one bundle's.
        old, old_items = answer()
        done = threading.Event()

        def keep_asking():
            found = []
            while not done.is_set():
                found.append(answer())
            return found

        with ThreadPoolExecutor(2) as pool:
            asking = [pool.submit(keep_asking) for _ in range(2)]
            try:
                publish(later, home)
                until(lambda: len(processes("bundle swapped")) == 2)
            finally:
                done.set()
            found = [one for each in asking for one in each.result()]
        new, new_items = answer()
        assert new == Bundle.load(later).version != old
        assert new_items != old_items
        assert all(items == {old: old_items, new: new_items}[version] for version, items in found)
        assert found[0][0] == old

        # Items: one worker is told, both know.
        gone, title = new_items[0][0], "A title that is new"
        change = {"add": [{"item_id": 1000, "title": title}], "remove": [gone]}
        told = client.post("/v1/items", change)
        assert (told["added"], told["removed"]) == (1, 1)
        agreed = set()

        def both_agree():
            _, headers, content = client.ask("POST", "/v1/rank", {"user_id": 3, "items": [1000, gone]})
            if ([item["item_id"] for item in content["items"]], content["unknown"]) == ([1000], [gone]):
                agreed.update(
                    line["process"]
                    for line in server.lines()
                    if line.get("request_id") == headers["X-Request-ID"]
                )
            return len(agreed) >= len(processes("ready"))

        until(both_agree)
        assert all(gone not in items for items in answer()[1])

        # Counters are those of both workers.
        name = 'tiglon_requests_total{method="POST",route="/v1/recommend/batch",status="200"}'

        def counted():
            return float(re.findall(re.escape(name) + r" (\S+)", client.get("/metrics"))[0])

        until(lambda: counted() == sum(line.get("route") == "/v1/recommend/batch" for line in server.lines()))

        # A worker is killed: another takes its place, and knows what was acknowledged.
        event = {"user_id": 3, "item_id": new_items[1][0], "timestamp": 1_700_000_000}
        assert client.post("/v1/events", {"events": [event]})["accepted"] == 1
        os.kill(min(processes("ready")), signal.SIGKILL)
        until(lambda: len(processes("ready")) == 3)
        assert client.get("/v1/users/3")["events"][-1]["item_id"] == event["item_id"]
        until(both_agree)

        # The end waits for who is inside.
        head = f"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        body = b'{"user_id": 3}'
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as open_request:
            rest = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            open_request.sendall((head + rest).encode() + body[:5])
            client.get("/health/live")
            server.process.send_signal(signal.SIGTERM)
            until(lambda: any(line["message"] == "Shutting down" for line in server.lines()))
            open_request.sendall(body[5:])
            received = b"".join(iter(lambda: open_request.recv(1 << 16), b""))
        assert received.startswith(b"HTTP/1.1 200"), received
        assert server.process.wait(60) == 0
        assert not [line for line in server.lines() if "trace" in line]


def test_what_was_acknowledged_is_there_after_a_restart(bundle_path, working, tmp_path):
    kept = tmp_path / "state"
    with working(create_app(bundle_path, LmdbState(kept), Settings(changes=kept))) as client:
        client.post("/v1/events", {"events": [{"user_id": "u", "item_id": 1, "timestamp": 1_600_000_001}]})
        client.post("/v1/items", {"add": [{"item_id": 1000, "title": "new"}], "remove": [2]})
    with (kept / "changes.jsonl").open("ab") as file:
        file.write(b'{"remove": [3]')  # cut short, never acknowledged
    with working(create_app(bundle_path, LmdbState(kept), Settings(changes=kept))) as client:
        assert len(client.get("/v1/users/u")["events"]) == 1
        client.post("/v1/items", {"remove": [4]})
        found = client.post("/v1/rank", {"user_id": "u", "items": [1000, 2, 3, 4]})
        assert {item["item_id"] for item in found["items"]} == {1000, 3}
        assert found["unknown"] == [2, 4]
    assert [json.loads(line)["remove"] for line in (kept / "changes.jsonl").open()] == [[2], [4]]


def test_a_change_that_cannot_be_kept_is_not_shown(bundle_path, working, tmp_path, monkeypatch):
    def full(*_):
        raise StorageError("the disk is full")

    with working(create_app(bundle_path, None, Settings(changes=tmp_path))) as client:
        client.post("/v1/items", {"remove": [2]})
        with monkeypatch.context() as patched:
            patched.setattr(Changes, "append", full)
            assert client.ask("POST", "/v1/items", {"remove": [3]})[0] == 503
        found = client.post("/v1/rank", {"user_id": 1, "items": [2, 3]})
        assert ([item["item_id"] for item in found["items"]], found["unknown"]) == ([3], [2])


def test_a_bundle_that_cannot_be_read_changes_nothing(bundle_path, later, working, until, tmp_path):
    home = tmp_path / "home"
    publish(bundle_path, home)
    app = create_app(home, None, Settings(poll_seconds=0.05))
    with working(app) as client:
        old = client.get("/health/ready")["bundle"]
        damaged = home / "bundles" / ("0" * 16)
        damaged.mkdir()
        pointer = home / "CURRENT"
        good = pointer.read_text()
        pointer.write_text("0" * 16 + "\n" + good)
        until(lambda: client.get("/health/ready")["trouble"])
        assert client.post("/v1/recommend", {"user_id": 3})["bundle"] == old
        assert 'tiglon_swaps_total{result="failed"} 1.0' in client.get("/metrics")
        publish(later, home)
        until(lambda: client.get("/health/ready")["bundle"] != old)
        assert client.get("/health/ready")["trouble"] == ""


def test_no_bundle_no_server(tmp_path):
    with pytest.raises(BundleDamagedError, match=r"no bundle at .*nothing\. .*Check the path"):
        serve(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"workers=0\. workers is at least 1"):
        serve(tmp_path, workers=0)
    with pytest.raises(ConfigError, match="port=70000"):
        serve(tmp_path, port=70_000)
