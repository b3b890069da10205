"""A server that speaks the protocol on a free port, and says whatever a test wants it to."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Server:
    """`say(body)` returns the text of an answer, a dict as the whole answer, bytes as the whole body, or a number
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
def server():
    running = Server()
    yield running
    running.close()
