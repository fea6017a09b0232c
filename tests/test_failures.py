"""The failure catalogue against the rehearsal servers: entries that no other test has in its name.

`docs/failures.md` lists every entry, what happens, what it costs and what a retry does; `test_docs.py` holds it to the tests.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import boto3
import pyarrow.parquet as pq
import pytest
from pytest_httpserver import HTTPServer

from nightshift.drive import drive
from nightshift.errors import (
    BatchLost,
    BatchRejected,
    InputChanged,
    ProviderUnavailable,
    QuotaExhausted,
    ReportUnwritten,
    ShardHeld,
    StoreUnavailable,
)
from nightshift.events import Hint, read_message
from nightshift.inbox import hear, heard_uploads, new_uploads, note_started, starts, still_there
from nightshift.providers.openai import OpenAIAccess, OpenAIBatches
from nightshift.steps.approve import approve
from nightshift.steps.collect import collect
from nightshift.steps.discover import discover
from nightshift.steps.plan import plan
from nightshift.steps.submit import submit
from nightshift.steps.wait import FILES_GRACE, pauses
from nightshift.stores.ledger import LEASE, QUEUE_PATIENCE
from nightshift.stores.objects import Objects
from tests.conftest import World, go, order, reviews, s3_event


def submitted(world: World, job=None, rows: int = 5):
    """A run of one shard that is with the provider: (run, shard)."""
    run = discover(world.site, job or world.job(), pattern=world.write("in.jsonl", reviews(rows)), label="x", run="r1", dates={})
    [shard] = approve(world.site, run, plan(world.site, run), ask=lambda: True).shards
    submit(world.site, run, shard)
    return run, shard


def until_ended(world: World, run, shard: str, site=None) -> None:
    for pause in pauses(site or world.site, run, shard):
        time.sleep(pause)


# ---- A. Input and events: both ways into the inbox give the same identities, so an event that is doubled, late, out of order or lost changes nothing


@pytest.fixture
def inbox(world):
    """Its job, and how its files look as events of S3. The world's own folder plays the bucket."""
    return world, world.job(on_upload={"uri": f"file://{world.folder}/input/*.jsonl", "queue": "https://sqs.example/uploads"})


def start_all(world, job, waiting):
    for start in starts(job, waiting, free=100, now=world.site.now()):
        note_started(world.site.store, start)


def test_F01_F03_F09_an_upload_starts_one_run_however_often_and_however_late_it_is_seen(inbox):
    world, job = inbox
    world.write("a.jsonl", reviews(1))
    seen = [new_uploads(world.site, job) for _ in range(3)]
    assert seen[0] == seen[1] == seen[2]
    for _ in range(2):
        start_all(world, job, seen[0])
    assert new_uploads(world.site, job) == []


def test_F01_F03_events_and_listings_give_the_same_identity(cloud):
    bucket = cloud.site.store.uri.removesuffix("/store")
    job = cloud.job(on_upload=f"{bucket}/in/**", input={"uri": f"{bucket}/in/*"})
    client = boto3.client("s3")
    client.put_object(Bucket=bucket[5:], Key="in/a b+%é.jsonl", Body=b'{"id": 1, "text": "x"}')
    [listed] = new_uploads(cloud.site, job)
    assert listed.uri == f"{bucket}/in/a b+%é.jsonl"
    body = s3_event(bucket[5:], "in/a+b%2B%25%C3%A9.jsonl", listed.etag)
    for _ in range(3):
        hear(cloud.site, [job], read_message(body))
    [heard] = heard_uploads(cloud.site, job)
    assert heard.label == listed.label
    start_all(cloud, job, [heard])
    assert new_uploads(cloud.site, job) == heard_uploads(cloud.site, job) == []
    hear(cloud.site, [job], read_message(body))
    assert heard_uploads(cloud.site, job) == [], "days later"


def test_F02_F13_an_event_of_what_is_gone_or_was_replaced_starts_nothing(cloud):
    bucket = cloud.site.store.uri.removesuffix("/store")
    job, client = cloud.job(on_upload=f"{bucket}/in/*", input={"uri": f"{bucket}/in/*"}), boto3.client("s3")
    old = client.put_object(Bucket=bucket[5:], Key="in/a.jsonl", Body=b"1")["ETag"]
    new = client.put_object(Bucket=bucket[5:], Key="in/a.jsonl", Body=b"2")["ETag"]
    for etag in (new, old):
        hear(cloud.site, [job], read_message(s3_event(bucket[5:], "in/a.jsonl", etag.strip('"'))))
    hear(cloud.site, [job], read_message(s3_event(bucket[5:], "in/gone.jsonl", "0" * 32)))
    [upload] = still_there(cloud.site, job.name, heard_uploads(cloud.site, job))
    assert upload.etag == new.strip('"')
    assert heard_uploads(cloud.site, job) == [upload], "what is gone is forgotten"


def test_F02_an_object_written_again_is_a_new_upload_and_the_old_one_never_comes_back(inbox):
    world, job = inbox
    world.write("a.jsonl", reviews(1))
    [first] = new_uploads(world.site, job)
    world.write("a.jsonl", reviews(2))
    [second] = new_uploads(world.site, job)
    assert (first.uri, first.label != second.label) == (second.uri, True)
    start_all(world, job, [second])
    assert new_uploads(world.site, job) == []


def test_F10_empty_objects_and_folder_markers_start_nothing(inbox):
    world, job = inbox
    world.write("empty.jsonl", b"")
    (world.folder / "input" / "folder.jsonl").mkdir()
    assert new_uploads(world.site, job) == []
    s3_job = world.job(on_upload="s3://b/in/*", input={"uri": "s3://b/in/*"})
    for key, size in (("in/", 0), ("in/empty.jsonl", 0), ("in/folder/", 5), ("out/a.jsonl", 5)):
        assert hear(world.site, [s3_job], [Hint(bucket="b", key=key, etag="e", size=size)]) == 0


def test_F12_an_object_replaced_between_plan_and_read_stops_the_run_before_it_pays(world):
    uri = world.write("in.jsonl", reviews(5))
    run = discover(world.site, world.job(), pattern=uri, label="x", run="r1", dates={})
    world.write("in.jsonl", reviews(9))
    with pytest.raises(InputChanged, match="Start a new run"):
        drive(world.site, run, ask=lambda run, planned: True)
    assert world.rehearsal.bill()["batches"] == 0


def test_F16_ids_that_are_missing_or_stand_twice_reject_their_rows_and_nothing_else(world):
    rows = [*reviews(3), {"text": "no id", "stars": 1}, {**reviews(1)[0], "text": "the same id"}]
    summary = go(world, world.job(), world.write("in.jsonl", rows))
    assert summary.reasons["rejected"] == {"the id is missing": 1, "the id stands twice": 1}
    assert summary.outcomes["succeeded"] == 3


def test_F17_what_a_provider_sees_is_hexadecimal_whatever_the_ids_are(world):
    rows = [{"id": "dt=2026/11+22:%ü", "text": "Lovely.", "stars": 1}]
    go(world, world.job(), world.write("in=1+2.jsonl", rows))
    [shard] = world.site.store.folders("shards")
    [attempt] = world.site.ledger.attempts(shard.removeprefix("shards/"))
    assert int(attempt.claim.token, 16)
    [line] = world.site.store.get(f"{shard}/requests.jsonl").splitlines()
    assert int(json.loads(line)["custom_id"], 16)


def test_F18_columns_of_other_types_and_nulls_reject_their_rows(world):
    rows = [
        *reviews(2),
        {"id": "n", "text": None, "stars": 1},
        {"id": "o", "text": {"a": 1}, "stars": 1},
        {"id": "i", "text": 7, "stars": 1},
    ]
    summary = go(world, world.job(policy={"publish_at_least": 0.4}), world.write("in.jsonl", rows))
    assert (summary.outcomes["rejected"], sum(summary.outcomes.values())) == (3, 5)
    assert summary.reasons["rejected"] == {"text is not a string": 2, "text is null": 1}


# ---- B, C. Limits, upload and create


def test_F23_a_queue_that_is_never_released_is_reported_after_a_day(world, monkeypatch):
    monkeypatch.setattr("nightshift.stores.ledger.QUEUE_PAUSE", timedelta(seconds=0))
    world.rehearsal.faults(enqueued_token_limit=1)
    run, shard = submitted(world, rows=1)
    for _ in range(3):
        until_ended(world, run, shard)
        assert collect(world.site, run, shard) is None
        submit(world.site, run, shard)
    until_ended(world, run, shard)
    tomorrow = replace(world.site, now=lambda: datetime.now(UTC) + QUEUE_PATIENCE + timedelta(minutes=1))
    with pytest.raises(BatchRejected, match="Enqueued token limit"):
        collect(tomorrow, run, shard)


def test_F26_rate_limits_on_any_call_are_waited_out(world, monkeypatch):
    monkeypatch.setattr("nightshift.drive.TRANSIENT_PAUSE_SECONDS", 0.05)
    world.rehearsal.faults(rate_limit=7)
    assert go(world, world.job(), world.write("in.jsonl", reviews(5))).outcomes["succeeded"] == 5
    assert world.rehearsal.bill()["batches"] == 1


def test_F27_F31_F41_lines_of_a_shard_name_one_model_one_endpoint_and_every_request_once(world):
    rows = [*reviews(30), *[{**row, "id": f"again-{row['id']}"} for row in reviews(30)]]
    run = discover(world.site, world.job(), pattern=world.write("in.jsonl", rows), label="x", run="r1", dates={})
    [shard] = plan(world.site, run).shards
    lines = [json.loads(line) for line in world.site.store.get(f"shards/{shard}/requests.jsonl").splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines) == 30
    assert {(line["url"], line["method"], line["body"]["model"]) for line in lines} == {("/v1/chat/completions", "POST", "gpt-5.4-nano")}


def test_F28_an_input_file_is_named_jsonl(world):
    submitted(world)
    [file] = world.rehearsal.provider()._client.files.list(purpose="batch").data
    assert file.filename.endswith(".jsonl")


def test_F37_a_sibling_whose_submission_fails_leaves_the_others_to_be_gone_on_with(world):
    job = world.job(policy={"max_requests_per_shard": 2})
    run = discover(world.site, job, pattern=world.write("in.jsonl", reviews(6)), label="x", run="r1", dates={})
    shards = approve(world.site, run, plan(world.site, run), ask=lambda: True).shards
    first = submit(world.site, run, shards[0])
    world.rehearsal.faults(create_quota=1)
    with pytest.raises(QuotaExhausted):
        submit(world.site, run, shards[1])
    assert submit(world.site, run, shards[0]) == first
    assert drive(world.site, run, ask=lambda run, planned: True).outcomes["succeeded"] == 6
    assert world.rehearsal.bill()["batches"] == 3


# ---- D. Running


def test_F42_a_batch_that_makes_no_progress_is_cancelled_at_the_deadline_and_harvested(world):
    world.rehearsal.pace(validating=0.0, running=3600.0, finalizing=0.0, cancelling=0.05)
    run, shard = submitted(world, world.job(policy={"deadline_hours": 1, "publish_at_least": 0}))
    overdue = replace(world.site, now=lambda: datetime.now(UTC) + timedelta(hours=1, minutes=1))
    until_ended(world, run, shard, overdue)
    settled = collect(overdue, run, shard)
    assert settled.requests == 5
    assert [attempt.ended.status for attempt in world.site.ledger.attempts(shard)] == ["cancelled"]


def test_F48_a_cancel_that_comes_too_late_is_no_error(world):
    run, shard = submitted(world)
    until_ended(world, run, shard)
    [attempt] = world.site.ledger.attempts(shard)
    world.rehearsal.provider().cancel(attempt.receipt.batch_id)
    assert collect(world.site, run, shard).requests == 5


def test_F49_a_cancel_that_is_lost_is_asked_for_again(world):
    world.rehearsal.pace(validating=0.0, running=3600.0, finalizing=0.0, cancelling=0.05)
    world.rehearsal.faults(cancel_500=3)
    run, shard = submitted(world, world.job(policy={"deadline_hours": 1}))
    overdue = replace(world.site, now=lambda: datetime.now(UTC) + timedelta(hours=1, minutes=1))
    until_ended(world, run, shard, overdue)
    assert world.rehearsal.provider().poll(world.site.ledger.attempts(shard)[0].receipt.batch_id).status == "cancelled"


# ---- E, F. Terminal states, download and parse


def test_F55_both_result_files_are_read(world):
    world.rehearsal.faults(bad_request=0.4)
    summary = go(world, world.job(), world.write("in.jsonl", reviews(40)))
    assert summary.outcomes["errored"] > 5
    assert summary.outcomes["succeeded"] == 40 - summary.outcomes["errored"]
    assert "context_length_exceeded" in next(iter(summary.reasons["errored"]))


def test_F56_F57_what_ran_before_a_batch_was_stopped_is_kept_and_only_the_rest_is_asked_again(world):
    world.rehearsal.pace(validating=0.0, running=1.0, finalizing=0.0, cancelling=0.05)
    run, shard = submitted(world, rows=40)
    [attempt] = world.site.ledger.attempts(shard)
    deadline = time.monotonic() + 20
    while world.rehearsal.provider().poll(attempt.receipt.batch_id).done < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    world.rehearsal.provider().cancel(attempt.receipt.batch_id)
    assert drive(world.site, run, ask=lambda run, planned: True).outcomes["succeeded"] == 40
    bill = world.rehearsal.bill()
    assert (bill["requests"], bill["unique_requests"], bill["batches"]) == (40, 40, 2)


def test_F59_a_batch_that_fails_after_its_work_was_done_is_harvested(world):
    world.rehearsal.faults(fails_at_the_end=True)
    assert go(world, world.job(), world.write("in.jsonl", reviews(8))).outcomes["succeeded"] == 8
    assert world.rehearsal.bill()["requests"] == 8


@pytest.mark.parametrize("lost", [0, 1])
def test_F61_results_that_are_gone_are_bought_again_only_where_the_job_says_so(world, lost):
    run, shard = submitted(world, world.job(policy={"retry": {"lost": lost}}))
    until_ended(world, run, shard)
    world.rehearsal.faults(results_gone=True)
    with pytest.raises(ProviderUnavailable, match="is not there"):
        collect(world.site, run, shard)
    later = replace(world.site, now=lambda: datetime.now(UTC) + FILES_GRACE + timedelta(minutes=1))
    if not lost:
        with pytest.raises(BatchLost):
            collect(later, run, shard)
        return
    assert collect(later, run, shard) is None
    world.rehearsal.faults()
    assert drive(world.site, run, ask=lambda run, planned: True).outcomes["succeeded"] == 5


def test_F64_a_download_that_ends_early_and_looks_complete_is_fetched_again(world):
    world.rehearsal.faults(content_short=2)
    summary = go(world, world.job(), world.write("in.jsonl", reviews(30)))
    assert (summary.outcomes["succeeded"], summary.alarms, world.rehearsal.bill()["requests"]) == (30, {}, 30)


def test_F66_a_request_without_a_line_is_missing_and_asked_again_within_bounds(world):
    world.rehearsal.faults(missing=0.7)
    summary = go(world, world.job(policy={"retry": {"missing": 2}, "publish_at_least": 0}), world.write("in.jsonl", reviews(40)))
    assert (summary.batches, summary.outcomes["missing"] + summary.outcomes["succeeded"]) == (3, 40)
    assert 0 < summary.outcomes["missing"] < 40


def test_F69_F74_shuffled_results_of_any_size_are_matched_by_id_line_by_line(world):
    """The rehearsal shuffles every result file; each answer has to land on its own row."""
    rows = [{"id": f"r{i}", "text": f"{'Lovely' if i % 3 else 'Awful'} n{i}", "stars": 1} for i in range(300)]
    summary = go(world, world.job(), world.write("in.jsonl", rows))
    [part] = [found.key for found in world.site.store.scan("results") if found.key.endswith(".parquet")]
    published = pq.read_table(world.site.store.open(part)).to_pylist()
    assert summary.outcomes["succeeded"] == 300
    assert all((row["sentiment"] == "negative") == (int(row["id"][1:]) % 3 == 0) for row in published)


def test_F71_F82_an_error_inside_the_response_body_is_an_error_and_is_not_asked_again(world):
    world.rehearsal.faults(bad_request=1.0)
    summary = go(world, world.job(policy={"retry": {"errored": 5}, "publish_at_least": 0}), world.write("in.jsonl", reviews(3)))
    assert (summary.outcomes["errored"], summary.batches, summary.paid) == (3, 1, 0)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "prose",
        '```json\n{"n": 1}\n```',
        '{"n": 1} and more',
        '{"n": NaN}',
        '{"n": 1, "extra": 2}',
        '{"n": "one"}',
        '{"n": 1e400}',
    ],
)
def test_F78_what_is_not_exactly_an_answer_under_the_schema_is_invalid(world, monkeypatch, text):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
    monkeypatch.setattr("nightshift.rehearsal.model.answer", lambda asked, wanted: text)
    job = world.job(schema=schema, policy={"retry": {"invalid": 0}, "publish_at_least": 0})
    summary = go(world, job, world.write("in.jsonl", reviews(1)))
    assert (summary.outcomes["invalid"], summary.paid) == (1, 1)


# ---- I. Servers that only look like the API


def test_F97_a_server_without_a_batch_api_is_told(httpserver: HTTPServer, tmp_path):
    httpserver.expect_request("/v1/batches").respond_with_json({"detail": "Not Found"}, status=404)
    provider = OpenAIBatches("/v1/chat/completions", OpenAIAccess(base_url=httpserver.url_for("/v1"), api_key="x"))
    with pytest.raises(BatchRejected, match="has no batch API"):
        provider.create(order("file-1"), lambda: True)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ('{"error": "flat"}', "application/json"),
        ('{"error": {"message": "nested", "code": 400}}', "application/json"),
        ('{"message": "bare"}', "application/json"),
        ("plain words", "text/plain"),
        ("<html><body>proxy</body></html>", "text/html"),
        ("", "text/plain"),
    ],
    ids=["flat", "nested", "bare", "plain", "HTML", "empty"],
)
def test_F101_errors_of_every_shape_become_one_readable_line(httpserver: HTTPServer, body, kind):
    httpserver.expect_request("/v1/batches").respond_with_data(body, status=400, content_type=kind)
    provider = OpenAIBatches("/v1/chat/completions", OpenAIAccess(base_url=httpserver.url_for("/v1"), api_key="x"))
    with pytest.raises(BatchRejected) as caught:
        provider.create(order("file-1"), lambda: True)
    assert "\n" not in str(caught.value)
    assert "Nothing ran and nothing is billed" in str(caught.value)


# ---- J. Orchestration


def test_F103_F108_every_step_done_again_after_the_end_changes_nothing(world):
    """What Airflow does on a clear: the same steps of the same run, from the beginning."""
    run = discover(world.site, world.job(), pattern=world.write("in.jsonl", reviews(10)), label="x", run="r1", dates={})
    first = drive(world.site, run, ask=lambda run, planned: True)
    before = {found.key: found.etag for found in world.site.store.scan("results")}
    again = drive(world.site, run, ask=lambda run, planned: pytest.fail("approved once"))
    assert again.model_dump(exclude={"finished_at"}) == first.model_dump(exclude={"finished_at"})
    assert [key for key in before if key.endswith(".parquet")] == [
        found.key for found in world.site.store.scan("results") if found.key.endswith(".parquet")
    ]
    assert world.rehearsal.bill()["batches"] == 1


@pytest.mark.parametrize("ahead", [-300, 300], ids=["behind", "ahead"])
def test_F105_a_worker_whose_clock_is_wrong_by_minutes_buys_nothing_twice(world, ahead):
    """The first worker dies in doubt; the second one's clock is wrong, so that it waits too long or takes over at once."""
    run, shard = submitted(world)
    world.site.store.delete([f"shards/{shard}/receipt-1.json"])
    skewed = replace(world.site, now=lambda: datetime.now(UTC) + timedelta(seconds=ahead))
    if ahead < 0:
        with pytest.raises(ShardHeld, match="holds its claim"):
            submit(skewed, run, shard)
        skewed = replace(world.site, now=lambda: datetime.now(UTC) + LEASE + timedelta(seconds=1))
    assert submit(skewed, run, shard).batch_id
    assert world.rehearsal.bill()["batches"] == 1


def test_F106_F107_a_store_that_fails_between_two_effects_leaves_a_run_that_goes_on(world, monkeypatch):
    """Every write of the run fails once, at its turn; each time the same command goes on from there."""
    uri, job = world.write("in.jsonl", reviews(6)), world.job()
    failed, lock = set[str](), threading.Lock()

    class Flaky(Objects):
        def _change(self, verb, key, act):
            with lock:
                if key not in failed:
                    failed.add(key)
                    raise StoreUnavailable(key, "a bad moment")
            return super()._change(verb, key, act)

    store = Flaky(world.site.store.uri, world.site.store._store)
    monkeypatch.setattr("nightshift.drive.TRANSIENT_PAUSE_SECONDS", 0.01)
    later = Counter[str]()
    for _ in range(60):
        later["tries"] += 1
        try:
            summary = go(world, job, uri, store=store, now=lambda: datetime.now(UTC) + later["tries"] * (LEASE + timedelta(seconds=1)))
        except (StoreUnavailable, ReportUnwritten):
            continue
        if summary.published:
            break
    assert (summary.state, summary.outcomes["succeeded"]) == ("published", 6)
    assert world.rehearsal.bill()["requests"] == 6
    assert len(failed) > 15
    assert [name for name in ("requests.jsonl", ".parquet", "_manifest.json") if not any(key.endswith(name) for key in failed)] == []


def test_F109_keys_and_prompts_stay_out_of_everything_that_is_written_about_a_run(world, caplog):
    """Prompts stand in the frozen requests, where they have to; keys stand nowhere."""
    run, _ = submitted(world)
    assert drive(world.site, run, ask=lambda run, planned: True).published
    for found in world.site.store.scan(""):
        data = world.site.store.get(found.key)
        assert world.rehearsal.key.encode() not in data, found.key
        if found.key.endswith((".json", ".html")) and not found.key.endswith("input.json"):
            assert b"The room number" not in data, found.key
    assert "The room number" not in caplog.text
    assert world.rehearsal.key not in caplog.text
