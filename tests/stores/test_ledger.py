from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest

from nightshift.errors import LedgerCorrupt
from nightshift.shapes import Receipt
from nightshift.stores.ledger import (
    LEASE,
    QUEUE_PAUSE,
    QUEUE_PAUSE_MAX,
    Attach,
    Attempt,
    Claim,
    Done,
    Ended,
    Hold,
    Lease,
    Ledger,
    Search,
    Send,
    next_move,
    portion,
    queue_pause,
    token_for,
)
from nightshift.stores.objects import open_objects
from tests.conftest import NOON

LATER = NOON + LEASE + timedelta(seconds=1)


def claim(number: int = 1) -> Claim:
    return Claim(
        token=f"t{number}", owner="worker 1", claimed_at=NOON, where="https://here", run="memory://r", provider="openai", model="m", asked=9
    )


def receipt(number: int = 1) -> Receipt:
    return Receipt(batch_id=f"b{number}", token=f"t{number}", created_at=NOON)


def ended(how: str, remaining: int, *, alone: bool = False) -> Ended:
    return Ended(how=how, status="x", ended_at=NOON, remaining=remaining, alone=alone)


def attempt(number: int = 1, *, taken: bool = False, end: Ended | None = None, leases: tuple[Lease, ...] = ()) -> Attempt:
    return Attempt(number=number, claim=claim(number), receipt=receipt(number) if taken else None, ended=end, leases=leases)


TAKEN_OVER = Lease(owner="worker 2", since=LATER)


@pytest.mark.parametrize(
    ("attempts", "now", "move"),
    [
        pytest.param([], NOON, Send(1), id="never seen"),
        pytest.param([attempt()], NOON, Hold(NOON + LEASE, "worker 1 holds its claim"), id="in hand"),
        pytest.param([attempt()], LATER, Search(2, attempt(), (attempt(),)), id="died between claim and receipt"),
        pytest.param([attempt(), attempt(2)], LATER, Search(3, attempt(2), (attempt(), attempt(2))), id="the searcher died as well"),
        pytest.param([attempt(taken=True)], LATER, Attach(attempt(taken=True), receipt()), id="taken by the provider"),
        pytest.param(
            [attempt(taken=True), attempt(2)], LATER, Attach(attempt(taken=True), receipt()), id="the receipt of an older attempt came late"
        ),
        pytest.param([attempt(taken=True, end=ended("harvested", 0)), attempt(2)], LATER, Done(), id="a dead claim after the last answer"),
        pytest.param(
            [attempt(taken=True, end=ended("harvested", 3)), attempt(2)],
            LATER,
            Search(3, attempt(2), (attempt(2),)),
            id="a dead claim before it",
        ),
        pytest.param([attempt(taken=True, end=ended("harvested", 0))], NOON, Done(), id="all answered"),
        pytest.param([attempt(taken=True, end=ended("harvested", 3))], NOON, Send(2), id="some to be asked again"),
        pytest.param([attempt(end=ended("refused", 9))], NOON, Send(2), id="the create call was refused"),
        pytest.param([attempt(taken=True, end=ended("rejected", 9))], NOON, Send(2), id="rejected, and somebody tries again"),
        pytest.param(
            [attempt(taken=True, end=ended("queue_full", 9))],
            NOON,
            Hold(NOON + QUEUE_PAUSE, "the provider's queue is full"),
            id="queue full",
        ),
        pytest.param([attempt(taken=True, end=ended("queue_full", 9))], LATER, Send(2), id="queue had time to drain"),
        pytest.param(
            [attempt(end=ended("refused", 9)), attempt(2)],
            LATER,
            Search(3, attempt(2), (attempt(2),)),
            id="only attempts in doubt are searched for",
        ),
        pytest.param(
            [attempt(leases=(TAKEN_OVER,))],
            LATER,
            Hold(LATER + LEASE, "worker 2 holds its claim"),
            id="its lease was renewed or taken over",
        ),
        pytest.param(
            [attempt(leases=(TAKEN_OVER,))],
            LATER + LEASE,
            Search(2, attempt(leases=(TAKEN_OVER,)), (attempt(leases=(TAKEN_OVER,)),)),
            id="who took it over died as well",
        ),
        pytest.param([attempt(taken=True, end=ended("lost", 9))], NOON, Send(2), id="lost by the provider, and given up"),
    ],
)
def test_next_move_follows_from_the_ledger_alone(attempts, now, move):
    assert next_move(attempts, now=now) == move


def test_every_full_queue_in_a_row_doubles_the_pause_up_to_a_bound():
    full = [attempt(n, taken=True, end=ended("queue_full", 1)) for n in range(1, 101)]
    assert [queue_pause(full[:n]) / QUEUE_PAUSE for n in (1, 2, 3)] == [1, 2, 4]
    assert queue_pause(full) == QUEUE_PAUSE_MAX


@pytest.mark.parametrize(
    ("attempts", "most"),
    [
        pytest.param([], None, id="first time"),
        pytest.param([attempt(taken=True, end=ended("queue_full", 9))], None, id="others were in the queue"),
        pytest.param([attempt(taken=True, end=ended("queue_full", 9, alone=True))], 4, id="too large for the queue by itself"),
        pytest.param([attempt(taken=True, end=ended("harvested", 3))], None, id="all of it fitted"),
        pytest.param([attempt(end=ended("refused", 9))], None, id="refused for another reason"),
    ],
)
def test_F24_a_batch_that_fills_the_queue_by_itself_is_halved(attempts, most):
    assert portion(attempts) == most


def test_F24_a_portion_that_fitted_stays_the_measure():
    small = replace(attempt(2, taken=True, end=ended("harvested", 5)), claim=claim(2).model_copy(update={"most": 4, "asked": 4}))
    assert portion([attempt(taken=True, end=ended("queue_full", 9, alone=True)), small]) == 4


def test_one_of_many_claimants_wins(tmp_path):
    ledger = Ledger(open_objects(f"file://{tmp_path}"))
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda i: ledger.claim("s1", 1, claim().model_copy(update={"owner": f"worker {i}"})), range(64)))
    assert won.count(True) == 1
    assert ledger.attempts("s1")[0].claim.owner == f"worker {won.index(True)}"


def test_a_lease_is_renewed_by_its_owner_or_taken_over_by_one_other_but_never_both(tmp_path):
    ledger = Ledger(open_objects(f"file://{tmp_path}"))
    ledger.claim("s1", 1, claim())
    [lapsed] = ledger.attempts("s1")
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda i: ledger.take_lease("s1", lapsed, Lease(owner=f"worker {i}", since=LATER)), range(64)))
    assert won.count(True) == 1
    [held] = ledger.attempts("s1")
    assert (held.holder, held.lapses_at) == (f"worker {won.index(True)}", LATER + LEASE)
    assert ledger.take_lease("s1", held, Lease(owner="the next", since=LATER + LEASE))


def test_what_was_recorded_first_stays(tmp_path):
    ledger = Ledger(open_objects(f"file://{tmp_path}"))
    ledger.claim("s1", 1, claim())
    assert ledger.record_receipt("s1", 1, receipt(1)) == receipt(1)
    assert ledger.record_receipt("s1", 1, receipt(2)) == receipt(1)
    assert ledger.attempts("s1") == [Attempt(number=1, claim=ledger.attempts("s1")[0].claim, receipt=receipt(1))]


def test_a_receipt_without_its_claim_stops_everything(tmp_path):
    ledger = Ledger(open_objects(f"file://{tmp_path}"))
    ledger.record_receipt("s1", 1, receipt(1))
    with pytest.raises(LedgerCorrupt, match="stand without it"):
        ledger.attempts("s1")


def test_a_damaged_ledger_object_is_not_taken_for_a_missing_one(tmp_path):
    store = open_objects(f"file://{tmp_path}")
    store.create("shards/s1/claim-1.json", b'{"token": "t"')
    with pytest.raises(LedgerCorrupt, match="until a person has looked"):
        Ledger(store).attempts("s1")


def test_tokens_are_the_same_for_everybody_and_safe_in_every_providers_names():
    assert token_for("a", "s1", 1) == token_for("a", "s1", 1) not in (token_for("a", "s1", 2), token_for("b", "s1", 1))
    assert token_for("a", "s1", 1).isalnum()
