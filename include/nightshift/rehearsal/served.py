"""A rehearsal server inside this process, on a port of its own: for tests, and for whoever wants to see what happens if."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import IO, Any

import httpx2
import uvicorn
from pydantic import ValidationError

from nightshift.errors import SettingInvalid, nearest
from nightshift.rehearsal.bedrock_server import ACCESS_KEY
from nightshift.rehearsal.engine import Pace
from nightshift.rehearsal.faults import Faults
from nightshift.rehearsal.server import build_app
from nightshift.rehearsal.state import KEY

FAST = Pace(validating=0.0, running=0.05, finalizing=0.0, cancelling=0.05)
START_SECONDS = 30.0


@dataclass
class Served:
    """A running server."""

    url: str
    key: str
    state: Path
    server: uvicorn.Server
    thread: threading.Thread

    def faults(self, **wanted: Any) -> None:
        """Replace the faults; those not named are off."""
        _client().put(f"{self.url}/rehearsal/faults", json=Faults(**wanted).model_dump()).raise_for_status()

    def pace(self, **wanted: float) -> None:
        """Replace the pace."""
        _client().put(f"{self.url}/rehearsal/pace", json=wanted).raise_for_status()

    def bill(self) -> dict[str, Any]:
        """What a provider would have charged, and how often each request was paid."""
        found: dict[str, Any] = _client().get(f"{self.url}/rehearsal/bill", params={"by_request": True}).json()
        return found

    def stop(self) -> None:
        """Stop it; its state stays in its folder."""
        self.server.should_exit = True
        self.thread.join(timeout=20)


def serve(state: Path, *, pace: Pace = FAST, faults: Faults | None = None, port: int = 0) -> Served:
    """Start a server on a state folder. Raises TimeoutError if it does not come up."""
    config = uvicorn.Config(build_app(state, pace=pace, faults=faults), host="127.0.0.1", port=port or free_port(), log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + START_SECONDS
    while not server.started:
        if time.monotonic() > deadline or not thread.is_alive():
            raise TimeoutError(f"the rehearsal server did not start on port {config.port}")
        time.sleep(0.01)
    return Served(url=f"http://127.0.0.1:{config.port}", key=KEY, state=state, server=server, thread=thread)


def serve_until_stopped(
    state: Path, address: tuple[str, int], *, key: str, paces: Mapping[str, str], faults: Mapping[str, str], told: Callable[[str], None]
) -> None:
    """Serve until Ctrl-C; `told` where. Raises SettingInvalid for a pace, a fault, a folder or an address that cannot be had."""
    pace, wanted = _pace(paces), _faults(faults)
    lock = _locked(state)  # held until the process ends
    app = build_app(state, key=key, pace=pace, faults=wanted)
    try:
        listening = socket.create_server(address)
    except OSError as error:
        raise SettingInvalid([f"--host {address[0]} --port {address[1]}: {error.strerror}"]) from error
    url = f"http://{address[0]}:{listening.getsockname()[1]}"
    told(f"Rehearsing OpenAI at {url}/v1 with key {key}, Bedrock at {url} with access key {ACCESS_KEY}; bill at {url}/rehearsal/bill")
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)).run([listening])
    lock.close()


def _locked(state: Path) -> IO[str]:
    """A lock on a folder's state, which two servers would write at once."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        lock = (state / "lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise SettingInvalid([f"--state {state}: another rehearsal server has it; give each a folder of its own"]) from error
    except OSError as error:
        raise SettingInvalid([f"--state {state}: {error.strerror}"]) from error
    return lock


def _faults(given: Mapping[str, str]) -> Faults:
    try:
        return Faults.model_validate(given)
    except ValidationError as error:
        wrong = [f"--fault {each['loc'][0]}={each['input']}: {each['msg']}" for each in error.errors()]
        raise SettingInvalid([*wrong, f"Faults: {', '.join(Faults.model_fields)}"]) from error


def _pace(given: Mapping[str, str]) -> Pace:
    known = [each.name for each in fields(Pace)]
    if unknown := [f"--pace {name}: there is none{nearest(name, known)}" for name in given if name not in known]:
        raise SettingInvalid([*unknown, f"Pace: {', '.join(known)}"])
    try:
        return Pace(**{name: float(value) for name, value in given.items()})
    except ValueError as error:
        raise SettingInvalid([f"--pace: {error}", f"Pace: {', '.join(known)}"]) from error


@cache
def _client() -> httpx2.Client:
    """One for all servers: each would read all certificates of the machine, for servers that speak plain HTTP."""
    return httpx2.Client(limits=httpx2.Limits(max_keepalive_connections=0))


def free_port() -> int:
    """A port that nobody listens on."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
