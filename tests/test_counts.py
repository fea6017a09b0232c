"""Answers files that were damaged: a run whose rows would have no outcome, or two, ends loudly and publishes nothing."""

from __future__ import annotations

from contextlib import nullcontext

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from nightshift.drive import begin, drive
from nightshift.errors import CountsDisagree
from nightshift.runs import Run, approved_plan
from nightshift.settle import check_shard
from nightshift.shapes import Shard
from nightshift.steps.assemble import assemble
from tests.conftest import World, reviews

KEYS = [bytes([first]) * 32 for first in (7, 200, 130, 90)]


def finished(world: World, count: int) -> Run:
    """A run that has ended, as if it had not been assembled yet."""
    run = begin(world.site, world.job(), pattern=world.write("in.jsonl", reviews(count)), dates={}, scheduled=False)
    assert drive(world.site, run, ask=lambda run, plan: True).published
    world.site.store.delete([run.key("assembled.json")])
    return run


def rewrite(world: World, change) -> None:
    """Change the one answers file there is."""
    [path] = (world.folder / "store" / "answers").glob("*/*.parquet")
    pq.write_table(change(pq.read_table(path)), path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(lambda table: pa.concat_tables([table, table.slice(3, 1)]), "have two answers in one file", id="a line stands twice"),
        pytest.param(lambda table: table.slice(1), "No answer, not even a failure, was harvested", id="a line is gone"),
    ],
)
def test_a_damaged_answers_file_is_found_before_anything_is_staged(world, change, said):
    run = finished(world, 20)
    rewrite(world, change)
    with pytest.raises(CountsDisagree, match=said):
        assemble(world.site, run, approved_plan(run))
    assert world.site.store.head(run.key("assembled.json")) is None


def test_what_is_doubled_among_answers_to_other_rows_stops_nobody(world):
    run = finished(world, 20)
    begun = begin(world.site, world.job(), pattern=world.write("other.jsonl", reviews(5)), dates={}, scheduled=False)
    summary = drive(world.site, begun, ask=lambda run, plan: True)
    assert summary.requests.reused == 5
    world.site.store.delete([begun.key("assembled.json")])
    [rows] = approved_plan(begun).slices
    own = pq.read_table(world.site.store.open(rows))["request_key"]
    rewrite(world, lambda table: pa.concat_tables([table, table.filter(pc.invert(pc.is_in(table["request_key"], own.combine_chunks())))]))
    assert assemble(world.site, begun, approved_plan(begun)).outcomes["succeeded"] == 5
    with pytest.raises(CountsDisagree):
        assemble(world.site, run, approved_plan(run))


@pytest.mark.parametrize(
    ("answered", "said"),
    [
        (KEYS[:3], None),
        ([*reversed(KEYS[:3]), KEYS[0]], None),  # a stand-in's word beside the model's own
        (KEYS[:2], rf"3 requests, but 2 were answered; in only one of them: {KEYS[2].hex()[:16]}"),
        ([*KEYS[:2], KEYS[3]], rf"but 3 were answered; in only one of them: {KEYS[3].hex()[:16]}, {KEYS[2].hex()[:16]}"),
    ],
    ids=["all", "one twice", "one is missing", "a foreign one in place of one's own"],
)
def test_a_shard_is_settled_when_each_of_its_requests_is_answered_and_no_other(answered, said):
    facts = Shard(key="s" * 64, fingerprint="f", provider="openai", endpoint="/v1/responses", model="m", request_count=3, request_bytes=9)
    merged = pa.table({"request_key": pa.array(answered, pa.binary(32))})
    with pytest.raises(CountsDisagree, match=said) if said else nullcontext():
        check_shard(facts, [], {}, b"".join(KEYS[:3]), merged)
