"""The periodic report: its numbers are those of the run summaries, its figures those of the published Parquet."""

from __future__ import annotations

import csv
import io
import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import duckdb
import pytest

from nightshift.job import Figure
from nightshift.job_file import vary
from nightshift.notices import notice_of_period
from nightshift.periodic import query_of, summaries_between, write_periodic
from nightshift.shapes import OUTCOMES
from tests.conftest import go, reviews

TODAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
WEEK = {"since": TODAY - timedelta(days=1), "until": TODAY + timedelta(days=2)}
SHARE = {"title": "Sentiment by stars", "value": "count(*)", "by": ["stars", "sentiment"], "share": True}
FIGURES = {
    "figures": [
        SHARE,
        {"title": "Confidence by week", "value": "avg(confidence)", "by": ["date_trunc('week', day)"]},
        {"title": "Rows"},
        {"title": "Broken", "value": "avg(no_such_column)"},
        {"title": "Curious", "value": "(SELECT count(*) FROM read_text('/etc/hostname'))"},
    ]
}


@pytest.fixture
def lived(world):
    """A world in which some runs have ended: two prompts, reuse, a sample, a run that was held, rows that were rejected."""
    job = world.job(report=FIGURES)
    rows = [*reviews(40), {"id": "long", "text": "x" * 600, "stars": 1}, {"id": "twin", "text": reviews(1)[0]["text"], "stars": 2}]
    go(world, job, world.write("a.jsonl", rows))
    go(world, job, world.write("a.jsonl", rows))
    go(world, vary(job, prompt_source="user:\nOtherwise: {{ text }}\n"), world.write("b.jsonl", reviews(10)), sample=5)
    world.rehearsal.faults(errored=1.0)
    go(world, world.job(policy={"retry": {"errored": 0}}), world.write("c.jsonl", reviews(60)[50:]))
    world.rehearsal.faults()
    return world, job


def test_the_numbers_are_the_sums_of_the_run_summaries(lived):
    world, job = lived
    report = write_periodic(world.site, [job], name="weekly", **WEEK)
    summaries = [
        json.loads(world.site.store.get(found.key)) for found in world.site.store.scan("runs") if found.key.endswith("summary.json")
    ]
    assert len(summaries) == report.total("runs") == 4
    assert (report.total("published"), report.total("held"), report.total("failed")) == (3, 1, 0)
    assert report.total("rows") == sum(each["rows"] for each in summaries)
    assert report.total("paid") == sum(each["paid"] for each in summaries) == world.rehearsal.bill()["requests"]
    for name in ("submitted", "reused", "adopted", "duplicates"):
        assert report.total(name) == sum(each["requests"][name] for each in summaries)
    for outcome in OUTCOMES:
        assert sum(line.outcomes[outcome] for line in report.lines) == sum(each["outcomes"][outcome] for each in summaries)
    assert sum(sum(line.outcomes.values()) for line in report.lines) == report.total("rows")
    assert report.cost_usd == pytest.approx(sum(each["cost_usd"]["actual"] for each in summaries))
    assert report.cost_usd == pytest.approx(world.rehearsal.bill()["usd"], abs=1e-5)
    assert report.saved_usd == pytest.approx(sum(each["cost_usd"]["saved"] for each in summaries))
    assert len({(line.job, line.model, line.prompt_version) for line in report.lines}) == len(report.lines) == 2


def test_its_csv_says_the_same(lived):
    world, job = lived
    report = write_periodic(world.site, [job], name="weekly", **WEEK)
    folder = world.site.store.key_of(report.page).rpartition("/")[0]
    lines = list(csv.DictReader(io.StringIO(world.site.store.get(f"{folder}/runs.csv").decode())))
    assert sum(int(line["rows"]) for line in lines) == report.total("rows")
    assert sum(Decimal(line["cost_usd"]) for line in lines) == pytest.approx(Decimal(str(report.cost_usd)))
    assert sum(int(line["rejected"]) for line in lines) == 2


def test_figures_are_those_of_the_published_parquet(lived):
    world, job = lived
    report = write_periodic(world.site, [job], name="weekly", **WEEK)
    share, weekly, rows, broken, curious = report.figures
    published = duckdb.sql(f"SELECT * FROM read_parquet('{world.folder}/store/results/reviews/*/part-*.parquet')")
    assert rows.rows == ((len(published),),), "samples are in no figure"
    counted = {(stars, sentiment): count for stars, sentiment, count, _ in share.rows}
    assert counted == {(a, b): n for a, b, n in duckdb.sql("SELECT stars, sentiment, count(*) FROM published GROUP BY ALL").fetchall()}
    for stars in {row[0] for row in share.rows}:
        assert sum(row[3] for row in share.rows if row[0] == stars) == pytest.approx(1)
    assert weekly.rows[0][1] == pytest.approx(duckdb.sql("SELECT avg(confidence) FROM published").fetchall()[0][0], abs=1e-6)
    assert "no_such_column" in broken.problem
    assert "disabled" in curious.problem.lower() or "permission" in curious.problem.lower(), "a figure sees the results and nothing else"
    page = world.site.store.get(world.site.store.key_of(report.page)).decode()
    assert "Sentiment by stars" in page
    assert "cannot be drawn" in page
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", ""), "the page asks nobody for anything"


def test_a_period_without_runs_is_a_report_without_lines_and_writing_it_again_writes_the_same(lived):
    world, job = lived
    then = {"since": datetime(2020, 1, 1, tzinfo=UTC), "until": datetime(2020, 1, 8, tzinfo=UTC)}
    first = write_periodic(world.site, [job], name="weekly", **then)
    assert (first.lines, first.cost_usd) == ((), 0)
    again = write_periodic(world.site, [job], name="weekly", **then)
    assert first == again
    assert list(summaries_between(world.site.store, **then)) == []


def test_it_is_told_in_a_few_lines(lived):
    world, job = lived
    notice = notice_of_period(write_periodic(world.site, [job], name="weekly", **WEEK))
    assert "4 runs (1 not published)" in notice.text
    assert notice.text.splitlines()[-1].endswith("report.html")


@pytest.mark.parametrize(
    ("figure", "query"),
    [
        pytest.param(Figure(title="x"), "SELECT (count(*)) AS value FROM results ORDER BY ALL", id="one number"),
        pytest.param(
            Figure(title="x", value="avg(a)", by=["b"]),
            'SELECT (b) AS "b", (avg(a)) AS value FROM results GROUP BY ALL ORDER BY ALL',
            id="by a column",
        ),
    ],
)
def test_a_figure_is_a_query(figure, query):
    assert query_of(figure) == query
