"""compare: two runs over the same rows side by side: an old prompt or model against a new one, before it is asked about everything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nightshift.errors import RUNS_ARE_LISTED, InputMissing
from nightshift.overviews import Comparison, Example, Field, FieldChange, Side
from nightshift.pages import render_comparison
from nightshift.partitions import MANIFEST, Manifest, results_folder
from nightshift.runs import Run, Site, run_id
from nightshift.shapes import Assembled, Summary
from nightshift.stores.database import literals, open_database, quoted

if TYPE_CHECKING:
    import duckdb

CHANGES_SHOWN = 12  # per field
EXAMPLES_SHOWN = 20


def compare(site: Site, old: Run, new: Run) -> Comparison:
    """Compare what two runs of a job have published, row by row.

    Raises InputMissing where one of them has published nothing that is still there, or where they have no row in common.
    """
    job = old.job
    identifier, fields = job.spec.input.id, [name for name in job.fields if name in new.job.fields]
    key = f"samples/{job.name}/compare-{run_id(old.input.run, new.input.run)}"
    summaries = [_summary(site, run) for run in (old, new)]
    with site.scratch() as folder, open_database(Path(folder)) as database:
        parts = {name: _parts(site, run, Path(folder), name) for name, run in (("old", old), ("new", new))}
        types = [_types(database, each) for each in parts.values()]
        told = [name for name in (identifier, *fields) if len({each[name] for each in types}) > 1]  # their type has changed: as texts
        replaced = f"REPLACE ({', '.join(f'{quoted(name)}::VARCHAR AS {quoted(name)}' for name in told)})" if told else ""
        for name, each in parts.items():
            database.execute(f"CREATE VIEW {name} AS SELECT * {replaced} FROM read_parquet({each})")
        both = f"old JOIN new ON old.{quoted(identifier)} = new.{quoted(identifier)}"
        [(common,)] = database.execute(f"SELECT count(*) FROM {both}").fetchall()
        if not common:
            raise InputMissing(new.uri, f"it has published no row that {old.uri} has as well", RUNS_ARE_LISTED)
        counts = [database.execute(f"SELECT count(*) FROM {name}").fetchall()[0][0] for name in ("old", "new")]
        found = Comparison(
            job=job.name,
            old=_side(old, summaries[0], counts[0]),
            new=_side(new, summaries[1], counts[1]),
            common=common,
            only_old=counts[0] - common,
            only_new=counts[1] - common,
            fields=tuple(_field(database, both, name) for name in fields),
            examples=tuple(example for name in fields for example in _examples(database, both, identifier, name))[:EXAMPLES_SHOWN],
            page=site.store.uri_of(f"{key}.html"),
        )
    site.store.put_shape(f"{key}.json", found)
    site.store.put(f"{key}.html", render_comparison(found).encode())
    return found


def _types(database: duckdb.DuckDBPyConnection, parts: str) -> dict[str, str]:
    return dict(database.execute(f"SELECT column_name, column_type FROM (DESCRIBE FROM read_parquet({parts}))").fetchall())


def _parts(site: Site, run: Run, folder: Path, name: str) -> str:
    """What a run has published, on local disk, as it stands in SQL."""
    assembled = site.store.get_shape(run.key("assembled.json"), Assembled)
    keys: Sequence[str] = assembled.parts if assembled else ()  # as they were staged: a later run may have published its partition anew
    if assembled is None or any(site.store.head(key) is None for key in keys):
        manifest = site.store.get_shape(f"{results_folder(run)}/{MANIFEST}", Manifest)
        if manifest is None or manifest.made_from != run.made_from:
            why = "its partition was published anew since, and what it had staged was tidied away"
            raise InputMissing(run.uri, why, "Run it again with a sample: samples stay.")
        keys = [f"{results_folder(run)}/{part.name}" for part in manifest.parts]
    paths = [site.store.download(key, folder / f"{name}-{number}.parquet") for number, key in enumerate(keys)]
    return f"[{literals(paths)}]"


def _summary(site: Site, run: Run) -> Summary:
    summary = site.store.get_shape(run.key("summary.json"), Summary)
    if summary is None or not summary.published:
        raise InputMissing(run.uri, "it has published nothing" if summary else "it has not come to its end", RUNS_ARE_LISTED)
    return summary


def _side(run: Run, summary: Summary, answered: int) -> Side:
    return Side(
        run=run.input.run,
        label=run.input.label,
        model=run.job.spec.request.model,
        prompt_version=run.job.prompt.version,
        rows=summary.rows,
        outcomes=summary.outcomes,
        answered=answered,
        tokens_in=summary.usage.input_tokens,
        tokens_out=summary.usage.output_tokens,
        cost_usd=summary.cost_usd.actual,
        report=summary.report,
    )


def _field(database: duckdb.DuckDBPyConnection, both: str, name: str) -> Field:
    old, new = f"old.{quoted(name)}", f"new.{quoted(name)}"
    [(same, changed)] = database.execute(
        f"SELECT count(*) FILTER ({old} IS NOT DISTINCT FROM {new}), count(*) FILTER ({old} IS DISTINCT FROM {new}) FROM {both}"
    ).fetchall()
    moved = database.execute(
        f"""SELECT left(coalesce({old}::VARCHAR, 'null'), 80) AS was, left(coalesce({new}::VARCHAR, 'null'), 80) AS is_now, count(*) AS n
            FROM {both} WHERE {old} IS DISTINCT FROM {new} GROUP BY 1, 2 ORDER BY n DESC, 1, 2 LIMIT {CHANGES_SHOWN}"""
    ).fetchall()
    changes = tuple(FieldChange(old=was, new=is_now, rows=count) for was, is_now, count in moved)
    return Field(name=name, same=same, changed=changed, changes=changes)


def _examples(database: duckdb.DuckDBPyConnection, both: str, identifier: str, name: str) -> list[Example]:
    old, new, row = f"old.{quoted(name)}", f"new.{quoted(name)}", f"old.{quoted(identifier)}"
    found: list[tuple[Any, ...]] = database.execute(
        f"""SELECT {row}::VARCHAR, left(coalesce({old}::VARCHAR, 'null'), 300), left(coalesce({new}::VARCHAR, 'null'), 300)
            FROM {both} WHERE {old} IS DISTINCT FROM {new} ORDER BY hash({row}), 1 LIMIT 5"""
    ).fetchall()
    return [Example(id=row_id, field=name, old=was, new=is_now) for row_id, was, is_now in found]
