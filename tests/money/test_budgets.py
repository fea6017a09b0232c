"""Budgets by run, by job and month, by connection and month: what is booked, what is held, what is stopped, whoever else is buying."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from unittest.mock import ANY

import pytest

from nightshift.budgets import BILLIONTH, PATIENCE, _funded_by, book_attempt, settle_attempts
from nightshift.drive import begin, drive
from nightshift.errors import AccessDenied, BudgetExceeded, QuotaExhausted, ShardHeld
from nightshift.retry_budget import RetryBudget
from nightshift.steps.approve import approve
from nightshift.steps.collect import collect
from nightshift.steps.discover import discover
from nightshift.steps.plan import plan
from nightshift.steps.submit import submit
from nightshift.steps.wait import pauses
from nightshift.stores.accounts import Account, Booked, Full
from nightshift.stores.ledger import Attempt, Claim, Ended
from nightshift.stores.objects import open_objects
from tests.conftest import NOON, Clock, World, go


@pytest.fixture
def account(tmp_path) -> Account:
    return Account(open_objects(f"file://{tmp_path}/store"), "spending/2026-11/job-reviews")


def book(account: Account, of: str, usd: float, limit: float | None = 10, high: float | None = None) -> Booked | Full:
    return account.book(of, Decimal(str(usd)), None if limit is None else Decimal(str(limit)), Decimal(str(high or usd)), now=NOON)


def test_what_is_booked_once_is_booked_once_however_often_it_is_said(account):
    assert book(account, "a", 4) == book(account, "a", 4) == Booked()
    assert account.total == 4


def test_what_does_not_fit_is_not_booked_and_is_told_what_is_open(account):
    book(account, "a", 6)
    assert book(account, "b", 5) == Full(Decimal(6), 1, NOON)
    account.settle("a", Decimal(2), now=NOON)
    assert account.total == 2
    assert book(account, "b", 5) == Booked()


def test_beside_others_in_flight_the_most_that_is_expected_has_to_fit(account):
    assert book(account, "a", 5, high=11) == Booked(), "alone, what is expected counts"
    assert book(account, "b", 4, high=6) == Full(Decimal(5), 1, NOON)
    account.settle("a", Decimal(5), now=NOON)
    assert book(account, "b", 4, high=6) == Booked()


def test_settling_is_done_once_and_only_for_what_was_booked(account):
    book(account, "a", 5)
    account.settle("a", Decimal(7), now=NOON)
    account.settle("a", Decimal(9), now=NOON)
    account.settle("never", Decimal(9), now=NOON)
    assert account.total == 7


def test_what_nobody_knows_the_cost_of_stays_as_it_was_booked(account):
    book(account, "a", 5)
    account.settle("a", None, now=NOON)
    assert account.total == 5


def test_a_booking_that_died_between_its_two_writes_is_made_good_and_not_made_twice(account):
    first = account._enter
    died = []

    def dies(of, usd, number, last, opened, now):
        if not died:
            died.append(number)
            account._objects.create(account._place_key(of, 0), b'{"account": "x", "number": %d}' % number)
            raise KeyboardInterrupt
        return first(of, usd, number, last, opened, now)

    account._enter = dies
    with pytest.raises(KeyboardInterrupt):
        book(account, "a", 4)
    assert book(account, "a", 4) == Booked()
    assert account.total == 4


def test_of_many_who_buy_at_once_only_those_who_fit_come_through(account):
    with ThreadPoolExecutor(16) as pool:
        done = list(pool.map(lambda i: book(account, f"s{i}", 1), range(40)))
    assert sum(isinstance(each, Booked) for each in done) == 10
    assert account.total == 10


def texts(count: int, start: int = 0) -> list[dict]:
    return [
        {"id": f"r{i}", "text": f"The room number {i} was lovely, and so were the {i} others.", "stars": 3}
        for i in range(start, start + count)
    ]


def test_a_months_budget_counts_what_was_paid_and_stops_what_does_not_fit_before_it_costs(world):
    first = go(world, world.job(), world.write("a.jsonl", texts(100)))
    budget = first.cost_usd.actual * 1.5
    limited = world.job(policy={"monthly_budget_usd": budget})
    go(world, limited, world.write("b.jsonl", texts(100, 100)))
    with pytest.raises(BudgetExceeded, match=r"policy.monthly_budget_usd of reviews, 20\d\d-\d\d allows .* are spent or in flight"):
        go(world, limited, world.write("c.jsonl", texts(100, 200)))
    assert world.rehearsal.bill()["requests"] == 200
    assert go(world, limited, world.write("d.jsonl", texts(20, 300))).published, "what fits goes on"


def test_who_has_booked_and_was_not_quick_enough_to_claim_is_charged_nothing(world):
    """While one run uploads, another one that has adopted its shard claims it."""
    job = world.job(policy={"monthly_budget_usd": 1})
    one, other = (begin(world.site, job, pattern=world.write(f"{name}.jsonl", texts(50)), dates={}, scheduled=False) for name in "ab")
    [shard], _ = (approve(world.site, run, plan(world.site, run), ask=lambda: True).shards for run in (one, other))
    provider = world.site.open_provider(job.spec.request)
    upload = provider.upload

    def overtaken(token, path):
        provider.upload = upload
        submit(world.site, other, shard)
        return upload(token, path)

    provider.upload = overtaken
    with pytest.raises(ShardHeld):
        submit(world.site, one, shard)
    costs = [drive(world.site, run, ask=lambda run, planned: True).cost_usd.actual for run in (one, other)]
    account = Account(world.site.store, f"spending/{world.site.now():%Y-%m}/job-reviews")
    assert costs == [0, pytest.approx(float(account.total), abs=1e-5)]


def test_a_new_month_is_a_new_budget(world):
    clock = Clock()
    world.site = replace(world.site, now=clock)
    cost = go(world, world.job(), world.write("a.jsonl", texts(100))).cost_usd.actual
    job = world.job(policy={"monthly_budget_usd": cost * 1.5})
    go(world, job, world.write("b.jsonl", texts(100, 100)))
    with pytest.raises(BudgetExceeded):
        go(world, job, world.write("c.jsonl", texts(100, 200)))
    clock.pass_by(days=31)
    _, shards = shards_of(world, job, world.write("c.jsonl", texts(100, 200)))
    assert shards


def test_a_connections_budget_holds_for_all_of_its_jobs(world):
    cost = go(world, world.job(), world.write("a.jsonl", texts(100))).cost_usd.actual
    world.site = replace(world.site, monthly_budget={"openai_default": Decimal(str(cost * 1.5))}.get)
    go(world, world.job(), world.write("b.jsonl", texts(100, 100)))
    other = world.job(name="others")
    with pytest.raises(BudgetExceeded, match="the monthly budget of openai_default"):
        go(world, other, world.write("c.jsonl", texts(100, 200)))


def test_the_accounts_say_what_the_bill_says(world):
    job = world.job(policy={"monthly_budget_usd": 1, "budget_usd": 1, "max_requests_per_shard": 20, "retry": {"errored": 2}})
    world.rehearsal.faults(errored=0.2)
    summary = go(world, job, world.write("a.jsonl", texts(100)))
    [folder] = world.site.store.folders(f"spending/{summary.finished_at:%Y-%m}")[:1]
    account = Account(world.site.store, folder)
    assert float(account.total) == pytest.approx(world.rehearsal.bill()["usd"], abs=1e-6)
    assert book(account, "another", 99, limit=1) == Full(account.total, 0, ANY), "nothing that was put aside for asking again stays booked"


def test_what_a_dead_attempt_had_booked_is_free_once_its_shard_is_settled(world):
    clock = Clock()
    world.site = replace(world.site, now=clock)
    run, [shard] = shards_of(world, world.job(policy={"monthly_budget_usd": 1}), world.write("a.jsonl", texts(20)))
    claim = first_claim(world.site, run, shard)
    book_attempt(world.site, run, world.site.ledger.shard(shard), claim, [])
    assert world.site.ledger.claim(shard, 1, claim), "and here its worker dies"
    clock.pass_by(hours=1)
    drive(world.site, run, ask=lambda run, planned: True)
    account = Account(world.site.store, f"spending/{NOON:%Y-%m}/job-reviews")
    assert len(world.site.ledger.attempts(shard)) == 2
    assert float(account.total) == pytest.approx(world.rehearsal.bill()["usd"], abs=1e-6)
    assert book(account, "another", 99, limit=1) == Full(account.total, 0, ANY)


def site_estimate(world: World, run) -> Decimal:
    """What a run is expected to cost: with all that it may be, it does not fit into as much."""
    return plan(world.site, run).estimate.usd


def shards_of(world: World, job, uri: str):
    run = discover(world.site, job, pattern=uri, label="x", run="r1", dates={})
    return run, approve(world.site, run, plan(world.site, run), ask=lambda: True).shards


def test_a_hard_budget_is_never_passed_by_more_than_one_shard_when_answers_cost_more_than_they_should(world):
    cheap = world.job(policy={"max_requests_per_shard": 10})
    estimate = go(world, cheap, world.write("a.jsonl", texts(100))).cost_usd.actual
    dear = world.job(
        prompt="user:\nOnce more: {{ text }}\n",
        policy={"max_requests_per_shard": 10, "budget_usd": estimate * 1.1, "retry": {"invalid": 5}},
    )
    world.rehearsal.faults(invalid=1.0)  # every answer is asked for again
    before = world.rehearsal.bill()["usd"]
    with suppress(BudgetExceeded):
        go(world, dear, world.write("b.jsonl", texts(100)))
    spent = world.rehearsal.bill()["usd"] - before
    assert spent <= estimate * 1.1 + estimate / 10 * 3, "the budget, and one shard with all that it asks again"


def test_shards_that_are_harvested_at_the_same_moment_do_not_spend_the_same_money_on_asking_again(world):
    job = world.job(policy={"max_requests_per_shard": 10, "retry": {"invalid": 1}})
    paid = go(world, job, world.write("a.jsonl", texts(40))).cost_usd.actual
    dear = world.job(
        prompt="user:\nOnce more: {{ text }}\n",
        policy={"max_requests_per_shard": 10, "retry": {"invalid": 1}, "monthly_budget_usd": paid * 1.8},
    )
    world.rehearsal.faults(invalid=1.0)
    before = world.rehearsal.bill()["usd"]
    run, shards = shards_of(world, dear, world.write("b.jsonl", texts(40)))
    for shard in shards:
        submit(world.site, run, shard)
    for shard in shards:  # none is submitted again before all are harvested
        list(pauses(world.site, run, shard))
        collect(world.site, run, shard)
    drive(world.site, run, ask=lambda run, planned: True)
    assert paid * 1.2 < world.rehearsal.bill()["usd"] - before < paid * 1.8


def spent(world: World) -> Decimal:
    return Account(world.site.store, f"spending/{world.site.now():%Y-%m}/job-reviews").total


def test_what_is_put_aside_for_asking_again_outlives_a_full_queue(world):
    job = world.job(policy={"max_requests_per_shard": 10, "retry": {"invalid": 1}, "monthly_budget_usd": 1})
    world.rehearsal.faults(invalid=1.0)
    run, [shard] = shards_of(world, job, world.write("a.jsonl", texts(10)))
    submit(world.site, run, shard)
    list(pauses(world.site, run, shard))
    once = spent(world)
    collect(world.site, run, shard)
    twice = spent(world)
    world.rehearsal.faults(invalid=1.0, enqueued_token_limit=1)
    submit(world.site, run, shard)
    list(pauses(world.site, run, shard))
    assert collect(world.site, run, shard) is None
    assert world.site.ledger.attempts(shard)[-1].ended.how == "queue_full"
    settle_attempts(world.site, shard, world.site.ledger.attempts(shard))
    assert once < twice == pytest.approx(spent(world), rel=Decimal("0.05")), "another run cannot take it"


def test_what_a_portion_of_a_shard_has_not_asked_stays_booked(world):
    """The failures that go to another model are asked once those of the same model are in."""
    job = world.job(
        policy={
            "max_requests_per_shard": 20,
            "retry": {"invalid": {"times": 1, "model": "gpt-5.4"}, "truncated": 1},
            "monthly_budget_usd": 1,
        }
    )
    world.rehearsal.faults(invalid=0.5, truncated=0.5)
    run, [shard] = shards_of(world, job, world.write("a.jsonl", texts(20)))
    booked = []
    for _ in range(3):
        submit(world.site, run, shard)
        list(pauses(world.site, run, shard))
        world.rehearsal.faults()
        word = collect(world.site, run, shard)
        settle_attempts(world.site, shard, world.site.ledger.attempts(shard))
        booked.append(float(spent(world)))
    assert word is not None
    assert len({attempt.claim.model for attempt in world.site.ledger.attempts(shard)}) == 2
    assert booked[1] == pytest.approx(booked[0], rel=0.25), "what waits for its turn is still booked"
    assert booked[2] == pytest.approx(world.rehearsal.bill()["usd"], abs=1e-6)


def test_asking_again_leaves_the_money_that_the_runs_other_shards_need(world):
    policy = {"max_requests_per_shard": 10, "retry": {"invalid": 3}}
    go(world, world.job(policy=policy), world.write("a.jsonl", texts(100)))
    job = world.job(prompt="user:\nOnce more: {{ text }}\n", policy=policy)
    estimate = site_estimate(world, begin(world.site, job, pattern=world.write("b.jsonl", texts(60)), dates={}, scheduled=False))
    world.rehearsal.faults(invalid=1.0)
    tight = world.job(prompt="user:\nOnce more: {{ text }}\n", policy={**policy, "monthly_budget_usd": float(estimate) * 1.2})
    run, shards = shards_of(world, tight, world.write("b.jsonl", texts(60)))
    word = None
    while word is None:  # the first comes to its end before another is sent
        submit(world.site, run, shards[0])
        list(pauses(world.site, run, shards[0]))
        word = collect(world.site, run, shards[0])
    summary = drive(world.site, run, ask=lambda run, planned: True)
    assert (summary.state, summary.outcomes["invalid"]) == ("held", 60), "each row was asked, and has its outcome"


def test_what_was_left_of_another_month_bounds_nothing(world):
    """Approved on its last day, harvested in the next month, whose budget is untouched."""
    clock = Clock()
    world.site = replace(world.site, now=clock)
    go(world, world.job(), world.write("a.jsonl", texts(20)))
    cost = spent_on(world)
    job = world.job(policy={"retry": {"invalid": 1}, "monthly_budget_usd": float(cost) * 1.2})
    world.rehearsal.faults(invalid=1.0)
    run, [shard] = shards_of(world, job, world.write("b.jsonl", texts(20, 100)))
    submit(world.site, run, shard)
    list(pauses(world.site, run, shard))
    clock.pass_by(days=20)
    collect(world.site, run, shard)
    assert world.site.ledger.attempts(shard)[0].ended.remaining > 10


def spent_on(world: World) -> Decimal:
    """What the bill says, as a month's budget."""
    return Decimal(str(world.rehearsal.bill()["usd"]))


def test_what_waits_for_its_turn_is_counted_once(world):
    """What is put aside for all is still held when the first of them are harvested."""
    retry = {"invalid": {"times": 1, "model": "gpt-5.4"}, "truncated": 2}
    go(world, world.job(), world.write("a.jsonl", texts(40)))
    before = spent_on(world)
    world.rehearsal.faults(invalid=0.5, truncated=0.5)
    free = go(world, world.job(prompt="user:\nOnce: {{ text }}\n", policy={"retry": retry}), world.write("b.jsonl", texts(40)))
    world.rehearsal.faults(invalid=0.5, truncated=0.5)
    needed = spent_on(world) - before
    tight = world.job(prompt="user:\nTwice: {{ text }}\n", policy={"retry": retry, "monthly_budget_usd": float(needed) * 1.25})
    bound = go(world, tight, world.write("b.jsonl", texts(40)))
    assert bound.paid == pytest.approx(free.paid, rel=0.15)


def asked_once(world: World):
    """A run whose one shard has only answers that are to be asked again."""
    job = world.job(policy={"retry": {"invalid": 1}, "monthly_budget_usd": 1})
    world.rehearsal.faults(invalid=1.0)
    run, [shard] = shards_of(world, job, world.write("a.jsonl", texts(10)))
    submit(world.site, run, shard)
    list(pauses(world.site, run, shard))
    collect(world.site, run, shard)
    return run, shard


def test_what_was_put_aside_is_free_once_its_attempt_is_refused_for_good(world):
    run, shard = asked_once(world)
    world.rehearsal.faults(create_quota=1)
    with pytest.raises(QuotaExhausted):
        submit(world.site, run, shard)
    account = Account(world.site.store, f"spending/{world.site.now():%Y-%m}/job-reviews")
    assert book(account, "another", 99, limit=1) == Full(account.total, 0, ANY)
    assert account.total == spent_on(world)
    drive(world.site, run, ask=lambda run, planned: True)
    assert account.total == pytest.approx(spent_on(world), abs=Decimal("1e-6")), "and who goes on books it anew"


@pytest.mark.parametrize("requests", [7, 9, 11, 13])
def test_a_harvest_that_died_asks_as_many_again_when_it_is_repeated(world, monkeypatch, requests):
    world.rehearsal.faults(invalid=1.0)
    job = world.job(policy={"retry": {"invalid": 1}, "monthly_budget_usd": 1})
    run, [shard] = shards_of(world, job, world.write("a.jsonl", texts(requests)))
    submit(world.site, run, shard)
    list(pauses(world.site, run, shard))
    with monkeypatch.context() as patched:
        patched.setattr("nightshift.answer_writer.AnswerWriter.write", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            collect(world.site, run, shard)
    collect(world.site, run, shard)
    assert world.site.ledger.attempts(shard)[0].ended.remaining == requests


def test_what_an_attempt_in_flight_costs_is_entered_though_another_one_is_refused(world):
    """A worker sleeps past its lease before its create call; another one sends; then the first one's call is refused for good."""
    clock = Clock(datetime.now(UTC))
    world.site = replace(world.site, now=clock)
    run, shard = asked_once(world)
    provider = world.site.open_provider(run.job.spec.request)
    create = provider.create

    def sleeps(order, may_send):
        provider.create = create
        clock.pass_by(minutes=5)
        assert submit(world.site, run, shard) is not None
        raise QuotaExhausted("no credit")

    provider.create = sleeps
    with pytest.raises(QuotaExhausted):
        submit(world.site, run, shard)
    assert len(world.site.ledger.attempts(shard)) == 3
    drive(world.site, run, ask=lambda run, planned: True)
    assert spent(world) == pytest.approx(spent_on(world), abs=Decimal("1e-6"))


@pytest.mark.parametrize(
    ("second", "funded_by"),
    [
        pytest.param(Ended(how="refused", status="refused", ended_at=NOON, remaining=10), 1, id="refused"),
        pytest.param(Ended(how="queue_full", status="failed", ended_at=NOON, remaining=10), 1, id="no room"),
        pytest.param(Ended(how="lost", status="lost", ended_at=NOON, remaining=10), None, id="lost, and perhaps paid"),
        pytest.param(None, None, id="dead, and perhaps sent"),
    ],
)
def test_what_was_put_aside_pays_for_one_attempt(second, funded_by):
    claim = Claim(token="t", owner="o", claimed_at=NOON, where="w", run="r", provider="openai", model="m", asked=10)
    again = claim.model_copy(update={"after": (1,)})
    harvested = Ended(how="harvested", status="completed", ended_at=NOON, remaining=10)
    attempts = [Attempt(number=1, claim=claim, ended=harvested), Attempt(number=2, claim=again, ended=second)]
    assert _funded_by(again, 3, attempts) == funded_by
    assert _funded_by(again, 2, attempts) == 1
    assert _funded_by(claim, 1, attempts) is None


def test_a_portion_is_booked_as_the_whole_shard_while_nothing_of_it_is_answered(world):
    run, [shard] = shards_of(world, world.job(policy={"monthly_budget_usd": 1}), world.write("a.jsonl", texts(20)))
    claim = first_claim(world.site, run, shard)
    book_attempt(world.site, run, world.site.ledger.shard(shard), claim.model_copy(update={"asked": 5, "most": 5}), [])
    assert spent(world) == site_estimate(world, run)


def test_what_cannot_be_uploaded_is_not_booked(world, monkeypatch):
    run, [shard] = shards_of(world, world.job(policy={"monthly_budget_usd": 1}), world.write("a.jsonl", texts(20)))

    def denied(token, path):
        raise AccessDenied("x", "no")

    monkeypatch.setattr(world.site.open_provider(run.job.spec.request), "upload", denied)
    with pytest.raises(AccessDenied):
        submit(world.site, run, shard)
    assert spent(world) == 0


def test_what_was_booked_before_the_month_turned_is_not_booked_again(world):
    clock = Clock()
    world.site = replace(world.site, now=clock)
    run, [shard] = shards_of(world, world.job(policy={"monthly_budget_usd": 1}), world.write("a.jsonl", texts(20)))
    book_first(world.site, run, shard)
    first = spent(world)
    clock.pass_by(days=31)
    book_first(world.site, run, shard)
    assert (first > 0, spent(world)) == (True, 0)


def test_a_budget_that_is_set_while_a_shard_is_asked_again_counts_that(world):
    run, _ = asked_once(world)
    first = spent_on(world)
    world.site = replace(world.site, monthly_budget=lambda connection: Decimal(1))
    drive(world.site, run, ask=lambda run, planned: True)
    account = Account(world.site.store, f"spending/{world.site.now():%Y-%m}/connection-openai_default")
    assert account.total == pytest.approx(spent_on(world) - first, abs=Decimal("1e-6"))


@pytest.mark.parametrize("requests", [7, 11, 13, 30, 77])
def test_who_decides_again_after_a_crash_asks_as_many_again(requests):
    """With what the first has put aside: sums of quotients, rounded, let one request fall, or decided anew for ever."""
    booked = []

    class Taken:
        def book(self, usd: Decimal, *, is_owed: bool) -> bool:
            booked.append(usd)
            return usd <= left + BILLIONTH

    prices = {"a": Decimal("0.008756") / requests, "b": Decimal("0.002595") / requests}
    left = Decimal("0.011351")
    for _ in range(3):
        budget = RetryBudget(booked[-1] if booked else left, lambda variant: prices[variant], Taken())
        assert all(budget.pays(variant) for variant in "ab" * requests)
        assert budget.put_aside()
    assert len(set(booked)) == 1


def first_claim(site, run, shard: str) -> Claim:
    facts = site.ledger.shard(shard)
    where, model = site.open_provider(run.job.spec.request).where, facts.model
    return Claim(token="t", owner="o", claimed_at=NOON, where=where, run=run.uri, provider="openai", model=model, asked=facts.request_count)


def book_first(site, run, shard: str) -> None:
    book_attempt(site, run, site.ledger.shard(shard), first_claim(site, run, shard), [])


def test_a_shard_that_fits_only_if_others_turn_out_cheaper_is_held_and_not_for_ever(world):
    clock = Clock()
    world.site = replace(world.site, now=clock)
    job = world.job(policy={"max_requests_per_shard": 10})
    run, shards = shards_of(world, job, world.write("a.jsonl", texts(20)))
    estimate = site_estimate(world, run)
    bounded = replace(world.site, monthly_budget=lambda connection: estimate)
    book_first(bounded, run, shards[0])
    with pytest.raises(ShardHeld, match="until others in flight are paid"):
        book_first(bounded, run, shards[1])
    clock.at += PATIENCE + timedelta(minutes=1)
    with pytest.raises(BudgetExceeded):
        book_first(bounded, run, shards[1])


def test_a_budget_that_is_full_leaves_no_booking_in_another_and_an_attempt_that_came_to_nothing_none_at_all(world):
    job = world.job(policy={"max_requests_per_shard": 10, "monthly_budget_usd": 1})
    run, shards = shards_of(world, job, world.write("a.jsonl", texts(20)))
    month = f"spending/{world.site.now():%Y-%m}/job-reviews"
    full = replace(world.site, monthly_budget=lambda connection: Decimal("0.000001"))
    with pytest.raises(BudgetExceeded, match="the monthly budget of openai_default"):
        book_first(full, run, shards[0])
    assert Account(world.site.store, month).total == 0
    book_first(world.site, run, shards[0])
    assert Account(world.site.store, month).total > 0
    refused = Ended(how="refused", status="refused", ended_at=NOON, remaining=10)
    claim = Claim(token="t", owner="o", claimed_at=NOON, where="w", run=run.uri, provider="openai", model="gpt-5.4-nano", asked=10)
    settle_attempts(world.site, shards[0], [Attempt(number=1, claim=claim, ended=refused)])
    assert Account(world.site.store, month).total == 0


def test_two_who_settle_the_same_at_once_settle_it_once(account):
    book(account, "a", 10)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: account.settle("a", Decimal(6), now=NOON), range(16)))
    assert account.total == 6
