"""The command line as a person uses it: real processes, real signals, real exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from nightshift import terminal
from nightshift.errors import ProviderUnavailable, ShardHeld
from nightshift.providers.protocol import Snapshot
from tests.conftest import Rehearsal, World, reviews


def environment(rehearsal: Rehearsal | None, **changes: str) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI", "NIGHTSHIFT", "AWS"))}
    if rehearsal:
        env |= {"OPENAI_BASE_URL": f"{rehearsal.url}/v1", "OPENAI_API_KEY": rehearsal.key, "NIGHTSHIFT_POLL_SECONDS": "0.1"}
    return {**env, **changes}


def nightshift(*arguments: str, rehearsal: Rehearsal | None = None, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "nightshift.cli", *arguments]
    return subprocess.run(command, env=environment(rehearsal, **env), capture_output=True, text=True, timeout=120)


def interruptible(command: list[str], env: dict[str, str]) -> subprocess.Popen:
    """A process that Ctrl-C reaches, also where the tests run in the background of a shell, which makes its jobs ignore it."""
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def file_of(world: World, **changes) -> str:
    world.job(**changes)
    return str(world.folder / f"job-{world.jobs}" / "jobs" / "reviews.yaml")


def test_run_json_ends_with_one_object_of_the_agreed_shape(world):
    done = nightshift(
        "run",
        file_of(world),
        "--input",
        world.write("in.jsonl", reviews(20)),
        "--store",
        f"file://{world.folder}/store",
        "--json",
        rehearsal=world.rehearsal,
    )
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert last["rows"] == 20
    assert list(last["outcomes"]) == [
        "succeeded",
        "invalid",
        "truncated",
        "refused",
        "filtered",
        "errored",
        "expired",
        "cancelled",
        "missing",
        "rejected",
    ]
    assert last["requests"] == {"unique": 20, "duplicates": 0, "reused": 0, "adopted": 0, "submitted": 20}
    assert (last["batches"], last["published"]) == (1, True)
    assert last["cost_usd"]["actual"] > 0
    assert Path(last["report"].removeprefix("file://")).is_file()
    assert Path(last["results"].removeprefix("file://"), "_manifest.json").is_file()


def test_people_see_the_outcomes_the_bill_and_the_report(world):
    done = (
        nightshift(
            "run",
            file_of(world),
            "--input",
            f"{world.folder}/input/in.jsonl",
            "--store",
            f"file://{world.folder}/store",
            rehearsal=world.rehearsal,
        )
        if world.write("in.jsonl", reviews(3))
        else None
    )
    assert "3 submitted in 1 batch," in done.stderr
    assert "of 3 rows read" in done.stderr
    assert "report.html" in done.stderr


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        pytest.param({"policy": {"budget_usd": 0.000001}}, 4, "policy.budget_usd allows", id="over the budget"),
        pytest.param({"policy": {"approve_above_usd": 0}}, 4, "--yes on the command line", id="nobody to ask"),
        pytest.param({"request": {"model": "gpt-none"}}, 2, "is not offered at", id="no such model"),
    ],
)
def test_exit_codes_and_one_clear_message(world, changes, code, message):
    done = nightshift(
        "run",
        file_of(world, **changes),
        "--input",
        world.write("in.jsonl", reviews(3)),
        "--store",
        f"file://{world.folder}/store",
        rehearsal=world.rehearsal,
    )
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert world.rehearsal.bill()["batches"] == 0


def test_a_held_run_ends_with_3_and_its_json(world):
    world.rehearsal.faults(refused=1.0)
    done = nightshift(
        "run",
        file_of(world),
        "--input",
        world.write("in.jsonl", reviews(3)),
        "--store",
        f"file://{world.folder}/store",
        "--json",
        rehearsal=world.rehearsal,
    )
    assert done.returncode == 3
    told = json.loads(done.stdout)
    assert (told["outcomes"]["refused"], told["published"], told["error"]) == (3, False, "RunHeld")
    assert "succeeded" in told["problem"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["run", "nope", "--store", "file:///tmp/x"], "no such job file", id="unknown job"),
        pytest.param(
            ["run", "review_sentiment", "--input", "/nowhere/at/all.jsonl", "--store", "file:///tmp/nightshift-none"],
            "Nothing to read at",
            id="missing input",
        ),
        pytest.param(["run", "review_sentiment", "--input", "x.jsonl"], "No store", id="no store"),
        pytest.param(["run", "review_sentiment", "--input", "x.jsonl", "--store", "/tmp/x"], "is not a URI", id="store is a path"),
        pytest.param(["run", "review_sentiment_nightly", "--store", "file:///tmp/x"], "give the date with --ds", id="no date"),
        pytest.param(
            ["run", "review_sentiment_nightly", "--ds", "yesterday", "--store", "file:///tmp/x"], "expected a date", id="bad date"
        ),
        pytest.param(["plan", "review_sentiment", "--input", "ftp://x/a.csv", "--store", "file:///tmp/x"], "expected s3://", id="ftp"),
        pytest.param(["rehearse", "--fault", "eroded=1"], "errored", id="unknown fault"),
        pytest.param(["rehearse", "--fault", "errored=7"], "--fault errored=7: Input should be less than", id="more than all"),
        pytest.param(["rehearse", "--host", "203.0.113.1"], "--host 203.0.113.1 --port 8790:", id="nowhere to listen"),
        pytest.param(["rehearse", "--pace", "runing=1"], "--pace runing: there is none; did you mean 'running'?", id="unknown pace"),
        pytest.param(
            ["rehearse", "--fault", "invalid"], "--fault invalid: expected a value, such as invalid=1", id="fault without a value"
        ),
        pytest.param(["rehearse", "--state", "/dev/null/x"], "--state /dev/null/x: Not a directory", id="no folder"),
        pytest.param(["status", "x", "--store", "s3://"], "names no bucket: write s3://bucket/prefix", id="no bucket"),
    ],
)
def test_wrong_calls_are_told_what_to_mend(arguments, message):
    done = nightshift(*arguments, OPENAI_API_KEY="x")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_no_key_at_all_is_told(world):
    uri, store = world.write("in.jsonl", reviews(3)), f"file://{world.folder}/store"
    done = nightshift("run", file_of(world), "--input", uri, "--store", store, "--json")
    assert done.returncode == 2
    assert "Set OPENAI_API_KEY" in done.stderr
    told = json.loads(done.stdout)
    assert (told["published"], told["error"], told["transient"]) == (False, "AccessDenied", False)
    assert "OPENAI_API_KEY" in told["problem"]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "error", "problem"),
    [
        pytest.param(["run", "--json"], "MissingParameter", "JOB", id="no job"),
        pytest.param(["run", "x", "--json", "--fersh"], "NoSuchOption", "--fresh", id="unknown option"),
        pytest.param(["compare", "x", "--json", "--sample", "0"], "BadParameter", "--sample", id="value out of range"),
    ],
)
def test_a_call_that_cannot_be_read_is_json_too(arguments, error, problem):
    done = nightshift(*arguments)
    assert done.returncode == 2
    told = json.loads(done.stdout)
    assert (told["published"], told["error"], told["transient"]) == (False, error, False)
    assert problem in told["problem"]
    assert "Usage:" in done.stderr


def test_validate_tells_every_mistake_and_ends_with_2(world, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("name: Bad Name\nrequest: {provider: opnai}\n")
    done = nightshift("validate", str(path))
    assert done.returncode == 2
    assert f"{path}:1: name" in done.stderr
    assert "did you mean 'openai'?" in done.stderr
    assert nightshift("validate", file_of(world)).returncode == 0


def test_a_run_that_could_not_be_published_is_held_before_it_pays(world):
    rows = [*reviews(8), {"id": "e1", "text": "", "stars": 1}, {"id": "e2", "text": "", "stars": 1}]
    file, uri = file_of(world, policy={"publish_at_least": 0.9, "approve_above_usd": 0}), world.write("in.jsonl", rows)
    store = f"file://{world.folder}/store"
    planned = nightshift("plan", file, "--input", uri, "--store", store, rehearsal=world.rehearsal)
    assert planned.returncode == 3
    assert "to submit" in planned.stdout
    done = nightshift("run", file, "--input", uri, "--store", store, "--json", rehearsal=world.rehearsal)
    assert done.returncode == 3
    for said in (planned.stderr, done.stderr, json.loads(done.stdout)["problem"]):
        assert "2 of 10 rows are rejected" in " ".join(said.split())
        assert "at most 80.00% can succeed" in " ".join(said.split())
    assert world.rehearsal.bill()["batches"] == 0


def test_what_the_schedule_reads_of_a_day_replaces_that_days_partition_however_it_is_named(world):
    world.write("2026-11-10.jsonl", reviews(3))
    store, folder = f"file://{world.folder}/store", f"{world.folder}/input"
    file = file_of(world, schedule="0 2 * * *", input={"uri": f"file://{folder}/{{{{ ds }}}}.jsonl"})
    for given in (["--ds", "2026-11-10"], ["--input", f"{folder}/2026-11-10.jsonl"], ["--input", f"{folder}/2026-11-1?.jsonl"]):
        assert nightshift("run", file, *given, "--store", store, rehearsal=world.rehearsal).returncode == 0
    published = sorted(path.parent.name.partition("-")[0] for path in (world.folder / "store/results").glob("*/*/_manifest.json"))
    assert published == ["dt=2026", "input=2026"], "other objects are a partition of their own"


def test_plan_sends_nothing_and_keeps_nothing(world):
    done = nightshift(
        "plan",
        file_of(world),
        "--input",
        world.write("in.jsonl", reviews(20)),
        "--store",
        f"file://{world.folder}/store",
        OPENAI_API_KEY="x",
    )
    assert done.returncode == 0, done.stderr
    assert "in 1 shard" in done.stdout
    assert [path for path in (world.folder / "store").rglob("*") if path.is_file()] == []


def test_status_and_report_show_a_run_afterwards(world):
    job, store = file_of(world), f"file://{world.folder}/store"
    done = nightshift("run", job, "--input", world.write("in.jsonl", reviews(3)), "--store", store, "--json", rehearsal=world.rehearsal)
    run = json.loads(done.stdout)["run"]
    nightshift("run", job, "--input", f"file://{world.folder}/input/in.jsonl", "--store", store, "--sample", "2", rehearsal=world.rehearsal)
    listed = nightshift("status", job, "--store", store).stdout
    assert [len(re.findall(word, listed)) for word in (run, "published", "published sample")] == [1, 2, 1]
    assert "3 submitted" in nightshift("report", job, run, "--store", store).stdout
    assert nightshift("status", "reviews", "--store", store).stdout == listed, "wherever its file is"
    assert "No runs yet" in nightshift("status", job, "--store", f"file://{world.folder}/empty").stderr
    assert nightshift("report", job, "0" * 16, "--store", store).returncode == 2


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_a_stopped_run_goes_on_with_the_same_command_and_pays_nothing_twice(world, sign):
    world.rehearsal.pace(validating=0.1, running=4.0, finalizing=0.1)
    command = [sys.executable, "-m", "nightshift.cli", "run", file_of(world, policy={"max_requests_per_shard": 10}), "--input"]
    command += [world.write("in.jsonl", reviews(40)), "--store", f"file://{world.folder}/store", "--json"]
    env = environment(world.rehearsal)
    process = interruptible(command, env)
    deadline = time.monotonic() + 60
    while len(list((world.folder / "store" / "shards").glob("*/receipt-1.json"))) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(sign)
    told, errors = process.communicate(timeout=30)
    assert (sign is signal.SIGKILL) or json.loads(told)["error"] == "Interrupted"
    assert process.returncode == (130 if sign is signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in errors
    assert ("goes on from here" in errors) is (sign is signal.SIGINT)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ended = json.loads(done.stdout)
    assert (ended["outcomes"]["succeeded"], ended["batches"]) == (40, 4)
    bill = world.rehearsal.bill()
    assert (bill["batches"], bill["requests"]) == (4, 40)


def test_redrive_tidy_and_forget_from_the_command_line(world):
    store = ("--store", f"file://{world.folder}/store")
    file = file_of(world, policy={"retry": {"refused": 0}})
    world.rehearsal.faults(refused=0.5)
    uri = world.write("in.jsonl", reviews(30))
    first = json.loads(nightshift("run", file, "--input", uri, *store, "--json", rehearsal=world.rehearsal).stdout)
    assert first["outcomes"]["refused"] > 0
    world.rehearsal.faults()

    wrong = nightshift("redrive", first["run"], "--outcome", "refusd", *store, rehearsal=world.rehearsal)
    assert (wrong.returncode, "did you mean 'refused'" in wrong.stderr) == (2, True)
    nobody = nightshift("redrive", "0123456789abcdef", *store, rehearsal=world.rehearsal)
    assert (nobody.returncode, "no run is called" in nobody.stderr) == (2, True)
    done = nightshift("redrive", first["run"], "--outcome", "refused", *store, "--json", rehearsal=world.rehearsal)
    assert done.returncode == 0, done.stderr
    second = json.loads(done.stdout)
    assert (second["outcomes"]["succeeded"], second["requests"]["submitted"]) == (30, first["outcomes"]["refused"])

    forgotten = nightshift("forget", file, "--id", "r3", "--id", "r4", *store)
    assert (forgotten.returncode, "2 requests forgotten" in forgotten.stderr) == (0, True), forgotten.stderr
    assert "still published, as your data" in forgotten.stderr
    tidied = nightshift("tidy", "--keep-days", "1", *store)
    assert (tidied.returncode, "0 answers dropped" in tidied.stderr) == (0, True), tidied.stderr

    third = json.loads(nightshift("run", file, "--input", uri, *store, "--json", rehearsal=world.rehearsal).stdout)
    assert (third["requests"]["submitted"], third["requests"]["reused"]) == (2, 28)
    fresh = json.loads(nightshift("run", file, "--input", uri, *store, "--json", "--fresh", rehearsal=world.rehearsal).stdout)
    assert (fresh["requests"]["submitted"], fresh["requests"]["reused"], fresh["paid"]) == (30, 0, 30)


def test_a_folder_is_read_whole(world):
    world.write("a.jsonl", reviews(3))
    planned = nightshift("plan", file_of(world), "--input", str(world.folder / "input"), "--store", f"file://{world.folder}/store")
    assert planned.returncode == 0, planned.stderr
    assert re.search(r"rows +3 ", planned.stdout), planned.stdout


def test_validate_tells_of_a_name_that_airflow_refuses(world):
    path = Path(file_of(world))
    assert "refuses" not in nightshift("validate", str(path)).stderr
    done = nightshift("validate", str(path.rename(path.with_name("other.yaml"))))
    assert (done.returncode, "Airflow takes this job from reviews.yaml" in done.stderr) == (0, True)


SAID_OF_WRONG = ("there is no such expectation", "value_set", "'[' is no regular", "mostly")


def test_expectations_that_nobody_can_apply_are_told_by_validate_and_before_a_run(world):
    in_set = {"type": "expect_column_values_to_be_in_set", "kwargs": {"column": "sentiment", "value_set": ["positive"]}}
    wrong = [
        {**in_set, "type": "expect_column_values_to_be_in_sett"},
        {**in_set, "kwargs": {"column": "sentiment", "values": ["positive"]}},
        {"type": "expect_column_values_to_match_regex", "kwargs": {"column": "sentiment", "regex": "["}},
        {**in_set, "kwargs": {**in_set["kwargs"], "mostly": 95}},
    ]
    done = nightshift("validate", file_of(world, suite=[in_set, *wrong]))
    assert done.returncode == 2
    told = done.stderr.splitlines()
    assert [len([line for line in told if f": {word}" in line]) for word in SAID_OF_WRONG] == [1] * 4
    uri, store = world.write("in.jsonl", reviews(2)), f"file://{world.folder}/store"
    done = nightshift("run", file_of(world, suite=[in_set, *wrong]), "--input", uri, "--store", store, "--yes", rehearsal=world.rehearsal)
    assert (done.returncode, world.rehearsal.bill()["requests"]) == (2, 0)
    assert set(told) <= set(done.stderr.splitlines())


def test_validate_tells_of_a_model_without_a_price(world):
    assert "price" not in nightshift("validate", file_of(world)).stderr
    done = nightshift("validate", file_of(world, request={"model": "gpt-9-turbo"}))
    assert (done.returncode, "none is known of gpt-9-turbo" in done.stderr) == (0, True)


def test_an_address_without_v1_is_told_and_leaves_a_report(world):
    uri, store = world.write("a.jsonl", reviews(3)), f"file://{world.folder}/store"
    done = nightshift(
        "run", file_of(world), "--input", uri, "--store", store, rehearsal=world.rehearsal, OPENAI_BASE_URL=world.rehearsal.url
    )
    assert done.returncode == 2
    assert "does the address of the API end in /v1?" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    [report] = (world.folder / "store").glob("runs/*/*/report.html")
    assert "Not known: the run ended before" in report.read_text()
    assert "adds up" not in report.read_text()
    assert "<b>–</b><span>of the rows succeeded</span>" in report.read_text()


def test_an_address_that_is_none_is_told_before_a_run_begins(world):
    uri, store = world.write("a.jsonl", reviews(3)), f"file://{world.folder}/store"
    done = nightshift("run", file_of(world), "--input", uri, "--store", store, rehearsal=world.rehearsal, OPENAI_BASE_URL="127.0.0.1:9")
    assert (done.returncode, "OPENAI_BASE_URL" in done.stderr) == (2, True), done.stderr
    assert [path for path in (world.folder / "store").rglob("*") if path.is_file()] == []


def test_what_a_run_waits_for_is_told_at_once(world):
    world.rehearsal.faults(create_500=1)
    uri, store = world.write("a.jsonl", reviews(3)), f"file://{world.folder}/store"
    done = nightshift("run", file_of(world), "--input", uri, "--store", store, rehearsal=world.rehearsal)
    assert (done.returncode, "looking again: " in done.stderr) == (0, True), done.stderr


@pytest.mark.parametrize("stream", ["1>&-", "2>&-", "1>&- 2>&-"])
def test_a_closed_stream_stops_nothing(world, stream):
    uri, store = world.write("a.jsonl", reviews(3)), f"file://{world.folder}/store"
    command = f"{sys.executable} -m nightshift.cli run {file_of(world)} --input {uri} --store {store} {stream}"
    assert subprocess.run(["sh", "-c", command], env=environment(world.rehearsal), timeout=120).returncode == 0
    assert list((world.folder / "store").glob("results/*/*/_manifest.json"))


def test_a_full_disk_is_told_in_a_line():
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "nightshift.cli", "schema"]
        done = subprocess.run(command, env=environment(None), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode in (1, 120)
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr.split("Exception ignored")[0]


def test_a_full_disk_takes_no_json_of_the_error_either(world):
    command = [sys.executable, "-m", "nightshift.cli", "run", "nope", "--store", f"file://{world.folder}/store", "--json"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, env=environment(None), stdout=full, stderr=subprocess.PIPE, text=True)
    assert "no such job file" in done.stderr
    assert "Traceback" not in done.stderr.split("Exception ignored")[0]


def test_a_log_is_told_what_is_new(world):
    uri, store = world.write("a.jsonl", reviews(3)), f"file://{world.folder}/store"
    done = nightshift("run", file_of(world), "--input", uri, "--store", store, rehearsal=world.rehearsal)
    assert done.returncode == 0, done.stderr
    assert [stage for stage in ("plan …", "wait …", "1 so far", "publish …", "report …") if stage not in done.stderr] == []


def test_trouble_is_told_once_until_it_is_over(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "people", Console(width=200))
    with terminal.shown(quiet=False) as watcher:
        for error in (
            ProviderUnavailable("x", "away"),
            ProviderUnavailable("x", "away"),
            look("in_progress"),
            ProviderUnavailable("x", "away"),
        ):
            watcher.shard("ab" * 32, error)
    assert capsys.readouterr().out.count("looking again: ") == 2


def test_trouble_of_one_shard_is_not_told_anew_because_another_goes_well(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "people", Console(width=200))
    with terminal.shown(quiet=False) as watcher:
        for _ in range(3):
            watcher.shard("ab" * 32, ShardHeld("ab" * 32, "the budget has no room", 5))
            watcher.shard("cd" * 32, look("in_progress"))
    assert capsys.readouterr().out.count("looking again: ") == 1


def test_the_bars_of_a_stopped_run_stay_where_they_were(monkeypatch):
    written = StringIO()
    monkeypatch.setattr(terminal, "people", Console(file=written, force_terminal=True, width=120))
    with terminal.shown(quiet=False) as watcher:
        watcher.planned(SimpleNamespace(submitted=2500, adopted=0))
        watcher.stage("wait")
        watcher.shard("ab" * 32, look("in_progress", done=3))
        watcher.stopping()
        watcher.stage("report")
    assert ("3/2500" in written.getvalue(), "2500/2500" in written.getvalue()) == (True, False)


def look(status: str, done: int = 0) -> Snapshot:
    return Snapshot(state="running", status=status, done=done, total=1, result_files=(), reasons=(), bad_lines={})


def test_a_pace_that_there_is_not_is_told_with_those_that_there_are():
    done = nightshift("rehearse", "--pace", "bogus=7")
    assert (done.returncode, "Pace: validating, running" in done.stderr) == (2, True)
