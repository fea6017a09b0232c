"""Models asked one request at a time: vLLM, Ollama, gateways, OpenAI and Bedrock on demand.

A shard is worked off by one process, many requests at once. Every answer is in the store before its place is given to
another request, so a process that dies repeats at most the requests that were in flight. The claim's lease is renewed
while it works; who takes over goes on from the answers that are there.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import httpx2
import orjson

from nightshift.errors import AccessDenied, ModelNotFound, ProviderUnavailable, QuotaExhausted
from nightshift.providers.forms import form_of
from nightshift.providers.openai import OpenAIAccess
from nightshift.providers.protocol import Garbage, Limits, Order, Reply, Snapshot
from nightshift.providers.window import Window
from nightshift.shapes import Endpoint, Receipt
from nightshift.stores.objects import Objects
from nightshift.stores.shards import key_of_line, live_folder, same_of_line

if TYPE_CHECKING:
    from openai import OpenAI

LIMITS = Limits(requests=10_000, request_bytes=64_000_000)  # what one process holds in memory, and one worker works off
MOST_AT_ONCE = 256
TIMEOUT_SECONDS = 600.0  # as the OpenAI SDK waits: a long answer that is given up on is billed all the same
CHECK_SECONDS = 15.0
TRIES = 4  # of one request that brings no answer, before it is an error of its own
PAUSE_SECONDS = 1.0  # that nothing more is sent after an overload; where a server says `retry-after`, that counts
PAUSE_MOST_SECONDS = 120.0
PATIENCE_SECONDS = 600.0  # without a single answer, before the server counts as down
HEARTBEAT_SECONDS = 2.0  # between two looks at the claim
LAST_SECONDS = 5.0  # that requests in flight get when everybody is stopped
BROKEN_AFTER = 20  # requests in a row without an answer of the API: the server is down, not the requests
REFUSALS = 5  # 403s before anybody was answered: nobody is let in. After that, each is about its own request: a firewall, a moderation
FEW = 16  # requests that are all that is left, when others were answered: nobody waits for ever for them
OVERLOADED = (429, 503, 529)  # the server says that it is asked too much: not the request's fault, so not one of its tries
PASSING = (0, 408, 409, 425, 500, 502, 504)  # may be better next time
NO_KEY = "-"  # what a server of one's own gets to see


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What the server said to one request."""

    status: int  # 0: nothing, or nothing of its API
    body: dict[str, Any]
    retry_after: float | None = None
    is_api: bool = True  # whether it is the API that has spoken, and not a proxy or nobody

    @property
    def is_final(self) -> bool:
        """Whether asking again cannot help."""
        return self.status not in OVERLOADED and self.status not in PASSING


class Api(Protocol):
    """How a server is reached: where its calls go, and how they are let in."""

    @property
    def where(self) -> str:
        """The server, for messages and for the ledger."""

    def check(self, model: str) -> None:
        """Raise AccessDenied, ModelNotFound or ProviderUnavailable where a run could not succeed. Free."""

    def call(self, model: str, custom_id: str, body: bytes) -> tuple[str, dict[str, str]]:
        """URL and headers of the POST that asks one request."""

    @property
    def hint(self) -> str:
        """What to look at where the server lets nobody in."""


class OpenAIApi:
    """A server that speaks OpenAI's API."""

    hint = "Check OPENAI_API_KEY (in Airflow, the connection's password)."

    def __init__(self, endpoint: Endpoint, access: OpenAIAccess | None = None) -> None:
        self._endpoint, self._access = endpoint, access or OpenAIAccess()

    @cached_property
    def _sdk(self) -> OpenAI:
        """The SDK's client, for what it finds in its environment: the same endpoint, key, organization and project as for batches."""
        import openai

        key = self._access.api_key or os.environ.get("OPENAI_API_KEY") or NO_KEY
        return openai.OpenAI(api_key=key, base_url=self._access.address, default_headers=dict(self._access.headers))

    @property
    def where(self) -> str:
        """The server's base URL."""
        return str(self._sdk.base_url).rstrip("/")

    @cached_property
    def _headers(self) -> dict[str, str]:
        headers = {**self._sdk.default_headers, **self._sdk.auth_headers}
        return {name: value for name, value in headers.items() if isinstance(value, str)}

    def call(self, model: str, custom_id: str, body: bytes) -> tuple[str, dict[str, str]]:
        """See Api."""
        return self.where + self._endpoint.removeprefix("/v1"), {**self._headers, "X-Client-Request-Id": custom_id}

    def check(self, model: str) -> None:
        """See Api. A server that does not list its models passes; one that lists others does not (F102)."""
        try:
            answer = httpx2.get(f"{self.where}/models", headers=self._headers, timeout=CHECK_SECONDS)
        except httpx2.HTTPError as error:
            raise ProviderUnavailable(self.where, f"cannot connect ({error}).") from error
        said = _said(answer)
        if said.status in (401, 403):
            raise AccessDenied(self.where, f"{_reason(said)} {self.hint}")
        names = [each.get("id") for each in said.body.get("data") or [] if isinstance(each, dict)]
        if said.status == 200 and names and not {model, f"{model}:latest"} & set(names):  # Ollama lists what is untagged as latest
            raise ModelNotFound(model, f"{self.where}, which serves {', '.join(map(str, names[:5]))}")


class LiveServer:
    """The provider `live`."""

    def __init__(self, endpoint: Endpoint, objects: Objects, api: Api, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self.objects, self.api, self.form = objects, api, form_of(endpoint)
        self.timeout = httpx2.Timeout(timeout_seconds, connect=10.0)

    @property
    def where(self) -> str:
        """See Provider."""
        return self.api.where

    def limits(self, model: str) -> Limits:
        """See Provider."""
        return LIMITS

    def check(self, model: str) -> None:
        """See Provider."""
        self.api.check(model)

    def upload(self, token: str, path: Path) -> str:
        """See Provider. There is nothing to upload: the lines are read from disk."""
        return str(path)

    def create(self, order: Order, may_send: Callable[[], bool]) -> Receipt:
        """See Provider. Asks every request that has no answer yet; returns when all have one.

        Raises AccessDenied, QuotaExhausted or ProviderUnavailable when the server refuses everybody; what was answered is kept.
        """
        started = datetime.now(UTC)
        answered = {key_of_line(line) for line in self._lines(order.work)}
        with Path(order.uploaded).open("rb") as file:
            lines = [line for line in file if key_of_line(line) not in answered]
        lines.sort(key=same_of_line)  # neighbours share a prefix, and so the server's cache of it
        asyncio.run(_Work(self, order.model, order.work, lines, may_send, has_answered=bool(answered)).run())
        return Receipt(batch_id=order.work, token=order.token, created_at=started)

    def find(self, tokens: Sequence[str], since: datetime) -> Receipt | None:
        """See Provider. Nothing is left at a server; what an attempt left in the store is gone on with by the next one."""
        return None

    def is_busy(self) -> bool:
        """See Provider."""
        return False

    def poll(self, batch_id: str, *, waiting: bool = False) -> Snapshot:
        """See Provider. There is a receipt only for work that is done."""
        return Snapshot(state="ended", status="completed", done=0, total=0, result_files=(batch_id,), reasons=(), bad_lines={})

    def replies(self, snapshot: Snapshot, scratch: Path) -> Iterator[Reply | Garbage]:
        """See Provider."""
        for work in snapshot.result_files:
            for line in self._lines(work):
                yield from self.form.read(line)

    def cancel(self, batch_id: str) -> None:
        """See Provider. What is running ends with its process."""

    def clean(self, token: str, batch_id: str | None) -> None:
        """See Provider."""
        if batch_id is not None:
            self.objects.delete([found.key for found in self.objects.scan(live_folder(batch_id))])

    def _lines(self, work: str) -> Iterator[bytes]:
        for found in sorted(self.objects.scan(live_folder(work)), key=lambda found: found.key):
            yield from (self.objects.get(found.key) or b"").splitlines()


class _Work:
    """Requests of one shard, many at once, until each has an answer in the store."""

    def __init__(
        self, server: LiveServer, model: str, work: str, lines: list[bytes], may_send: Callable[[], bool], *, has_answered: bool
    ) -> None:
        self._server, self._api, self._model, self._work, self._may_send = server, server.api, model, work, may_send
        self._todo = [(line, 1) for line in reversed(lines)]  # with the number of the try
        self._window = Window(most=MOST_AT_ONCE)
        self._answers: asyncio.Queue[tuple[bytes, asyncio.Event]] = asyncio.Queue()
        self._left = len(lines)
        self._has_answered = has_answered  # any request of this work, here or in a process before
        self._failures = self._refusals = 0  # in a row, over all requests
        self._answered_at = time.monotonic()

    async def run(self) -> None:
        """Ask them all. Raises what stops everybody; what is answered by then is kept."""
        limits = httpx2.Limits(max_connections=MOST_AT_ONCE, max_keepalive_connections=MOST_AT_ONCE)
        async with httpx2.AsyncClient(timeout=self._server.timeout, limits=limits) as client:
            keeper = asyncio.create_task(self._keep())
            running: set[asyncio.Task[None]] = set()
            try:
                await self._ask_all(client, running, keeper)
            finally:
                self._todo = []  # whoever stops sends nothing more
                await _finish(running, keeper)

    async def _ask_all(self, client: httpx2.AsyncClient, running: set[asyncio.Task[None]], keeper: asyncio.Task[None]) -> None:
        while self._todo or running:
            self._check_claim()
            while self._todo and len(running) < self._window.slots and time.monotonic() >= self._window.held_until:
                running.add(asyncio.create_task(self._ask(client, *self._todo.pop())))
            pause = min(HEARTBEAT_SECONDS, max(0.01, self._window.held_until - time.monotonic())) if self._todo else HEARTBEAT_SECONDS
            done, _ = await asyncio.wait({*running, keeper}, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            running -= done
            for task in done:  # the keeper ends only where the store does not take what it is given
                task.result()

    def _check_claim(self) -> None:
        """Renew the claim's lease in time, and stop where somebody else has taken it over."""
        if not self._may_send():
            raise ProviderUnavailable(self._server.where, "the claim on this shard is no longer ours; whoever has it goes on from here.")

    async def _ask(self, client: httpx2.AsyncClient, line: bytes, attempt: int) -> None:
        """One try of one request: an answer that is kept, or its place in the line again."""
        custom_id, opened = self._server.form.opened(line)
        body = orjson.dumps(opened)
        url, headers = self._api.call(self._model, custom_id, body)
        started = time.monotonic()
        said = await _post(client, url, headers, body)
        self._learn(said, time.monotonic() - started)
        if said.status in OVERLOADED:
            if not self._is_given_up():
                self._todo.append((line, attempt))
                return
            why = f"The server took nothing of it for {PATIENCE_SECONDS:.0f} s, and has answered others: {_reason(said)}"
            said = Said(status=400, body={"error": {"message": why}})
        is_refused = said.status == 403 and not self._has_answered
        if (is_refused or not said.is_final) and attempt < TRIES:
            self._todo.insert(0, (line, attempt + 1))  # last of all: by then it may be better
            return
        kept = asyncio.Event()
        await self._answers.put((self._server.form.answered(custom_id, said.status, said.body), kept))
        self._left -= 1
        await kept.wait()  # only then is its place free: a process that dies repeats no more than what is in flight

    def _learn(self, said: Said, seconds: float) -> None:
        """Learn from what the server said. Raises what concerns every request: a wrong key, no credit, a server that is down."""
        self._refusals = self._refusals + 1 if said.status == 403 and not self._has_answered else 0
        if said.status == 401 or self._refusals >= min(REFUSALS, TRIES * self._left):
            raise AccessDenied(self._server.where, f"{_reason(said)} {self._api.hint}")
        if said.status == 429 and _code(said) == "insufficient_quota":
            raise QuotaExhausted(_reason(said))
        now = time.monotonic()
        if said.is_final:
            self._failures, self._answered_at = 0, now
            if said.status == 200:  # a request that is refused at once says nothing of how fast the others are
                self._has_answered = True
                self._window = self._window.answered(seconds)
            return
        self._failures = 0 if said.is_api else self._failures + 1
        self._window = self._window.refused(now, said.retry_after or PAUSE_SECONDS * random.uniform(0.75, 1.25))
        if self._failures >= BROKEN_AFTER or (now - self._answered_at > PATIENCE_SECONDS and not self._is_given_up()):
            raise ProviderUnavailable(self._server.where, f"nobody is answered any more: {_reason(said)}")

    def _is_given_up(self) -> bool:
        """Whether what is left is refused as an overload for so long, and is so little, that it is not the server that is at fault."""
        return self._has_answered and self._left <= FEW and time.monotonic() - self._answered_at > PATIENCE_SECONDS

    async def _keep(self) -> None:
        """Put answers into the store, all that have come since the last put as one object."""
        while True:
            batch = [await self._answers.get()]
            while not self._answers.empty():
                batch.append(self._answers.get_nowait())
            data = b"".join(line + b"\n" for line, _ in batch)
            key = f"{live_folder(self._work)}/{time.time_ns():020d}-{random.getrandbits(32):08x}.jsonl"
            await asyncio.to_thread(self._server.objects.put, key, data)
            for _, kept in batch:
                kept.set()


async def _finish(running: set[asyncio.Task[None]], keeper: asyncio.Task[None]) -> None:
    """Let what is in flight come to its end, for a moment: it is paid for."""
    if running and not keeper.done():
        await asyncio.wait(running, timeout=LAST_SECONDS)
    for task in (*running, keeper):
        task.cancel()
    await asyncio.gather(*running, keeper, return_exceptions=True)


async def _post(client: httpx2.AsyncClient, url: str, headers: dict[str, str], body: bytes) -> Said:
    try:
        return _said(await client.post(url, content=body, headers={**headers, "Content-Type": "application/json"}))
    except httpx2.HTTPError as error:
        return Said(status=0, body={"error": {"message": f"{type(error).__name__}: {error}", "code": "no_answer"}}, is_api=False)


def _said(answer: httpx2.Response) -> Said:
    """An answer in whatever shape (F101). What is not JSON, or not an object, is none of the API."""
    try:
        body = orjson.loads(answer.content)
    except orjson.JSONDecodeError:
        body = None
    retry_after = _seconds_in(answer.headers.get("retry-after", ""))
    if not isinstance(body, dict):
        shown = answer.text.strip().partition("\n")[0][:200]
        status = 0 if answer.status_code < 400 else answer.status_code
        error = {"message": f"not the API's answer: {shown!r}"}
        return Said(status=status, body={"error": error}, retry_after=retry_after, is_api=400 <= status < 500)
    if answer.status_code >= 400 and not isinstance(body.get("error"), dict):
        message = body.get("error") or body.get("message") or body.get("detail") or f"HTTP {answer.status_code}"
        body = {"error": {"message": str(message)[:500]}}
    return Said(status=answer.status_code, body=body, retry_after=retry_after)


def _seconds_in(retry_after: str) -> float | None:
    """How long a server asks to be left alone, in seconds or until a date; None where it does not say."""
    if retry_after.replace(".", "", 1).isdigit():
        return min(float(retry_after), PAUSE_MOST_SECONDS)
    try:
        until = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return min(max(0.0, until.timestamp() - time.time()), PAUSE_MOST_SECONDS)


def _reason(said: Said) -> str:
    text = str((said.body.get("error") or {}).get("message") or f"HTTP {said.status}").strip().partition("\n")[0][:300]
    return text if text.endswith(".") else f"{text}."


def _code(said: Said) -> str | None:
    code = (said.body.get("error") or {}).get("code")
    return code if isinstance(code, str) else None
