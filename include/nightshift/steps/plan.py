"""plan: rows to requests, duplicates collapsed, paid answers reused, the rest packed into shards. Sends nothing.

Rows stream once: each is rendered, hashed and written to a local spool; DuckDB (spilling to disk) decides in SQL which
requests are new; their lines are then copied from the spool into shards. Memory is bounded whatever the rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from nightshift.contract import typed
from nightshift.encode import Encoder, Request
from nightshift.errors import InputUnreadable, RequestTooLarge
from nightshift.formats import BATCH_ROWS, PICTURE_ROWS, Fault, Rows, column_types, file_rows, read_rows
from nightshift.job import Job
from nightshift.money.estimate import estimate_requests, measured_before
from nightshift.packing import ANSWERED, IN_FLIGHT, REQUESTS, estimate_shards, freeze, groups, mark_answered, mark_in_flight
from nightshift.pictures import Pictures
from nightshift.providers.protocol import Limits
from nightshift.redrive import draft_redrive
from nightshift.runs import Run, Site, salt_of
from nightshift.sampling import choose, only
from nightshift.shapes import PinnedObject, Plan
from nightshift.stores.answers import seen
from nightshift.stores.database import open_database

if TYPE_CHECKING:
    import duckdb

DECLARED = {"string": pa.string(), "integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_()}
SPOOLED = pa.schema(
    [
        ("ordinal", pa.int64()),
        ("id", pa.string()),
        ("key", pa.binary(32)),
        ("start", pa.int64()),
        ("size", pa.int32()),
        ("weight", pa.int32()),
    ]
)

Progress = Callable[[int], None]  # rows read so far


def plan(site: Site, run: Run, *, progress: Progress = lambda rows: None) -> Plan:
    """The run's plan, made once: a repeated call finds the first. Writes row indexes and frozen shards, sends nothing."""
    key = run.key("plan.json")
    stored = site.store.get_shape(key, Plan)
    if stored is not None:
        return stored
    drafted = draft_redrive(site, run) if run.input.redrive else draft(site, run, keep=True, progress=progress)
    return site.store.settle(key, drafted)


def draft(site: Site, run: Run, *, keep: bool, progress: Progress = lambda rows: None) -> Plan:
    """A plan. With `keep` its row indexes and shards are written to the store, without it nothing is."""
    job, encoder, limits = run.job, Encoder(run.job), site.limits(run.job)
    files_as_rows = run.input.objects if job.spec.input.format == "files" else ()
    with ExitStack() as stack, site.scratch() as folder, open_database(Path(folder)) as database:
        pictures = stack.enter_context(Pictures(site, job, files_as_rows, keep=keep)) if job.spec.request.images else None
        sample = None if run.input.sample is None else choose(_ids(site, run), run.input.sample)
        spool = _Spool(Path(folder), database, encoder, limits, pictures, sample, progress)
        if files_as_rows:
            spool.take(job, file_rows(files_as_rows, job.columns), "rows-00000", _slice_schema(job, {"size": pa.int64()}))
        else:
            for index, pinned in enumerate(run.input.objects):
                spool.read(site, job, pinned, f"rows-{index:05d}")
        doubled = _reject_doubled_ids(database)
        if doubled:
            spool.mark_doubled()
        _collapse(database)
        answers = site.answers(encoder.fingerprint)
        in_flight = answers.in_flight(answers.reservations()[0])  # before the files: what settles meanwhile is then found among those
        files = answers.files()
        reused_files = [] if run.input.fresh else mark_answered(database, answers, files, job.spec.stand_ins)
        adopted_shards = [] if run.input.fresh else mark_in_flight(site, database, in_flight)
        shards = [
            freeze(site, job.spec.request, encoder.fingerprint, spool.path, group, least=limits.least, salt=salt_of(run), keep=keep)
            for group in groups(database, job.spec.policy, limits)
        ]
        slices = [run.key(f"slices/{path.name}") for path in spool.slices]
        if keep:
            for slice_key, path in zip(slices, spool.slices, strict=True):
                site.store.put(slice_key, path)
        counted = _counts(database)
        reasons = spool.reasons + (Counter({"the id stands twice": doubled}) if doubled else Counter())
        return Plan(
            fingerprint=encoder.fingerprint,
            rows=spool.rows,
            rejected=sum(reasons.values()),
            reasons=dict(reasons.most_common()),
            unique=counted["unique"],
            duplicates=counted["asked"] - counted["unique"],
            reused=counted["reused"],
            adopted=counted["adopted"],
            submitted=counted["new"],
            shards=(*(shard.key for shard in shards), *adopted_shards),
            adopted_shards=tuple(adopted_shards),
            answers=tuple(reused_files),
            slices=tuple(slices),
            estimate=estimate_shards(site.store, job, shards),
            saved_usd=_saved(site, job, counted),
            seen=seen(files, in_flight),
        )


def _ids(site: Site, run: Run) -> Iterator[Sequence[Any]]:
    """The ids of all rows of a run, in batches, in order; of a row without one, what stands there."""
    job, name = run.job, run.job.spec.input.id
    if job.spec.input.format == "files":
        yield from (rows.columns[name] for rows in file_rows(run.input.objects, (name,)))
        return
    for pinned in run.input.objects:
        bucket, key = site.open_input(pinned.uri)
        with bucket.open(key, etag=pinned.etag, version=pinned.version) as file:
            for rows in read_rows(file, pinned.uri, pinned.format, pinned.compression, (name,)):
                yield [rows.faults[i].raw if i in rows.faults else value for i, value in enumerate(rows.columns[name])]


class _Place(NamedTuple):
    """Where a row's request stands in the spool, or why it has none."""

    key: bytes | None
    reason: str | None
    start: int
    size: int  # bytes, with the newline
    weight: int


class _Spool:
    """Lines of every request on local disk, and what DuckDB needs to choose among them."""

    def __init__(
        self,
        folder: Path,
        database: duckdb.DuckDBPyConnection,
        encoder: Encoder,
        limits: Limits,
        pictures: Pictures | None,
        sample: frozenset[int] | None,
        progress: Progress,
    ) -> None:
        self._folder, self._database, self._encoder, self._limits, self._progress = folder, database, encoder, limits, progress
        self._pictures, self._sample = pictures, sample  # `sample`: the places of the rows that are asked about; None: of all
        self._read = 0  # rows, those that are not in the sample with them
        self.path = folder / "spool.jsonl"
        self._file = self.path.open("wb", buffering=1 << 20)
        self._end = 0
        self.rows = 0
        self.slices: list[Path] = []
        self._schema: pa.Schema | None = None
        self.reasons: Counter[str] = Counter()
        database.execute("CREATE TABLE spool (ordinal BIGINT, id VARCHAR, key BLOB, start BIGINT, size INTEGER, weight INTEGER)")

    def read(self, site: Site, job: Job, pinned: PinnedObject, name: str) -> None:
        """Encode the rows of one pinned object; its row index becomes one slice."""
        bucket, key = site.open_input(pinned.uri)
        with bucket.open(key, etag=pinned.etag, version=pinned.version) as file:
            schema = _slice_schema(job, column_types(file, pinned.uri) if pinned.format == "parquet" else {})
            if self._schema is not None and not self._schema.equals(schema):
                raise InputUnreadable(pinned.uri, "its kept columns have other types than in the objects before it")
            self._schema = schema
            file.seek(0)
            batch_rows = PICTURE_ROWS if self._pictures else BATCH_ROWS
            self.take(job, read_rows(file, pinned.uri, pinned.format, pinned.compression, job.columns, batch_rows), name, schema)

    def take(self, job: Job, batches: Iterable[Rows], name: str, schema: pa.Schema) -> None:
        """Encode rows; their row index becomes one slice."""
        path = self._folder / f"{name}.parquet"
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for rows in self._sampled(batches):
                self._encode(job, rows, writer, schema)
                self._progress(self.rows)
        self._file.flush()
        self.slices.append(path)

    def _sampled(self, batches: Iterable[Rows]) -> Iterator[Rows]:
        for rows in batches:
            yield from [rows] if self._sample is None else only([rows], self._sample, self._read)
            self._read += rows.count

    def _encode(self, job: Job, rows: Rows, writer: pq.ParquetWriter, schema: pa.Schema) -> None:
        ids = [_as_id(value) for value in rows.columns[job.spec.input.id]]
        places: list[_Place] = []
        renditions: dict[str, list[str | None]] = {each.name: [] for each in job.spec.output.renditions}
        for row_id, (request, made) in zip(ids, self._requests(rows), strict=True):
            places.append(self._place("the id is missing" if row_id is None and isinstance(request, Request) else request, len(places)))
            for rendition, uris in renditions.items():
                uris.append(made.get(rendition))
        keys, reasons, starts, sizes, weights = map(list, zip(*places, strict=True)) if places else ([], [], [], [], [])
        self.reasons.update(place.reason for place in places if place.reason is not None)
        ordinals = range(self.rows, self.rows + rows.count)
        raws = [rows.faults[i].raw if i in rows.faults else None for i in range(rows.count)]
        columns = {**rows.columns, **renditions}
        kept = [_kept(job, name, columns[name], schema.field(f"keep_{name}").type) for name in job.kept]
        values = [ordinals, ids, keys, reasons, raws]
        arrays = [pa.array(value, field.type) for value, field in zip(values, schema, strict=False)]
        writer.write_batch(pa.RecordBatch.from_arrays([*arrays, *kept], schema=schema))
        spooled = [ordinals, ids, keys, starts, sizes, weights]
        batch = pa.Table.from_arrays([pa.array(value, field.type) for value, field in zip(spooled, SPOOLED, strict=True)], schema=SPOOLED)
        self._database.execute("INSERT INTO spool SELECT * FROM batch")  # DuckDB finds it by its name in this scope
        del batch
        self.rows += rows.count

    def _place(self, request: Request | str, position: int) -> _Place:
        """Write a request's line into the spool; where it stands, or why it has none. `position`: in the batch of rows."""
        if isinstance(request, str):
            return _Place(None, request, 0, 0, 0)
        line = self._encoder.form.line(request.key.hex(), request.body)
        self._file.write(line)
        self._file.write(b"\n")
        size, start = len(line) + 1, self._end
        if size > self._limits.request_bytes:
            raise RequestTooLarge(self.rows + position, size, self._limits.request_bytes)
        self._end += size
        return _Place(request.key, None, start, size, size - len(request.body) + request.weight)

    def _requests(self, rows: Rows) -> Iterator[tuple[Request | str, Mapping[str, str]]]:
        """What is asked about each row, or why nothing is; and where the renditions of its picture are."""
        names, faults, encode = list(rows.columns), rows.faults, self._encoder.encode
        found = (
            faults.get(i) or dict(zip(names, values, strict=True)) for i, values in enumerate(zip(*rows.columns.values(), strict=True))
        )
        if self._pictures is None:
            yield from ((row.reason if isinstance(row, Fault) else encode(row), {}) for row in found)
            return
        for row, shown in self._pictures.of(found):
            if isinstance(row, Fault):
                yield row.reason, {}
            else:
                yield (shown, {}) if isinstance(shown, str) else (encode(row, shown.pictures), shown.renditions)

    def mark_doubled(self) -> None:
        """Write the late discovery that an id stands twice into the row indexes."""
        for path in self.slices:
            marked = path.with_suffix(".marked")
            self._database.execute(
                f"""COPY (SELECT s.* REPLACE (CASE WHEN d.ordinal IS NULL THEN s.request_key END AS request_key,
                                              CASE WHEN d.ordinal IS NULL THEN s.reason ELSE 'the id stands twice' END AS reason)
                          FROM read_parquet('{path}') s LEFT JOIN doubled d USING (ordinal) ORDER BY s.ordinal)
                    TO '{marked}' (FORMAT parquet, COMPRESSION zstd)"""
            )
            marked.replace(path)


def _slice_schema(job: Job, known: Mapping[str, pa.DataType]) -> pa.Schema:
    """Columns of a row index: the row's place, its id, its request or why it has none, and the columns carried along."""
    declared = {name: DECLARED[requirement.type] for name, requirement in job.spec.input.require.items()}
    kept = [(f"keep_{name}", known.get(name) or declared.get(name) or pa.string()) for name in job.kept]
    fixed = [("ordinal", pa.int64()), ("id", pa.string()), ("request_key", pa.binary(32)), ("reason", pa.string()), ("raw", pa.string())]
    return pa.schema([*fixed, *kept])


def _kept(job: Job, name: str, values: Iterable[Any], kind: pa.DataType) -> pa.Array:
    """A column carried along, in its type; a value that does not fit it is null (its row is rejected by the contract)."""
    requirement = job.spec.input.require.get(name)
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    plain = list(values) if text else [typed(value, requirement) for value in values]
    try:
        return pa.array(plain, kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([_fits(value, kind) for value in plain], kind)


def _fits(value: Any, kind: pa.DataType) -> Any:
    try:
        return pa.scalar(value, kind).as_py()
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        if not pa.types.is_string(kind) and not pa.types.is_large_string(kind):
            return None
        return value if isinstance(value, str) else orjson.dumps(value, default=str).decode()


def _as_id(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


def _reject_doubled_ids(database: duckdb.DuckDBPyConnection) -> int:
    """Of several rows under one id the first stays; the count of the others."""
    database.execute(
        """CREATE TABLE doubled AS SELECT ordinal FROM (
             SELECT ordinal, row_number() OVER (PARTITION BY id ORDER BY ordinal) AS nth FROM spool WHERE key IS NOT NULL) WHERE nth > 1"""
    )
    database.execute("UPDATE spool SET key = NULL WHERE ordinal IN (SELECT ordinal FROM doubled)")
    return _one(database, "SELECT count(*) FROM doubled")


def _collapse(database: duckdb.DuckDBPyConnection) -> None:
    """Rows that ask the same become one request, which stands where its first row stands."""
    database.execute(f"CREATE TABLE requests {REQUESTS}")
    database.execute(
        """INSERT INTO requests SELECT key, min(ordinal), arg_min(start, ordinal), arg_min(size, ordinal), arg_min(weight, ordinal), NULL
           FROM spool WHERE key IS NOT NULL GROUP BY key"""
    )


def _counts(database: duckdb.DuckDBPyConnection) -> dict[str, int]:
    [(asked, asked_bytes)] = database.execute(
        "SELECT count(*), coalesce(sum(weight), 0)::BIGINT FROM spool WHERE key IS NOT NULL"
    ).fetchall()
    found = database.execute("SELECT coalesce(known, 'new'), count(*), sum(weight)::BIGINT FROM requests GROUP BY 1").fetchall()
    by = {word: (count, size) for word, count, size in found}
    return {
        "asked": asked,
        "asked_bytes": asked_bytes,
        "unique": sum(count for count, _ in by.values()),
        "reused": by.get(ANSWERED, (0, 0))[0],
        "adopted": by.get(IN_FLIGHT, (0, 0))[0],
        "new": by.get("new", (0, 0))[0],
        "new_bytes": by.get("new", (0, 0))[1],
    }


def _saved(site: Site, job: Job, counted: dict[str, int]) -> Decimal | None:
    """What the rows that cost nothing would have cost: duplicates, reused and adopted requests."""
    count, size = counted["asked"] - counted["new"], counted["asked_bytes"] - counted["new_bytes"]
    return estimate_requests(job, count, size, measured=measured_before(site.store, job)).usd


def _one(database: duckdb.DuckDBPyConnection, query: str) -> int:
    return int(database.execute(query).fetchall()[0][0])
