"""Redrive: the failures of a run driven again, as a run of its own over the same rows.

Its plan is made from the other run's answers in place of its input. Everything after that is the ordinary way: approve,
submit, wait, collect, assemble, audit, publish, report.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nightshift.arrow import in_groups
from nightshift.columns import copy_kept, write_answers
from nightshift.errors import NAMED_IN_BRACKETS, CountsDisagree, InputMissing
from nightshift.job import Job, Policy
from nightshift.join import KEEP_SIDES, join, reconcile, settled
from nightshift.packing import IN_FLIGHT, REQUESTS, estimate_shards, freeze, groups, mark_answered, mark_in_flight, wanted_of, whole_lines
from nightshift.runs import Redrive, Run, RunInput, Site, approved_plan, check_models, load_run, run_folder, salt_of
from nightshift.shapes import Assembled, Outcome, Plan, Variant
from nightshift.stores.answers import AnswerStore, seen
from nightshift.stores.database import literals, open_database
from nightshift.stores.objects import Objects
from nightshift.stores.shards import READ_ROWS, key_of_line, requests_key

if TYPE_CHECKING:
    import duckdb

GROUP_BYTES = 4 << 20  # in a row group of what is driven again: some copies of one are in memory
MENDED: tuple[Outcome, ...] = ("succeeded",)  # what another run, or another redrive, may have made of a failure


def find_run(store: Objects, name: str) -> Run:
    """A run of any job by its name, 16 hex digits. Raises InputMissing."""
    for folder in store.folders("runs"):
        if store.head(f"{folder}/{name}/input.json") is not None:
            return load_run(store, store.uri_of(f"{folder}/{name}"))
    raise InputMissing(store.uri_of("runs"), f"no run is called {name}", NAMED_IN_BRACKETS)


def begin_redrive(
    site: Site, original: Run, outcomes: Sequence[Outcome], *, label: str, run: str, policy: Policy | None, dry_run: bool = False
) -> Run:
    """Begin to drive a run's failures again, or find it begun. `policy`: in place of that of the first run.

    Raises InputMissing where the first run has not come as far as its outcomes, and where none of its rows ended in one of these.
    """
    assembled = site.store.get_shape(original.key("assembled.json"), Assembled)
    if assembled is None:
        raise InputMissing(original.uri, "its outcomes are not known yet", "Let it come to its end first.")
    if not any(assembled.outcomes[outcome] for outcome in outcomes):
        raise _nothing_to_drive(original, outcomes, assembled.outcomes["rejected"])
    job = original.job
    if policy is not None and policy != job.spec.policy:
        job = Job(
            spec=job.spec.model_copy(update={"policy": policy}),
            prompt_source=job.prompt_source,
            answer_schema=job.answer_schema,
            expectations=job.expectations,
        )
    check_models(site, job)
    begun = RunInput(
        run=run,
        label=label,
        started_at=site.now(),
        partition=original.input.partition,
        objects=original.input.objects,
        job=job,
        sample=original.input.sample,  # what was published beside the results stays beside them
        dry_run=dry_run,
        redrive=Redrive(run=original.input.run, outcomes=tuple(outcomes)),
    )
    return Run(site.store, site.store.settle(f"{run_folder(job.name, run)}/input.json", begun))


def _nothing_to_drive(original: Run, outcomes: Sequence[Outcome], rejected: int) -> InputMissing:
    advice = "There is nothing to drive again."
    if rejected:
        advice = f"{rejected:,} were rejected before they were asked: mend them, or what is asked of them, and run the job again."
    return InputMissing(original.uri, f"none of its rows ended as {' or '.join(outcomes)}", advice)


def draft_redrive(site: Site, run: Run) -> Plan:
    """The plan of a redrive: the other run's rows and answers, and new shards for the requests that are driven again.

    Raises InputMissing where no row ended in one of the outcomes.
    """
    redrive, job = run.input.redrive, run.job
    assert redrive is not None
    original = load_run(site.store, site.store.uri_of(run_folder(job.name, redrive.run)))
    before = approved_plan(original)
    accepted = tuple(dict.fromkeys([*before.stand_ins, *original.job.spec.stand_ins]))  # what they have answered is not bought again
    models = (*job.spec.stand_ins, *accepted)
    answers = site.answers(before.fingerprint)
    in_flight = answers.in_flight(answers.reservations()[0])
    with site.scratch() as folder, open_database(Path(folder)) as database:
        join(site, original.job, Path(folder), database, before)
        _check_kept(database, before, original)
        database.execute(KEEP_SIDES)
        failed, files = _choose(database, job, redrive.outcomes, Path(folder)), answers.files()
        mended = _mended(database, answers, files, models, before.since)
        lines = whole_lines(_gather_lines(site, Path(folder), database))
        mark_answered(database, answers, files, models, MENDED, since=before.since)
        adopted_shards = mark_in_flight(site, database, in_flight)
        shards, limits = [], site.limits(job)
        for group in groups(database, job.spec.policy, limits, lines):
            seed = _seed(database, failed, group)
            shards.append(
                freeze(site, job.spec.request, before.fingerprint, lines, group, least=limits.least, salt=salt_of(run), before=seed)
            )
        counts = dict(database.execute("SELECT coalesce(known, ''), count(*) FROM requests GROUP BY 1").fetchall())
    submitted, adopted = counts.get("", 0), counts.get(IN_FLIGHT, 0)
    if not counts:
        raise _nothing_to_drive(original, redrive.outcomes, before.rejected)
    own = [settled(site, shard).answers for shard in before.shards]
    return before.model_copy(
        update={
            "reused": before.unique - submitted - adopted,
            "adopted": adopted,
            "submitted": submitted,
            "shards": (*(shard.key for shard in shards), *adopted_shards),
            "adopted_shards": tuple(adopted_shards),
            "answers": tuple(dict.fromkeys([*before.answers, *own, *mended])),
            "estimate": estimate_shards(site.store, job, shards),
            "saved_usd": None,
            "approved_at": None,
            "seen": seen(files, in_flight),
            "stand_ins": accepted,
        }
    )


def _mended(
    database: duckdb.DuckDBPyConnection, answers: AnswerStore, files: Sequence[str], models: Sequence[str], since: datetime | None
) -> list[str]:
    """The files that hold what has become of failures since, of those that are not driven again as well: what is mended stays mended."""
    database.execute("CREATE TABLE requests AS SELECT request_key AS key, NULL::VARCHAR AS known FROM words WHERE outcome <> 'succeeded'")
    found = mark_answered(database, answers, files, models, MENDED, since=since)
    database.execute("DROP TABLE requests")
    return found


def _check_kept(database: duckdb.DuckDBPyConnection, plan: Plan, original: Run) -> None:
    """Find out before anything is bought whether the other run's answers are all still there. Raises InputMissing."""
    try:
        reconcile(database, plan)
    except CountsDisagree as error:
        why = f"not all of its answers are kept any more ({str(error).rstrip('.')})"
        raise InputMissing(original.uri, why, "Run the job again in place of a redrive.") from error


def _choose(database: duckdb.DuckDBPyConnection, job: Job, outcomes: Sequence[Outcome], folder: Path) -> Path:
    """The last word on every request that is driven again, and how it is asked now, in a local file; its keys as the table `failed`."""
    path = folder / "failed.parquet"
    found = database.sql(f"SELECT * EXCLUDE (again) FROM answers WHERE outcome IN ({literals(outcomes)})").to_arrow_reader(READ_ROWS)
    with write_answers(path, found.schema.append(pa.field("again", pa.string()))) as writer:
        for lines in in_groups(found, GROUP_BYTES):
            writer.write_table(lines.append_column("again", _again(job, lines)))
    rows = f"read_parquet({literals([path])}, file_row_number = true)"
    database.execute(f"CREATE TABLE failed AS SELECT request_key, shard, file_row_number AS place FROM {rows}")
    return path


def _again(job: Job, lines: pa.Table) -> pa.Array:
    """How requests are asked again, by what became of each."""
    retry = job.spec.policy.retry
    variants = [
        retry.variant(line["outcome"], Variant(model=line["stand_in"], max_output_tokens=line["token_limit"]), job.token_limit)
        for line in lines.select(["outcome", "stand_in", "token_limit"]).to_pylist()
    ]
    return pa.array([variant.model_dump_json(exclude_defaults=True) for variant in variants], pa.string())


def _gather_lines(site: Site, folder: Path, database: duckdb.DuckDBPyConnection) -> Path:
    """The frozen lines of the chosen requests in one local file, and their places in the table `requests`."""
    database.execute(f"CREATE TABLE requests {REQUESTS}")
    spool, end = folder / "spool.jsonl", 0
    with spool.open("wb", buffering=1 << 20) as target:
        for (shard,) in database.execute("SELECT DISTINCT shard FROM failed ORDER BY 1").fetchall():
            chosen = {bytes(key) for (key,) in database.execute("SELECT request_key FROM failed WHERE shard = ?", [shard]).fetchall()}
            places, facts = [], site.ledger.shard(shard)
            with site.store.download(requests_key(shard), folder / "requests.jsonl").open("rb") as lines:
                for line in lines:
                    if (key := key_of_line(line)) in chosen:
                        target.write(line)
                        places.append((key, end, len(line), facts.request_bytes // facts.request_count))
                        end += len(line)
            if len(places) < len(chosen):
                raise InputMissing(site.store.uri_of(requests_key(shard)), "it no longer holds all of its requests", "Run the job again.")
            found = wanted_of(places)
            database.execute("INSERT INTO requests SELECT key, start, size, weight, NULL FROM found")
            del found
    return spool


def _seed(database: duckdb.DuckDBPyConnection, failed: Path, group: pa.Table) -> Path:
    """What became of the requests of a group, in a file of their own."""
    found = group.select(["key"])
    places = database.sql("SELECT place FROM failed SEMI JOIN found ON request_key = key").fetchnumpy()["place"]
    del found
    with pq.ParquetFile(failed) as file:
        kept = np.zeros(file.metadata.num_rows, bool)
        kept[places] = True
        return copy_kept(file, kept, failed.with_name("seed.parquet"))
