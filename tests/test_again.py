"""Asking again: nothing that is answered or under way is bought twice, unless somebody says so; failures are, by policy."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nightshift.drive import begin, begin_again, drive
from nightshift.errors import BatchLost, BatchUnfinished, BatchUnknown, BudgetExceeded, InputMissing, SettingInvalid, ShardHeld
from nightshift.forget import forget
from nightshift.job import RETRYABLE
from nightshift.job_file import redriven
from nightshift.progress import latest
from nightshift.reserve import reserve
from nightshift.runs import approved_plan, load_run
from nightshift.shapes import Summary
from nightshift.steps.approve import approve
from nightshift.steps.collect import LOST_AFTER, collect
from nightshift.steps.discover import discover
from nightshift.steps.plan import plan
from nightshift.steps.submit import submit
from nightshift.steps.wait import pauses
from nightshift.stores.answers import Reservation
from nightshift.stores.shards import pending, read_answers, request_keys
from tests.conftest import World, go, make_world, reviews


def again(world: World, of: Summary, *outcomes: str, policy=None) -> Summary:
    begun = begin_again(world.site, of.run, redriven(outcomes), policy=lambda job: policy)
    return drive(world.site, begun, ask=lambda run, planned: True)


def planned(world: World, job, uri: str, name: str):
    run = discover(world.site, job, pattern=uri, label=name, run=name, dates={})
    return run, plan(world.site, run)


def answers_in(world: World) -> set[str]:
    return {found.key for found in world.site.store.scan("answers") if found.key.endswith(".parquet")}


def make_old(world: World) -> None:
    """Let all answers be of last week, and of the model `old`."""
    for key in answers_in(world):
        with world.site.scratch() as folder:
            path = world.site.store.download(key, Path(folder) / "answers.parquet")
            table = pq.read_table(path)
            then, old = table.column("answered_at")[0].as_py() - timedelta(days=7), ["old"] * table.num_rows
            for name, values in {"answered_at": [then] * table.num_rows, "model": old}.items():
                field = table.schema.field(name)
                table = table.set_column(table.schema.names.index(name), field, pa.array(values, field.type))
            pq.write_table(table, path)
            world.site.store.put(key, path)


def answers_of(world: World, summary: Summary) -> list[dict]:
    """The published rows, with the model that answered."""
    folder = world.site.store.key_of(summary.results)
    keys = [found.key for found in world.site.store.scan(folder) if found.key.endswith(".parquet")]
    rows = [row for key in keys for row in pq.read_table(world.site.store.open(key)).to_pylist()]
    return [{"outcome": "succeeded", "model": row["_model"], "id": row["id"]} for row in rows]


def later(world: World, **delta: float):
    return replace(world.site, now=lambda: datetime.now(UTC) + timedelta(**delta))


def sent_bodies(world: World) -> list[dict]:
    """The request bodies of every file that was uploaded, in the order of the uploads."""
    files = sorted((world.rehearsal.state / "files").glob("file-*"), key=lambda path: path.stat().st_mtime_ns)
    lines = [orjson.loads(line) for path in files for line in path.read_bytes().splitlines()]
    return [line["body"] for line in lines if "body" in line]


# ---- two runs over the same rows


def test_two_runs_planned_before_either_is_approved_pay_once_for_the_common_rows(world):
    job = world.job(policy={"max_requests_per_shard": 10})
    one, first = planned(world, job, world.write("a.jsonl", reviews(30)), "a")
    two, second = planned(world, job, world.write("b.jsonl", reviews(45)[15:]), "b")
    assert (first.submitted, second.submitted) == (30, 30)
    first, second = (approve(world.site, run, each, ask=lambda: True) for run, each in ((one, first), (two, second)))
    assert (first.submitted, first.adopted) == (30, 0)
    assert (second.submitted, second.adopted) == (15, 15)
    assert set(second.adopted_shards) <= set(first.own_shards)
    assert second.estimate.usd < first.estimate.usd
    done = [drive(world.site, run, ask=lambda run, planned: False) for run in (two, one)]
    assert [each.outcomes["succeeded"] for each in done] == [30, 30]
    bill = world.rehearsal.bill()
    assert (bill["requests"], bill["unique_requests"]) == (45, 45)
    assert sum(each.cost_usd.actual for each in done) == pytest.approx(bill["usd"], abs=2e-6)
    assert sum(each.paid for each in done) == 45


def test_many_runs_reserving_at_one_moment_reserve_every_request_once(world):
    """Twelve runs over overlapping windows of the same rows, planned apart and approved at one moment."""
    job = world.job(policy={"max_requests_per_shard": 7})
    runs = [planned(world, job, world.write(f"{i}.jsonl", reviews(60)[i * 4 : i * 4 + 16]), f"r{i}") for i in range(12)]
    start = Barrier(12)

    def at_once(i: int):
        start.wait()
        return reserve(world.site, *runs[i], weigh=lambda revised: None)

    with ThreadPoolExecutor(12) as pool:
        reserved = list(pool.map(at_once, range(12)))
    own = [shard for each in reserved for shard in each.own_shards]
    assert len(own) == len(set(own))
    assert sum(each.submitted for each in reserved) == sum(world.site.ledger.shard(shard).request_count for shard in own) == 60
    assert all(each.submitted + each.adopted + each.reused == 16 for each in reserved)


def test_a_run_that_was_approved_late_buys_nothing_that_was_answered_meanwhile(world):
    job = world.job()
    run, slow = planned(world, job, world.write("a.jsonl", reviews(20)), "slow")
    go(world, job, world.write("b.jsonl", reviews(25)[5:]))
    late = approve(world.site, run, slow, ask=lambda: True)
    assert (slow.submitted, late.submitted, late.reused) == (20, 5, 15)
    summary = drive(world.site, run, ask=lambda run, planned: False)
    assert summary.outcomes["succeeded"] == 20
    assert world.rehearsal.bill()["requests"] == 25


def test_an_approval_that_died_after_its_reservation_finds_it_again(world):
    run, draft = planned(world, world.job(), world.write("a.jsonl", reviews(5)), "r")
    reserved = reserve(world.site, run, draft, weigh=lambda revised: None)
    approved = approve(world.site, run, draft, ask=lambda: True)
    assert approved == approved_plan(run) == reserved.model_copy(update={"approved_at": approved.approved_at})
    assert len(world.site.answers(draft.fingerprint).reservations()[0]) == 1


def test_reservations_are_done_once_their_shards_are_settled(world):
    job = world.job()
    for i in range(4):
        go(world, job, world.write(f"{i}.jsonl", reviews(3 * i + 3)))
    store = world.site.answers(planned(world, job, world.write("x.jsonl", reviews(1)), "x")[1].fingerprint)
    reserved, number = store.reservations()
    assert (store.in_flight(reserved), number) == ([], 5)
    assert store.reservations() == ({}, 5)


def test_a_run_that_nobody_approves_reserves_nothing(world):
    job = world.job(policy={"budget_usd": 0.000001})
    run, draft = planned(world, job, world.write("a.jsonl", reviews(5)), "r")
    with pytest.raises(BudgetExceeded):
        approve(world.site, run, draft, ask=lambda: True)
    assert world.site.answers(draft.fingerprint).reservations() == ({}, 1)


# ---- buying anew


def test_fresh_buys_anew_and_a_repetition_of_the_same_run_does_not(world):
    job, uri = world.job(), world.write("a.jsonl", reviews(10))
    go(world, job, uri)
    summary = go(world, job, uri, fresh=True)
    assert (summary.requests.submitted, summary.requests.reused) == (10, 0)
    assert world.rehearsal.bill()["requests"] == 20
    run = discover(world.site, world.job(fresh=True), pattern=uri, label="x", run="cleared", dates={})
    for _ in range(2):
        drive(world.site, run, ask=lambda run, planned: True)
    assert world.rehearsal.bill()["requests"] == 30
    assert go(world, job, uri).requests.reused == 10


def test_what_was_bought_anew_is_what_later_runs_reuse(world):
    job, uri = world.job(policy={"max_requests_per_shard": 1}), world.write("a.jsonl", reviews(10))  # each request in a file of its own
    go(world, job, uri)
    make_old(world)
    go(world, job, uri, fresh=True)
    summary = go(world, job, world.write("b.jsonl", reviews(10)))
    assert (summary.requests.reused, summary.paid) == (10, 0)
    assert "old" not in {row["model"] for row in answers_of(world, summary)}


def test_a_redrive_of_what_was_bought_anew_does_not_take_what_was_there_before(world):
    job, uri = world.job(policy={"retry": {"invalid": 0}, "publish_at_least": 0}), world.write("a.jsonl", reviews(8))
    go(world, job, uri)
    make_old(world)
    world.rehearsal.faults(invalid=1.0)
    fresh = go(world, job, uri, fresh=True)
    world.rehearsal.faults()
    assert fresh.outcomes["invalid"] == 8
    summary = again(world, fresh, "invalid")
    assert (summary.requests.submitted, summary.paid, summary.outcomes["succeeded"]) == (8, 8, 8)


def test_rows_that_were_never_answered_are_asked_again_by_the_next_run(world):
    """A whole shard of failures: its name would be the same, and it is settled."""
    job, uri = world.job(policy={"retry": {"errored": 0}}), world.write("a.jsonl", reviews(8))
    world.rehearsal.faults(errored=1.0)
    assert go(world, job, uri).outcomes["errored"] == 8
    world.rehearsal.faults()
    summary = go(world, job, uri)
    assert (summary.requests.submitted, summary.outcomes["succeeded"]) == (8, 8)


# ---- asking again within the shard


def test_an_invalid_answer_is_asked_to_be_mended(world):
    world.rehearsal.faults(invalid=1.0)
    job = world.job(policy={"retry": {"invalid": 1}})
    go(world, job, world.write("a.jsonl", reviews(3)))
    first, second = sent_bodies(world)[0], sent_bodies(world)[3]
    assert second["messages"][:2] == first["messages"]
    assert second["messages"][2] == {"role": "assistant", "content": "I would say that this guest had a stay like any other."}
    assert "not valid JSON" in second["messages"][3]["content"]
    assert {key: value for key, value in second.items() if key != "messages"} == {k: v for k, v in first.items() if k != "messages"}


def test_a_mended_answer_counts_as_the_answer_to_what_the_row_asks(world):
    world.rehearsal.faults(invalid=0.5)
    summary = go(world, world.job(policy={"retry": {"invalid": 5}}), world.write("a.jsonl", reviews(40)))
    assert summary.outcomes["succeeded"] >= 38
    assert summary.paid == world.rehearsal.bill()["requests"] > 40
    assert summary.cost_usd.actual == pytest.approx(world.rehearsal.bill()["usd"])


def test_F19_what_is_shown_its_answer_again_keeps_to_the_size_of_a_batch(world, monkeypatch):
    monkeypatch.setattr("nightshift.rehearsal.openai_desk.MAX_BYTES", 30_000)
    world.rehearsal.faults(invalid=1.0)
    job = world.job(request={"limits": {"max_bytes": 30_000}}, policy={"retry": {"invalid": 1}, "publish_at_least": 0})
    summary = go(world, job, world.write("in.jsonl", reviews(40)))
    bill = world.rehearsal.bill()
    assert (summary.outcomes["invalid"], bill["requests"], summary.paid) == (40, 80, 80)
    assert bill["batches"] == 3, "all of them at once, and again in two"


def test_a_plain_repetition_can_be_asked_for(world):
    world.rehearsal.faults(invalid=1.0)
    go(world, world.job(policy={"retry": {"invalid": {"times": 1, "repair": False}}}), world.write("a.jsonl", reviews(1)))
    first, second = sent_bodies(world)
    assert first == second


def test_F75_a_cut_answer_is_asked_for_with_a_larger_limit_each_time(world):
    world.rehearsal.faults(truncated=1.0)
    job = world.job(policy={"retry": {"truncated": {"times": 2, "token_factor": 1.5}}})
    summary = go(world, job, world.write("a.jsonl", reviews(2)))
    assert [body["max_completion_tokens"] for body in sent_bodies(world)[::2]] == [100, 150, 225]
    assert summary.outcomes["truncated"] == 2


def test_another_model_can_be_asked_and_is_told_apart_in_batches_and_costs(world):
    """Refused rows go to another model, those that met a server error to the same one: a batch holds one model."""
    world.rehearsal.faults(refused=0.4, errored_once=0.3)
    job = world.job(policy={"retry": {"refused": {"times": 1, "model": "gpt-5.4-mini"}, "errored": 5}})
    summary = go(world, job, world.write("a.jsonl", reviews(60)))
    bill = world.rehearsal.bill()
    assert {line["model"] for line in bill["by_batch"]} == {"gpt-5.4-nano", "gpt-5.4-mini"}
    assert sum(summary.outcomes.values()) == 60
    assert summary.outcomes["succeeded"] > 36
    assert summary.cost_usd.actual == pytest.approx(bill["usd"], rel=1e-5)
    world.rehearsal.faults()
    plain = go(world, world.job(policy={"publish_at_least": 0}), world.write("a.jsonl", reviews(60)))
    assert plain.requests.submitted == 0
    assert plain.outcomes["refused"] > 10, "an answer of another model is not the answer of this one"
    assert {row["model"] for row in answers_of(world, plain) if row["outcome"] == "succeeded"} == {"gpt-5.4-nano-rehearsal"}


def test_F110_asking_again_ends_where_the_budget_does(world):
    world.rehearsal.faults(invalid=1.0)
    generous = go(world, world.job(policy={"retry": {"invalid": 5}}), world.write("a.jsonl", reviews(20)))
    assert generous.paid == 120
    world.site.store.delete(["runs/reviews/measured.json"])  # who knows what was asked again is stopped before it costs
    before = world.rehearsal.bill()["usd"]
    budget = float(generous.cost_usd.estimated) * 1.6
    bounded = go(world, world.job(policy={"retry": {"invalid": 5}, "budget_usd": budget}), world.write("b.jsonl", reviews(40)[20:]))
    spent = world.rehearsal.bill()["usd"] - before
    assert 20 < bounded.paid < 120
    assert spent <= budget
    assert bounded.outcomes["invalid"] == 20


def test_F46_a_batch_that_is_lost_is_given_up_only_where_the_job_says_so(world):
    uri = world.write("a.jsonl", reviews(4))
    for name, lost in (("keeps", 0), ("gives up", 1)):
        run, draft = planned(
            world, world.job(policy={"retry": {"lost": lost}}, prompt=f"user:\n{name} {{{{ text }}}}\n"), uri, name.replace(" ", "-")
        )
        [shard] = approve(world.site, run, draft, ask=lambda: True).shards
        submit(world.site, run, shard)
        world.rehearsal.faults(poll_404=2)
        with pytest.raises(BatchUnknown):
            collect(world.site, run, shard)
        later = replace(world.site, now=lambda: datetime.now(UTC) + LOST_AFTER + timedelta(seconds=1))
        if lost:
            assert collect(later, run, shard) is None
            assert world.site.ledger.attempts(shard)[0].ended.how == "lost"
            assert drive(world.site, run, ask=lambda run, planned: True).outcomes["succeeded"] == 4
        else:
            with pytest.raises(BatchLost, match=r"policy\.retry\.lost"):
                collect(later, run, shard)
            assert world.site.ledger.attempts(shard)[0].ended is None
    assert world.rehearsal.bill()["batches"] == 3


def test_F46_one_look_that_does_not_find_the_batch_is_forgotten_once_another_does(world):
    run, draft = planned(world, world.job(), world.write("a.jsonl", reviews(4)), "r")
    [shard] = approve(world.site, run, draft, ask=lambda: True).shards
    world.rehearsal.pace(validating=0.0, running=60.0)
    submit(world.site, run, shard)
    world.rehearsal.faults(poll_404=1)
    with pytest.raises(BatchUnknown):
        collect(world.site, run, shard)
    assert world.site.ledger.attempts(shard)[0].unknown
    with pytest.raises(BatchUnfinished, match="is still"):
        collect(world.site, run, shard)
    assert world.site.ledger.attempts(shard)[0].unknown is None


def test_F24_a_shard_that_no_queue_can_hold_is_sent_in_parts(world, monkeypatch):
    monkeypatch.setattr("nightshift.stores.ledger.QUEUE_PAUSE", timedelta(seconds=0.2))
    run, draft = planned(world, world.job(), world.write("a.jsonl", reviews(40)), "r")
    world.rehearsal.faults(enqueued_token_limit=draft.estimate.input_tokens // 3)
    summary = drive(world.site, run, ask=lambda run, planned: True)
    assert summary.outcomes["succeeded"] == 40
    assert world.rehearsal.bill()["requests"] == 40
    [shard] = draft.shards
    sizes = [attempt.claim.asked for attempt in world.site.ledger.attempts(shard) if attempt.is_harvested]
    assert len(sizes) >= 3
    assert sum(sizes) == 40


# ---- redrive


def test_a_redrive_drives_the_named_failures_and_publishes_the_partition_anew(world):
    world.rehearsal.faults(invalid=0.3, refused=0.1)
    job = world.job(policy={"retry": {"invalid": 0}})
    first = go(world, job, world.write("a.jsonl", [*reviews(60), *[{**row, "id": f"dup-{row['id']}"} for row in reviews(10)]]))
    world.rehearsal.faults()
    before = world.rehearsal.bill()["requests"]
    second = again(world, first, "invalid")
    assert second.redrive_of == first.run
    assert (second.rows, second.requests.unique, second.requests.duplicates) == (70, 60, 10)
    assert second.requests.submitted == second.paid == world.rehearsal.bill()["requests"] - before > 0
    assert second.outcomes["invalid"] == 0
    assert second.outcomes["refused"] == first.outcomes["refused"] > 0
    assert second.outcomes["succeeded"] == first.outcomes["succeeded"] + first.outcomes["invalid"]
    assert second.results == first.results
    assert second.partition == first.partition


def test_a_redrive_of_a_redrive_and_of_everything_that_failed(world):
    world.rehearsal.faults(invalid=0.5, refused=0.2, errored=0.2)
    first = go(world, world.job(policy={"retry": {"invalid": 0, "errored": 0}, "publish_at_least": 0}), world.write("a.jsonl", reviews(50)))
    second = again(world, first)
    world.rehearsal.faults()
    third = again(world, second)
    assert first.outcomes["succeeded"] < second.outcomes["succeeded"] < third.outcomes["succeeded"] == 50


def test_a_redrive_that_is_repeated_after_a_crash_buys_nothing_twice(world):
    world.rehearsal.faults(invalid=1.0)
    first = go(world, world.job(policy={"retry": {"invalid": 0}, "publish_at_least": 0}), world.write("a.jsonl", reviews(6)))
    world.rehearsal.faults()
    for _ in range(2):
        begun = begin_again(world.site, first.run, ("invalid",), policy=lambda job: None)
        [shard] = approve(world.site, begun, plan(world.site, begun), ask=lambda: True).shards
        submit(world.site, begun, shard)
    assert again(world, first, "invalid").outcomes["succeeded"] == 6
    assert world.rehearsal.bill()["requests"] == 12


def test_a_redrive_follows_the_policy_of_today(world):
    world.rehearsal.faults(truncated=1.0)
    first = go(world, world.job(policy={"publish_at_least": 0}), world.write("a.jsonl", reviews(2)))
    world.rehearsal.faults()
    policy = world.job(policy={"retry": {"truncated": {"times": 1, "token_factor": 8, "model": "gpt-5.4-mini"}}}).spec.policy
    second = again(world, first, "truncated", policy=policy)
    assert second.outcomes["succeeded"] == 2
    assert [(body["model"], body["max_completion_tokens"]) for body in sent_bodies(world)[2:]] == [("gpt-5.4-mini", 800)] * 2
    assert [second.cost_usd.actual] == [round(line["usd"], 6) for line in world.rehearsal.bill()["by_batch"] if "mini" in line["model"]]


def test_a_redrive_keeps_what_a_stand_in_has_answered_that_today_is_not_asked_any_more(world):
    world.rehearsal.faults(refused=0.5)
    job = world.job(policy={"retry": {"refused": {"times": 1, "model": "gpt-5.4-mini"}}, "publish_at_least": 0})
    first = go(world, job, world.write("a.jsonl", reviews(40)))
    by_stand_in = {row["id"] for row in answers_of(world, first) if "mini" in row["model"]}
    assert by_stand_in
    assert first.outcomes["refused"]
    world.rehearsal.faults()
    without = world.job(policy={"retry": {"refused": 0}}).spec.policy
    second = again(world, first, "refused", policy=without)
    assert second.paid == first.outcomes["refused"]
    assert {row["id"] for row in answers_of(world, second) if "mini" in row["model"]} == by_stand_in
    assert second.outcomes["succeeded"] == 40


def test_a_redrive_of_nothing_and_of_nobody_is_told(world):
    first = go(world, world.job(), world.write("a.jsonl", reviews(3)))
    with pytest.raises(InputMissing, match="none of its rows ended as invalid"):
        again(world, first, "invalid")
    assert [run.input.run for run in latest(world.site.store, "reviews", 9)] == [first.run], "a redrive of nothing leaves no run"
    with pytest.raises(InputMissing, match="no run is called 0000000000000000"):
        begin_again(world.site, "0" * 16, RETRYABLE, policy=lambda job: None)
    with pytest.raises(SettingInvalid, match="did you mean 'invalid'"):
        redriven(["invalide"])


def test_two_redrives_of_one_run_at_once_pay_once_for_the_common_rows(tmp_path, rehearsal):
    world = make_world(tmp_path, rehearsal)
    rehearsal.faults(invalid=0.6, refused=0.5)
    job = world.job(policy={"retry": {"invalid": 0}, "publish_at_least": 0})
    first = go(world, job, world.write("a.jsonl", reviews(30)))
    rehearsal.faults()
    before = rehearsal.bill()["requests"]
    runs = [begin_again(world.site, first.run, outcomes, policy=lambda job: None) for outcomes in (("invalid",), ("invalid", "refused"))]
    drafts = [plan(world.site, run) for run in runs]
    one, two = (approve(world.site, run, draft, ask=lambda: True) for run, draft in zip(runs, drafts, strict=True))
    assert two.adopted == one.submitted == first.outcomes["invalid"]
    done = [drive(world.site, run, ask=lambda run, planned: True) for run in reversed(runs)]
    assert done[0].outcomes["succeeded"] == 30
    assert rehearsal.bill()["requests"] - before == first.outcomes["invalid"] + first.outcomes["refused"]


def test_a_redrive_that_is_ordered_again_drives_only_what_still_fails(world):
    """And never takes back what succeeded meanwhile."""
    world.rehearsal.faults(invalid=0.5)
    first = go(world, world.job(policy={"retry": {"invalid": 0}, "publish_at_least": 0}), world.write("a.jsonl", reviews(30)))
    world.rehearsal.faults()
    assert again(world, first, "invalid").outcomes["succeeded"] == 30
    world.rehearsal.faults(invalid=1.0)
    before = world.rehearsal.bill()["requests"]
    third = again(world, first, "invalid")
    assert (third.outcomes["succeeded"], third.requests.submitted, world.rehearsal.bill()["requests"]) == (30, 0, before)


def test_a_redrive_that_was_approved_late_buys_nothing_that_was_mended_meanwhile(world):
    world.rehearsal.faults(invalid=1.0)
    first = go(world, world.job(policy={"retry": {"invalid": 0}, "publish_at_least": 0}), world.write("a.jsonl", reviews(10)))
    world.rehearsal.faults()
    one, two = (begin_again(world.site, first.run, each, policy=lambda job: None) for each in (("invalid",), ("invalid", "refused")))
    plan(world.site, two)
    drive(world.site, one, ask=lambda run, planned: True)
    before = world.rehearsal.bill()["requests"]
    assert drive(world.site, two, ask=lambda run, planned: True).outcomes["succeeded"] == 10
    assert world.rehearsal.bill()["requests"] == before


def test_a_redrive_stopped_by_its_budget_goes_on_with_a_larger_one(world):
    world.rehearsal.faults(invalid=1.0)
    first = go(world, world.job(policy={"retry": {"invalid": 0}, "publish_at_least": 0}), world.write("a.jsonl", reviews(10)))
    world.rehearsal.faults()
    with pytest.raises(BudgetExceeded):
        again(world, first, "invalid", policy=world.job(policy={"budget_usd": 0.0000001}).spec.policy)
    assert again(world, first, "invalid", policy=world.job(policy={"budget_usd": 10}).spec.policy).outcomes["succeeded"] == 10


def test_a_redrive_is_estimated_as_it_is_asked(world):
    world.rehearsal.faults(refused=1.0)
    first = go(world, world.job(policy={"publish_at_least": 0}), world.write("a.jsonl", reviews(20)))
    world.rehearsal.faults()
    dearer = {"retry": {"refused": {"times": 1, "model": "gpt-5.4"}}, "budget_usd": float(first.cost_usd.estimated) * 1.1}
    with pytest.raises(BudgetExceeded):
        again(world, first, "refused", policy=world.job(policy=dearer).spec.policy)
    assert world.rehearsal.bill()["requests"] == 20


def test_a_redrive_whose_answers_are_not_all_kept_is_told_before_it_pays(world):
    world.rehearsal.faults(invalid=0.5)
    first = go(world, world.job(policy={"retry": {"invalid": 0}, "publish_at_least": 0}), world.write("a.jsonl", reviews(20)))
    world.rehearsal.faults()
    forget(world.site, "reviews", ["r1"])
    with pytest.raises(InputMissing, match="not all of its answers are kept"):
        again(world, first, "invalid")
    assert world.rehearsal.bill()["requests"] == 20


def test_each_shard_of_a_redrive_knows_what_became_of_its_own_requests(world):
    world.rehearsal.faults(invalid=0.6)
    small = {"retry": {"invalid": 0}, "publish_at_least": 0, "max_requests_per_shard": 40}
    first = go(world, world.job(policy=small), world.write("a.jsonl", reviews(100)))
    world.rehearsal.faults()
    policy = world.job(policy={**small, "max_requests_per_shard": 25, "retry": {"invalid": 1}}).spec.policy
    second = again(world, first, "invalid", policy=policy)
    assert second.outcomes["succeeded"] == 100
    [redrive] = [run for run in latest(world.site.store, "reviews", 9) if run.input.redrive]
    shards = approved_plan(redrive).own_shards
    seeds = [set(read_answers(world.site.store, shard, 0, ["request_key"]).column("request_key").to_pylist()) for shard in shards]
    assert seeds == [set(request_keys(world.site.store, shard)) for shard in shards]
    assert (sum(map(len, seeds)), len(seeds)) == (first.outcomes["invalid"], -(-first.outcomes["invalid"] // 25))


def test_what_one_redrive_has_mended_another_one_does_not_take_back(world):
    world.rehearsal.faults(refused=0.3, invalid=0.4)
    first = go(world, world.job(policy={"publish_at_least": 0, "retry": {"invalid": 0}}), world.write("a.jsonl", reviews(40)))
    world.rehearsal.faults()
    second = again(world, first, "refused")
    assert second.outcomes["succeeded"] == first.outcomes["succeeded"] + first.outcomes["refused"]
    assert again(world, first, "invalid").outcomes["succeeded"] == 40


@pytest.mark.parametrize("order", [("0", "f"), ("f", "0")], ids=["the failures first", "the successes first"])
def test_a_later_run_takes_what_a_redrive_has_mended_wherever_it_stands(world, order):
    world.rehearsal.faults(invalid=0.5)
    job, store = world.job(policy={"publish_at_least": 0, "retry": {"invalid": 0}}), world.site.store
    first = go(world, job, world.write("a.jsonl", reviews(20)))
    [failures] = answers_in(world)
    world.rehearsal.faults()
    again(world, first, "invalid")
    [successes] = answers_in(world) - {failures}
    for key, mark in zip((failures, successes), order, strict=True):
        store.copy(key, f"{key.rpartition('/')[0]}/{mark * 64}.parquet")
    store.delete([failures, successes])
    third = go(world, job, world.write("b.jsonl", reviews(21)))
    assert (third.outcomes["succeeded"], third.requests.reused, third.paid) == (21, 20, 1)


# ---- adopted shards


def test_an_adopter_does_not_pay_for_what_its_own_budget_does_not_allow(world):
    """A run reserves 200 requests and never sends them; another one shares a single row, and may spend next to nothing."""
    abandoned, draft = planned(world, world.job(), world.write("a.jsonl", reviews(200)), "abandoned")
    approve(world.site, abandoned, draft, ask=lambda: True)
    run, small = planned(world, world.job(policy={"budget_usd": 0.0001}), world.write("b.jsonl", reviews(1)), "small")
    [shard] = approve(world.site, run, small, ask=lambda: True).shards
    with pytest.raises(ShardHeld, match="the run that has reserved it"):
        submit(world.site, run, shard)
    assert list(pauses(world.site, run, shard)) == [60.0]
    with pytest.raises(BudgetExceeded):
        submit(later(world, hours=7), run, shard)
    assert world.rehearsal.bill()["batches"] == 0
    submit(world.site, abandoned, shard)
    assert drive(world.site, run, ask=lambda run, planned: False).outcomes["succeeded"] == 1


def test_an_adopter_does_not_ask_again_what_its_own_budget_does_not_allow(world):
    """The run that has reserved 200 requests dies with its first answers harvested: what they leave is its to ask."""
    world.rehearsal.faults(errored=0.9)
    dying, draft = planned(world, world.job(), world.write("a.jsonl", reviews(200)), "dying")
    approve(world.site, dying, draft, ask=lambda: True)
    run, small = planned(world, world.job(policy={"budget_usd": 0.0001}), world.write("b.jsonl", reviews(1)), "small")
    [shard] = approve(world.site, run, small, ask=lambda: True).shards
    submit(world.site, dying, shard)
    for pause in pauses(world.site, run, shard):
        time.sleep(pause)
    assert collect(world.site, run, shard) is None, "some are asked again"
    world.rehearsal.faults()
    with pytest.raises(ShardHeld, match="the run that has reserved it"):
        submit(world.site, run, shard)
    assert list(pauses(world.site, run, shard)) == [60.0], "and is not looked at all the time"
    assert world.rehearsal.bill()["batches"] == 1
    submit(world.site, dying, shard)
    assert drive(world.site, run, ask=lambda run, planned: False).outcomes["succeeded"] == 1


def test_an_adopters_budget_counts_what_it_asks_again_for_another_run(world):
    """It may ask, by what it has been approved for; its month has nothing left by then."""
    world.rehearsal.faults(errored=0.9)
    dying, draft = planned(world, world.job(), world.write("a.jsonl", reviews(200)), "dying")
    approve(world.site, dying, draft, ask=lambda: True)
    run, small = planned(world, world.job(policy={"monthly_budget_usd": 0.0001}), world.write("b.jsonl", reviews(1)), "small")
    [shard] = approve(world.site, run, small, ask=lambda: True).shards
    submit(world.site, dying, shard)
    for pause in pauses(world.site, run, shard):
        time.sleep(pause)
    collect(world.site, run, shard)
    with pytest.raises(BudgetExceeded, match=r"policy\.monthly_budget_usd"):
        submit(world.site, run, shard)
    assert world.rehearsal.bill()["batches"] == 1


def test_an_adopter_with_room_in_its_budget_sends_what_nobody_has_sent(world):
    abandoned, draft = planned(world, world.job(), world.write("a.jsonl", reviews(20)), "abandoned")
    approve(world.site, abandoned, draft, ask=lambda: True)
    summary = go(world, world.job(policy={"budget_usd": 10}), world.write("b.jsonl", reviews(3)))
    assert (summary.requests.adopted, summary.paid, summary.outcomes["succeeded"]) == (3, 20, 3)
    assert (summary.taken_over, summary.cost_usd.saved) == (3, 0), "what a run has sent itself is not saved"


def test_what_the_run_that_reserved_it_has_sent_is_saved(world):
    uri = world.write("a.jsonl", reviews(20))
    owner, draft = planned(world, world.job(), uri, "owner")
    [shard] = approve(world.site, owner, draft, ask=lambda: True).shards
    adopter, drafted = planned(world, world.job(), uri, "adopter")
    submit(world.site, owner, shard)
    summary = drive(world.site, adopter, ask=lambda run, planned: True)
    assert (summary.requests.adopted, summary.taken_over, summary.paid) == (20, 0, 0)
    assert summary.cost_usd.saved == pytest.approx(float(drafted.saved_usd))
    assert drafted.saved_usd > 0


def test_an_adopters_deadline_and_retries_are_not_those_of_the_run_that_pays(world):
    world.rehearsal.pace(validating=0.0, running=3600.0, finalizing=0.0, cancelling=0.05)
    uri = world.write("a.jsonl", reviews(10))
    payer, draft = planned(world, world.job(policy={"deadline_hours": 26}), uri, "payer")
    [shard] = approve(world.site, payer, draft, ask=lambda: True).shards
    submit(world.site, payer, shard)
    adopter, other = planned(world, world.job(policy={"deadline_hours": 1, "retry": {"cancelled": 0}}), uri, "adopter")
    assert approve(world.site, adopter, other, ask=lambda: True).adopted == 10
    two_hours_on = later(world, hours=2)
    looks = pauses(two_hours_on, adopter, shard)
    next(looks)
    [attempt] = world.site.ledger.attempts(shard)
    assert world.rehearsal.provider().poll(attempt.receipt.batch_id).status == "in_progress"
    world.rehearsal.provider().cancel(attempt.receipt.batch_id)  # by a person
    for pause in looks:
        time.sleep(min(pause, 0.05))
    assert collect(two_hours_on, adopter, shard) is None, "the payer asks cancelled requests again"


def test_who_harvests_first_has_decided_and_the_second_one_changes_nothing(world, monkeypatch):
    """Owner and adopter see the end together, with different retries."""
    world.rehearsal.faults(errored=0.5)
    uri = world.write("a.jsonl", reviews(20))
    run, draft = planned(world, world.job(policy={"retry": {"errored": 2}}), uri, "a")
    [shard] = approve(world.site, run, draft, ask=lambda: True).shards
    submit(world.site, run, shard)
    for pause in pauses(world.site, run, shard):
        time.sleep(pause)
    store = type(world.site.store)
    create, met = store.create, []

    def slower(self, key, data):
        if key.endswith("answers-1.parquet") and not met:
            met.append(key)
            collect(world.site, run, shard)
        return create(self, key, data)

    monkeypatch.setattr(store, "create", slower)
    collect(world.site, run, shard)
    [attempt] = world.site.ledger.attempts(shard)
    assert attempt.ended.remaining == len(pending(world.site.store, shard, (1,))) > 0
    world.rehearsal.faults()
    assert drive(world.site, run, ask=lambda run, planned: True).outcomes["succeeded"] == 20


def test_what_another_run_settled_with_failures_meanwhile_is_asked_anew(world):
    job, uri = world.job(policy={"retry": {"errored": 0}, "publish_at_least": 0}), world.write("a.jsonl", reviews(8))
    run, _ = planned(world, job, uri, "slow")
    world.rehearsal.faults(errored=1.0)
    go(world, job, uri)
    world.rehearsal.faults()
    summary = drive(world.site, run, ask=lambda run, planned: True)
    assert (summary.paid, summary.outcomes["succeeded"]) == (8, 8)


def test_a_reservation_number_is_never_taken_by_who_has_not_read_its_successor(world, monkeypatch):
    """While a slow run reads the log, another one reserves the same rows, and a third one clears up."""
    job = world.job(policy={"max_requests_per_shard": 10})
    for name in ("c", "d"):
        go(world, job, world.write(f"{name}.jsonl", reviews(60)[50:] if name == "c" else reviews(80)[70:]))
    slow, draft = planned(world, job, world.write("a.jsonl", reviews(20)), "slow")
    store = type(world.site.store)
    get_shape, met = store.get_shape, []

    def slower(self, key, shape):
        if shape is Reservation and not met:
            met.append(key)
            other, drafted = planned(world, job, world.write("o.jsonl", reviews(25)[5:]), "other")
            approve(world.site, other, drafted, ask=lambda: True)
            planned(world, job, world.write("e.jsonl", reviews(70)[69:]), "third")
        return get_shape(self, key, shape)

    world.site.store.create_shape(f"answers/{draft.fingerprint}/reserved/00000003.json", Reservation(run="memory://gone", plan=draft))
    monkeypatch.setattr(store, "get_shape", slower)
    approved = approve(world.site, slow, draft, ask=lambda: True)
    monkeypatch.setattr(store, "get_shape", get_shape)
    assert met
    other = approved_plan(load_run(world.site.store, world.site.store.uri_of("runs/reviews/other")))
    assert not set(approved.own_shards) & set(other.own_shards)
    assert approved.submitted + approved.adopted == 20


def test_a_redrive_whose_requests_are_not_all_kept_is_told_before_it_pays(world):
    world.rehearsal.faults(invalid=1.0)
    first = go(world, world.job(policy={"retry": {"invalid": 0}, "publish_at_least": 0}), world.write("a.jsonl", reviews(5)))
    world.rehearsal.faults()
    [key] = [found.key for found in world.site.store.scan("shards") if found.key.endswith("requests.jsonl")]
    world.site.store.put(key, b"".join(world.site.store.get(key).splitlines(keepends=True)[:-1]))
    with pytest.raises(InputMissing, match="no longer holds all of its requests"):
        again(world, first, "invalid")
    assert world.rehearsal.bill()["requests"] == 5


def test_a_redrive_that_is_revised_is_still_estimated_as_it_is_asked(world):
    world.rehearsal.faults(refused=1.0)
    first = go(world, world.job(policy={"publish_at_least": 0}), world.write("a.jsonl", reviews(20)))
    world.rehearsal.faults()
    dearer = world.job(policy={"retry": {"refused": {"times": 1, "model": "gpt-5.4"}}}).spec.policy
    run = begin_again(world.site, first.run, ("refused",), policy=lambda job: dearer)
    drafted = plan(world.site, run)
    go(world, world.job(), world.write("b.jsonl", reviews(30)[25:]))  # something new is known: the plan is looked at again
    approved = approve(world.site, run, drafted, ask=lambda: True)
    assert approved.estimate == drafted.estimate


def test_texts_that_are_shown_again_are_held_as_they_are_read_and_others_are_not(world):
    world.rehearsal.faults(invalid=1.0)
    run = begin(
        world.site,
        world.job(policy={"retry": {"invalid": {"times": 1, "repair": True}}}),
        pattern=world.write("a.jsonl", reviews(3)),
        dates={},
        scheduled=False,
    )
    approved = approve(world.site, run, plan(world.site, run), ask=lambda: True)
    [shard] = approved.shards
    submit(world.site, run, shard)
    for pause in pauses(world.site, run, shard):
        time.sleep(pause)
    assert collect(world.site, run, shard) is None
    held: list[str | None] = []
    shown = pending(world.site.store, shard, (1,), lambda text: held.append(text) or "there")
    assert [left.text for left in shown.values()] == ["there"] * 3
    assert all(held)
    assert [left.text for left in pending(world.site.store, shard, (1,)).values()] == [None] * 3
