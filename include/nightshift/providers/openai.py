"""OpenAI's Files + Batches API, and servers that speak it.

Statuses, limits and odd behaviours: the OpenAI Batch API as read on 2026-11-21 (openai 3.54.0). The SDK has no
idempotency for `batches.create` and by default repeats it up to three times, so here that one call goes out once.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from nightshift.errors import (
    AccessDenied,
    BatchUnknown,
    CallRefused,
    DownloadIncomplete,
    ModelNotFound,
    ProviderUnavailable,
    QuotaExhausted,
    ResultsGone,
    SettingInvalid,
    Transient,
)
from nightshift.providers.doubt import CLOCK_SKEW, look_after_doubt
from nightshift.providers.forms import form_of
from nightshift.providers.looks import looks_at
from nightshift.providers.protocol import WINDOW, BatchState, Garbage, Limits, Order, Reply, Snapshot
from nightshift.providers.results import read_file
from nightshift.shapes import Endpoint, Outcome, Receipt
from nightshift.stores.ledger import CREATE_TIMEOUT

if TYPE_CHECKING:
    import httpx2
    from openai import OpenAI
    from openai.types import Batch

STATES: dict[str, BatchState] = {
    "validating": "running",
    "in_progress": "running",
    "finalizing": "running",
    "cancelling": "running",  # up to ten minutes; what finishes meanwhile is billed and comes with the results
    "completed": "ended",
    "expired": "ended",
    "cancelled": "ended",
    "failed": "failed",
}  # an unknown status is a running one (F45)
ABSENT: dict[str, Outcome] = {"expired": "expired", "cancelled": "cancelled"}  # what has no line was never executed; else it went missing

Said = TypeVar("Said")
OPENAI = "https://api.openai.com/v1"
LIMITS = Limits(requests=50_000, request_bytes=200_000_000)
QUEUE_FULL = "token_limit_exceeded"
TOKEN = "nightshift_token"  # noqa: S105 — not a secret: the metadata key that carries an attempt's token
NOT_VISIBLE_PATIENCE_SECONDS = 20.0  # a file just uploaded may be unknown to `create` for a while (F30)
DOWNLOAD_ATTEMPTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAIAccess:
    """Where the API is and how to get in. From `OPENAI_*`, or from an Airflow connection."""

    base_url: str | None = None  # None: OPENAI_BASE_URL, else OpenAI's own
    api_key: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    http_client: httpx2.Client | None = None  # None: the SDK's own; another one for a proxy, or to see what goes over the wire

    @property
    def address(self) -> str:
        """The base URL, for the SDK. Raises SettingInvalid where it is none: every call would fail as if the server were away."""
        given = self.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI  # the SDK takes an empty variable for an address
        if not re.match(r"https?://[^/\s]+", given):
            expected = "expected http://… or https://…; it is OPENAI_BASE_URL, in Airflow the connection's host"
            raise SettingInvalid([f"{given!r} is no address of an API: {expected}"])
        return given


class OpenAIBatches:
    """The provider `openai`."""

    def __init__(self, endpoint: Endpoint, access: OpenAIAccess | None = None, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self.endpoint, self._access, self._sleep = endpoint, access or OpenAIAccess(), sleep
        self._form = form_of(endpoint)
        self._sdk: OpenAI | None = None

    @property
    def where(self) -> str:
        """The endpoint's base URL."""
        return str(self._client.base_url).rstrip("/")

    @property
    def _client(self) -> OpenAI:
        """The SDK, loaded on first use: it costs 0.9 s that a plan without submissions never needs."""
        if self._sdk is None:
            import openai

            try:
                self._sdk = openai.OpenAI(
                    api_key=self._access.api_key,
                    base_url=self._access.address,
                    default_headers=dict(self._access.headers),
                    http_client=self._access.http_client,
                )
            except openai.OpenAIError as error:
                raise AccessDenied("OpenAI", f"{error} Set OPENAI_API_KEY; inside Airflow, the connection's password.") from error
        return self._sdk

    def limits(self, model: str) -> Limits:
        """See Provider."""
        return LIMITS

    def check(self, model: str) -> None:
        """See Provider. A server without `/models/{id}` passes: only a clear no is a no."""
        import openai

        try:
            with self._errors():
                self._client.models.retrieve(model)
        except openai.NotFoundError as error:
            if error.code == "model_not_found":
                raise ModelNotFound(model, self.where) from error

    def upload(self, token: str, path: Path) -> str:
        """See Provider. The file needs a name ending in .jsonl: bare bytes would be sent as `upload` and refused (F28)."""
        import openai

        try:
            with path.open("rb") as file, self._errors():
                stored = self._client.files.create(file=(f"nightshift-{token}.jsonl", file, "application/jsonl"), purpose="batch")
                return self._said(stored, "id", str)
        except openai.NotFoundError as error:
            why = f"it has no files API ({_message(error)}); does the address of the API end in /v1?"
            raise CallRefused(self.where, why) from error

    def create(self, order: Order, may_send: Callable[[], bool]) -> Receipt:
        """See Provider."""
        waited = 0.0
        while True:
            if not may_send():
                raise ProviderUnavailable(self.where, "the claim on this shard lapsed before the call went out; nothing was sent.")
            try:
                return self._create_once(order)
            except _FileNotVisible as error:
                if waited >= NOT_VISIBLE_PATIENCE_SECONDS:
                    raise ProviderUnavailable(self.where, f"it does not find the file just uploaded: {error}") from error
                self._sleep(2.0)
                waited += 2.0

    def _create_once(self, order: Order) -> Receipt:
        """One POST. A clear refusal is raised as what it is; everything else is looked up before it is called a doubt."""
        import openai

        once = self._client.with_options(max_retries=0, timeout=CREATE_TIMEOUT.total_seconds())
        started = datetime.now(UTC)
        try:
            batch = once.batches.create(
                input_file_id=order.uploaded,
                endpoint=cast("Any", self.endpoint),
                completion_window="24h",
                metadata={TOKEN: order.token, **order.labels},
            )
        except openai.NotFoundError as error:
            raise CallRefused(self.where, f"it has no batch API ({_message(error)})") from error
        except openai.APIStatusError as error:
            if error.status_code >= 500 or error.status_code == 408:
                return look_after_doubt(self, order.token, started, error, self._sleep)
            if error.status_code == 400 and "Cannot find file" in str(error):
                raise _FileNotVisible(str(error)) from error
            with self._errors():
                raise
        except openai.APIConnectionError as error:
            if _never_connected(error):
                raise ProviderUnavailable(self.where, f"cannot connect ({error.__cause__})") from error
            return look_after_doubt(self, order.token, started, error, self._sleep)
        except (openai.OpenAIError, ValueError) as error:  # an answer came, but not the API's: HTML, half a JSON
            return look_after_doubt(self, order.token, started, error, self._sleep)
        if not isinstance(getattr(batch, "id", None), str) or not isinstance(getattr(batch, "created_at", None), int):
            return look_after_doubt(self, order.token, started, ValueError("the answer holds no batch"), self._sleep)
        return _receipt(batch, order.token)

    def find(self, tokens: Sequence[str], since: datetime) -> Receipt | None:
        """See Provider. The list is newest first and knows no filter, so it is read back to before the claim."""
        horizon = (since - CLOCK_SKEW).timestamp()
        found: dict[str, Batch] = {}
        for batch in self._newest_batches():
            token = (batch.metadata or {}).get(TOKEN)
            if token and token in tokens:
                found[token] = batch  # a later page is older: the oldest of a token wins
            if batch.created_at < horizon:
                break
        for token in tokens:
            if token in found:
                return _receipt(found[token], token)
        return None

    def is_busy(self) -> bool:
        """See Provider. Batches older than their window are over, whatever became of them."""
        horizon = (datetime.now(UTC) - WINDOW - CLOCK_SKEW).timestamp()
        recent = takewhile(lambda batch: batch.created_at >= horizon, self._newest_batches())
        return any(STATES.get(str(batch.status), "running") == "running" for batch in recent)

    def _newest_batches(self) -> Iterator[Batch]:
        """Every batch of the account, newest first. What is not clearly a list is an outage, never an empty list."""
        import openai

        after: Any = openai.omit
        while True:
            try:
                with self._errors():
                    page = self._client.batches.list(limit=100, after=after)
                    batches, more = page.data, page.has_more
            except (openai.NotFoundError, AttributeError, TypeError, ValueError) as error:
                raise ProviderUnavailable(self.where, f"its list of batches cannot be read ({type(error).__name__}).") from error
            if not isinstance(batches, list) or not isinstance(more, bool) or any(not getattr(each, "id", None) for each in batches):
                raise ProviderUnavailable(self.where, "its list of batches is not a list of batches.")
            yield from batches
            if not more or not batches:
                return
            after = batches[-1].id

    def poll(self, batch_id: str, *, waiting: bool = False) -> Snapshot:
        """See Provider."""
        import openai

        looks = looks_at(self.where, self._client.api_key)
        try:
            batch = looks.look(batch_id, lambda: ((each.id, each) for each in self._newest_batches())) if waiting else None
            if batch is None:
                with self._errors():
                    batch = self._client.batches.retrieve(batch_id)
        except openai.NotFoundError as error:
            looks.forget(batch_id)
            raise BatchUnknown(self.where, batch_id) from error
        status = getattr(batch, "status", None)
        if not isinstance(status, str):
            raise ProviderUnavailable(self.where, f"its answer about batch {batch_id} holds no status")
        state = STATES.get(status, "running")
        if state != "running":
            looks.forget(batch_id)
        counts = batch.request_counts
        errors = (batch.errors.data if batch.errors else None) or []
        reasons = [": ".join(str(part) for part in (error.code, error.message) if part) for error in errors]
        return Snapshot(
            state=state,
            status=status,
            done=sum(getattr(counts, name, None) or 0 for name in ("completed", "failed")),
            total=getattr(counts, "total", None) or 0,
            ended_at=_moment(batch.completed_at or batch.expired_at or batch.cancelled_at or batch.failed_at),
            result_files=tuple(file for file in (batch.output_file_id, batch.error_file_id) if file),  # "" was seen (F54)
            reasons=tuple(reasons),
            bad_lines={error.line: reason for error, reason in zip(errors, reasons, strict=True) if error.line},
            absent=ABSENT.get(status, "missing"),
            queue_full=status == "failed" and any(error.code == QUEUE_FULL for error in errors),
            is_stopping=status == "cancelling",
            awaits_files=state == "ended" and _lacks_files(batch),
        )

    def replies(self, snapshot: Snapshot, scratch: Path) -> Iterator[Reply | Garbage]:
        """See Provider. Both files are read, always: errors stand in the second one only (F55)."""
        for file_id in snapshot.result_files:
            path = scratch / f"{file_id}.jsonl"
            self._download(file_id, path)
            with path.open("rb") as file:
                yield from read_file(self._form, file)
            path.unlink()

    def _download(self, file_id: str, path: Path) -> None:
        """Stream a result file to disk, whole or not at all: the SDK calls a truncated body a success (F64)."""
        for attempt in range(1, DOWNLOAD_ATTEMPTS + 1):
            try:
                self._download_once(file_id, path)
                return
            except Transient:
                if attempt == DOWNLOAD_ATTEMPTS:
                    raise
                self._sleep(min(2.0**attempt, 30.0) * random.uniform(0.5, 1.0))

    def _download_once(self, file_id: str, path: Path) -> None:
        import openai

        try:
            with self._errors():
                described = self._client.files.retrieve(file_id)
                self._said(described, "id", str)
                with self._client.files.with_streaming_response.content(file_id) as response, path.open("wb") as file:
                    for chunk in response.iter_bytes(1 << 20):
                        file.write(chunk)
        except openai.NotFoundError as error:  # results can lag behind the status (F60); after 30 days they are gone (F61)
            raise ResultsGone(self.where, file_id) from error
        received = path.stat().st_size
        expected = described.bytes
        if expected is not None and received != expected:
            raise DownloadIncomplete(file_id, received, expected)

    def cancel(self, batch_id: str) -> None:
        """See Provider. One that comes too late (409) or is lost is no error: who waits looks again, and asks again (F48, F49)."""
        import openai

        try:
            with self._errors():
                self._client.batches.cancel(batch_id)
        except (openai.NotFoundError, CallRefused, ProviderUnavailable):
            self.poll(batch_id)

    def clean(self, token: str, batch_id: str | None) -> None:
        """See Provider. Batch files expire at OpenAI after 30 days; nothing of them is in our store."""

    def _said(self, answer: Any, name: str, kind: type[Said]) -> Said:
        """A field of an answer. The SDK hands on what is none of the API's, such as a proxy's page."""
        found = getattr(answer, name, None)
        if not isinstance(found, kind):
            raise ProviderUnavailable(self.where, f"its answer holds no {name}: {str(answer)[:100]!r}")
        return found

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """The SDK's errors as ours."""
        import httpx2
        import openai

        try:
            yield
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise AccessDenied(self.where, f"{_message(error)} Check OPENAI_API_KEY (in Airflow, the connection's password).") from error
        except openai.RateLimitError as error:
            if error.code == "insufficient_quota":
                raise QuotaExhausted(_message(error)) from error
            raise ProviderUnavailable(self.where, f"rate limited: {_message(error)}") from error
        except openai.NotFoundError:
            raise  # what a 404 means depends on what was asked for
        except openai.APIStatusError as error:
            if error.status_code >= 500 or error.status_code in (408, 409, 425):
                raise ProviderUnavailable(self.where, f"HTTP {error.status_code}: {_message(error)}") from error
            raise CallRefused(self.where, _message(error)) from error
        except openai.APIConnectionError as error:
            raise ProviderUnavailable(self.where, f"cannot connect ({error.__cause__ or error}).") from error
        except (openai.OpenAIError, httpx2.HTTPError, json.JSONDecodeError) as error:
            raise ProviderUnavailable(self.where, f"{type(error).__name__}: {error}") from error


class _FileNotVisible(Exception):
    """The provider does not know the file yet that it has just stored."""


def _moment(seconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(seconds, UTC) if seconds else None


def _lacks_files(batch: Batch) -> bool:
    """Whether a batch that has ended does not name a file yet that it must have. Counters decide on a longer wait, and on nothing else."""
    completed, failed = (getattr(batch.request_counts, name, None) or 0 for name in ("completed", "failed"))
    anything = failed or batch.request_counts is None or batch.status == "completed"
    return not batch.output_file_id and bool(completed or (anything and not batch.error_file_id))


def _receipt(batch: Batch, token: str) -> Receipt:
    return Receipt(batch_id=batch.id, token=token, created_at=datetime.fromtimestamp(batch.created_at, UTC))


def _never_connected(error: BaseException) -> bool:
    """Whether the request certainly never left: the connection itself was refused or timed out."""
    import httpx2

    return isinstance(error.__cause__, httpx2.ConnectError | httpx2.ConnectTimeout)


def _message(error: Any) -> str:
    body = error.body
    text = body.get("message") if isinstance(body, dict) else None
    text = str(text or error).strip().splitlines()[0][:300]
    return text if text.endswith(".") else f"{text}."
