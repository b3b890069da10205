"""Each answer is paid for once, by model, version and text."""

import pytest

from tiglon.errors import LanguageModelError, StorageError
from tiglon.llm.cache import Cached
from tiglon.llm.client import Endpoint, Prompt


def cached(server, folder, model="tiny"):
    return Cached(Endpoint(server.url, model), folder)


def test_the_same_question_is_asked_once(server, tmp_path):
    model = cached(server, tmp_path)
    for _ in range(2):
        assert model.complete(Prompt("a", "v1")).text == "hello"
    again = cached(server, tmp_path)
    assert again.complete(Prompt("a", "v1")) == ("hello", 0, 0)
    assert len(server.asked) == 1
    assert (model.usage.calls, model.usage.cached, again.usage.calls, again.usage.cached) == (1, 1, 0, 1)


def test_model_version_text_and_length_tell_questions_apart(server, tmp_path):
    cached(server, tmp_path).complete(Prompt("a", "v1"))
    cached(server, tmp_path).complete(Prompt("b", "v1"))
    cached(server, tmp_path).complete(Prompt("a", "v2"))
    cached(server, tmp_path).complete(Prompt("a", "v1"), max_tokens=5)
    cached(server, tmp_path, "other").complete(Prompt("a", "v1"))
    cached(server, tmp_path, "tiny/v1").complete(Prompt("a", ""))
    assert len(server.asked) == 6


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\r", "\n"])
def test_an_answer_may_hold_any_end_of_a_line(server, tmp_path, end):
    server.say = lambda body: f"a{end}b"
    for _ in range(2):
        assert cached(server, tmp_path).complete(Prompt("a")).text == f"a{end}b"
    assert len(server.asked) == 1


def test_failures_are_not_remembered(server, tmp_path):
    model = cached(server, tmp_path)
    server.say = lambda body: 404
    with pytest.raises(LanguageModelError):
        model.complete(Prompt("a"))
    server.say = lambda body: "now"
    assert model.complete(Prompt("a")).text == "now"


def test_a_line_that_was_cut_costs_that_answer_alone(server, tmp_path):
    model = cached(server, tmp_path)
    model.complete(Prompt("a"))
    model.complete(Prompt("b"))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    again = cached(server, tmp_path)
    again.complete(Prompt("a"))
    assert len(server.asked) == 2
    again.complete(Prompt("b"))
    assert len(server.asked) == 3
    third = cached(server, tmp_path)
    third.complete(Prompt("b"))
    assert len(server.asked) == 3


def test_first_tokens_are_remembered_too(server, tmp_path):
    top = [{"token": "Yes", "logprob": -0.5}]
    server.say = lambda body: {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}
    for _ in range(2):
        assert cached(server, tmp_path).next_token(Prompt("a")) == {"Yes": -0.5}
    assert len(server.asked) == 1


def test_a_disk_that_refuses_is_said(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="pass another folder for the answers"):
        cached(server, tmp_path / "file").complete(Prompt("a"))
