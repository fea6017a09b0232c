"""submit: make sure that a shard is with the provider exactly once, from any attempt, any run, any machine.

The input file is uploaded before the claim, so that a claim covers one short create call. A claim without a receipt
is looked up at the provider by its token before anything is sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from functools import partial
from itertools import islice
from pathlib import Path

import orjson

from nightshift.budgets import book_attempt, give_back, has_put_aside, settle_attempts
from nightshift.errors import (
    BudgetExceeded,
    Interrupted,
    LedgerCorrupt,
    Permanent,
    QueueFull,
    ShardHeld,
    SubmissionInDoubt,
    Transient,
    WrongPlace,
)
from nightshift.job import Job
from nightshift.money.estimate import sum_estimates
from nightshift.packing import asked_from, estimate_shards
from nightshift.providers.forms import form_of, vary_line
from nightshift.providers.protocol import Form, Order, Provider
from nightshift.runs import Run, Site, load_run, work_of
from nightshift.shapes import Estimate, Plan, ProviderName, Receipt, Shard, Variant
from nightshift.stores.ledger import (
    CREATE_TIMEOUT,
    LEASE,
    QUEUE_PAUSE,
    Attach,
    Attempt,
    Claim,
    Done,
    Ended,
    Hold,
    Lease,
    Search,
    Send,
    is_stuck,
    next_move,
    portion,
)
from nightshift.stores.shards import Left, asked, harvested, key_of_line, next_asked, pending, requests_key, shared_lines, whom
from nightshift.texts import Texts

OWNER_PAUSE = timedelta(seconds=60)  # between two looks at a shard that another run has reserved and has not sent
OWNER_PATIENCE = timedelta(hours=6)
CLAIMED = "another worker holds its claim"


def submit(site: Site, run: Run, shard: str) -> Receipt | None:
    """The receipt of a shard's current attempt; None once the shard is settled.

    Raises ShardHeld while somebody else holds a fresh claim or the provider's queue is full, and WrongPlace where the
    run's connection leads elsewhere than the claim that has to be looked up.
    """
    if site.ledger.settled(shard) is not None:
        return None
    attempts = site.ledger.attempts(shard)
    match next_move(attempts, now=site.now()):
        case Done():
            return None
        case Attach(receipt=receipt):
            return receipt
        case Hold(until=until, why=why):
            raise ShardHeld(shard, why, (until - site.now()).total_seconds())
        case Search(attempt=number) as search:
            return find(site, shard, search, partial(open_where, site, run, shard)) or _send(site, run, shard, number, attempts)
        case Send(attempt=number):
            return _send(site, run, shard, number, attempts)


def open_where(site: Site, run: Run, shard: str, attempt: Attempt) -> Provider:
    """The run's provider, where it is the place at which an attempt was claimed. Raises WrongPlace where it is another."""
    provider = _provider(site, run, attempt.claim.provider)
    if provider.where != attempt.claim.where:
        raise WrongPlace(shard, attempt.claim.where, provider.where)
    return provider


def may_pay(site: Site, run: Run, shard: str) -> bool:
    """Whether a run may send a shard, or ask again what is left of it: its own always, an adopted one if its bounds allow for it.

    A run that adopts has been approved for its own requests only. Where what it has adopted does not fit into its budget
    beside them, the run that has reserved it is waited for. Raises BudgetExceeded once that has been for long. What it has decided
    to ask again itself it may.
    """
    approved = site.store.get_shape(run.key("approved.json"), Plan)
    bound = run.job.spec.policy.bound
    if approved is None or shard not in approved.adopted_shards or bound is None:
        return True
    attempts = site.ledger.attempts(shard)
    if has_put_aside(run, harvested(attempts), attempts):
        return True
    total = sum_estimates(run.job, [approved.estimate, _liabilities(site, run, approved, shard)]).usd
    if fits(total, bound):
        return True
    if approved.approved_at is not None and site.now() - approved.approved_at > OWNER_PATIENCE:
        raise BudgetExceeded(total or Decimal(0), bound, "what the run may spend unasked")
    return False


def fits(total: Decimal | None, bound: Decimal) -> bool:
    """Whether a cost is within what a run may spend unasked; an unknown one is not."""
    return total is not None and total <= bound


def _liabilities(site: Site, run: Run, approved: Plan, shard: str) -> Estimate:
    """What the adopted shards cost that this run has sent any of, or would send because nobody else has; `shard` is the next of them."""
    attempts = {adopted: site.ledger.attempts(adopted) for adopted in approved.adopted_shards}
    own = [
        adopted
        for adopted, made in attempts.items()
        if not made or adopted == shard or any(attempt.claim.run == run.uri for attempt in made)
    ]
    return estimate_shards(site.store, run.job, map(site.ledger.shard, own))


def payer_of(site: Site, run: Run, attempt: Attempt) -> Run:
    """The run that pays for an attempt: its deadline, retries and budget count, not those of a run that has adopted the shard."""
    return run if attempt.claim.run == run.uri else load_run(site.store, attempt.claim.run)


def find(site: Site, shard: str, search: Search, open_attempt: Callable[[Attempt], Provider]) -> Receipt | None:
    """A batch that an attempt left behind when it died; its receipt is written late, under its own attempt.

    `open_attempt`: the provider, where it is the place at which an attempt was claimed; raises WrongPlace where it is another.
    """
    places: dict[ProviderName, list[Attempt]] = {}
    providers: dict[ProviderName, Provider] = {}
    for attempt in search.doubtful:
        providers[attempt.claim.provider] = open_attempt(attempt)
        places.setdefault(attempt.claim.provider, []).append(attempt)
    if not site.ledger.take_lease(shard, search.lapsed, Lease(owner=site.owner, since=site.now())):
        raise ShardHeld(shard, CLAIMED, LEASE.total_seconds())
    for name, attempts in places.items():
        tokens = {attempt.claim.token: attempt.number for attempt in attempts}
        receipt = providers[name].find(list(tokens), attempts[0].claim.claimed_at)
        if receipt is not None:
            return site.ledger.record_receipt(shard, tokens[receipt.token], receipt)
    return None


def _send(site: Site, run: Run, shard: str, number: int, attempts: list[Attempt]) -> Receipt:
    """Upload, book, claim, create, record. Whatever happens in between is found again by the claim's token."""
    if not may_pay(site, run, shard):
        why = "the run that has reserved it is to send it (what it costs does not fit into what this run may spend unasked)"
        raise ShardHeld(shard, why, OWNER_PAUSE.total_seconds())
    facts, claim = site.ledger.shard(shard), _next_claim(site, run, shard, number, attempts)
    book_attempt(site, run, facts, claim, attempts, only_look=True)  # nothing is uploaded for what does not fit
    provider = _provider(site, run, claim.provider)
    with site.scratch() as folder:
        path, count = _write_requests(site, facts, claim, _most_bytes(run.job, claim, provider), Path(folder))
        if count < claim.asked:
            claim = claim.model_copy(update={"asked": count, "most": count})
        try:
            uploaded = provider.upload(claim.token, path)
        except Permanent:
            give_back(site, shard, claim, number, attempts)
            raise
        book_attempt(site, run, facts, claim, attempts)
        order = Order(
            uploaded=uploaded,
            model=claim.model,
            token=claim.token,
            work=work_of(shard, claim),
            labels={"shard": shard[:12], "job": run.job.name, "attempt": str(number)},
            window=run.job.patience,
        )
        return pay(site, provider, shard, claim, order, attempts)


def pay(site: Site, provider: Provider, shard: str, claim: Claim, order: Order, attempts: list[Attempt]) -> Receipt:
    """The one call that costs: claim, create, record. `attempts`: those before it."""
    number = len(attempts) + 1
    claim = claim.model_copy(update={"claimed_at": site.now()})
    if not site.ledger.claim(shard, number, claim):
        raise ShardHeld(shard, CLAIMED, LEASE.total_seconds())
    with _refusals_recorded(site, shard, number, claim, attempts):
        receipt = provider.create(order, Holding(site, shard, Attempt(number=number, claim=claim)))
    return site.ledger.record_receipt(shard, number, receipt)


def _next_claim(site: Site, run: Run, shard: str, number: int, attempts: list[Attempt]) -> Claim:
    """What the next attempt asks: what is left, of one model of one provider, and no more than the provider's queue has shown to hold."""
    facts = site.ledger.shard(shard)
    after = (*((0,) if facts.seeded else ()), *harvested(attempts))
    left = next_asked(pending(site.store, shard, after), facts)
    if not left:
        raise LedgerCorrupt(f"shards/{shard}", "its attempts leave nothing to ask, and none of them says so")
    count, first = len(left), next(iter(left.values()))
    name, model = whom(first.variant if first else Variant(), facts)
    name = asked_from(name, count, facts.least if name == facts.provider else 1)
    provider = _provider(site, run, name)
    most = portion(attempts) or count
    if name != facts.provider:  # whose batches the shard was not cut for
        most = min(most, provider.limits(model).requests)
    return Claim(
        token=site.ledger.token(shard, number),
        owner=site.owner,
        claimed_at=site.now(),
        where=provider.where,
        run=run.uri,
        provider=name,
        model=model,
        asked=min(count, most),
        after=after,
        most=most if most < count else None,
    )


def _most_bytes(job: Job, claim: Claim, provider: Provider) -> int:
    """What the input file of an attempt may hold: as the job says of its own provider, else as the provider does."""
    given = job.spec.request.limits.max_bytes if claim.provider == job.spec.request.provider else None
    return given or provider.limits(claim.model).request_bytes


def _provider(site: Site, run: Run, name: ProviderName) -> Provider:
    """A provider by its name, through the job's own connection."""
    return site.open_provider(run.job.spec.request.model_copy(update={"provider": name}))


class Holding:
    """Asked before a create call goes out: whether the claim is still ours, renewing its lease in time.

    A process that slept past its lease finds it taken over, or leaves it to be, and sends nothing. One that is stopped raises Interrupted.
    """

    def __init__(self, site: Site, shard: str, attempt: Attempt) -> None:
        self._site, self._shard, self._attempt = site, shard, attempt

    def __call__(self) -> bool:
        now = self._site.now()
        if self._site.stopped():
            raise Interrupted("Stopped before the next call went out.")
        if now >= self._attempt.lapses_at:
            return False
        if now <= self._attempt.lapses_at - 2 * CREATE_TIMEOUT:
            return True
        lease = Lease(owner=self._site.owner, since=now)
        if not self._site.ledger.take_lease(self._shard, self._attempt, lease):
            return False
        self._attempt = replace(self._attempt, leases=(*self._attempt.leases, lease))
        return True


@contextmanager
def _refusals_recorded(site: Site, shard: str, attempt: int, claim: Claim, before: list[Attempt]) -> Iterator[None]:
    """A refused create call ends its attempt, so that the next one need not wait for the claim to lapse. A doubt does not.

    Where the provider has as many batches as it takes, the shard waits for a place: it is held, for some time.
    """
    try:
        yield
    except SubmissionInDoubt:
        raise
    except QueueFull as error:
        ended = Ended(how="queue_full", status="refused", ended_at=site.now(), remaining=claim.asked, reasons=(str(error)[:500],))
        site.ledger.record_end(shard, attempt, ended)
        settle_attempts(site, shard, site.ledger.attempts(shard))
        if is_stuck(before, site.now()):
            raise
        raise ShardHeld(shard, "the provider's queue is full", QUEUE_PAUSE.total_seconds()) from error
    except (Permanent, Transient) as error:
        if isinstance(error, Permanent):
            give_back(site, shard, claim, attempt, before)
        ended = Ended(how="refused", status="refused", ended_at=site.now(), remaining=claim.asked, reasons=(str(error)[:500],))
        site.ledger.record_end(shard, attempt, ended)
        settle_attempts(site, shard, site.ledger.attempts(shard))
        raise


def _write_requests(site: Site, facts: Shard, claim: Claim, most_bytes: int, folder: Path) -> tuple[Path, int]:
    """The lines of one attempt as a local file: the shard's as they stand, or those to be asked again, as they are asked now.

    With how many requests they ask: of the claim's as many as fit. What is shown its answer is longer than it was (F19).
    """
    path = site.store.download(requests_key(facts.key), folder / "requests.jsonl")
    form = form_of(facts.endpoint)
    if not claim.after and claim.asked == facts.request_count and form.inputs_per_line == 1:
        return path, claim.asked
    rest, count = folder / "rest.jsonl", 0
    with closing(Texts(folder)) as texts, path.open("rb") as source, rest.open("wb") as target:
        chosen = asked(site.store, facts, claim, texts.put)
        lines = (_line(line, chosen[key], form, texts) for line in source if (key := key_of_line(line)) in chosen)
        for group in shared_lines(chosen, form.inputs_per_line):
            line = _folded(list(islice(lines, len(group))), form)
            if count and target.tell() + len(line) > most_bytes:
                break
            target.write(line)
            count += len(group)
    return rest, count


def _folded(lines: list[bytes], form: Form) -> bytes:
    """Lines of requests as the one that they share; it goes by the id of the first."""
    if len(lines) == 1:
        return lines[0]
    opened = [form.opened(line) for line in lines]
    return form.line(opened[0][0], orjson.dumps(form.fold([body for _, body in opened]))) + b"\n"


def _line(line: bytes, left: Left | None, form: Form, texts: Texts) -> bytes:
    return line if left is None else vary_line(form, line.rstrip(b"\n"), left.variant, texts.get(left.text), left.reason) + b"\n"
