"""Result files: their lines are read many at once, and one by one where any of them is outside the contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import IO, Annotated, Any, TypeVar

import msgspec
import numpy as np
import orjson

from nightshift.providers.protocol import Form, Garbage, Reply

READ_BYTES = 1 << 18  # of a file at once: what becomes of them stays near the processor
NEWLINE = ord("\n")
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

Tokens = Annotated[int, msgspec.Meta(ge=0, le=2**53)]  # so that a column holds them, and sums of them

Found = TypeVar("Found")


def read_file(form: Form, file: IO[bytes], at_once: int = READ_BYTES) -> Iterator[Reply | Garbage]:
    """What every line of a result file tells."""
    while lines := file.read(at_once) + file.readline():
        yield from form.read(lines.removesuffix(b"\n"))


def read_lines(lines: bytes, decoder: msgspec.json.Decoder[Found], told: Callable[[Found], Reply], name: str) -> list[Reply | Garbage]:
    """What each line tells. `told`: what one within the contract does; `name`: of the id in a line.

    Two records in one line are garbage where that line is read by itself.
    """
    try:
        found = decoder.decode_lines(lines)
    except UNREADABLE:
        found = []
    if len(found) == np.count_nonzero(np.frombuffer(lines, np.uint8) == NEWLINE) + 1:  # six times as fast as bytes.count
        return [told(line) for line in found]
    return [_alone(line, decoder, told, name) for line in lines.split(b"\n") if line.strip()]


def _alone(line: bytes, decoder: msgspec.json.Decoder[Found], told: Callable[[Found], Reply], name: str) -> Reply | Garbage:
    """A line by itself. Where one is outside the contract and its id can still be read, that request is errored; else it is garbage.

    An answer is not thrown away for how its tokens are counted: it is read without, and what it cost is unknown (F85).
    """
    try:
        return told(decoder.decode(line))
    except UNREADABLE as error:
        why = str(error)  # the error itself holds this frame, and so the line, until the collector comes
    try:
        given = orjson.loads(line)
        custom_id = given[name]
    except (ValueError, KeyError, TypeError):
        return Garbage(reason=f"unreadable result line: {why}")
    if not isinstance(custom_id, str):
        return Garbage(reason=f"result line whose {name} is no string")
    with suppress(*UNREADABLE):
        return told(decoder.decode(orjson.dumps(_without_usage(given))))
    response = given.get("response")
    has_failed = isinstance(response, dict) and response.get("status_code") != 200
    reason = f"answer outside the API's contract: {why}"
    return Reply(custom_id=custom_id, outcome="errored", reason=reason, retryable=True, paid=not has_failed)


def _without_usage(given: Any) -> Any:
    """A line less the counts of its tokens, whichever object they stand in."""
    if not isinstance(given, dict):
        return given
    return {name: _without_usage(value) for name, value in given.items() if name != "usage"}
