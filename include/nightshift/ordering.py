"""Rows put in order, however many and however long: into buckets on local disk by their place, and then each bucket by itself.

DuckDB sorts long rows in memory only: 400 MB of text take as much, whatever it is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nightshift.arrow import contents, in_groups

Lengths = npt.NDArray[np.int64]
BUCKET_BYTES = 16 << 20  # in memory at once; some copies of it are
SPLIT_BYTES = 4 << 20  # of rows that are divided among buckets at once
MOST_BUCKETS = 512  # open files


def in_order(rows: pa.RecordBatchReader, place: str, count: int, folder: Path) -> Iterator[pa.RecordBatch]:
    """Rows in the order of a column that says their place below `count`, without it."""
    groups = in_groups(rows, BUCKET_BYTES)
    begun = list(islice(groups, 1))
    if not begun:
        return
    expected = begun[0].nbytes * count // begun[0].num_rows  # bytes of all, were all like the first
    buckets = max(1, min(MOST_BUCKETS, -(-expected // BUCKET_BYTES)))
    for path in _divided(_emptied(begun, groups), place, -(-count // buckets), folder):
        with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
            yield from _sorted(stream.read_all(), place)
        path.unlink()


def _emptied(begun: list[pa.Table], others: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Some tables and others after them; none is held on to."""
    while begun:
        yield begun.pop(0)
    yield from others


def _divided(tables: Iterable[pa.Table], place: str, rows: int, folder: Path) -> list[Path]:
    """Tables divided among files, each of which holds so many places; the files in the order of their places."""
    files = dict[int, pa.ipc.RecordBatchStreamWriter]()
    with ExitStack() as stack:
        for table in tables:
            for part in in_groups(table.to_batches(), SPLIT_BYTES):
                of = part.column(place).to_numpy() // rows
                order = np.argsort(of, kind="stable")
                sorted_part, of = part.take(pa.array(order)), of[order]
                starts = np.flatnonzero(np.append([True], of[1:] != of[:-1]))
                for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(of)], strict=True):
                    bucket = int(of[start])
                    if bucket not in files:
                        files[bucket] = stack.enter_context(pa.ipc.new_stream(str(_path(folder, bucket)), part.schema))
                    files[bucket].write_table(sorted_part.slice(start, end - start))
    return [_path(folder, bucket) for bucket in sorted(files)]


def _path(folder: Path, bucket: int) -> Path:
    return folder / f"bucket-{bucket:05d}.arrow"


def _sorted(table: pa.Table, place: str) -> list[pa.RecordBatch]:
    found: list[pa.RecordBatch] = table.take(pc.sort_indices(table.column(place))).drop_columns([place]).combine_chunks().to_batches()
    return found


def in_blocks(batches: Iterable[pa.RecordBatch], schema: pa.Schema, rows: int, most_bytes: int) -> Iterator[pa.RecordBatch]:
    """Rows in blocks of so many, or fewer where they are long: cut by what they hold, and so alike however they come."""
    left = schema.empty_table()
    for batch in batches:
        left = pa.concat_tables([left, pa.Table.from_batches([batch], schema)]).combine_chunks()
        ends, start = np.cumsum(sum(map(_lengths, left.to_batches()[0].columns), np.zeros(left.num_rows, np.int64))), 0
        while (end := _block_end(ends, start, rows, most_bytes)) <= left.num_rows:
            yield from left.slice(start, end - start).to_batches()
            start = end
        left = left.slice(start)
    yield from left.to_batches()


def _block_end(ends: Lengths, start: int, rows: int, most_bytes: int) -> int:
    """Where the block ends that begins with a row; beyond the last row where that block is not full yet."""
    before = int(ends[start - 1]) if start else 0
    return min(start + rows, int(np.searchsorted(ends, before + most_bytes)) + 1)


def _lengths(column: pa.Array) -> Lengths:
    """About how many bytes each row of a column has; numbers count as eight."""
    if pa.types.is_string(column.type) or pa.types.is_binary(column.type):
        return np.diff(contents(column)[1]).astype(np.int64)
    if pa.types.is_list(column.type):
        ends = np.concatenate([[0], np.cumsum(_lengths(column.values))])
        offsets = column.offsets.to_numpy()
        found: Lengths = np.diff(ends[offsets])
        return found
    if pa.types.is_struct(column.type):
        return sum(map(_lengths, column.flatten()), np.zeros(len(column), np.int64))
    return np.full(len(column), 8, np.int64)
