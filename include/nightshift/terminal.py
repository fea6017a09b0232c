"""What a person at a terminal is shown: tables, progress bars, and where things are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from nightshift.errors import NightshiftError, ShardHeld
from nightshift.pages import MEANING, measured_on, output_bound, plural, stated, usd
from nightshift.shapes import OUTCOMES, Plan, Settled, Summary

if TYPE_CHECKING:
    from nightshift.drive import Watcher
    from nightshift.overviews import Comparison
    from nightshift.providers.protocol import Snapshot

PIPE_WIDTH = 200


def _width(stream: TextIO | None) -> int | None:
    """A terminal tells its own; nobody folds a pipe, and a stream that was closed is none."""
    return None if stream is not None and stream.isatty() else PIPE_WIDTH


people = Console(stderr=True, highlight=False, width=_width(sys.stderr))  # what happens on the way
output = Console(highlight=False, width=_width(sys.stdout))  # what a command was asked for


def show_summary(summary: Summary, console: Console = people) -> None:
    """The outcome table, the bill and where the report is."""
    if summary.rows and not any(summary.outcomes.values()):
        console.print(f"outcomes  not known of {summary.rows:,} rows: the run ended before its answers were put together")
    else:
        console.print(_outcome_table(summary))
    counts, cost = summary.requests, summary.cost_usd
    batches = f" in {plural(summary.batches, 'batch', 'batches')}" if summary.batches else ""
    console.print(
        f"\nrequests  {counts.submitted:,} {'to submit' if summary.state == 'failed' else 'submitted'}{batches}, {counts.reused:,} reused, "
        f"{counts.adopted:,} adopted, {counts.duplicates:,} duplicates; {plural(summary.paid, 'answer')} paid for",
        soft_wrap=True,
    )
    if summary.taken_over:
        console.print(f"          {summary.taken_over:,} of the adopted were sent by this run: nobody else had", soft_wrap=True)
    if counts.submitted == 0 and summary.paid == 0:
        console.print("          nothing had to be paid for: every request is answered, or in flight, elsewhere")
    saved = "" if summary.redrive_of else f", saved {usd(cost.saved)}"
    console.print(f"cost      {usd(cost.actual)}, estimated {usd(cost.estimated)}{saved}")
    colour = {"published": "green", "held": "yellow"}.get(summary.state, "red")
    console.print(f"state     [{colour}]{summary.state}[/]")
    if summary.problem:
        console.print(f"          {summary.problem}", markup=False, soft_wrap=True)
    if summary.changed_columns:
        console.print(f"columns   not as in the last published run: {'; '.join(summary.changed_columns)}", markup=False, soft_wrap=True)
    console.print(f"results   {summary.results or 'not published: readers see what they saw before'}", soft_wrap=True)
    console.print(f"report    {summary.report}", soft_wrap=True)


def _outcome_table(summary: Summary) -> Table:
    table = Table(box=None, header_style="dim", show_footer=True)
    table.add_column("outcome", footer="all")
    table.add_column("rows", justify="right", footer=f"{sum(summary.outcomes.values()):,}")
    table.add_column("meaning", footer=f"of {summary.rows:,} rows read", style="dim")
    for outcome in OUTCOMES:
        if summary.outcomes[outcome] or outcome == "succeeded":
            table.add_row(outcome, f"{summary.outcomes[outcome]:,}", MEANING[outcome])
    return table


def show_comparison(found: Comparison) -> None:
    """How much the new differs from the old, and where the page is."""
    table = Table(box=None, header_style="dim")
    for column in ("", "old", "new"):
        table.add_column(column)
    old, new = found.old, found.new
    table.add_row("model", old.model, new.model)
    table.add_row("prompt", old.prompt_version, new.prompt_version)
    table.add_row("valid answers", f"{old.answered:,} of {old.rows:,}", f"{new.answered:,} of {new.rows:,}")
    table.add_row("cost", usd(old.cost_usd), usd(new.cost_usd))
    output.print(table)
    for field in found.fields:
        share = f"{field.changed / found.common:.1%}" if found.common else "–"
        output.print(f"\n{field.name}: {field.changed:,} of {found.common:,} rows changed ({share})")
        for change in field.changes[:5]:
            output.print(f"  {change.rows:>6,}  {change.old} → {change.new}", markup=False, highlight=False)
    output.print(f"\npage      {found.page}", soft_wrap=True)


def plan_table(drafted: Plan) -> Table:
    """A plan: rows, requests, reuse, tokens and cost."""
    table = Table(box=None, show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_column(style="dim")
    estimate = drafted.estimate
    rows = [
        ("rows", f"{drafted.rows:,}", ""),
        ("rejected", f"{drafted.rejected:,}", "; ".join(f"{why}: {count}" for why, count in list(drafted.reasons.items())[:4])),
        ("duplicates", f"{drafted.duplicates:,}", "rows that ask what another row asks"),
        ("requests", f"{drafted.unique:,}", "distinct"),
        ("  reused", f"{drafted.reused:,}", "answered and paid for earlier"),
        ("  adopted", f"{drafted.adopted:,}", "in another run's shards: it pays for them, unless it dies before it sends them"),
        ("  to submit", f"{drafted.submitted:,}", f"in {plural(len(drafted.own_shards), 'shard')}"),
        ("input tokens", f"{estimate.input_tokens:,}", measured_on(estimate)),
        ("output tokens", f"{estimate.output_tokens:,}", output_bound(estimate)),
        ("cost", usd(estimate.usd), f"{stated(estimate).partition(', ')[2]}"),
        ("", "", estimate.basis),
        ("saved", usd(drafted.saved_usd), "by duplicates and reuse"),
    ]
    for row in rows:
        table.add_row(*row)
    return table


@contextmanager
def shown(*, quiet: bool) -> Iterator[Watcher]:
    """Progress bars on a terminal, and a line for what is new elsewhere."""
    from nightshift.drive import Watcher

    if quiet or not people.is_terminal:
        yield Watcher() if quiet else _lines()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=people) as progress:
        bars: dict[str, TaskID] = {}
        shards: dict[str, tuple[int, bool]] = {}
        halted = set[TaskID]()  # bars that stay as they are
        totals, trouble = {"requests": 0}, _Trouble()

        def finish() -> None:
            for task in progress.tasks:
                if task.id in halted:
                    continue
                total = task.total or max(task.completed, 1)
                progress.update(task.id, completed=total, total=total)

        def stage(name: str) -> None:
            finish()
            bars[name] = progress.add_task(name, total=None, note="")

        def stopping() -> None:
            halted.update(task.id for task in progress.tasks)
            _tell_stopping()

        def rows(count: int) -> None:
            progress.update(bars["plan"], completed=count, note="rows")

        def planned(drafted: Plan) -> None:
            totals["requests"] = drafted.submitted + drafted.adopted

        def shard(key: str, seen: Snapshot | NightshiftError | Settled) -> None:
            if isinstance(seen, NightshiftError):
                trouble.tell(key, seen)
                return
            trouble.end(key)
            shards[key] = (seen.requests, True) if isinstance(seen, Settled) else (seen.done, False)
            done, finished = sum(count for count, _ in shards.values()), sum(1 for _, ended in shards.values() if ended)
            note = f"requests, {finished} shards settled"
            progress.update(bars["wait"], completed=min(done, totals["requests"]), total=max(totals["requests"], 1), note=note)

        yield Watcher(stage=stage, stopping=stopping, rows=rows, planned=planned, shard=shard)
        finish()


def _lines() -> Watcher:
    """What a log is told of a run: stages, shards that are settled, and trouble as long as it is new."""
    from nightshift.drive import Watcher

    settled, trouble = set[str](), _Trouble()

    def stage(name: str) -> None:
        people.print(f"{name} …", style="dim")

    def shard(key: str, seen: Snapshot | NightshiftError | Settled) -> None:
        if isinstance(seen, NightshiftError):
            trouble.tell(key, seen)
            return
        trouble.end(key)
        if isinstance(seen, Settled):
            settled.add(key)
            people.print(f"shard {key[:12]} is settled, {len(settled)} so far", style="dim")

    return Watcher(stage=stage, stopping=_tell_stopping, shard=shard)


def _tell_stopping() -> None:
    people.print("stopping: calls that are under way get some seconds", style="dim")


class _Trouble:
    """What goes wrong with shards: told once, until it is over for all of them."""

    def __init__(self) -> None:
        self._shards: dict[str, set[str]] = {}  # by what is wrong with them

    def tell(self, shard: str, error: NightshiftError) -> None:
        what = error.why if isinstance(error, ShardHeld) else str(error)
        if not self._shards.get(what):
            people.print(f"looking again: {error}", style="dim", markup=False, soft_wrap=True)
        self._shards.setdefault(what, set()).add(shard)

    def end(self, shard: str) -> None:
        for shards in self._shards.values():
            shards.discard(shard)
