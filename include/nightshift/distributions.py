"""How the values of a run's columns are spread, and how far they have moved since the last published run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from nightshift.job import Job
from nightshift.runs import Site
from nightshift.shapes import Assembled, Distribution
from nightshift.stores.database import literals, open_database, quoted

if TYPE_CHECKING:
    import duckdb

CHART_BARS, BARS = 12, 10  # of values, and of a histogram


def distributions(site: Site, job: Job, assembled: Assembled, last: Mapping[str, Distribution]) -> dict[str, Distribution]:
    """Per column of report.charts and report.drift: how its values are spread over the staged rows. `last`: those of the last run."""
    columns = dict.fromkeys([*job.spec.report.charts, *job.spec.report.drift])
    if not columns:
        return {}
    with site.scratch() as folder, open_database(Path(folder)) as database:
        paths = [site.store.download(key, Path(folder) / f"part-{i}.parquet") for i, key in enumerate(assembled.parts)]
        database.execute(f"CREATE VIEW results AS SELECT * FROM read_parquet([{literals(paths)}])")
        types = {field.name: str(field.type) for field in pq.read_schema(paths[0])}
        return {column: _distribution(database, column, types[column], last.get(column)) for column in columns}


def _distribution(database: duckdb.DuckDBPyConnection, column: str, kind: str, last: Distribution | None) -> Distribution:
    name = quoted(column)
    return _histogram(database, name, last) if kind in ("double", "float") else _most_frequent(database, name, kind)


def _histogram(database: duckdb.DuckDBPyConnection, name: str, last: Distribution | None) -> Distribution:
    ends = f"SELECT min({name}), max({name}), count({name}) FROM results WHERE isfinite({name})"
    [(low, high, total)] = database.execute(ends).fetchall()
    if not total:
        return Distribution(kind="histogram", bars=(), total=0)
    width = (high / BARS - low / BARS) or 1.0
    bars = tuple((f"{low + bar * width:.2f}", count) for bar, count in enumerate(_in_bars(database, name, low, width)))
    in_last = None if last is None or last.low is None or last.width is None else _in_bars(database, name, last.low, last.width)
    return Distribution(kind="histogram", bars=bars, total=total, low=low, width=width, in_last=in_last)


def _in_bars(database: duckdb.DuckDBPyConnection, name: str, low: float, width: float) -> tuple[int, ...]:
    """How many values of a column stand in each bar of a histogram; those beyond its ends in the outer ones."""
    place = f"least({BARS - 1}, greatest(0, floor(({name} - {low!r}) / {width!r})))::INTEGER"
    found = dict(database.execute(f"SELECT {place}, count(*) FROM results WHERE isfinite({name}) GROUP BY 1").fetchall())
    return tuple(found.get(bar, 0) for bar in range(BARS))


def _most_frequent(database: duckdb.DuckDBPyConnection, name: str, kind: str) -> Distribution:
    """The most frequent values, whole numbers in their order, and all others together."""
    value = f"unnest({name})" if kind.startswith("list") else name
    values = f"(SELECT {value} AS v FROM results)"
    found = database.execute(
        f"SELECT v::VARCHAR, count(*) AS n FROM {values} WHERE v IS NOT NULL GROUP BY 1 ORDER BY n DESC, 1 LIMIT {CHART_BARS}"
    ).fetchall()
    [(total,)] = database.execute(f"SELECT count(v) FROM {values}").fetchall()
    shown = sorted(found, key=lambda bar: int(bar[0])) if kind.startswith("int") else found
    rest = total - sum(count for _, count in found)
    return Distribution(kind="shares", bars=(*shown, *([("(others)", rest)] if rest else [])), total=total)


def drift_of(new: Distribution | None, old: Distribution | None) -> float | None:
    """Total variation distance between two distributions: 0 = the same shares, 1 = nothing in common. None: nothing to compare."""
    if new is None or old is None or not new.total or not old.total:
        return None
    if new.kind == old.kind == "shares":
        counts: Iterable[tuple[str, int]] = new.bars
    elif new.in_last is not None:  # counted in the bars of the old one: its own stand elsewhere
        counts = ((label, count) for (label, _), count in zip(old.bars, new.in_last, strict=True))
    else:
        return None
    one, two = ({label: count / total for label, count in bars} for bars, total in ((counts, new.total), (old.bars, old.total)))
    return round(sum(abs(one.get(label, 0.0) - two.get(label, 0.0)) for label in one.keys() | two.keys()) / 2, 4)
