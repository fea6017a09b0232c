"""The whole way against the rehearsal provider over real HTTP: counts, money, reuse, faults, bad input."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nightshift.drive import begin, drive
from nightshift.encode import Encoder
from nightshift.errors import (
    AccessDenied,
    ApprovalNeeded,
    BatchRejected,
    BudgetExceeded,
    InputMissing,
    InputUnreadable,
    JobInvalid,
    ModelNotFound,
    ProviderUnavailable,
    QuotaExhausted,
    ReportUnwritten,
    RequestTooLarge,
    StoreUnavailable,
)
from nightshift.notices import notice_of
from nightshift.progress import latest
from nightshift.providers.openai import OpenAIAccess, OpenAIBatches
from nightshift.rehearsal.openai_desk import OpenAIDesk
from nightshift.rehearsal.served import free_port
from nightshift.runs import Site, approved_plan, load_run
from nightshift.shapes import Assembled, Audit, Summary
from nightshift.steps.plan import plan
from nightshift.steps.publish import publish
from nightshift.stores.objects import Objects
from nightshift.suite_check import check_suite
from tests.conftest import World, go, make_world, reviews


def results(world: World, summary: Summary, kind: str = "results") -> list[dict]:
    """The published rows, read as a reader does: through the manifest."""
    folder = world.site.store.key_of(getattr(summary, kind))
    manifest = json.loads(world.site.store.get(f"{folder}/_manifest.json"))
    tables = [pq.read_table(world.site.store.open(f"{folder}/{part['name']}")) for part in manifest["parts"]]
    return pa.concat_tables(tables).to_pylist()


def test_every_row_comes_out_once_with_its_own_answer(world):
    summary = go(world, world.job(), world.write("in.jsonl", reviews(50)))
    assert summary.published
    assert summary.outcomes["succeeded"] == summary.rows == 50
    rows = results(world, summary)
    assert [row["id"] for row in rows] == [f"r{i}" for i in range(50)]
    assert [row["stars"] for row in rows] == [str(1 + i % 5) for i in range(50)]
    assert {row["id"]: row["sentiment"] for row in rows} == {f"r{i}": "positive" if i % 2 else "negative" for i in range(50)}


def test_the_bill_is_what_the_report_says(world):
    job = world.job(policy={"max_requests_per_shard": 20, "publish_at_least": 0.5})
    summary = go(world, job, world.write("in.jsonl", reviews(50)))
    bill = world.rehearsal.bill()
    assert (summary.batches, summary.requests.submitted) == (3, 50) == (bill["batches"], bill["requests"])
    assert set(bill["by_request"].values()) == {1}
    assert summary.cost_usd.actual == pytest.approx(bill["usd"], abs=1e-6)


def test_duplicates_are_asked_once_and_answered_for_every_row(world):
    rows = [{"id": f"r{i}", "text": "Lovely." if i % 2 else "Awful.", "stars": 1} for i in range(40)]
    summary = go(world, world.job(), world.write("in.jsonl", rows))
    assert (summary.requests.unique, summary.requests.duplicates) == (2, 38)
    assert world.rehearsal.bill()["requests"] == 2
    assert summary.outcomes["succeeded"] == 40


def test_the_same_input_again_spends_nothing_and_publishes_the_same_bytes(world):
    uri = world.write("in.jsonl", reviews(30))
    first = go(world, world.job(), uri)
    second = go(world, world.job(), uri)
    assert first.run != second.run
    assert (second.requests.reused, second.requests.submitted, second.batches) == (30, 0, 0)
    assert second.cost_usd.actual == 0
    assert world.rehearsal.bill()["requests"] == 30
    assert results(world, first) == results(world, second)


def test_an_edited_file_pays_for_the_edited_rows(world):
    rows = reviews(100)
    go(world, world.job(), world.write("in.jsonl", rows))
    rows[7]["text"] = "Changed my mind, it was wonderful."
    second = go(world, world.job(), world.write("in.jsonl", rows))
    assert (second.requests.reused, second.requests.submitted) == (99, 1)
    assert world.rehearsal.bill()["requests"] == 101


def test_another_prompt_asks_anew(world):
    uri = world.write("in.jsonl", reviews(10))
    go(world, world.job(), uri)
    assert go(world, world.job(prompt="Tell: {{ text }}"), uri).requests.submitted == 10


def test_rows_that_break_the_contract_cost_nothing_and_are_told_apart(world):
    rows = [
        {"id": "ok", "text": "Fine and clean.", "stars": 3},
        {"id": "empty", "text": "  "},
        {"id": "long", "text": "x" * 501},
        {"id": "null", "text": None},
        {"id": "number", "text": 7},
        {"id": None, "text": "No id."},
        {"id": "ok", "text": "The same id again."},
    ]
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows) + b"{broken\n"
    summary = go(world, world.job(policy={"publish_at_least": 0.1}), world.write("in.jsonl", data))
    assert (summary.rows, summary.outcomes["succeeded"], summary.outcomes["rejected"]) == (8, 1, 7)
    assert world.rehearsal.bill()["requests"] == 1
    reasons = {row["id"] if row["row"] != 6 else "again": row["reason"] for row in results(world, summary, "quarantine")}
    assert reasons["empty"] == "text is empty"
    assert reasons["long"] == "text is longer than 500"
    assert reasons["null"] == "text is null"
    assert reasons["number"] == "text is not a string"
    assert reasons["again"] == "the id stands twice"
    assert sorted(summary.reasons["rejected"].values()) == [1] * 7


@pytest.mark.parametrize("name", ["in.parquet", "in.csv", "in.csv.gz", "in.jsonl", "in.jsonl.gz"])
def test_every_input_format_gives_the_same_results(world, name):
    rows = reviews(20)
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    cells = b"id,text,stars\n" + b"".join(f'{row["id"]},"{row["text"]}",{row["stars"]}\n'.encode() for row in rows)
    if name.endswith(".parquet"):
        path = world.folder / "p.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
        data = path.read_bytes()
    else:
        data = cells if "csv" in name else lines
    summary = go(world, world.job(), world.write(name, gzip.compress(data) if name.endswith(".gz") else data))
    found = results(world, summary)
    assert [(row["id"], row["sentiment"], int(row["stars"])) for row in found] == [
        (f"r{i}", "positive" if i % 2 else "negative", 1 + i % 5) for i in range(20)
    ]


def test_columns_keep_their_types_and_declared_ones_get_theirs(world):
    import datetime as dt

    when = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
    table = pa.table({"id": [1, 2], "text": ["Good.", "Bad."], "stars": [5, None], "at": pa.array([when, when], pa.timestamp("us", "UTC"))})
    path = world.folder / "t.parquet"
    pq.write_table(table, path)
    summary = go(world, world.job(output={"keep": ["stars", "at"]}), world.write("t.parquet", path.read_bytes()))
    assert [(row["id"], row["stars"], row["at"]) for row in results(world, summary)] == [(1, 5, when), (2, None, when)]
    declared = world.job(input={"require": {"text": {}, "stars": {"type": "integer", "optional": True, "maximum": 5}}})
    summary = go(world, declared, world.write("d.csv", b"id,text,stars\na,Good.,5\nb,Bad.,\nc,Odd.,x\nd,High.,9\n"))
    assert [(row["id"], row["stars"]) for row in results(world, summary)] == [("a", 5), ("b", None)]
    assert summary.reasons["rejected"] == {"stars is above 5": 1, "stars is not of type integer": 1}


def test_several_objects_are_one_run_in_key_order(world):
    world.write("b.jsonl", reviews(5)[3:])
    world.write("a.jsonl", reviews(5)[:3])
    world.write("empty.jsonl", b"")
    summary = go(world, world.job(), f"file://{world.folder}/input/*.jsonl")
    assert [row["id"] for row in results(world, summary)] == ["r0", "r1", "r2", "r3", "r4"]
    assert len(summary.input_uris) == 2


@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/v1/responses"])
def test_both_endpoints_go_the_whole_way(world, endpoint):
    summary = go(world, world.job(request={"endpoint": endpoint}), world.write("in.jsonl", reviews(10)))
    assert summary.outcomes["succeeded"] == 10
    assert summary.usage.input_tokens > 0
    assert summary.usage.unknown == 0


def test_a_job_without_a_schema_publishes_the_text(world):
    summary = go(world, world.job(output={"schema": None}), world.write("in.jsonl", reviews(4)))
    assert [row["answer"] for row in results(world, summary)] == ["negative", "positive", "negative", "positive"]


def test_answers_of_every_json_type_become_columns(world):
    schema = {
        "type": "object",
        "properties": {
            "tags": {"type": "array", "items": {"type": "string", "enum": ["room", "staff", "other"]}},
            "score": {"type": "integer", "minimum": 1, "maximum": 5},
            "nice": {"type": "boolean"},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "inner": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"], "additionalProperties": False},
        },
        "required": ["tags", "score", "nice", "note", "inner"],
        "additionalProperties": False,
    }
    summary = go(world, world.job(schema=schema), world.write("in.jsonl", reviews(2)))
    row = results(world, summary)[1]
    assert (row["tags"], row["nice"], type(row["score"]), type(row["inner"]["a"])) == (["room"], True, int, float)
    assert row["note"] == "The room number 1 was lovely."


FAULTY = {
    "errored": "errored", "bad_request": "errored", "status_zero": "errored", "missing": "missing", "garbage": "missing",
    "truncated": "truncated", "refused": "refused", "filtered": "filtered", "invalid": "invalid", "never_run": "expired",
}  # fmt: skip


@pytest.mark.parametrize(("fault", "outcome"), FAULTY.items())
def test_what_a_provider_does_to_requests_becomes_outcomes_that_add_up(world, fault, outcome):
    world.rehearsal.faults(**{fault: 0.3})
    job = world.job(policy={"retry": {"invalid": 0, "truncated": 0, "errored": 0, "expired": 0, "missing": 0}, "publish_at_least": 0.0})
    summary = go(world, job, world.write("in.jsonl", reviews(200)))
    assert sum(summary.outcomes.values()) == 200
    assert 20 < summary.outcomes[outcome] < 100
    assert summary.outcomes["succeeded"] == 200 - summary.outcomes[outcome]
    quarantined = Counter(row["outcome"] for row in results(world, summary, "quarantine"))
    assert quarantined == {outcome: summary.outcomes[outcome]}
    assert len(results(world, summary)) == summary.outcomes["succeeded"]


def test_what_failed_is_asked_again_until_it_succeeds_and_only_that(world):
    world.rehearsal.faults(errored=0.15, never_run=0.05)  # six tries: one in a thousand runs would still lose a request
    summary = go(world, world.job(policy={"retry": {"errored": 5, "expired": 5}}), world.write("in.jsonl", reviews(300)))
    assert summary.outcomes["succeeded"] == 300
    assert summary.batches > 1
    answers = duckdb.sql(f"SELECT * FROM '{world.folder}/store/shards/*/answers-*.parquet'")
    assert world.rehearsal.bill()["requests"] == 300
    assert len(answers) > 300


def test_F67_F68_F85_odd_lines_are_counted_and_change_no_outcome(world):
    world.rehearsal.faults(duplicate=0.2, unknown=0.1, no_usage=0.05)
    summary = go(world, world.job(), world.write("in.jsonl", reviews(200)))
    assert summary.outcomes["succeeded"] == 200
    assert summary.alarms["duplicate lines"] > 10
    assert summary.alarms["lines for unknown requests"] > 5
    assert summary.usage.unknown > 0
    assert summary.cost_usd.actual is None, "an unknown cost is never a number"


def test_F53_a_completed_batch_in_which_everything_failed_is_no_success(world):
    world.rehearsal.faults(bad_request=1.0)
    summary = go(world, world.job(), world.write("in.jsonl", reviews(20)))
    assert (summary.state, summary.published, summary.outcomes["errored"]) == ("held", False, 20)


def test_F47_F54_F45_counters_ids_and_words_of_the_provider_are_not_believed(world):
    world.rehearsal.faults(odd_counts=True, empty_error_file_id=True, unknown_status=True)
    assert go(world, world.job(), world.write("in.jsonl", reviews(20))).outcomes["succeeded"] == 20


def test_F44_F62_F63_a_provider_that_stumbles_is_asked_again(world):
    world.rehearsal.faults(poll_500=4, poll_html=2, content_502=3, content_cut=2, content_404=1, rate_limit=2)
    summary = go(world, world.job(), world.write("in.jsonl", reviews(20)))
    assert summary.outcomes["succeeded"] == 20
    assert world.rehearsal.bill()["requests"] == 20


@pytest.mark.parametrize("fault", ["create_500_after_accept", "create_cut_after_accept"])
def test_F33_a_create_call_whose_answer_is_lost_is_not_repeated(world, fault):
    world.rehearsal.faults(**{fault: 1})
    summary = go(world, world.job(), world.write("in.jsonl", reviews(20)))
    bill = world.rehearsal.bill()
    assert (summary.outcomes["succeeded"], bill["batches"], bill["requests"]) == (20, 1, 20)


def test_F30_a_file_that_is_not_visible_yet_is_waited_for(world):
    world.rehearsal.faults(file_hidden_seconds=0.4)
    assert go(world, world.job(), world.write("in.jsonl", reviews(5))).outcomes["succeeded"] == 5


def test_F22_a_full_queue_is_waited_for_and_not_taken_for_an_error_of_the_data(tmp_path, rehearsal, monkeypatch):
    monkeypatch.setattr("nightshift.stores.ledger.QUEUE_PAUSE", timedelta(seconds=0.2))
    world = make_world(tmp_path, rehearsal)
    rehearsal.pace(validating=0.0, running=1.0, finalizing=0.0)
    job = world.job(policy={"max_requests_per_shard": 10})
    lines = reviews(20)
    tokens = 20 * 200
    rehearsal.faults(enqueued_token_limit=tokens // 2)
    summary = go(world, job, world.write("in.jsonl", lines))
    assert summary.outcomes["succeeded"] == 20
    assert rehearsal.bill()["requests"] == 20


def test_F39_billing_stops_are_told_and_nothing_is_lost(world):
    world.rehearsal.faults(create_quota=1)
    uri = world.write("in.jsonl", reviews(5))
    with pytest.raises(QuotaExhausted, match="Top up"):
        go(world, world.job(), uri)
    assert go(world, world.job(), uri).outcomes["succeeded"] == 5
    assert world.rehearsal.bill()["requests"] == 5


def test_F38_a_wrong_key_is_one_clear_error_before_anything_is_read(tmp_path, rehearsal):
    world = with_access(make_world(tmp_path, rehearsal), rehearsal.access(key="sk-wrong-key"))
    with pytest.raises(AccessDenied, match="OPENAI_API_KEY"):
        go(world, world.job(), world.write("in.jsonl", reviews(5)))


def test_a_missing_key_is_one_clear_error(tmp_path, rehearsal, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    world = with_access(make_world(tmp_path, rehearsal), OpenAIAccess(base_url=f"{rehearsal.url}/v1"))
    with pytest.raises(AccessDenied, match="OPENAI_API_KEY"):
        go(world, world.job(), world.write("in.jsonl", reviews(5)))


def test_F40_a_model_that_is_not_offered_is_one_clear_error(world):
    with pytest.raises(ModelNotFound, match="'gpt-none' is not offered at http"):
        go(world, world.job(request={"model": "gpt-none"}), world.write("in.jsonl", reviews(5)))
    assert world.rehearsal.bill()["batches"] == 0


def test_an_unreachable_provider_is_one_clear_error_and_the_run_goes_on_later(tmp_path, rehearsal, monkeypatch):
    monkeypatch.setattr("nightshift.drive.TRANSIENT_PAUSE_SECONDS", 0.01)
    world = with_access(make_world(tmp_path, rehearsal), OpenAIAccess(base_url=f"http://127.0.0.1:{free_port()}/v1", api_key="x"))
    uri, job = world.write("in.jsonl", reviews(5)), world.job()
    with pytest.raises(ProviderUnavailable, match="cannot connect"):
        go(world, job, uri)
    summary = go(make_world(tmp_path, rehearsal), job, uri)
    assert (summary.outcomes["succeeded"], rehearsal.bill()["requests"]) == (5, 5)


@pytest.mark.parametrize(
    ("name", "data", "error", "why"),
    [
        pytest.param("a.parquet", b"PAR1 and then nothing", InputUnreadable, "not a whole Parquet file", id="truncated parquet"),
        pytest.param("a.txt", b"x", InputUnreadable, "set input.format", id="unknown format"),
        pytest.param("a.csv", b"id,words,stars\n1,a,2\n", InputUnreadable, "no column 'text'", id="missing prompt column"),
        pytest.param("a.csv", "id,text\n".encode("utf-16"), InputUnreadable, "UTF-16", id="UTF-16"),
    ],
)
def test_input_that_cannot_be_read_stops_before_anything_is_paid(world, name, data, error, why):
    with pytest.raises(error, match=why):
        go(world, world.job(), world.write(name, data))
    assert world.rehearsal.bill()["batches"] == 0


def test_input_that_is_not_there_is_told(world):
    with pytest.raises(InputMissing, match="Check the bucket, the key and the pattern"):
        go(world, world.job(), f"file://{world.folder}/nowhere/*.jsonl")


def test_input_that_holds_no_row_is_held_with_a_report(world):
    summary = go(world, world.job(), world.write("in.jsonl", b"\n"))
    assert (summary.state, summary.rows) == ("held", 0)


def test_many_small_objects_make_few_row_indexes_and_many_rows_more_than_one(world, monkeypatch):
    monkeypatch.setattr("nightshift.spool.GROUP_ROWS", 8)
    monkeypatch.setattr("nightshift.spool.SLICE_ROWS", 20)
    for number in range(50):
        world.write(f"part-{number:02d}.jsonl", [{"id": f"r{number}", "text": f"Good {number}.", "stars": 1}])
    run = begin(world.site, world.job(), pattern=f"file://{world.folder}/input/*.jsonl", dates={}, scheduled=False)
    summary = drive(world.site, run, ask=lambda run, plan: True)
    assert [row["id"] for row in results(world, summary)] == [f"r{number}" for number in range(50)]
    assert len(approved_plan(run).slices) == 3


def test_an_empty_object_is_told_as_one(world):
    with pytest.raises(InputMissing, match=r"what matches it is empty \(.*in\.jsonl\)"):
        go(world, world.job(), world.write("in.jsonl", b""))


def test_a_request_that_fits_no_batch_is_told_before_anything_is_sent(world):
    with pytest.raises(RequestTooLarge, match=r"max_length under input\.require"):
        go(world, world.job(request={"limits": {"max_bytes": 600}}), world.write("in.jsonl", [{"id": "a", "text": "x" * 400, "stars": 1}]))
    assert world.rehearsal.bill()["batches"] == 0


def test_the_budget_and_the_approval_stop_before_anything_is_sent(world):
    uri = world.write("in.jsonl", reviews(50))
    with pytest.raises(BudgetExceeded):
        go(world, world.job(policy={"budget_usd": 0.000001}), uri)
    with pytest.raises(ApprovalNeeded):
        go(world, world.job(policy={"approve_above_usd": 0}), uri, approved=False)
    assert world.rehearsal.bill()["batches"] == 0
    reports = [world.site.store.get_shape(run.key("summary.json"), Summary) for run in latest(world.site.store, "reviews", 2)]
    assert [(each.state, each.cost_usd.actual) for each in reports] == [("failed", 0), ("failed", 0)], "it is known that nothing was sent"
    assert go(world, world.job(policy={"approve_above_usd": 0}), uri).published


def test_a_red_suite_holds_the_run_and_names_rows(world):
    suite = [
        {"type": "expect_column_values_to_be_in_set", "kwargs": {"column": "sentiment", "value_set": ["positive"]}},
        {"type": "expect_column_mean_to_be_between", "kwargs": {"column": "confidence", "min_value": 2}, "severity": "warning"},
    ]
    summary = go(world, world.job(suite=suite), world.write("in.jsonl", reviews(10)))
    assert (summary.state, summary.published, summary.results) == ("held", False, None)
    critical, warning = summary.audit.checks
    assert (critical.success, critical.unexpected, critical.examples[0]) == (False, 5, "r0")
    assert not warning.success
    assert summary.audit.reasons == ("expect_column_values_to_be_in_set on sentiment failed for 5 rows (such as r0, r2, r4, r6, r8)",)
    assert list(world.site.store.scan("results")) == []


def test_a_suite_that_cannot_be_applied_is_red_and_not_green(world):
    mean_of_text = {"type": "expect_column_mean_to_be_between", "kwargs": {"column": "sentiment", "min_value": 1}}
    summary = go(world, world.job(suite=[mean_of_text]), world.write("in.jsonl", reviews(3)))
    assert summary.state == "held"
    assert "expect_column_mean_to_be_between" in summary.problem


def test_publishing_replaces_the_partition_and_leaves_no_old_part(world):
    first = go(world, world.job(), world.write("in.jsonl", reviews(10)))
    second = go(world, world.job(), world.write("in.jsonl", reviews(12)))
    assert first.results == second.results
    assert len(results(world, second)) == 12
    folder = world.site.store.key_of(second.results)
    assert len([found for found in world.site.store.scan(folder) if found.key.endswith(".parquet")]) == 1


@pytest.mark.parametrize("moment", ["put_shape", "scan"])
def test_two_that_publish_one_partition_at_once_leave_it_whole(world, monkeypatch, moment):
    """One finds its parts there from before. The other one, which replaces them, sweeps them before its manifest, or is about to after it."""
    first, second = (go(world, world.job(), world.write("in.jsonl", reviews(count))) for count in (10, 12))
    republish(world, first)
    quick, slow = (second, first) if moment == "put_shape" else (first, second)
    store, met = type(world.site.store), []
    was = getattr(store, moment)

    def overtaken(self, key, *args):
        if key.startswith("results") and not met:
            met.append(key)
            republish(world, quick)
        return was(self, key, *args)

    monkeypatch.setattr(store, moment, overtaken)
    republish(world, slow)
    assert met
    assert len(results(world, first)) == 10


def republish(world: World, summary: Summary) -> None:
    run = load_run(world.site.store, world.site.store.uri_of(f"runs/reviews/{summary.run}"))
    assembled, audit = (
        world.site.store.get_shape(run.key(f"{name}.json"), shape) for name, shape in (("assembled", Assembled), ("audit", Audit))
    )
    publish(world.site, run, assembled, audit)


def test_a_held_run_leaves_readers_with_what_they_had(world):
    go(world, world.job(), world.write("in.jsonl", reviews(10)))
    before = sorted((found.key, found.etag) for found in world.site.store.scan("results"))
    world.rehearsal.faults(bad_request=1.0)
    assert go(world, world.job(), world.write("in.jsonl", [{"id": "n", "text": "new", "stars": 1}])).state == "held"
    assert sorted((found.key, found.etag) for found in world.site.store.scan("results")) == before


def test_two_runs_at_once_over_the_same_rows_pay_once(tmp_path, rehearsal):
    rehearsal.pace(validating=0.0, running=1.0, finalizing=0.0)
    one, two = make_world(tmp_path, rehearsal, "one"), make_world(tmp_path, rehearsal, "two")
    job, uri = one.job(), one.write("in.jsonl", reviews(30))
    other = one.write("other.jsonl", reviews(30)[10:])
    from threading import Thread

    def first() -> None:
        done.append(go(one, job, uri))

    done: list[Summary] = []
    thread = Thread(target=first)
    thread.start()
    while not rehearsal.bill()["batches"]:
        pass
    second = go(two, job, other)
    thread.join()
    assert (second.requests.adopted, second.requests.submitted) == (20, 0)
    assert (done[0].outcomes["succeeded"], second.outcomes["succeeded"]) == (30, 20)
    assert rehearsal.bill()["requests"] == 30


def test_drift_is_measured_against_the_last_published_run(world):
    job = world.job(report={"drift": ["sentiment"], "charts": ["stars"]})
    first = go(world, job, world.write("a.jsonl", [{"id": str(i), "text": f"Lovely {i}.", "stars": 1} for i in range(10)]))
    second = go(
        world, job, world.write("b.jsonl", [{"id": str(i), "text": f"{'Awful' if i < 5 else 'Nice'} {i}.", "stars": 2} for i in range(10)])
    )
    assert first.drift == {"sentiment": None}
    assert second.drift == {"sentiment": 0.5}
    assert second.drift_against == first.label
    assert second.figures["stars"].bars == (("2", 10),)


def test_drift_of_numbers_goes_by_where_they_stand_and_not_by_the_range_of_the_others(world, monkeypatch):
    schema = {"type": "object", "properties": {"score": {"type": "number"}}, "required": ["score"], "additionalProperties": False}
    job = world.job(schema=schema, report={"drift": ["score"]})

    def drift(*scores: float) -> float | None:
        answers = iter(scores)
        monkeypatch.setattr("nightshift.rehearsal.model.answer", lambda text, asked: f'{{"score": {next(answers)}}}')
        rows = [{"id": str(i), "text": f"{i} of {scores}", "stars": 1} for i in range(len(scores))]
        return go(world, job, world.write("in.jsonl", rows)).drift["score"]

    usual = [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95]
    assert drift(*usual, *usual) is None
    assert drift(*usual, *usual) == 0
    assert drift(*usual, *usual[:-1], 5.0) == 0, "beyond the last bar is in the last bar"
    drift(*usual)
    assert drift(*[0.05] * 10) == 0.9


def test_the_report_is_one_page_that_asks_nothing_of_the_network(world):
    world.rehearsal.faults(refused=0.2)
    suite = [{"type": "expect_column_values_to_be_between", "kwargs": {"column": "confidence", "min_value": 0, "max_value": 1}}]
    job = world.job(report={"charts": ["sentiment", "confidence"]}, policy={"publish_at_least": 0.1}, suite=suite)
    summary = go(world, job, world.write("in.jsonl", [*reviews(30), {"id": "<script>alert(1)</script>", "text": "", "stars": 1}]))
    page = world.site.store.get(world.site.store.key_of(summary.report)).decode()
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "").replace(summary.report, "")
    assert "adds up to the rows read" in page
    assert f"{summary.outcomes['refused']:,}" in page
    assert "min_value 0, max_value 1" in page


def test_nulls_never_reach_the_model_through_a_filter(world):
    job = world.job(
        prompt="{{ text | trim | upper }} {{ range }}",
        input={"require": {"text": {"optional": True}, "range": {}}},
        policy={"publish_at_least": 0},
    )
    rows = [{"id": "a", "text": "Lovely.", "range": "wide", "stars": 1}, {"id": "b", "text": None, "range": "x", "stars": 1}]
    summary = go(world, job, world.write("in.jsonl", rows))
    assert summary.reasons["rejected"] == {"the prompt prints a null (text)": 1}
    assert summary.outcomes["succeeded"] == 1


def test_a_schema_with_references_has_the_columns_of_what_it_refers_to(world, monkeypatch):
    """As pydantic writes them: an enum, an optional one, a model, a list of models."""
    mood = {"enum": ["good", "bad"], "type": "string"}
    point = {"type": "object", "properties": {"score": {"type": "integer"}, "again": {"$ref": "#/$defs/Point"}}, "required": ["score"]}
    fields = {
        "mood": {"$ref": "#/$defs/Mood"},
        "other": {"anyOf": [{"$ref": "#/$defs/Mood"}, {"type": "null"}]},
        "maybe": {"enum": ["x", None]},
        "old": {"allOf": [{"$ref": "#/$defs/Mood"}], "description": "as older ones write it"},
        "points": {"type": "array", "items": {"$ref": "#/$defs/Point"}},
    }
    schema = {"type": "object", "properties": fields, "required": list(fields), "$defs": {"Mood": mood, "Point": point}}
    answer = {"mood": "good", "other": None, "maybe": "x", "old": "bad", "points": [{"score": 1, "again": {"score": 2}}]}
    monkeypatch.setattr("nightshift.rehearsal.model.answer", lambda text, asked: json.dumps(answer))
    summary = go(world, world.job(schema=schema), world.write("in.jsonl", reviews(2)))
    found = {name: results(world, summary)[0][name] for name in fields}
    assert found == {**answer, "points": [{"score": 1, "again": '{"score":2}'}]}, "what refers to itself is text"


def test_a_schema_that_requires_what_it_does_not_describe_is_told(world):
    schema = {"type": "object", "properties": {"category": {"type": "string"}}, "required": ["categry"]}
    with pytest.raises(JobInvalid, match="required names 'categry', which is no property; did you mean 'category'"):
        world.job(schema=schema)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        pytest.param({"type": "expect_column_values_to_be_betwen"}, "did you mean 'expect_column_values_to_be_between'", id="no such type"),
        pytest.param({"type": "expect_column_values_to_be_between", "kwargs": {"column": "stars", "min_valu": 1}}, "min_valu: unknown argument; did you mean 'min_value'", id="no such argument"),
        pytest.param({"type": "expect_column_values_to_be_between", "kwargs": {"column": "stars", "min_value": 9, "max_value": 1}}, "min_value 9 is above max_value 1", id="nothing between"),
        pytest.param({"type": "expect_column_values_to_match_regex", "kwargs": {"column": "stars", "regex": "("}}, "no regular expression", id="no regex"),
        pytest.param({"type": "expect_column_values_to_match_regex_list", "kwargs": {"column": "stars", "regex_list": 5}}, "regex_list", id="no list"),
    ],
)  # fmt: skip
def test_a_suite_that_can_never_be_applied_begins_no_run(world, line, why):
    expected = {"type": "expect_column_values_to_not_be_null", "kwargs": {"column": "stars"}}
    with pytest.raises(JobInvalid, match=f"suite.yaml: expectation 2: {line['type']}: .*{why}"):
        go(world, world.job(suite=[expected, line]), world.write("in.jsonl", reviews(2)))
    assert world.rehearsal.bill()["requests"] == 0
    assert list(world.site.store.folders("runs/reviews")) == []


def test_a_suite_is_looked_at_once(world, monkeypatch):
    job = world.job(suite=[{"type": "expect_column_values_to_not_be_null", "kwargs": {"column": "stars"}}])
    check_suite(world.site.store, job)
    for name in ("unusable", "_asked_apart"):
        monkeypatch.setattr(f"nightshift.suite_check.{name}", lambda suite: pytest.fail("it is known"))
    check_suite(world.site.store, job)


@pytest.mark.parametrize("name", ["report.html", "measured.json", "last-published.json", "summary.json"])
@pytest.mark.parametrize("error", [StoreUnavailable, AccessDenied])
def test_a_report_that_cannot_be_written_does_not_deny_the_publication_and_the_same_command_writes_it(world, monkeypatch, name, error):
    job, uri, real = world.job(report={"drift": ["sentiment"]}), world.write("in.jsonl", reviews(3)), Objects._change
    before = go(world, job, world.write("before.jsonl", reviews(3)))

    def fails(self, verb, key, act):
        if key.endswith(f"/{name}"):
            raise error(key, "No space left on device")
        return real(self, verb, key, act)

    monkeypatch.setattr(Objects, "_change", fails)
    with pytest.raises(ReportUnwritten, match=r"The results are published at .*No space left on device.* The same command writes it"):
        go(world, job, uri, fresh=True)
    monkeypatch.undo()
    paid = world.rehearsal.bill()["requests"]
    summary = go(world, job, uri, fresh=True)
    assert (summary.published, summary.drift_against) == (True, before.label)
    assert world.site.store.get(world.site.store.key_of(summary.report)) is not None
    assert (world.rehearsal.bill()["requests"], len(list(world.site.store.folders("runs/reviews")))) == (paid, 2)


@pytest.mark.parametrize("name", ["_line", "_place"])
def test_columns_of_other_tools_can_be_kept(world, name):
    rows = [{**row, name: i} for i, row in enumerate(reviews(3))]
    summary = go(world, world.job(output={"keep": [name]}), world.write("in.jsonl", rows))
    assert [row[name] for row in results(world, summary)] in ([0, 1, 2], ["0", "1", "2"])


@pytest.mark.parametrize("stars", ["123456789012345678901234", "-9223372036854775809", "18446744073709551615", "1e300", "true"])
def test_numbers_of_any_length_are_kept_as_they_stand(world, stars):
    uri = world.write("in.jsonl", f'{{"id": "a", "text": "Good.", "stars": {stars}}}\n'.encode())
    job = world.job(prompt="user:\n{{ text }} {{ stars }}", input={"require": {"text": {}}})
    summary = go(world, job, uri)
    [row] = results(world, summary)
    assert summary.outcomes["succeeded"] == 1
    assert json.loads(row["stars"]) == json.loads(stars)


def test_a_number_of_more_digits_than_python_reads_rejects_its_row(world):
    rows = f'{{"id": "a", "text": "Good.", "stars": {"9" * 5000}}}\n{{"id": "b", "text": "Good.", "stars": 1}}\n'
    summary = go(world, world.job(policy={"publish_at_least": 0}), world.write("in.jsonl", rows.encode()))
    assert (summary.outcomes["rejected"], summary.outcomes["succeeded"]) == (1, 1)


def test_an_answer_that_fits_no_column_is_invalid_alone(world, monkeypatch):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
    answer = "nightshift.rehearsal.model.answer"
    monkeypatch.setattr(answer, lambda text, schema: '{"n": 10000000000000000000}' if "number 3 " in text else '{"n": 1}')
    summary = go(
        world, world.job(schema=schema, policy={"retry": {"invalid": 0}, "publish_at_least": 0}), world.write("in.jsonl", reviews(10))
    )
    assert (summary.outcomes["succeeded"], summary.outcomes["invalid"]) == (9, 1)
    [row] = results(world, summary, "quarantine")
    assert (row["id"], row["raw"]) == ("r3", '{"n":10000000000000000000}')


@pytest.mark.parametrize(
    ("faults", "policy"),
    [
        pytest.param({}, {}, id="completed"),
        pytest.param({"bad_request": 0.3}, {}, id="completed, and the file of errors comes first"),
        pytest.param({"never_run": 0.3}, {}, id="F56 expired"),
        pytest.param({"never_run": 0.3}, {"on_demand": True}, id="expired, and the rest is finished on demand"),
    ],
)
def test_F60_result_files_that_lag_behind_the_status_are_waited_for(world, monkeypatch, faults, policy):
    monkeypatch.setattr("nightshift.drive.TRANSIENT_PAUSE_SECONDS", 0.1)
    world.rehearsal.faults(results_lag_seconds=1.0, **faults)
    summary = go(world, world.job(policy={"publish_at_least": 0, **policy}), world.write("in.jsonl", reviews(20)))
    ran = 20 - summary.outcomes["errored"]
    assert summary.outcomes["succeeded"] == world.rehearsal.bill()["requests"] == summary.paid == ran >= 10


def test_F57_what_a_batch_had_answered_at_its_deadline_is_kept_however_late_its_files_come(world, monkeypatch):
    monkeypatch.setattr("nightshift.drive.TRANSIENT_PAUSE_SECONDS", 0.1)
    world.rehearsal.faults(results_lag_seconds=1.0)
    world.rehearsal.pace(running=8, cancelling=0.2)
    summary = go(world, world.job(policy={"publish_at_least": 0, "deadline_hours": 2 / 3600}), world.write("in.jsonl", reviews(40)))
    assert 0 < summary.outcomes["succeeded"] == world.rehearsal.bill()["requests"] == summary.paid < 40
    assert summary.outcomes["succeeded"] + summary.outcomes["cancelled"] == 40


def test_columns_that_change_their_type_or_go_are_told(world):
    def schema(**properties: Any) -> dict[str, Any]:
        return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}

    uri, sentiment = world.write("in.jsonl", reviews(5)), {"enum": ["positive", "neutral", "negative"]}
    first = go(world, world.job(schema=schema(sentiment=sentiment, stars_meant={"type": "integer"}, sure={"type": "boolean"})), uri)
    assert (first.published, first.changed_columns) == (True, ())
    changed = schema(sentiment=sentiment, stars_meant={"enum": ["one", "five"]}, why={"type": "string"})
    second = go(world, world.job(schema=changed), uri)
    assert second.changed_columns == ("stars_meant: int64 → string", "sure: bool → gone")
    assert "stars_meant: int64 → string" in Path(second.report.removeprefix("file://")).read_text()
    assert "stars_meant: int64 → string" in notice_of(second, "").text
    assert go(world, world.job(schema=changed), world.write("b.jsonl", reviews(3))).changed_columns == ()


def test_a_note_in_the_prompt_file_buys_nothing_anew(world):
    uri = world.write("in.jsonl", reviews(5))
    go(world, world.job(prompt="Judge: {{ text }}"), uri)
    second = go(world, world.job(prompt="Judge: {# more to the point #}{{ text }}"), uri)
    assert (second.requests.reused, second.requests.submitted) == (5, 0)


def test_results_can_be_read_by_anybody(world):
    summary = go(world, world.job(), world.write("in.jsonl", reviews(10)))
    path = summary.results.removeprefix("file://")
    assert duckdb.sql(f"SELECT sentiment, count(*) FROM '{path}/part-*.parquet' GROUP BY 1 ORDER BY 1").fetchall() == [
        ("negative", 5),
        ("positive", 5),
    ]


def test_F32_one_bad_line_does_not_condemn_its_neighbours(world, monkeypatch):
    """A batch that fails validation names its bad lines; those are errored, the rest is asked again without them."""
    lines = Encoder.lines

    def one_bad(self, keys, tails):
        made = bytes(lines(self, keys, tails)).splitlines(keepends=True)
        return b"".join(line.replace(b'"POST"', b'"PUT"') if b"number 3 " in line else line for line in made)

    monkeypatch.setattr(Encoder, "lines", one_bad)
    summary = go(world, world.job(policy={"publish_at_least": 0.5}), world.write("in.jsonl", reviews(10)))
    assert (summary.outcomes["succeeded"], summary.outcomes["errored"]) == (9, 1)
    assert world.rehearsal.bill()["requests"] == 9


@pytest.mark.parametrize("shown", [1, 100])
def test_F32_bad_lines_that_are_named_one_by_one_condemn_none_of_the_others(world, monkeypatch, shown):
    read = OpenAIDesk.read

    def with_bad_lines(self, batch):
        lines, errors = read(self, batch)
        bad = [number for number, line in enumerate(lines, start=1) if re.search(r"number [2468] ", str(line.body))]
        return lines, [*errors, *({"code": "invalid_value", "message": "bad", "param": None, "line": number} for number in bad)]

    monkeypatch.setattr(OpenAIDesk, "read", with_bad_lines)
    monkeypatch.setattr("nightshift.rehearsal.engine.ERRORS_SHOWN", shown)
    summary = go(world, world.job(policy={"retry": {"errored": 1}, "publish_at_least": 0.5}), world.write("in.jsonl", reviews(10)))
    assert (summary.outcomes["succeeded"], summary.outcomes["errored"]) == (6, 4)
    assert world.rehearsal.bill()["requests"] == 6


def test_a_batch_rejected_as_a_whole_is_told_and_can_be_tried_again(world, monkeypatch):
    monkeypatch.setattr("nightshift.rehearsal.openai_desk.MAX_LINES", 3)
    uri = world.write("in.jsonl", reviews(5))
    with pytest.raises(BatchRejected, match="too_many_tasks"):
        go(world, world.job(), uri)
    monkeypatch.setattr("nightshift.rehearsal.openai_desk.MAX_LINES", 50_000)
    assert go(world, world.job(), uri).outcomes["succeeded"] == 5


def with_access(world: World, access: OpenAIAccess) -> World:
    site = world.site
    replaced = Site(
        store=site.store,
        open_input=site.open_input,
        open_provider=lambda request: OpenAIBatches(request.endpoint, access, sleep=lambda seconds: None),
        owner=site.owner,
        poll_seconds=site.poll_seconds,
        scratch_folder=site.scratch_folder,
    )
    return World(folder=world.folder, rehearsal=world.rehearsal, site=replaced)


def test_rows_whose_id_stands_before_them_are_rejected_however_many_and_however_long(world):
    ids = [f"r{number % 900}" for number in range(3000)]
    rows = [{"id": each, "text": f"Lovely stay {each}.", "stars": 5, "note": "long " * 4000} for each in ids]
    job = world.job(output={"keep": ["note"]}, policy={"publish_at_least": 0.1})
    run = begin(world.site, job, pattern=world.write("in.jsonl", rows), dates={}, scheduled=False)
    made = plan(world.site, run)
    assert (made.rows, made.rejected, made.unique, made.duplicates) == (3000, 2100, 900, 0)
    assert made.reasons == {"the id stands twice": 2100}
    [index] = [pq.read_table(world.folder / "store" / each) for each in made.slices]
    late = [reason == "the id stands twice" for reason in index.column("reason").to_pylist()]
    assert late == [number >= 900 for number in range(3000)]
    assert [key is None for key in index.column("request_key").to_pylist()] == late
    assert index.column("keep_note").null_count == 0


def test_ids_that_lose_their_last_digits_are_rejected(world):
    data = (
        b"".join(b'{"id": %d, "text": "Lovely.", "stars": 5}\n' % (10**21 + i) for i in range(2))
        + b'{"id": 7, "text": "Bad.", "stars": 1}\n'
    )
    summary = go(world, world.job(policy={"publish_at_least": 0.1}), world.write("in.jsonl", data))
    assert (summary.outcomes["succeeded"], summary.reasons["rejected"]) == (1, {"the id is beyond 64 bits: write it as text": 2})


def test_a_carried_integer_beyond_what_a_float_tells_apart_is_rounded(world):
    rows = [{"id": "a", "text": "Lovely.", "stars": 2**53 + 1}, {"id": "b", "text": "Bad.", "stars": 2}]
    job = world.job(input={"require": {"stars": {"type": "number"}}})
    summary = go(world, job, world.write("in.jsonl", rows))
    assert [row["stars"] for row in results(world, summary)] == [float(2**53), 2.0]
