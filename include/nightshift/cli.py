"""The command line: the same job and the same steps as in Airflow, in one process."""

from __future__ import annotations

from nightshift.process import end_process  # isort: skip  first of all: what it sets is read by all that is imported after it

import getpass
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import orjson
import typer
from rich.table import Table

from nightshift import __version__
from nightshift.arguments import dates_of, day_of, interval_of, job_name, pairs_of, pattern_of, store_of, varied
from nightshift.dates import render_dates
from nightshift.errors import (
    RUNS_ARE_LISTED,
    InputMissing,
    Interrupted,
    JobInvalid,
    NightshiftError,
    ReportUnwritten,
    SettingInvalid,
    Transient,
    nearest,
)
from nightshift.job import Policy, job_schema
from nightshift.job_file import find_job, load_job, load_jobs, redriven
from nightshift.money.prices import models_of, price_at, retirements
from nightshift.pages import render_job_reference, usd
from nightshift.settings import read_settings
from nightshift.shapes import Approval, Plan, Summary
from nightshift.terminal import output, people, plan_table, show_comparison, show_summary, shown

if TYPE_CHECKING:
    from nightshift.runs import Run, Site

app = typer.Typer(
    help="Batch LLM inference that pays once, accounts for every row and reports what it did.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="a job file, or the name of one in the jobs folder")]
InputOption = Annotated[str | None, typer.Option("--input", help="object, pattern or folder to read in place of the job's")]
StoreOption = Annotated[str | None, typer.Option("--store", help="where everything is kept; default NIGHTSHIFT_STORE")]
DateOption = Annotated[str | None, typer.Option("--ds", metavar="YYYY-MM-DD", help="the date of a scheduled interval")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="a run as `status` names it, 16 hex digits")]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON object, last on stdout")]
ModelOption = Annotated[str | None, typer.Option(help="ask this model in place of the job's")]
PromptOption = Annotated[
    str | None, typer.Option(metavar="FILE|VERSION", help="ask by this prompt and not by the job's: a file, or an earlier version")
]
SampleOption = Annotated[int | None, typer.Option(min=1, help="ask about so many rows only, and publish them beside the results")]
YesOption = Annotated[bool, typer.Option("--yes", help="approve an estimate above policy.approve_above_usd")]

GO_ON = "Batches that were sent go on at the provider; the same command goes on from here and pays nothing twice."
GO_ON_LIVE = "What was answered is kept; the same command goes on from here, and asks again at most what was in flight."
TOLD: Any = {  # of a summary, by `run --json`
    **dict.fromkeys(
        ("job", "run", "state", "problem", "error", "rows", "outcomes", "requests", "batches", "paid", "published", "results", "report"),
        True,
    ),
    "cost_usd": {"estimated", "actual", "saved"},
}


def main() -> None:
    """The entry point: errors that a person can mend are one message and an exit code, never a stack trace."""
    try:
        app(standalone_mode=True)
    except (NightshiftError, OSError) as error:  # OSError: a disk that is full, a folder that may not be written
        if "--json" in sys.argv:
            _print_error(error, str(error))
        people.print(f"[bold red]{type(error).__name__}[/]", end=" ")
        people.print(str(error), markup=False, soft_wrap=True)
        end_process(error.exit_code if isinstance(error, NightshiftError) else 1)
    except SystemExit as end:
        misuse: Any = end.__context__  # typer has shown it, and ends because of it
        if "--json" in sys.argv and hasattr(misuse, "format_message"):
            _print_error(misuse, misuse.format_message())
        end_process(int(end.code or 0))


def _print_error(error: BaseException, problem: str) -> None:
    """One JSON object, last on stdout, of a command that an error has ended."""
    told = {
        "published": isinstance(error, ReportUnwritten),
        "error": type(error).__name__,
        "problem": problem,
        "transient": isinstance(error, Transient),
    }
    with suppress(OSError):  # it may be stdout that is full
        typer.echo(orjson.dumps(told).decode())


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    """Batch LLM inference that pays once, accounts for every row and reports what it did."""
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def validate(job: JobArgument) -> None:
    """Check a job file and everything that it names."""
    from nightshift.suite_check import unusable

    path = find_job(job, read_settings().jobs)
    loaded = load_job(path)
    spec = loaded.spec
    if problems := [f"{spec.output.expectations}: {why}" for why in unusable(loaded.expectations)]:
        raise JobInvalid(problems)
    people.print(
        f"[green]ok[/] {loaded.name}: {spec.request.model} at {spec.request.endpoint}, prompt {loaded.prompt.version}", highlight=False
    )
    people.print(f"   reads  {', '.join(loaded.columns)} of {spec.input.uri}", markup=False)
    people.print(
        f"   checks {len(loaded.expectations)} expectations, publishes at {spec.policy.publish_at_least:.0%} succeeded", markup=False
    )
    if path.stem != loaded.name:
        people.print(f"[yellow]name[/] Airflow takes this job from {loaded.name}.yaml, a file of its name, and refuses it as {path.name}")
    models = (spec.request.model, *spec.stand_ins)
    for model in models:
        if spec.request.provider != "live" and price_at(spec.request.provider, model) is None:
            meant = nearest(model, models_of("bedrock" if spec.request.is_on_bedrock else "openai"))
            people.print(f"[yellow]price[/] none is known of {model}{meant}; nothing is estimated without: NIGHTSHIFT_PRICES can name it")
    for said in retirements(spec.request.provider, models, date.today()):
        people.print(f"[yellow]soon[/] {said}")
    if loaded.token_limit is None and not spec.request.is_embedding and spec.request.provider != "live":
        people.print("[yellow]limit[/] request.parameters.max_output_tokens is not set, so nothing bounds what one answer costs")


@app.command()
def schema(markdown: Annotated[bool, typer.Option(help="the same as a page for people")] = False) -> None:
    """Print the JSON Schema of job files, for editors."""
    if markdown:
        typer.echo(render_job_reference(job_schema()), nl=False)
        return
    typer.echo(orjson.dumps(job_schema(), option=orjson.OPT_INDENT_2).decode())


@app.command()
def plan(
    job: JobArgument,
    input: InputOption = None,
    store: StoreOption = None,
    ds: DateOption = None,
    model: ModelOption = None,
    prompt: PromptOption = None,
    sample: SampleOption = None,
) -> None:
    """Rows, requests, reuse, shards and the estimate; sends nothing and keeps nothing. Ends with 3 where the run could not be published."""
    from nightshift.local_site import local_site
    from nightshift.runs import Run, RunInput
    from nightshift.steps.approve import check_rejected
    from nightshift.steps.discover import pin
    from nightshift.steps.plan import draft

    settings = read_settings()
    site = local_site(settings, store_of(store, settings))
    loaded = varied(site, job, settings, model, prompt)
    objects = pin(site, loaded, render_dates(pattern_of(loaded, input, ds), dates_of(loaded, ds))).objects
    asked = RunInput(
        run="draft",
        label="draft",
        started_at=site.now(),
        partition="draft",
        objects=objects,
        job=loaded,
        fresh=loaded.spec.fresh,
        sample=sample,
        dry_run=True,
    )
    drafted = draft(site, Run(site.store, asked), keep=False)
    output.print(plan_table(drafted))
    check_rejected(loaded.spec.policy, drafted)


@app.command()
def run(
    job: JobArgument,
    input: InputOption = None,
    store: StoreOption = None,
    ds: DateOption = None,
    model: ModelOption = None,
    prompt: PromptOption = None,
    sample: SampleOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="buy every answer anew, whatever was answered before")] = False,
    json: JsonOption = False,
    yes: YesOption = False,
) -> None:
    """Take a job the whole way: discover, plan, approve, submit, wait, collect, assemble, audit, publish, report."""
    from nightshift.drive import begin
    from nightshift.local_site import local_site
    from nightshift.runs import Options

    settings = read_settings()
    site = local_site(settings, store_of(store, settings))
    loaded = varied(site, job, settings, model, prompt)
    options = Options(fresh=fresh, sample=sample)
    pattern, (dates, scheduled) = pattern_of(loaded, input, ds), interval_of(loaded, input, ds)
    _drive(
        site,
        lambda: begin(site, loaded, pattern=pattern, dates=dates, scheduled=scheduled, options=options),
        json=json,
        yes=yes,
    )


@app.command()
def redrive(
    run: RunArgument,
    outcome: Annotated[list[str] | None, typer.Option(help="drive rows again that ended so; default: all that can be")] = None,
    store: StoreOption = None,
    json: JsonOption = False,
    yes: YesOption = False,
) -> None:
    """Drive the failures of a run again, and publish its partition anew. Follows the job file's policy as it is now."""
    from nightshift.drive import begin_again
    from nightshift.local_site import local_site

    settings = read_settings()
    site = local_site(settings, store_of(store, settings))

    def policy(job: str) -> Policy | None:
        try:
            path = find_job(job, settings.jobs)
        except JobInvalid:
            people.print(f"There is no job file of {job} in {settings.jobs}: the run's own policy counts.", markup=False, soft_wrap=True)
            return None
        return load_job(path).spec.policy

    _drive(site, lambda: begin_again(site, run, redriven(outcome or ()), policy=policy), json=json, yes=yes)


@app.command()
def tidy(
    keep_days: Annotated[int | None, typer.Option(min=1, help="drop answers and bulk that are older; default: keep everything")] = None,
    store: StoreOption = None,
) -> None:
    """Merge small answers files; with --keep-days, drop what is older. Facts, plans and reports always stay."""
    from nightshift.local_site import local_site
    from nightshift.tidy import tidy

    settings = read_settings()
    done = tidy(local_site(settings, store_of(store, settings)), keep=None if keep_days is None else timedelta(days=keep_days))
    people.print(
        f"{done.merged:,} answers files merged, {done.removed:,} merged earlier and removed; "
        f"{done.dropped:,} answers dropped, {done.emptied:,} shards and runs emptied"
    )


@app.command()
def forget(
    job: JobArgument,
    id: Annotated[list[str], typer.Option(help="the row's id, as input.id names it")],
    store: StoreOption = None,
) -> None:
    """Take rows' requests and answers out of all that is kept for reuse; asked again, they are bought again."""
    from nightshift.forget import forget
    from nightshift.local_site import local_site

    settings = read_settings()
    site = local_site(settings, store_of(store, settings))
    done = forget(site, job_name(job, settings, site.store), id)
    people.print(f"{done.requests:,} requests forgotten, {done.answers:,} answers dropped")
    for partition in done.published:
        people.print(f"still published, as your data: {partition}", markup=False, soft_wrap=True)
    if done.unknown:
        people.print(f"no run has read {', '.join(done.unknown)}", markup=False, soft_wrap=True)


def _drive(site: Site, begin: Callable[[], Run], *, json: bool, yes: bool) -> None:
    """Take a run the whole way, with progress bars or in silence, and show what became of it."""
    summary = _take(site, begin, yes=yes, quiet=json)[1]
    if json:
        typer.echo(summary.model_dump_json(include=TOLD))
    else:
        show_summary(summary)
    if not summary.published:
        raise typer.Exit(3)


def _take(site: Site, begin: Callable[[], Run], *, yes: bool, quiet: bool = False) -> tuple[Run, Summary]:
    """Take a run the whole way, with progress bars or in silence."""
    from nightshift.drive import drive

    kept = GO_ON
    try:
        with shown(quiet=quiet) as watcher:
            run = begin()
            kept = GO_ON_LIVE if run.job.spec.request.provider == "live" else GO_ON
            return run, drive(site, run, ask=_asker(yes), watcher=watcher)
    except KeyboardInterrupt as error:
        raise Interrupted(kept) from error


@app.command()
def status(job: JobArgument, store: StoreOption = None, last: Annotated[int, typer.Option(min=1, help="how many runs")] = 10) -> None:
    """The latest runs of a job: how each ended, or how far it has come."""
    from nightshift.progress import latest, state_of
    from nightshift.stores.objects import open_objects

    settings = read_settings()
    objects = open_objects(store_of(store, settings))
    table = Table(box=None, header_style="dim")
    for column in ("run", "state", "partition", "rows", "succeeded", "submitted", "cost", "finished"):
        table.add_column(column, justify="right" if column in ("rows", "succeeded", "submitted", "cost") else "left")
    for run in latest(objects, job_name(job, settings, objects), last):
        summary = objects.get_shape(run.key("summary.json"), Summary)
        if summary is None:
            begun = f"begun {run.input.started_at:%Y-%m-%d %H:%M}"
            table.add_row(f"{run.input.label} ({run.input.run})", state_of(run), run.input.partition, "", "", "", "", begun)
        else:
            table.add_row(
                f"{summary.label} ({summary.run})",
                f"{summary.state} sample" if summary.sample else summary.state,
                summary.partition,
                f"{summary.rows:,}",
                f"{summary.outcomes['succeeded']:,}" if any(summary.outcomes.values()) or not summary.rows else "–",
                f"{summary.requests.submitted:,}" if summary.batches or summary.paid or summary.state != "failed" else "–",
                usd(summary.cost_usd.actual),
                f"{summary.finished_at:%Y-%m-%d %H:%M}",
            )
    if table.row_count:
        output.print(table)
    else:
        people.print("No runs yet.")


@app.command()
def report(
    job: JobArgument,
    run: RunArgument,
    store: StoreOption = None,
) -> None:
    """Print what a run did, and write its page again from its summary."""
    from nightshift.pages import render_report
    from nightshift.runs import run_folder
    from nightshift.stores.objects import open_objects

    settings = read_settings()
    objects = open_objects(store_of(store, settings))
    folder = run_folder(job_name(job, settings, objects), run)
    summary = objects.get_shape(f"{folder}/summary.json", Summary)
    if summary is None:
        raise InputMissing(objects.uri_of(folder), "there is no such run, or it has not ended", RUNS_ARE_LISTED)
    objects.put(f"{folder}/report.html", render_report(summary).encode())
    show_summary(summary, output)


@app.command()
def compare(
    job: JobArgument,
    runs: Annotated[list[str] | None, typer.Argument(metavar="[OLD NEW]", help="two runs that have ended; none: samples are run")] = None,
    input: InputOption = None,
    store: StoreOption = None,
    ds: DateOption = None,
    model: ModelOption = None,
    prompt: PromptOption = None,
    sample: Annotated[int, typer.Option(min=1, help="rows that both are asked about")] = 200,
    json: JsonOption = False,
    yes: YesOption = False,
) -> None:
    """Old against new on a sample: the job as it is, and with another prompt or model; or two runs that have ended."""
    from nightshift.compare import compare
    from nightshift.drive import begin
    from nightshift.local_site import local_site
    from nightshift.redrive import find_run
    from nightshift.runs import Options

    settings = read_settings()
    site = local_site(settings, store_of(store, settings))
    if runs:
        if len(runs) != 2:
            raise SettingInvalid([f"Two runs that have ended are compared, old and new; named were {len(runs)}"])
        if given := [name for name, value in (("input", input), ("ds", ds), ("model", model), ("prompt", prompt)) if value]:
            raise SettingInvalid([f"Two runs are compared as they were: --{given[0]} says nothing beside them"])
        old, new = (find_run(site.store, name) for name in runs)
    elif model is None and prompt is None:
        raise SettingInvalid(["Compare what? Name two runs, or say what is new: --prompt or --model"])
    else:
        wanted = [varied(site, job, settings, None, None), varied(site, job, settings, model, prompt)]
        pattern, dates = pattern_of(wanted[0], input, ds), dates_of(wanted[0], ds)
        asked = partial(begin, pattern=pattern, dates=dates, scheduled=False, options=Options(sample=sample))
        old, new = (_take(site, partial(asked, site, each), yes=yes, quiet=json)[0] for each in wanted)
    found = compare(site, old, new)
    if json:
        typer.echo(found.model_dump_json())
    else:
        show_comparison(found)


@app.command()
def periodic(
    since: Annotated[str, typer.Option(metavar="YYYY-MM-DD", help="first day, in UTC")],
    until: Annotated[str, typer.Option(metavar="YYYY-MM-DD", help="the day after the last one")],
    name: Annotated[str, typer.Option(help="what the report is called")] = "periodic_report",
    store: StoreOption = None,
) -> None:
    """Write the report of a period over all jobs: rows, outcomes, cost by job, model and prompt version, and the jobs' figures."""
    from nightshift.local_site import local_site
    from nightshift.periodic import write_periodic

    settings = read_settings()
    start, end = day_of(since, "--since"), day_of(until, "--until")
    if end <= start:
        raise SettingInvalid([f"--until {until}: expected a day after --since {since}"])
    report = write_periodic(local_site(settings, store_of(store, settings)), load_jobs(settings.jobs), name=name, since=start, until=end)
    people.print(
        f"{report.total('runs'):,} runs, {report.total('rows'):,} rows, cost {usd(report.cost_usd)}, saved {usd(report.saved_usd)}"
    )
    people.print(f"report    {report.page}", soft_wrap=True)


@app.command()
def rehearse(
    state: Annotated[Path, typer.Option(help="folder of the server's state; it goes on from there")] = Path(".nightshift/rehearsal"),
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8790,
    key: Annotated[str, typer.Option(help="the API key that it accepts")] = "sk-rehearsal",
    pace: Annotated[list[str] | None, typer.Option(help="seconds, such as running=5 or window=60")] = None,
    fault: Annotated[list[str] | None, typer.Option(help="faults, such as errored=0.05 or create_500_after_accept=1")] = None,
) -> None:
    """Serve the providers' APIs on this machine: no key, no cloud, a small real model, a bill, a menu of faults."""
    try:
        from nightshift.rehearsal.served import serve_until_stopped
    except ImportError as error:
        raise SettingInvalid(
            [f"The rehearsal server needs its extra ({error.name} is missing): pip install 'nightshift[rehearsal]'"]
        ) from error
    serve_until_stopped(
        state,
        (host, port),
        key=key,
        paces=pairs_of("--pace", pace),
        faults=pairs_of("--fault", fault),
        told=lambda said: people.print(said, highlight=False, soft_wrap=True),
    )


def _asker(yes: bool) -> Callable[[Run, Plan], bool]:
    """A person at a terminal is asked; elsewhere only --yes approves."""
    from nightshift.approvals import record
    from nightshift.question import question
    from nightshift.runs import utc_now

    def ask(run: Run, planned: Plan) -> bool:
        said = yes
        if not yes and sys.stdin.isatty():
            people.print(question(run, planned), markup=False)
            said = typer.confirm("Send it?")
        by = f"{getpass.getuser()}{' with --yes' if yes else ''}"
        decision: Literal["approved", "refused"] = "approved" if said else "refused"
        record(run, Approval(decision=decision, by=by, at=utc_now(), estimate_usd=planned.estimate.usd))
        return said

    return ask


if __name__ == "__main__":
    main()
