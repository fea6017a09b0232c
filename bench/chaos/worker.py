"""A process that works on a run and dies where it is told to: SIGKILL, before or after one effect.

Reads one order per line from its standard input. Each is carried out in a forked child, so that a death is real and the
next order does not wait for imports.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3  # noqa: F401 — everything is loaded before the first fork
import httpx2
import openai

import nightshift.steps.audit  # noqa: F401
from local.stack import BEDROCK_ROLE_ARN
from nightshift.drive import begin, drive
from nightshift.job import RequestSpec
from nightshift.job_file import load_job
from nightshift.providers.bedrock import BedrockAccess, BedrockJobs, BedrockRuntime
from nightshift.providers.live import LiveServer, OpenAIApi
from nightshift.providers.openai import OpenAIAccess, OpenAIBatches
from nightshift.providers.protocol import Provider
from nightshift.runs import Site, utc_now
from nightshift.stores.objects import Done, Objects, open_input, open_objects

NAMED_ANEW = re.compile(r"^(live/[^/]+|bedrock/[^/]+/out)/.+")  # what has another name in every life


@dataclass(frozen=True, kw_only=True)
class Order:
    """One life of a worker."""

    store: str  # URI
    provider: str  # base URL of the server
    key: str
    files: str  # URI of the folder on S3 that Bedrock's requests and results go through
    job: str  # path of the job file
    input: str  # URI
    owner: str
    log: str  # path: one line per effect
    die_at: str | None = None  # "before <effect>" or "after <effect>"
    ahead_seconds: float = 0.0  # how far its clock is ahead of the machine's: claims of the dead have lapsed by then


class Effects:
    """Counts every effect on the world by name, writes it down, and dies at the one that it was told."""

    def __init__(self, log: Path, die_at: str | None) -> None:
        self._log, self._die_at, self._seen = log.open("a"), die_at, {}

    def around(self, name: str, act: Callable[[], Done]) -> Done:
        """Do something to the world, unless death comes before it or right after it."""
        named = self._name(name)
        self._at(f"before {named}")
        done = act()
        self._at(f"after {named}")
        return done

    def before(self, name: str) -> str:
        """An effect begins; its full name."""
        named = self._name(name)
        self._at(f"before {named}")
        return named

    def after(self, named: str) -> None:
        """An effect has happened."""
        self._at(f"after {named}")

    def _name(self, name: str) -> str:
        self._seen[name] = self._seen.get(name, 0) + 1
        return f"{name} #{self._seen[name]}"

    def _at(self, point: str) -> None:
        print(point, file=self._log, flush=True)
        if point == self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)


class MortalObjects(Objects):
    """A store whose every change is an effect."""

    def __init__(self, objects: Objects, effects: Effects) -> None:
        super().__init__(objects.uri, objects._store)
        self._effects = effects

    def _change(self, verb: str, key: str, act: Callable[[], Done]) -> Done:
        name = key if verb == "create" else _same(key)
        return self._effects.around(f"{verb} {name}", lambda: super(MortalObjects, self)._change(verb, key, act))


def mortal_client(effects: Effects) -> httpx2.Client:
    """An HTTP client whose every call is an effect: it has happened once the answer begins to come in."""

    def before(request: httpx2.Request) -> None:
        request.extensions["effect"] = effects.before(f"{request.method} {_pattern(str(request.url))}")

    def after(response: httpx2.Response) -> None:
        effects.after(response.request.extensions["effect"])

    return openai.DefaultHttpxClient(event_hooks={"request": [before], "response": [after]})


def _same(key: str) -> str:
    """A key, with a star for what is named anew in every life."""
    return NAMED_ANEW.sub(r"\1/*", key)


def _pattern(url: str) -> str:
    """A path without ids, so that it is the same in every life."""
    parts = urlsplit(url).path.split("/")
    return "/".join("*" if part.startswith(("file-", "batch_", "arn%3A")) else part for part in parts)


class MortalBedrock(BedrockAccess):
    """An access whose every call of the control plane is an effect."""

    def __init__(self, effects: Effects, **given: Any) -> None:
        super().__init__(**given)
        object.__setattr__(self, "_effects", effects)

    def client(self, service: str, **config: Any) -> Any:
        """See BedrockAccess."""
        client, effects = super().client(service, **config), vars(self)["_effects"]
        running = threading.local()

        def before(request: Any, **_: Any) -> None:
            running.effect = effects.before(f"{request.method} {_pattern(request.url)}")

        def after(**_: Any) -> None:
            effects.after(running.effect)

        client.meta.events.register("before-send", before)
        client.meta.events.register("response-received", after)
        return client


def mortal_provider(order: Order, request: RequestSpec, store: Objects, effects: Effects) -> Provider:
    """The provider that a job names, each of whose calls can be the last."""
    if request.is_on_bedrock:
        endpoints = tuple((service, order.provider) for service in ("bedrock", "bedrock-runtime", "service-quotas"))
        access = MortalBedrock(
            effects, endpoints=endpoints, role_arn=BEDROCK_ROLE_ARN, files=MortalObjects(open_objects(order.files), effects)
        )
        if request.provider == "live":
            return LiveServer(request.endpoint, store, BedrockRuntime(request.endpoint, access))
        return BedrockJobs(request.endpoint, store, access)
    access = OpenAIAccess(base_url=f"{order.provider}/v1", api_key=order.key, http_client=mortal_client(effects))
    if request.provider == "live":
        return LiveServer(request.endpoint, store, OpenAIApi(request.endpoint, access))
    return OpenAIBatches(request.endpoint, access)


def cached(open_provider: Callable[[RequestSpec], Provider]) -> Callable[[RequestSpec], Provider]:
    """One provider of each name."""
    opened: dict[str, Provider] = {}

    def open_once(request: RequestSpec) -> Provider:
        if request.provider not in opened:
            opened[request.provider] = open_provider(request)
        return opened[request.provider]

    return open_once


def live(order: Order) -> None:
    """Take the run the whole way, or die on it."""
    effects = Effects(Path(order.log), order.die_at)
    store = MortalObjects(open_objects(order.store), effects)
    site = Site(
        store=store,
        open_input=open_input,
        open_provider=cached(lambda request: mortal_provider(order, request, store, effects)),
        owner=order.owner,
        poll_seconds=0.05,
        scratch_folder=Path(order.log).parent,
        now=lambda: utc_now() + timedelta(seconds=order.ahead_seconds),
    )
    job = load_job(Path(order.job))
    drive(site, begin(site, job, pattern=order.input, dates={}, scheduled=False), ask=lambda run, planned: True)


def main() -> None:
    """Serve orders until the input ends; answer each with its process id, then with its exit status, negative for a signal."""
    for line in sys.stdin:
        order = Order(**json.loads(line))
        child = os.fork()
        if child == 0:
            status = 1
            try:
                live(order)
                status = 0
            except Exception:  # noqa: BLE001 — the parent reads the exit status, a person the log
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
