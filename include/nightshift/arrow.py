"""What Python and pyarrow do on the way, and need not."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

if TYPE_CHECKING:
    import pyarrow.parquet as pq

# Of glibc's mallopt; see `man mallopt`.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
# Bytes: what is mapped by itself, as large as glibc allows; and how much may lie free before it is returned.
LARGE, KEPT = 32 << 20, 64 << 20


class _Refusing:
    """An importer that has no pandas, and says so before any other is asked."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        """See importlib.abc.MetaPathFinder."""
        if name == "pandas":
            raise ModuleNotFoundError("not now", name=name)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Let the garbage collector rest while many objects come and none of them is part of a cycle: it would look at all, again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def contents(texts: pa.Array) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """The bytes of a column of text or binary values, one after another, and where each begins, with the end of the last. No copy."""
    if not len(texts):
        return np.empty(0, np.uint8), np.zeros(1, np.int32)
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    return np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8), ends


def whole(texts: pa.Array) -> memoryview:
    """The bytes of a column of text or binary values, one after another. No copy."""
    data, ends = contents(texts)
    return data[ends[0] : ends[-1]].data


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text, in whichever way Arrow lays it out."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def in_groups(batches: Iterable[pa.RecordBatch], most_bytes: int, most_rows: int | None = None) -> Iterator[pa.Table]:
    """Batches in tables: each ends with the batch that brings it to so many bytes, or rows."""
    group, size, rows = list[pa.RecordBatch](), 0, 0
    for batch in batches:
        group.append(batch)
        size, rows = size + batch.nbytes, rows + batch.num_rows
        if size >= most_bytes or (most_rows is not None and rows >= most_rows):
            yield pa.Table.from_batches(group)
            group, size, rows = [], 0, 0
    if group:
        yield pa.Table.from_batches(group)


def row_groups(file: pq.ParquetFile) -> Iterator[pa.Table]:
    """A file that was written in row groups as large as memory holds, one after the other."""
    return (file.read_row_group(group, use_threads=False) for group in range(file.num_row_groups))


def keep_freed_memory() -> None:
    """Let malloc keep some of what is freed, for the next batch.

    As it comes it gives every buffer of a megabyte or two back to the kernel, and each new one is then faulted in page by page: half
    of what it takes to encode a batch.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # which only glibc has
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGE)
        mallopt(TRIM_THRESHOLD, KEPT)


def keep_pandas_out() -> None:
    """Let pyarrow find out that there is no pandas, so that it does not import it with the first list that becomes a column.

    That costs 1.4 CPU-seconds and 70 MB in every process that can import pandas, for lists that pandas has nothing to do with.
    Who asks pyarrow for pandas' own things (`Table.to_pandas`) gets them as ever: it then looks again. A process that has pandas
    already is left as it is.
    """
    if "pandas" not in sys.modules:
        sys.meta_path.insert(0, _Refusing)
        try:
            pa.array([])
        finally:
            sys.meta_path.remove(_Refusing)
