"""A small world, and one bundle trained on it, for all tests of the product's face; a language model's server."""

import json
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from tiglon.data.sources import save_tables
from tiglon.data.synthetic import synthetic
from tiglon.recipes import train

TINY = {
    "ids.codes": "8",
    "text.dim": "16",
    "model.width": "16",
    "model.heads": "1",
    "model.head_width": "16",
    "model.hidden": "32",
    "model.encoder_layers": "1",
    "model.decoder_layers": "1",
    "train.epochs": "2",
    "train.evaluations": "1",
    "beams": "10",
    "sasrec.width": "8",
    "sasrec.heads": "1",
    "sasrec.hidden": "16",
    "sasrec.layers": "1",
    "sasrec.train.epochs": "1",
    "sasrec.train.evaluations": "1",
    "two_tower.width": "8",
    "two_tower.hidden": "16",
    "two_tower.uniform": "8",
    "two_tower.train.epochs": "1",
    "two_tower.train.evaluations": "1",
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny():
    """Settings of a training that takes a second."""
    return dict(TINY)


@pytest.fixture(scope="session")
def world_tables(tmp_path_factory):
    """A folder with interactions.parquet and items.parquet: 60 users, 40 items, no repeats."""
    folder = tmp_path_factory.mktemp("world") / "tables"
    source = synthetic(60, 40, 10, seed=3, clusters=5, repeat=0.0, zipf=0.3).source()
    once = source.interactions.unique(["user_id", "item_id"], keep="first", maintain_order=True)
    save_tables(replace(source, interactions=once), folder)
    return folder


@pytest.fixture(scope="session")
def bundle_path(world_tables, tmp_path_factory):
    """A bundle on the disk. Not to be changed: copy it."""
    out = tmp_path_factory.mktemp("bundles") / "world"
    train(world_tables / "interactions.parquet", world_tables / "items.parquet", out, changes=TINY)
    return out


class LanguageModelServer:
    """A server that speaks the protocol on a free port, and says whatever a test wants it to.

    `say(body)` returns the text of an answer, a dict as the whole answer, bytes as the whole body, or a number
    as a status; what it was asked is in `asked`, with headers."""

    def __init__(self):
        self.asked, self.headers = [], []
        self.say = lambda body: "hello"
        self.slowly = 0.0  # seconds between two bytes of an answer
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                outer.headers.append((self.path, dict(self.headers)))
                said = outer.say(body)
                status, extra = 200, {}
                if isinstance(said, int):
                    status, said = said, b'{"error": {"message": "out of order"}}'
                    extra = {"Location": "/elsewhere"} if 300 <= status < 400 else {}
                if isinstance(said, str):
                    said = answer(said)
                payload = said if isinstance(said, bytes) else json.dumps(said).encode()
                try:
                    self.send_response(status)
                    for name, value in extra.items():
                        self.send_header(name, value)
                    self.end_headers()
                    step = 1 if outer.slowly else len(payload)
                    for begin in range(0, len(payload), step or 1):
                        self.wfile.write(payload[begin : begin + step])
                        self.wfile.flush()
                        time.sleep(outer.slowly)
                except OSError:
                    pass  # the client hung up

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def answer(text):
    message = {"role": "assistant", "content": text}
    return {
        "choices": [{"index": 0, "message": message}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3},
    }


@pytest.fixture
def endpoint():
    running = LanguageModelServer()
    yield running
    running.close()
