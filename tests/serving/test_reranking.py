"""A server whose answers a language model orders: within its time, with its key kept, and never told where by a request."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tiglon.errors import ConfigError, LanguageModelError, SchemaError
from tiglon.llm.client import KEY
from tiglon.serving.api import create_app
from tiglon.serving.bundle import Bundle
from tiglon.serving.desk import Settings
from tiglon.serving.engine import Engine
from tiglon.serving.messages import RecommendRequest
from tiglon.serving.reranking import Reranking

SKIPPED = "language model skipped: no answer of use in time"
SECRET = "sk-hidden-0123456789"


def shown(body):
    """(number, text) of the candidates in a prompt."""
    return re.findall(r"^#(\d+): (.*)$", body["messages"][0]["content"], re.MULTILINE)


def by_text(body):
    return " > ".join(f"#{n}" for n, _ in sorted(shown(body), key=lambda pair: pair[1], reverse=True))


def ids(answer):
    return [item["item_id"] for item in answer["items"]]


@pytest.fixture
def plain(bundle_path):
    """What the funnel answers by itself."""
    found = Engine(Bundle.load(bundle_path)).recommend(RecommendRequest(user_id=3, k=20))
    return [item.item_id for item in found.items]


def test_a_served_answer_is_in_the_models_order(bundle_path, tmp_path, endpoint, served, plain, monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    endpoint.say = by_text
    options = ["--reranker", endpoint.url, "--reranker-model", "tiny", "--reranker-seconds", "60"]
    options += ["--reranker-text", "title", "--state", str(tmp_path / "state")]
    with served(bundle_path, tmp_path, *options) as server:
        found = server.post("/v1/recommend", {"user_id": 3, "k": 20})
        status, _, refused = server.ask(
            "POST", "/v1/recommend", {"user_id": 3, "reranker": "http://elsewhere/v1"}
        )
        assert (status, refused["error"]) == (422, "invalid")
        assert not re.search(r"reranker|endpoint", json.dumps(server.get("/openapi.json")))
        log = server.log.read_text()
    title = dict(Bundle.load(bundle_path).items.table.select("item_id", "title").iter_rows())
    titles = [title[i] for i in ids(found)]
    assert found["degraded"] == []
    assert sorted(ids(found)) == sorted(plain)
    assert titles == sorted(titles, reverse=True)
    assert {text for body in endpoint.asked for _, text in shown(body)} <= set(title.values())
    assert {headers["Authorization"] for _, headers in endpoint.headers} == {f"Bearer {SECRET}"}
    assert SECRET not in log
    assert SECRET not in json.dumps(found)


def test_a_model_that_never_answers_costs_its_seconds_and_is_said(bundle_path, endpoint, working, plain):
    """It is let go after the answer is there: an answer that waited for it would never come."""
    over = threading.Event()
    endpoint.say = lambda body: over.wait() and "#1"
    settings = Settings(threads=1, reranking=Reranking(endpoint.url, "tiny", seconds=0.2))
    try:
        with working(create_app(bundle_path, None, settings)) as client:
            found = client.post("/v1/recommend", {"user_id": 3, "k": 20})
            batch = client.post("/v1/recommend/batch", {"requests": [{"user_id": 3, "k": 20}] * 2})
            assert not over.is_set()
    finally:
        over.set()
    assert found["degraded"] == [SKIPPED]
    assert ids(found) == plain
    assert [one["degraded"] for one in batch["responses"]] == [[SKIPPED]] * 2


def test_nobody_waits_for_anothers_model(bundle_path, endpoint, working, until, monkeypatch):
    """Requests that wait are answered one by one where each asks a model."""
    go, groups, real = threading.Event(), [], Engine.recommend_many
    monkeypatch.setattr(
        Engine, "recommend_many", lambda self, asked: groups.append(len(asked)) or real(self, asked)
    )
    endpoint.say = lambda body: go.wait() and "#1"
    app = create_app(bundle_path, None, Settings(threads=1, reranking=Reranking(endpoint.url, "tiny", 60.0)))
    with working(app) as client, ThreadPoolExecutor(3) as pool:
        try:
            asked = [pool.submit(client.post, "/v1/recommend", {"user_id": user}) for user in range(3)]
            until(lambda: app.state.desk._inside == 3)
        finally:
            go.set()
        assert all(one.result()["degraded"] == [] for one in asked)
    assert groups == [1, 1, 1]


def test_what_it_reads_is_a_column_or_a_template(bundle_path, endpoint):
    asks = Reranking(endpoint.url, "tiny", text="title")
    assert asks.text == "{title}"
    assert Reranking(endpoint.url, "tiny", text="{title}!").text == "{title}!"
    with pytest.raises(SchemaError, match=r"titel.*Did you mean 'title'\?"):
        Engine(Bundle.load(bundle_path), reranker=asks.reranker(), reranker_text="{titel}")


@pytest.mark.parametrize(
    "given, message",
    [
        ({"url": "file:///etc/passwd"}, "An endpoint is an address of http or https"),
        ({"url": "localhost:8080"}, "An endpoint is an address of http or https"),
        ({"model": ""}, "a re-ranker without a model"),
        ({"seconds": 0.0}, "A ranking has some time"),
        ({"seconds": float("nan")}, "A ranking has some time"),
    ],
)
def test_what_cannot_be_asked(given, message):
    with pytest.raises(ConfigError, match=message):
        Reranking(**({"url": "http://localhost:8080/v1", "model": "tiny"} | given))


def test_a_key_that_is_none_is_refused_without_being_shown(monkeypatch):
    monkeypatch.setenv(KEY, "two words")
    with pytest.raises(ConfigError, match="a key with spaces") as refused:
        Reranking("http://localhost:8080/v1", "tiny")
    assert "two words" not in str(refused.value)


def test_the_key_is_of_the_environment_alone(endpoint, monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    asks = Reranking(endpoint.url, "tiny")
    assert SECRET not in repr(asks) + repr(asks.reranker().model)
    monkeypatch.delenv(KEY)
    endpoint.say = lambda body: 401
    with pytest.raises(LanguageModelError):
        asks.reranker().rank(["a"], ["b", "c"])
    assert all("Authorization" not in headers for _, headers in endpoint.headers)
