"""What goes in and out of a recommender, the same from Python, the command line and HTTP.

    engine.recommend(RecommendRequest(user_id=7, k=5))  →  RecommendResponse

Ids are yours: whole numbers (64 bits) or strings, never converted, so 5 and "5" are two ids. An unknown
field, a number in quotes or a list out of bounds is refused with pydantic's ValidationError; the bounds keep
one request from costing what a thousand may. An answer has none: what a bundle holds can be told. Messages are
immutable.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from tiglon.types import LONGEST_ID

MOST_ITEMS = 1_000  # of an answer, and to rank
MOST_BATCH = 10_000  # events, items, and ids in a history or a list of the request

Int64 = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)]
Id = Int64 | Annotated[StrictStr, Field(min_length=1, max_length=LONGEST_ID)]
ID: TypeAdapter[int | str] = TypeAdapter(Id)
ID_RULE = f"An id is a whole number of 64 bits, or a string of 1 … {LONGEST_ID} characters"
AnyId = StrictInt | StrictStr  # of an answer
Ids = Annotated[list[Id], Field(max_length=MOST_BATCH)]
Name = Annotated[StrictStr, Field(min_length=1, max_length=64)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[StrictInt, Field(ge=1, le=MOST_ITEMS)]
RequestId = Annotated[StrictStr, Field(pattern=r"^[!-~]{1,128}$")]  # printable, so that logs stay one line
Milliseconds = Annotated[StrictInt, Field(ge=1, le=60_000)]
ShortText = Annotated[StrictStr, Field(max_length=10_000)]
Value = (
    Int64
    | StrictBool
    | Finite
    | ShortText
    | Annotated[list[ShortText] | list[Finite], Field(max_length=4_096)]
    | None
)


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Event(Message):
    """One behaviour of a user."""

    user_id: AnyId
    item_id: AnyId
    timestamp: Int64 = Field(
        description="in the unit of the log that the bundle was trained on; dates are microseconds since 1970"
    )
    event_id: Annotated[StrictStr, Field(min_length=1, max_length=256)] | None = Field(
        default=None, description="an event with the same event_id is stored once"
    )
    features: Annotated[dict[Name, Finite], Field(max_length=64)] = {}


# -- recommend -------------------------------------------------------------------------------------------


class Asked(Message):
    """Who asks, and with how much time."""

    user_id: Id | None = None
    history: Ids | None = Field(
        default=None, description="item ids, oldest first, read in place of the user's stored life"
    )
    explain: StrictBool = False
    budget_ms: Milliseconds | None = Field(
        default=None, description="leave out the slow steps that do not fit, and say so in `degraded`"
    )
    request_id: RequestId | None = None

    @model_validator(mode="after")
    def _someone(self) -> Asked:
        if self.user_id is None and self.history is None:
            raise ValueError("neither user_id nor history; give one, be it an empty history")
        return self


class RecommendRequest(Asked):
    k: Count = 10
    exclude_seen: StrictBool | None = Field(
        default=None, description="hide items of the history; null: as the bundle was trained"
    )
    allow: Ids | None = Field(default=None, description="only these items; null: all")
    deny: Ids = Field(default=[], description="never these items")
    at_most: Annotated[dict[Name, Count], Field(max_length=8)] = Field(
        default={}, description='category caps: {"brand": 2} gives at most two items of one brand'
    )


class Source(Message):
    """A retriever that found an item: its place there (from 1) and its score, comparable within it alone."""

    name: str
    rank: int
    score: float


class Attention(Message):
    """A past behaviour that the ranker read when it scored an item. weight: its share of the attention."""

    item_id: AnyId
    timestamp: int
    weight: float


class Explanation(Message):
    sources: list[Source] = Field(description="every retriever that found the item")
    features: dict[str, float] = Field(default={}, description="what each feature added to the score")
    attended: list[Attention] = []


class RecommendedItem(Message):
    item_id: AnyId
    score: float
    source: str = Field(description="the retriever that placed it highest")
    reasons: Explanation | None = None


class Filtered(Message):
    """A candidate that a rule kept out of the answer."""

    item_id: AnyId
    rule: str


class RecommendResponse(Message):
    request_id: str
    bundle: str = Field(description="the version of the bundle that answered")
    user_id: AnyId | None
    items: list[RecommendedItem]
    degraded: list[str] = Field(default=[], description="what was left out or stood in, and why")
    sources: dict[str, int] = Field(default={}, description="candidates that each retriever gave")
    filtered: list[Filtered] = Field(default=[], description="only with explain")


# -- rank and similar --------------------------------------------------------------------------------------


class RankRequest(Asked):
    items: Annotated[list[Id], Field(min_length=1, max_length=MOST_ITEMS)]


class RankResponse(Message):
    request_id: str
    bundle: str
    user_id: AnyId | None
    items: list[RecommendedItem]
    unknown: list[AnyId] = Field(default=[], description="asked for, but not in the catalogue")
    degraded: list[str] = []


class SimilarRequest(Message):
    item_id: Id
    k: Count = 10
    request_id: RequestId | None = None


class SimilarItem(Message):
    item_id: AnyId
    score: float
    source: str


class SimilarResponse(Message):
    request_id: str
    bundle: str
    item_id: AnyId
    items: list[SimilarItem]


# -- what changes ------------------------------------------------------------------------------------------


class SentEvent(Event):
    """An event with ids within their bounds."""

    model_config = ConfigDict(from_attributes=True)

    user_id: Id
    item_id: Id


class EventsRequest(Message):
    events: Annotated[list[SentEvent], Field(min_length=1, max_length=MOST_BATCH)]
    request_id: RequestId | None = None


class EventsResponse(Message):
    request_id: str
    accepted: int
    duplicates: int


class ItemsRequest(Message):
    """add: rows of the item table, {"item_id": …, column: value, …}; a known item's columns are changed."""

    add: Annotated[list[dict[Name, Value]], Field(max_length=MOST_BATCH)] = []
    remove: Ids = []
    request_id: RequestId | None = None

    @model_validator(mode="after")
    def _something(self) -> ItemsRequest:
        if not self.add and not self.remove:
            raise ValueError("neither items to add nor items to remove")
        for place, row in enumerate(self.add):
            given = row.get("item_id")
            try:
                ID.validate_python(given)
            except ValidationError as error:
                raise ValueError(
                    f"add[{place}] has the item_id {given!r:.80}; it is a whole number or a string of "
                    f"1 … {LONGEST_ID} characters"
                ) from error
        if both := [row["item_id"] for row in self.add if row["item_id"] in self.remove]:
            raise ValueError(
                f"the item {both[0]!r:.80} to add and to remove; what is removed never comes back"
            )
        return self


class ItemsResponse(Message):
    request_id: str
    bundle: str
    added: int
    changed: int
    removed: int
    unknown: list[AnyId] = Field(default=[], description="to be removed, but not in the catalogue")


class UserResponse(Message):
    """A user's whole life, oldest first."""

    user_id: AnyId
    known: bool
    events: list[Event]


class ForgetResponse(Message):
    user_id: AnyId
    events: int = Field(description="how many were hidden or deleted")


# -- semantic IDs, to be looked at ---------------------------------------------------------------------------

Prefix = Annotated[list[Annotated[StrictInt, Field(ge=0, lt=2**31)]], Field(max_length=16)]


class TreeItem(Message):
    item_id: AnyId
    text: str


class TreeChild(Message):
    """code: the next code below the prefix. items: some of the `count` items below it."""

    code: int
    count: int
    items: list[TreeItem]


class TreeResponse(Message):
    """A node of the tree of semantic IDs."""

    bundle: str
    prefix: list[int]
    depth: int = Field(description="codes of a whole ID")
    count: int
    children: list[TreeChild]


class BeamPrefix(Message):
    """A prefix that the beam kept. score: its log-probability. example: the text of an item below it."""

    prefix: list[int]
    score: float
    example: str


class BeamResponse(Message):
    """Where TIGER's beam went: for each depth the prefixes that it kept, best first."""

    bundle: str
    user_id: AnyId | None
    depths: list[list[BeamPrefix]]


# -- what is there -----------------------------------------------------------------------------------------


class LookupRequest(Message):
    item_ids: Annotated[list[Id], Field(max_length=MOST_ITEMS)]


class ItemDetails(Message):
    """columns: what the item table says. code: its semantic ID."""

    item_id: AnyId
    text: str
    columns: dict[str, Any] = {}
    code: list[int] = []


class LookupResponse(Message):
    """The items asked for, in that order, without those that are unknown or removed."""

    bundle: str
    items: list[ItemDetails]


class FindRequest(Message):
    text: Annotated[StrictStr, Field(min_length=1, max_length=100)]
    k: Annotated[StrictInt, Field(ge=1, le=50)] = 8


class FindResponse(Message):
    """users: ids that begin with the text. items: those whose id begins with it or whose text holds it."""

    bundle: str
    users: list[AnyId]
    items: list[TreeItem]


class ErrorResponse(Message):
    """error: a kind that a program may switch on. what, rule, fix: as in `tiglon.errors`."""

    error: str
    what: str
    rule: str = ""
    fix: str = ""
    request_id: str | None = None


def as_json(message: Message) -> dict[str, Any]:
    """The message as plain values."""
    return message.model_dump(mode="json")
