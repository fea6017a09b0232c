"""The shapes of what looks over several runs: a comparison of two, a period of all."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from nightshift.shapes import Outcome, Wire


class Side(Wire):
    """One of the two runs."""

    run: str
    label: str
    model: str
    prompt_version: str
    rows: int
    outcomes: dict[Outcome, int]
    answered: int  # rows with a valid answer
    tokens_in: int
    tokens_out: int
    cost_usd: float | None  # that this run has paid; reused answers cost nothing
    report: str


class FieldChange(Wire):
    """How often an answer's field has moved from one value to another. Long values are cut."""

    old: str
    new: str
    rows: int


class Field(Wire):
    """One field of the answers, over the rows that both have answered."""

    name: str
    same: int
    changed: int
    changes: tuple[FieldChange, ...]  # the most frequent


class Example(Wire):
    """A row that is answered otherwise."""

    id: str
    field: str
    old: str
    new: str


class Comparison(Wire):
    """Two runs side by side. Stored as `samples/<job>/compare-<hash>.json`, with a page beside it."""

    job: str
    old: Side
    new: Side
    common: int  # rows that both have answered
    only_old: int
    only_new: int
    fields: tuple[Field, ...]
    examples: tuple[Example, ...]
    page: str


class Line(Wire):
    """What one job did in the period, by what it asked."""

    job: str
    model: str
    prompt_version: str
    runs: int
    published: int
    held: int
    failed: int
    rows: int
    outcomes: dict[Outcome, int]
    submitted: int
    reused: int
    adopted: int
    duplicates: int
    paid: int
    input_tokens: int
    output_tokens: int
    cost_usd: float | None  # None: of some run it is not known
    saved_usd: float | None


class FigureTable(Wire):
    """One figure of one job, or why there is none."""

    job: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | int | None, ...], ...]
    total: int  # rows of the whole figure
    problem: str | None = None


class PeriodicReport(Wire):
    """A period in numbers. Stored as `reports/<name>/<period>/report.json`, with a page and CSV files beside it."""

    name: str
    since: datetime
    until: datetime
    lines: tuple[Line, ...]
    figures: tuple[FigureTable, ...]
    page: str

    @property
    def cost_usd(self) -> float | None:
        """What the period has cost; None where some of it is not known."""
        return total_usd(line.cost_usd for line in self.lines)

    @property
    def saved_usd(self) -> float | None:
        """What duplicates and reuse have spared."""
        return total_usd(line.saved_usd for line in self.lines)

    def total(self, name: str) -> int:
        """The sum of a count over all lines."""
        return sum(getattr(line, name) for line in self.lines)


def total_usd(values: Iterable[float | None]) -> float | None:
    """What some amounts come to; None where one of them is not known."""
    listed = list(values)
    return None if None in listed else round(sum(value for value in listed if value is not None), 6)
