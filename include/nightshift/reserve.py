"""Reserve what a run is about to buy: what somebody else has bought or reserved meanwhile is taken out of its plan.

A plan can be hours old by the time it is approved, and another run may have been planned beside it: nothing is bought a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from nightshift.columns import copy_kept
from nightshift.packing import ANSWERED, IN_FLIGHT, estimate_shards, freeze, mark_answered, mark_in_flight, wanted_of, whole_lines
from nightshift.runs import Run, Site, salt_of
from nightshift.shapes import PAID_OUTCOMES, Outcome, Plan, Shard
from nightshift.stores.answers import Reservation, seen
from nightshift.stores.database import open_database
from nightshift.stores.shards import key_of_line, open_answers, request_keys, requests_key

if TYPE_CHECKING:
    import duckdb


def reserve(site: Site, run: Run, plan: Plan, *, weigh: Callable[[Plan], None]) -> Plan:
    """Add the run's reservation to the log of its fingerprint; the plan less what others have by then. `weigh` may stop it before.

    The log's next number is taken only by who has read everything before it: where another run was quicker, its
    reservation is read as well, and the number after it is tried.
    """
    answers = site.answers(plan.fingerprint)
    while True:
        reservations, number = answers.reservations()
        for reservation in reservations.values():
            if reservation.run == run.uri:
                return reservation.plan
        revised = _revised(site, run, plan, answers.in_flight(reservations))
        weigh(revised)
        if not revised.own_shards or answers.reserve(number, Reservation(run=run.uri, plan=revised)):
            return revised


def _revised(site: Site, run: Run, plan: Plan, in_flight: list[str]) -> Plan:
    """The plan as it stands now: unchanged, or without the requests that somebody has bought or reserved since it was made."""
    answers = site.answers(plan.fingerprint)
    files = answers.files()
    if run.input.fresh or seen(files, in_flight) == plan.seen:
        return plan
    planned = [site.ledger.shard(key) for key in plan.own_shards]
    with site.scratch() as folder, open_database(Path(folder)) as database:
        _load_keys(site, database, planned)
        outcomes: tuple[Outcome, ...] = ("succeeded",) if run.input.redrive else PAID_OUTCOMES  # a redrive buys failures anew
        reused = mark_answered(database, answers, files, (*run.job.spec.stand_ins, *plan.stand_ins), outcomes, since=plan.since)
        adopted = mark_in_flight(site, database, in_flight)
        own = [_without_known(site, run, Path(folder), database, shard, number) for number, shard in enumerate(planned)]
        counts = dict(database.execute("SELECT coalesce(known, ''), count(*) FROM requests GROUP BY 1").fetchall())
    kept = [shard for shard in own if shard is not None]
    adopted_shards = tuple(dict.fromkeys([*plan.adopted_shards, *adopted]))
    return plan.model_copy(
        update={
            "reused": plan.reused + counts.get(ANSWERED, 0),
            "adopted": plan.adopted + counts.get(IN_FLIGHT, 0),
            "submitted": counts.get("", 0),
            "shards": (*(shard.key for shard in kept), *adopted_shards),
            "adopted_shards": adopted_shards,
            "answers": tuple(dict.fromkeys([*plan.answers, *reused])),
            "estimate": estimate_shards(site.store, run.job, kept),
        }
    )


def _load_keys(site: Site, database: duckdb.DuckDBPyConnection, shards: list[Shard]) -> None:
    """The requests of some shards, each with its shard's place in the list."""
    database.execute("CREATE TABLE requests (key BLOB, shard INTEGER, known VARCHAR)")
    for number, shard in enumerate(shards):
        found = pa.table({"key": pa.array(request_keys(site.store, shard.key), pa.binary(32))})
        database.execute(f"INSERT INTO requests SELECT key, {number}, NULL FROM found")
        del found


def _without_known(site: Site, run: Run, folder: Path, database: duckdb.DuckDBPyConnection, shard: Shard, number: int) -> Shard | None:
    """A shard less the requests that others have: the same one where there are none, and None where nothing is left.

    One that somebody has settled meanwhile, with failures only, is frozen again under another name.
    """
    known = {bytes(key) for (key,) in database.execute(f"SELECT key FROM requests WHERE shard = {number} AND known IS NOT NULL").fetchall()}
    if not known and site.ledger.settled(shard.key) is None:
        return shard
    places, start = [], 0
    lines = whole_lines(site.store.download(requests_key(shard.key), folder / "spool.jsonl"))
    with lines.path.open("rb") as file:
        for line in file:
            if (key := key_of_line(line)) not in known:
                places.append((key, start, len(line), shard.request_bytes // shard.request_count))
            start += len(line)
    if not places:
        return None
    group = wanted_of(places)
    before = _seed(site, shard, group, folder / "seed.parquet") if shard.seeded else None
    return freeze(site, run.job.spec.request, shard.fingerprint, lines, group, least=shard.least, salt=salt_of(run), before=before)


def _seed(site: Site, shard: Shard, group: pa.Table, path: Path) -> Path:
    """What became before of some of the requests that a shard drives again, as an answers file."""
    with open_answers(site.store, shard.key, 0) as file:
        keys = file.read(["request_key"], use_threads=False).column("request_key")
        return copy_kept(file, pc.is_in(keys, group.column("key").cast(keys.type)).to_numpy(), path)
