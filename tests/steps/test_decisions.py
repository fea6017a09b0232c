"""The pure decisions of the steps, as tables."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import chain
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightshift.budgets import Budget
from nightshift.errors import AccessDenied, ApprovalNeeded, BatchUnknown, BudgetExceeded, ProviderUnavailable
from nightshift.job import RetrySpec
from nightshift.matching import Matching, with_tokens
from nightshift.packing import WANTED, balance, cut
from nightshift.providers.protocol import Garbage, Reply, Snapshot
from nightshift.shapes import Estimate, Plan
from nightshift.steps.approve import NeedsApproval, Pass, Stop, approve, decide
from nightshift.steps.discover import discover
from nightshift.steps.wait import FILES_GRACE, UNKNOWN_PATIENCE, Cancel, Ended, Look, is_waiting_for_files, next_look
from nightshift.stores.shards import shard_key
from tests.conftest import reviews

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
NOW = datetime(2026, 11, 22, tzinfo=UTC)


def plan(usd: str | None, submitted: int = 10) -> Plan:
    estimate = Estimate(
        input_tokens=1, output_tokens=1, output_tokens_max=1, usd=usd and Decimal(usd), usd_max=usd and Decimal(usd), basis=""
    )
    return Plan(
        fingerprint="f", rows=10, rejected=0, reasons={}, unique=10, duplicates=0, reused=0, adopted=0, submitted=submitted,
        shards=(), adopted_shards=(), answers=(), slices=(), estimate=estimate, saved_usd=None, seen="",
    )  # fmt: skip


RUN = Budget(name="policy.budget_usd", limit=Decimal(10), account="a")
MONTH = Budget(name="policy.monthly_budget_usd", limit=Decimal(100), account="b")


@pytest.mark.parametrize(
    ("planned", "limit", "budgets", "decision"),
    [
        pytest.param(plan("5"), None, [], Pass(), id="no bounds"),
        pytest.param(plan("5"), 6, [(RUN, 0)], Pass(), id="below both"),
        pytest.param(plan("5"), 4, [(RUN, 0)], NeedsApproval(4), id="above what passes unasked"),
        pytest.param(plan("11"), 4, [(RUN, 0)], Stop(RUN, 0), id="over the budget, whoever agrees"),
        pytest.param(plan("5"), 4, [(RUN, 0), (MONTH, 96)], Stop(MONTH, 96), id="over what is left of the month"),
        pytest.param(plan("5"), 6, [(RUN, 0), (MONTH, 95)], Pass(), id="just what is left of the month"),
        pytest.param(plan(None), None, [(RUN, 0)], NeedsApproval(10), id="unknown price is not a price of zero"),
        pytest.param(plan(None), None, [(RUN, 0), (MONTH, 99)], NeedsApproval(1), id="unknown price, at the end of the month"),
        pytest.param(plan(None), None, [], Pass(), id="unknown price, unbounded"),
        pytest.param(plan("11", submitted=0), None, [(RUN, 0)], Pass(), id="nothing to send costs nothing"),
    ],
)
def test_what_the_estimate_allows(planned, limit, budgets, decision):
    assert decide(planned, limit, budgets) == decision


def test_approval_is_asked_for_and_a_budget_is_not_negotiable(world):
    job = world.job(policy={"approve_above_usd": 4, "budget_usd": 10})
    run = discover(world.site, job, pattern=world.write("in.jsonl", reviews(1)), label="x", run="r1", dates={})
    with pytest.raises(ApprovalNeeded, match=r"estimated at \$5.0000") as asked:
        approve(world.site, run, plan("5"), ask=lambda: False)
    with pytest.raises(BudgetExceeded, match="nothing more was sent") as stopped:
        approve(world.site, run, plan("11"), ask=lambda: True)
    assert asked.value.exit_code == stopped.value.exit_code == 4
    approve(world.site, run, plan("5"), ask=lambda: True)
    approve(world.site, run, plan("5"), ask=lambda: pytest.fail("asked twice"))


def snapshot(state: str, status: str = "x", **others: Any) -> Snapshot:
    return Snapshot(state=state, status=status, done=0, total=0, result_files=(), reasons=(), bad_lines={}, **others)


@pytest.mark.parametrize(
    ("look", "waited", "patience", "move"),
    [
        pytest.param(snapshot("running"), HOUR, DAY, Look, id="running"),
        pytest.param(snapshot("running", "a word nobody knows"), HOUR, DAY, Look, id="F45 unknown status"),
        pytest.param(snapshot("ended"), HOUR, DAY, Ended, id="ended"),
        pytest.param(snapshot("failed"), HOUR, DAY, Ended, id="failed"),
        pytest.param(ProviderUnavailable("x", "y"), 1000 * HOUR, DAY, Look, id="F44 a failed look never ends the wait"),
        pytest.param(AccessDenied("x", "y"), HOUR, DAY, Ended, id="a person has to mend it"),
        pytest.param(BatchUnknown("x", "b"), UNKNOWN_PATIENCE / 2, DAY, Look, id="F46 not known yet"),
        pytest.param(BatchUnknown("x", "b"), UNKNOWN_PATIENCE * 2, DAY, Ended, id="F46 not known any more"),
        pytest.param(snapshot("running"), 2 * HOUR, HOUR, Cancel, id="past the deadline"),
        pytest.param(snapshot("running", "cancelling", is_stopping=True), 2 * HOUR, HOUR, Look, id="F57 cancelling is not cancelled"),
    ],
)
def test_what_follows_from_a_look(look, waited, patience, move):
    assert isinstance(next_look(look, failures=1, failing=waited, waited=waited, patience=patience, poll_seconds=1.0), move)


@pytest.mark.parametrize("waited", [HOUR, 2 * DAY])
@pytest.mark.parametrize(("awaits_files", "move"), [(True, Look), (False, Ended)])
def test_F60_a_batch_whose_result_files_lag_behind_is_waited_for_also_past_the_deadline(waited, awaits_files, move):
    found = next_look(
        snapshot("ended"), failures=0, failing=waited, waited=waited, patience=DAY, poll_seconds=1.0, awaits_files=awaits_files
    )
    assert isinstance(found, move)


@pytest.mark.parametrize(
    ("awaits_files", "ended_at", "is_waiting"),
    [
        pytest.param(True, NOW - FILES_GRACE / 2, True, id="they lag behind"),
        pytest.param(True, NOW - 2 * FILES_GRACE, False, id="for too long"),
        pytest.param(True, None, True, id="the provider does not say since when"),
        pytest.param(False, NOW, False, id="all are there"),
    ],
)
def test_F60_result_files_are_waited_for_as_long_as_the_grace(awaits_files, ended_at, is_waiting):
    over = replace(snapshot("ended"), awaits_files=awaits_files, ended_at=ended_at)
    assert is_waiting_for_files(over, NOW, latest=NOW) is is_waiting
    assert not is_waiting_for_files(over, NOW + 2 * FILES_GRACE, latest=NOW), "nobody waits for ever"


def test_failed_looks_come_at_growing_distances_up_to_a_bound():
    def pause(failures: int, poll_seconds: float = 10) -> float:
        look = ProviderUnavailable("x", "y")
        return next_look(look, failures=failures, failing=HOUR, waited=HOUR, patience=DAY, poll_seconds=poll_seconds).after_seconds

    assert pause(1) < pause(3) < pause(9) <= 300 * 1.25
    assert pause(1000, poll_seconds=60) <= 300 * 1.25
    assert pause(1000, poll_seconds=1) <= 20, "who looks often hears soon that it is back"


@pytest.mark.parametrize(
    ("outcome", "times", "allowed"),
    [
        ("errored", 2, True), ("errored", 3, False), ("invalid", 1, True), ("invalid", 2, False),
        ("truncated", 1, False), ("refused", 1, False), ("succeeded", 1, False), ("rejected", 1, False),
    ],
)  # fmt: skip
def test_how_often_a_request_is_asked_again(outcome, times, allowed):
    assert RetrySpec().allows(outcome, times) is allowed


def wanted(*sizes: int) -> list[pa.Table]:
    """Requests of these sizes, in batches of two."""
    rows = [{"key": bytes([i]), "start": 0, "size": size, "weight": size} for i, size in enumerate(sizes)]
    return [pa.Table.from_pylist(rows[i : i + 2], WANTED) for i in range(0, len(rows), 2)]


@pytest.mark.parametrize(
    ("sizes", "most", "most_bytes", "groups"),
    [
        pytest.param((1, 1, 1, 1, 1), 2, 100, [2, 2, 1], id="by count"),
        pytest.param((40, 40, 40), 10, 100, [2, 1], id="by bytes"),
        pytest.param((100, 1), 10, 100, [1, 1], id="one fills a group alone"),
        pytest.param((), 10, 100, [], id="nothing"),
    ],
)
def test_F19_shards_keep_every_limit(sizes, most, most_bytes, groups):
    cuts = list(cut(wanted(*sizes), most, most_bytes))
    assert [group.num_rows for group in cuts] == groups
    assert [key for group in cuts for key in group.column("key").to_pylist()] == [bytes([i]) for i in range(len(sizes))]


def test_F19_a_frame_counts_for_every_line():
    assert [group.num_rows for group in cut(wanted(30, 30, 30), 10, 100, frame=20)] == [2, 1]


def test_a_last_shard_too_small_for_a_batch_is_filled_from_the_one_before():
    assert [group.num_rows for group in balance(cut(wanted(*[1] * 10), 4, 100), least=3)] == [4, 3, 3]
    assert [group.num_rows for group in balance(cut(wanted(*[1] * 9), 4, 100), least=3)] == [4, 4, 1], "the one before cannot spare so many"


def test_the_same_requests_are_the_same_shard_in_any_order():
    keys = [b"a" * 32, b"\xff" * 32, b"a" * 30 + b"\0\0", b"\0" * 32, b"a" * 31 + b"\0"]
    assert shard_key(b"".join(keys)) == shard_key(b"".join(reversed(keys))) == hashlib.sha256(b"".join(sorted(keys))).hexdigest()
    apart = [bytes([first]) + b"a" * 31 for first in (200, 3, 128, 0, 127, 255)]  # of which no two begin alike
    assert shard_key(b"".join(apart)) == hashlib.sha256(b"".join(sorted(apart))).hexdigest()
    assert shard_key(b"".join(keys[1:])) != shard_key(b"".join(keys)) != shard_key(b"".join(keys), "once more")


A, B = b"\xaa" * 32, b"\xbb" * 32


def reply(key: bytes, outcome: str, tokens: int = 1) -> Reply:
    return Reply(custom_id=key.hex(), outcome=outcome, input_tokens=tokens, output_tokens=0, paid=True)


def matched(*replies: Reply | Garbage) -> tuple[Matching, dict[bytes, Reply]]:
    """Replies matched to the one request A, and what of it has succeeded."""
    matching = Matching([A])
    return matching, dict(chain.from_iterable(matching.successes(replies, 9)))


@pytest.mark.parametrize("outcomes", [("errored", "succeeded"), ("refused", "errored", "succeeded")])
def test_F67_of_two_lines_the_success_stays_and_both_are_paid(outcomes):
    matching, found = matched(*(reply(A, outcome) for outcome in outcomes))
    assert (found[A].outcome, found[A].input_tokens) == ("succeeded", len(outcomes))
    assert (matching.failed, matching.twice, matching.alarms) == ({}, {}, {"duplicate lines": len(outcomes) - 1})


@given(st.lists(st.tuples(st.sampled_from([A, B, bytes(32)]), st.sampled_from(["succeeded", "errored", "refused"])), max_size=9))
def test_F67_it_does_not_matter_how_many_lines_are_matched_at_once(lines):
    replies = [Garbage(reason="cut") if not any(key) else reply(key, outcome, place) for place, (key, outcome) in enumerate(lines)]
    found = []
    for at_once in (1, 2, 9):
        matching = Matching([A, B])
        kept = dict(chain.from_iterable(matching.successes(replies, at_once)))
        found.append((kept, matching.failed, matching.twice, matching.alarms, matching.absent))
    assert found[0] == found[1] == found[2]


def test_F67_what_comes_after_a_success_is_paid_with_it():
    late = [reply(A, "refused", 5), reply(A, "succeeded", 7)]
    matching, found = matched(reply(A, "succeeded"), *late)
    assert (found[A].input_tokens, matching.twice, matching.failed) == (1, {A: late}, {})


def test_F67_tokens_of_further_lines_are_added_where_they_are_known():
    unknown = Reply(custom_id=A.hex(), outcome="succeeded", paid=True)
    found = with_tokens(reply(A, "succeeded", 3), [reply(A, "refused", 5), unknown])
    assert (found.outcome, found.input_tokens, with_tokens(unknown, [unknown]).input_tokens) == ("succeeded", 8, None)


def test_F67_of_two_failures_the_better_word_stays():
    matching, found = matched(reply(A, "errored"), reply(A, "refused"), reply(A, "errored"))
    assert (found, matching.failed[A].outcome, matching.failed[A].input_tokens) == ({}, "refused", 3)
    assert matching.absent == frozenset()


def test_F68_F65_strange_lines_are_counted_and_never_matched_by_position():
    matching, found = matched(reply(B, "succeeded"), Reply(custom_id="not hex", outcome="succeeded"), Garbage(reason="cut"))
    assert (found, matching.absent) == ({}, {A})
    assert matching.alarms == {"lines for unknown requests": 2, "unreadable lines": 1}
