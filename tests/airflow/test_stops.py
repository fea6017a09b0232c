"""Stopping a run cancels what nobody else waits for."""

from __future__ import annotations

import pytest

from nightshift.drive import begin, drive
from nightshift.rehearsal.engine import Pace
from nightshift.runs import Run
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


def status(world: World, shard: str) -> str:
    move = next_move(world.site.ledger.attempts(shard), now=world.site.now())
    assert isinstance(move, Attach)
    return world.rehearsal.provider().poll(move.receipt.batch_id).status


def test_a_stopped_run_leaves_alone_what_another_has_adopted(world, monkeypatch):
    rows = reviews(8)
    first, [shard] = bought(world, world.write("a.jsonl", rows[:5]))
    second, adopted = bought(world, world.write("b.jsonl", rows[4::-1]))  # nothing of its own
    third, [own, _] = bought(world, world.write("c.jsonl", rows))
    assert adopted == [shard]
    runs = {run.uri: run for run in (first, second, third)}
    monkeypatch.setattr(stops, "run_at", lambda uri, owner: (world.site, runs[uri]))
    for stopped in (first, third):
        stops.cancel_batches(stopped.uri, None, "test")
    assert ["cancel" in status(world, each) for each in (shard, own)] == [False, True]
    assert drive(world.site, second, ask=lambda run, planned: True).outcomes["succeeded"] == 5
    assert world.rehearsal.bill()["batches"] == 2
