"""approve: compare the estimate with the job's budget: pass, ask a person, or stop; then reserve what is to be bought.

Deciding is here, asking is the caller's. A plan can be hours old by the time it is approved, and another run may have been
planned beside it: what somebody else has bought or reserved meanwhile is taken out of it, never bought a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from nightshift.budgets import Budget, budgets_of
from nightshift.columns import copy_kept
from nightshift.errors import ApprovalNeeded, BudgetExceeded
from nightshift.packing import ANSWERED, IN_FLIGHT, estimate_shards, freeze, mark_answered, mark_in_flight, wanted_of, whole_lines
from nightshift.pages import measured_on, stated, usd
from nightshift.providers.forms import form_of
from nightshift.runs import Run, Site, salt_of
from nightshift.shapes import PAID_OUTCOMES, Outcome, Plan, Shard
from nightshift.stores.accounts import Account
from nightshift.stores.answers import Reservation, seen
from nightshift.stores.database import open_database
from nightshift.stores.shards import key_of_line, open_answers, request_keys, requests_key

if TYPE_CHECKING:
    import duckdb

SHOWN_REQUESTS, SHOWN_CHARACTERS, SHOWN_BYTES = 3, 300, 1 << 18  # of what is asked, to the person who is to say yes


@dataclass(frozen=True, slots=True)
class Pass:
    """Nothing stands against it."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A person has to say yes: the estimate is over the limit, or there is no price to estimate with."""

    limit: Decimal


@dataclass(frozen=True, slots=True)
class Stop:
    """Over a budget, whoever says yes."""

    budget: Budget
    spent: Decimal


def decide(plan: Plan, limit: Decimal | None, budgets: Sequence[tuple[Budget, Decimal]] = ()) -> Pass | Ask | Stop:
    """What the estimate allows. A run that sends nothing always passes; an unknown price asks wherever money is bounded.

    `limit`: what passes without asking; `budgets`: each with what is spent of it.
    """
    if plan.submitted == 0:
        return Pass()
    estimate = plan.estimate.usd
    if estimate is None:
        bounds = [*([] if limit is None else [limit]), *(budget.limit - spent for budget, spent in budgets)]
        return Ask(min(bounds)) if bounds else Pass()
    for budget, spent in budgets:
        if spent + estimate > budget.limit:
            return Stop(budget, spent)
    if limit is not None and estimate > limit:
        return Ask(limit)
    return Pass()


def approve(site: Site, run: Run, plan: Plan, *, ask: Callable[[], bool]) -> Plan:
    """Let a run pass and reserve its shards, or stop it: the plan as it is carried out. A repeated call finds the first.

    `ask` is called only where a person has to say yes. Raises BudgetExceeded, or ApprovalNeeded where nobody does; nothing
    is reserved then.
    """
    stored = site.store.get_shape(run.key("approved.json"), Plan)
    if stored is not None:
        return stored
    _let_pass(site, run, plan, ask)

    def weigh(revised: Plan) -> None:
        if is_dearer(revised, plan):  # what others have taken out can leave less than a batch, and that costs more
            _let_pass(site, run, revised, ask)

    reserved = reserve(site, run, plan, weigh=weigh)
    return site.store.settle(run.key("approved.json"), reserved.model_copy(update={"approved_at": site.now()}))


def _let_pass(site: Site, run: Run, plan: Plan, ask: Callable[[], bool]) -> None:
    match weighed(site, run, plan):
        case Stop(budget, spent):
            raise BudgetExceeded(plan.estimate.usd or Decimal(0), budget.limit, budget.name, spent)
        case Ask(limit) if not ask():
            raise ApprovalNeeded(plan.estimate.usd, limit)


def weighed(site: Site, run: Run, plan: Plan) -> Pass | Ask | Stop:
    """What the estimate of a plan allows now, with what is spent of every budget."""
    budgets = [(budget, Account(site.store, budget.account).total) for budget in budgets_of(site, run)]
    return decide(plan, run.job.spec.policy.approve_above_usd, budgets)


def must_ask(site: Site, run: Run, plan: Plan) -> bool:
    """Whether a person has to say yes, and has not done so yet."""
    return isinstance(weighed(site, run, plan), Ask) and site.store.head(run.key("approved.json")) is None


def is_dearer(revised: Plan, plan: Plan) -> bool:
    """Whether a plan is estimated above another one."""
    return revised.estimate.usd is not None and plan.estimate.usd is not None and revised.estimate.usd > plan.estimate.usd


def reserve(site: Site, run: Run, plan: Plan, *, weigh: Callable[[Plan], None]) -> Plan:
    """Add the run's reservation to the log of its fingerprint; the plan less what others have by then. `weigh` may stop it before.

    The log's next number is taken only by who has read everything before it: where another run was quicker, its
    reservation is read as well, and the number after it is tried.
    """
    answers = site.answers(plan.fingerprint)
    while True:
        reservations, number = answers.reservations()
        for reservation in reservations.values():
            if reservation.run == run.uri:
                return reservation.plan
        revised = _revised(site, run, plan, answers.in_flight(reservations))
        weigh(revised)
        if not revised.own_shards or answers.reserve(number, Reservation(run=run.uri, plan=revised)):
            return revised


def _revised(site: Site, run: Run, plan: Plan, in_flight: list[str]) -> Plan:
    """The plan as it stands now: unchanged, or without the requests that somebody has bought or reserved since it was made."""
    answers = site.answers(plan.fingerprint)
    files = answers.files()
    if run.input.fresh or seen(files, in_flight) == plan.seen:
        return plan
    planned = [site.ledger.shard(key) for key in plan.own_shards]
    with site.scratch() as folder, open_database(Path(folder)) as database:
        _load_keys(site, database, planned)
        outcomes: tuple[Outcome, ...] = ("succeeded",) if run.input.redrive else PAID_OUTCOMES  # a redrive buys failures anew
        reused = mark_answered(database, answers, files, run.job.spec.stand_ins, outcomes)
        adopted = mark_in_flight(site, database, in_flight)
        own = [_without_known(site, run, Path(folder), database, shard, number) for number, shard in enumerate(planned)]
        counts = dict(database.execute("SELECT coalesce(known, ''), count(*) FROM requests GROUP BY 1").fetchall())
    kept = [shard for shard in own if shard is not None]
    adopted_shards = tuple(dict.fromkeys([*plan.adopted_shards, *adopted]))
    return plan.model_copy(
        update={
            "reused": plan.reused + counts.get(ANSWERED, 0),
            "adopted": plan.adopted + counts.get(IN_FLIGHT, 0),
            "submitted": counts.get("", 0),
            "shards": (*(shard.key for shard in kept), *adopted_shards),
            "adopted_shards": adopted_shards,
            "answers": tuple(dict.fromkeys([*plan.answers, *reused])),
            "estimate": estimate_shards(site.store, run.job, kept),
        }
    )


def _load_keys(site: Site, database: duckdb.DuckDBPyConnection, shards: list[Shard]) -> None:
    """The requests of some shards, each with its shard's place in the list."""
    database.execute("CREATE TABLE requests (key BLOB, shard INTEGER, known VARCHAR)")
    for number, shard in enumerate(shards):
        found = pa.table({"key": pa.array(request_keys(site.store, shard.key), pa.binary(32))})
        database.execute(f"INSERT INTO requests SELECT key, {number}, NULL FROM found")
        del found


def _without_known(site: Site, run: Run, folder: Path, database: duckdb.DuckDBPyConnection, shard: Shard, number: int) -> Shard | None:
    """A shard less the requests that others have: the same one where there are none, and None where nothing is left.

    One that somebody has settled meanwhile, with failures only, is frozen again under another name.
    """
    known = {bytes(key) for (key,) in database.execute(f"SELECT key FROM requests WHERE shard = {number} AND known IS NOT NULL").fetchall()}
    if not known and site.ledger.settled(shard.key) is None:
        return shard
    places, start = [], 0
    lines = whole_lines(site.store.download(requests_key(shard.key), folder / "spool.jsonl"))
    with lines.path.open("rb") as file:
        for line in file:
            if (key := key_of_line(line)) not in known:
                places.append((key, start, len(line), shard.request_bytes // shard.request_count))
            start += len(line)
    if not places:
        return None
    group = wanted_of(places)
    before = _seed(site, shard, group, folder / "seed.parquet") if shard.seeded else None
    return freeze(site, run.job.spec.request, shard.fingerprint, lines, group, least=shard.least, salt=salt_of(run), before=before)


def _seed(site: Site, shard: Shard, group: pa.Table, path: Path) -> Path:
    """What became before of some of the requests that a shard drives again, as an answers file."""
    with open_answers(site.store, shard.key, 0) as file:
        keys = file.read(["request_key"], use_threads=False).column("request_key")
        return copy_kept(file, pc.is_in(keys, group.column("key").cast(keys.type)).to_numpy(), path)


def question(run: Run, plan: Plan, *, with_sample: bool = True) -> str:
    """What a person needs to know to say yes, as Markdown: the estimate, what is reused, and what a few of the requests say."""
    estimate, shown = plan.estimate, sample_of(run, plan) if with_sample else []
    saved = "" if plan.saved_usd is None else f"\n| spared by reuse and duplicates | {usd(plan.saved_usd)} |"
    cost = "unknown (no price for this model)" if estimate.usd is None else stated(estimate)
    fenced = "\n\n".join(text.replace("`", "'") for text in shown)  # what rows say is no Markdown of ours
    return (
        f"`{run.job.name}` wants to send **{plan.submitted:,} requests** to `{run.job.spec.request.model}`.\n\n"
        f"| | |\n|---|---|\n| estimated cost | {cost} |\n| rows | {plan.rows:,} |\n| rejected, never sent | {plan.rejected:,} |\n"
        f"| duplicates | {plan.duplicates:,} |\n| answered earlier, reused | {plan.reused:,} |{saved}\n"
        f"| tokens | {estimate.input_tokens:,} in, {estimate.output_tokens:,} out ({measured_on(estimate)}) |\n\n"
        f"Prices: {estimate.basis}." + (f"\n\nThe first of what is asked:\n\n```\n{fenced}\n```" if fenced else "")
    )


def sample_of(run: Run, plan: Plan) -> list[str]:
    """The texts of the first requests that are to be sent, each in one line and cut short."""
    if not plan.own_shards:
        return []
    key = requests_key(plan.own_shards[0])
    found = run.store.head(key)
    if found is None:
        return []
    lines = run.store.read_range(key, 0, min(found.size, SHOWN_BYTES), None, None).splitlines()
    form = form_of(run.job.spec.request.endpoint)
    whole = lines if found.size <= SHOWN_BYTES else lines[:-1]
    texts = (" ".join(said_in(form.opened(line)[1]).split()) for line in whole[:SHOWN_REQUESTS])
    return [text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …" for text in texts]


def said_in(body: Any) -> str:
    """The words of the last turn of a request's body, whatever form it has."""
    if isinstance(body, str):
        return body
    if isinstance(body, Mapping):
        turns = body.get("messages") or body.get("input") or body.get("inputText")
        inner = turns[-1] if isinstance(turns, list) and turns else turns or body.get("content") or body.get("text") or ""
        return said_in(inner)
    return " ".join(filter(None, map(said_in, body))) if isinstance(body, list) else ""
