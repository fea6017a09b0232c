"""collect: harvest what a batch answered, whatever its end; validate; decide which requests are asked again.

Both result files are read, counters never are. Each request of the attempt gets exactly one line, also when the
provider returned none for it, or two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from nightshift.columns import answers_schema, fit, needs_fitting
from nightshift.errors import BatchLost, BatchRejected, BatchUnknown, CountsDisagree, NightshiftError, ProviderUnavailable, ResultsGone
from nightshift.job import Job
from nightshift.money.estimate import actual_cost, estimate_requests
from nightshift.providers.protocol import Garbage, Provider, Reply, Snapshot
from nightshift.runs import Run, Site
from nightshift.shapes import Outcome, Paid, Plan, Settled, Shard, Usage, Variant
from nightshift.steps.submit import open_where
from nightshift.stores.ledger import QUEUE_PATIENCE, Attach, Attempt, Done, Ended, full_queues, next_move
from nightshift.stores.shards import Left, answers_key, asked, pending, request_keys

NEVER_RAN: dict[str, Outcome] = {"expired": "expired", "cancelled": "cancelled"}  # batch status → outcome of what has no line
RANK: dict[str, int] = {"succeeded": 3, "invalid": 2, "truncated": 2, "refused": 2, "filtered": 2}  # of two lines the better stays
WRITE_ROWS = 8192
AS_IT_WAS = Variant()
LOST_AFTER = timedelta(minutes=2)  # from the first "not known" here; the wait before has looked for longer
FILES_GRACE = timedelta(minutes=10)  # after its end, for a completed batch to show its result files


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One request's line of an answers file: classified, validated, parsed."""

    reply: Reply
    output: dict[str, Any] | None = None
    asked_as: Variant = AS_IT_WAS
    again: Variant | None = None  # how it is asked again; None: this is the last word


def collect(site: Site, run: Run, shard: str) -> Settled | None:
    """Harvest the current attempt. The shard's last word once it is settled, or None when it has to be submitted again.

    Raises BatchRejected when the provider refused the batch as a whole for a reason that a repetition would meet again,
    and BatchLost when it has not known the batch for a while and the job does not say to buy it again.
    """
    ledger = site.ledger
    attempts = ledger.attempts(shard)
    match next_move(attempts, now=site.now()):
        case Attach(attempt=attempt):
            _harvest(site, run, shard, attempt, attempts)
        case Done():
            return ledger.settled(shard) or _settle(site, shard, attempts)
        case _:
            return None
    attempts = ledger.attempts(shard)
    return _settle(site, shard, attempts) if isinstance(next_move(attempts, now=site.now()), Done) else None


def _harvest(site: Site, run: Run, shard: str, attempt: Attempt, attempts: list[Attempt]) -> None:
    """Read everything the batch left, write the attempt's answers, then its end. Repeating it writes the same."""
    provider, batch_id = open_where(site, run, shard, attempt), _batch_of(attempt)
    snapshot = _look(site, run, shard, attempt, attempts, provider)
    if snapshot is None:
        return
    if snapshot.state == "running":
        raise ProviderUnavailable(provider.where, f"batch {batch_id} is still {snapshot.status}.")
    if _is_waiting_for_files(snapshot, site.now()):
        raise ProviderUnavailable(provider.where, f"batch {batch_id} is {snapshot.status} and its result files are not there yet.")
    if snapshot.state == "failed" and not snapshot.bad_lines and not snapshot.result_files:
        _end_without_answers(site, shard, attempt, attempts, snapshot, provider)
        return
    facts = site.ledger.shard(shard)
    left = asked(site.store, shard, attempt.claim, facts.model)
    target = answers_key(shard, attempt.number)
    with site.scratch() as folder:
        try:
            found, alarms = match_replies(list(left), provider.replies(snapshot, Path(folder)))
        except ResultsGone as error:
            if snapshot.ended_at is None or site.now() - snapshot.ended_at < FILES_GRACE:
                raise  # they can lag behind the status; 30 days later they are gone (F61)
            _give_up(site, run, shard, attempt, attempts, provider, error)
            return
        purse = purse_of(site, run, facts, attempts, found.values(), attempt.claim.model)
        again = _again_for(site, run, shard, attempt, left, purse)
        judge = judge_for(run.job)
        answers = (
            (key, again(key, judge(found.pop(key) if key in found else _absent(key, snapshot, position))))
            for position, key in enumerate(left, start=1)
        )
        path = Path(folder) / "answers.parquet"
        origin = {
            "shard": shard,
            "attempt": attempt.number,
            "batch_id": batch_id,
            "answered_at": snapshot.ended_at or site.now(),
            "stand_in": attempt.claim.model if attempt.claim.model != facts.model else None,
        }
        write_answers(path, run.job, answers, origin)
        if site.store.head(target) is None:  # who harvested first has decided what is asked again
            site.store.put(target, path)
    ended = Ended(
        how="harvested",
        status=snapshot.status,
        ended_at=site.now(),
        remaining=len(pending(site.store, shard, (*attempt.claim.after, attempt.number))),
        reasons=tuple(f"{name}: {count}" for name, count in sorted(alarms.items())),
    )
    site.ledger.record_end(shard, attempt.number, ended)


def _look(site: Site, run: Run, shard: str, attempt: Attempt, attempts: list[Attempt], provider: Provider) -> Snapshot | None:
    """One look at an attempt's batch. None: nobody knows it any more, and it is given up (F46)."""
    try:
        snapshot = provider.poll(_batch_of(attempt))
    except BatchUnknown as error:
        since = site.ledger.record_unknown(shard, attempt.number, site.now()).since
        if site.now() - since < LOST_AFTER:
            raise
        _give_up(site, run, shard, attempt, attempts, provider, error)
        return None
    if attempt.unknown:
        site.ledger.forget_unknown(shard, attempt.number)
    return snapshot


def _give_up(
    site: Site, run: Run, shard: str, attempt: Attempt, attempts: list[Attempt], provider: Provider, error: NightshiftError
) -> None:
    """End an attempt whose answers cannot be had any more, where the job says so. Raises BatchLost where it does not."""
    if sum(1 for each in attempts if each.ended and each.ended.how == "lost") >= run.job.spec.policy.retry.lost:
        raise BatchLost(provider.where, _batch_of(attempt)) from error
    lost = Ended(how="lost", status="lost", ended_at=site.now(), remaining=attempt.claim.asked, reasons=(str(error)[:500],))
    site.ledger.record_end(shard, attempt.number, lost)


def _batch_of(attempt: Attempt) -> str:
    return attempt.receipt.batch_id if attempt.receipt else "-"


def _is_waiting_for_files(snapshot: Snapshot, now: datetime) -> bool:
    """Result files can lag behind the status (F60). Without a grace everything would count as missing, and be paid again."""
    if snapshot.status != "completed" or snapshot.result_files:
        return False
    return snapshot.ended_at is None or now - snapshot.ended_at < FILES_GRACE


def _end_without_answers(site: Site, shard: str, attempt: Attempt, attempts: list[Attempt], snapshot: Snapshot, provider: Provider) -> None:
    """The provider failed the batch as a whole: later, when its queue was full; never, for any other reason."""
    full = full_queues([each for each in attempts if each.number < attempt.number])
    stuck = bool(full and full[-1].ended and site.now() - full[-1].ended.ended_at > QUEUE_PATIENCE)
    how = "queue_full" if snapshot.queue_full and not stuck else "rejected"
    ended = Ended(
        how=how,
        status=snapshot.status,
        ended_at=site.now(),
        remaining=attempt.claim.asked,
        alone=how == "queue_full" and not provider.is_busy(),
        reasons=snapshot.reasons[:10],
    )
    site.ledger.record_end(shard, attempt.number, ended)
    if how == "rejected":
        raise BatchRejected(_batch_of(attempt), snapshot.reasons)


def match_replies(keys: list[bytes], replies: Iterable[Reply | Garbage]) -> tuple[dict[bytes, Reply], dict[str, int]]:
    """Replies by request key, and the oddities met: lines twice, lines nobody asked for, lines that cannot be read.

    Of two lines for one request the better outcome stays, of equals the first; tokens of both are counted as paid.
    """
    asked, found, alarms = set(keys), {}, Counter[str]()
    for reply in replies:
        if isinstance(reply, Garbage):
            alarms["unreadable lines"] += 1
            continue
        key = _key_of(reply.custom_id)
        if key is None or key not in asked:
            alarms["lines for unknown requests"] += 1
        elif key not in found:
            found[key] = reply
        else:
            alarms["duplicate lines"] += 1
            found[key] = _better(found[key], reply)
    return found, dict(alarms)


def judge_for(job: Job) -> Callable[[Reply], Answer]:
    """The function that validates a reply under the job's schema; parsing and validating happen once, here."""
    schema = job.answer_schema
    if schema is None:
        return lambda reply: Answer(
            reply=replace(reply, text=None) if reply.outcome == "succeeded" else reply,
            output={"answer": reply.text} if reply.outcome == "succeeded" else None,
        )
    import jsonschema_rs

    validator = jsonschema_rs.validator_for(schema)
    fitted = needs_fitting(schema)

    def judge(reply: Reply) -> Answer:
        if reply.outcome != "succeeded":
            return Answer(reply=reply)
        try:
            value = orjson.loads(reply.text or "")
        except orjson.JSONDecodeError as error:
            return Answer(reply=replace(reply, outcome="invalid", reason=f"not valid JSON: {error.msg}"))
        if not validator.is_valid(value):
            why = next(iter(validator.iter_errors(value))).message[:300]
            return Answer(reply=replace(reply, outcome="invalid", reason=f"breaks the schema: {why}"))
        try:
            output = fit(value, schema) if fitted else value
        except (TypeError, RecursionError) as error:
            return Answer(reply=replace(reply, outcome="invalid", reason=f"fits no column: {error}"))
        return Answer(reply=replace(reply, text=None), output=output)

    return judge


def write_answers(path: Path, job: Job, answers: Iterable[tuple[bytes, Answer]], origin: Mapping[str, Any]) -> None:
    """Write an answers file, one line per request; `origin`: the columns that are the same in every line."""
    schema = answers_schema(job.answer_schema)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        batch: list[dict[str, Any]] = []
        for key, answer in answers:
            batch.append({**_line(key, answer), **origin})
            if len(batch) == WRITE_ROWS:
                writer.write_batch(_as_batch(batch, schema))
                batch = []
        if batch:
            writer.write_batch(_as_batch(batch, schema))


def _as_batch(lines: list[dict[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    """Lines as columns. An answer that is valid but fits no column (an integer of twenty digits) becomes invalid, alone."""
    try:
        return pa.RecordBatch.from_pylist(lines, schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.RecordBatch.from_pylist([_fitting(line, schema.field("output").type) for line in lines], schema=schema)


def _fitting(line: dict[str, Any], kind: pa.DataType) -> dict[str, Any]:
    try:
        pa.scalar(line["output"], kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        text = orjson.dumps(line["output"], option=orjson.OPT_NON_STR_KEYS, default=str).decode()
        return {**line, "outcome": "invalid", "reason": f"fits no column: {error}"[:300], "text": text, "output": None}
    return line


def _line(key: bytes, answer: Answer) -> dict[str, Any]:
    reply = answer.reply
    return {
        "request_key": key,
        "outcome": reply.outcome,
        "reason": reply.reason,
        "text": reply.text,
        "output": answer.output,
        "paid": reply.paid,
        "token_limit": answer.asked_as.max_output_tokens,
        "again": answer.again.model_dump_json(exclude_defaults=True) if answer.again else None,
        "model": reply.model,
        "input_tokens": reply.input_tokens,
        "cached_tokens": reply.cached_tokens,
        "output_tokens": reply.output_tokens,
    }


def _absent(key: bytes, snapshot: Snapshot, position: int) -> Reply:
    custom_id = key.hex()
    if position in snapshot.bad_lines:  # one bad line fails the whole batch (F32): this one is to blame, the others are not
        return Reply(custom_id=custom_id, outcome="errored", reason=snapshot.bad_lines[position])
    if snapshot.state == "failed":
        return Reply(custom_id=custom_id, outcome="errored", reason="another line failed the batch", retryable=True)
    outcome = NEVER_RAN.get(snapshot.status, "missing")
    reason = f"the batch was {outcome}" if outcome != "missing" else f"no line came back though the batch is {snapshot.status}"
    return Reply(custom_id=custom_id, outcome=outcome, reason=reason, retryable=True)


def _again_for(
    site: Site, run: Run, shard: str, attempt: Attempt, left: Mapping[bytes, Left | None], purse: Purse
) -> Callable[[bytes, Answer], Answer]:
    """The function that decides whether and how a request is asked again: by policy, bounded by count and by money."""
    retry, job, history = run.job.spec.policy.retry, run.job, _outcomes_so_far(site, shard, attempt)
    created = attempt.receipt.created_at if attempt.receipt else attempt.claim.claimed_at
    overdue = site.now() - created > job.patience  # the deadline cancelled it: asking again is no use

    def again(key: bytes, answer: Answer) -> Answer:
        reply, before = answer.reply, left[key]
        asked_as = before.variant if before else AS_IT_WAS
        answer = replace(answer, asked_as=asked_as)
        hopeless = (reply.outcome == "errored" and not reply.retryable) or (reply.outcome == "cancelled" and overdue)
        if hopeless or not retry.allows(reply.outcome, history.get(key, Counter())[reply.outcome] + 1):
            return answer
        variant = retry.variant(reply.outcome, asked_as, job.token_limit)
        return replace(answer, again=variant) if purse.pays(variant.model or job.spec.request.model) else answer

    return again


def _outcomes_so_far(site: Site, shard: str, attempt: Attempt) -> dict[bytes, Counter[str]]:
    """How often each request had each outcome in the attempts before. Only requests asked again are in the later ones."""
    history: dict[bytes, Counter[str]] = {}
    for number in attempt.claim.after:
        if number:  # attempt 0 is what became of it before it was driven again
            table = pq.read_table(site.store.open(answers_key(shard, number)), columns=["request_key", "outcome", "again"])
            for line in table.filter(table.column("again").is_valid()).to_pylist():
                history.setdefault(line["request_key"], Counter())[line["outcome"]] += 1
    return history


class Purse:
    """The dollars that are left for asking a shard's requests again; without a budget there is no bound."""

    def __init__(self, dollars: Decimal | None, price: Callable[[str], Decimal | None]) -> None:
        self._dollars, self._price = dollars, price

    def pays(self, model: str) -> bool:
        """Whether one more request can be asked of a model; its estimated price is then taken out."""
        if self._dollars is None:
            return True
        price = self._price(model)
        if price is None or price > self._dollars:
            return False
        self._dollars -= price
        return True


def purse_of(site: Site, run: Run, facts: Shard, attempts: Iterable[Attempt], replies: Iterable[Reply], model: str) -> Purse:
    """What the job's budget leaves for a shard once all its answers so far are paid: its share by requests, less what it cost."""
    budget = run.job.spec.policy.budget_usd
    if budget is None:
        return Purse(None, lambda model: None)
    approved = site.store.get_shape(run.key("approved.json"), Plan)
    share = budget * facts.request_count / max(facts.request_count, approved.submitted if approved else 0)
    usage: dict[str, Usage] = {model: sum((_usage_of(reply) for reply in replies if reply.paid), Usage())}
    for attempt in attempts:
        if attempt.is_harvested:
            before = usage.get(attempt.claim.model, Usage())
            usage[attempt.claim.model] = before + _usage(pq.read_table(site.store.open(answers_key(facts.key, attempt.number))))
    spent = sum((_cost(run.job, model, each) for model, each in usage.items()), Decimal(0))

    @cache
    def price(model: str) -> Decimal | None:
        usd = estimate_requests(run.job, facts.request_count, facts.request_bytes, model=model).usd
        return None if usd is None else usd / facts.request_count

    return Purse(max(Decimal(0), share - spent), price)


def _cost(job: Job, model: str, usage: Usage) -> Decimal:
    """Dollars as far as they are known: answers without usage are left out here, and flagged in the report."""
    return actual_cost(job.spec.request.provider, model, usage.model_copy(update={"unknown": 0})) or Decimal(0)


def _usage_of(reply: Reply) -> Usage:
    return Usage(input_tokens=reply.input_tokens or 0, cached_tokens=reply.cached_tokens, output_tokens=reply.output_tokens or 0)


def _better(first: Reply, second: Reply) -> Reply:
    best = second if RANK.get(second.outcome, 0) > RANK.get(first.outcome, 0) else first
    other = first if best is second else second
    return replace(
        best,
        input_tokens=_sum(best.input_tokens, other.input_tokens),
        output_tokens=_sum(best.output_tokens, other.output_tokens),
        cached_tokens=best.cached_tokens + other.cached_tokens,
    )


def _sum(one: int | None, two: int | None) -> int | None:
    return None if one is None and two is None else (one or 0) + (two or 0)


def _key_of(custom_id: str) -> bytes | None:
    try:
        key = bytes.fromhex(custom_id)
    except ValueError:
        return None
    return key if len(key) == 32 else None


def _settle(site: Site, shard: str, attempts: list[Attempt]) -> Settled:
    """Merge the attempts into one line per request, keep it under the fingerprint, and write the shard's last word."""
    facts = site.ledger.shard(shard)
    answers = site.answers(facts.fingerprint)
    tables = {each.number: pq.read_table(site.store.open(answers_key(shard, each.number))) for each in attempts if each.is_harvested}
    merged = _merge(pa.concat_tables(tables.values()))
    check_shard(facts, attempts, tables, request_keys(site.store, shard), merged)
    with site.scratch() as folder:
        path = Path(folder) / "answers.parquet"
        pq.write_table(merged, path, compression="zstd")
        site.store.put(answers.file_of(shard), path)
    return site.ledger.settle(
        Settled(
            shard=shard,
            answers=answers.file_of(shard),
            requests=facts.request_count,
            paid=paid_by(attempts, tables),
            alarms=_alarms(attempts),
        )
    )


def check_shard(facts: Shard, attempts: list[Attempt], tables: Mapping[int, pa.Table], keys: list[bytes], merged: pa.Table) -> None:
    """Prove from the files that every request of a shard was asked and has one last word. Raises CountsDisagree, naming ids."""
    for attempt in attempts:
        if attempt.number in tables and tables[attempt.number].num_rows != attempt.claim.asked:
            raise CountsDisagree(
                f"Attempt {attempt.number} of shard {facts.key[:12]} asked {attempt.claim.asked} requests, "
                f"but {tables[attempt.number].num_rows} answers were harvested."
            )
    found = merged.column("request_key").to_pylist()
    odd = set(keys).symmetric_difference(found)
    if odd or len(found) != facts.request_count:
        named = ", ".join(key.hex()[:16] for key in sorted(odd)[:5])
        raise CountsDisagree(
            f"Shard {facts.key[:12]} holds {facts.request_count} requests, but {len(found)} answers were harvested; "
            f"in only one of them: {named}."
        )


def paid_by(attempts: Iterable[Attempt], tables: Mapping[int, pa.Table]) -> tuple[Paid, ...]:
    """What each run bought of a shard: whoever claimed an attempt pays for it."""
    bought: dict[tuple[str, str], list[Attempt]] = {}
    for attempt in attempts:
        if attempt.receipt:
            bought.setdefault((attempt.claim.run, attempt.claim.model), []).append(attempt)
    paid = []
    for (run, model), own in bought.items():
        found = [tables[attempt.number].filter(tables[attempt.number].column("paid")) for attempt in own if attempt.number in tables]
        usage = sum((_usage(table) for table in found), Usage())
        paid.append(Paid(run=run, model=model, batches=len(own), answers=sum(table.num_rows for table in found), usage=usage))
    return tuple(paid)


def _merge(everything: pa.Table) -> pa.Table:
    """Per request its best line: a success, else what was paid, else the latest word; in the order of the first attempt."""
    keys = everything.column("request_key").to_pylist()
    outcomes = everything.column("outcome").to_pylist()
    best: dict[bytes, int] = {}
    for position, (key, outcome) in enumerate(zip(keys, outcomes, strict=True)):
        if key not in best or RANK.get(outcome, 0) >= RANK.get(outcomes[best[key]], 0):
            best[key] = position
    return everything.take(pa.array(list(best.values()), pa.int64()))


def _usage(everything: pa.Table) -> Usage:
    """Tokens over all attempts: what was paid, not only what was kept."""
    import pyarrow.compute as pc

    paid = everything.filter(everything.column("paid"))

    def total(name: str) -> int:
        return int(pc.sum(paid.column(name)).as_py() or 0)

    return Usage(
        input_tokens=total("input_tokens"),
        cached_tokens=total("cached_tokens"),
        output_tokens=total("output_tokens"),
        unknown=paid.column("input_tokens").null_count,
    )


def _alarms(attempts: Iterable[Attempt]) -> dict[str, int]:
    alarms: Counter[str] = Counter()
    for attempt in attempts:
        for reason in attempt.ended.reasons if attempt.ended and attempt.is_harvested else ():
            name, _, count = reason.rpartition(": ")
            alarms[name] += int(count)
    return dict(alarms)
