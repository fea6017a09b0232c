"""tidy and forget: what becomes of answers in time.

Answers are kept for ever unless somebody says otherwise. Every settled shard leaves a file, so `tidy` merges small ones
where there are many, and drops what is older than the store is to keep; `forget` takes single rows out of everything that
is kept for reuse. Both may run beside anything else: what a run has planned to reuse is found where it was merged into.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nightshift.arrow import row_groups
from nightshift.columns import kept_lines, vector_length, write_answers
from nightshift.errors import InputMissing, RowInUse
from nightshift.overviews import Comparison
from nightshift.runs import PLAN_STANDS, Site, run_folder, under_way, work_of
from nightshift.shapes import Plan
from nightshift.stores.answers import LAST_WORD, MERGED, is_merged, placed
from nightshift.stores.database import open_database
from nightshift.stores.objects import Found
from nightshift.stores.shards import answers_key, key_of_line, keys_key, request_keys, requests_key

if TYPE_CHECKING:
    import duckdb

MERGE_AT = 8  # files of one fingerprint
MERGE_BELOW = 128 << 20  # bytes: a larger file stays as it is
PLACES_AT_ONCE = 1 << 14
GRACE = timedelta(days=1)  # between a merge and the removal of what was merged: runs under way still read it
BULK = re.compile(r"/(requests\.(jsonl|keys)|answers-\d+\.parquet|(slices|staged|quarantine)/[^/]+)$")  # what is large in a folder
STAGED = re.compile(r"/(staged|quarantine)/[^/]+\.parquet$")  # of a run: what it has put together
COMPARED = re.compile(r"/compare-[^/]+\.json$")
SOURCES = b"nightshift.sources"  # the merged files' names, in the metadata of the file that they were merged into

Keeps = Callable[[pa.Table], Any]  # the lines of a table that stay, as a mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Tidied:
    """What a tidy did."""

    merged: int  # answers files that were merged
    removed: int  # answers files that were merged earlier, and are gone now
    dropped: int  # answers older than what is kept
    emptied: int  # shards and runs whose bulk is older than what is kept; their small facts stay


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgotten:
    """What a forget did."""

    requests: int
    answers: int  # in the answer store
    published: tuple[str, ...]  # partitions, and pages of `compare`, that still show the rows
    unknown: tuple[str, ...]  # ids that no run has read


def tidy(site: Site, *, keep: timedelta | None) -> Tidied:
    """Merge small answers files; with `keep`, drop answers and bulk that are older. Facts, plans and reports always stay."""
    cutoff = None if keep is None else site.now() - keep
    merged = removed = dropped = 0
    needed = _needed(site) if keep is not None else frozenset[str]()
    for folder in site.store.folders("answers"):
        files = [found for found in site.store.scan(folder) if found.key.endswith(".parquet")]
        sources = _sources(site, files)
        old = [key for key, since in sources.items() if site.now().timestamp() - since > GRACE.total_seconds()]
        site.store.delete(old)
        current = [found for found in files if found.key not in sources]
        small = [found.key for found in current if found.size < MERGE_BELOW]
        if len(small) >= MERGE_AT and not _holds_vectors(site, small[0]):  # they are large, and read one by one
            _merge(site, folder, small)
            merged += len(small)
        if cutoff is not None:
            dropped += sum(_drop_older(site, found.key, cutoff) for found in files if found.key not in {*old, *needed})
        removed += len(old)
    emptied = 0 if cutoff is None else _empty_older(site, cutoff, needed)
    if cutoff is not None:
        _drop_work(site, cutoff)
    return Tidied(merged=merged, removed=removed, dropped=dropped, emptied=emptied)


def _drop_work(site: Site, cutoff: datetime) -> None:
    """Drop what attempts have left beside their shards, but not what a shard that is not settled still counts on."""
    old = {
        folder: found for top in ("live", "bedrock") for folder in site.store.folders(top) if (found := _all_older(site, folder, cutoff))
    }
    if not old:
        return
    needed = set()
    for folder in site.store.folders("shards"):
        shard = folder.rpartition("/")[2]
        is_planned = site.store.head(f"{folder}/shard.json") is not None  # what others have claimed here is never settled
        if is_planned and site.ledger.settled(shard) is None:
            for attempt in site.ledger.attempts(shard):
                needed |= {f"bedrock/{attempt.claim.token}", f"live/{work_of(shard, attempt.claim)}"}
    for folder, keys in old.items():
        if folder not in needed:
            site.store.delete(keys)


def _holds_vectors(site: Site, file: str) -> bool:
    return vector_length(pq.read_schema(site.store.open(file))) is not None


def _all_older(site: Site, folder: str, cutoff: datetime) -> list[str]:
    """The keys in a folder, where none of its objects is younger."""
    found = list(site.store.scan(folder))
    return [each.key for each in found] if all(each.modified < cutoff.timestamp() for each in found) else []


def forget(site: Site, job: str, ids: Collection[str]) -> Forgotten:
    """Take the requests and answers of some rows out of everything that is kept for reuse; asked again, they are bought again.

    Published partitions and comparisons are the users' data and stay as they are: they are named. Raises InputMissing where no run of the
    job has read such a row, and RowInUse where a run that has read one is under way.
    """
    plans = {folder: plan for folder in site.store.folders(f"runs/{job}") if (plan := _plan(site, folder))}
    read = {folder: _requests_of(site, plan, ids) for folder, plan in plans.items()}
    asked = [folder for folder, found in read.items() if any(found.values())]
    keys = {key for found in read.values() for key in found.values() if key}
    if not keys:
        why = f"no run has asked anything about {', '.join(sorted(ids))}"
        raise InputMissing(site.store.uri_of(f"runs/{job}"), why, "An id is taken as it stands in the input.")
    for folder in under_way(site.store, f"runs/{job}", site.now() - PLAN_STANDS):
        if folder in asked:
            raise RowInUse(site.store.uri_of(folder))
    shards = [shard for shard in dict.fromkeys(shard for plan in plans.values() for shard in plan.shards) if _holds(site, shard, keys)]
    answers, mask = 0, pa.array(sorted(keys), pa.binary(32))
    for fingerprint in dict.fromkeys(plan.fingerprint for plan in plans.values()):
        for file in site.answers(fingerprint).files():
            answers += _rewrite(site, file, lambda table: pc.invert(pc.is_in(table.column("request_key"), mask)))
    for shard in shards:
        _strike(site, shard, keys)
    hexed = pa.array(sorted(key.hex() for key in keys), pa.string())
    for file in _staged(site, asked):
        _rewrite(site, file, lambda table: pc.invert(pc.is_in(table.column("_request_key"), hexed)))
    return Forgotten(
        requests=len(keys),
        answers=answers,
        published=(*_showing(site, job, hexed), *_compared(site, job, asked)),
        unknown=tuple(sorted(set(ids).difference(*read.values()))),
    )


def _staged(site: Site, runs: Iterable[str]) -> Iterator[str]:
    """What runs have put together before it was published."""
    for folder in runs:
        yield from (each.key for each in site.store.scan(folder) if STAGED.search(each.key))


def _compared(site: Site, job: str, runs: Collection[str]) -> Iterator[str]:
    """The pages that compare one of some runs with another."""
    for found in site.store.scan(f"samples/{job}"):
        is_one = COMPARED.search(found.key)
        comparison = site.store.get_shape(found.key, Comparison) if is_one else None
        if comparison and not {run_folder(job, side.run) for side in (comparison.old, comparison.new)}.isdisjoint(runs):
            yield comparison.page


def _needed(site: Site) -> frozenset[str]:
    """What runs under way count on: answers files, and the folders of their row indexes, which may be those of an earlier run."""
    needed: set[str] = set()
    for folder in under_way(site.store, "runs", site.now() - PLAN_STANDS, refused=True):
        if plan := _plan(site, folder):
            answers = site.answers(plan.fingerprint)
            needed.update(answers.kept([*plan.answers, *map(answers.file_of, plan.shards)]))
            needed.update(key.rpartition("/slices/")[0] for key in plan.slices)
    return frozenset(needed)


def _sources(site: Site, files: Iterable[Found]) -> dict[str, float]:
    """The files that were merged into another one, and since when."""
    sources: dict[str, float] = {}
    for found in files:
        if is_merged(found.key):
            with site.store.open(found.key) as file:
                metadata = pq.read_metadata(file).metadata or {}
            sources.update(dict.fromkeys(json.loads(metadata.get(SOURCES, b"[]")), found.modified))
    present = {found.key for found in files}
    return {key: since for key, since in sources.items() if key in present}


def _merge(site: Site, folder: str, files: Sequence[str]) -> None:
    """Write some answers files as one: per request and model asked a success, else a paid answer, else the latest word."""
    name = hashlib.sha256("\n".join(files).encode()).hexdigest()[:32]
    with site.scratch() as scratch, open_database(Path(scratch)) as database:
        paths = [site.store.download(key, Path(scratch) / f"{number}.parquet") for number, key in enumerate(files)]
        schema = pq.read_schema(paths[0]).with_metadata({SOURCES: json.dumps(files).encode()})
        merged = Path(scratch) / "merged.parquet"
        with write_answers(merged, schema) as writer:
            for path, kept in zip(paths, _best(database, paths), strict=True):
                with pq.ParquetFile(path) as parquet:
                    for lines in kept_lines(parquet, kept):
                        writer.write_table(lines.cast(schema))
        site.store.put(f"{folder}/{MERGED}{name}.parquet", merged)


def _best(database: duckdb.DuckDBPyConnection, paths: Sequence[Path]) -> list[npt.NDArray[np.bool_]]:
    """Which lines of each file stay. Found by narrow columns: whole lines are more than memory holds."""
    kept = [np.zeros(pq.read_metadata(path).num_rows, bool) for path in paths]
    chosen = database.sql(f"SELECT {LAST_WORD} FROM ({placed(paths)}) GROUP BY request_key, stand_in")
    for batch in chosen.to_arrow_reader(PLACES_AT_ONCE):
        places = batch.column(0).to_numpy()
        for number in np.unique(places >> 32).tolist():
            kept[number - 1][places[places >> 32 == number] & 0xFFFFFFFF] = True
    return kept


def _drop_older(site: Site, file: str, cutoff: datetime) -> int:
    return _rewrite(site, file, lambda table: pc.greater_equal(table.column("answered_at"), pa.scalar(cutoff, pa.timestamp("ms", "UTC"))))


def _rewrite(site: Site, file: str, keeps: Keeps) -> int:
    """Replace a Parquet file by the lines that a filter keeps, or remove it where it keeps none; how many lines went."""
    with site.scratch() as scratch:
        path, kept = site.store.download(file, Path(scratch) / "before.parquet"), Path(scratch) / "after.parquet"
        parquet = pq.ParquetFile(path)
        left = 0
        with pq.ParquetWriter(kept, parquet.schema_arrow, compression="zstd") as writer:
            for lines in row_groups(parquet):
                table = lines.filter(keeps(lines))
                left += table.num_rows
                writer.write_table(table)
        gone = parquet.metadata.num_rows - left
        if not left:
            site.store.delete([file])
        elif gone:
            site.store.put(file, kept)
        return int(gone)


def _empty_older(site: Site, cutoff: datetime, needed: Collection[str]) -> int:
    """Remove the bulk of shards and runs that ended before the cutoff, but for what runs under way count on; how many were emptied."""
    emptied = 0
    for last_word, root in (("settled.json", "shards"), ("assembled.json", "runs")):
        ended = {found.key.rpartition("/")[0] for found in site.store.scan(root) if _is_older(found, last_word, cutoff)}
        bulk: dict[str, list[str]] = {}
        for found in site.store.scan(root):
            if match := BULK.search(found.key):
                bulk.setdefault(found.key[: match.start()], []).append(found.key)
        for folder in sorted((ended & bulk.keys()) - set(needed)):
            site.store.delete(bulk[folder])
            emptied += 1
    return emptied


def _is_older(found: Found, name: str, cutoff: datetime) -> bool:
    return found.key.endswith(f"/{name}") and found.modified < cutoff.timestamp()


def _plan(site: Site, folder: str) -> Plan | None:
    return site.store.get_shape(f"{folder}/approved.json", Plan) or site.store.get_shape(f"{folder}/plan.json", Plan)


def _requests_of(site: Site, plan: Plan, ids: Collection[str]) -> dict[str, bytes | None]:
    """The rows of a run among some ids, each with the request that it has asked; None: it was rejected."""
    found, wanted = dict[str, bytes | None](), pa.array(sorted(ids), pa.string())
    for file in plan.slices:
        if site.store.head(file) is not None:
            for batch in pq.ParquetFile(site.store.open(file)).iter_batches(columns=["id", "request_key"], use_threads=False):
                rows = batch.filter(pc.is_in(batch.column("id"), wanted))
                found.update(zip(rows.column("id").to_pylist(), rows.column("request_key").to_pylist(), strict=True))
    return found


def _showing(site: Site, job: str, hexed: pa.Array) -> tuple[str, ...]:
    """The partitions of a job that show what some requests were answered. `hexed`: their keys."""
    shown = []
    for root in ("results", "quarantine", "samples"):
        for found in site.store.scan(f"{root}/{job}"):
            if found.key.endswith(".parquet"):
                batches = pq.ParquetFile(site.store.open(found.key)).iter_batches(columns=["_request_key"], use_threads=False)
                if any(pc.any(pc.is_in(batch.column(0), hexed)).as_py() for batch in batches):
                    shown.append(site.store.uri_of(found.key.rpartition("/")[0]))
    return tuple(dict.fromkeys(shown))


def _holds(site: Site, shard: str, keys: set[bytes]) -> bool:
    return site.store.head(keys_key(shard)) is not None and not keys.isdisjoint(request_keys(site.store, shard))


def _strike(site: Site, shard: str, keys: set[bytes]) -> None:
    """Take requests out of a shard's folder: their lines, and what every attempt answered."""
    with site.scratch() as scratch:
        lines, kept = site.store.download(requests_key(shard), Path(scratch) / "before.jsonl"), Path(scratch) / "after.jsonl"
        with lines.open("rb") as source, kept.open("wb") as target:
            target.writelines(line for line in source if key_of_line(line) not in keys)
        left = [key for key in request_keys(site.store, shard) if key not in keys]
        site.store.put(requests_key(shard), kept)
        site.store.put(keys_key(shard), b"".join(left))
    mask = pa.array(sorted(keys), pa.binary(32))
    for number in range(len(site.ledger.attempts(shard)) + 1):
        if site.store.head(answers_key(shard, number)) is not None:
            _rewrite(site, answers_key(shard, number), lambda table: pc.invert(pc.is_in(table.column("request_key"), mask)))
