"""submit against the rehearsal provider: whatever dies, races or lies in between, a shard is bought once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from nightshift.errors import AccessDenied, ProviderUnavailable, ShardHeld, SubmissionInDoubt, WrongPlace
from nightshift.providers.openai import OpenAIAccess, OpenAIBatches
from nightshift.runs import Site
from nightshift.steps.collect import collect
from nightshift.steps.discover import discover
from nightshift.steps.plan import plan
from nightshift.steps.submit import submit
from nightshift.stores.ledger import LEASE, Claim, Lease
from tests.conftest import order, reviews, serve


@pytest.fixture
def planned(world):
    """A run of one shard, planned and not sent: (site, run, shard)."""
    run = discover(world.site, world.job(), pattern=world.write("in.jsonl", reviews(5)), label="x", run="r1", dates={})
    [shard] = plan(world.site, run).shards
    return world.site, run, shard


def later(site: Site) -> Site:
    """The same site when every lease has lapsed."""
    return replace(site, now=lambda: datetime.now(UTC) + LEASE + timedelta(seconds=1), owner="a later worker")


def claim_and_die(world, run, shard: str, attempt: int) -> None:
    """A worker that claims an attempt and is never heard of again."""
    claim = Claim(
        token=world.site.ledger.token(shard, attempt), owner="the dead", claimed_at=datetime.now(UTC), where=f"{world.rehearsal.url}/v1",
        run=run.uri, provider="openai", model="gpt-5.4-nano", asked=5,
    )  # fmt: skip
    assert world.site.ledger.claim(shard, attempt, claim)


def batches(world) -> int:
    return world.rehearsal.bill()["batches"]


def test_submitting_again_attaches_to_the_same_batch(world, planned):
    site, run, shard = planned
    assert submit(site, run, shard) == submit(site, run, shard) == submit(later(site), run, shard)
    assert batches(world) == 1


def test_F36_many_workers_at_once_send_once(world, planned):
    site, run, shard = planned

    def attempt(i: int) -> str:
        try:
            return submit(replace(site, owner=f"worker {i}"), run, shard).batch_id
        except ShardHeld:
            return "held"

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(attempt, range(24))) - {"held"}) == 1
    assert batches(world) == 1


def test_F35_a_worker_that_died_after_the_create_call_has_its_batch_found(world, planned):
    site, run, shard = planned
    died = submit(site, run, shard)
    site.store.delete([f"shards/{shard}/receipt-1.json"])
    with pytest.raises(ShardHeld):
        submit(replace(site, owner="somebody else"), run, shard)
    assert submit(later(site), run, shard) == died
    assert batches(world) == 1


def test_F35_a_worker_that_died_before_the_create_call_is_replaced(world, planned):
    site, run, shard = planned
    claim_and_die(world, run, shard, 1)
    receipt = submit(later(site), run, shard)
    assert receipt.token == site.ledger.token(shard, 2)
    assert batches(world) == 1


def test_a_look_up_that_fails_is_not_taken_for_nothing_there(world, planned, tmp_path):
    site, run, shard = planned
    submit(site, run, shard)
    site.store.delete([f"shards/{shard}/receipt-1.json"])
    port = int(world.rehearsal.url.rpartition(":")[2])
    world.rehearsal.stop()
    with pytest.raises(ProviderUnavailable):
        submit(later(site), run, shard)
    assert [attempt.number for attempt in site.ledger.attempts(shard)] == [1]
    again = serve(world.rehearsal.state, port=port)
    assert submit(replace(site, now=lambda: datetime.now(UTC) + 3 * LEASE), run, shard).token == site.ledger.token(shard, 1)
    assert again.bill()["batches"] == 1
    again.stop()


@pytest.mark.parametrize("died", [False, True], ids=["with a receipt", "in doubt"])
def test_a_shard_is_neither_looked_for_nor_bought_at_another_place(world, planned, tmp_path, died):
    """A connection that was pointed elsewhere: what is under way at the old place is not there, and is not bought again."""
    site, run, shard = planned
    submit(site, run, shard)
    if died:
        site.store.delete([f"shards/{shard}/receipt-1.json"])
    elsewhere = serve(tmp_path / "elsewhere")
    moved = replace(later(site), open_provider=lambda request: elsewhere.provider())
    go_on = submit if died else collect
    with pytest.raises(WrongPlace, match="Point the connection back") as caught:
        go_on(moved, run, shard)
    assert (caught.value.where, caught.value.here) == (f"{world.rehearsal.url}/v1", f"{elsewhere.url}/v1")
    assert (batches(world), elsewhere.bill()["batches"]) == (1, 0)
    elsewhere.stop()


def test_F33_a_doubt_stays_a_doubt_until_the_list_has_been_read_after_the_lease(world, planned):
    """The create call is accepted, its answer lost, and the list lags: nothing is sent again meanwhile."""
    site, run, shard = planned
    world.rehearsal.faults(create_500_after_accept=1, list_lag_seconds=2)
    with pytest.raises(SubmissionInDoubt):
        submit(site, run, shard)
    with pytest.raises(ShardHeld):
        submit(site, run, shard)
    time.sleep(2)
    assert submit(later(site), run, shard).token == site.ledger.token(shard, 1)
    assert batches(world) == 1


def test_a_late_receipt_of_an_older_attempt_is_attached_to(world, planned):
    """Worker 1's answer is lost and the list lags; worker 2 claims, finds nothing yet and dies; worker 3 finds batch 1."""
    site, run, shard = planned
    submit(site, run, shard)
    site.store.delete([f"shards/{shard}/receipt-1.json"])
    claim_and_die(world, run, shard, 2)
    found = submit(later(site), run, shard)
    assert found.token == site.ledger.token(shard, 1)
    assert submit(later(site), run, shard) == found
    assert batches(world) == 1


@pytest.mark.parametrize("answer", [{}, [], {"error": {"message": "no"}}, {"data": None, "has_more": False}, "<html>"], ids=str)
def test_a_list_that_is_no_list_is_not_taken_for_an_empty_one(httpserver, answer):
    httpserver.expect_request("/v1/batches").respond_with_json(answer)
    provider = OpenAIBatches("/v1/chat/completions", OpenAIAccess(base_url=httpserver.url_for("/v1"), api_key="x"))
    with pytest.raises(ProviderUnavailable):
        provider.find(["t"], datetime.now(UTC))


def test_a_create_call_in_doubt_stays_in_doubt_when_the_list_is_forbidden(world, planned, monkeypatch):
    site, run, shard = planned
    world.rehearsal.faults(create_500_after_accept=1)

    def forbidden(self, tokens, since):
        raise AccessDenied("the list", "this key may not read it")

    monkeypatch.setattr(OpenAIBatches, "find", forbidden)
    with pytest.raises(SubmissionInDoubt):
        submit(site, run, shard)
    with pytest.raises(ShardHeld):
        submit(site, run, shard)
    assert batches(world) == 1


@pytest.mark.parametrize("fault", ["create_quota", "create_500"])
def test_a_create_call_that_bought_nothing_can_be_made_again(world, planned, fault):
    site, run, shard = planned
    world.rehearsal.faults(**{fault: 1})
    with pytest.raises(Exception) as caught:  # noqa: PT011 — refused or in doubt, by fault
        submit(site, run, shard)
    again = later(site) if isinstance(caught.value, SubmissionInDoubt) else site
    submit(again, run, shard)
    assert batches(world) == 1


def after_the_claim(site: Site, **delta: float) -> Site:
    """The same site, whose clock jumps as soon as an attempt is claimed: the process slept just before the create call."""

    def now() -> datetime:
        claimed = any(found.key.endswith("claim-1.json") for found in site.store.scan("shards"))
        return datetime.now(UTC) + timedelta(**delta) * claimed

    return replace(site, now=now)


def test_a_process_that_slept_past_its_lease_sends_nothing(world, planned):
    site, run, shard = planned
    with pytest.raises(ProviderUnavailable, match="lapsed before the call went out"):
        submit(after_the_claim(site, seconds=LEASE.total_seconds()), run, shard)
    assert batches(world) == 0


def test_a_process_that_slept_through_most_of_its_lease_renews_it_before_it_sends(world, planned):
    site, run, shard = planned
    submit(after_the_claim(site, seconds=60), run, shard)
    [attempt] = site.ledger.attempts(shard)
    assert [lease.owner for lease in attempt.leases] == [site.owner]
    assert batches(world) == 1


def test_a_process_whose_lease_was_taken_over_sends_nothing(world, planned):
    """It slept through most of its lease, and a worker with a faster clock has begun to look for its batch."""
    site, run, shard = planned
    slow = after_the_claim(site, seconds=60)
    key = f"shards/{shard}/lease-1-1.json"

    def now() -> datetime:
        moment = slow.now()
        if moment > datetime.now(UTC) + timedelta(seconds=30):
            site.store.create_shape(key, Lease(owner="the other", since=moment))
        return moment

    with pytest.raises(ProviderUnavailable, match="lapsed before the call went out"):
        submit(replace(site, now=now), run, shard)
    assert batches(world) == 0


def test_the_token_is_found_however_many_batches_the_account_has(tmp_path, rehearsal):
    provider = rehearsal.provider()
    path = tmp_path / "one.jsonl"
    path.write_bytes(b'{"custom_id":"x","method":"POST","url":"/v1/chat/completions","body":{"model":"gpt-5.4-nano","messages":[]}}\n')
    uploaded = provider.upload("x", path)
    since = datetime.now(UTC)
    wanted = provider.create(order(uploaded, token="the-token"), lambda: True)
    for i in range(230):
        provider.create(order(uploaded, token=f"other-{i}"), lambda: True)
    assert provider.find(["nobody", "the-token"], since) == wanted
    assert provider.find(["nobody"], since) is None


def test_F34_the_create_call_goes_out_once(world, planned):
    """A server that answers every create call with 500 sees one call per submit."""
    site, run, shard = planned
    world.rehearsal.faults(create_500_after_accept=3)
    submit(site, run, shard)
    assert batches(world) == 1
