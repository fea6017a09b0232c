"""Requests into shards: which of them somebody has paid for or is about to, and what fits into one batch.

Everything works on a DuckDB table `requests (key, start, size, weight, known)`: one line per distinct request, with the
place of its line in a local spool file, and `known` once somebody else has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nightshift.arrow import whole
from nightshift.errors import JobInvalid
from nightshift.job import Job, Policy, RequestSpec
from nightshift.money.estimate import estimate_variants, measured_before, sum_estimates
from nightshift.providers.protocol import Limits
from nightshift.runs import Site
from nightshift.shapes import PAID_OUTCOMES, Estimate, Outcome, ProviderName, Shard, Variant
from nightshift.stores.answers import AnswerStore
from nightshift.stores.objects import Objects
from nightshift.stores.shards import keep_shard, key_bytes, read_answers, request_keys, shard_key, whom

if TYPE_CHECKING:
    import duckdb

Places = npt.NDArray[np.int64]
ANSWERED, IN_FLIGHT = "answered", "in flight"
BATCH_REQUESTS = 1 << 14  # chosen requests that are fetched at once
GATHER_BYTES = 1 << 20  # of the spool that are read at once, and of lines that are made of them
WANTED = pa.schema([("key", pa.binary()), ("start", pa.int64()), ("size", pa.int32()), ("weight", pa.int32())])
REQUESTS = "(key BLOB, start BIGINT, size INTEGER, weight INTEGER, known VARCHAR)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """The lines of requests that may be sent, in a local spool that holds of each what is its own."""

    path: Path
    made: Callable[[pa.Array, pa.BinaryArray], memoryview]  # keys, and what the spool holds of each → lines
    frame: int = 0  # bytes of a line that are not in the spool


def whole_lines(path: Path) -> Lines:
    """Lines that stand in a file as they are sent."""
    return Lines(path=path, made=lambda keys, lines: whole(lines))


def mark_answered(
    database: duckdb.DuckDBPyConnection,
    answers: AnswerStore,
    files: Iterable[str],
    models: Collection[str],
    outcomes: Collection[Outcome] = PAID_OUTCOMES,
    *,
    since: datetime | None = None,
) -> list[str]:
    """Mark the requests that somebody has paid for, with one of these outcomes, `since` a moment; the answer files that hold them.

    A failure counts where no file holds a success: what a redrive has mended stays mended. Where several files hold one, as once it
    was bought anew, all of them count: the latest is then joined.
    """
    used = []
    database.execute("CREATE OR REPLACE TEMP TABLE paid_failures (key BLOB, file VARCHAR)")
    for file in files:
        database.execute("CREATE OR REPLACE TEMP TABLE paid_successes (key BLOB)")
        for batch in answers.paid_keys(file, models, outcomes, since=since):
            found = pa.Table.from_batches([batch])  # DuckDB finds it by its name in this scope
            database.execute("INSERT INTO paid_successes SELECT request_key FROM found WHERE succeeded")
            database.execute("INSERT INTO paid_failures SELECT request_key, ? FROM found WHERE NOT succeeded", [file])
            del found
        if _mark(database, "paid_successes", ANSWERED) or _asks_any(database, "paid_successes"):
            used.append(file)
    left = database.execute("SELECT DISTINCT file FROM paid_failures SEMI JOIN (SELECT key FROM requests WHERE known IS NULL) USING (key)")
    used += sorted(file for (file,) in left.fetchall() if file not in used)
    _mark(database, "paid_failures", ANSWERED)
    return used


def mark_in_flight(site: Site, database: duckdb.DuckDBPyConnection, shards: Iterable[str]) -> list[str]:
    """Mark the requests that are in somebody's shard already; those shards."""
    used = []
    for shard in shards:
        database.execute("CREATE OR REPLACE TEMP TABLE flying (key BLOB)")
        found = pa.table({"key": pa.array(request_keys(site.store, shard), pa.binary(32))})
        database.execute("INSERT INTO flying SELECT * FROM found")
        del found
        if _mark(database, "flying", IN_FLIGHT):
            used.append(shard)
    return used


def _mark(database: duckdb.DuckDBPyConnection, table: str, word: str) -> int:
    """Mark the requests of a table of which nothing is known yet; how many there were."""
    database.execute(f"UPDATE requests SET known = '{word}' WHERE known IS NULL AND key IN (SELECT key FROM {table})")
    return int(database.fetchall()[0][0])


def _asks_any(database: duckdb.DuckDBPyConnection, table: str) -> bool:
    """Whether any request of a table is among those that are asked."""
    return database.execute(f"SELECT 1 FROM requests SEMI JOIN {table} USING (key) LIMIT 1").fetchone() is not None


def wanted(database: duckdb.DuckDBPyConnection) -> Iterator[pa.Table]:
    """The requests that nobody else has, in the order of the spool, in batches of WANTED: where each stands there, in bytes."""
    found = database.cursor().sql("SELECT key, start, size, weight FROM requests WHERE known IS NULL ORDER BY start")
    for batch in found.to_arrow_reader(BATCH_REQUESTS):
        yield pa.Table.from_batches([batch])


def wanted_of(places: Iterable[tuple[bytes, int, int, int]]) -> pa.Table:
    """Requests as WANTED, from (key, start, size, weight) of each; there is one at least."""
    columns = zip(*places, strict=True)
    return pa.Table.from_arrays([pa.array(values, field.type) for values, field in zip(columns, WANTED, strict=True)], schema=WANTED)


def cut(wanted: Iterable[pa.Table], most: int, most_bytes: int, frame: int = 0) -> Iterator[pa.Table]:
    """Requests in groups that keep both limits, filled in order. `frame`: what a line has beside its `size`."""
    left: pa.Table | None = None
    for batch in wanted:
        left = batch if left is None else pa.concat_tables([left, batch])
        while (count := _fitting(left, most, most_bytes, frame)) < left.num_rows:
            yield left.slice(0, count)
            left = left.slice(count)
    if left is not None and left.num_rows:
        yield left


def _fitting(wanted: pa.Table, most: int, most_bytes: int, frame: int) -> int:
    """How many of the first requests fit into one batch; one does, however large."""
    ends = np.cumsum(wanted.column("size").to_numpy() + np.int64(frame))
    return max(1, min(most, int(np.searchsorted(ends, most_bytes, side="right"))))


def balance(groups: Iterable[pa.Table], least: int) -> Iterator[pa.Table]:
    """The groups, with a last one that is too small for a batch filled up from the one before, where that can spare so many."""
    before: pa.Table | None = None
    for group in groups:
        if before is not None:
            spare = least - group.num_rows
            if 0 < spare <= before.num_rows - least:
                kept = before.num_rows - spare
                before, group = before.slice(0, kept), pa.concat_tables([before.slice(kept), group])
            yield before
        before = group
    if before is not None:
        yield before


def groups(database: duckdb.DuckDBPyConnection, policy: Policy, limits: Limits, lines: Lines) -> Iterator[pa.Table]:
    """The requests that nobody else has, in groups that fit into one batch each. Raises JobInvalid where the job forbids every batch."""
    most = min(limits.requests, policy.max_requests_per_shard or limits.requests)
    if most < limits.least:
        raise JobInvalid([f"policy.max_requests_per_shard: {most} is below {limits.least}, the fewest requests of a batch of this model"])
    return balance(cut(wanted(database), most, limits.request_bytes, lines.frame), limits.least)


def asked_from(provider: ProviderName, count: int, least: int) -> ProviderName:
    """Who is asked so many requests of a provider: on demand, where they are too few for a batch."""
    return "live" if count < least else provider


def estimate_shards(store: Objects, job: Job, shards: Iterable[Shard]) -> Estimate:
    """What shards cost, as their requests are asked: anew, or again in the way that each says; in batches, or on demand."""
    estimates, measured = list[Estimate](), measured_before(store, job)
    for shard in shards:
        again = read_answers(store, shard.key, 0, ["again"]).column("again").to_pylist() if shard.seeded else []
        variants = bought(Counter(map(Variant.model_validate_json, again)) or Counter({Variant(): shard.request_count}), shard)
        estimates += estimate_variants(job, variants, shard, measured)
    return sum_estimates(job, estimates)


def bought(variants: Mapping[Variant, int], shard: Shard) -> Counter[Variant]:
    """How a shard's requests are bought, where it is said how they are asked: of whom, with all that goes there counted."""
    asked, as_bought = Counter[tuple[ProviderName, str]](), Counter[Variant]()
    for variant, count in variants.items():
        asked[whom(variant, shard)] += count
    for variant, count in variants.items():
        provider, model = whom(variant, shard)
        as_bought[variant.model_copy(update={"provider": asked_from(provider, asked[provider, model], shard.least)})] += count
    return as_bought


def freeze(
    site: Site,
    request: RequestSpec,
    fingerprint: str,
    lines: Lines,
    group: pa.Table,
    *,
    least: int,
    salt: str = "",
    before: Path | None = None,
    keep: bool = True,
) -> Shard:
    """Make a group a shard, once: one that is there already is the same shard.

    `before`: an answers file of what became of its requests and how each is asked now (`again`), where it drives them again. A shard
    that is settled is never sent again, so what is still wanted of it (its failures) becomes a shard of another name.
    """
    keys = key_bytes(group.column("key"))
    shard = Shard(
        key=_unsettled_key(site, keys, f"{fingerprint}/{salt}"),
        fingerprint=fingerprint,
        provider=request.provider,
        endpoint=request.endpoint,
        model=request.model,
        request_count=group.num_rows,
        request_bytes=pc.sum(group.column("weight")).as_py(),
        least=least,
        seeded=before is not None,
    )
    if keep and site.store.get_shape(f"shards/{shard.key}/shard.json", Shard) is None:
        keep_shard(site.store, shard, _gather(lines, group), keys, before)
    return shard


def _unsettled_key(site: Site, keys: bytes, salt: str) -> str:
    generation = 0
    while site.ledger.settled(key := shard_key(keys, f"{salt}{generation or ''}")) is not None:
        generation += 1
    return key


def _gather(lines: Lines, group: pa.Table) -> Iterator[memoryview]:
    """The lines of one shard, in pieces. What stands in the spool between two of them is read over."""
    keys, starts, sizes = group.column("key"), group.column("start").to_numpy(), group.column("size").to_numpy()
    ends = starts + sizes
    spans = ends, np.cumsum(sizes + np.int64(lines.frame))  # where requests end in the spool, and among the shard's lines
    with lines.path.open("rb", buffering=0) as spool:
        first = 0
        while first < group.num_rows:
            last = min(int(np.searchsorted(span, span[first] + GATHER_BYTES, side="right")) for span in spans)
            base = int(starts[first])
            spool.seek(base)
            data = spool.read(int(ends[last - 1]) - base)
            yield lines.made(keys.slice(first, last - first), _pieces(data, starts[first:last] - base, ends[first:last] - base))
            first = last


def _pieces(data: bytes, starts: Places, ends: Places) -> pa.BinaryArray:
    """What stands at some places of a text, in order, and not what stands between them."""
    breaks = np.flatnonzero(starts[1:] != ends[:-1])
    runs = zip(starts[[0, *(breaks + 1)]].tolist(), ends[[*breaks, -1]].tolist(), strict=True)
    kept = b"".join([data[start:end] for start, end in runs])
    offsets = np.concatenate([[0], np.cumsum(ends - starts)]).astype(np.int32)
    return pa.Array.from_buffers(pa.binary(), len(starts), [None, pa.py_buffer(offsets), pa.py_buffer(kept)])
