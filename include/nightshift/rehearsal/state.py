"""What the routes of the rehearsal server share: the book, the engine, the faults, and who is let in."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request

from nightshift.rehearsal.bedrock_desk import BedrockDesk
from nightshift.rehearsal.book import Book, StoredBatch
from nightshift.rehearsal.engine import Desk, Engine, Pace
from nightshift.rehearsal.faults import Faults
from nightshift.rehearsal.openai_desk import OpenAIDesk

KEY = "sk-rehearsal"
BATCH_ENDPOINTS = ("/v1/chat/completions", "/v1/responses", "/v1/embeddings")


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None, **headers: str) -> None:
        self.status, self.headers = status, headers
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error" if status >= 500 else "requests"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        super().__init__(message)


class State:
    """What the routes share."""

    def __init__(self, book: Book, key: str, pace: Pace, faults: Faults) -> None:
        self.book, self.key, self.faults = book, key, faults
        openai, bedrock = OpenAIDesk(book, lambda: self.faults), BedrockDesk(lambda: self.faults)
        desks: dict[str, Desk] = {**dict.fromkeys(BATCH_ENDPOINTS, openai), "converse": bedrock, "invoke": bedrock}
        self.engine = Engine(book, pace, lambda: self.faults, desks)
        self.running, self.most_running = 0, 0  # requests on demand, now and at most

    def admit(self, request: Request) -> None:
        """Check the key, as every route does first."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if given != self.key:
            shown = f"{given[:3]}***{given[-2:]}" if len(given) > 8 else "none"
            raise ApiError(401, f"Incorrect API key provided: {shown}.", "invalid_api_key")
        if self.use("rate_limit"):
            raise ApiError(429, "Rate limit reached for requests.", "rate_limit_exceeded", retry_after="1")

    @property
    def is_full(self) -> bool:
        """Whether no place is left among the requests on demand that run at once."""
        return self.faults.live_capacity is not None and self.running >= self.faults.live_capacity

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """A place among the requests on demand that run at once, or the 503 of an overloaded server."""
        if self.is_full:
            raise ApiError(503, "The engine is currently overloaded, please try again later.")
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            yield
        finally:
            self.running -= 1

    def use(self, fault: str) -> bool:
        """Whether a counted fault strikes now; it is then used up by one."""
        left = getattr(self.faults, fault)
        if left:
            setattr(self.faults, fault, left - 1)
        return bool(left)

    def visible(self, created_at: float, lag: float) -> bool:
        """Whether something created then can be seen by now."""
        return time.time() >= created_at + lag

    def batch(self, batch_id: str) -> StoredBatch:
        """A batch, or the 404 that OpenAI answers."""
        found = self.book.batch(batch_id)
        if found is None or self.use("poll_404"):
            raise ApiError(404, f"No batch found with id '{batch_id}'.")
        return found

    def file(self, file_id: str) -> dict[str, Any]:
        """A file's entry, or the 404 that OpenAI answers."""
        found = self.book.file(file_id)
        if found is None:
            raise ApiError(404, f"No such File object: {file_id}", param="id")
        return found
