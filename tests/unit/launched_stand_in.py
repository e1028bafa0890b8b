"""Stands where a Python with SGLang would, and answers as far as the launcher asks: for faults made on demand.

FAKE=die or FAKE=slow in its environment makes it end, or never ready. Real servers: tests/sglang.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SCRIPT = Path(__file__)


def write_interpreter(folder: Path) -> Path:
    """An executable that takes the arguments of `python -m sglang.launch_server`."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -I {SCRIPT} "$@"\n')
    path.chmod(0o755)
    return path


class Answers(BaseHTTPRequestHandler):
    """Two paths, with the first key."""

    def do_GET(self) -> None:
        known = self.path == "/ready" or self.headers["Authorization"] == f"Bearer {self.server.keys.get('api-key')}"
        if not known and self.server.keys:
            return self.reply(401, {"error": "Unauthorized"})
        slow = os.environ.get("FAKE") == "slow"
        self.reply(503 if slow and self.path == "/ready" else 200, {"version": "0.5.23", "weight_version": "default"})

    def reply(self, status: int, answer: dict) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    flags = dict(zip(sys.argv[3::2], sys.argv[4::2], strict=False))
    keys = json.loads(Path(sys.argv[-1]).read_text()) if "--config" in sys.argv else {}
    secret = " ".join(keys.values())
    print(f"server_args: {keys}", flush=True)
    print(json.dumps({"environment": sorted(os.environ), "arguments": sys.argv[1:]}), flush=True)
    if os.environ.get("FAKE") == "die":
        sys.exit("no such model")
    # A key that reaches the log in two parts, and one that never ends.
    sys.stdout.write(secret[:20])
    sys.stdout.flush()
    time.sleep(0.05)
    sys.stdout.write(f"{secret[20:]}\nunfinished {secret[:30]}")
    sys.stdout.flush()
    child = subprocess.Popen(["sleep", "600"])  # as the scheduler: holds the output, outlives a killed server
    tempfile.mkstemp()
    with open(os.environ["PIDS"], "a") as file:
        file.write(f"{os.getpid()} {child.pid}\n")
    server = ThreadingHTTPServer(("127.0.0.1", int(flags["--port"])), Answers)
    server.keys = keys
    server.serve_forever()


if __name__ == "__main__":
    main()
