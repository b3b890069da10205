"""Columns → small integer codes: what an item is, what a behaviour was like, who asks and when.

    schema = FeatureSchema([
        Feature("item_id", "inherent", width=64),
        Feature("brand", "inherent"),
        Feature("price", "cross", kind="number"),
        Feature("gap", "cross", kind="number"),
    ])
    features = fit(schema, items, training_log)
    store = features.store(whole_log)                  every life, its cross features coded
    FeatureEmbedding(**features.embedding())

The split of TWIN (https://arxiv.org/abs/2302.02352, §4.2): an *inherent* feature is the same for every user and
belongs to the item, so that its projection can be cached; a *cross* feature belongs to one behaviour of one
user. *User* and *context* features describe the request and are its profile.

The stated rules
    code 0        nulls, NaN, values that training never saw or saw fewer than `min_count` times, and items
                  without a training line as `item_id` (their vectors would be noise).
    numbers       buckets at the quantiles of the training lines; beyond the range is the outer bucket.
    categories    compared as text, so that 3, 3.0 and "3" are the same value.
    crosses       `of=("brand", "size")`: each combination of the codes of features declared before is a value
                  of its own (`tiglon.data.crossing`); an unknown part makes an unknown cross.
    gap           a reserved cross feature: time from the behaviour to the request, in the log's unit. It is
                  coded when it is read, in buckets evenly spaced in its logarithm between the 1% and the
                  99% quantile of the gaps between two events of a user in training.
    activity      a reserved context feature: how many behaviours the user has before the request. It is coded when
                  the life is read, in buckets at the quantiles over the training lines.

Letters: E events, N items, U users, R requests, T behaviours of all requests, F inherent, J cross and
X profile features.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import polars as pl

from tiglon.data.crossing import CrossId
from tiglon.data.events import require_columns
from tiglon.data.folders import reading, written_aside
from tiglon.data.histories import CLUSTER_SIZE, HistoryStore, offsets_of
from tiglon.errors import (
    ConfigError,
    DataError,
    LeakageError,
    SchemaError,
    did_you_mean,
)
from tiglon.types import Histories, Interactions, Items, Vocabulary, hash_ids

Role: TypeAlias = Literal["inherent", "cross", "user", "context"]
Kind: TypeAlias = Literal["category", "number"]

FORMAT = 2  # 1: without crosses
GAP = "gap"
ACTIVITY = "activity"
ITEM = "item_id"


@dataclass(frozen=True)
class Feature:
    """One column. Raises ConfigError."""

    name: str
    role: Role
    kind: Kind = "category"
    width: int = 8  # of an inherent feature's vector; TWIN: 64 for ids of many values, else 8
    buckets: int = 16  # at most so many for a number
    min_count: int = 1  # training lines that a category needs
    of: tuple[str, ...] = ()  # a cross of these features, no column; see `FeatureSchema`

    def __post_init__(self) -> None:
        for given, known, word in ((self.role, Role, "role"), (self.kind, Kind, "kind")):
            if given not in get_args(known):
                raise ConfigError(
                    f"feature '{self.name}' of {word} {given!r}",
                    rule=f"A {word} is {', '.join(get_args(known))}",
                    fix=did_you_mean(str(given), get_args(known)),
                )
        if min(self.width, self.min_count) < 1 or self.buckets < 2:
            raise ConfigError(
                f"feature '{self.name}': width={self.width}, buckets={self.buckets}, min_count={self.min_count}",
                rule="A width and a count are at least 1, and there are at least 2 buckets",
            )
        if self.name == ITEM and (self.role, self.kind) != ("inherent", "category"):
            raise ConfigError(f"'{ITEM}' as {self.role} {self.kind}", rule="It is an inherent category")
        if self.name == GAP and (self.role, self.kind) != ("cross", "number"):
            raise ConfigError(
                f"'{GAP}' as {self.role} {self.kind}",
                rule="The name is reserved for the time to the request, a cross number",
                fix="Rename the column",
            )
        if (self.name, self.role) == (CLUSTER_SIZE, "cross"):
            raise ConfigError(
                f"'{CLUSTER_SIZE}' as a cross feature",
                rule="The name is reserved for how many behaviours a cluster stands for",
                fix="Rename the column",
            )
        if (self.name, self.role) == (ACTIVITY, "context") and self.kind != "number":
            raise ConfigError(
                f"'{ACTIVITY}' as a {self.kind} of the context",
                rule="There the name is reserved for how many behaviours came before, a number",
                fix="Rename the column",
            )
        object.__setattr__(self, "of", tuple(self.of))
        if self.of and (len(set(self.of)) < max(len(self.of), 2) or self.kind != "category"):
            raise ConfigError(
                f"feature '{self.name}', a {self.kind} of {', '.join(self.of)}",
                rule="A cross is a category of at least two features, each once",
            )


@dataclass(frozen=True)
class FeatureSchema:
    """The features of a ranker, in the order of their codes. Raises ConfigError.

    A cross stands after its parts, which are of its own role; one of the context may also be of the user's.
    """

    features: tuple[Feature, ...]

    def __init__(self, features: Iterable[Feature]) -> None:
        object.__setattr__(self, "features", tuple(features))
        names = [feature.name for feature in self.features]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ConfigError(
                f"features named '{', '.join(repeated)}' twice",
                rule="A name stands once, whatever its role",
                fix="Rename one of the columns",
            )
        if not self.of("inherent"):
            raise ConfigError(
                "a schema without inherent features",
                rule="An item is known by at least one",
                fix=f'Add Feature("{ITEM}", "inherent", width=64)',
            )
        for place, feature in enumerate(self.features):
            roles = {"context": ("user", "context")}.get(feature.role, (feature.role,))
            known = [f.name for f in self.features[:place] if f.role in roles and not _of_life(f)]
            for name in feature.of:
                if name not in known:
                    raise ConfigError(
                        f"feature '{feature.name}' of '{name}'",
                        rule=f"A cross is of {' and '.join(roles)} features declared before it, never of '{GAP}' or '{ACTIVITY}'",
                        fix=did_you_mean(name, known) if known else "",
                    )

    def of(self, *roles: Role) -> list[Feature]:
        """The features of these roles: role by role, in the schema's order."""
        return [feature for role in roles for feature in self.features if feature.role == role]

    def columns(self, *roles: Role) -> list[str]:
        """The columns that the features of these roles read."""
        return [f.name for f in self.of(*roles) if not (f.of or f.name == ITEM or _of_life(f))]


def _of_life(feature: Feature) -> bool:
    """Whether it is coded when a life is read, and no column."""
    return feature.name == GAP or (feature.name, feature.role) == (ACTIVITY, "context")


# -- one column → codes ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Buckets:
    """A number's code is 1 + how many boundaries are not above it.   boundaries: rising float64."""

    boundaries: np.ndarray

    @property
    def size(self) -> int:
        return len(self.boundaries) + 2

    @property
    def values(self) -> np.ndarray:
        """(size,) a number for each code: NaN for 0, the middle of its bucket; outermost ones go on half as far as
        their boundary is from 0."""
        b = self.boundaries
        if not len(b):
            return np.array([np.nan, 0.0])
        low, high = (edge + sign * (abs(edge) / 2 or 1.0) for edge, sign in ((b[0], -1), (b[-1], 1)))
        return np.concatenate([[np.nan, low], (b[:-1] + b[1:]) / 2, [high]])

    def codes(self, column: pl.Series) -> np.ndarray:
        """(n,) int32. Raises SchemaError where the column holds no numbers."""
        return self.of(_floats(column))

    def of(self, value: np.ndarray) -> np.ndarray:
        """(n,) int32 of numbers."""
        code = 1 + np.searchsorted(self.boundaries, value, side="right")
        return np.where(np.isnan(value), 0, code).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Categories:
    """A value's code is 1 + its place in the vocabulary, which holds text."""

    vocabulary: Vocabulary

    @property
    def size(self) -> int:
        return len(self.vocabulary) + 1

    def codes(self, column: pl.Series) -> np.ndarray:
        """(n,) int32."""
        return (self.vocabulary.encode(_text(column)) + 1).astype(np.int32)


Coder: TypeAlias = Buckets | Categories | CrossId


def _floats(column: pl.Series) -> np.ndarray:
    if not (column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null)):
        raise SchemaError(
            f"column '{column.name}' of type {column.dtype}",
            rule="A feature of kind 'number' is read from numbers",
            fix="Cast the column, or make the feature a category",
        )
    return column.cast(pl.Float64).fill_null(float("nan")).to_numpy()


def _text(column: pl.Series) -> pl.Series:
    if column.dtype.is_float():
        value = column.fill_nan(None)
        whole = value.cast(pl.Int64, strict=False)
        same = (whole == value).fill_null(False)
        return whole.cast(pl.String).zip_with(same, value.cast(pl.String))
    if column.dtype.is_nested():
        raise SchemaError(
            f"column '{column.name}' of type {column.dtype}",
            rule="A category has one value a row",
            fix="Keep its first value, or join the values into one text",
        )
    return column.cast(pl.String)


def _fit_column(feature: Feature, column: pl.Series, lines: np.ndarray) -> Buckets | Categories:
    """lines: (n,) how many training lines carry each row of the column."""
    if feature.kind == "number":
        value = _floats(column)
        use = np.isfinite(value) & (lines > 0)
        return Buckets(_quantiles(value[use], lines[use], feature.buckets))
    counted = pl.DataFrame({"value": _text(column), "lines": lines}).drop_nulls().group_by("value").sum()
    kept = counted.filter(pl.col("lines") >= feature.min_count).sort("value")
    return Categories(Vocabulary(kept["value"]))


def _quantiles(value: np.ndarray, weight: np.ndarray, buckets: int) -> np.ndarray:
    """The values below which 1/buckets, 2/buckets … of the weight lie or, where a value is frequent, more."""
    distinct, of = np.unique(value, return_inverse=True)
    each = np.bincount(of, weight)
    below = np.cumsum(each) - each
    at = np.searchsorted(below, each.sum() * np.arange(1, buckets) / buckets)
    return distinct[np.unique(at[at < len(distinct)])]


def _fit_gap(log: Interactions, buckets: int) -> Buckets:
    """From the gaps between each event and a random later one of its user."""
    left = np.searchsorted(log.user, log.user, side="right") - np.arange(len(log)) - 1  # events that follow
    step = 1 + np.floor(np.random.default_rng(0).random(len(log)) * left).astype(np.int64)
    event = np.flatnonzero(left)
    gap = log.time[event + step[event]] - log.time[event]
    gap = gap[gap > 0]
    if not len(gap):
        return Buckets(np.empty(0))
    low, high = np.quantile(gap, [0.01, 0.99])
    return Buckets(np.unique(np.geomspace(low, high, buckets - 1)))


def _earlier(log: Interactions) -> np.ndarray:
    """(E,) how many lines of the same user are earlier than each; the log is sorted by user and time."""
    moment = np.ones(len(log), bool)
    moment[1:] = (np.diff(log.user) != 0) | (np.diff(log.time) != 0)
    first = np.maximum.accumulate(np.where(moment, np.arange(len(log)), 0))
    return first - np.searchsorted(log.user, log.user)


# -- all of them -------------------------------------------------------------------------------------------


def fit(
    schema: FeatureSchema, items: Items, log: Interactions, users: pl.DataFrame | None = None
) -> FittedFeatures:
    """Learn boundaries and vocabularies from the training lines alone.

    log: the training lines, numbered by `items`; cross and context features are columns of `log.extra`.
    users: user_id and the user features, one line a user; users it lacks get code 0.
    Raises SchemaError for a missing column or one of the wrong type, DataError.
    """
    if log.items != items.vocabulary:
        raise DataError(
            "a log and items with different vocabularies",
            fix="Pass both through tiglon.data.events.align first",
        )
    of_item, of_user = schema.of("inherent"), schema.of("user")
    require_columns(items.table.columns, schema.columns("inherent"))
    require_columns(log.extra.columns, schema.columns("cross", "context"))
    person = _rows_of_users(log.users, users, schema.columns("user"))

    coders: dict[str, Coder] = {}
    lines_of_item = np.bincount(log.item, minlength=len(items))
    ids = {}
    for feature in of_item:
        if feature.name == ITEM:
            ids[ITEM] = np.where(lines_of_item >= feature.min_count, np.arange(1, len(items) + 1), 0)
    item = _learn(of_item, items.table, lines_of_item, coders, ids)
    user = _learn(of_user, person, np.bincount(log.user, minlength=len(log.users)), coders)
    item_codes = _stacked(item, of_item, len(items) + 1)
    user_codes = _stacked(user, of_user, len(log.users) + 1)

    one = np.ones(len(log), np.int64)
    for feature in schema.of("cross"):
        if feature.name == GAP:
            coders[GAP] = _fit_gap(log, feature.buckets)
    _learn([f for f in schema.of("cross") if f.name != GAP], log.extra, one, coders)
    who = {name: codes[log.user] for name, codes in user.items()}
    columns = [feature for feature in schema.of("context") if not _of_life(feature)]
    _learn(columns, log.extra, one, coders, who)
    for feature in schema.of("context"):
        if _of_life(feature):
            coders[ACTIVITY] = Buckets(_quantiles(_earlier(log).astype(np.float64), one, feature.buckets))
    names = _name_of(items.vocabulary), _name_of(log.users)
    return FittedFeatures(schema, coders, item_codes, user_codes, *names)


def _learn(
    features: list[Feature],
    table: pl.DataFrame,
    lines: np.ndarray,
    coders: dict[str, Coder],
    known: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Fit what `known` (name → codes) lacks, into `coders`; the codes of all, of lines only
    those that a cross reads.

    lines: (n,) how many training lines carry each row of the table.
    """
    codes = dict(known or {})
    read = {name for feature in features for name in feature.of}
    for feature in features:
        if feature.name in codes:
            continue
        if feature.of:
            coders[feature.name] = CrossId.fit(
                [codes[name] for name in feature.of],
                lines,
                min_count=feature.min_count,
                salt=zlib.crc32(feature.name.encode()),
            )
        else:
            coders[feature.name] = _fit_column(feature, table[feature.name], lines)
        if feature.role in ("inherent", "user") or feature.name in read:
            codes[feature.name] = _code(feature, coders, table, codes)
    return codes


def _code(
    feature: Feature, coders: Mapping[str, Coder], table: pl.DataFrame, codes: Mapping[str, np.ndarray]
) -> np.ndarray:
    """(n,) int32 of a column, or of a cross from the codes of its parts."""
    coder = coders[feature.name]
    if isinstance(coder, CrossId):
        return coder.codes([codes[name] for name in feature.of])
    return coder.codes(table[feature.name])


def _stacked(codes: dict[str, np.ndarray], features: list[Feature], rows: int) -> np.ndarray:
    """(rows, features) int32, 0 in the last row: the unknown one."""
    stacked = np.zeros((rows, len(features)), np.int32)
    for f, feature in enumerate(features):
        stacked[:-1, f] = codes[feature.name]
    return stacked


def _rows_of_users(vocabulary: Vocabulary, users: pl.DataFrame | None, names: list[str]) -> pl.DataFrame:
    """The user features, one row a dense user, null where the table lacks one."""
    if not names:
        return pl.DataFrame()
    if users is None:
        raise SchemaError(
            f"no table of users for '{', '.join(names)}'",
            rule="User features are columns of one",
            fix="Pass users=",
        )
    require_columns(users.columns, ["user_id", *names])
    dense = vocabulary.encode(users["user_id"])
    known = dense[dense >= 0]
    if len(np.unique(known)) < len(known):
        raise DataError("a user who stands twice in the table of users", rule="It has one line a user")
    row = pl.Series(np.full(len(vocabulary), None), dtype=pl.Int64).scatter(known, np.flatnonzero(dense >= 0))
    return users.select(names)[row] if users.height else users.select(names).clear(len(vocabulary))


@dataclass(frozen=True, eq=False)
class FittedFeatures:
    """A schema with all it learned from training.

    coders: one a feature but `item_id`.   item_codes: (N + 1, F) int32, the unknown item last, so that −1
    finds it.   user_codes: (U + 1, user features) int32, the unknown user last.   catalogue, people: name the ids of
    items and users; empty in folders from before.
    """

    schema: FeatureSchema
    coders: dict[str, Coder]
    item_codes: np.ndarray
    user_codes: np.ndarray
    catalogue: str = ""
    people: str = ""

    @cached_property
    def version(self) -> str:
        """Names all that was learned: 16 hex digits."""
        digest = hashlib.sha256(json.dumps([asdict(feature) for feature in self.schema.features]).encode())
        digest.update(self.catalogue.encode() + self.item_codes.tobytes() + self.user_codes.tobytes())
        for name, coder in sorted(self.coders.items()):
            digest.update(name.encode())
            if isinstance(coder, Buckets):
                digest.update(coder.boundaries.tobytes())
            elif isinstance(coder, Categories):
                digest.update(hash_ids(coder.vocabulary).tobytes())
            else:
                digest.update(coder.fingerprint.tobytes())
        return digest.hexdigest()[:16]

    def require(self, users: Vocabulary, items: Vocabulary) -> None:
        """DataError for a log of other items, or of other users where there are features of users."""
        for what, fitted, given in (("items", self.catalogue, items), ("users", self.people, users)):
            if what == "users" and not self.schema.of("user"):
                continue
            if fitted and fitted != _name_of(given):
                raise DataError(
                    f"a log of other {what} than the features know",
                    rule=f"Dense numbers stand for one set of {what}",
                    fix="Read it with items= of the first, or fit the features anew",
                )

    @property
    def item_sizes(self) -> list[int]:
        """Codes of each inherent feature."""
        sizes = {name: coder.size for name, coder in self.coders.items()} | {ITEM: len(self.item_codes)}
        return [sizes[feature.name] for feature in self.schema.of("inherent")]

    @property
    def item_widths(self) -> list[int]:
        return [feature.width for feature in self.schema.of("inherent")]

    @property
    def cross_sizes(self) -> list[int]:
        """Codes of each cross feature of a behaviour."""
        return [self.coders[feature.name].size for feature in self.schema.of("cross")]

    @property
    def profile_sizes(self) -> list[int]:
        """Codes of each feature of the user, then of the context."""
        return [self.coders[feature.name].size for feature in self.schema.of("user", "context")]

    @property
    def activity(self) -> int | None:
        """The column of the activity in a profile, if it is a feature."""
        names = [(feature.name, feature.role) for feature in self.schema.of("user", "context")]
        return names.index((ACTIVITY, "context")) if (ACTIVITY, "context") in names else None

    def embedding(self) -> dict[str, Any]:
        """The arguments of `tiglon.nn.embedding.FeatureEmbedding`."""
        return {
            "item_codes": self.item_codes,
            "item_sizes": self.item_sizes,
            "item_widths": self.item_widths,
            "cross_sizes": self.cross_sizes,
            "profile_sizes": self.profile_sizes,
            "catalogue": self.catalogue,
        }

    def line_codes(self, lines: pl.DataFrame) -> dict[str, np.ndarray]:
        """name → (E,) codes of each cross feature but the gap, in the smallest integers that hold them."""
        require_columns(lines.columns, self.schema.columns("cross"))
        codes: dict[str, np.ndarray] = {}
        for feature in self.schema.of("cross"):
            if feature.name != GAP:
                smallest = np.min_scalar_type(self.coders[feature.name].size)
                codes[feature.name] = _code(feature, self.coders, lines, codes).astype(smallest)
        return codes

    def store(self, log: Interactions) -> HistoryStore:
        """Every life of a log, with the codes of its cross features. Raises DataError for other items or users."""
        self.require(log.users, log.items)
        offsets = offsets_of(np.bincount(log.user, minlength=len(log.users)))
        return HistoryStore(log.users, log.items, offsets, log.item, log.time, self.line_codes(log.extra))

    def cross_codes(self, past: Histories, time: np.ndarray) -> np.ndarray:
        """(T, J) int64 codes of what R users did before `time` (R,): those of the store, and the gap's.

        Raises LeakageError, SchemaError, and DataError for codes that these features do not have.
        """
        wanted = self.schema.of("cross")
        require_columns([GAP, *past.features], [feature.name for feature in wanted])
        gap = gaps(past, time)
        codes = np.empty((len(past.item), len(wanted)), np.int64)
        for j, feature in enumerate(wanted):
            coder = self.coders[feature.name]
            if isinstance(coder, Buckets) and feature.name == GAP:
                codes[:, j] = coder.of(gap)
                continue
            column = past.features[feature.name]
            if column.dtype.kind not in "iub":
                raise DataError(
                    f"numbers of '{feature.name}', {column.dtype}, where codes are read",
                    fix="Code them with the same features: store.coded(features)",
                )
            codes[:, j] = column
            if len(codes) and not 0 <= codes[:, j].min() <= codes[:, j].max() < coder.size:
                raise DataError(
                    f"codes {codes[:, j].min()} … {codes[:, j].max()} of '{feature.name}'",
                    rule=f"These features know 0 … {coder.size - 1}",
                    fix="Build the store with the same features: features.store(log)",
                )
        return codes

    def profile_codes(self, user: np.ndarray, context: pl.DataFrame | None = None) -> np.ndarray:
        """(R, X) int64 codes of users (−1: unknown), then of the request's context, R lines. Raises SchemaError.

        That of the activity is 0 until the life is read, when a batch is built.
        """
        context = pl.DataFrame() if context is None else context
        require_columns(context.columns, self.schema.columns("context"))
        who = self.user_codes[user]
        codes = {feature.name: who[:, x] for x, feature in enumerate(self.schema.of("user"))}
        for feature in self.schema.of("context"):
            codes[feature.name] = (
                np.zeros(len(who), np.int64)
                if _of_life(feature)
                else _code(feature, self.coders, context, codes)
            )
        columns = [code.astype(np.int64) for code in codes.values()]
        return np.stack(columns, axis=1) if columns else np.zeros((len(who), 0), np.int64)

    def save(self, directory: str | Path) -> None:
        """Write the folder, all of it or nothing. Raises StorageError."""
        boundaries = {n: c.boundaries.tolist() for n, c in self.coders.items() if isinstance(c, Buckets)}
        categories = {n: c.vocabulary.raw for n, c in self.coders.items() if isinstance(c, Categories)}
        crosses = {n: c for n, c in self.coders.items() if isinstance(c, CrossId)}
        about = {
            "format": FORMAT,
            "features": [asdict(feature) for feature in self.schema.features],
            "boundaries": boundaries,
            "categories": list(categories),
            "crosses": {name: cross.salt for name, cross in crosses.items()},
            "catalogue": self.catalogue,
            "people": self.people,
        }
        frames = [
            pl.DataFrame({"value": raw}).select(pl.lit(n).alias("feature"), "value")
            for n, raw in categories.items()
        ]
        table = (
            pl.concat(frames) if frames else pl.DataFrame(schema={"feature": pl.String, "value": pl.String})
        )
        with written_aside(Path(directory), "features.json") as aside:
            (aside / "features.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
            table.write_parquet(aside / "categories.parquet")
            for c, cross in enumerate(crosses.values()):
                np.save(aside / f"cross_{c}.npy", cross.fingerprint)
            np.save(aside / "item_codes.npy", self.item_codes)
            np.save(aside / "user_codes.npy", self.user_codes)

    @classmethod
    def load(cls, directory: str | Path) -> FittedFeatures:
        """Raises BundleDamagedError, BundleVersionError."""
        directory = Path(directory)
        with reading(
            directory,
            "features.json",
            FORMAT,
            what="features",
            rule="The folder has features.json, categories.parquet, item_codes.npy and user_codes.npy",
            fix="Fit them anew on the training log",
        ) as about:
            table = pl.read_parquet(directory / "categories.parquet", glob=False)
            coders: dict[str, Coder] = {
                name: Buckets(np.array(values, np.float64)) for name, values in about["boundaries"].items()
            }
            for name in about["categories"]:
                coders[name] = Categories(Vocabulary(table.filter(pl.col("feature") == name)["value"]))
            for c, (name, salt) in enumerate(about.get("crosses", {}).items()):
                coders[name] = CrossId(salt, np.load(directory / f"cross_{c}.npy"))
            schema = FeatureSchema(Feature(**feature) for feature in about["features"])
            item_codes = np.load(directory / "item_codes.npy")
            user_codes = np.load(directory / "user_codes.npy")
            names = about.get("catalogue", ""), about.get("people", "")
            return cls(schema, coders, item_codes, user_codes, *names)


def _name_of(ids: Vocabulary) -> str:
    return hashlib.sha256(hash_ids(ids).tobytes()).hexdigest()[:16]


def gaps(past: Histories, time: np.ndarray) -> np.ndarray:
    """(T,) int64, from each behaviour to its user's request at `time` (R,). Raises LeakageError."""
    gap = np.repeat(np.asarray(time, np.int64), past.lengths) - past.time
    if (gap <= 0).any():
        raise LeakageError(
            f"{int((gap <= 0).sum())} behaviours at or after the time of their request",
            rule="A history holds only events strictly before its request",
            fix="Read it with HistoryStore.before(users, time)",
        )
    return gap
