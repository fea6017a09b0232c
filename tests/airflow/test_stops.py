"""Stopping a run cancels what nobody else waits for."""

from __future__ import annotations

import time

import pytest

from nightshift.approvals import Ask, Grants, Wait
from nightshift.drive import begin, drive
from nightshift.progress import progress_of
from nightshift.rehearsal.engine import Pace
from nightshift.runs import Run
from nightshift.shapes import Summary
from nightshift.steps.approve import approve
from nightshift.steps.plan import plan
from nightshift.steps.submit import submit
from nightshift.stores.ledger import Attach, next_move
from nightshift_airflow import stops
from tests.conftest import World, make_world, reviews, serve


@pytest.fixture
def world(tmp_path):
    server = serve(tmp_path / "provider", pace=Pace(running=8.0))
    yield make_world(tmp_path, server)
    server.stop()


def bought(world: World, uri: str) -> tuple[Run, list[str]]:
    """A run whose batches are under way, and they."""
    run = begin(world.site, world.job(), pattern=uri, dates={}, scheduled=False)
    approved = approve(world.site, run, plan(world.site, run), ask=lambda: True)
    for shard in approved.shards:
        submit(world.site, run, shard)
    return run, list(approved.shards)


def until_ended(world: World, shard: str) -> None:
    deadline = time.monotonic() + 30
    while status(world, shard) != "cancelled":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def status(world: World, shard: str) -> str:
    move = next_move(world.site.ledger.attempts(shard), now=world.site.now())
    assert isinstance(move, Attach)
    return world.rehearsal.provider().poll(move.receipt.batch_id).status


def test_a_stopped_run_says_that_it_was_and_of_what_cost_nobody_knows_yet(world):
    run, [shard] = bought(world, world.write("a.jsonl", reviews(5)))
    stops.end_stopped_run(world.site, run)
    assert "cancel" in status(world, shard)
    told = progress_of(run)
    assert (told.state, told.problem) == ("failed", stops.STOPPED)
    summary = world.site.store.get_shape(run.key("summary.json"), Summary)
    assert (summary.cost_usd.actual, summary.paid) == (None, 0)
    until_ended(world, shard)
    assert drive(world.site, run, ask=lambda run, planned: True).published, "cleared, it goes on"


def test_a_run_that_was_stopped_before_it_was_approved_has_cost_nothing(world):
    run = begin(world.site, world.job(), pattern=world.write("a.jsonl", reviews(5)), dates={}, scheduled=False)
    plan(world.site, run)
    stops.end_stopped_run(world.site, run)
    assert world.site.store.get_shape(run.key("summary.json"), Summary).cost_usd.actual == 0


def test_what_a_stopped_run_has_asked_for_others_is_asked_by_another(world):
    run = begin(world.site, world.job(), pattern=world.write("a.jsonl", reviews(5)), dates={}, scheduled=False)
    grants = Grants(world.site.store, "reviews")
    assert grants.step(run.uri, waited_for=None, now=world.site.now()) == Ask(1)
    assert grants.step("another", waited_for=None, now=world.site.now()) == Wait(1)
    stops.end_stopped_run(world.site, run)
    assert grants.step("another", waited_for=1, now=world.site.now()) == Ask(2)


def test_a_run_that_has_ended_by_itself_keeps_its_report(world):
    run, _ = bought(world, world.write("a.jsonl", reviews(5)))
    ended = drive(world.site, run, ask=lambda run, planned: True)
    stops.end_stopped_run(world.site, run)
    assert world.site.store.get_shape(run.key("summary.json"), Summary) == ended


def test_a_stopped_run_leaves_alone_what_another_has_adopted(world):
    rows = reviews(8)
    first, [shard] = bought(world, world.write("a.jsonl", rows[:5]))
    second, adopted = bought(world, world.write("b.jsonl", rows[4::-1]))  # nothing of its own
    third, [own, _] = bought(world, world.write("c.jsonl", rows))
    assert adopted == [shard]
    for stopped in (first, third):
        stops.cancel_batches(world.site, stopped, None)
    assert ["cancel" in status(world, each) for each in (shard, own)] == [False, True]
    assert drive(world.site, second, ask=lambda run, planned: True).outcomes["succeeded"] == 5
    assert world.rehearsal.bill()["batches"] == 2
