"""forget: single rows are taken out of everything that is kept for reuse, as if they had never been read."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nightshift.errors import InputMissing, RowInUse
from nightshift.overviews import Comparison
from nightshift.runs import PLAN_STANDS, Site, load_run, run_folder, under_way
from nightshift.shapes import Plan, Summary
from nightshift.stores.shards import answers_key, key_of_line, keys_key, request_keys, requests_key
from nightshift.tidy import Keeps, plan_of, rewrite

STAGED = re.compile(r"/(staged|quarantine)/[^/]+\.parquet$")  # of a run: what it has put together
COMPARED = re.compile(r"/compare-[^/]+\.json$")


@dataclass(frozen=True, slots=True)
class _Read:
    """What a run has read of some ids: which, and the requests that were asked about them."""

    ids: set[str]
    keys: set[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """What a forget did."""

    requests: int
    answers: int  # in the answer store
    published: tuple[str, ...]  # partitions, and pages of `compare`, that still show the rows
    unknown: tuple[str, ...]  # ids that no run has read


def forget(site: Site, job: str, ids: Collection[str]) -> Forgotten:
    """Take the requests and answers of some rows out of everything that is kept for reuse; asked again, they are bought again.

    Published partitions and comparisons are the users' data and stay as they are: they are named. Raises InputMissing where no run of the
    job has read such a row, and RowInUse where a run that has read one is under way, or has put it together and not published it.
    """
    plans = {folder: plan for folder in site.store.folders(f"runs/{job}") if (plan := plan_of(site, folder))}
    read = {folder: found for folder, plan in plans.items() if (found := _read_by(site, plan, ids)).ids}
    if not read:
        why = f"no run has read {', '.join(sorted(ids))}"
        raise InputMissing(site.store.uri_of(f"runs/{job}"), why, "An id is taken as it stands in the input.")
    keys = {key for found in read.values() for key in found.keys}
    mask, fingerprints = pa.array(sorted(keys), pa.binary(32)), dict.fromkeys(plan.fingerprint for plan in plans.values())
    for folder in _ongoing(site, read):
        if folder in read or _asks(site, folder, fingerprints, mask):
            raise RowInUse(site.store.uri_of(folder))
    shards = [shard for shard in dict.fromkeys(shard for plan in plans.values() for shard in plan.shards) if _holds(site, shard, keys)]
    answers = 0
    for fingerprint in fingerprints:
        for file in site.answers(fingerprint).files():
            answers += rewrite(site, file, lambda table: pc.invert(pc.is_in(table.column("request_key"), mask)))
    for shard in shards:
        _strike(site, shard, keys)
    names = {load_run(site.store, site.store.uri_of(folder)).job.spec.input.id for folder in read}
    shows = _shown_in(keys, ids, names)
    for folder in read:
        for file in [each.key for each in site.store.scan(folder) if STAGED.search(each.key)]:
            rewrite(site, file, lambda table: pc.invert(shows(table)), keep_empty=True)
    return Forgotten(
        requests=len(keys),
        answers=answers,
        published=(*_showing(site, job, shows, names), *_compared(site, job, read)),
        unknown=tuple(sorted(set(ids).difference(*(found.ids for found in read.values())))),
    )


def _ongoing(site: Site, read: Collection[str]) -> Iterator[str]:
    """The runs of all jobs that are under way, and those of `read` that may still publish; not what has failed some days ago."""
    for folder in (*under_way(site.store, "runs", site.now() - PLAN_STANDS), *_unpublished(site, read)):
        summary = site.store.get_shape(f"{folder}/summary.json", Summary)
        if summary is None or summary.state != "failed" or site.now() - summary.finished_at <= PLAN_STANDS:
            yield folder


def _asks(site: Site, folder: str, fingerprints: Collection[str], mask: pa.Array) -> bool:
    """Whether a run, also of another job that asks the same way, counts on the answer to one of some requests."""
    plan = plan_of(site, folder)
    files = plan.slices if plan and plan.fingerprint in fingerprints else ()
    parquets = (pq.ParquetFile(site.store.open(file)) for file in files if site.store.head(file) is not None)
    batches = (batch for parquet in parquets for batch in parquet.iter_batches(columns=["request_key"], use_threads=False))
    return any(pc.any(pc.is_in(batch.column(0), mask)).as_py() for batch in batches)


def _unpublished(site: Site, runs: Iterable[str]) -> Iterator[str]:
    """The runs that have put their rows together, and may still publish them: those that were held do not."""
    for folder in runs:
        summary = site.store.get_shape(f"{folder}/summary.json", Summary)
        if site.store.head(f"{folder}/assembled.json") and (summary is None or summary.state == "failed"):
            yield folder


def _shown_in(keys: Collection[bytes], ids: Collection[str], names: Collection[str]) -> Keeps:
    """A function: rows as they are published → which of them show some requests, or have some ids. `names`: what ids are called."""
    hexed, wanted = pa.array(sorted(key.hex() for key in keys), pa.string()), pa.array(sorted(ids), pa.string())

    def shows(rows: pa.Table | pa.RecordBatch) -> Any:
        found = pc.is_in(rows.column("_request_key"), hexed)
        for name in set(names).intersection(rows.schema.names):
            values = rows.column(name)
            if not pa.types.is_nested(values.type):
                found = pc.or_(found, pc.is_in(values.cast(pa.string()), wanted))
        return found

    return shows


def _compared(site: Site, job: str, runs: Collection[str]) -> Iterator[str]:
    """The pages that compare one of some runs with another."""
    for found in site.store.scan(f"samples/{job}"):
        is_one = COMPARED.search(found.key)
        comparison = site.store.get_shape(found.key, Comparison) if is_one else None
        if comparison and not {run_folder(job, side.run) for side in (comparison.old, comparison.new)}.isdisjoint(runs):
            yield comparison.page


def _read_by(site: Site, plan: Plan, ids: Collection[str]) -> _Read:
    """What a run has read of some ids. An id that stands twice has one request, and is rejected where it stands again."""
    found, wanted = _Read(set(), set()), pa.array(sorted(ids), pa.string())
    for file in plan.slices:
        if site.store.head(file) is not None:
            for batch in pq.ParquetFile(site.store.open(file)).iter_batches(columns=["id", "request_key"], use_threads=False):
                rows = batch.filter(pc.is_in(batch.column("id"), wanted))
                found.ids.update(rows.column("id").to_pylist())
                found.keys.update(rows.column("request_key").drop_null().to_pylist())
    return found


def _showing(site: Site, job: str, shows: Keeps, names: Collection[str]) -> tuple[str, ...]:
    """The partitions of a job that show some rows. `names`: of the columns that tell, beside the key."""
    found = [found.key for root in ("results", "quarantine", "samples") for found in site.store.scan(f"{root}/{job}")]
    shown = []
    for key in found:
        if key.endswith(".parquet"):
            parquet = pq.ParquetFile(site.store.open(key))
            columns = [name for name in parquet.schema_arrow.names if name in {"_request_key", *names}]
            if any(pc.any(shows(rows)).as_py() for rows in parquet.iter_batches(columns=columns, use_threads=False)):
                shown.append(site.store.uri_of(key.rpartition("/")[0]))
    return tuple(dict.fromkeys(shown))


def _holds(site: Site, shard: str, keys: set[bytes]) -> bool:
    return site.store.head(keys_key(shard)) is not None and not keys.isdisjoint(request_keys(site.store, shard))


def _strike(site: Site, shard: str, keys: set[bytes]) -> None:
    """Take requests out of a shard: what every attempt answered, then their lines, and last their keys, by which they are found."""
    mask = pa.array(sorted(keys), pa.binary(32))

    def keeps(answers: pa.Table) -> Any:
        return pc.invert(pc.is_in(answers.column("request_key"), mask))

    for number in range(len(site.ledger.attempts(shard)) + 1):
        if site.store.head(answers_key(shard, number)) is not None:
            rewrite(site, answers_key(shard, number), keeps, keep_empty=True)
    with site.scratch() as scratch:
        lines, kept = site.store.download(requests_key(shard), Path(scratch) / "before.jsonl"), Path(scratch) / "after.jsonl"
        with lines.open("rb") as source, kept.open("wb") as target:
            target.writelines(line for line in source if key_of_line(line) not in keys)
        left = [key for key in request_keys(site.store, shard) if key not in keys]
        site.store.put(requests_key(shard), kept)
        site.store.put(keys_key(shard), b"".join(left))
