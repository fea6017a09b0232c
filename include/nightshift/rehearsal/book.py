"""The rehearsal server's book: files, batches and the bill, in SQLite. What is answered is stored first, so a kill loses nothing."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson

from nightshift.money.prices import price_of
from nightshift.shapes import Usage

ON_DEMAND = "on demand"  # and a number: each request on demand is a line of its own
SCHEMA = """
CREATE TABLE IF NOT EXISTS files (id TEXT PRIMARY KEY, filename TEXT, purpose TEXT, bytes INTEGER, created_at REAL, expires_at REAL);
CREATE TABLE IF NOT EXISTS batches (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, body TEXT);
CREATE TABLE IF NOT EXISTS bill (batch_id TEXT, custom_id TEXT, model TEXT, input_tokens INTEGER, output_tokens INTEGER,
                                 tier TEXT, PRIMARY KEY (batch_id, custom_id));
CREATE INDEX IF NOT EXISTS bill_custom_id ON bill (custom_id);
CREATE TABLE IF NOT EXISTS errored (custom_id TEXT, batch_id TEXT, PRIMARY KEY (custom_id));
"""


@dataclass(slots=True, kw_only=True)
class StoredBatch:
    """A batch as the server keeps it. Times are unix seconds."""

    id: str
    number: int = 0  # its place in the book, from 1: faults are drawn by it, so that the same work meets the same faults
    endpoint: str
    input_file_id: str
    metadata: dict[str, str] | None
    settings: dict[str, str] = field(default_factory=dict)  # of a job of Bedrock
    created_at: float
    expires_at: float
    status: str = "validating"
    model: str | None = None
    total: int = 0
    input_tokens: int = 0
    errors: list[dict[str, Any]] | None = None
    in_progress_at: float | None = None
    finalizing_at: float | None = None
    completed_at: float | None = None
    failed_at: float | None = None
    expired_at: float | None = None
    cancelling_at: float | None = None
    cancelled_at: float | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    completed: int = 0
    failed: int = 0


class Book:
    """Files on disk, everything about them in SQLite (WAL)."""

    def __init__(self, folder: Path) -> None:
        self.files = folder / "files"
        self.files.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._db = sqlite3.connect(folder / "book.sqlite", check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.executescript(SCHEMA)

    def close(self) -> None:
        """Write everything into the one file. Its folder can be copied then."""
        with self._lock:
            self._db.close()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """One transaction; changes of one batch never interleave."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def path_of(self, file_id: str) -> Path:
        """Where a file's bytes are."""
        return self.files / file_id

    def add_file(self, file_id: str, filename: str, purpose: str, size: int, now: float, expires_at: float | None) -> None:
        """Enter a file whose bytes are on disk."""
        with self._lock:
            self._db.execute("INSERT INTO files VALUES (?,?,?,?,?,?)", (file_id, filename, purpose, size, now, expires_at))

    def file(self, file_id: str) -> dict[str, Any] | None:
        """A file's entry."""
        found = self._rows("SELECT * FROM files WHERE id = ?", file_id)
        return found[0] if found else None

    def list_files(self) -> list[dict[str, Any]]:
        """Every file, newest first."""
        return self._rows("SELECT * FROM files ORDER BY created_at DESC, rowid DESC")

    def delete_file(self, file_id: str) -> None:
        """Forget a file and its bytes."""
        with self._lock:
            self._db.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.path_of(file_id).unlink(missing_ok=True)

    def add_batch(self, batch: StoredBatch) -> None:
        """Enter a new batch and number it."""
        with self._lock:
            batch.number = 1 + self._rows("SELECT count(*) AS entered FROM batches")[0]["entered"]
            self._db.execute("INSERT INTO batches (id, body) VALUES (?, ?)", (batch.id, orjson.dumps(asdict(batch))))

    def save(self, batch: StoredBatch) -> None:
        """Keep what changed."""
        with self._lock:
            self._db.execute("UPDATE batches SET body = ? WHERE id = ?", (orjson.dumps(asdict(batch)), batch.id))

    def batch(self, batch_id: str) -> StoredBatch | None:
        """One batch."""
        found = self._rows("SELECT body FROM batches WHERE id = ?", batch_id)
        return _batch(found[0]["body"]) if found else None

    def batches(self) -> list[StoredBatch]:
        """Every batch, newest first."""
        return [_batch(row["body"]) for row in self._rows("SELECT body FROM batches ORDER BY seq DESC")]

    def charge(self, batch_id: str, lines: list[tuple[str, str, int, int]], tier: str) -> None:
        """Bill (custom_id, model, input tokens, output tokens). Billing the same line of the same batch again changes nothing."""
        with self._lock:
            self._db.executemany(
                "INSERT OR IGNORE INTO bill VALUES (?,?,?,?,?,?)",
                [(batch_id, custom_id, model, tokens_in, tokens_out, tier) for custom_id, model, tokens_in, tokens_out in lines],
            )

    def errors_first(self, batch_id: str, custom_id: str) -> bool:
        """Whether this batch is the one in which a request meets its one error."""
        with self._lock:
            self._db.execute("INSERT OR IGNORE INTO errored VALUES (?,?)", (custom_id, batch_id))
        return bool(self._rows("SELECT 1 FROM errored WHERE custom_id = ? AND batch_id = ?", custom_id, batch_id))

    def bill(self, *, by_request: bool = False) -> dict[str, Any]:
        """What a provider would have charged: in all, per batch, and (on request) how often each request was paid."""
        per_batch = self._rows(
            f"""SELECT CASE WHEN batch_id LIKE '{ON_DEMAND}%' THEN '{ON_DEMAND}' ELSE batch_id END AS batch_id, model, tier,
                  count(*) AS requests, sum(input_tokens) AS input_tokens, sum(output_tokens) AS output_tokens
               FROM bill GROUP BY 1, model, tier"""
        )
        total = Decimal(0)
        for line in per_batch:
            cost = _cost(line)
            total += cost or 0
            line["usd"] = None if cost is None else float(cost)
        totals = self._rows("SELECT count(*) AS requests, count(DISTINCT custom_id) AS unique_requests FROM bill")[0]
        batches = self._rows("SELECT count(*) AS n FROM batches")[0]["n"]
        bill = {**totals, "batches": batches, "usd": float(round(total, 6)), "by_batch": per_batch}
        if by_request:
            paid = self._rows("SELECT custom_id, count(*) AS times FROM bill GROUP BY custom_id")
            bill["by_request"] = {line["custom_id"]: line["times"] for line in paid}
        return bill

    def _rows(self, query: str, *values: Any) -> list[dict[str, Any]]:
        with self._lock:
            cursor = self._db.execute(query, values)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def _batch(body: bytes | str) -> StoredBatch:
    known = {each.name for each in fields(StoredBatch)}
    return StoredBatch(**{name: value for name, value in orjson.loads(body).items() if name in known})


def _cost(line: dict[str, Any]) -> Decimal | None:
    price = price_of("openai", line["model"], line["tier"]) or price_of("bedrock", line["model"], line["tier"])
    return price.of(Usage(input_tokens=line["input_tokens"], output_tokens=line["output_tokens"])) if price else None
