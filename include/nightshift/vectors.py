"""Vectors of answers, put into the rows that they belong to: read a row group at a time from wherever their lines are."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

LINE = "_nightshift_line"  # the column that says where a row's answer is: {file, row}
COLUMN = "embedding"
GROUPS_KEPT = 4  # row groups in memory: rows mostly come in the order of their lines


def with_vectors(reader: pa.RecordBatchReader, dimensions: int) -> pa.RecordBatchReader:
    """Batches with the vector that LINE points to in its place, in a column of fixed-size lists."""
    place = reader.schema.get_field_index(LINE)
    field = pa.field(COLUMN, pa.list_(pa.float32(), dimensions))
    vectors = _Vectors(dimensions)

    def filled() -> Iterator[pa.RecordBatch]:
        for batch in reader:
            lines = batch.column(place)
            values = vectors.take(lines.field("file").to_pylist(), lines.field("row").to_pylist())
            yield batch.set_column(place, field, pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), dimensions))

    return pa.RecordBatchReader.from_batches(reader.schema.set(place, field), filled())


class _Vectors:
    """Random access to the vectors of answers files."""

    def __init__(self, dimensions: int) -> None:
        self._dimensions = dimensions
        self._files: dict[str, tuple[pq.ParquetFile, list[int]]] = {}  # with the row that each row group starts at
        self._groups: dict[tuple[str, int], npt.NDArray[np.float32]] = {}

    def take(self, files: list[str], rows: list[int]) -> npt.NDArray[np.float32]:
        """The vectors of some lines, one a row."""
        taken = np.empty((len(rows), self._dimensions), np.float32)
        for place, (file, row) in enumerate(zip(files, rows, strict=True)):
            group, start = self._group(file, row)
            taken[place] = group[row - start]
        return taken

    def _group(self, file: str, row: int) -> tuple[npt.NDArray[np.float32], int]:
        """The row group that holds a row, and the row that it starts at."""
        if file not in self._files:
            opened = pq.ParquetFile(file)
            sizes = (opened.metadata.row_group(number).num_rows for number in range(opened.num_row_groups))
            self._files[file] = opened, list(accumulate(sizes, initial=0))
        opened, starts = self._files[file]
        number = bisect_right(starts, row) - 1
        if (file, number) not in self._groups:
            if len(self._groups) >= GROUPS_KEPT:
                del self._groups[next(iter(self._groups))]
            self._groups[file, number] = self._read(opened, number)
        return self._groups[file, number], starts[number]

    def _read(self, opened: pq.ParquetFile, number: int) -> npt.NDArray[np.float32]:
        """A row group's vectors; a line that has none has zeros, and is asked by no row."""
        column = opened.read_row_group(number, columns=["output"]).column("output").combine_chunks()
        lists = column.field(COLUMN)
        vectors = np.zeros((len(lists), self._dimensions), np.float32)
        there = np.asarray(lists.is_valid().to_numpy(zero_copy_only=False) & column.is_valid().to_numpy(zero_copy_only=False))
        vectors[there] = lists.filter(pa.array(there)).flatten().to_numpy(zero_copy_only=False).reshape(-1, self._dimensions)
        return vectors
