"""The provider `live` against the rehearsal's endpoints on demand: real HTTP, real overload, a real kill."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import reduce
from pathlib import Path

import httpx2
import pyarrow.parquet as pq
import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from nightshift.drive import drive
from nightshift.errors import AccessDenied, ModelNotFound, ProviderUnavailable, StoreUnavailable
from nightshift.providers.live import MOST_AT_ONCE, LiveServer, OpenAIApi
from nightshift.providers.openai import OpenAIAccess, OpenAIBatches
from nightshift.providers.window import Window
from nightshift.steps.approve import approve
from nightshift.steps.collect import collect
from nightshift.steps.discover import discover
from nightshift.steps.plan import plan
from nightshift.steps.submit import submit
from nightshift.steps.wait import pauses
from nightshift.stores.ledger import LEASE
from nightshift.stores.objects import Objects, open_objects
from tests.conftest import World, go, order, reviews
from tests.test_cli import environment, file_of, interruptible

LIVE = {"provider": "live"}


def live_server(objects: Objects, access: OpenAIAccess) -> LiveServer:
    return LiveServer("/v1/chat/completions", objects, OpenAIApi("/v1/chat/completions", access))


@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/v1/responses"])
def test_an_unchanged_job_goes_the_whole_way_on_demand(world, endpoint):
    job = world.job(request={**LIVE, "endpoint": endpoint})
    summary = go(world, job, world.write("a.jsonl", [*reviews(50), {"id": "again", "text": reviews(1)[0]["text"]}]))
    bill = world.rehearsal.bill()
    assert (summary.state, summary.outcomes["succeeded"], summary.requests.duplicates) == ("published", 51, 1)
    assert (bill["requests"], bill["unique_requests"], bill["batches"]) == (50, 50, 0)
    assert summary.cost_usd.actual == pytest.approx(bill["usd"], abs=2e-6)
    assert {line["tier"] for line in bill["by_batch"]} == {"standard"}
    assert go(world, job, world.write("a.jsonl", reviews(50))).requests.submitted == 0


def test_answers_of_a_batch_are_not_those_of_another_provider(world):
    uri = world.write("a.jsonl", reviews(5))
    go(world, world.job(), uri)
    assert go(world, world.job(request=LIVE), uri).requests.submitted == 5


def test_F99_an_overloaded_server_is_asked_as_much_as_it_takes(world):
    world.rehearsal.faults(live_capacity=6, live_seconds=0.02)
    summary = go(world, world.job(request=LIVE), world.write("a.jsonl", reviews(200)))
    assert summary.outcomes["succeeded"] == 200
    assert world.rehearsal.bill()["requests"] == 200


def test_many_requests_are_under_way_at_once_where_the_server_keeps_up(world):
    world.rehearsal.faults(live_seconds=0.1)
    go(world, world.job(request=LIVE), world.write("a.jsonl", reviews(300)))
    assert httpx2.get(f"{world.rehearsal.url}/rehearsal/load").json()["most_running"] > 12


def test_F98_F101_a_server_that_stumbles_is_asked_again(world):
    world.rehearsal.faults(live_429=2, live_500=2, live_html=2)
    summary = go(world, world.job(request=LIVE), world.write("a.jsonl", reviews(30)))
    assert (summary.outcomes["succeeded"], world.rehearsal.bill()["requests"]) == (30, 30)


def test_F100_an_answer_that_was_lost_after_it_was_made_is_asked_for_once_more(world):
    world.rehearsal.faults(live_cut=1)
    summary = go(world, world.job(request=LIVE), world.write("a.jsonl", reviews(10)))
    assert (summary.outcomes["succeeded"], world.rehearsal.bill()["requests"]) == (10, 11)


def test_what_fails_on_demand_is_an_outcome_of_its_row_and_asked_again_by_policy(world, monkeypatch):
    monkeypatch.setattr(
        "nightshift.rehearsal.model.answer",
        lambda text, schema: "no JSON" if "number 3 " in text else '{"sentiment":"neutral","confidence":0.5}',
    )
    summary = go(world, world.job(request=LIVE), world.write("a.jsonl", reviews(10)))
    assert (summary.outcomes["succeeded"], summary.outcomes["invalid"], summary.paid) == (9, 1, 11)


def test_F102_a_wrong_key_and_an_unknown_model_are_told_before_anything_is_read(world):
    uri = world.write("a.jsonl", reviews(2))
    wrong = live_server(world.site.store, world.rehearsal.access(key="sk-wrong-key"))
    with pytest.raises(AccessDenied, match="OPENAI_API_KEY"):
        go(world, world.job(request=LIVE), uri, open_provider=lambda request: wrong)
    with pytest.raises(ModelNotFound, match=r"which serves gpt-5\.4-nano"):
        go(world, world.job(request={**LIVE, "model": "llama-9"}), uri)


def test_F101_a_server_that_answers_html_is_told(httpserver: HTTPServer, tmp_path):
    httpserver.expect_request("/v1/models").respond_with_data("<html>proxy</html>", content_type="text/html")
    httpserver.expect_request("/v1/chat/completions").respond_with_data("<html>proxy</html>", content_type="text/html")
    access = OpenAIAccess(base_url=httpserver.url_for("/v1"), api_key="x")
    server = live_server(open_objects(f"file://{tmp_path}"), access)
    lines = tmp_path / "lines"
    lines.write_bytes(b"".join(server.form.line(f"{i:064x}", b"{}") + b"\n" for i in range(40)))
    with pytest.raises(ProviderUnavailable, match="not the API"):
        server.create(order(str(lines)), lambda: True)


def answering(httpserver: HTTPServer, tmp_path: Path, refused: Callable[[int], int | None], count: int = 10) -> tuple[LiveServer, Path]:
    """A server that answers by the number in a request: with the HTTP status that `refused` names, else well; and a file of requests."""

    def answer(request: Request) -> Response:
        status = refused(int(request.json["n"]))
        if status:
            return Response(json.dumps({"error": {"message": "flagged"}}), status)
        return Response(json.dumps({"choices": [{"message": {"content": "ok"}, "finish_reason": "stop"}]}), 200)

    httpserver.expect_request("/v1/chat/completions").respond_with_handler(answer)
    server = live_server(open_objects(f"file://{tmp_path}/store"), OpenAIAccess(base_url=httpserver.url_for("/v1"), api_key="x"))
    lines = tmp_path / "lines"
    lines.write_bytes(b"".join(server.form.line(f"{i:064x}", b'{"n": %d}' % i) + b"\n" for i in range(count)))
    return server, lines


def outcomes(server: LiveServer, lines: Path) -> dict[int, str]:
    receipt = server.create(order(str(lines)), lambda: True)
    return {int(reply.custom_id, 16): reply.outcome for reply in server.replies(server.poll(receipt.batch_id), lines.parent)}


def test_a_request_that_is_forbidden_is_an_error_of_its_own_where_others_are_answered(httpserver, tmp_path):
    server, lines = answering(httpserver, tmp_path, lambda number: 403 if number in (0, 7) else None)
    found = outcomes(server, lines)
    assert sorted(number for number in found if found[number] == "errored") == [0, 7]
    assert Counter(found.values()) == {"succeeded": 8, "errored": 2}


def test_where_everybody_is_forbidden_few_are_asked(httpserver, tmp_path):
    server, lines = answering(httpserver, tmp_path, lambda number: 403, count=200)
    with pytest.raises(AccessDenied, match="flagged"):
        server.create(order(str(lines)), lambda: True)
    assert len(httpserver.log) <= 30


def test_a_request_that_the_server_always_calls_too_much_holds_up_no_run_for_ever(httpserver, tmp_path, monkeypatch):
    monkeypatch.setattr("nightshift.providers.live.PATIENCE_SECONDS", 2.0)
    server, lines = answering(httpserver, tmp_path, lambda number: 503 if number == 3 else None)
    receipt = server.create(order(str(lines)), lambda: True)
    replies = {int(reply.custom_id, 16): reply for reply in server.replies(server.poll(receipt.batch_id), tmp_path)}
    assert Counter(reply.outcome for reply in replies.values()) == {"succeeded": 9, "errored": 1}
    assert (replies[3].retryable, "has answered others: flagged" in replies[3].reason) == (False, True)


def test_a_server_that_answers_nobody_is_down(httpserver, tmp_path, monkeypatch):
    monkeypatch.setattr("nightshift.providers.live.PATIENCE_SECONDS", 1.0)
    server, lines = answering(httpserver, tmp_path, lambda number: 503)
    with pytest.raises(ProviderUnavailable, match="nobody is answered any more"):
        server.create(order(str(lines)), lambda: True)


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_F99_a_server_is_left_alone_until_when_it_says(httpserver, tmp_path, form):
    asked: list[float] = []
    until = time.time() + 3.0
    says = "3" if form == "seconds" else format_datetime(datetime.fromtimestamp(until, UTC), usegmt=True)

    def answer(request: Request) -> Response:
        asked.append(time.time())
        if time.time() < until - 1.5:
            return Response('{"error": {"message": "slow"}}', 429, {"Retry-After": says})
        return Response('{"choices": [{"message": {"content": "ok"}}]}')

    httpserver.expect_request("/v1/chat/completions").respond_with_handler(answer)
    server = live_server(open_objects(f"file://{tmp_path}/store"), OpenAIAccess(base_url=httpserver.url_for("/v1"), api_key="x"))
    lines = tmp_path / "lines"
    lines.write_bytes(server.form.line(f"{0:064x}", b"{}") + b"\n")
    assert set(outcomes(server, lines).values()) == {"succeeded"}
    assert len(asked) == 2


def stopped_in_the_middle(world: World, rows: int, sign: signal.Signals) -> tuple[list[str], int, str]:
    """A run that gets a signal once a tenth of its rows is paid for: (its command, its exit code, what it told)."""
    world.rehearsal.faults(live_seconds=0.2)
    uri, store = world.write("a.jsonl", reviews(rows)), f"file://{world.folder}/store"
    command = [sys.executable, "-m", "nightshift.cli", "run", file_of(world, request=LIVE), "--input", uri, "--store", store, "--json"]
    process = interruptible(command, environment(world.rehearsal))
    deadline = time.monotonic() + 60
    while world.rehearsal.bill()["requests"] < rows / 10 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(sign)
    _, told = process.communicate(timeout=30)
    return command, process.returncode, told


def test_F98_a_killed_process_repeats_no_more_than_what_was_in_flight(world):
    """kill -9 in the middle; the next process goes on from the answers that are in the store, and repeats what had a slot and no more."""
    _, code, _ = stopped_in_the_middle(world, 400, signal.SIGKILL)
    assert code == -signal.SIGKILL
    time.sleep(0.5)  # what was in flight is answered to nobody
    paid = world.rehearsal.bill()["requests"]
    assert 40 <= paid < 400
    kept = sum(len(world.site.store.get(found.key).splitlines()) for found in world.site.store.scan("live"))
    assert paid - kept <= widest(after=paid).slots
    summary = go(world, world.job(request=LIVE), f"file://{world.folder}/input/a.jsonl", now=lambda: datetime.now(UTC) + 2 * LEASE)
    assert summary.outcomes["succeeded"] == 400
    assert world.rehearsal.bill()["requests"] == 400 + paid - kept


def widest(*, after: int) -> Window:
    """The window of a client that so many requests were answered without one being slow."""
    return reduce(lambda window, _: window.answered(0.2), range(after), Window(most=MOST_AT_ONCE))


def test_ctrl_c_ends_a_long_shard_at_once_and_the_same_command_goes_on(world):
    command, code, told = stopped_in_the_middle(world, 600, signal.SIGINT)
    assert (code, "goes on from here" in told) == (130, True), told
    assert world.rehearsal.bill()["requests"] < 600
    world.rehearsal.faults()
    done = subprocess.run(command, env=environment(world.rehearsal), capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout)["outcomes"]["succeeded"] == 600, done.stderr
    assert world.rehearsal.bill()["requests"] == 600


def test_a_store_that_does_not_take_the_answers_stops_the_work_and_it_goes_on_later(world, monkeypatch):
    """Not a shard that hangs with its lease renewed for ever."""
    store, met = type(world.site.store), []
    put = store.put

    def fails_once(self, key, data):
        if key.startswith("live/") and len(met) < 1:
            met.append(key)
            raise StoreUnavailable(key, "a bad moment")
        put(self, key, data)

    monkeypatch.setattr(store, "put", fails_once)
    monkeypatch.setattr("nightshift.drive.TRANSIENT_PAUSE_SECONDS", 0.05)
    summary = go(world, world.job(request=LIVE), world.write("a.jsonl", reviews(60)))
    assert summary.outcomes["succeeded"] == 60
    assert met


def test_F99_a_rate_limit_that_lasts_is_waited_out_and_costs_no_request_a_try(world):
    world.rehearsal.faults(live_429=150)
    summary = go(world, world.job(request=LIVE), world.write("a.jsonl", reviews(40)))
    assert (summary.outcomes["succeeded"], world.rehearsal.bill()["requests"]) == (40, 40)


def test_a_quick_no_does_not_slow_the_others_down():
    window = Window(most=64).answered(0.2)
    for _ in range(4000):
        window = window.answered(0.2 * random.uniform(0.9, 1.3))
    assert window.slots == 64


def test_who_has_lost_the_claim_sends_nothing_more(world, tmp_path):
    world.rehearsal.faults(live_seconds=0.05)
    server = live_server(world.site.store, world.rehearsal.access())
    body = json.dumps({"model": "gpt-5.4-nano", "messages": [{"role": "user", "content": "Lovely."}]}).encode()
    lines = tmp_path / "lines"
    lines.write_bytes(b"".join(server.form.line(f"{i:064x}", body) + b"\n" for i in range(200)))
    looks = []

    def may_send() -> bool:
        looks.append(world.rehearsal.bill()["requests"])
        return len(looks) < 6

    with pytest.raises(ProviderUnavailable, match="no longer ours"):
        server.create(order(str(lines)), may_send)
    in_flight = httpx2.get(f"{world.rehearsal.url}/rehearsal/load").json()["most_running"]
    assert world.rehearsal.bill()["requests"] <= looks[-1] + in_flight
    kept = sum(len(world.site.store.get(found.key).splitlines()) for found in world.site.store.scan("live/w"))
    assert kept == world.rehearsal.bill()["requests"], "what was in flight is kept, because it is paid for"


def test_the_same_place_is_found_as_for_batches(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://gateway:9/v1/")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-from-the-environment")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj_a")
    live = live_server(open_objects(f"file://{tmp_path}"), OpenAIAccess())
    assert live.where == OpenAIBatches("/v1/chat/completions").where == "http://gateway:9/v1"
    url, headers = live.api.call("m", "an-id", b"{}")
    assert url == "http://gateway:9/v1/chat/completions"
    assert (headers["Authorization"], headers["OpenAI-Project"]) == ("Bearer sk-from-the-environment", "proj_a")


def test_answers_as_they_came_are_gone_once_their_shard_is_settled(world):
    go(world, world.job(request=LIVE), world.write("a.jsonl", reviews(10)))
    assert list(world.site.store.scan("live")) == []


def test_two_receipts_for_the_same_work_are_paid_once_in_the_books(world):
    """A process freezes after its last answer, another one finds all of it answered, and then both write their receipts."""
    run = discover(world.site, world.job(request=LIVE), pattern=world.write("a.jsonl", reviews(8)), label="x", run="r", dates={})
    [shard] = approve(world.site, run, plan(world.site, run), ask=lambda: True).shards
    first = submit(world.site, run, shard)
    world.site.store.delete([f"shards/{shard}/receipt-1.json"])
    later = replace(world.site, now=lambda: datetime.now(UTC) + LEASE + timedelta(seconds=1))
    second = submit(later, run, shard)
    assert second.batch_id == first.batch_id
    world.site.ledger.record_receipt(shard, 1, first)
    summary = drive(later, run, ask=lambda run, planned: True)
    assert (summary.paid, world.rehearsal.bill()["requests"]) == (8, 8)


# ---- batches finished on demand


@pytest.mark.parametrize("ended", ["by the deadline", "by the provider"])
def test_what_a_batch_has_not_run_in_time_is_finished_on_demand(world, ended):
    """With the same parameters, one outcome per row, the tier in a column, and the bill split by tier."""
    job = world.job(policy={"on_demand": True, "deadline_hours": 1})
    run = discover(world.site, job, pattern=world.write("a.jsonl", reviews(60)), label="x", run="r", dates={})
    [shard] = approve(world.site, run, plan(world.site, run), ask=lambda: True).shards
    if ended == "by the deadline":
        world.rehearsal.pace(validating=0.0, running=3.0, finalizing=0.0, cancelling=0.05)
    else:
        world.rehearsal.faults(never_run=0.5)
    submit(world.site, run, shard)
    [attempt] = world.site.ledger.attempts(shard)
    if ended == "by the deadline":
        deadline = time.monotonic() + 20
        while world.rehearsal.provider().poll(attempt.receipt.batch_id).done < 10 and time.monotonic() < deadline:
            time.sleep(0.02)
    late = replace(world.site, now=lambda: datetime.now(UTC) + timedelta(hours=1, minutes=1)) if ended == "by the deadline" else world.site
    summary = drive(late, run, ask=lambda run, planned: True)
    bill = world.rehearsal.bill()
    assert (summary.outcomes["succeeded"], bill["requests"], bill["unique_requests"], bill["batches"]) == (60, 60, 60, 1)
    [part] = [found.key for found in world.site.store.scan("results") if found.key.endswith(".parquet")]
    tiers = Counter(pq.read_table(world.site.store.open(part)).column("_tier").to_pylist())
    billed = {"batch" if line["tier"] == "batch" else "on_demand": line for line in bill["by_batch"]}
    assert tiers == {tier: line["requests"] for tier, line in billed.items()}
    assert set(tiers) == {"batch", "on_demand"}
    assert summary.cost_usd.by_tier == pytest.approx({tier: line["usd"] for tier, line in billed.items()}, abs=1e-6)
    assert summary.cost_usd.actual == pytest.approx(sum(summary.cost_usd.by_tier.values()), abs=2e-6)


def test_on_demand_is_not_paid_for_where_the_budget_is_spent(world):
    world.rehearsal.faults(never_run=1.0)
    uri = world.write("a.jsonl", reviews(20))
    free = world.job(policy={"on_demand": False, "retry": {"expired": 0}, "publish_at_least": 0})
    estimate = go(world, free, uri).cost_usd.estimated
    job = world.job(policy={"on_demand": True, "budget_usd": estimate * 1.01, "publish_at_least": 0})
    summary = go(world, job, uri)
    assert 0 < summary.outcomes["succeeded"] < 20, "on demand costs twice as much as in a batch"
    assert summary.cost_usd.actual <= estimate * 1.01
    assert summary.outcomes["expired"] == 20 - summary.outcomes["succeeded"]


def test_a_batch_that_a_person_cancelled_is_not_bought_on_demand(world):
    world.rehearsal.pace(validating=0.0, running=30.0, finalizing=0.0, cancelling=0.05)
    job = world.job(policy={"on_demand": True, "deadline_hours": 100})
    run = discover(world.site, job, pattern=world.write("a.jsonl", reviews(20)), label="x", run="r", dates={})
    [shard] = approve(world.site, run, plan(world.site, run), ask=lambda: True).shards
    world.rehearsal.provider().cancel(submit(world.site, run, shard).batch_id)
    world.rehearsal.pace(validating=0.0, running=0.05, finalizing=0.0, cancelling=0.05)
    assert drive(world.site, run, ask=lambda run, planned: True).outcomes["succeeded"] == 20
    assert {line["tier"] for line in world.rehearsal.bill()["by_batch"]} == {"batch"}


def test_every_attempt_in_doubt_is_looked_up_where_it_was_sent(world):
    """A live attempt that died is in doubt for ever; a batch behind it that died as well is looked up all the same."""
    world.rehearsal.faults(never_run=0.5, invalid=0.3)
    job = world.job(policy={"on_demand": True, "retry": {"invalid": 3}})
    run = discover(world.site, job, pattern=world.write("a.jsonl", reviews(40)), label="x", run="r", dates={})
    [shard] = approve(world.site, run, plan(world.site, run), ask=lambda: True).shards
    submit(world.site, run, shard)
    for pause in pauses(world.site, run, shard):
        time.sleep(pause)
    assert collect(world.site, run, shard) is None
    world.rehearsal.faults()
    clock = replace(world.site, now=lambda: datetime.now(UTC) + ahead[0] * (LEASE + timedelta(seconds=1)))
    ahead, died = [0], []
    while True:  # each attempt dies between its create call and its receipt
        receipt = submit(clock, run, shard)
        [attempt] = [each for each in world.site.ledger.attempts(shard) if each.receipt == receipt]
        if attempt.claim.after not in died:
            died.append(attempt.claim.after)
            world.site.store.delete([f"shards/{shard}/receipt-{attempt.number}.json"])
            ahead[0] += 1
            continue
        for pause in pauses(clock, run, shard):
            time.sleep(min(pause, 0.05))
        if collect(clock, run, shard) is not None:
            break
    bill = world.rehearsal.bill()
    known = [attempt.receipt.batch_id for attempt in world.site.ledger.attempts(shard) if attempt.receipt]
    assert {line["batch_id"] for line in bill["by_batch"] if line["tier"] == "batch"} <= set(known)
    assert drive(clock, run, ask=lambda run, planned: True).paid == bill["requests"]
