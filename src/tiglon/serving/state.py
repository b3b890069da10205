"""What users did since the bundle was made, kept through crashes.

    state = LmdbState("runs/state")               embedded: a folder, no service
    state = RedisState("redis://localhost:6379")  shared by several machines; needs the extra `redis`

    state.append([Event(user_id=7, item_id=3, timestamp=1_700_000_000)])  →  [True], once it is on the disk
    state.life(7)                                 →  oldest first, whatever the order of arrival

A bundle holds each user's life until its training, and nothing here copies it: the state holds what came
after, and for each user who asked to be forgotten a mark that hides the bundle's part as well.

Idempotent: of events of one user with the same event_id the first is stored; without an event_id, of those
with the same item and timestamp. A log may thus be sent again after any failure. Events of equal timestamps
stay in the order of their arrival.

In both stores a user is a hash of the typed id, so that 5 and "5" are two users and names may be long; an
event is [item_id, event_id, features] as JSON, behind its timestamp and its number of arrival, big-endian,
so that the order of the bytes is the order of the life.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import lmdb

from tiglon.errors import ConfigError, DataError, MissingExtraError, StorageError
from tiglon.serving.messages import Event

Id = int | str
T = TypeVar("T")

FORMAT = 1  # of an LMDB folder
_DIGEST = 16  # bytes
_NUMBER = struct.Struct(">Q")
_MOST_READERS = 1024  # transactions at one moment, of all processes; LMDB's own 126 are few for threads


@dataclass(frozen=True)
class Life:
    """What the state knows of one user, oldest first; three lists of one length.

    features: name → number, one dict an event.   forgotten: what the bundle holds of this user is hidden.
    """

    item_ids: list[Id] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    features: list[dict[str, float]] = field(default_factory=list)
    event_ids: list[str | None] = field(default_factory=list)
    forgotten: bool = False

    def __len__(self) -> int:
        return len(self.item_ids)


class State(Protocol):
    """What an engine needs of a store. Safe to use from several threads. Every method raises StorageError
    where the store is down, and works again when it is back."""

    def append(self, events: Sequence[Event]) -> list[bool]:
        """Store all of them or, with StorageError, none. True where one is new, False for a repetition."""

    def life(self, user_id: Id, last: int | None = None) -> Life | None:
        """A user's events, at most the `last` so many; None of whom nothing is known here."""

    def forget(self, user_id: Id) -> int:
        """Delete a user's events and hide the bundle's; how many were deleted. What comes later is kept.

        The event ids go, too: an old event that is sent once more after that counts as new.
        """

    def export(self, user_id: Id | None = None) -> Iterator[str]:
        """One user's events, or everybody's, as lines of JSON that `Event` reads; oldest first a user."""

    def close(self) -> None:
        """Let go of files or connections."""


# -- what both stores write --------------------------------------------------------------------------------


def _typed(raw: Id) -> bytes:
    if isinstance(raw, bool) or not isinstance(raw, (int, str)):
        raise DataError(f"the id {raw!r} of type {type(raw).__name__}", rule="Ids are integers or strings")
    try:
        return b"i%d" % raw if isinstance(raw, int) else b"s" + raw.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the id {raw!r}", rule="Ids are text that UTF-8 can hold") from error


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()


def _moment(event: Event) -> bytes:
    """8 bytes that sort as the timestamps do, negative ones too."""
    return _NUMBER.pack(event.timestamp + 2**63)


def _mark(event: Event) -> bytes:
    """What a repetition of this event of this user has in common with it."""
    if event.event_id is not None:
        return _digest(b"e" + event.event_id.encode())
    return _digest(b"a" + _moment(event) + _typed(event.item_id))


def _dumped(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def _value(event: Event) -> bytes:
    return _dumped([event.item_id, event.event_id, event.features])


def _life(rows: list[tuple[bytes, bytes]], forgotten: bool) -> Life:
    """From (moment, value) of each event, oldest first."""
    times = [_NUMBER.unpack(moment)[0] - 2**63 for moment, _ in rows]
    values = json.loads(b"[" + b",".join(value for _, value in rows) + b"]")
    item_ids, event_ids, features = map(list, zip(*values, strict=True)) if values else ([], [], [])
    return Life(item_ids, times, features, event_ids, forgotten)


def _lines(user_id: Id, life: Life | None) -> Iterator[str]:
    if life is None:
        return
    for item, time, features, event in zip(
        life.item_ids, life.times, life.features, life.event_ids, strict=True
    ):
        yield Event(
            user_id=user_id, item_id=item, timestamp=time, event_id=event, features=features
        ).model_dump_json()


def _require_last(last: int | None) -> None:
    if last is not None and last < 1:
        raise ConfigError(f"last={last}", rule="A life holds at least one event", fix="Pass None for all")


# -- embedded ----------------------------------------------------------------------------------------------


class LmdbState:
    """A folder with an LMDB database. Several processes may have it open, each with one LmdbState for all its
    threads, made after the process forked; readers never wait, writers take turns.

    An append returns when its transaction has been flushed to the disk: kill −9 and loss of power cannot take
    it back. map_bytes is address space, not memory or disk; when it is full, it doubles. The folder must be on
    a local disk. LMDB uses the pages of deleted events again, but does not overwrite them before that.

    Raises StorageError where the folder cannot be opened, is damaged, or is open in this process already.
    """

    def __init__(self, path: str | Path, map_bytes: int = 1 << 30) -> None:
        self.path = Path(path)
        self._gate = _Gate()
        self._map_bytes = map_bytes
        self._panicked = False
        self._open()

    def _open(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            env = lmdb.open(str(self.path), self._map_bytes, mode=0o600, max_dbs=3, max_readers=_MOST_READERS)
        except (lmdb.Error, OSError) as error:
            raise self._down(f"could not be opened: {error}") from error
        try:
            self._require_whole(env)
            env.reader_check()  # frees the slots of processes that were killed while they read
            written, (self._users, self._events, self._marks) = _databases(env)
            if written != FORMAT:
                raise self._down(f"has format {written}, and this Tiglon reads {FORMAT}")
        except (lmdb.Error, OSError) as error:
            env.close()
            if isinstance(error, StorageError):
                raise
            raise self._down(f"could not be opened: {error}") from error
        self._env = env

    def _require_whole(self, env: lmdb.Environment) -> None:
        """A file that lost its end would kill the process (SIGBUS) when a lost page is read."""
        expected = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        size = (self.path / "data.mdb").stat().st_size
        if size < expected and env.info()["last_txnid"]:
            raise self._down(f"is damaged: data.mdb has {size:,} bytes of {expected:,}")

    def append(self, events: Sequence[Event]) -> list[bool]:
        return self._transaction(lambda txn: [self._append(txn, event) for event in events], write=True)

    def _append(self, txn: lmdb.Transaction[bytes], event: Event) -> bool:
        user = _digest(_typed(event.user_id))
        if not txn.put(user + _mark(event), b"", overwrite=False, db=self._marks):
            return False
        about = self._about(txn, user) or {"user_id": event.user_id, "events": 0, "forgotten": False}
        key = user + _moment(event) + _NUMBER.pack(about["events"])
        txn.put(key, _value(event), db=self._events)
        about["events"] += 1
        txn.put(user, _dumped(about), db=self._users)
        return True

    def life(self, user_id: Id, last: int | None = None) -> Life | None:
        _require_last(last)
        user = _digest(_typed(user_id))

        def read(txn: lmdb.Transaction[bytes]) -> Life | None:
            about = self._about(txn, user)
            if about is None:
                return None
            newest_first = itertools.islice(self._backwards(txn, user), last)
            rows = [(key[_DIGEST : _DIGEST + 8], value) for key, value in newest_first]
            return _life(rows[::-1], about["forgotten"])

        return self._transaction(read)

    def _about(self, txn: lmdb.Transaction[bytes], user: bytes) -> dict[str, Any] | None:
        found = txn.get(user, db=self._users)
        return None if found is None else json.loads(found)

    def _backwards(self, txn: lmdb.Transaction[bytes], user: bytes) -> Iterator[tuple[bytes, bytes]]:
        """A user's events, newest first."""
        cursor = txn.cursor(self._events)
        found = cursor.prev() if cursor.set_range(user + b"\xff" * 17) else cursor.last()
        if found:
            yield from itertools.takewhile(lambda row: row[0].startswith(user), cursor.iterprev())

    def forget(self, user_id: Id) -> int:
        user = _digest(_typed(user_id))

        def delete(txn: lmdb.Transaction[bytes]) -> int:
            _delete_from(txn.cursor(self._marks), user)
            deleted = _delete_from(txn.cursor(self._events), user)
            about = {"user_id": user_id, "events": 0, "forgotten": True}
            txn.put(user, _dumped(about), db=self._users)
            return deleted

        return self._transaction(delete, write=True)

    def export(self, user_id: Id | None = None) -> Iterator[str]:
        # One short transaction a user: an open one would keep old pages from being used again.
        for user in self._known() if user_id is None else [user_id]:
            yield from _lines(user, self.life(user))

    def _known(self) -> list[Id]:
        return self._transaction(
            lambda txn: [json.loads(about)["user_id"] for _, about in txn.cursor(self._users)]
        )

    def close(self) -> None:
        with self._gate.alone():
            self._env.close()

    def _transaction(self, work: Callable[[lmdb.Transaction[bytes]], T], *, write: bool = False) -> T:
        """All of `work` or nothing of it, on one moment's data. Repeated with a larger map where one is needed."""
        while True:
            panicked = self._panicked
            if panicked:
                self._reopen()
            try:
                with self._gate.shared():
                    room = self._env.info()["map_size"]
                    with self._env.begin(write=write) as txn:
                        return work(txn)
            except lmdb.MapFullError:
                self._resize(room, 2 * room)
            except lmdb.MapResizedError:  # another process made it larger
                self._resize(room, 0)
            except lmdb.PanicError as error:
                self._panicked = True  # its header could not be written: only a new environment goes on
                if panicked:
                    raise self._down(f"refused: {error}") from error
            except (lmdb.Error, OSError) as error:
                raise self._down(f"refused: {error}") from error

    def _resize(self, seen: int, map_bytes: int) -> None:
        """0: to what the other processes use."""
        with self._gate.alone():
            if self._env.info()["map_size"] != seen:
                return  # another thread was faster
            try:
                self._env.set_mapsize(map_bytes)
            except (lmdb.Error, OSError) as error:
                raise self._down(f"could not grow to {map_bytes:,} bytes: {error}") from error

    def _reopen(self) -> None:
        with self._gate.alone():
            if self._panicked:
                self._env.close()
                self._open()
                self._panicked = False

    def _down(self, what: str) -> StorageError:
        return StorageError(
            f"The state in {self.path} {what}",
            rule="Nothing of this call was stored",
            fix="Look at the disk's space and the folder's owner; a damaged folder comes back from a copy, "
            "and without one, move it away: the bundle's own histories remain",
        )


def _databases(env: lmdb.Environment) -> tuple[int, list[Any]]:
    """The format, and users, events and marks; made where they are not there yet."""
    while True:
        try:
            with env.begin(write=True) as txn:
                txn.put(b"format", b"%d" % FORMAT, overwrite=False)
                databases = [env.open_db(name, txn) for name in (b"users", b"events", b"marks")]
                return int(txn.get(b"format") or 0), databases
        except lmdb.MapResizedError:  # other processes have made it larger than ours is
            env.set_mapsize(0)


def _delete_from(cursor: lmdb.Cursor[bytes], prefix: bytes) -> int:
    """Delete every key with the prefix; how many."""
    deleted = 0
    found = cursor.set_range(prefix)
    while found and cursor.key().startswith(prefix):
        cursor.delete()  # moves to the next, or to an empty key after the last
        deleted += 1
    return deleted


class _Gate:
    """Many inside at once, or one alone: LMDB's map may only change while no transaction is open."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._waiting = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._inside)
                yield
            finally:
                self._waiting -= 1
                self._changed.notify_all()


# -- shared by several machines ----------------------------------------------------------------------------

# KEYS: about, marks and life of each user.   ARGV: of each event the user's place and id, mark, moment, value.
_APPEND = """
local new = {}
for i = 1, #ARGV, 5 do
  local first = 3 * tonumber(ARGV[i])
  local about, marks, life = KEYS[first + 1], KEYS[first + 2], KEYS[first + 3]
  local arrived = redis.call('SCARD', marks)
  new[#new + 1] = redis.call('SADD', marks, ARGV[i + 2])
  if new[#new] == 1 then
    redis.call('HSET', about, 'user_id', ARGV[i + 1])
    redis.call('ZADD', life, 0, ARGV[i + 3] .. struct.pack('>I8', arrived) .. ARGV[i + 4])
  end
end
return new
"""


class RedisState:
    """The same in Redis (7 or newer), where several machines serve. Needs the extra `redis`.

    An append is one script, all or nothing. What an acknowledgement is worth is the server's setting: with
    `appendonly yes` and `appendfsync always` it is on the server's disk; Redis' defaults may lose the last
    minutes. Run it with `maxmemory-policy noeviction`, lest lives vanish.

    url: redis://, rediss:// or unix://, with the password, if any; no message repeats it.
    timeout: seconds until a silent server counts as down.
    Raises MissingExtraError, ConfigError; no connection is made before the first call.
    """

    def __init__(self, url: str, timeout: float = 1.0) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise MissingExtraError(
                "A state in Redis needs the package redis", fix="pip install 'tiglon[redis]'"
            ) from error
        self._error = redis.RedisError
        # A connection that the server dropped is made once more; an append may be repeated without harm.
        again = Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
        try:
            self._redis: Any = redis.Redis.from_url(
                url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=again
            )
        except ValueError as error:
            raise ConfigError(
                "a Redis URL that cannot be read", fix="Write it as redis://[:password@]host:6379/0"
            ) from error
        self._script = self._redis.register_script(_APPEND)

    def append(self, events: Sequence[Event]) -> list[bool]:
        if not events:
            return []
        places: dict[bytes, int] = {}
        arguments: list[Any] = []
        for event in events:
            place = places.setdefault(_digest(_typed(event.user_id)), len(places))
            arguments += [place, _dumped(event.user_id), _mark(event), _moment(event), _value(event)]
        keys = [key for user in places for key in _keys(user)]
        with self._asked():
            return [bool(new) for new in self._script(keys, arguments)]

    def life(self, user_id: Id, last: int | None = None) -> Life | None:
        _require_last(last)
        about, _, life = _keys(_digest(_typed(user_id)))
        with self._asked(), self._redis.pipeline(transaction=True) as together:
            together.exists(about)
            together.hexists(about, "forgotten")
            together.zrevrange(life, 0, -1 if last is None else last - 1)
            known, forgotten, newest_first = together.execute()
        rows = [(member[:8], member[16:]) for member in reversed(newest_first)]
        return _life(rows, bool(forgotten)) if known else None

    def forget(self, user_id: Id) -> int:
        about, marks, life = _keys(_digest(_typed(user_id)))
        with self._asked(), self._redis.pipeline(transaction=True) as together:
            together.zcard(life)
            together.delete(marks, life)
            together.hset(about, mapping={"user_id": _dumped(user_id), "forgotten": 1})
            return together.execute()[0]

    def export(self, user_id: Id | None = None) -> Iterator[str]:
        for user in self._known() if user_id is None else [user_id]:
            yield from _lines(user, self.life(user))

    def _known(self) -> list[Id]:
        with self._asked():
            abouts = sorted(set(self._redis.scan_iter(match=_keys(b"")[0] + "*", count=1000)))
            return [json.loads(self._redis.hget(about, "user_id")) for about in abouts]

    def close(self) -> None:
        self._redis.close()

    @contextmanager
    def _asked(self) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            where = self._redis.get_connection_kwargs()
            place = where.get("path") or f"{where.get('host')}:{where.get('port')}"
            raise StorageError(
                f"The state in Redis at {place} did not answer: {error}",
                rule="Nothing of this call was stored, unless only the answer was lost; sending it again is safe",
                fix="See that the server runs, has room and takes the password",
            ) from error


def _keys(user: bytes) -> tuple[str, str, str]:
    """Redis' names of what is known about a user, of the marks and of the life."""
    name = user.hex()
    return f"tiglon:about:{name}", f"tiglon:marks:{name}", f"tiglon:life:{name}"
