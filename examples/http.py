"""Over HTTP: a server in a process of its own, asked with Python's standard library.

python examples/http.py [FOLDER]
"""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from tiglon.data.synthetic import synthetic
from tiglon.recipes import train


def main(folder: Path, changes: dict[str, str] | None = None) -> None:
    world = synthetic(users=200, items=100, events_per_user=10).source()
    train(world.interactions, world.items, folder / "http", changes=changes)

    # In a shell: tiglon serve runs/http
    command = [sys.executable, "-m", "tiglon.cli", "serve", str(folder / "http"), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        url = address(server)
        for item in ask(url, "recommend", user_id=7, k=3)["items"]:
            print(item["item_id"], round(item["score"], 2), item["source"])

        # What a user does is known to the next request.
        last = world.interactions["timestamp"].max()
        event = {"user_id": 7, "item_id": 44, "timestamp": last, "event_id": "click-1"}
        print(ask(url, "events", events=[event]))
        print("now:", [item["item_id"] for item in ask(url, "recommend", user_id=7, k=3)["items"]])

        # A new item, and one that is gone.
        print(ask(url, "items", add=[{"item_id": 1000, "title": "new"}], remove=[44]))
    finally:
        server.terminate()  # it answers what runs, and ends
        server.communicate()


def ask(url: str, what: str, **message: Any) -> Any:
    """The answer to a message. urllib raises HTTPError for a refusal, whose body says why."""
    headers = {"Content-Type": "application/json"}  # and Authorization: Bearer KEY, where there are keys
    request = urllib.request.Request(f"{url}/v1/{what}", json.dumps(message).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def address(server: subprocess.Popen[str]) -> str:
    """Where it listens: its log, a JSON object a line, says so when it is ready."""
    for line in server.stderr or ():
        if "running on " in (message := json.loads(line)["message"]):
            return message.split("running on ")[1].split()[0]
    sys.exit("the server did not start")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
