from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nightshift.inbox import new_uploads
from nightshift.job_file import load_job
from nightshift.stores.objects import open_objects
from tests.airflow.conftest import ROOT, RUN, in_airflow
from tests.conftest import Rehearsal, make_world, reviews

BAG = """
import json, logging
logging.disable(logging.CRITICAL)
from airflow.dag_processing.dagbag import DagBag
bag = DagBag(dag_folder=%r)
print("RESULT" + json.dumps({
    "errors": {k: str(v) for k, v in bag.import_errors.items()},
    "dags": {d.dag_id: {
        "tasks": {t.task_id: sorted(t.upstream_task_ids) for t in d.tasks},
        "retries": sorted({t.retries for t in d.tasks}),
        "policy": all(type(t.retry_policy).__name__ == "ByErrorClass" for t in d.tasks),
        "timeouts": all(t.execution_timeout for t in d.tasks),
        "start": bool(d.start_date), "doc": bool(d.doc_md), "tags": sorted(d.tags), "owner": d.owner, "catchup": d.catchup,
        "timetable": type(d.timetable).__name__, "params": list(d.params), "description": d.description,
    } for d in bag.dags.values()},
}))
"""

EMPTY = """
from airflow.sdk import DAG
for number in range(100):
    globals()[f"empty_{number}"] = DAG(f"empty_{number}", schedule=None)
"""
PARSE = """
import json, logging, time
logging.disable(logging.CRITICAL)
import nightshift_airflow.dags
from airflow.dag_processing.dagbag import DagBag

def took(folder):
    started = time.process_time()
    bag = DagBag(dag_folder=folder)
    assert len(bag.dags) == 100 and not bag.import_errors, bag.import_errors
    return time.process_time() - started

empty, jobs = %r, %r
print("RESULT" + json.dumps([min(took(folder) for _ in range(3)) for folder in (empty, jobs)]))
"""


def bag(home: Path, **env: str) -> dict:
    return json.loads(in_airflow(home, BAG % str(ROOT / "dags"), **env).rpartition("RESULT")[2])


@pytest.fixture(scope="module")
def found(migrated) -> dict:
    return bag(migrated)


def test_every_dag_file_parses(found):
    assert found["errors"] == {}
    jobs = {path.stem for path in (ROOT / "include" / "jobs").glob("*.yaml")}
    assert jobs | {"uploads"} <= set(found["dags"])


def test_house_rules_hold_for_every_dag(found):
    for name, dag in found["dags"].items():
        assert dag["doc"], name
        assert dag["owner"] not in ("", "airflow"), name
        assert dag["timeouts"], f"{name}: every task ends at some time"
        assert "nightshift" in dag["tags"], name
        assert dag["policy"], name
        assert min(dag["retries"]) >= 2, f"{name}: a resumed task may be failed falsely (apache/airflow 72716)"
        assert not dag["catchup"], name


def test_one_name_through_all_layers(found):
    steps = {path.stem for path in (ROOT / "include" / "nightshift" / "steps").glob("*.py")} - {"__init__"}
    tasks = {task.removeprefix("shard.") for task in found["dags"]["review_sentiment"]["tasks"]}
    assert tasks == steps


def test_nothing_is_submitted_before_it_is_approved(found):
    tasks = found["dags"]["review_sentiment"]["tasks"]
    assert "approve" in tasks["shard.submit"]
    assert "plan" in tasks["approve"]
    assert set(tasks["assemble"]) >= {"plan", "shard.collect"}


def test_every_step_has_the_parameters_of_the_form(found):
    for name in ("review_sentiment", "review_sentiment_nightly", "image_alt_text"):
        assert list(found["dags"][name]["params"]) == ["input", "model", "prompt", "sample", "dry_run", "fresh", "redrive", "outcomes"]


def test_a_hundred_job_files_parse_within_a_stated_factor_of_a_hundred_empty_dags(migrated, tmp_path):
    """Sixty times on a quiet machine: an empty DAG has no task, and a job has ten, with a form, a prompt, a schema and a suite."""
    folder = tmp_path / "house"
    (folder / "dags").mkdir(parents=True)
    (folder / "empty").mkdir()
    (folder / "empty" / "empty.py").write_text(EMPTY)
    shutil.copy(ROOT / "dags" / "jobs.py", folder / "dags")
    for name in ("prompts", "schemas", "expectations"):
        shutil.copytree(ROOT / "include" / name, folder / name)
    (folder / "jobs").mkdir()
    text = (ROOT / "include" / "jobs" / "review_sentiment.yaml").read_text()
    for number in range(100):
        (folder / "jobs" / f"job_{number}.yaml").write_text(text.replace("name: review_sentiment", f"name: job_{number}"))
    code = PARSE % (str(folder / "empty"), str(folder / "dags"))
    empty, jobs = json.loads(in_airflow(migrated, code, NIGHTSHIFT_JOBS=str(folder / "jobs")).rpartition("RESULT")[2])
    assert jobs / empty < 120


def test_no_dag_file_opens_a_connection_or_a_store_at_import(migrated):
    """Importing reads job files and nothing else: a socket would be an error, and so would a file outside this house."""
    code = f"""
import runpy, socket
def refuse(*args, **kwargs):
    raise AssertionError("a DAG file has opened a socket at import")
import nightshift_airflow.dags, nightshift_airflow.reports
socket.socket.connect = refuse
for name in ("jobs", "uploads", "upload_events", "backfill_uploads", "periodic_report"):
    runpy.run_path({str(ROOT / "dags")!r} + f"/{{name}}.py")
print("RESULT ok")
"""
    assert in_airflow(migrated, code).rpartition("RESULT")[2].strip() == "ok"


def test_a_cron_job_runs_on_data_intervals(found):
    assert found["dags"]["review_sentiment_nightly"]["timetable"] == "CronsTimetable"
    assert found["dags"]["review_sentiment"]["timetable"] == "NullTimetable"


def test_a_broken_job_file_says_so_in_its_dag_and_leaves_the_others_alone(migrated, tmp_path, rehearsal):
    world = make_world(tmp_path, rehearsal)
    world.job()
    folder = tmp_path / "job-1" / "jobs"
    (folder / "broken.yaml").write_text("name: broken\ninputt: {}\n")
    dags = bag(migrated, NIGHTSHIFT_JOBS=str(folder))["dags"]
    assert set(dags) == {"reviews", "broken", "uploads", "backfill_uploads", "periodic_report"}
    assert dags["broken"]["description"].startswith("INVALID JOB FILE")
    assert "invalid job file" in dags["broken"]["tags"]


def test_a_job_file_with_an_odd_name_is_told_and_leaves_the_others_alone(migrated, tmp_path, rehearsal):
    world = make_world(tmp_path, rehearsal)
    world.job()
    folder = tmp_path / "job-1" / "jobs"
    text = (folder / "reviews.yaml").read_text()
    (folder / "reviews (copy).yaml").write_text(text)
    (folder / ".#reviews.yaml").write_text("an editor's")
    (folder / "uploads.yaml").write_text(text.replace('"name": "reviews"', '"name": "uploads"'))
    (folder / "weekly.yaml").write_text(text.replace('"name": "reviews"', '"name": "weekly"'))
    dags = bag(migrated, NIGHTSHIFT_JOBS=str(folder), NIGHTSHIFT_REPORTS="weekly=@weekly")["dags"]
    assert {"reviews", "uploads", "backfill_uploads", "weekly"} < set(dags)
    assert dags["uploads"]["tags"] == ["nightshift"]
    assert "report" in dags["weekly"]["tags"]
    told = sorted(dag["description"] for dag in dags.values() if "invalid job file" in dag["tags"])
    assert len(told) == 3
    assert "expected 'reviews (copy)', the name of the file" in told[0]
    assert "the name of a DAG of Nightshift's own" in told[1]
    assert "a periodic report has this name" in told[2]


def test_importing_a_dag_file_loads_no_sdk(migrated):
    code = f"""
import sys, runpy
runpy.run_path({str(ROOT / "dags" / "jobs.py")!r})
print("RESULT", [m for m in ("openai", "pandas", "great_expectations", "duckdb", "boto3") if m in sys.modules])
"""
    loaded = in_airflow(migrated, code).rpartition("RESULT")[2].strip()
    assert loaded == "[]"


def run_dag(home: Path, dag: str, conf: dict, rehearsal: Rehearsal, jobs: Path, **env: str) -> dict:
    connection = json.dumps({"conn_type": "openai", "host": f"{rehearsal.url}/v1", "password": rehearsal.key})
    out = in_airflow(
        home,
        RUN % (dag, conf),
        NIGHTSHIFT_JOBS=str(jobs),
        NIGHTSHIFT_STORE=f"file://{home}/store",
        NIGHTSHIFT_POLL_SECONDS="0.2",
        AIRFLOW_CONN_OPENAI_DEFAULT=connection,
        **env,
    )
    return json.loads(out.rpartition("RESULT")[2].partition("\n")[0])


def summaries_of(home: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in (home / "store" / "runs").glob("*/*/summary.json")]


def summary_of(home: Path) -> dict:
    [summary] = summaries_of(home)
    return summary


@pytest.fixture
def job(tmp_path, rehearsal):
    world = make_world(tmp_path / "world", rehearsal)
    world.job(policy={"max_requests_per_shard": 10, "publish_at_least": 0.5})
    return world, tmp_path / "world" / "job-1" / "jobs"


def test_a_job_goes_the_whole_way_under_airflow(airflow_home, rehearsal, job):
    world, jobs = job
    ended = run_dag(airflow_home, "reviews", {"input": world.write("in.jsonl", reviews(25))}, rehearsal, jobs)
    assert ended["state"] == "success", ended
    assert set(ended["tasks"].values()) == {"success"}
    assert [name for name in ended["tasks"] if name.startswith("shard.collect")] == [f"shard.collect[{i}]" for i in range(3)]
    summary = summary_of(airflow_home)
    assert (summary["state"], summary["outcomes"]["succeeded"], summary["batches"]) == ("published", 25, 3)
    assert rehearsal.bill()["requests"] == 25


def test_what_fails_at_the_provider_is_driven_again_under_airflow(airflow_home, rehearsal, job):
    world, jobs = job
    rehearsal.faults(errored=0.3)
    ended = run_dag(airflow_home, "reviews", {"input": world.write("in.jsonl", reviews(25))}, rehearsal, jobs)
    assert ended["state"] == "success", ended
    assert summary_of(airflow_home)["batches"] > 3


def test_a_run_of_more_shards_than_it_is_wide_shares_its_chains_and_loses_none_of_them(airflow_home, rehearsal, job):
    world, jobs = job
    rehearsal.faults(errored=0.3)
    ended = run_dag(airflow_home, "reviews", {"input": world.write("in.jsonl", reviews(45))}, rehearsal, jobs, NIGHTSHIFT_WIDTH="2")
    assert ended["state"] == "success", ended
    assert [name for name in ended["tasks"] if name.startswith("shard.collect")] == ["shard.collect[0]", "shard.collect[1]"]
    summary = summary_of(airflow_home)
    assert (summary["state"], summary["rows"], sum(summary["outcomes"].values())) == ("published", 45, 45)
    assert summary["batches"] > 5
    assert set(rehearsal.bill()["by_request"].values()) == {1}


def test_failures_are_driven_again_under_airflow_by_a_parameter(airflow_home, rehearsal, job):
    world, jobs = job
    rehearsal.faults(refused=0.4)
    uri = world.write("in.jsonl", reviews(25))
    run_dag(airflow_home, "reviews", {"input": uri}, rehearsal, jobs)
    first = summary_of(airflow_home)
    rehearsal.faults()
    run = run_dag(airflow_home, "reviews", {"redrive": first["run"], "outcomes": ["refused"]}, rehearsal, jobs)
    assert run["state"] == "success"
    [second] = [each for each in summaries_of(airflow_home) if each["redrive_of"] == first["run"]]
    assert second["requests"]["submitted"] == first["outcomes"]["refused"] > 0
    assert second["outcomes"]["succeeded"] == 25
    assert rehearsal.bill()["requests"] == 25 + first["outcomes"]["refused"]


def test_a_sample_is_published_beside_the_results_and_tells_no_asset(airflow_home, rehearsal, job):
    world, jobs = job
    ended = run_dag(
        airflow_home, "reviews", {"input": world.write("in.jsonl", reviews(25)), "sample": 5, "model": "gpt-5.4-mini"}, rehearsal, jobs
    )
    assert (ended["state"], ended["tasks"]["publish[-1]"], ended["tasks"]["report[-1]"]) == ("success", "skipped", "success")
    summary = summary_of(airflow_home)
    assert (summary["state"], summary["rows"], summary["model"]) == ("published", 5, "gpt-5.4-mini")
    assert "/samples/reviews/" in summary["results"]
    assert not (airflow_home / "store" / "results").exists()


def test_a_period_is_reported_under_airflow(airflow_home, rehearsal, job):
    world, jobs = job
    run_dag(airflow_home, "reviews", {"input": world.write("in.jsonl", reviews(25))}, rehearsal, jobs)
    assert run_dag(airflow_home, "periodic_report", {"since": "2026-01-01", "until": "2099-01-01"}, rehearsal, jobs)["state"] == "success"
    [written] = (airflow_home / "store" / "reports" / "periodic_report").glob("*/report.json")
    report = json.loads(written.read_text())
    assert [(line["job"], line["rows"], line["paid"]) for line in report["lines"]] == [("reviews", 25, 25)]


def test_a_live_server_is_asked_under_airflow_by_the_same_job(airflow_home, rehearsal, tmp_path):
    world = make_world(tmp_path / "world", rehearsal)
    world.job(request={"provider": "live"}, policy={"max_requests_per_shard": 10})
    run = run_dag(
        airflow_home, "reviews", {"input": world.write("in.jsonl", reviews(25))}, rehearsal, tmp_path / "world" / "job-1" / "jobs"
    )
    assert run["state"] == "success"
    assert summary_of(airflow_home)["outcomes"]["succeeded"] == 25
    assert (rehearsal.bill()["requests"], rehearsal.bill()["batches"]) == (25, 0)


def test_a_held_run_is_red_and_its_report_is_written(airflow_home, rehearsal, job):
    world, jobs = job
    rehearsal.faults(bad_request=1.0)
    ended = run_dag(airflow_home, "reviews", {"input": world.write("in.jsonl", reviews(25))}, rehearsal, jobs)
    assert (ended["state"], ended["tasks"]["publish[-1]"], ended["tasks"]["report[-1]"]) == ("failed", "failed", "failed")
    assert summary_of(airflow_home)["state"] == "held"


def test_a_run_without_input_is_green_and_quick(airflow_home, rehearsal, job):
    _, jobs = job
    ended = run_dag(airflow_home, "reviews", {}, rehearsal, jobs)
    assert (ended["state"], ended["tasks"]["discover[-1]"]) == ("success", "skipped")
    [kept] = (airflow_home / "store" / "runs").glob("*/*/*")
    told = json.loads(kept.read_text())
    assert (told["task"], told["error"]) == ("discover", "InputMissing"), "the run's tab says so"
    assert "Nothing to read at" in told["message"]


def test_an_input_that_was_named_and_is_not_there_is_red_at_once(airflow_home, rehearsal, job):
    world, jobs = job
    ended = run_dag(airflow_home, "reviews", {"input": f"file://{world.folder}/input/none.jsonl"}, rehearsal, jobs)
    assert (ended["state"], ended["tasks"]["discover[-1]"]) == ("failed", "failed")


def test_uploads_start_one_run_each_and_only_once(airflow_home, rehearsal, tmp_path):
    world = make_world(tmp_path / "world", rehearsal)
    world.job(on_upload=f"file://{tmp_path}/world/input/*.jsonl")
    world.write("a b+c.jsonl", reviews(2))
    world.write("d.jsonl", reviews(3))
    world.write("empty.jsonl", b"")
    jobs = tmp_path / "world" / "job-1" / "jobs"
    ended = run_dag(airflow_home, "uploads", {}, rehearsal, jobs)
    assert (ended["state"], ended["tasks"]["start[0]"], ended["tasks"]["start[1]"]) == ("success", "success", "success")
    store = open_objects(f"file://{airflow_home}/store")
    assert len(list(store.scan("inbox/reviews"))) == 2
    seen = make_world(tmp_path / "seen", rehearsal, store_uri=store.uri)
    assert new_uploads(seen.site, load_job(jobs / "reviews.yaml")) == []
