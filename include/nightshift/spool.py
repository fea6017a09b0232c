"""Rows on their way to a plan: each is encoded once, its request's own bytes go to local disk, its place among the rows to an index.

DuckDB chooses among the requests by key; the lines of those that are sent are put together from the spool afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nightshift.arrow import contents, is_text, row_groups, whole
from nightshift.columns import SCALARS, UNFIT
from nightshift.contract import typed
from nightshift.encode import Encoder, Request, Requests
from nightshift.errors import InputUnreadable, RequestTooLarge
from nightshift.formats import BATCH_ROWS, BEYOND, PICTURE_ROWS, Fault, Rows, column_types, read_rows
from nightshift.job import Job
from nightshift.packing import Lines
from nightshift.pictures import Pictures
from nightshift.providers.protocol import Limits
from nightshift.runs import Site
from nightshift.sampling import only
from nightshift.shapes import PinnedObject
from nightshift.stores.database import literals
from nightshift.stores.shards import KEY_BYTES

if TYPE_CHECKING:
    import duckdb

RowsRead = Callable[[int], None]  # is told how many so far
REQUEST_BYTES = 16 << 20  # of requests that are made at once
RELEASE_BYTES = 32 << 20  # of the spool, after which what malloc has free is returned: long texts leave wide holes
GROUP_ROWS, GROUP_BYTES = 1 << 14, 4 << 20  # of a row index that are written at once
SLICE_ROWS = 1 << 20  # of a row index, about: ten thousand small files would be too many, to join them
SPOOLED = pa.schema(
    [
        ("ordinal", pa.int64()),
        ("id", pa.string()),
        ("key", pa.binary(KEY_BYTES)),
        ("start", pa.int64()),
        ("size", pa.int32()),
        ("weight", pa.int32()),
    ]
)


class Spool:
    """The requests of all rows, in the order of the rows. `load` makes them the view `spool` of a database."""

    def __init__(
        self,
        folder: Path,
        database: duckdb.DuckDBPyConnection,
        job: Job,
        encoder: Encoder,
        limits: Limits,
        *,
        pictures: Pictures | None = None,
        sample: frozenset[int] | None = None,
        progress: RowsRead = lambda rows: None,
    ) -> None:
        self._folder, self._database, self._progress = folder, database, progress
        self._job, self._encoder, self._limits = job, encoder, limits
        self._pictures, self._sample = pictures, sample  # `sample`: the places of the rows that are asked about; None: of all
        self._read = 0  # rows, those that are not in the sample with them
        self.path = folder / "spool"
        self._file = self.path.open("wb", buffering=1 << 20)
        self._end = 0
        self.rows = 0
        self.slices: list[Path] = []
        self._places: list[Path] = []
        self.reasons: Counter[str] = Counter()

    def read(self, site: Site, objects: Sequence[PinnedObject]) -> None:
        """Encode the rows of pinned objects, in order."""
        bucket, key = site.open_input(objects[0].uri)
        with bucket.open(key, etag=objects[0].etag, version=objects[0].version) as file:
            schema = self._schema_of(file, objects[0])
        self._keep((part for pinned in objects for part in self._parts_of(site, pinned, schema)), schema)

    def take(self, batches: Iterable[Rows], schema: pa.Schema) -> None:
        """Encode rows as they come."""
        self._keep(self._encoded(batches, schema), schema)

    def _schema_of(self, file: IO[bytes], pinned: PinnedObject) -> pa.Schema:
        """The columns of a row index over an object."""
        return slice_schema(self._job, column_types(file, pinned.uri) if pinned.format == "parquet" else {})

    def _parts_of(self, site: Site, pinned: PinnedObject, schema: pa.Schema) -> Iterator[_Part]:
        bucket, key = site.open_input(pinned.uri)
        batch_rows = PICTURE_ROWS if self._pictures else BATCH_ROWS  # a column may hold the pictures themselves
        with bucket.open(key, etag=pinned.etag, version=pinned.version) as file:
            if not self._schema_of(file, pinned).equals(schema):
                raise InputUnreadable(pinned.uri, "its kept columns have other types than in the objects before it")
            file.seek(0)
            rows = read_rows(file, pinned.uri, pinned.format, pinned.compression, self._job.columns, batch_rows)
            yield from self._encoded(rows, schema)

    def _keep(self, parts: Iterable[_Part], schema: pa.Schema) -> None:
        """Write the row index, and where requests stand, in slices of so many rows, however many objects they come from; one at least."""
        groups, is_full = _grouped(parts), True
        while is_full:
            name, rows, is_full = f"rows-{len(self.slices):05d}", 0, False
            path, places = self._folder / f"{name}.parquet", self._folder / f"spooled-{name}.parquet"
            with pq.ParquetWriter(path, schema, compression="zstd") as index, _places_writer(places) as spooled:
                for group in groups:
                    index.write_table(pa.Table.from_batches([each.index for each in group], schema=schema))
                    spooled.write_table(pa.Table.from_batches([each.places for each in group], schema=SPOOLED))
                    rows += sum(each.index.num_rows for each in group)
                    if is_full := rows >= SLICE_ROWS:
                        break
            self.slices.append(path)
            self._places.append(places)

    def _encoded(self, batches: Iterable[Rows], schema: pa.Schema) -> Iterator[_Part]:
        released = self._end
        for rows in self._sampled(batches):
            yield self._encode(rows, schema)
            if self._end - released > RELEASE_BYTES:
                pa.default_memory_pool().release_unused()
                released = self._end
            self._progress(self.rows)

    def _sampled(self, batches: Iterable[Rows]) -> Iterator[Rows]:
        for rows in batches:
            for kept in [rows] if self._sample is None else only([rows], self._sample, self._read):
                yield from self._pieces(kept)
            self._read += rows.count

    def _pieces(self, rows: Rows) -> Iterator[Rows]:
        """A batch as it is; in pieces where its requests are long, or show pictures, because those are in memory."""
        longest = self._encoder.constant_bytes + rows.nbytes // max(1, rows.count)
        at_once = PICTURE_ROWS if self._pictures else max(1, REQUEST_BYTES // max(1, longest))
        if rows.count <= at_once:
            yield rows
            return
        for start in range(0, rows.count, at_once):
            yield rows.at(range(start, min(start + at_once, rows.count)))

    def _encode(self, rows: Rows, schema: pa.Schema) -> _Part:
        """Encode a batch of rows, write their requests to the spool, and say where they stand."""
        ids = _ids(rows, self._job.spec.input.id)
        requests, renditions = self._requests(rows, _unasked(rows, ids, self._job.spec.input.id))
        asked = np.ones(rows.count, bool)
        asked[list(requests.refused)] = False
        ends = contents(requests.tails)[1]
        sizes, ordinals = np.diff(ends), np.arange(self.rows, self.rows + rows.count)
        self._check_sizes(sizes + np.int64(self._encoder.line_bytes), ordinals[asked])
        self._file.write(whole(requests.tails))
        places = [ordinals[asked], ids.filter(pa.array(asked)), requests.keys, ends[:-1] + np.int64(self._end), sizes, requests.weights]
        keys = requests.keys if asked.all() else requests.keys.take(pa.array(np.cumsum(asked) - 1, mask=~asked))
        kept = [_kept(self._job, name, rows, renditions.get(name), schema.field(f"keep_{name}").type) for name in self._job.kept]
        self.reasons.update(requests.refused.values())
        self._end += int(sizes.sum())
        self.rows += rows.count
        raws = {i: fault.raw for i, fault in rows.faults.items()}
        index = [ordinals, ids, keys, _some(requests.refused, rows.count), _some(raws, rows.count), *kept]
        return _Part(_batch(index, schema), _batch(places, SPOOLED))

    def _requests(self, rows: Rows, unasked: Mapping[int, str]) -> tuple[Requests, Mapping[str, list[str | None]]]:
        """What is asked about each row; and where the renditions of its picture are."""
        if self._pictures is None:
            return self._encoder.encode(rows, unasked), {}
        renditions: dict[str, list[str | None]] = {each.name: [] for each in self._job.spec.output.renditions}
        names, found, refused = list(rows.columns), list[Request](), dict[int, str]()
        given = (
            Fault(unasked[i], "") if i in unasked else dict(zip(names, values, strict=True))
            for i, values in enumerate(zip(*rows.columns.values(), strict=True))
        )
        for i, (row, shown) in enumerate(self._pictures.of(given)):
            if isinstance(row, Fault) or isinstance(shown, str):
                request: Request | str = row.reason if isinstance(row, Fault) else str(shown)
            else:
                request = self._encoder.show(row, shown.pictures)
            if isinstance(request, str):
                refused[i] = request
            else:
                found.append(request)
            for name, uris in renditions.items():
                uris.append(None if isinstance(shown, str) else shown.renditions.get(name))
        keys, tails = pa.array([each.key for each in found], pa.binary(KEY_BYTES)), pa.array([each.tail for each in found], pa.binary())
        return Requests(refused, keys, tails, np.array([each.weight for each in found], np.int64)), renditions

    def _check_sizes(self, sizes: np.typing.NDArray[np.int64], ordinals: np.typing.NDArray[np.int64]) -> None:
        """Raise RequestTooLarge for the first row whose line no batch could hold."""
        most = self._limits.request_bytes
        if (sizes > most).any():
            worst = int(np.argmax(sizes > most))
            raise RequestTooLarge(int(ordinals[worst]), int(sizes[worst]), most)

    def load(self) -> None:
        """Show the places of all requests to the database. Nothing is taken in after it."""
        self._file.close()
        pa.default_memory_pool().release_unused()  # what reading needed is DuckDB's now
        self._show()

    def _show(self) -> None:
        self._database.execute(f"CREATE OR REPLACE VIEW spool AS SELECT * FROM read_parquet([{literals(self._places)}])")

    @property
    def lines(self) -> Lines:
        """The lines of its requests."""
        return Lines(path=self.path, made=self._encoder.lines, frame=self._encoder.line_bytes)

    def reject_doubled(self) -> int:
        """Of several rows under one id the first stays; the others ask nothing, which is found late. How many they are."""
        if not self._database.execute("SELECT 1 FROM spool GROUP BY id HAVING count(*) > 1 LIMIT 1").fetchall():
            return 0
        is_first = np.zeros(self.rows, bool)  # a byte a row, and only here: DuckDB joins and sorts whole rows in memory
        for batch in self._database.sql("SELECT min(ordinal) FROM spool GROUP BY id").to_arrow_reader(GROUP_ROWS):
            is_first[batch.column(0).to_numpy()] = True
        doubled = sum(self._mark(path, is_first) for path in self.slices)
        self._places = [_with_first(path, is_first) for path in self._places]
        self._show()
        return doubled

    def _mark(self, path: Path, is_first: npt.NDArray[np.bool_]) -> int:
        """Write into a row index which of its rows have the id of a row before them. How many they are."""
        marked, doubled = path.with_suffix(".marked"), 0
        with pq.ParquetFile(path) as index, pq.ParquetWriter(marked, index.schema_arrow, compression="zstd") as writer:
            for rows in row_groups(index):
                is_late = pc.and_(rows.column("request_key").is_valid(), pa.array(~is_first[rows.column("ordinal").to_numpy()]))
                for name, value in (("request_key", None), ("reason", "the id stands twice")):
                    at, field = rows.schema.get_field_index(name), rows.schema.field(name)
                    rows = rows.set_column(at, field, pc.if_else(is_late, pa.scalar(value, field.type), rows.column(at)))
                writer.write_table(rows)
                doubled += pc.sum(is_late).as_py() or 0
        marked.replace(path)
        return doubled


def _places_writer(path: Path) -> pq.ParquetWriter:
    return pq.ParquetWriter(path, SPOOLED, compression="none", use_dictionary=False, write_statistics=False)


def _with_first(path: Path, is_first: npt.NDArray[np.bool_]) -> Path:
    """The places of the requests of rows that are the first under their id."""
    kept = path.with_suffix(".first.parquet")
    with pq.ParquetFile(path) as places, _places_writer(kept) as writer:
        for rows in row_groups(places):
            writer.write_table(rows.filter(pa.array(is_first[rows.column("ordinal").to_numpy()])))
    path.unlink()
    return kept


@dataclass(frozen=True, slots=True)
class _Part:
    """A batch of rows: its part of the row index, and where its requests stand in the spool."""

    index: pa.RecordBatch
    places: pa.RecordBatch


def _grouped(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    """Batches in groups that are worth a write each."""
    group, rows, size = list[_Part](), 0, 0
    for part in parts:
        group.append(part)
        rows, size = rows + part.index.num_rows, size + part.index.nbytes
        if rows >= GROUP_ROWS or size >= GROUP_BYTES:
            yield group
            group, rows, size = [], 0, 0
    if group:
        yield group


def _batch(columns: Iterable[Any], schema: pa.Schema) -> pa.RecordBatch:
    arrays = [
        values if isinstance(values, pa.Array) else pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def slice_schema(job: Job, known: Mapping[str, pa.DataType]) -> pa.Schema:
    """Columns of a row index: the row's place, its id, its request or why it has none, and the columns carried along."""
    declared = {name: SCALARS[requirement.type] for name, requirement in job.spec.input.require.items()}
    kept = [(f"keep_{name}", known.get(name) or declared.get(name) or pa.string()) for name in job.kept]
    fixed = [
        ("ordinal", pa.int64()), ("id", pa.string()), ("request_key", pa.binary(KEY_BYTES)), ("reason", pa.string()), ("raw", pa.string()),
    ]  # fmt: skip
    return pa.schema([*fixed, *kept])


def _ids(rows: Rows, name: str) -> pa.Array:
    """The rows' ids as text; null where there is none."""
    array = rows.array(name)
    if array is not None and (pa.types.is_string(array.type) or pa.types.is_integer(array.type)):
        text = array.cast(pa.string())
        return pc.if_else(pc.equal(text, ""), None, text)
    return pa.array(
        [None if value is None or value == "" or _is_beyond(value) else str(value) for value in rows.columns[name]], pa.string()
    )


def _is_beyond(value: Any) -> bool:
    """Whether a number is beyond what 64 bits hold, as an integer or as the float that it has become."""
    if isinstance(value, float):
        return abs(value) >= BEYOND
    return isinstance(value, int) and abs(value) >= 2**64


def _unasked(rows: Rows, ids: pa.Array, name: str) -> dict[int, str]:
    """Why nothing is asked about a row, whatever its job wants to know, by its place: it cannot be read, or has no id."""
    nameless = np.flatnonzero(ids.is_null().to_numpy(zero_copy_only=False)).tolist()
    why = {i: "the id is beyond 64 bits: write it as text" if _is_beyond(rows.columns[name][i]) else "the id is missing" for i in nameless}
    return why | {i: fault.reason for i, fault in rows.faults.items()}


def _some(values: Mapping[int, str], count: int) -> pa.Array:
    """A column that few rows have a value in, by their places."""
    return pa.array([values.get(i) for i in range(count)], pa.string()) if values else pa.nulls(count, pa.string())


def _kept(job: Job, name: str, rows: Rows, made: Sequence[Any] | None, kind: pa.DataType) -> pa.Array:
    """A column carried along, in its type; a value that does not fit it is null (its row is rejected by the contract)."""
    array = rows.array(name) if made is None else None
    if array is not None and (array.type.equals(kind) or (pa.types.is_string(array.type) and is_text(kind))):
        return array.cast(kind)
    requirement = job.spec.input.require.get(name)
    values = rows.columns[name] if made is None else made
    plain = list(values) if is_text(kind) else [typed(value, requirement) for value in values]
    try:
        return pa.array(plain, kind)
    except UNFIT:
        return pa.array([_fits(value, kind) for value in plain], kind)


def _rounded(value: int) -> float | None:
    try:
        return float(value)
    except OverflowError:
        return None


def _fits(value: Any, kind: pa.DataType) -> Any:
    try:
        return pa.scalar(value, kind).as_py()
    except UNFIT:
        if pa.types.is_floating(kind) and isinstance(value, int):
            return _rounded(value)
        if not is_text(kind):
            return None
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)  # beyond what orjson writes
        return value if isinstance(value, str) else orjson.dumps(value, default=str).decode()
