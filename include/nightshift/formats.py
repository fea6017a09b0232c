"""Rows out of objects: Parquet, CSV and JSONL, plain, gzip or zstd, streamed in batches.

A broken row is a row with a fault; a broken file is an error. Every line that holds something counts as a row.
"""

from __future__ import annotations

import csv
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, Any, cast

import orjson

from nightshift.errors import InputUnreadable, nearest
from nightshift.shapes import Compression, Format, PinnedObject

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 2048  # measured best: larger batches leave the processor's cache
BATCH_BYTES = 4 << 20  # of what is read, or one row: what is made of a batch stands in memory some times over
READ_BYTES = 1 << 20  # of a column of Parquet that are fetched at once
GROUP_BYTES = 64 << 20  # of a row group of Parquet that may be in memory at once
STEP_ROWS = 128  # of a larger one that are read at once: its long rows may all stand together
SAMPLE_ROWS = 16  # that tell how long the rows of a Parquet object are
PICTURE_ROWS = 16  # in a batch, where the columns may hold pictures
MAX_LINE_BYTES = 16 << 20  # one longer line is a fault of that row, not of the machine's memory (catalogue F15)
BEYOND = 2.0**63  # where orjson begins to read integers as floats
RAW_KEPT = 2000  # characters of a broken row that quarantine shows
ESCAPED_BYTE = re.compile("[\udc80-\udcff]")  # how surrogateescape spells a byte that is not UTF-8
SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
}  # fmt: skip
PACKED: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
ARROW_TYPES = {str: "string", int: "int64", float: "float64", bool: "bool"}  # that hold each value of a Python type as it is
OTHER_DELIMITERS = (";", "\t", "|")  # of what calls itself CSV
FILE_COLUMNS = ("uri", "name", "size", "etag")  # of a row that is an object of its own


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a row could not be read, and what stood there."""

    reason: str
    raw: str


Sized = tuple[dict[str, Any] | Fault, int]  # a row, and about how long it is


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A batch of consecutive rows, by column. A faulty row holds None in every column."""

    count: int
    columns: Mapping[str, Sequence[Any]]  # the wanted columns, `count` values each
    faults: dict[int, Fault] = field(default_factory=dict)  # by position in the batch
    arrays: Mapping[str, pa.Array] = field(default_factory=dict)  # the same columns, where the object has them as such
    _sound: dict[str, pa.Array | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def array(self, name: str) -> pa.Array | None:
        """A column as Arrow holds it, nulls included; None where its values are not sound, or not of one plain type."""
        if name not in self._sound:
            self._sound[name] = _sound(self.arrays[name]) if name in self.arrays else _as_array(self.columns[name])
        return self._sound[name]

    @property
    def nbytes(self) -> int:
        """Bytes of the columns that the object has as arrays; of others, which are read a few megabytes at a time, none."""
        return sum(array.nbytes for array in self.arrays.values())

    def at(self, places: Sequence[int]) -> Rows:
        """Some of the rows, by their positions."""
        import pyarrow as pa

        taken = {name: array.take(pa.array(places, pa.int64())) for name, array in self.arrays.items()}
        return Rows(
            count=len(places),
            columns=_Lists(taken) if taken else {name: [values[i] for i in places] for name, values in self.columns.items()},
            faults={at: self.faults[i] for at, i in enumerate(places) if i in self.faults},
            arrays=taken,
        )


def guess_format(key: str) -> tuple[Format | None, Compression | None]:
    """Format and compression from an object's name; None where the name does not tell."""
    path = PurePosixPath(key.lower())
    packed = PACKED.get(path.suffix)
    return SUFFIXES.get((path.with_suffix("") if packed else path).suffix), packed


def read_rows(
    file: IO[bytes], uri: str, fmt: Format, compression: Compression | None, wanted: Sequence[str], batch_rows: int = BATCH_ROWS
) -> Iterator[Rows]:
    """The rows of one object in order, `wanted` columns only. Memory: one batch.

    Raises InputUnreadable for a file that is truncated, in the wrong format, or (Parquet, CSV) lacks a wanted column.
    """
    try:
        match fmt:
            case "parquet":
                if compression:
                    raise InputUnreadable(uri, "compressed Parquet cannot be read in parts; Parquet compresses its own pages")
                yield from _parquet(file, uri, wanted, batch_rows)
            case "csv":
                yield from _csv(_unpack(file, uri, compression), uri, wanted)
            case "jsonl":
                yield from _jsonl(_unpack(file, uri, compression), wanted)
    except (EOFError, zlib.error, OSError) as error:
        raise InputUnreadable(uri, f"{compression or fmt} data is damaged or cut off ({error})") from error


def file_rows(objects: Iterable[PinnedObject], wanted: Sequence[str]) -> Iterator[Rows]:
    """Objects as rows, one each, in order."""
    todo = iter(objects)
    while found := list(islice(todo, BATCH_ROWS)):
        values: dict[str, Sequence[Any]] = {
            "uri": [each.uri for each in found],
            "name": [each.uri.rpartition("/")[2] for each in found],
            "size": [each.size for each in found],
            "etag": [each.etag for each in found],
        }
        yield Rows(count=len(found), columns={name: values[name] for name in wanted})


def column_types(file: IO[bytes], uri: str) -> dict[str, pa.DataType]:
    """The column types of a Parquet object, from its footer."""
    return {column.name: column.type for column in _parquet_file(file, uri).schema_arrow}


def count_rows(file: IO[bytes], uri: str) -> int:
    """The row count of a Parquet object, from its footer."""
    return int(_parquet_file(file, uri).metadata.num_rows)


def missing_column(uri: str, name: str, known: Sequence[str]) -> InputUnreadable:
    """The error for a column that a whole file lacks."""
    other = next((mark for mark in OTHER_DELIMITERS if len(known) == 1 and mark in known[0]), None)
    hint = f"; are its columns parted by {other!r}, where a comma is expected?" if other else nearest(name, known)
    return InputUnreadable(uri, f"it has no column {name!r}{hint} (columns: {', '.join(known)})")


def _parquet_file(file: IO[bytes], uri: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file, pre_buffer=False, buffer_size=READ_BYTES)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputUnreadable(uri, f"not a whole Parquet file ({str(error).splitlines()[0]})") from error


def _parquet(file: IO[bytes], uri: str, wanted: Sequence[str], batch_rows: int) -> Iterator[Rows]:
    import pyarrow as pa

    parquet = _parquet_file(file, uri)
    known = parquet.schema_arrow.names
    for name in wanted:
        if name not in known:
            raise missing_column(uri, name, known)
        if known.count(name) > 1:
            raise InputUnreadable(uri, f"column {name!r} stands twice in its schema")
    try:
        at_once = rows_that_fit(parquet, wanted, batch_rows, BATCH_BYTES)
        step = at_once if _largest_group(parquet, wanted) <= GROUP_BYTES else min(at_once, STEP_ROWS)
        batches = parquet.iter_batches(step, columns=list(wanted), use_threads=False)
        for batch in batches if step == at_once else _together(batches, at_once):
            arrays = {name: _without_view(batch.column(name)) for name in wanted}
            yield Rows(count=batch.num_rows, columns=_Lists(arrays), arrays=arrays)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputUnreadable(uri, f"a Parquet page is damaged ({str(error).splitlines()[0]})") from error


def rows_that_fit(parquet: Any, wanted: Sequence[str], most: int, most_bytes: int) -> int:
    """How many rows of a Parquet object are read at once: fewer where they are long, one at least.

    By what its columns take in the file, in the row group that has the longest rows; and by some rows as they are read: a text that
    many rows have in common stands in the file once.
    """
    longest = max([1, *(size // max(1, rows) for rows, size in _groups(parquet, wanted))])
    for sample in islice(parquet.iter_batches(SAMPLE_ROWS, columns=list(wanted), use_threads=False), 1):
        longest = max(longest, sample.nbytes // max(1, sample.num_rows))
    return max(1, min(most, most_bytes // longest))


def _groups(parquet: Any, wanted: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The row groups of a Parquet object: how many rows each has, and how many bytes of some columns."""
    metadata = parquet.metadata
    names = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    read = [number for number, path in enumerate(names) if any(path == name or path.startswith(f"{name}.") for name in wanted)]
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        yield group.num_rows, sum(group.column(number).total_uncompressed_size for number in read)


def _largest_group(parquet: Any, wanted: Sequence[str]) -> int:
    return max((size for _, size in _groups(parquet, wanted)), default=0)


def _together(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """Small batches as larger ones, of so many rows, or fewer where they are long."""
    from nightshift.arrow import in_groups

    for table in in_groups(batches, BATCH_BYTES, rows):
        yield from table.combine_chunks().to_batches()


def _without_view(array: pa.Array) -> pa.Array:
    """A column with plain values in place of views, however deep they stand: Arrow can take no rows out of views."""
    plain = _retyped(array.type, _plain_type)
    return array if plain.equals(array.type) else array.cast(plain)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of plain values, where this one is of views."""
    import pyarrow as pa

    if pa.types.is_string_view(kind):
        return pa.string()
    return pa.binary() if pa.types.is_binary_view(kind) else kind


def _retyped(kind: pa.DataType, leaf: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """A type with what `leaf` makes of each type that holds no others, however deep it stands."""
    import pyarrow as pa

    def field(held: pa.Field) -> pa.Field:
        return held.with_type(_retyped(held.type, leaf))

    if pa.types.is_list(kind):
        return pa.list_(field(kind.value_field))
    if pa.types.is_large_list(kind):
        return pa.large_list(field(kind.value_field))
    if pa.types.is_struct(kind):
        return pa.struct([field(held) for held in kind])
    if pa.types.is_map(kind):
        return pa.map_(_retyped(kind.key_type, leaf), field(kind.item_field), kind.keys_sorted)
    return leaf(kind)


class _Lists(Mapping[str, Sequence[Any]]):
    """Columns as Python objects, made of those that are looked at."""

    def __init__(self, arrays: Mapping[str, pa.Array]) -> None:
        self._arrays, self._made = arrays, dict[str, list[Any]]()

    def __getitem__(self, name: str) -> list[Any]:
        if name not in self._made:
            self._made[name] = _to_list(self._arrays[name])
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def _sound(array: pa.Array) -> pa.Array | None:
    """An array, text as `string`, where all of it holds what it says: writers do not always check that text is UTF-8."""
    import pyarrow as pa

    try:
        array.validate(full=True)
        return array.cast(pa.string()) if pa.types.is_large_string(array.type) else array
    except pa.ArrowInvalid:
        return None


def _as_array(values: Sequence[Any]) -> pa.Array | None:
    """Values of one type, and nulls, in the one Arrow type that holds each as it is."""
    import pyarrow as pa

    kinds = set(map(type, values)) - {type(None)}
    if len(kinds) != 1 or (kind := ARROW_TYPES.get(kinds.pop())) is None:
        return None
    try:
        return pa.array(values, kind)
    except (OverflowError, UnicodeEncodeError):  # integers beyond 64 bits, lone surrogates
        return None


def _to_list(column: Any) -> list[Any]:
    """Arrow values as Python objects. What Python cannot hold becomes None: writers do not always check.

    Nanoseconds are cut off. Arrow gives them as objects of pandas where that is loaded, and else not at all: a row would ask
    something else in another process.
    """
    coarser = _retyped(column.type, _in_microseconds)
    if not coarser.equals(column.type):
        column = column.cast(coarser, safe=False)
    try:
        return cast("list[Any]", column.to_pylist())
    except (ValueError, OverflowError):  # text that is not UTF-8; dates beyond what Python holds
        return [_or_none(value) for value in column]


def _in_microseconds(kind: pa.DataType) -> pa.DataType:
    """The type of the same moments in microseconds, where this one counts nanoseconds."""
    import pyarrow as pa

    if not pa.types.is_temporal(kind) or getattr(kind, "unit", None) != "ns":
        return kind
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    return pa.duration("us") if pa.types.is_duration(kind) else pa.time64("us")


def _or_none(value: Any) -> Any:
    try:
        return value.as_py()
    except (ValueError, OverflowError):
        return None


def _unpack(file: IO[bytes], uri: str, compression: Compression | None) -> IO[bytes]:
    import gzip

    import pyarrow as pa

    if compression == "gzip":
        plain: IO[bytes] = cast("IO[bytes]", gzip.GzipFile(fileobj=file, mode="rb"))
    elif compression == "zstd":
        plain = cast("IO[bytes]", io.BufferedReader(cast("Any", _Zstd(pa.CompressedInputStream(pa.PythonFile(file), "zstd"))), 1 << 20))
    else:
        plain = file
    buffered = plain if hasattr(plain, "peek") else io.BufferedReader(cast("Any", plain), 1 << 20)
    start = buffered.peek(4)[:4]
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputUnreadable(uri, "it is UTF-16; write it as UTF-8")
    if start[:4] == b"PAR1":
        raise InputUnreadable(uri, "it is a Parquet file under another name; rename it or set input.format")
    if start[:2] == b"\x1f\x8b":
        raise InputUnreadable(uri, "it is gzip data under another name; name it .gz or set input.compression")
    if start[:3] == b"\xef\xbb\xbf":
        buffered.read(3)
    return buffered


class _Zstd(io.RawIOBase):
    """pyarrow's decompressor as a raw file that notices a stream which breaks off."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self._stream.read(len(view))
        view[: len(data)] = data
        return len(data)


def _lines(file: IO[bytes]) -> Iterator[bytes | Fault]:
    r"""Lines split on `\n` bytes only, without `\n` and `\r\n`; a line over the limit is skipped to its end."""
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            start = line[:RAW_KEPT].decode("utf-8", "replace")
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            yield Fault(f"line longer than {MAX_LINE_BYTES >> 20} MiB", start)
            continue
        yield line.rstrip(b"\n").removesuffix(b"\r")


def _jsonl(file: IO[bytes], wanted: Sequence[str]) -> Iterator[Rows]:
    yield from _in_batches(((_json_row(line), RAW_KEPT if isinstance(line, Fault) else len(line)) for line in _lines(file) if line), wanted)


def _json_row(line: bytes | Fault) -> dict[str, Any] | Fault:
    if isinstance(line, Fault):
        return line
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return Fault(f"not valid JSON: {error.msg}", line[:RAW_KEPT].decode("utf-8", "replace"))
    if not isinstance(row, dict):
        return Fault("not a JSON object", line[:RAW_KEPT].decode("utf-8", "replace"))
    for value in row.values():
        if type(value) is float and not -BEYOND < value < BEYOND:  # it may have been an integer, whose last digits are lost
            return _exact(line)
    return row


def _exact(line: bytes) -> dict[str, Any] | Fault:
    """A row whose integers keep all of their digits, which takes several times as long."""
    try:
        return cast("dict[str, Any]", json.loads(line))
    except ValueError as error:  # more digits than Python reads
        return Fault(f"not valid JSON: {error}", line[:RAW_KEPT].decode("utf-8", "replace"))


def _csv(file: IO[bytes], uri: str, wanted: Sequence[str]) -> Iterator[Rows]:
    csv.field_size_limit(MAX_LINE_BYTES)
    # surrogateescape lets a row with broken bytes be told from its neighbours: it alone is at fault.
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    reader = csv.reader(text, strict=True)
    try:
        header = next(reader, None)
    except csv.Error as error:
        raise InputUnreadable(uri, f"its header is not CSV ({error})") from error
    if header is None:
        return
    header = [name.strip() for name in header]
    for name in wanted:
        if name not in header:
            raise missing_column(uri, name, [ESCAPED_BYTE.sub("\ufffd", each) for each in header])
    doubled = sorted({name for name in header if header.count(name) > 1 and name in wanted})
    if doubled:
        raise InputUnreadable(uri, f"column {doubled[0]!r} stands twice in its header")
    yield from _in_batches(_csv_rows(reader, uri, header), wanted)


def _csv_rows(reader: Any, uri: str, header: list[str]) -> Iterator[Sized]:
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if reader.line_num > line or "end of data" in str(error):
                # A stray quote has swallowed the rows after it: they would be in no count.
                raise InputUnreadable(
                    uri, f"a quote that opens in the row at line {line} does not close where it should ({error})"
                ) from error
            yield Fault(f"not valid CSV: {error}", ""), 0
            continue
        if cells is None:
            return
        if not cells:
            continue  # an empty line
        raw = ",".join(cells)
        if ESCAPED_BYTE.search(raw):
            yield Fault("not valid UTF-8", raw[:RAW_KEPT].encode("utf-8", "replace").decode()), RAW_KEPT
        elif len(cells) != len(header):
            yield Fault(f"{len(cells)} cells where the header has {len(header)}", raw[:RAW_KEPT]), RAW_KEPT
        else:
            yield dict(zip(header, cells, strict=True)), len(raw)


def _in_batches(rows: Iterable[Sized], wanted: Sequence[str]) -> Iterator[Rows]:
    batch, total = list[dict[str, Any] | Fault](), 0
    for row, size in rows:
        batch.append(row)
        total += size
        if len(batch) == BATCH_ROWS or total >= BATCH_BYTES:
            yield _as_rows(batch, wanted)
            batch, total = [], 0
    if batch:
        yield _as_rows(batch, wanted)


def _as_rows(batch: list[dict[str, Any] | Fault], wanted: Sequence[str]) -> Rows:
    faults = {i: row for i, row in enumerate(batch) if isinstance(row, Fault)}
    read = [{} if isinstance(row, Fault) else row for row in batch]
    return Rows(count=len(batch), columns={name: [row.get(name) for row in read] for name in wanted}, faults=faults)
