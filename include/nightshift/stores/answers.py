"""The answer store: every paid answer by its request key, under the fingerprint of what was asked.

One Parquet file per settled shard, `answers/<fingerprint>/<shard>.parquet`, one line per request. Look-ups read three
columns; nothing is loaded whole. Beside them stands the log of reservations: which run is about to buy which shards.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nightshift.shapes import PAID_OUTCOMES, Plan, Wire
from nightshift.stores.ledger import Ledger
from nightshift.stores.objects import Objects

MERGED = "merged-"
NUMBERED = re.compile(r"/(\d{8})\.json$")


class Reservation(Wire):
    """A run says what it is about to buy, before it buys anything.

    Reservations of one fingerprint are numbered without gaps and written once. Whoever adds one has read all before it,
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

    def paid_keys(self, file: str, models: Collection[str]) -> Iterator[pa.RecordBatch]:
        """Request keys in one answers file that hold a paid answer: batches of one column `request_key`.

        An answer that another model gave in place of the one asked counts only where `models` names that model.
        """
        parquet = pq.ParquetFile(self._objects.open(file), pre_buffer=False)
        allowed = pa.array([None, *models], pa.string())
        for batch in parquet.iter_batches(columns=["request_key", "outcome", "stand_in"], use_threads=False):
            paid = pc.is_in(batch.column("outcome"), pa.array(PAID_OUTCOMES))
            usable = pc.is_in(batch.column("stand_in"), allowed)
            yield batch.filter(pc.and_(paid, usable)).select(["request_key"])

    def reservations(self) -> dict[int, Reservation]:
        """The reservations that may still have shards under way, by number; the newest one always among them."""
        found = {}
        for item in self._objects.scan(f"{self._folder}/reserved"):
            match = NUMBERED.search(item.key)
            reservation = self._objects.get_shape(item.key, Reservation) if match else None
            if match and reservation:
                found[int(match[1])] = reservation
        return dict(sorted(found.items()))

    def reserve(self, number: int, reservation: Reservation) -> bool:
        """Add a reservation under the next number; False when another run has just taken it."""
        return self._objects.create_shape(self._reservation_key(number), reservation)

    def in_flight(self, reservations: Mapping[int, Reservation]) -> list[str]:
        """The reserved shards that are not settled yet. Reservations with nothing left in flight are cleared away.

        The newest stays whatever became of it: its number says which one is next.
        """
        open_by_number = {
            number: [shard for shard in reservation.plan.own_shards if self._ledger.settled(shard) is None]
            for number, reservation in reservations.items()
        }
        done = [number for number, shards in open_by_number.items() if not shards and number != max(open_by_number)]
        self._objects.delete([self._reservation_key(number) for number in done])
        return list(dict.fromkeys(shard for shards in open_by_number.values() for shard in shards))

    def _reservation_key(self, number: int) -> str:
        return f"{self._folder}/reserved/{number:08d}.json"


def is_merged(file: str) -> bool:
    """Whether an answers file holds the answers of many shards."""
    return file.rpartition("/")[2].startswith(MERGED)


def seen(files: Sequence[str], in_flight: Sequence[str]) -> str:
    """A digest of what is known of others' answers and shards."""
    return hashlib.sha256("\n".join([*files, "in flight", *sorted(in_flight)]).encode()).hexdigest()
