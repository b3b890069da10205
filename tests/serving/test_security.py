import hashlib
import json
import stat
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest

from tiglon.errors import ConfigError
from tiglon.serving import security
from tiglon.serving.api import create_app
from tiglon.serving.desk import Settings
from tiglon.serving.logs import JsonLines
from tiglon.serving.publish import publish
from tiglon.serving.security import (
    Allowance,
    Keys,
    add_key,
    host_of,
    is_loopback,
    require_keys_beyond_loopback,
)
from tiglon.serving.server import serve
from tiglon.serving.state import LmdbState

READ, BOTH = frozenset({"read"}), frozenset({"read", "write"})


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.json"


# -- keys ----------------------------------------------------------------------------------------------------


def test_a_key_is_found_and_the_file_does_not_hold_it(file):
    token = add_key(file, "shop", BOTH)
    assert len(token) >= 43  # 256 bits
    assert token not in file.read_text()
    assert json.loads(file.read_text())["keys"][0]["sha256"] == hashlib.sha256(token.encode()).hexdigest()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    found = Keys(file).find(token)
    assert (found.name, found.scopes) == ("shop", BOTH)


def test_nearly_a_key_is_none(file):
    token = add_key(file, "shop", READ)
    keys = Keys(file)
    wrong = [
        "",
        token[:-1],
        token + "x",
        token.swapcase(),
        "é" * 43,
        hashlib.sha256(token.encode()).hexdigest(),
    ]
    assert [keys.find(given) for given in wrong] == [None] * len(wrong)


def test_each_key_has_its_scopes(file):
    reader, writer = add_key(file, "reader", READ), add_key(file, "writer", BOTH)
    keys = Keys(file)
    assert keys.find(reader).scopes == READ
    assert keys.find(writer).scopes == BOTH


def test_a_key_that_is_deleted_is_withdrawn_without_a_restart(file):
    kept, gone = add_key(file, "kept", READ), add_key(file, "gone", READ)
    keys = Keys(file)
    assert not keys.refresh()
    content = json.loads(file.read_text())
    new = file.with_name("new")
    new.write_text(json.dumps({"keys": content["keys"][:1]}))
    new.replace(file)
    assert keys.refresh()
    assert keys.find(kept) is not None
    assert keys.find(gone) is None


def test_a_file_that_was_damaged_leaves_the_old_keys(file):
    token = add_key(file, "shop", READ)
    keys = Keys(file)
    file.write_text("{")
    with pytest.raises(ConfigError, match="is no file of keys"):
        keys.refresh()
    assert keys.find(token) is not None


def test_a_file_that_could_not_be_read_once_is_read_later(file, monkeypatch):
    gone = add_key(file, "gone", READ)
    keys = Keys(file)
    other = file.with_name("other")
    add_key(other, "kept", READ)
    other.replace(file)

    def refuse(path):
        raise ConfigError("no")

    with monkeypatch.context() as patched:
        patched.setattr(security, "_read", refuse)
        with pytest.raises(ConfigError):
            keys.refresh()
    assert keys.find(gone) is not None
    assert keys.refresh()
    assert keys.find(gone) is None


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"keys": []}', "holds no key"),
        ("[]", "is no file of keys"),
        ('{"keys": [{"name": "a", "sha256": "00", "scopes": ["read"]}]}', "64 hex digits"),
        ('{"keys": [{"name": "a", "sha256": "' + "0" * 64 + '", "scopes": ["root"]}]}', "is no file of keys"),
    ],
)
def test_a_file_of_no_keys_is_refused(file, text, message):
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Keys(file)


def test_a_missing_file_says_how_to_make_one(file):
    with pytest.raises(ConfigError, match=r"cannot be read.*Make one: tiglon key FILE --name NAME"):
        Keys(file)


def test_names_are_plain_and_given_once(file):
    add_key(file, "shop", READ)
    with pytest.raises(ConfigError, match="a key named shop"):
        add_key(file, "shop", READ)
    with pytest.raises(ConfigError, match="up to 64 letters"):
        add_key(file, "shop\nadmin", READ)
    assert len(json.loads(file.read_text())["keys"]) == 1


# -- limits ----------------------------------------------------------------------------------------------------


def test_a_key_may_ask_so_often_at_once_and_then_as_the_minute_passes(file):
    now = 100.0
    allowance = Allowance(lambda: now)
    token = add_key(file, "slow", READ, per_minute=6)
    slow = Keys(file).find(token)
    assert [allowance.wait(slow) for _ in range(6)] == [0.0] * 6
    assert allowance.wait(slow) == pytest.approx(10)
    now += 4
    assert allowance.wait(slow) == pytest.approx(6)  # who asks too early does not wait longer for it
    now += 6
    assert allowance.wait(slow) == 0.0
    assert allowance.wait(slow) == pytest.approx(10)
    now += 10_000
    assert [allowance.wait(slow) > 0 for _ in range(7)] == [False] * 6 + [True]  # it holds no more than that


def test_keys_do_not_share_a_limit_and_need_none(file):
    tokens = [add_key(file, "a", READ, 1), add_key(file, "b", READ, 1), add_key(file, "free", READ)]
    keys, allowance = Keys(file), Allowance(lambda: 0.0)
    first, second, free = map(keys.find, tokens)
    assert (allowance.wait(first), allowance.wait(first)) == (0.0, 60.0)
    assert allowance.wait(second) == 0.0
    assert {allowance.wait(free) for _ in range(1000)} == {0.0}


def test_a_limit_that_was_changed_holds_at_once(file):
    token = add_key(file, "a", READ, 600)
    allowance, key = Allowance(lambda: 0.0), Keys(file).find(token)
    assert allowance.wait(key) == 0.0
    lower = key.model_copy(update={"per_minute": 2})
    assert [allowance.wait(lower) for _ in range(3)] == [0.0, 0.0, 30.0]


def test_the_file_says_limits_where_there_are_any(file):
    add_key(file, "free", READ)
    token = add_key(file, "shop", READ, 600)
    assert [key.get("per_minute") for key in json.loads(file.read_text())["keys"]] == [None, 600]
    assert "per_minute" not in json.loads(file.read_text())["keys"][0]
    assert Keys(file).find(token).per_minute == 600


@pytest.mark.parametrize("wrong", [0, -1])
def test_a_limit_of_nothing_is_refused(file, wrong):
    message = (
        rf"per_minute={wrong}\. A key may send at least one request a minute\. Leave it out for no limit\."
    )
    with pytest.raises(ConfigError, match=message):
        add_key(file, "shop", READ, wrong)
    assert not file.exists()


@pytest.mark.parametrize("wrong", ["0", "-5", "1.5", '"600"', "true"])
def test_a_file_with_a_limit_that_is_none_is_refused(file, wrong):
    add_key(file, "shop", READ, 600)
    file.write_text(file.read_text().replace("600", wrong))
    with pytest.raises(ConfigError, match='"per_minute": 1 or more'):
        Keys(file)


def test_a_key_gets_429_until_its_minute_has_passed(bundle_path, working, tmp_path, file):
    now = 0.0
    slow, free = add_key(file, "slow", READ, per_minute=3), add_key(file, "free", READ)
    app = create_app(bundle_path, None, Settings(keys=file))
    (gate,) = app.user_middleware
    gate.kwargs["clock"] = lambda: now
    with working(app) as server:
        client, asked = server.with_key(slow), {"user_id": 3, "k": 2}
        for _ in range(3):
            client.post("/v1/recommend", asked)
        status, headers, content = client.ask("POST", "/v1/recommend", asked)
        assert (status, content["error"], headers["Retry-After"]) == (429, "too_many_requests", "20")
        assert content["what"] == "more than 3 requests a minute with the key 'slow'"
        assert content["rule"].startswith("A key with a limit")
        assert "Retry-After" in content["fix"]
        assert content["request_id"] == headers["X-Request-ID"]
        assert headers["Cache-Control"] == "no-store"
        now = 19.5
        assert client.ask("GET", "/v1/users/3")[1]["Retry-After"] == "1"  # whatever it asks for
        assert client.ask("GET", "/health/ready")[0] == 200  # needs no key, and costs nothing
        assert server.with_key(slow[:-1]).ask("GET", "/v1/users/3")[0] == 401
        page = server.with_key(free).get("/metrics")
        assert 'tiglon_limited_total{key="slow"} 2.0' in page
        assert 'status="429"' in page
        now = 20.0
        client.post("/v1/recommend", asked)
        assert client.ask("GET", "/v1/users/3")[0] == 429
        described = server.with_key(free).get("/openapi.json")["paths"]["/v1/recommend"]["post"]["responses"]
        assert "429" in described


# -- where it may listen ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "127.9.9.9", "::1", "[::1]"])
def test_this_machine(host):
    assert is_loopback(host)
    require_keys_beyond_loopback(host, None)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "example.com", "", "localhost.evil.com", "127.0.0.1.evil.com", "*"]
)
def test_other_machines_need_keys(host):
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match=r"without keys.*listens on this machine alone.*--keys FILE"):
        require_keys_beyond_loopback(host, None)
    require_keys_beyond_loopback(host, Path("keys.json"))


def test_a_server_refuses_before_it_binds(bundle_path):
    with pytest.raises(ConfigError, match=r"--host 0\.0\.0\.0 without keys"):
        serve(bundle_path, "0.0.0.0")
    with pytest.raises(ConfigError, match="cannot be read"):
        serve(bundle_path, "0.0.0.0", settings=Settings(keys=Path("nowhere.json")))


@pytest.mark.parametrize(
    "header, host",
    [("localhost:8000", "localhost"), ("[::1]:80", "[::1]"), ("[::1]", "[::1]"), ("a.b", "a.b")],
)
def test_the_host_of_a_header(header, host):
    assert host_of(header) == host


# -- a server without keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.com", "evil.com:80", "localhost.evil.com", "127.0.0.1.evil.com", ""])
def test_a_name_that_leads_here_from_elsewhere_is_refused(server, host):
    """Else any web page could read from here: its own name, resolved anew, would be this machine."""
    status, _, content = server.ask("GET", "/health/ready", headers={"Host": host})
    assert (status, content["error"]) == (421, "misdirected")


def test_a_form_of_another_site_cannot_write(server):
    body = b'{"events": [{"user_id": 900, "item_id": 1, "timestamp": 1600000001}]}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        status, headers, content = server.ask("POST", "/v1/events", body, {"Content-Type": kind})
        assert (status, content["error"]) == (415, "no_json"), kind
        assert "access-control-allow-origin" not in headers
    assert server.get("/v1/users/900")["events"] == []


# -- bodies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"user_id":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"user_id": "\xff\xfe"}',
        b'{"user_id": "\\ud800"}',
        b'{"user_id": NaN}',
        b'{"user_id": ' + b"9" * 10_000 + b"}",
        b"",
        b"null",
        b"[]",
        b"\x00",
        b'\xef\xbb\xbf{"user_id": 1}',
    ],
    ids=lambda body: str(body[:12]),
)
def test_bodies_that_are_no_message_are_refused(server, body):
    status, _, content = server.ask("POST", "/v1/recommend", body)
    assert status in (400, 422)
    assert content["error"] in ("malformed", "invalid")
    assert content["what"]
    assert content["rule"]


def test_a_body_that_says_that_it_is_too_large_is_not_read(server):
    head = b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    answer = server.raw(head + b"Content-Length: 9000000\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in answer.lower()
    assert b"too_large" in answer


def test_a_body_that_does_not_end_is_cut_off(server, until):
    head = b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    before = sum(line.get("error") == "too_large" for line in server.lines())
    with suppress(OSError):  # the server closes while this goes on
        server.raw(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 200)
    until(lambda: sum(line.get("error") == "too_large" for line in server.lines()) > before)
    assert server.get("/health/live") == {"live": True}


# -- ids and logs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "user",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "..\\..\\windows",
        "a/b",
        "%00",
        "<script>",
        "\n{}",
        "x" * 256,
        "é",
        "http://x/",
    ],
)
def test_an_id_is_a_name_whatever_it_looks_like(server, user):
    event = {"user_id": user, "item_id": 1, "timestamp": 1_600_000_001}
    assert server.post("/v1/events", {"events": [event]})["accepted"] == 1
    path = f"/v1/users/{quote(user, safe='')}?id_type=string"
    found = server.get(path)
    assert found["user_id"] == user
    assert [(e["user_id"], e["item_id"]) for e in found["events"]] == [(user, 1)]
    assert server.ask("DELETE", path)[0] == 200
    assert server.get(path)["events"] == []


@pytest.mark.parametrize("path", ["/console/../../../../etc/passwd", "/console/%2e%2e/%2e%2e/pyproject.toml"])
def test_only_the_consoles_own_files_are_served(server, path):
    assert server.ask("GET", path)[0] in (404, 405)


def test_a_log_line_cannot_be_forged(server):
    """Every line is one JSON object, whatever a request says of itself."""
    forged = '{"message": "forged"}'
    server.ask("GET", "/v1/users/" + quote(f"a\n{forged}\r\n\u2028\x1b[2J", safe=""))
    server.ask("GET", "/nowhere/" + quote(f"\n{forged}", safe=""))
    server.ask("POST", "/v1/recommend", {"user_id": f"\n{forged}", "k": f"\n{forged}"})
    bad = server.ask("GET", "/health/live", headers={"X-Request-ID": f"a {forged}"})[1]["X-Request-ID"]
    assert "forged" not in bad
    lines = server.lines()  # each parses
    assert not any(line["message"] == "forged" for line in lines)
    assert server.log.read_text().isascii()
    assert not any("forged" in line for line in map(str, lines))  # ids are not logged at all


def test_an_error_does_not_tell_where_files_are(server, bundle_path):
    _, _, content = server.ask("POST", "/v1/recommend", {"user_id": 1, "source": str(bundle_path)})
    assert content["error"] == "invalid"
    assert server.ask("GET", "/health/ready?source=/etc")[2]["bundle"]
    assert str(bundle_path) not in json.dumps(server.get("/openapi.json"))


def test_a_stranger_is_not_told_which_file_is_damaged(working, bundle_path, until, tmp_path, file):
    home = tmp_path / "home"
    publish(bundle_path, home)
    add_key(file, "reader", READ)
    with working(create_app(home, None, Settings(keys=file, poll_seconds=0.05))) as server:
        pointer = home / "CURRENT"
        pointer.write_text("0" * 16 + "\n" + pointer.read_text())
        assert until(lambda: server.get("/health/ready")["trouble"]) == "see the log"


def test_answers_carry_what_browsers_need_to_be_careful(server):
    headers = server.ask("GET", "/v1/users/1")[1]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert "server" not in headers


# -- a server with keys ----------------------------------------------------------------------------------------


@pytest.fixture
def guarded(working, bundle_path, tmp_path, file):
    """(server, key that may read, key that may write)"""
    reader, writer = add_key(file, "reader", READ), add_key(file, "writer", BOTH)
    settings = Settings(keys=file, poll_seconds=0.05)
    with working(create_app(bundle_path, LmdbState(tmp_path / "state"), settings)) as server:
        yield server, reader, writer


def test_without_the_right_key_nothing_is_told(guarded):
    server, reader, _ = guarded
    wrong = [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {reader[:-1]}"},
        {"Authorization": f"Bearer {reader}x"},
        {"Authorization": f"Basic {reader}"},
        {"Authorization": reader},
        {"X-API-Key": reader},
    ]
    for headers in wrong:
        for method, path in [
            ("GET", "/v1/users/7"),
            ("GET", "/metrics"),
            ("GET", "/v1/nowhere"),
            ("POST", "/v1/items"),
        ]:
            status, out, content = server.ask(method, path, headers=headers)
            assert (status, content["error"]) == (401, "unauthorized"), (headers, path)
            assert out["WWW-Authenticate"] == "Bearer"
            assert reader not in json.dumps(content)
    assert server.ask("GET", f"/v1/users/7?key={reader}")[0] == 401


def test_a_key_that_may_read_may_not_write(guarded):
    server, reader, writer = guarded
    event = {"events": [{"user_id": 1, "item_id": 1, "timestamp": 10**9}]}
    writes = [
        ("POST", "/v1/events", event),
        ("POST", "/v1/items", {"remove": [39]}),
        ("DELETE", "/v1/users/5", None),
    ]
    for method, path, body in writes:
        status, _, content = server.with_key(reader).ask(method, path, body)
        assert (status, content["error"]) == (403, "forbidden")
        assert "the key 'reader', which may not write" in content["what"]
        assert server.with_key(writer).ask(method, path, body)[0] == 200
    assert server.with_key(reader).get("/metrics").count("tiglon_requests_total")
    assert server.with_key(reader).post("/v1/recommend", {"user_id": 7, "k": 2})["items"]


def test_health_needs_no_key_and_other_names_are_served(guarded, caplog, until):
    server, reader, _ = guarded
    for path in ("/health/live", "/health/ready", "/openapi.json"):
        assert server.ask("GET", path, headers={"Host": "shop.example"})[0] == 200
    caplog.set_level("INFO")
    server.with_key(reader).get("/v1/users/1")

    def lines():
        return [JsonLines().format(record) for record in list(caplog.records)]

    until(lambda: any(json.loads(line).get("key") == "reader" for line in lines()))  # after the answer
    assert not any(reader in line for line in lines())


def test_a_key_is_withdrawn_while_serving(guarded, file, until):
    server, _, _ = guarded
    third = add_key(file, "third", READ)
    client = server.with_key(third)
    until(lambda: client.ask("GET", "/v1/users/7")[0] == 200)
    kept = [key for key in json.loads(file.read_text())["keys"] if key["name"] != "third"]
    aside = file.with_name("aside")
    aside.write_text(json.dumps({"keys": kept}))
    aside.replace(file)
    until(lambda: client.ask("GET", "/v1/users/7")[0] == 401)
