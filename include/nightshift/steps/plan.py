"""plan: rows to requests, duplicates collapsed, paid answers reused, the rest packed into shards. Sends nothing.

Rows stream once: each is rendered, hashed and written to a local spool; DuckDB (spilling to disk) decides in SQL which
requests are new; their lines are then put together from the spool, as they are stored. Memory is bounded whatever the rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from nightshift.arrow import keep_freed_memory
from nightshift.encode import Encoder
from nightshift.formats import file_rows, read_rows
from nightshift.job import Job
from nightshift.money.estimate import estimate_requests, measured_before
from nightshift.packing import ANSWERED, IN_FLIGHT, REQUESTS, estimate_shards, freeze, groups, mark_answered, mark_in_flight
from nightshift.pictures import Pictures
from nightshift.redrive import draft_redrive
from nightshift.runs import Run, Site, salt_of
from nightshift.sampling import choose
from nightshift.shapes import Plan
from nightshift.spool import RowsRead, Spool, slice_schema
from nightshift.stores.answers import seen
from nightshift.stores.database import open_database

if TYPE_CHECKING:
    import duckdb


PLAN_MEMORY = "40MB"


def plan(site: Site, run: Run, *, progress: RowsRead = lambda rows: None) -> Plan:
    """The run's plan, made once: a repeated call finds the first. Writes row indexes and frozen shards, sends nothing."""
    key = run.key("plan.json")
    stored = site.store.get_shape(key, Plan)
    if stored is not None:
        return stored
    drafted = draft_redrive(site, run) if run.input.redrive else draft(site, run, keep=True, progress=progress)
    return site.store.settle(key, drafted)


def draft(site: Site, run: Run, *, keep: bool, progress: RowsRead = lambda rows: None) -> Plan:
    """A plan. With `keep` its row indexes and shards are written to the store, without it nothing is."""
    keep_freed_memory()
    job, encoder, limits = run.job, Encoder(run.job), site.limits(run.job)
    files_as_rows = run.input.objects if job.spec.input.format == "files" else ()
    with ExitStack() as stack, site.scratch() as folder, open_database(Path(folder), PLAN_MEMORY) as database:
        pictures = stack.enter_context(Pictures(site, job, files_as_rows, keep=keep)) if job.spec.request.images else None
        sample = None if run.input.sample is None else choose(_ids(site, run), run.input.sample)
        spool = Spool(Path(folder), database, job, encoder, limits, pictures=pictures, sample=sample, progress=progress)
        if files_as_rows:
            spool.take(file_rows(files_as_rows, job.columns), slice_schema(job, {"size": pa.int64()}))
        else:
            spool.read(site, run.input.objects)
        spool.load()
        doubled = spool.reject_doubled()
        _collapse(database)
        answers = site.answers(encoder.fingerprint)
        in_flight = answers.in_flight(answers.reservations()[0])  # before the files: what settles meanwhile is then found among those
        files = answers.files()
        reused_files = [] if run.input.fresh else mark_answered(database, answers, files, job.spec.stand_ins)
        adopted_shards = [] if run.input.fresh else mark_in_flight(site, database, in_flight)
        shards = [
            freeze(site, job.spec.request, encoder.fingerprint, spool.lines, group, least=limits.least, salt=salt_of(run), keep=keep)
            for group in groups(database, job.spec.policy, limits, spool.lines)
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
            since=run.input.started_at.replace(microsecond=0) if run.input.fresh else None,  # providers' clocks count seconds
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


def _collapse(database: duckdb.DuckDBPyConnection) -> None:
    """Rows that ask the same become one request, which stands where its first row stands."""
    database.execute(f"CREATE TABLE requests {REQUESTS}")
    database.execute("INSERT INTO requests SELECT key, min(start), any_value(size), any_value(weight), NULL FROM spool GROUP BY key")


def _counts(database: duckdb.DuckDBPyConnection) -> dict[str, int]:
    [(asked, asked_bytes)] = database.execute("SELECT count(*), coalesce(sum(weight), 0)::BIGINT FROM spool").fetchall()
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
