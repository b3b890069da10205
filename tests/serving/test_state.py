"""A state keeps what it acknowledged, in order, once, for the right user; LMDB and a real Redis alike."""

import functools
import json
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import lmdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tiglon.errors import ConfigError, DataError, MissingExtraError, StorageError
from tiglon.serving.messages import Event
from tiglon.serving.state import Life, LmdbState, RedisState


def event(user, item, timestamp, event_id=None, **features):
    return Event(user_id=user, item_id=item, timestamp=timestamp, event_id=event_id, features=features)


class RedisServer:
    """A redis-server of our own on the loopback, with a file of its writes."""

    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        options = {"port": self.port, "bind": "127.0.0.1", "dir": self.folder, "save": ""}
        options |= {"appendonly": "yes", "appendfsync": "everysec"}
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        self.process = subprocess.Popen(["redis-server", *words], stdout=subprocess.DEVNULL)
        self.wait()

    def wait(self):
        import redis

        client, deadline = redis.Redis.from_url(self.url), time.monotonic() + 200
        while True:
            try:
                if client.ping():
                    return
            except redis.RedisError:
                assert time.monotonic() < deadline, "redis-server did not come up"
                time.sleep(0.02)

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory):
    if not shutil.which("redis-server"):
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture(params=["lmdb", "redis"])
def fresh(request, tmp_path, monkeypatch):
    """A function that makes an empty state; whatever it made is closed in the end. Nothing is flushed."""
    monkeypatch.setattr(lmdb, "open", functools.partial(lmdb.open, sync=False))
    made = []
    server = request.getfixturevalue("redis_server") if request.param == "redis" else None

    def make():
        if server is None:
            made.append(LmdbState(tmp_path / str(len(made)), map_bytes=1 << 16))
        else:
            made.append(RedisState(server.url, timeout=20))
            made[-1]._redis.flushall()
        return made[-1]

    yield make
    for state in made:
        state.close()


@pytest.fixture
def state(fresh):
    return fresh()


# -- the contract, of both stores --------------------------------------------------------------------------


def test_a_stranger_is_none_and_an_append_is_seen_at_once(state):
    assert state.life(7) is None
    assert state.append([]) == []
    assert state.append([event(7, 3, 100, price=2.5), event(7, "x", 200)]) == [True, True]
    assert state.life(7) == Life([3, "x"], [100, 200], [{"price": 2.5}, {}], [None, None])
    assert len(state.life(7)) == 2


def test_late_events_find_their_place_and_equal_times_keep_their_order(state):
    for item, timestamp in [(1, 50), (2, -10), (3, 50), (4, 0), (5, 2**63 - 1), (6, -(2**63))]:
        state.append([event("u", item, timestamp)])
    life = state.life("u")
    assert life.item_ids == [6, 2, 4, 1, 3, 5]
    assert life.times == [-(2**63), -10, 0, 50, 50, 2**63 - 1]


def test_the_last_events_are_the_latest_and_not_the_last_to_come(state):
    state.append([event(1, item, timestamp) for item, timestamp in [(30, 3), (10, 1), (40, 4), (20, 2)]])
    assert state.life(1, last=2).item_ids == [30, 40]
    assert state.life(1, last=99).item_ids == [10, 20, 30, 40]
    with pytest.raises(ConfigError, match=r"last=0\. A life holds at least one event\. Pass None for all\."):
        state.life(1, last=0)


def test_an_event_id_is_stored_once_for_each_user(state):
    first = [event(1, 5, 10, "a"), event(1, 5, 10, "b"), event(1, 5, 10, "a"), event(2, 5, 10, "a")]
    assert state.append(first) == [True, True, False, True]
    assert state.append([event(1, 9, 99, "a")]) == [False]
    assert state.life(1).item_ids == [5, 5]
    assert state.life(1).event_ids == ["a", "b"]
    assert state.life(2).item_ids == [5]


def test_without_an_event_id_the_same_item_and_time_is_the_same_event(state):
    given = [event(1, 5, 10), event(1, 5, 11), event(1, 6, 10), event(1, "5", 10), event(1, 5, 10, "a")]
    assert state.append(given) == [True] * 5
    assert state.append(given) == [False] * 5
    assert len(state.life(1)) == 5


@pytest.mark.parametrize("one, other", [(5, "5"), ("a", "ab"), ("i5", 5), ("", " "), (-1, 2**63 - 1)])
def test_ids_of_two_types_or_of_one_beginning_are_two_users(state, one, other):
    for user in filter(lambda user: user != "", (one, other)):
        assert state.life(user) is None
        state.append([event(user, 1, 1)])
        assert len(state.life(user)) == 1
    state.forget(one)
    assert len(state.life(other)) == 1


@pytest.mark.parametrize("user", ["ü" * 256, "a\x00b", "../../etc/passwd", "*", "\n{}", "🦁"])
def test_any_string_is_a_name(state, user):
    state.append([event(user, user, 1, user)])
    assert state.life(user) == Life([user], [1], [{}], [user])
    assert json.loads(next(state.export()))["user_id"] == user


@pytest.mark.parametrize("user", [True, 1.5, None, b"7", [7]])
def test_what_is_no_id_is_refused(state, user):
    with pytest.raises(DataError, match=r"of type \w+\. Ids are integers or strings"):
        state.life(user)
    with pytest.raises(DataError, match="Ids are integers or strings"):
        state.forget(user)


def test_what_no_text_can_be_is_refused(state):
    with pytest.raises(DataError, match=r"the id '.ud800'\. Ids are text that UTF-8 can hold"):
        state.forget("\ud800")


def test_who_is_forgotten_is_gone_and_the_bundles_part_hidden(state):
    state.append([event(1, 5, 10, "a"), event(1, 6, 20), event(2, 7, 30)])
    assert state.forget(1) == 2
    assert state.life(1) == Life(forgotten=True)
    assert not list(state.export(1))
    assert state.forget(1) == 0
    assert state.life(2).item_ids == [7]


def test_who_was_only_in_the_bundle_can_be_forgotten(state):
    assert state.forget("from the log") == 0
    assert state.life("from the log") == Life(forgotten=True)


def test_what_comes_after_forgetting_is_kept_and_the_past_stays_hidden(state):
    state.append([event(1, 5, 10, "a")])
    state.forget(1)
    assert state.append([event(1, 8, 40), event(1, 8, 40), event(1, 5, 10, "a")]) == [True, False, True]
    assert state.life(1) == Life([5, 8], [10, 40], [{}, {}], ["a", None], forgotten=True)


def test_an_export_is_read_back_to_the_same_lives(fresh):
    state = fresh()
    state.append([event(1, 5, 20, "a", price=1.25), event("1", "x", 3), event(1, 6, 10), event(1, 7, 10)])
    lives = {user: state.life(user) for user in (1, "1")}
    one, everybody = list(state.export(1)), list(state.export())
    assert [json.loads(line)["item_id"] for line in one] == [6, 7, 5]
    assert json.loads(one[2]) == {
        "user_id": 1, "item_id": 5, "timestamp": 20, "event_id": "a", "features": {"price": 1.25}
    }  # fmt: skip
    other = fresh()
    assert all(other.append([Event.model_validate_json(line) for line in everybody]))
    assert {user: other.life(user) for user in (1, "1")} == lives


def test_an_export_may_be_read_while_events_come(state):
    state.append([event(user, 1, 1) for user in range(5)])
    seen = 0
    for _ in state.export():
        state.append([event(9, item, seen, price=0.5) for item in range(300)])  # outgrows the map
        seen += 1
    assert 5 <= seen <= 305


ids = st.one_of(st.integers(0, 2), st.sampled_from(["0", "1"]))
logs = st.lists(
    st.builds(
        event, ids, st.integers(0, 2), st.integers(-2, 2), st.none() | st.sampled_from("ab"), v=st.just(1.0)
    ),
    max_size=12,
)


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(logs, st.data())
def test_any_interleaving_equals_the_sorted_set(fresh, log, data):
    """Whatever the batches, with anything sent twice: each life is the first of each event, sorted by time."""
    arrivals = data.draw(st.permutations(log + log))
    state, done, answers = fresh(), 0, []
    while done < len(arrivals):
        size = data.draw(st.integers(1, len(arrivals)))
        answers += state.append(arrivals[done : done + size])
        done += size
    lives, marks, expected = {}, set(), []
    for e in arrivals:
        own = (e.item_id, e.timestamp) if e.event_id is None else e.event_id
        mark = (type(e.user_id), e.user_id, own)
        expected.append(mark not in marks)
        if mark not in marks:
            lives.setdefault((type(e.user_id), e.user_id), []).append(e)
        marks.add(mark)
    assert answers == expected
    for (_, user), events in lives.items():
        events.sort(key=lambda e: e.timestamp)
        life = state.life(user)
        assert life.item_ids == [e.item_id for e in events]
        assert life.event_ids == [e.event_id for e in events]
        assert life.times == [e.timestamp for e in events]


def test_threads_append_and_read_together(state):
    """The map of LMDB grows on the way; nobody loses an event or reads half a batch."""
    failed = []

    def write(user):
        for batch in range(8):
            state.append([event(user, item, batch, f"{batch} {item}") for item in range(10)])

    def read():
        for _ in range(30):
            for user in range(3):
                life = state.life(user)
                if life is not None and len(life) % 10:
                    failed.append(len(life))

    threads = [threading.Thread(target=write, args=(user,)) for user in range(3)]
    threads += [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed
    assert [len(state.life(user)) for user in range(3)] == [80] * 3


# -- LMDB --------------------------------------------------------------------------------------------------

WRITER = """
import sys
from tiglon.serving.messages import Event
from tiglon.serving.state import LmdbState

path, user, batches, events = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
state = LmdbState(path, map_bytes=1 << 16)
for batch in range(batches):
    state.append([Event(user_id=user, item_id=item, timestamp=batch) for item in range(events)])
    print(batch, flush=True)
"""


def writer(path, user, batches, events):
    """A process that appends batches and says of each that it was acknowledged."""
    command = [sys.executable, "-c", WRITER, str(path), user, str(batches), str(events)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_several_processes_write_and_read_one_folder(tmp_path):
    state = LmdbState(tmp_path, map_bytes=1 << 16)
    writers = [writer(tmp_path, name, 8, events=250) for name in "ab"]
    while any(process.poll() is None for process in writers):
        for name in "ab":
            assert len(state.life(name) or []) % 250 == 0
    assert [process.wait() for process in writers] == [0, 0]
    # They made the map larger than ours was.
    assert [len(state.life(name)) for name in "ab"] == [2000, 2000]
    state.append([event("a", 99, 100)])
    assert state.life("a").item_ids[-1] == 99


def test_an_acknowledged_event_survives_kill_9(tmp_path):
    for kill in range(3):
        process = writer(tmp_path, str(kill), 10_000, events=5)
        for line in process.stdout:
            acknowledged = int(line)
            if acknowledged == 3 * kill:
                process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        state = LmdbState(tmp_path)
        times = state.life(str(kill)).times
        assert len(times) % 5 == 0
        assert acknowledged <= times[-1] <= acknowledged + 1
        assert state.append([event("next", 1, kill)]) == [True]
        state.close()


def test_a_full_map_doubles_and_stays_so(tmp_path):
    state = LmdbState(tmp_path, map_bytes=1 << 16)
    state.append([event(1, item, 0) for item in range(2000)])
    assert state._env.info()["map_size"] >= 1 << 18
    state.close()
    again = LmdbState(tmp_path, map_bytes=1 << 16)
    assert len(again.life(1)) == 2000
    again.close()


def test_a_full_disk_stores_nothing_and_says_so_and_recovers(tmp_path):
    state = LmdbState(tmp_path)
    state.append([event(1, 1, 1)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "data.mdb").stat().st_size, hard))
        with pytest.raises(StorageError) as caught:
            state.append([event(1, item, 2) for item in range(1000)])
        assert state.life(1).item_ids == [1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path) in str(caught.value)
    assert "Nothing of this call was stored. Look at the disk's space" in str(caught.value)
    assert state.append([event(1, 2, 2)]) == [True]
    assert state.life(1).item_ids == [1, 2]
    state.close()


def test_after_a_panic_a_new_environment_goes_on(tmp_path):
    """LMDB panics where its header cannot be written, and from then on refuses everything."""
    state = LmdbState(tmp_path)
    state.append([event(1, 1, 1)])
    env = state._env

    class Panicked:
        info = env.info
        close = env.close

        def begin(self, write):
            raise lmdb.PanicError("a bad disk")

    state._env = Panicked()
    assert state.life(1).item_ids == [1]
    assert state.append([event(1, 2, 2)]) == [True]
    state.close()


def test_a_damaged_folder_is_one_clear_error(tmp_path):
    state = LmdbState(tmp_path / "state")
    state.append([event(1, item, item) for item in range(2000)])
    state.close()
    data = tmp_path / "state" / "data.mdb"
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StorageError, match=r"is damaged: data\.mdb has [\d,]+ bytes of [\d,]+\."):
        LmdbState(tmp_path / "state")
    data.write_bytes(b"wibble" * 5000)
    with pytest.raises(StorageError, match=r"could not be opened: .*a damaged folder comes back from a copy"):
        LmdbState(tmp_path / "state")
    data.write_bytes(whole)
    again = LmdbState(tmp_path / "state")
    assert len(again.life(1)) == 2000
    again.close()


def test_a_folder_of_a_later_format_is_not_read(tmp_path):
    LmdbState(tmp_path).close()
    with lmdb.open(str(tmp_path), max_dbs=3) as env, env.begin(write=True) as txn:
        txn.put(b"format", b"2")
    with pytest.raises(StorageError, match="has format 2, and this Tiglon reads 1"):
        LmdbState(tmp_path)


def test_a_place_that_cannot_be_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file could not be opened"):
        LmdbState(tmp_path / "file")
    state = LmdbState(tmp_path / "twice")
    with pytest.raises(StorageError, match="already open in this process"):
        LmdbState(tmp_path / "twice")
    state.close()
    with pytest.raises(StorageError, match="refused"):
        state.life(1)


def test_others_may_not_read_the_files(tmp_path):
    LmdbState(tmp_path).close()
    assert (tmp_path / "data.mdb").stat().st_mode & 0o077 == 0


# -- Redis -------------------------------------------------------------------------------------------------


def test_a_server_that_was_killed_is_an_error_and_then_goes_on(redis_server):
    state = RedisState(redis_server.url.replace("//", "//:secret-word@"), timeout=5)
    plain = RedisState(redis_server.url, timeout=5)
    plain._redis.flushall()
    plain._redis.config_set("appendfsync", "always")
    plain.append([event(1, 1, 1)])
    redis_server.kill()
    for call in (lambda: state.append([event(1, 2, 2)]), lambda: state.life(1), lambda: state.forget(1)):
        with pytest.raises(StorageError) as caught:
            call()
        assert f"Redis at 127.0.0.1:{redis_server.port} did not answer" in str(caught.value)
        assert "See that the server runs" in str(caught.value)
        assert "secret-word" not in str(caught.value)
    redis_server.start()
    assert plain.life(1).item_ids == [1]
    assert plain.append([event(1, 2, 2)]) == [True]


def test_a_server_without_room_stores_nothing(redis_server):
    state = RedisState(redis_server.url, timeout=5)
    state._redis.flushall()
    state._redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(StorageError, match=r"did not answer: .*maxmemory"):
            state.append([event(1, 1, 1), event(2, 1, 1)])
    finally:
        state._redis.config_set("maxmemory", 0)
    assert state.life(1) is None
    assert state.append([event(1, 1, 1)]) == [True]


def test_a_redis_that_cannot_be_named(monkeypatch):
    with pytest.raises(ConfigError, match=r"cannot be read\. Write it as redis://"):
        RedisState("http://:secret@wibble")
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tiglon\[redis\]'"):
        RedisState("redis://localhost")
