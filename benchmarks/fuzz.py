"""Thousands of requests that an OpenAPI description allows, and that it forbids, against a real server.

    python benchmarks/fuzz.py BUNDLE [--cases 10000] [--seed 0]

schemathesis (the extra `dev`) makes them from /openapi.json. None may get a 5xx, and every answer must have a
status, a content type and a body that the description names. 503 for want of room counts as a fault here:
requests come one by one. The status is 1 where anything was found; the fewest bytes that show it are printed.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from load import started
from machine import machine_line

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--cases", type=int, default=10_000, help="of all addresses together, about")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(machine_line())
    with tempfile.TemporaryDirectory() as folder:
        port, server = started(options.bundle, Path(folder), workers=1, threads=1)
        url = f"http://127.0.0.1:{port}"
        try:
            with urllib.request.urlopen(f"{url}/openapi.json") as answer:
                described = json.load(answer)
            operations = [about for methods in described["paths"].values() for about in methods.values()]
            asking = sum("parameters" in about or "requestBody" in about for about in operations)
            each = -(-options.cases // asking)  # of an address that takes nothing there is but one case
            found = subprocess.run(
                [
                    *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"),
                    *(
                        "--checks",
                        CHECKS,
                        "--max-examples",
                        str(each),
                        "--phases",
                        "examples,coverage,fuzzing",
                    ),
                    *("--seed", str(options.seed), "--continue-on-failure"),
                ],
                cwd=folder,
                check=False,
            )
            with urllib.request.urlopen(f"{url}/health/ready") as answer:
                print("the server is still well:", json.load(answer))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
        log = (Path(folder) / "log").read_text().splitlines()
    answers = [line["status"] for line in map(json.loads, log) if line["message"] == "request"]
    print(
        f"{len(answers):,} requests: " + ", ".join(f"{s}: {answers.count(s):,}" for s in sorted(set(answers)))
    )
    sys.exit(found.returncode or any(status >= 500 for status in answers))


if __name__ == "__main__":
    main()
