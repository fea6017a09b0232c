"""An S3 of this machine for tests and benchmarks: ministack, on a port of its own, gone afterwards."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nightshift.rehearsal.served import free_port

MINISTACK = Path(__file__).resolve().parent.parent / ".venv" / "local" / "bin" / "ministack"
START_SECONDS = 60


@contextmanager
def served_s3(state: Path) -> Iterator[str]:
    """Its endpoint. Raises TimeoutError where it does not come up."""
    port = free_port()
    env = {**os.environ, "BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port), "MINISTACK_HOST": "127.0.0.1", "STATE_DIR": str(state)}
    process = subprocess.Popen([str(MINISTACK)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(f"http://127.0.0.1:{port}/_ministack/health")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=20)


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError("the S3 emulator did not start") from error
            time.sleep(0.1)
