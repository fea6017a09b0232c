"""The periodic report: what all jobs did in a period, in sums of their run summaries, and the figures that they declare."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nightshift.job import Figure, Job
from nightshift.overviews import FigureTable, Line, PeriodicReport, total_usd
from nightshift.pages import render_periodic
from nightshift.partitions import MANIFEST, Manifest
from nightshift.runs import Site
from nightshift.shapes import OUTCOMES, Outcome, Summary
from nightshift.stores.database import literals, open_database, quoted
from nightshift.stores.objects import Objects

if TYPE_CHECKING:
    import duckdb

ROWS_SHOWN = 500  # of a figure, on the page; its CSV file holds all
CLOCK_SLACK = timedelta(hours=1)  # between the store's clock and ours
DATED = re.compile(r"dt=(\d{4}-\d{2}-\d{2})")


def write_periodic(site: Site, jobs: Sequence[Job], *, name: str, since: datetime, until: datetime) -> PeriodicReport:
    """Write the report of a period. Repeating it replaces it. `jobs`: those whose figures are drawn, as they are declared now."""
    summaries = list(summaries_between(site.store, since, until))
    folder = f"reports/{name}/{since.astimezone(UTC):%Y-%m-%dT%H%MZ}--{until.astimezone(UTC):%Y-%m-%dT%H%MZ}"
    figures, tables = [], {}
    for job in jobs:
        for number, (figure, table) in enumerate(_figures(site, job, [each for each in summaries if each.job == job.name]), start=1):
            figures.append(figure)
            if table is not None:
                tables[f"{job.name}-{number}.csv"] = table
    report = PeriodicReport(
        name=name,
        since=since,
        until=until,
        lines=tuple(lines_of(summaries)),
        figures=tuple(figures),
        page=site.store.uri_of(f"{folder}/report.html"),
    )
    site.store.put(f"{folder}/runs.csv", _csv(_flat(line) for line in report.lines))
    for file, table in tables.items():
        site.store.put(f"{folder}/{file}", table)
    site.store.put_shape(f"{folder}/report.json", report)
    site.store.put(f"{folder}/report.html", render_periodic(report).encode())
    return report


def summaries_between(store: Objects, since: datetime, until: datetime) -> Iterator[Summary]:
    """The summaries of runs that have ended in a period, in key order."""
    for found in store.scan("runs"):
        if found.key.endswith("/summary.json") and found.modified >= (since - CLOCK_SLACK).timestamp():
            summary = store.get_shape(found.key, Summary)
            if summary is not None and since <= summary.finished_at < until:
                yield summary


def lines_of(summaries: Iterable[Summary]) -> list[Line]:
    """The sums of run summaries by job, model and prompt version. Dry runs have done nothing, and are left out."""
    groups: dict[tuple[str, str, str], list[Summary]] = {}
    for summary in summaries:
        if summary.state != "planned":
            groups.setdefault((summary.job, summary.model, summary.prompt_version), []).append(summary)
    return [_line(*key, group) for key, group in sorted(groups.items())]


def _line(job: str, model: str, prompt_version: str, group: list[Summary]) -> Line:
    states, outcomes = Counter(each.state for each in group), Counter[Outcome]()
    for each in group:
        outcomes.update(each.outcomes)
    return Line(
        job=job,
        model=model,
        prompt_version=prompt_version,
        runs=len(group),
        published=states["published"],
        held=states["held"],
        failed=states["failed"],
        rows=sum(each.rows for each in group),
        outcomes={name: outcomes[name] for name in OUTCOMES},
        submitted=sum(each.requests.submitted for each in group),
        reused=sum(each.requests.reused for each in group),
        adopted=sum(each.requests.adopted for each in group),
        duplicates=sum(each.requests.duplicates for each in group),
        paid=sum(each.paid for each in group),
        input_tokens=sum(each.usage.input_tokens for each in group),
        output_tokens=sum(each.usage.output_tokens for each in group),
        cost_usd=total_usd(each.cost_usd.actual for each in group),
        saved_usd=total_usd(each.cost_usd.saved or 0.0 for each in group),
    )


def _figures(site: Site, job: Job, summaries: list[Summary]) -> Iterator[tuple[FigureTable, bytes | None]]:
    """A job's figures over the partitions that its runs have published in the period, as they stand now: (table, its CSV)."""
    partitions = {each.partition: each.finished_at for each in summaries if each.published and each.sample is None}
    if not job.spec.report.figures or not partitions:
        return
    import duckdb

    with site.scratch() as folder, open_database(Path(folder)) as database:
        views = [view for number, each in enumerate(partitions.items()) for view in _view(site, job, Path(folder), number, *each)]
        if not views:
            return
        try:
            database.execute(f"CREATE VIEW results AS {' UNION ALL BY NAME '.join(views)}")
        except duckdb.Error as error:  # partitions whose columns do not go together
            for figure in job.spec.report.figures:
                yield _undrawn(job.name, figure, error), None
            return
        database.execute(f"SET allowed_directories = [{literals([folder])}]")  # a figure's SQL sees the results and nothing else
        database.execute("SET enable_external_access = false")
        database.execute("SET lock_configuration = true")
        for figure in job.spec.report.figures:
            yield _draw(database, job.name, figure)


def _undrawn(job: str, figure: Figure, error: Exception) -> FigureTable:
    return FigureTable(job=job, title=figure.title, columns=(), rows=(), total=0, problem=str(error).strip().splitlines()[0])


def _view(site: Site, job: Job, folder: Path, number: int, partition: str, published_at: datetime) -> Iterator[str]:
    """One partition's rows, with the columns `partition` and `day`."""
    where = f"results/{job.name}/{partition}"
    manifest = site.store.get_shape(f"{where}/{MANIFEST}", Manifest)
    if manifest is None or not manifest.parts:
        return
    paths = [site.store.download(f"{where}/{part.name}", folder / f"{number}-{at}.parquet") for at, part in enumerate(manifest.parts)]
    dated = DATED.search(partition)
    day = dated[1] if dated else f"{published_at:%Y-%m-%d}"
    yield f"SELECT *, {literals([partition])} AS partition, DATE '{day}' AS day FROM read_parquet([{literals(paths)}])"


def _draw(database: duckdb.DuckDBPyConnection, job: str, figure: Figure) -> tuple[FigureTable, bytes | None]:
    import duckdb

    try:
        found = database.execute(query_of(figure))
        columns = tuple(each[0] for each in found.description or ())
        rows = [tuple(_plain(value) for value in row) for row in found.fetchall()]
    except duckdb.Error as error:
        return _undrawn(job, figure, error), None
    table = FigureTable(job=job, title=figure.title, columns=columns, rows=tuple(rows[:ROWS_SHOWN]), total=len(rows))
    return table, _csv(dict(zip(columns, row, strict=True)) for row in rows)


def query_of(figure: Figure) -> str:
    """The SQL of a figure over the view `results`."""
    names = [f"({by}) AS {quoted(_column(by))}" for by in figure.by]
    grouped = f"SELECT {', '.join([*names, f'({figure.value}) AS value'])} FROM results" + (" GROUP BY ALL" if names else "")
    if not figure.share:
        return f"{grouped} ORDER BY ALL"
    whole = ", ".join(quoted(_column(by)) for by in figure.by[:-1])
    over = f"OVER (PARTITION BY {whole})" if whole else "OVER ()"
    return f"SELECT * EXCLUDE (value), value, value / sum(value) {over} AS share FROM ({grouped}) ORDER BY ALL"


def _column(expression: str) -> str:
    """What a column of a figure is called: as it is written, without quotes."""
    return expression.strip().strip('"')


def _plain(value: Any) -> str | float | int | None:
    if value is None or isinstance(value, str | int):
        return value
    return round(value, 6) if isinstance(value, float) else str(value)


def _flat(line: Line) -> dict[str, Any]:
    plain = line.model_dump(mode="json", exclude={"outcomes"})
    return {**plain, **{str(name): count for name, count in line.outcomes.items()}}


def _csv(rows: Iterable[dict[str, Any]]) -> bytes:
    listed = list(rows)
    text = io.StringIO(newline="")
    if listed:
        writer = csv.DictWriter(text, list(listed[0]))
        writer.writeheader()
        writer.writerows(listed)
    return text.getvalue().encode()
