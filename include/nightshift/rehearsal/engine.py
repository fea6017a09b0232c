"""The rehearsal's batch engine: validation, progress, results. What a batch has done is a function of time, so a restart resumes it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from nightshift.rehearsal.book import Book, StoredBatch
from nightshift.rehearsal.faults import Faults, drawn

ERRORS_SHOWN = 100
TICK_SECONDS = 0.05
RUNNING = ("validating", "in_progress", "finalizing", "cancelling")


def error_body(message: str, code: str, param: str | None = None, kind: str = "invalid_request_error") -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


SERVER_ERROR = error_body("The server had an error while processing your request.", "server_error", kind="server_error")
TOO_LONG = error_body("This model's maximum context length is exceeded.", "context_length_exceeded")


@dataclass(slots=True, kw_only=True)
class Pace:
    """How fast batches go, in seconds."""

    validating: float = 0.2
    running: float = 1.0  # at least; a large batch takes longer
    finalizing: float = 0.1
    cancelling: float = 0.3
    window: float = 86_400.0
    lines_per_second: float = 20_000.0


@dataclass(slots=True, kw_only=True)
class Line:
    """One parsed request of a batch."""

    custom_id: str
    body: dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Results:
    """Lines of the two result files, and what they cost."""

    output: list[bytes] = field(default_factory=list)
    errors: list[bytes] = field(default_factory=list)
    charges: list[tuple[str, str, int, int]] = field(default_factory=list)


class Desk(Protocol):
    """What one provider's batches are made of: where their requests come from, and how their results look."""

    def read(self, batch: StoredBatch) -> tuple[list[Line], list[dict[str, Any]]]:
        """The requests of a batch, and what is wrong with them, as the provider reports it."""

    def tokens(self, line: Line) -> int:
        """What the model is billed for reading."""

    def model_of(self, batch: StoredBatch, line: Line) -> str:
        """Who is asked."""

    def answer(self, batch: StoredBatch, line: Line, hit: Callable[[str], bool]) -> tuple[int, dict[str, Any], int, int]:
        """(status, response body, input tokens, output tokens)"""

    def answered(self, line: Line, body: dict[str, Any], *, odd: bool) -> bytes:
        """A result line with an answer."""

    def failed(self, line: Line, status: int, body: dict[str, Any]) -> bytes:
        """A result line with an error in OpenAI's shape."""

    def never_run(self, line: Line, status: str) -> list[bytes]:
        """The result lines, if any, of a request that a batch did not come to."""

    def stranger(self) -> bytes:
        """A result line of a request that nobody sent."""

    def write(self, batch: StoredBatch, results: Results, now: float) -> tuple[str | None, str | None]:
        """Write the result files; the ids of the output file and the error file."""


class Engine:
    """Moves batches along in a thread of its own."""

    def __init__(
        self, book: Book, pace: Pace, faults: Callable[[], Faults], desks: Mapping[str, Desk], clock: Callable[[], float] = time.time
    ) -> None:
        self._book, self.pace, self._faults, self._desks, self._clock = book, pace, faults, desks, clock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="rehearsal-engine", daemon=True)

    def start(self) -> None:
        """Go on with whatever the book holds."""
        self._thread.start()

    def stop(self) -> None:
        """Stop between two batches."""
        self._stop.set()
        self._thread.join(timeout=30)

    def _loop(self) -> None:
        while not self._stop.wait(TICK_SECONDS):
            for batch in reversed(self._book.batches()):
                if batch.status in RUNNING:
                    self.advance(batch.id)

    def advance(self, batch_id: str) -> None:
        """Take one batch as far as the clock allows."""
        now, pace = self._clock(), self.pace
        batch = self._book.batch(batch_id)
        if batch is None:
            return
        if batch.status == "validating" and now >= batch.created_at + pace.validating:
            self._validate(batch, now)
        elif batch.status == "in_progress" and now >= min(batch.expires_at, self._due(batch)):
            self._change(batch.id, "in_progress", status="finalizing", finalizing_at=now)
        elif batch.status == "finalizing" and batch.finalizing_at is not None and now >= batch.finalizing_at + pace.finalizing:
            expired = batch.expires_at < self._due(batch)
            self._finish(batch, "expired" if expired else "completed", self.progress(batch, min(now, batch.expires_at)), now)
        elif batch.status == "cancelling" and batch.cancelling_at is not None and now >= batch.cancelling_at + pace.cancelling:
            self._finish(batch, "cancelled", self.progress(batch, batch.cancelling_at), now)

    def progress(self, batch: StoredBatch, at: float) -> int:
        """How many requests of a batch have run at a moment."""
        if batch.in_progress_at is None:
            return 0
        length = max(self._due(batch) - batch.in_progress_at, 1e-9)
        return min(batch.total, int(batch.total * (at - batch.in_progress_at) / length))

    def cancel(self, batch_id: str) -> StoredBatch | None:
        """Begin to stop a batch; the batch as it is then."""
        with self._book.changing():
            batch = self._book.batch(batch_id)
            if batch is not None and batch.status in ("validating", "in_progress", "finalizing"):
                batch.status, batch.cancelling_at = "cancelling", self._clock()
                self._book.save(batch)
            return batch

    def _due(self, batch: StoredBatch) -> float:
        """When a batch will have run all its requests."""
        return (batch.in_progress_at or self._clock()) + max(self.pace.running, batch.total / self.pace.lines_per_second)

    def _change(self, batch_id: str, expected: str, **values: Any) -> None:
        """Change a batch that is still in the expected status: a cancel may have come in between."""
        with self._book.changing():
            batch = self._book.batch(batch_id)
            if batch is not None and batch.status == expected:
                for name, value in values.items():
                    setattr(batch, name, value)
                self._book.save(batch)

    def _validate(self, batch: StoredBatch, now: float) -> None:
        """The whole batch fails on one bad line; nothing runs then and nothing is billed."""
        desk = self._desk(batch)
        lines, errors = desk.read(batch)
        tokens = sum(desk.tokens(line) for line in lines)
        name = desk.model_of(batch, lines[0]) if lines else batch.model
        limit = self._faults().enqueued_token_limit
        if not errors and limit is not None and tokens + self._enqueued(name) > limit:
            message = (
                f"Enqueued token limit reached for {name} in organization org-rehearsal. Limit: {limit:,} enqueued tokens. "
                "Please try again once some in_progress batches have been completed."
            )
            errors = [{"code": "token_limit_exceeded", "message": message, "param": None, "line": None}]
        if errors:
            self._change(batch.id, "validating", status="failed", failed_at=now, errors=errors[:ERRORS_SHOWN])
        else:
            self._change(
                batch.id, "validating", status="in_progress", in_progress_at=now, total=len(lines), model=name, input_tokens=tokens
            )

    def _enqueued(self, name: str | None) -> int:
        return sum(each.input_tokens for each in self._book.batches() if each.model == name and each.status in RUNNING)

    def _desk(self, batch: StoredBatch) -> Desk:
        return self._desks[batch.endpoint]

    def _finish(self, batch: StoredBatch, status: str, done: int, now: float) -> None:
        """Run what ran, write the result files, charge, and only then show the end: in one transaction with the bill."""
        faults, desk = self._faults(), self._desk(batch)
        lines, _ = desk.read(batch)
        order = random.Random(batch.number)
        order.shuffle(lines)
        if status == "completed" and any(drawn(batch.number, line.custom_id, "never_run", faults.never_run) for line in lines):
            status = "expired"
        results = Results()
        for position, line in enumerate(lines):
            if position >= done or drawn(batch.number, line.custom_id, "never_run", faults.never_run):
                results.errors += desk.never_run(line, status)
            elif drawn("once", line.custom_id, "errored_once", faults.errored_once) and self._book.errors_first(batch.id, line.custom_id):
                results.errors.append(desk.failed(line, 500, SERVER_ERROR))
            else:
                run_line(desk, batch, line, faults, results)
        order.shuffle(results.output)
        order.shuffle(results.errors)
        files = desk.write(batch, results, now)
        with self._book.changing():
            current = self._book.batch(batch.id)
            if current is None or current.status != batch.status:
                return
            current.status = "failed" if faults.fails_at_the_end else status
            setattr(current, f"{current.status}_at", now)
            current.output_file_id, current.error_file_id = files
            current.completed, current.failed = len(results.output), len(results.errors) if status == "completed" else 0
            self._book.charge(batch.id, results.charges, "batch")
            self._book.save(current)


def run_line(desk: Desk, batch: StoredBatch, line: Line, faults: Faults, results: Results) -> None:
    """Answer one request of a batch into the result files, with the faults drawn for it."""

    def hit(name: str) -> bool:
        return drawn(batch.number, line.custom_id, name, getattr(faults, name))

    if hit("unknown"):
        results.output.append(desk.stranger())
    if hit("errored"):
        results.errors.append(desk.failed(line, 500, SERVER_ERROR))
        return
    if hit("bad_request"):
        results.errors.append(desk.failed(line, 400, TOO_LONG))
        return
    status, body, tokens_in, tokens_out = desk.answer(batch, line, hit)
    if status != 200:
        results.errors.append(desk.failed(line, status, body))
        return
    results.charges.append((line.custom_id, desk.model_of(batch, line), tokens_in, tokens_out))
    if hit("missing"):
        return
    dumped = desk.answered(line, body, odd=hit("status_zero"))
    results.output.append(dumped[: len(dumped) // 2] if hit("garbage") else dumped)
    if hit("duplicate"):
        results.output.append(dumped)
