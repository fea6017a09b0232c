"""`make chaos`: the crash matrix, random lives, and a real Airflow whose parts are killed. Prints a table, writes `bench/chaos.json`.

Exit code 0 only where nothing was bought twice, nothing was lost, nothing came out twice and the bill is the ideal bill.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.chaos.machine import Lives
from bench.chaos.matrix import CHANGES, Matrix, Verdict, cases_of, create_points, served_aws, summarise
from nightshift.shapes import ProviderName
from nightshift.terminal import output

RESULT = Path(__file__).resolve().parent.parent / "chaos.json"
COLUMNS = (
    "crash_points",
    "duplicate_batches",
    "lost_rows",
    "double_outcomes",
    "torn_partitions",
    "misbooked",
    "stuck",
    "repeated_requests",
    "bill_ratio",
)


def main() -> None:
    """Run what is asked for and say what came of it."""
    options = _options()
    logging.getLogger("obstore").setLevel(logging.ERROR)
    started = time.monotonic()
    sections: dict[str, dict[str, Any]] = {}
    stuck: list[str] = []
    for provider in options.providers:
        with TemporaryDirectory(prefix="nightshift-chaos-") as folder, served_aws(Path(folder) / "s3"):
            verdicts, ideal = _matrix(Path(folder), provider, options)
        for scenario in dict.fromkeys(verdict.scenario for verdict in verdicts):
            sections[f"{provider}: {scenario}"] = summarise([verdict for verdict in verdicts if verdict.scenario == scenario], ideal)
        stuck += [f"{provider}: {verdict.scenario}: {verdict.stuck}" for verdict in verdicts if verdict.stuck]
        _keep(options, sections, stuck)  # what follows takes minutes: what is known by now is kept
    if options.examples:
        sections["random lives"] = _random(options.examples)
        _keep(options, sections, stuck)
    if options.airflow:
        from bench.chaos.stack import kill_airflow

        sections["Airflow's parts killed"] = kill_airflow(
            options.kills, options.seed, say=lambda line: output.print(f"  {line}", style="dim")
        )
    totals = _keep(options, sections, stuck)
    _show(sections, totals)
    output.print(f"\n{totals['crash_points']} deaths in {time.monotonic() - started:.0f} s; written to bench/{RESULT.name}")
    sys.exit(0 if _is_clean(totals) else 1)


def _keep(options: argparse.Namespace, sections: dict[str, dict[str, Any]], stuck: list[str]) -> dict[str, Any]:
    """Write what is known; its totals."""
    totals = _totals(sections)
    RESULT.write_text(json.dumps({**totals, "seed": options.seed, "scenarios": sections, "stuck_cases": stuck}, indent=2) + "\n")
    return totals


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--providers", nargs="+", default=list(CHANGES), choices=list(CHANGES), help="whose matrix to run")
    parser.add_argument("--seed", type=int, default=1, help="of the random moments")
    parser.add_argument("--at-once", type=int, default=2, help="cases side by side")
    parser.add_argument("--timed", type=int, default=25, help="deaths at a random moment")
    parser.add_argument("--rivals", type=int, default=15, help="pairs of workers at one run, one of which is killed")
    parser.add_argument("--examples", type=int, default=60, help="random lives on the core")
    parser.add_argument("--kills", type=int, default=8, help="of parts of a running Airflow")
    parser.add_argument("--no-airflow", dest="airflow", action="store_false", help="only what needs no Airflow")
    parser.add_argument("--sample", type=int, help="only every n-th crash point of the matrix")
    return parser.parse_args()


def _matrix(folder: Path, provider: ProviderName, options: argparse.Namespace) -> tuple[list[Verdict], float]:
    """The matrix of one provider; of those after the first only every third crash point, for most are the store's and not theirs."""
    matrix = Matrix(folder, workers=2 * options.at_once, provider=provider)
    sample = options.sample or (1 if provider == options.providers[0] else 3)
    try:
        points, ideal = matrix.points()
        create = create_points(points, provider)
        firsts = [next(point for point in create if point.startswith(word)) for word in ("before", "after")]
        successors = {point: matrix.successors_points(point) for point in firsts}
        every = cases_of(points, successors, seed=options.seed, rivals=options.rivals, timed=options.timed, provider=provider)
        cases = [case for number, case in enumerate(every) if number % sample == 0 or (case.die_at in create and not case.then_at)]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=output, disable=not output.is_terminal) as progress:
            task = progress.add_task(f"crash matrix, {provider}", total=len(cases))
            return matrix.run(cases, options.at_once, _advancing(progress, task)), ideal
    finally:
        matrix.stop()


def _advancing(progress: Progress, task: Any) -> Callable[[Verdict], None]:
    return lambda verdict: progress.advance(task)


def _random(examples: int) -> dict[str, Any]:
    """Random lives of several workers; the machine itself fails where anything is paid twice or lost."""
    deaths = Lives.deaths
    machine = settings(
        max_examples=examples,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        print_blob=False,
    )
    run_state_machine_as_test(Lives, settings=machine)
    return {
        "crash_points": Lives.deaths - deaths,
        "duplicate_batches": 0,
        "lost_rows": 0,
        "double_outcomes": 0,
        "torn_partitions": 0,
        "misbooked": 0,
        "stuck": 0,
        "repeated_requests": 0,
        "bill_ratio": 1.0,
    }


def _totals(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    counted = {name: sum(section[name] for section in sections.values()) for name in COLUMNS if name != "bill_ratio"}
    batches = [section for name, section in sections.items() if not name.startswith("live:")]  # what was in flight on demand is asked again
    weights = [(section["bill_ratio"], section["crash_points"]) for section in batches if section["crash_points"]]
    total = sum(weight for _, weight in weights)
    return {**counted, "bill_ratio": round(sum(ratio * weight for ratio, weight in weights) / total, 4) if total else None}


def _is_clean(totals: dict[str, Any]) -> bool:
    wrong = ("duplicate_batches", "lost_rows", "double_outcomes", "torn_partitions", "misbooked", "stuck")
    return not any(totals[name] for name in wrong) and totals["bill_ratio"] == 1.0


def _show(sections: dict[str, dict[str, Any]], totals: dict[str, Any]) -> None:
    table = Table(box=None, header_style="dim", show_footer=True, footer_style="bold")
    table.add_column("scenario", footer="all")
    for name in COLUMNS:
        table.add_column(name.replace("_", " "), justify="right", footer=_cell(totals[name]))
    for scenario, section in sections.items():
        table.add_row(scenario, *(_cell(section[name]) for name in COLUMNS))
    output.print(table)


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if isinstance(value, float) else f"{value:,}"


if __name__ == "__main__":
    main()
