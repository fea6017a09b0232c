"""Bedrock's job events, as EventBridge hands them to an SQS queue: they shorten waits, and nothing else rests on them.

Delivery is best effort (F51): events come late, twice, in any order, or not at all. So an event only ends a pause early; what has
become of the job is always looked at.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import orjson

LISTEN_SECONDS = 20  # of one long poll, the most that SQS allows
STALE_SECONDS = 300.0  # an event that nobody here has waited for by then is nobody's
AFTER_ERROR_SECONDS = 30.0

log = logging.getLogger(__name__)
_Bell = tuple[asyncio.AbstractEventLoop, asyncio.Event]


class Doorbell:
    """Pauses that end early when the job that they are for is heard of. One listener for all waits of a process."""

    def __init__(self, listen: Callable[[Callable[[str], bool]], Iterable[str]]) -> None:
        """`listen` blocks for a while and gives the jobs that it has heard of; it is told which of them somebody waits for."""
        self._listen = listen
        self._bells: dict[str, set[_Bell]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    async def sleep(self, job: str, seconds: float) -> None:
        """Pause for so long at most."""
        bell = asyncio.get_running_loop(), asyncio.Event()
        with self._lock:
            self._bells.setdefault(job, set()).add(bell)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="doorbell", daemon=True)
                self._thread.start()
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(bell[1].wait(), seconds)
        finally:
            with self._lock:
                self._bells[job].discard(bell)
                if not self._bells[job]:
                    del self._bells[job]

    def _is_waited_for(self, job: str) -> bool:
        return job in self._bells

    def _run(self) -> None:
        while True:
            try:
                for job in self._listen(self._is_waited_for):
                    self._ring(job)
            except Exception as error:  # noqa: BLE001 — a queue that does not answer must not end the waits
                log.warning("The queue of job events does not answer; waits go on without it: %s", error)
                time.sleep(AFTER_ERROR_SECONDS)

    def _ring(self, job: str) -> None:
        with self._lock:
            for loop, event in self._bells.get(job, ()):
                with suppress(RuntimeError):  # a loop that has ended waits for nothing
                    loop.call_soon_threadsafe(event.set)


def listen_to(queue_url: str, client: Any) -> Callable[[Callable[[str], bool]], Iterator[str]]:
    """Listen to an SQS queue. Events of jobs that others wait for are left to them, until they are stale."""

    def listen(is_waited_for: Callable[[str], bool]) -> Iterator[str]:
        answer = client.receive_message(
            QueueUrl=queue_url, MaxNumberOfMessages=10, WaitTimeSeconds=LISTEN_SECONDS, AttributeNames=["SentTimestamp"]
        )
        for message in answer.get("Messages", ()):
            job, sent = job_of(message["Body"]), float(message.get("Attributes", {}).get("SentTimestamp", 0)) / 1000
            if job is None or is_waited_for(job) or time.time() - sent > STALE_SECONDS:
                client.delete_message(QueueUrl=queue_url, ReceiptHandle=message["ReceiptHandle"])
            if job is not None:
                yield job

    return listen


def job_of(body: str | bytes) -> str | None:
    """The job that an EventBridge event is about; None where it is about none."""
    try:
        event = orjson.loads(body)
        job = event["detail"].get("batchJobArn") or event["resources"][0]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None
    return job if isinstance(job, str) else None
