"""A language model that orders the first of an answer: where it is asked, for how long, and what it reads.

    asks = Reranking("http://localhost:8080/v1", "some-model")
    Engine(bundle, reranker=asks.reranker(), reranker_text=asks.text)

Whoever starts an engine says this, and no request does: a message has no field for it. The key is that of the
environment variable TIGLON_LLM_KEY, if there is one, and stands nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

from tiglon.errors import ConfigError
from tiglon.llm.client import Endpoint, key_of_environment
from tiglon.llm.recommender import Listwise


@dataclass(frozen=True)
class Reranking:
    """Raises ConfigError for an address that is none, no model or no time."""

    url: str  # of an OpenAI-compatible endpoint, up to the version
    model: str  # as the endpoint names it
    seconds: float = (
        2.0  # that an answer waits for it at most; a request with a budget waits no longer than that
    )
    text: str | None = None  # of an item: "{title} ({brand})", or a column; None: what the bundle reads

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("a re-ranker without a model", fix="Name it as its endpoint does")
        if self.text is not None and "{" not in self.text:
            object.__setattr__(self, "text", f"{{{self.text}}}")
        self.reranker()

    def reranker(self) -> Listwise:
        return Listwise(Endpoint(self.url, self.model, key=key_of_environment()), seconds=self.seconds)
