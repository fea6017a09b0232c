"""Rows put in order by way of buckets on disk."""

from __future__ import annotations

import random

import pyarrow as pa
import pytest

from nightshift.ordering import in_blocks, in_order

ROWS = 1000
SCHEMA = pa.schema([("place", pa.int64()), ("text", pa.string()), ("words", pa.list_(pa.struct([("word", pa.string())])))])


def shuffled() -> list[pa.RecordBatch]:
    draw = random.Random(1)
    places = draw.sample(range(0, 2 * ROWS, 2), ROWS)  # some places have no row
    rows = [{"place": place, "text": None if place % 7 == 0 else "t" * (place % 50), "words": [{"word": str(place)}]} for place in places]
    return pa.Table.from_pylist(rows, SCHEMA).to_batches(max_chunksize=64)


@pytest.mark.parametrize(("bucket", "split", "most"), [(1 << 20, 1 << 20, 512), (4000, 1000, 512), (500, 100, 512), (500, 10_000, 3)])
def test_rows_come_in_the_order_of_their_places_whatever_the_buckets(bucket, split, most, tmp_path, monkeypatch):
    for name, value in (("BUCKET_BYTES", bucket), ("SPLIT_BYTES", split), ("MOST_BUCKETS", most)):
        monkeypatch.setattr(f"nightshift.ordering.{name}", value)
    reader = pa.RecordBatchReader.from_batches(SCHEMA, iter(shuffled()))
    found = pa.Table.from_batches(in_order(reader, "place", 2 * ROWS, tmp_path))
    wanted = pa.Table.from_batches(shuffled()).sort_by("place").drop_columns(["place"])
    assert found.combine_chunks().equals(wanted.combine_chunks())
    assert list(tmp_path.iterdir()) == []


def test_no_rows_are_in_order(tmp_path):
    assert list(in_order(pa.RecordBatchReader.from_batches(SCHEMA, iter(())), "place", 0, tmp_path)) == []


def test_blocks_are_cut_alike_however_their_rows_come():
    table = pa.Table.from_batches(shuffled())
    cuts = [
        [batch.num_rows for batch in in_blocks(table.to_batches(max_chunksize=size), SCHEMA, 100, 3000)] for size in (1, 7, 64, 500, ROWS)
    ]
    assert all(cut == cuts[0] for cut in cuts)
    assert sum(cuts[0]) == ROWS
    assert 1 < max(cuts[0]) <= 100
    assert {batch.num_rows for batch in in_blocks(table.to_batches(), SCHEMA, 100, 1 << 30)} == {100}
    assert {batch.num_rows for batch in in_blocks(table.to_batches(), SCHEMA, 100, 1)} == {1}
