"""S3 events out of SQS messages, whatever envelope they came in. An event is a hint: it says where to look, and nothing rests on it.

Contract: SQS gets S3's own JSON, SNS's envelope around it, or EventBridge's, in which keys are not encoded and fields are spelled otherwise
(S3 User Guide, "Event message structure"; read 2026-11-21).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_plus

import orjson


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint:
    """An object is said to have been created."""

    bucket: str
    key: str  # decoded
    etag: str
    size: int  # bytes

    @property
    def uri(self) -> str:
        """Where the object is said to be."""
        return f"s3://{self.bucket}/{self.key}"


@dataclass(frozen=True, slots=True)
class Strange:
    """A message, or a record of one, that is no event of S3: parked, so that a person can look at it."""

    why: str
    body: str


def read_message(body: str) -> Iterator[Hint | Strange]:
    """What a message says, record by record: one that cannot be read leaves the others alone (F07). Removals and tests say nothing."""
    try:
        message = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        yield Strange(f"not JSON: {error.msg}", body)
        return
    if isinstance(message, Mapping) and isinstance(message.get("Message"), str) and "TopicArn" in message:
        yield from read_message(message["Message"])
    elif isinstance(message, Mapping) and message.get("source") == "aws.s3":
        yield from _bridged(message, body)
    elif isinstance(message, Mapping) and isinstance(message.get("Records"), list):
        for record in message["Records"]:
            yield from _record(record)
    elif not (isinstance(message, Mapping) and message.get("Event") == "s3:TestEvent"):
        yield Strange("neither an event of S3 nor an envelope of one", body)


def _record(record: Any) -> Iterator[Hint | Strange]:
    try:
        if str(record["eventVersion"]).split(".")[0] != "2":
            yield Strange(f"event version {record['eventVersion']} is not known here", orjson.dumps(record).decode())
        elif str(record["eventName"]).removeprefix("s3:").startswith("ObjectCreated:"):
            found = record["s3"]["object"]
            key = unquote_plus(found["key"], errors="strict")
            yield Hint(bucket=record["s3"]["bucket"]["name"], key=key, etag=str(found.get("eTag", "")), size=int(found.get("size", 0)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        yield Strange(f"a record without what every record has: {error!r}", orjson.dumps(record, default=str).decode())


def _bridged(message: Mapping[str, Any], body: str) -> Iterator[Hint | Strange]:
    if message.get("detail-type") != "Object Created":
        return
    try:
        found = message["detail"]["object"]
        bucket = message["detail"]["bucket"]["name"]
        yield Hint(bucket=bucket, key=str(found["key"]), etag=str(found.get("etag", "")), size=int(found.get("size", 0)))
    except (KeyError, TypeError, ValueError) as error:
        yield Strange(f"an event of EventBridge without what each has: {error!r}", body)
