"""The answer store: every paid answer by its request key, under the fingerprint of what was asked.

One Parquet file per settled shard, `answers/<fingerprint>/<shard>.parquet`, one line per request. Look-ups read three
columns; nothing is loaded whole. Beside them stands the log of reservations: which run is about to buy which shards.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nightshift.errors import InputChanged, InputMissing, StoreUnavailable
from nightshift.shapes import PAID_OUTCOMES, Outcome, Plan, Wire
from nightshift.stores.database import literals
from nightshift.stores.ledger import Ledger
from nightshift.stores.objects import Objects

MERGED = "merged-"
DONE = "done"
NUMBERED = re.compile(rf"/(\d{{8}})\.(json|{DONE})$")


LAST_WORD = "max_by(place, (outcome = 'succeeded', paid, answered_at, place >> 32))"  # a success, then a paid line, then the latest


def placed(files: Sequence[Path]) -> str:
    """SQL that reads answers files, each line with its `place`: the number of its file among them, from 1, above 32 bits of its own."""
    listed = f"[{literals(files)}]"
    return f"""SELECT *, (list_position({listed}, filename)::BIGINT << 32) + file_row_number AS place
               FROM read_parquet({listed}, filename = true, file_row_number = true)"""


class Reservation(Wire):
    """A run says what it is about to buy, before it buys anything.

    Reservations of one fingerprint are numbered and written once. Whoever adds one has read all before it,
    so of two runs that want the same request one comes second, sees the other, and adopts its shard.
    """

    run: str  # URI
    plan: Plan


class AnswerStore:
    """Answers and reservations of one fingerprint."""

    def __init__(self, objects: Objects, fingerprint: str) -> None:
        self._objects, self._folder, self._ledger = objects, f"answers/{fingerprint}", Ledger(objects)

    def file_of(self, shard: str) -> str:
        """The key of the answers file of a shard."""
        return f"{self._folder}/{shard}.parquet"

    def files(self) -> list[str]:
        """Every answers file there is, in key order, so that every plan reads them alike."""
        return sorted(found.key for found in self._objects.scan(self._folder) if found.key.endswith(".parquet"))

    def kept(self, files: Sequence[str]) -> list[str]:
        """Where the answers of some files stand now: in the same files, or in those that they were merged into since."""
        there = self.files()
        gone = set(files) - set(there)
        return [file for file in there if file in files or (gone and is_merged(file))]

    def download(self, files: Sequence[str], folder: Path) -> list[Path]:
        """Local copies of the answers that some files hold, or held until they were merged."""
        for _ in range(2):  # a file that is merged between the listing and the reading is found in the second listing
            with suppress(InputMissing):
                keys = self.kept(files)
                return [self._objects.download(key, folder / f"answers-{number:05d}.parquet") for number, key in enumerate(keys)]
        raise StoreUnavailable(self._objects.uri_of(self._folder), "its answers files are being replaced; this is tried again")

    def paid_keys(
        self, file: str, models: Collection[str], outcomes: Collection[Outcome] = PAID_OUTCOMES, *, since: datetime | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Request keys in one answers file that hold a paid answer: batches of `request_key`, and whether it `succeeded`.

        An answer that another model gave in place of the one asked counts only where `models` names that model, and one from
        before `since` not at all. A file that
        is rewritten meanwhile is read again; one that is gone was merged into another, which is listed as long as it is.
        """
        while (found := self._objects.head(file)) is not None:
            try:
                yield from self._paid_keys(file, found.etag, pa.array([None, *models], pa.string()), pa.array(list(outcomes)), since)
            except InputChanged:
                continue
            return

    def _paid_keys(self, file: str, etag: str, models: pa.Array, outcomes: pa.Array, since: datetime | None) -> Iterator[pa.RecordBatch]:
        parquet = pq.ParquetFile(self._objects.open(file, etag=etag), pre_buffer=False)
        columns = ["request_key", "outcome", "stand_in", *(["answered_at"] if since else [])]
        for batch in parquet.iter_batches(columns=columns, use_threads=False):
            wanted = pc.and_(pc.is_in(batch.column("outcome"), outcomes), pc.is_in(batch.column("stand_in"), models))
            if since is not None:
                wanted = pc.and_(
                    wanted, pc.greater_equal(batch.column("answered_at"), pa.scalar(since, batch.schema.field("answered_at").type))
                )
            paid = batch.filter(wanted)
            yield pa.RecordBatch.from_arrays(
                [paid.column("request_key"), pc.equal(paid.column("outcome"), "succeeded")], names=["request_key", "succeeded"]
            )

    def reservations(self) -> tuple[dict[int, Reservation], int]:
        """The reservations that may still have shards under way, by number, and the number that comes next."""
        numbers: dict[int, set[str]] = {}
        for item in self._objects.scan(f"{self._folder}/reserved"):
            if match := NUMBERED.search(item.key):
                numbers.setdefault(int(match[1]), set()).add(match[2])
        found = {number: self._reservation(number) for number, kinds in sorted(numbers.items()) if DONE not in kinds}
        return {number: reservation for number, reservation in found.items() if reservation}, max(numbers, default=0) + 1

    def _reservation(self, number: int) -> Reservation | None:
        return self._objects.get_shape(self._reservation_key(number, "json"), Reservation)

    def reserve(self, number: int, reservation: Reservation) -> bool:
        """Add a reservation under the next number; False when another run has just taken it."""
        return self._objects.create_shape(self._reservation_key(number, "json"), reservation)

    def in_flight(self, reservations: Mapping[int, Reservation]) -> list[str]:
        """The reserved shards that are not settled yet. Reservations with nothing left in flight are marked as done.

        They are never removed here: a number that came free could be taken by who has not read its successor.
        """
        shards: list[str] = []
        for number, reservation in reservations.items():
            unsettled = [shard for shard in reservation.plan.own_shards if self._ledger.settled(shard) is None]
            if not unsettled:
                self._objects.create(self._reservation_key(number, DONE), b"")
            shards += unsettled
        return list(dict.fromkeys(shards))

    def _reservation_key(self, number: int, kind: str) -> str:
        return f"{self._folder}/reserved/{number:08d}.{kind}"


def is_merged(file: str) -> bool:
    """Whether an answers file holds the answers of many shards."""
    return file.rpartition("/")[2].startswith(MERGED)


def seen(files: Sequence[str], in_flight: Sequence[str]) -> str:
    """A digest of what is known of others' answers and shards."""
    return hashlib.sha256("\n".join([*files, "in flight", *sorted(in_flight)]).encode()).hexdigest()
