"""assemble: join answers to rows. Each row gets exactly one outcome; what did not succeed goes to quarantine with its reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from nightshift.columns import answers_schema, rows_at_once
from nightshift.errors import CountsDisagree
from nightshift.job import Job
from nightshift.join import KEEP_SIDES, join, reconcile, settled
from nightshift.ordering import in_blocks, in_order
from nightshift.runs import Run, Site
from nightshift.shapes import OUTCOMES, Assembled, Outcome, Plan, Settled
from nightshift.stores.database import literals, open_database, quoted
from nightshift.vectors import LINE, with_vectors

if TYPE_CHECKING:
    import duckdb

PART_ROWS = 500_000
GROUP_ROWS, GROUP_BYTES = 16_384, 16 << 20  # of a row group, at most
READ_ROWS = 2048  # that come from DuckDB at once: answers may be long
PLACE = "_nightshift_place"  # the column that a query has for the order of its rows
REASONS_SHOWN = 8


def assemble(site: Site, run: Run, plan: Plan) -> Assembled:
    """Join, count, stage. Raises CountsDisagree, naming ids, where a row would have no outcome or two.

    The same run assembles to the same bytes, for any number of workers: rows keep the order of the input.
    """
    stored = site.store.get_shape(run.key("assembled.json"), Assembled)
    if stored is not None:
        return stored
    shards = [settled(site, shard) for shard in plan.shards]
    with site.scratch() as folder, open_database(Path(folder)) as database:
        join(site, run.job, Path(folder), database, plan)
        reconcile(database, plan)
        outcomes = _outcomes(database)
        database.execute(KEEP_SIDES)
        parts = _stage(site, run, Path(folder), database.sql(_succeeded_query(run.job)), plan.rows, "staged")
        quarantine = _stage(site, run, Path(folder), database.sql(_quarantine_query(run.job)), plan.rows, "quarantine")
        reasons = _reasons(database)
        taken_over = _taken_over(database, run, plan, shards)
    check_staged(outcomes, sum(rows for _, rows in parts), sum(rows for _, rows in quarantine))
    assembled = Assembled(
        outcomes=outcomes,
        reasons=reasons,
        parts=tuple(key for key, _ in parts),
        quarantine=tuple(key for key, _ in quarantine),
        paid=tuple(paid for each in shards for paid in each.paid if paid.run == run.uri),
        taken_over=taken_over,
        alarms=_sum_alarms(shards),
    )
    return site.store.settle(run.key("assembled.json"), assembled)


def check_staged(outcomes: Mapping[Outcome, int], staged: int, quarantined: int) -> None:
    """Raise CountsDisagree unless the staged files hold every row once: those that succeeded, and those that did not."""
    succeeded, others = outcomes["succeeded"], sum(outcomes.values()) - outcomes["succeeded"]
    if (staged, quarantined) != (succeeded, others):
        raise CountsDisagree(
            f"{succeeded} rows succeeded and {others} did not, but {staged} were staged and {quarantined} quarantined. "
            "Nothing is published."
        )


def _stage(site: Site, run: Run, folder: Path, query: duckdb.DuckDBPyRelation, rows: int, kind: str) -> list[tuple[str, int]]:
    """Stream a query over so many rows into Parquet parts in the run's folder; (key, rows) of each, the rows as its footer counts them."""
    staged, found = list[tuple[str, int]](), query.to_arrow_reader(READ_ROWS)
    schema, at_once = found.schema.remove(found.schema.get_field_index(PLACE)), rows_at_once(answers_schema(run.job), GROUP_ROWS)
    reader = pa.RecordBatchReader.from_batches(schema, in_blocks(in_order(found, PLACE, rows, folder), schema, at_once, GROUP_BYTES))
    if run.job.dimensions is not None and LINE in schema.names:
        reader = with_vectors(reader, run.job.dimensions)
    for number, path in enumerate(_parts(folder, kind, reader)):
        key = run.key(f"{kind}/part-{number:05d}.parquet")
        staged.append((key, pq.read_metadata(path).num_rows))
        site.store.put(key, path)
    return staged


def _parts(folder: Path, kind: str, reader: pa.RecordBatchReader) -> Iterator[Path]:
    """Parts of at most PART_ROWS rows, at least one: an empty partition still has its columns."""
    path = folder / f"{kind}.parquet"
    writer, rows = pq.ParquetWriter(path, reader.schema, compression="zstd"), 0
    for batch in reader:
        if rows + batch.num_rows > PART_ROWS:
            writer.close()
            yield path
            writer, rows = pq.ParquetWriter(path, reader.schema, compression="zstd"), 0
        writer.write_batch(batch)
        rows += batch.num_rows
    writer.close()
    yield path


def _kept(job: Job) -> str:
    return ", ".join(f"rows.{quoted(f'keep_{name}')} AS {quoted(name)}" for name in job.kept)


def _succeeded_query(job: Job) -> str:
    fields = [f"answers.output.{quoted(name)} AS {quoted(name)}" for name in job.fields]
    if job.dimensions is not None:
        fields = [f"answers.line AS {LINE}"]  # vectors are put in afterwards: sorted by DuckDB, they would not fit into its memory
    columns = ", ".join([_kept(job), *fields])
    return f"""SELECT rows.ordinal AS {PLACE}, {columns}, answers.model AS _model, answers.tier AS _tier,
                      '{job.prompt.version}' AS _prompt_version, lower(hex(rows.request_key)) AS _request_key
               FROM lines AS answers JOIN rows USING (request_key) WHERE answers.outcome = 'succeeded'"""


def _quarantine_query(job: Job) -> str:
    return f"""SELECT rows.ordinal AS {PLACE}, rows.ordinal AS row, {_kept(job)}, coalesce(answers.outcome, 'rejected') AS outcome,
                      coalesce(rows.reason, answers.reason) AS reason, coalesce(rows.raw, answers.text) AS raw,
                      lower(hex(rows.request_key)) AS _request_key
               FROM rows LEFT JOIN (SELECT * FROM answers WHERE outcome <> 'succeeded') AS answers USING (request_key)
               WHERE rows.request_key IS NULL OR answers.outcome IS NOT NULL"""


def _outcomes(database: duckdb.DuckDBPyConnection) -> dict[Outcome, int]:
    found = dict(
        database.execute(
            "SELECT coalesce(words.outcome, 'rejected'), count(*) FROM rows LEFT JOIN words USING (request_key) GROUP BY 1"
        ).fetchall()
    )
    return {outcome: found.get(outcome, 0) for outcome in OUTCOMES}


def _reasons(database: duckdb.DuckDBPyConnection) -> dict[str, dict[str, int]]:
    """Per outcome the most frequent reasons."""
    found = database.execute(
        """SELECT coalesce(words.outcome, 'rejected') AS outcome, coalesce(rows.reason, words.reason, '') AS why, count(*) AS n
           FROM rows LEFT JOIN words USING (request_key) WHERE coalesce(words.outcome, 'rejected') <> 'succeeded'
           GROUP BY 1, 2 ORDER BY 1, 3 DESC, 2"""
    ).fetchall()
    reasons: dict[str, dict[str, int]] = {}
    for outcome, why, count in found:
        shown = reasons.setdefault(outcome, {})
        if len(shown) < REASONS_SHOWN:
            shown[why] = count
    return reasons


def _taken_over(database: duckdb.DuckDBPyConnection, run: Run, plan: Plan, shards: list[Settled]) -> int:
    """How many requests in adopted shards only this run has paid for: what is not saved, however it was planned."""
    sent = [each.shard for each in shards if each.shard in plan.adopted_shards and {paid.run for paid in each.paid} == {run.uri}]
    if not sent:
        return 0
    [(count,)] = database.execute(f"SELECT count(*) FROM answers WHERE shard IN ({literals(sent)})").fetchall()
    return min(int(count), plan.adopted)  # some of them may have been reused as well


def _sum_alarms(settled: list[Settled]) -> dict[str, int]:
    alarms: dict[str, int] = {}
    for each in settled:
        for name, count in each.alarms.items():
            alarms[name] = alarms.get(name, 0) + count
    return alarms
