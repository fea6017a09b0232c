"""A shard's folder: its frozen requests, and which of them an attempt asks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import pyarrow.parquet as pq

from nightshift.stores.ledger import Attempt
from nightshift.stores.objects import Objects


def shard_key(keys: Iterable[bytes]) -> str:
    """A shard's name: the hash of its request keys, in any order."""
    digest = hashlib.sha256()
    for key in sorted(keys):
        digest.update(key)
    return digest.hexdigest()


def requests_key(shard: str) -> str:
    """Where the lines of a shard stand, written once."""
    return f"shards/{shard}/requests.jsonl"


def answers_key(shard: str, attempt: int) -> str:
    """Where the answers of one attempt stand."""
    return f"shards/{shard}/answers-{attempt}.parquet"


def request_keys(objects: Objects, shard: str) -> list[bytes]:
    """The request keys of a shard, in the order of its lines; a shard holds at most one batch's worth."""
    with objects.open(requests_key(shard)) as file:
        return [key_of_line(line) for line in file]


def key_of_line(line: bytes) -> bytes:
    """The request key in a line of `requests.jsonl`: every provider's line starts with its id."""
    start = line.index(b'":"') + 3
    return bytes.fromhex(line[start : start + 64].decode())


def asked_by(objects: Objects, shard: str, attempts: Iterable[Attempt], number: int) -> set[bytes] | None:
    """The request keys that an attempt asks: None for all of the shard, else what the last harvest left to be asked again."""
    harvested = [each.number for each in attempts if each.number < number and each.ended and each.ended.how == "harvested"]
    return left_by(objects, shard, harvested[-1]) if harvested else None


def left_by(objects: Objects, shard: str, attempt: int) -> set[bytes]:
    """The request keys that a harvested attempt left to be asked again."""
    table = pq.read_table(objects.open(answers_key(shard, attempt)), columns=["request_key", "again"])
    return set(table.filter(table.column("again")).column("request_key").to_pylist())
