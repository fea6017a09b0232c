"""The answer store: every paid answer by its request key, under the fingerprint of what was asked.

One Parquet file per settled shard, `answers/<fingerprint>/<shard>.parquet`, one line per request. Look-ups read two
columns; nothing is loaded whole. Shards still in flight are announced beside them, so that another run can adopt them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from nightshift.shapes import PAID_OUTCOMES, Wire
from nightshift.stores.objects import Objects


class Announcement(Wire):
    """A shard that somebody is about to submit and nobody has settled yet."""

    shard: str
    run: str


class AnswerStore:
    """Answers of one fingerprint."""

    def __init__(self, objects: Objects, fingerprint: str) -> None:
        self._objects, self._folder = objects, f"answers/{fingerprint}"

    def file_of(self, shard: str) -> str:
        """The key of the answers file of a shard."""
        return f"{self._folder}/{shard}.parquet"

    def files(self) -> list[str]:
        """Every answers file there is, in key order, so that every plan reads them alike."""
        return sorted(found.key for found in self._objects.scan(self._folder) if found.key.endswith(".parquet"))

    def paid_keys(self, file: str) -> Iterator[pa.RecordBatch]:
        """Request keys in one answers file that hold a paid answer: batches of one column `request_key`."""
        parquet = pq.ParquetFile(self._objects.open(file), pre_buffer=False)
        for batch in parquet.iter_batches(columns=["request_key", "outcome"], use_threads=False):
            paid = [outcome in PAID_OUTCOMES for outcome in batch.column("outcome").to_pylist()]
            yield batch.filter(pa.array(paid, pa.bool_())).select(["request_key"])

    def announce(self, shard: str, run: str) -> None:
        """Say that a shard is on its way, before it is claimed: whoever plans from now on adopts it."""
        self._objects.create_shape(f"{self._folder}/open/{shard}.json", Announcement(shard=shard, run=run))

    def close(self, shard: str) -> None:
        """Take the announcement back: the answers are in."""
        self._objects.delete([f"{self._folder}/open/{shard}.json"])

    def open_shards(self) -> list[str]:
        """Shards that are announced and have no answers yet."""
        answered = set(self.files())
        found = self._objects.scan(f"{self._folder}/open")
        shards = (item.key.rpartition("/")[2].removesuffix(".json") for item in found)
        return [shard for shard in shards if self.file_of(shard) not in answered]
