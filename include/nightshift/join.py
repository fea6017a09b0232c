"""A run's rows and answers, joined in DuckDB from its files, and proven to be complete."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from nightshift.columns import answers_schema
from nightshift.errors import CountsDisagree
from nightshift.job import Job
from nightshift.runs import Site
from nightshift.shapes import Plan, Settled
from nightshift.stores.answers import LAST_WORD, placed
from nightshift.stores.database import literals

if TYPE_CHECKING:
    import duckdb


KEEP_SIDES = "SET disabled_optimizers = 'join_order,build_side_probe_side'"  # what is held is the rows, never the long answers


def settled(site: Site, shard: str) -> Settled:
    """The last word on a planned shard. Raises CountsDisagree where there is none."""
    found = site.ledger.settled(shard)
    if found is None:
        raise CountsDisagree(
            f"Shard {shard[:12]} is planned but not settled: its rows would have no outcome. Clear its tasks and run them again."
        )
    return found


def join(site: Site, job: Job, folder: Path, database: duckdb.DuckDBPyConnection, plan: Plan) -> None:
    """A run's rows and answers as the views `rows` and `answers` (`lines`: with the place of each), over local copies of its files.

    Of several answers to one request a success wins, then a paid one, then the latest. What is counted again and again stands in the
    table `words`: of each request its outcome and the reason.
    """
    rows = [site.store.download(key, folder / f"rows-{i:05d}.parquet") for i, key in enumerate(plan.slices)]
    own = [settled(site, shard).answers for shard in plan.shards]
    files = site.answers(plan.fingerprint).download([*plan.answers, *own], folder)
    if not files:  # every row was rejected; the columns are still those of an answer
        files = [folder / "answers-none.parquet"]
        pq.write_table(answers_schema(job).empty_table(), files[0])
    database.execute(f"CREATE VIEW rows AS SELECT * FROM read_parquet([{literals(rows)}], union_by_name = true)")
    database.execute(
        f"""CREATE VIEW everything AS
            SELECT *, {{'file': filename, 'row': file_row_number}} AS line FROM ({placed(files)})
            WHERE stand_in IS NULL OR stand_in IN ({literals([job.spec.request.model, *job.spec.stand_ins, *plan.stand_ins])})"""
    )
    database.execute(
        f"""CREATE TABLE chosen AS SELECT {LAST_WORD} AS place
            FROM everything SEMI JOIN rows USING (request_key) GROUP BY request_key"""
    )
    database.execute("CREATE VIEW lines AS SELECT * EXCLUDE (filename, file_row_number) FROM everything SEMI JOIN chosen USING (place)")
    database.execute("CREATE VIEW answers AS SELECT * EXCLUDE (place, line) FROM lines")
    database.execute("CREATE TABLE words AS SELECT request_key, outcome, reason FROM answers")


def reconcile(database: duckdb.DuckDBPyConnection, plan: Plan) -> None:
    """Prove from the files that every row has one outcome, before anything is staged. Raises CountsDisagree, naming rows."""
    rows, distinct, rejected = database.execute("SELECT count(*), count(DISTINCT ordinal), count(reason) FROM rows").fetchall()[0]
    if (rows, distinct, rejected) != (plan.rows, plan.rows, plan.rejected):
        raise CountsDisagree(
            f"The plan counted {plan.rows} rows, {plan.rejected} of them rejected; "
            f"its row indexes hold {rows} ({distinct} distinct), {rejected} rejected."
        )
    lost = database.execute(
        "SELECT id FROM rows ANTI JOIN words USING (request_key) WHERE rows.reason IS NULL ORDER BY ordinal LIMIT 10"
    ).fetchall()
    if lost:
        raise CountsDisagree(
            f"No answer, not even a failure, was harvested for rows {', '.join(str(each[0]) for each in lost)}, … Nothing is published."
        )
    doubled = database.execute(
        """SELECT any_value(rows.id) FROM rows JOIN (
             SELECT DISTINCT request_key FROM everything SEMI JOIN rows USING (request_key)
             GROUP BY request_key, stand_in, place >> 32 HAVING count(*) > 1)
           USING (request_key) GROUP BY request_key LIMIT 10"""
    ).fetchall()
    if doubled:
        raise CountsDisagree(f"Rows {', '.join(str(each[0]) for each in doubled)}, … have two answers in one file. Nothing is published.")
