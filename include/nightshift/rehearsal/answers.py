"""Answers that go wrong on the wire."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi.responses import StreamingResponse


def broken(body: bytes, announced: int) -> StreamingResponse:
    """An answer whose connection breaks in its middle."""

    def pieces() -> Iterator[bytes]:
        yield body[: announced // 2]
        raise ConnectionAbortedError("broken on purpose")

    return StreamingResponse(pieces(), headers={"content-length": str(announced)}, media_type="application/json")
