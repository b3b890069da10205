"""Endpoints that are slow, wrong or hostile; the protocol; a local model by its logits."""

import json
import math
import threading
import time

import pytest

from tiglon.errors import ConfigError, LanguageModelError
from tiglon.llm import client
from tiglon.llm.client import Endpoint, Local, Prompt, Usage, yes_probability

HELLO = Prompt("say hello", "test-1")


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(client, "_PAUSE", 0.001)


def logprobs(chances):
    top = [{"token": token, "logprob": value, "bytes": None} for token, value in chances.items()]
    return {"choices": [{"logprobs": {"content": [{"token": "x", "top_logprobs": top}]}}]}


def test_it_speaks_the_protocol(server):
    model = Endpoint(server.url + "/", "tiny", key="secret")
    assert model.complete(HELLO, max_tokens=9) == ("hello", 7, 3)
    assert server.asked == [
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "say hello"}],
            "temperature": 0,
            "max_tokens": 9,
        }
    ]
    path, headers = server.headers[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert "secret" not in repr(model)


def test_it_counts_what_it_costs(server):
    usage = Usage(prompt_price=2.0, completion_price=10.0)
    model = Endpoint(server.url, "tiny", usage=usage)
    for _ in range(3):
        model.complete(HELLO)
    server.say = lambda body: 400
    with pytest.raises(LanguageModelError):
        model.complete(HELLO)
    assert (usage.calls, usage.failed, usage.prompt_tokens, usage.completion_tokens) == (4, 1, 21, 9)
    assert usage.cost == pytest.approx((21 * 2 + 9 * 10) / 1e6)
    assert usage.seconds > 0


def test_a_model_that_does_not_count_costs_nothing(server):
    server.say = lambda body: {
        "choices": [{"message": {"content": "hi"}}],
        "usage": {"prompt_tokens": "many"},
    }
    assert Endpoint(server.url, "tiny").complete(HELLO) == ("hi", 0, 0)


@pytest.mark.parametrize(
    "said, message",
    [
        (b"<html>oops</html>", "answered with something else than JSON: <html>oops</html>"),
        (b'{"choices": [', "answered with something else than JSON"),
        (b"", "answered with something else than JSON"),
        (b"\xff\xfe\x00", "answered with something else than JSON"),
        ({"choices": []}, r"answered without a text: \{\"choices\": \[\]\}"),
        ({"choices": [{"message": {"content": None}}]}, "answered without a text"),
        ([1, 2], "answered without a text"),
        (404, "answered 404: .*out of order.*An endpoint answers 200"),
        (307, "answered 307"),
    ],
)
def test_wrong_answers_are_named(server, said, message):
    server.say = lambda body: said
    model = Endpoint(server.url, "tiny", key="secret")
    with pytest.raises(LanguageModelError, match=message) as error:
        model.complete(HELLO)
    assert "secret" not in str(error.value)
    assert model.usage.failed == 1
    assert len(server.asked) == 1  # neither asked again nor redirected


def test_what_is_refused_for_a_while_is_asked_again(server):
    statuses = [503, 429]
    server.say = lambda body: statuses.pop(0) if statuses else "at last"
    model = Endpoint(server.url, "tiny")
    assert model.complete(HELLO).text == "at last"
    server.say = lambda body: 500
    with pytest.raises(LanguageModelError, match="answered 500"):
        model.complete(HELLO)
    assert len(server.asked) == 3 + 3
    assert model.usage.calls == 2


@pytest.mark.parametrize("where", ["before", "within"])
def test_a_slow_answer_ends_at_the_deadline(server, where):
    """Silence, and a byte now and then, which never meets a timeout of the socket."""
    done = threading.Event()
    if where == "before":
        server.say = lambda body: done.wait(20) and ""
    else:
        server.slowly = 0.05
    model = Endpoint(server.url, "tiny")
    began = time.monotonic()
    with pytest.raises(LanguageModelError) as error:
        model.complete(HELLO, seconds=0.2)
    assert time.monotonic() - began < 4  # of 20, or of 8: the machine may be busy
    done.set()
    assert str(error.value) == (
        "Endpoint(127.0.0.1, tiny) did not answer in time. A call ends at its deadline. "
        "Give it more seconds, or ask a faster model."
    )


def test_nobody_there():
    with pytest.raises(
        LanguageModelError,
        match=r"no answer from 127\.0\.0\.1:1: ConnectionRefusedError.*Start what answers there",
    ):
        Endpoint("http://127.0.0.1:1/v1", "tiny").complete(HELLO)


@pytest.mark.parametrize("host", ["a..b", "a" * 70])
def test_what_cannot_be_the_name_of_a_host(host):
    with pytest.raises(LanguageModelError, match="UnicodeError"):
        Endpoint(f"http://{host}/v1", "tiny", seconds=5).complete(HELLO)


def test_endless_answers_are_cut(server, monkeypatch):
    monkeypatch.setattr(client, "_MOST_BYTES", 1_000)
    server.say = lambda body: "x" * 2_000
    with pytest.raises(LanguageModelError, match="more than 1,000 bytes"):
        Endpoint(server.url, "tiny").complete(HELLO)


def test_bad_options_are_refused():
    wrong = ("localhost:8080", "file:///etc/passwd", "ftp://host/v1", "http://")
    for url in (*wrong, "http://localhost:80a/v1", "http://localhost:99999/v1", "http://[::1/v1"):
        with pytest.raises(ConfigError, match="An endpoint is an address of http or https"):
            Endpoint(url, "tiny")
    with pytest.raises(ConfigError, match="seconds=0"):
        Endpoint("http://host", "tiny", seconds=0)
    with pytest.raises(ConfigError) as error:
        Endpoint("http://host", "tiny", key="sec ret\r\nHost: evil")
    assert "ret" not in str(error.value)


def test_the_first_token(server):
    server.say = lambda body: logprobs({"Yes": math.log(0.6), " no": math.log(0.2), "Maybe": math.log(0.1)})
    chances = Endpoint(server.url, "tiny").next_token(HELLO)
    assert chances["Yes"] == pytest.approx(math.log(0.6))
    assert server.asked[0]["logprobs"] is True
    assert server.asked[0]["max_tokens"] == 1
    assert yes_probability(chances) == pytest.approx(0.75)


@pytest.mark.parametrize(
    "said",
    [
        "Yes",
        logprobs({}),
        logprobs({"Yes": "likely"}),
        logprobs({"Yes": 3.0}),
        logprobs({"Yes": float("nan")}),
    ],
)
def test_answers_without_log_probabilities(server, said):
    server.say = lambda body: said
    with pytest.raises(LanguageModelError, match="answered without log-probabilities"):
        Endpoint(server.url, "tiny").next_token(HELLO)


def test_yes_or_no():
    assert yes_probability(
        {"YES": math.log(0.3), "▁yes": math.log(0.1), "Ġno": math.log(0.4)}
    ) == pytest.approx(0.5)
    one_sided = yes_probability({"Yes": math.log(0.9), "Sure": math.log(0.02)})
    assert one_sided == pytest.approx(0.9 / 0.92)  # no has at most what the least of the listed has
    with pytest.raises(LanguageModelError, match="begins with 'Well', 'I'"):
        yes_probability({"Well": -0.1, "I": -3.0})


# -- a local model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local():
    """A random GPT-2 of a few words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<end>", "yes", "no", "is", "milk", "good", "?"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    torch.manual_seed(0)
    size = GPT2Config(
        vocab_size=7, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return Local(GPT2LMHeadModel(size).eval(), fast, name="tiny")


def test_a_local_model_says_yes_by_its_logits(local):
    import torch

    prompt = Prompt("is milk good ?")
    found = yes_probability(local.next_token(prompt))
    with torch.no_grad():
        logits = local.model(torch.tensor([[3, 4, 5, 6]])).logits[0, -1]
    assert found == pytest.approx(torch.sigmoid(logits[1] - logits[2]).item(), rel=1e-5)


def test_a_local_model_completes(local):
    before = local.usage.prompt_tokens
    said = local.complete(Prompt("is milk"), max_tokens=4)
    assert said == local.complete(Prompt("is milk"), max_tokens=4)
    assert said.prompt_tokens == 2
    assert 1 <= said.completion_tokens <= 4
    assert local.usage.prompt_tokens == before + 4
    json.dumps(said.text)


def test_a_local_model_that_is_busy_is_late(local):
    with local._turn(None), pytest.raises(LanguageModelError, match="tiny did not answer in time"):
        local.complete(Prompt("is milk"), seconds=0.01)
