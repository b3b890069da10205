"""Real servers on free ports of this machine: `tiglon serve` in a process, or an app in a thread."""

import ctypes
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import uvicorn

PATIENCE = 90  # seconds; a busy machine starts slowly


class Client:
    """Asks a server: status, headers and body of each answer."""

    def __init__(self, port, key=None):
        self.port = port
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def with_key(self, key):
        return Client(self.port, key)

    def ask(self, method, path, body=None, headers=None):
        """`body`: an object, sent as JSON, or bytes, sent as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        sent = self.headers | ({"Content-Type": "application/json"} if body is not None else {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        try:
            connection.request(method, path, body, sent | (headers or {}))
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return response.status, response.headers, json.loads(content) if is_json else content.decode()

    def get(self, path):
        """The body of an answer that succeeds."""
        return self._good(*self.ask("GET", path))

    def post(self, path, body):
        return self._good(*self.ask("POST", path, body))

    @staticmethod
    def _good(status, _, content):
        assert status == 200, content
        return content


class Server(Client):
    def __init__(self, process, log, port):
        super().__init__(port)
        self.process, self.log = process, log

    def raw(self, sent):
        """The bytes that come back for bytes, until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as connection:
            connection.sendall(sent)
            return b"".join(iter(lambda: connection.recv(1 << 16), b""))

    def lines(self):
        """What it logged so far: whole lines, as a reader may meet the first page of one that is being written."""
        whole, _, _ = self.log.read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def terminate(self):
        """Ask it to end; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


def until(condition, seconds=PATIENCE):
    """Wait for what must come true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)
    return found


@contextmanager
def served(source, folder, *options):
    """A server for as long as the block lasts."""
    log = folder / "server.log"
    command = [sys.executable, "-m", "tiglon.cli", "serve", str(source), "--port", "0", *options]
    with log.open("w") as out:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stderr=out, stdout=out, env=environment, preexec_fn=_end_with_us)
    try:

        def port():
            assert process.poll() is None, log.read_text()
            return re.search(r"running on http://[\d.]+:(\d+)", log.read_text())

        server = Server(process, log, int(until(port)[1]))
        until(lambda: process.poll() is None and _ready(server))
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _end_with_us():
    """In the child: the kernel ends it with the tests, however those are killed. Linux alone has this."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _ready(server):
    try:
        return server.ask("GET", "/health/live")[0] in (200, 421)
    except OSError:
        return False


@contextmanager
def working(app):
    """A client of an app that runs in a thread: a server whose engine a test can hold up."""
    config = uvicorn.Config(app, port=0, http="h11", ws="none", lifespan="on", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        yield Client(server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session", name="served")
def _served():
    return served


@pytest.fixture(scope="session", name="until")
def _until():
    return until


@pytest.fixture(scope="session", name="working")
def _working():
    return working


@pytest.fixture(scope="session")
def server(bundle_path, tmp_path_factory):
    """One server for all tests that change nothing of it, or only what is theirs: pick users of your own."""
    folder = tmp_path_factory.mktemp("server")
    with served(bundle_path, folder, "--state", str(folder / "state")) as running:
        yield running
