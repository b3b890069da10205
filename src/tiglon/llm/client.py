"""Language models behind one protocol: any OpenAI-compatible endpoint, or a local model of transformers.

    model = Endpoint("http://localhost:8080/v1", "some-model")
    model.complete(Prompt("Name three fruits."), seconds=5).text
    yes_probability(model.next_token(Prompt("Is a tomato a fruit? Answer Yes or No.")))

What they say is data: nothing of it is executed, followed or trusted. A call ends at its deadline, whatever
the other side does. `usage` counts calls, tokens and seconds; give prices and it counts money.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from tiglon.errors import ConfigError, LanguageModelError

KEY = "TIGLON_LLM_KEY"  # environment variable with the key of endpoints that want one
_MOST_BYTES = 4 << 20  # of an answer
_TRIES = 3  # of a call that was refused for a while (429, 5xx) or never reached the server
_PAUSE = 0.2  # seconds before the second try; twice as long before the third


class Prompt(NamedTuple):
    """text: all that is asked.   version: of the wording that it was made with; a cache tells them apart."""

    text: str
    version: str = ""


class Completion(NamedTuple):
    """prompt_tokens, completion_tokens: as the model counts them, 0 where it does not."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class LanguageModel(Protocol):
    """`seconds` is how long a call may take. Safe to use from several threads.
    Raises LanguageModelError for no answer in time, or one that is not of the protocol."""

    @property
    def name(self) -> str:
        """What its answers depend on."""
        ...

    @property
    def usage(self) -> Usage: ...

    def complete(
        self, prompt: Prompt, *, max_tokens: int = 512, seconds: float | None = None
    ) -> Completion: ...

    def next_token(self, prompt: Prompt, *, seconds: float | None = None) -> dict[str, float]:
        """Token → log-probability of being the first of the answer; of the likeliest tokens at least."""
        ...


@dataclass
class Usage:
    """What a model was asked and what that took.   prices: of a million tokens, in any money."""

    prompt_price: float = 0.0
    completion_price: float = 0.0
    calls: int = 0
    cached: int = 0  # answers that were remembered and cost nothing
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def cost(self) -> float:
        return (self.prompt_tokens * self.prompt_price + self.completion_tokens * self.completion_price) / 1e6

    def add(self, **amounts: float) -> None:
        """Count these, from any thread."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)


class Endpoint:
    """A server that speaks OpenAI's chat completions at `url`/chat/completions.

    url: http or https, up to the version ("…/v1").   model: as the server names it.
    key: sent as a bearer token to this host alone; redirects are not followed.
    seconds: of a call, unless it says less.   usage: with prices, to count money.
    Sampling is off (temperature 0). A call that is refused for a while is tried again, within its time.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        seconds: float = 30.0,
        usage: Usage | None = None,
    ) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError
        except ValueError as error:
            raise ConfigError(
                f"the endpoint {url!r}",
                rule="An endpoint is an address of http or https",
                fix='Pass one such as "http://localhost:8080/v1"',
            ) from error
        if not seconds > 0:
            raise ConfigError(f"seconds={seconds}", rule="A call has some time")
        if key is not None and not re.fullmatch(r"[!-~]+", key):
            raise ConfigError("a key with spaces or letters outside ASCII", fix="Look how it was copied")
        self._host, self._port, self._tls = parts.hostname, port, parts.scheme == "https"
        self._path = f"{parts.path.rstrip('/')}/chat/completions"
        self.model, self.seconds, self._key = model, seconds, key
        self.usage = usage or Usage()

    @property
    def name(self) -> str:
        return self.model

    def __repr__(self) -> str:
        return f"Endpoint({self._host}, {self.model})"

    def complete(self, prompt: Prompt, *, max_tokens: int = 512, seconds: float | None = None) -> Completion:
        answer = self._ask(prompt, {"max_tokens": max_tokens}, seconds)
        text = _at(answer, "choices", 0, "message", "content")
        if not isinstance(text, str):
            raise self._failed(f"{self!r} answered without a text: {_short(answer)}", rule=_RULE, fix=_FIX)
        return Completion(text, *self._count(answer))

    def next_token(self, prompt: Prompt, *, seconds: float | None = None) -> dict[str, float]:
        answer = self._ask(prompt, {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}, seconds)
        self._count(answer)
        found = _at(answer, "choices", 0, "logprobs", "content", 0, "top_logprobs")
        try:
            chances = {str(entry["token"]): float(entry["logprob"]) for entry in found}
            if not chances or any(math.isnan(value) or value > 1e-3 for value in chances.values()):
                raise ValueError
        except (TypeError, KeyError, ValueError) as error:
            raise self._failed(
                f"{self!r} answered without log-probabilities: {_short(answer)}",
                rule="Yes or no is read from choices[0].logprobs.content[0].top_logprobs",
                fix="Ask a model that tells them, or rank with `Listwise`",
            ) from error
        return chances

    def _count(self, answer: Any) -> tuple[int, int]:
        counts = [_at(answer, "usage", name) for name in ("prompt_tokens", "completion_tokens")]
        a, b = (n if isinstance(n, int) and not isinstance(n, bool) and n >= 0 else 0 for n in counts)
        self.usage.add(prompt_tokens=a, completion_tokens=b)
        return a, b

    def _ask(self, prompt: Prompt, options: Mapping[str, Any], seconds: float | None) -> Any:
        """The answer as JSON; some tries, one deadline."""
        began = time.monotonic()
        deadline = began + min(self.seconds, math.inf if seconds is None else seconds)
        message = {"role": "user", "content": prompt.text}
        body = json.dumps({"model": self.model, "messages": [message], "temperature": 0, **options}).encode()
        try:
            for attempt in range(_TRIES):
                pause = 0.0 if attempt == 0 else _PAUSE * 2 ** (attempt - 1)
                if attempt and time.monotonic() + pause >= deadline:
                    break
                time.sleep(pause)
                status, text = self._post(body, deadline)
                if status == 200:
                    return json.loads(text)
                if status != 429 and 0 < status < 500:
                    break
            if not status:
                raise self._failed(
                    f"no answer from {self._host}{f':{self._port}' if self._port else ''}: {_short(text)}",
                    fix="Start what answers there, or correct the address",
                )
            raise self._failed(
                f"{self!r} answered {status}: {_short(text)}",
                rule="An endpoint answers 200",
                fix="Look at its address, model name, key and log",
            )
        except ValueError as error:
            raise self._failed(
                f"{self!r} answered with something else than JSON: {_short(text)}", rule=_RULE, fix=_FIX
            ) from error
        finally:
            self.usage.add(calls=1, seconds=time.monotonic() - began)

    def _post(self, body: bytes, deadline: float) -> tuple[int, str]:
        """Status, or 0 where there was no answer, and text. A timer ends the connection at the deadline, for a timeout of a socket is one of each
        read, and a server that sends a byte a second never meets it."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise self._late()
        kind = http.client.HTTPSConnection if self._tls else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=left)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        late, timer = threading.Event(), None
        try:
            connection.connect()
            left = max(deadline - time.monotonic(), 0.0)
            timer = threading.Timer(left, _shut, [connection.sock, late])
            timer.daemon = True
            timer.start()
            connection.request("POST", self._path, body, headers)
            response = connection.getresponse()
            text = response.read(_MOST_BYTES + 1)
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # UnicodeError: no name of a host
            if late.is_set() or isinstance(error, TimeoutError):
                raise self._late() from error
            return 0, f"{type(error).__name__}: {error}"
        finally:
            if timer is not None:
                timer.cancel()
            connection.close()
        if late.is_set():  # what was read by then may lack its end
            raise self._late()
        if len(text) > _MOST_BYTES:
            raise self._failed(
                f"{self!r} answered with more than {_MOST_BYTES:,} bytes", rule=_RULE, fix=_FIX
            )
        return response.status, text.decode("utf-8", errors="replace")

    def _failed(self, given: str, *, rule: str = "", fix: str) -> LanguageModelError:
        self.usage.add(failed=1)
        return LanguageModelError(given, rule=rule, fix=fix)

    def _late(self) -> LanguageModelError:
        return self._failed(
            f"{self!r} did not answer in time",
            rule="A call ends at its deadline",
            fix="Give it more seconds, or ask a faster model",
        )


def key_of_environment() -> str | None:
    """For `Endpoint`: a key in an argument would stand in the list of processes and in the shell's history."""
    return os.environ.get(KEY) or None


class Local:
    """A causal language model of transformers and its tokenizer, both already loaded; one call at a time.

    Greedy decoding. name: what a cache tells it by; the model's own by default.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str = "", usage: Usage | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.name = name or getattr(model.config, "name_or_path", "") or type(model).__name__
        self.usage = usage or Usage()
        self._one = threading.Lock()

    def complete(self, prompt: Prompt, *, max_tokens: int = 512, seconds: float | None = None) -> Completion:
        began = time.monotonic()
        with self._turn(seconds):
            tokens = self._tokens(prompt)
            left = None if seconds is None else seconds - (time.monotonic() - began)
            found = self.model.generate(**tokens, max_new_tokens=max_tokens, do_sample=False, max_time=left)[
                0
            ]
        n = tokens["input_ids"].shape[1]
        spent = time.monotonic() - began
        self.usage.add(calls=1, seconds=spent, prompt_tokens=n, completion_tokens=len(found) - n)
        if seconds is not None and spent > seconds:
            raise self._late()
        return Completion(self.tokenizer.decode(found[n:], skip_special_tokens=True), n, len(found) - n)

    def next_token(self, prompt: Prompt, *, seconds: float | None = None) -> dict[str, float]:
        import torch

        began = time.monotonic()
        with self._turn(seconds), torch.inference_mode():
            tokens = self._tokens(prompt)
            chances = self.model(**tokens).logits[0, -1].float().log_softmax(dim=-1)
        top = chances.topk(min(len(chances), 1_000))
        words = self.tokenizer.convert_ids_to_tokens(top.indices.tolist())
        self.usage.add(calls=1, seconds=time.monotonic() - began, prompt_tokens=tokens["input_ids"].shape[1])
        return dict(zip(words, top.values.tolist(), strict=True))

    def _tokens(self, prompt: Prompt) -> Any:
        if getattr(self.tokenizer, "chat_template", None):
            return self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt.text}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
        return self.tokenizer(prompt.text, return_tensors="pt")

    @contextmanager
    def _turn(self, seconds: float | None) -> Iterator[None]:
        """Its turn, or LanguageModelError where others have it for too long."""
        if not self._one.acquire(timeout=-1 if seconds is None else max(seconds, 0.0)):
            raise self._late()
        try:
            yield
        finally:
            self._one.release()

    def _late(self) -> LanguageModelError:
        self.usage.add(failed=1)
        return LanguageModelError(
            f"{self.name} did not answer in time",
            rule="A call ends at its deadline",
            fix="Give it more seconds, or ask a faster model",
        )


def yes_probability(chances: Mapping[str, float]) -> float:
    """p(yes) / (p(yes) + p(no)) of the first token, in whatever case and with or without a space before it.

    chances: token → log-probability. A word that is not among them has at most the least of theirs, and is taken
    to have it. Raises LanguageModelError where neither is there.
    """
    words = {"yes": 0.0, "no": 0.0}
    for token, value in chances.items():
        word = token.strip(" \t\n▁ĠĊ.,\"'").lower()
        if word in words:
            words[word] += math.exp(value)
    if not any(words.values()):
        raise LanguageModelError(
            f"an answer that begins with {', '.join(map(repr, list(chances)[:5]))}",
            rule="It begins with yes or no",
            fix="Ask a model that follows instructions, or rank with `Listwise`",
        )
    least = math.exp(min(chances.values()))
    yes, no = (chance or least for chance in words.values())
    return yes / (yes + no)


# -- inside ------------------------------------------------------------------------------------------------

_RULE = "An endpoint answers in JSON, with the text at choices[0].message.content"
_FIX = "Look whether its address ends before /chat/completions"


def _shut(sock: socket.socket, late: threading.Event) -> None:
    late.set()
    with suppress(OSError):  # it had ended by itself
        sock.shutdown(socket.SHUT_RDWR)


def _at(value: Any, *path: str | int) -> Any:
    """What stands there, or None."""
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _short(value: Any) -> str:
    """The beginning of what was said, on one line."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = " ".join("".join(c if c.isprintable() else " " for c in text[:400]).split())
    return text if len(text) <= 160 else text[:159] + "…"
