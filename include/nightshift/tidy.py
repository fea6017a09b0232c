"""tidy: what becomes of answers in time.

Answers are kept for ever unless somebody says otherwise. Every settled shard leaves a file, so small ones are merged where there
are many, and what is older than the store is to keep is dropped. It may run beside anything else: what a run has planned to reuse
is found where it was merged into.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
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
from nightshift.runs import PLAN_STANDS, Site, under_way, work_of
from nightshift.shapes import Plan
from nightshift.stores.answers import LAST_WORD, MERGED, is_merged, placed
from nightshift.stores.database import open_database
from nightshift.stores.objects import Found

if TYPE_CHECKING:
    import duckdb

MERGE_AT = 8  # files of one fingerprint
MERGE_BELOW = 128 << 20  # bytes: a larger file stays as it is
PLACES_AT_ONCE = 1 << 14
GRACE = timedelta(days=1)  # between a merge and the removal of what was merged: runs under way still read it
BULK = re.compile(r"/(requests\.(jsonl|keys)|answers-\d+\.parquet|(slices|staged|quarantine)/[^/]+)$")  # what is large in a folder
SOURCES = b"nightshift.sources"  # the merged files' names, in the metadata of the file that they were merged into

Keeps = Callable[[pa.Table], Any]  # the lines of a table that stay, as a mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Tidied:
    """What a tidy did."""

    merged: int  # answers files that were merged
    removed: int  # answers files that were merged earlier, and are gone now
    dropped: int  # answers older than what is kept
    emptied: int  # shards and runs whose bulk is older than what is kept; their small facts stay


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


def _needed(site: Site) -> frozenset[str]:
    """What runs under way count on: answers files, and the folders of their row indexes, which may be those of an earlier run."""
    needed: set[str] = set()
    for folder in under_way(site.store, "runs", site.now() - PLAN_STANDS):
        if plan := plan_of(site, folder):
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
    return rewrite(site, file, lambda table: pc.greater_equal(table.column("answered_at"), pa.scalar(cutoff, pa.timestamp("ms", "UTC"))))


def rewrite(site: Site, file: str, keeps: Keeps, *, keep_empty: bool = False) -> int:
    """Replace a Parquet file by the lines that a filter keeps, or remove it where it keeps none; how many lines went.

    `keep_empty`: it stays where it keeps none, because something else names it.
    """
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
        if not left and not keep_empty:
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


def plan_of(site: Site, folder: str) -> Plan | None:
    """The plan that a run carries out, or would; None where it has none."""
    return site.store.get_shape(f"{folder}/approved.json", Plan) or site.store.get_shape(f"{folder}/plan.json", Plan)
