"""What every provider offers, and the shapes that cross that line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from nightshift.shapes import Outcome, Receipt, Variant

PICTURES = "\x00PICTURES\x00"  # stands in a body's content where a row's pictures come: no prompt file can hold it

WINDOW = timedelta(hours=24)

BatchState = Literal["running", "ended", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one batch may hold."""

    requests: int
    request_bytes: int  # of the whole input file
    least: int = 1  # requests: fewer than that are asked on demand


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a create call asks for."""

    uploaded: str  # as `upload` has named it
    model: str
    token: str  # of the claim: the batch is found again by it
    work: str  # the same for attempts without an answer in between: they go on with each other's work
    labels: Mapping[str, str]  # for people who look at the provider's list
    window: timedelta = WINDOW  # how long the work may take, where the provider lets one say


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One look at a batch. Counters are for progress bars only: correctness never reads them."""

    state: BatchState  # ended: there may be results, in whatever status; failed: validation refused it, nothing ran
    status: str  # the provider's own word
    done: int
    total: int
    result_files: tuple[str, ...]
    reasons: tuple[str, ...]  # why it failed as a whole
    bad_lines: Mapping[int, str]  # 1-based input line → why, where the provider names lines
    ended_at: datetime | None = None  # the provider's clock
    absent: Outcome = "missing"  # of a request without a line, once it has ended
    queue_full: bool = False  # failed only because too much is enqueued: the same batch is welcome later
    is_stopping: bool = False  # cancelled, and not at its end yet
    awaits_files: bool = False  # it has ended, and a result file that it must have is not there yet


class Reply(msgspec.Struct, frozen=True, kw_only=True, gc=False):  # made once a line: three times as fast as a dataclass
    """What the provider said to one request, classified but not yet validated."""

    custom_id: str
    outcome: Outcome
    text: str | None = None  # the raw answer
    reason: str | None = None
    retryable: bool = False  # for `errored`: whether asking again can help
    paid: bool = False
    model: str | None = None
    input_tokens: int | None = None
    cached_tokens: int = 0
    output_tokens: int | None = None
    is_shared: bool = False  # the reply to a line that several requests share
    is_bystander: bool = False  # not looked at, because another line of the same batch was at fault and has been named
    vectors: tuple[bytes, ...] = ()  # of an embedding: float32, little endian, one for each input of the line


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """Something in the results that is no reply: counted as an alarm. A request without a line counts as missing."""

    reason: str
    alarm: str = "unreadable lines"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a model is asked. `system` and `user` may be placeholders, which have to stand in the body once, as they are."""

    model: str
    system: str | None
    user: str
    parameters: Mapping[str, Any]
    schema: Mapping[str, Any] | None
    pictures: bool = False  # whether a row's pictures come with it


class Form(Protocol):
    """How one kind of model is asked and answers: bodies of requests, lines of input files and of result files."""

    @property
    def inputs_per_line(self) -> int:
        """How many requests share one line, and so one call: 1, but for embeddings that take several inputs at once."""

    def fold(self, bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The bodies of requests that share a line, as one."""

    def body(self, asked: Question) -> dict[str, Any]:
        """The request body. With pictures, PICTURES stands in its content as an element of its own."""

    def picture(self, media_type: str, base64: str) -> dict[str, Any]:
        """A picture as a part of a body's content."""

    def vary(self, body: dict[str, Any], variant: Variant, answer: str | None, reason: str | None) -> dict[str, Any]:
        """A body as it is asked again: of another model, with another limit, or with what is wrong with the last answer."""

    def line(self, custom_id: str, body: bytes) -> bytes:
        """One request as a line of the input file, without the newline. It starts with the id."""

    def opened(self, line: bytes) -> tuple[str, dict[str, Any]]:
        """The id and the body in a line of the input file."""

    def answered(self, custom_id: str, status: int, body: dict[str, Any]) -> bytes:
        """A line of a result file from an answer on demand: its HTTP status and its JSON body."""

    def read(self, lines: bytes) -> Sequence[Reply | Garbage]:
        """What the lines of a result file tell, in order. They end without a newline; empty ones tell nothing."""


class Provider(Protocol):
    """A place that takes a shard's requests now and has answers later.

    `create` is the only call that costs. It is made once per claim, with SDK retries off, and tells three endings
    apart: a Receipt; a refusal (any error but SubmissionInDoubt: nothing was created; QueueFull: the same call is
    welcome later); SubmissionInDoubt.
    """

    @property
    def where(self) -> str:
        """The endpoint, for messages and for the ledger: a batch is found again only there."""

    def limits(self, model: str) -> Limits:
        """What one batch of a model may hold."""

    def check(self, model: str) -> None:
        """Raise AccessDenied, ModelNotFound or ProviderUnavailable where a run could not succeed. Free."""

    def upload(self, token: str, path: Path) -> str:
        """Make the input file of an attempt known to the provider. Free, and harmless when repeated."""

    def create(self, order: Order, may_send: Callable[[], bool]) -> Receipt:
        """Start the paid work. `may_send` is asked before every call that goes out: no means that the claim has lapsed.

        It raises Interrupted in a process that was stopped, which is passed on: nothing more goes out.
        """

    def find(self, tokens: Sequence[str], since: datetime) -> Receipt | None:
        """The batch that carries one of these tokens, oldest first, among those created after `since` (less clock skew)."""

    def is_busy(self) -> bool:
        """Whether any batch of this account is under way, so that a full queue will drain."""

    def poll(self, batch_id: str, *, waiting: bool = False) -> Snapshot:
        """One look. For who is only `waiting` it may be as old as the last one of others who wait at the same place."""

    def replies(self, snapshot: Snapshot, scratch: Path) -> Iterator[Reply | Garbage]:
        """Every line of every result file, in no particular order."""

    def cancel(self, batch_id: str) -> None:
        """Ask the provider to stop; what already ran is still billed and still harvested."""

    def clean(self, token: str, batch_id: str | None) -> None:
        """Remove what an attempt of a shard that is settled has left in our own store."""
