"""collect: harvest what a batch answered, whatever its end; validate; decide which requests are asked again.

Both result files are read, counters never are. Each request of the attempt gets exactly one line, also when the
provider returned none for it, or two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from nightshift.columns import answers_schema, fit, needs_fitting
from nightshift.errors import BatchRejected, CountsDisagree, ProviderUnavailable
from nightshift.job import Job
from nightshift.providers.protocol import Garbage, Reply, Snapshot
from nightshift.runs import Run, Site
from nightshift.shapes import Outcome, Receipt, Settled, Usage
from nightshift.stores.ledger import Attach, Attempt, Done, Ended, next_move
from nightshift.stores.shards import answers_key, asked_by, left_by, request_keys

NEVER_RAN: dict[str, Outcome] = {"expired": "expired", "cancelled": "cancelled"}  # batch status → outcome of what has no line
RANK: dict[str, int] = {"succeeded": 3, "invalid": 2, "truncated": 2, "refused": 2, "filtered": 2}  # of two lines the better stays
WRITE_ROWS = 8192
FILES_GRACE = timedelta(minutes=10)  # after its end, for a completed batch to show its result files


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One request's line of an answers file: classified, validated, parsed."""

    reply: Reply
    attempt: int
    batch_id: str | None
    output: dict[str, Any] | None = None
    again: bool = False


def collect(site: Site, run: Run, shard: str) -> Settled | None:
    """Harvest the current attempt. The shard's last word once it is settled, or None when it has to be submitted again.

    Raises BatchRejected when the provider refused the batch as a whole for a reason that a repetition would meet again.
    """
    ledger = site.ledger
    attempts = ledger.attempts(shard)
    match next_move(attempts, now=site.now()):
        case Attach(attempt=number, receipt=receipt):
            _harvest(site, run, shard, number, receipt, attempts)
        case Done():
            return ledger.settled(shard) or _settle(site, run, shard, attempts)
        case _:
            return None
    attempts = ledger.attempts(shard)
    return _settle(site, run, shard, attempts) if isinstance(next_move(attempts, now=site.now()), Done) else None


def _harvest(site: Site, run: Run, shard: str, number: int, receipt: Receipt, attempts: list[Attempt]) -> None:
    """Read everything the batch left, write the attempt's answers, then its end. Repeating it writes the same."""
    provider = site.open_provider(run.job.spec.request)
    snapshot = provider.poll(receipt.batch_id)  # a batch that is not known there says nothing of what it cost
    if snapshot.state == "running":
        raise ProviderUnavailable(provider.where, f"batch {receipt.batch_id} is still {snapshot.status}.")
    if _is_waiting_for_files(snapshot, site.now()):
        raise ProviderUnavailable(provider.where, f"batch {receipt.batch_id} is {snapshot.status} and its result files are not there yet.")
    with site.scratch() as folder:
        asked = asked_by(site.store, shard, attempts, number)
        keys = [key for key in request_keys(site.store, shard) if asked is None or key in asked]
        if snapshot.state == "failed" and not snapshot.bad_lines and not snapshot.result_files:
            _end_without_answers(site, shard, number, receipt, snapshot, len(keys))
            return
        found, alarms = match_replies(keys, provider.replies(snapshot, Path(folder)))
        history = _outcomes_so_far(site, shard, attempts, number)
        judge = judge_for(run.job)
        answers = (
            _with_retry(run.job, _judged(judge, key, found, snapshot, position), number, receipt, history.get(key, Counter()), site.now())
            for position, key in enumerate(keys, start=1)
        )
        path = Path(folder) / "answers.parquet"
        write_answers(path, run.job, zip(keys, answers, strict=True))
        if site.store.head(answers_key(shard, number)) is None:  # who harvested first has decided what is asked again
            site.store.put(answers_key(shard, number), path)
    again = len(left_by(site.store, shard, number))
    ended = Ended(
        how="harvested",
        status=snapshot.status,
        ended_at=site.now(),
        remaining=again,
        reasons=tuple(f"{name}: {count}" for name, count in sorted(alarms.items())),
    )
    site.ledger.record_end(shard, number, ended)


def _is_waiting_for_files(snapshot: Snapshot, now: datetime) -> bool:
    """Result files can lag behind the status (F60). Without a grace everything would count as missing, and be paid again."""
    if snapshot.status != "completed" or snapshot.result_files:
        return False
    return snapshot.ended_at is None or now - snapshot.ended_at < FILES_GRACE


def _end_without_answers(site: Site, shard: str, number: int, receipt: Receipt, snapshot: Snapshot, count: int) -> None:
    """The provider failed the batch as a whole: later, when its queue was full; never, for any other reason."""
    how = "queue_full" if snapshot.queue_full else "rejected"
    ended = Ended(how=how, status=snapshot.status, ended_at=site.now(), remaining=count, reasons=snapshot.reasons[:10])
    site.ledger.record_end(shard, number, ended)
    if how == "rejected":
        raise BatchRejected(receipt.batch_id, snapshot.reasons)


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
            attempt=0,
            batch_id=None,
        )
    import jsonschema_rs

    validator = jsonschema_rs.validator_for(schema)
    fitted = needs_fitting(schema)

    def judge(reply: Reply) -> Answer:
        if reply.outcome != "succeeded":
            return Answer(reply=reply, attempt=0, batch_id=None)
        try:
            value = orjson.loads(reply.text or "")
        except orjson.JSONDecodeError as error:
            return Answer(reply=replace(reply, outcome="invalid", reason=f"not valid JSON: {error.msg}"), attempt=0, batch_id=None)
        if not validator.is_valid(value):
            why = next(iter(validator.iter_errors(value))).message[:300]
            return Answer(reply=replace(reply, outcome="invalid", reason=f"breaks the schema: {why}"), attempt=0, batch_id=None)
        try:
            output = fit(value, schema) if fitted else value
        except (TypeError, RecursionError) as error:
            return Answer(reply=replace(reply, outcome="invalid", reason=f"fits no column: {error}"), attempt=0, batch_id=None)
        return Answer(reply=replace(reply, text=None), output=output, attempt=0, batch_id=None)

    return judge


def write_answers(path: Path, job: Job, answers: Iterable[tuple[bytes, Answer]]) -> None:
    """Write an answers file, one line per request."""
    schema = answers_schema(job.answer_schema)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        batch: list[dict[str, Any]] = []
        for key, answer in answers:
            batch.append(_line(key, answer))
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
        "again": answer.again,
        "attempt": answer.attempt,
        "batch_id": answer.batch_id,
        "model": reply.model,
        "input_tokens": reply.input_tokens,
        "cached_tokens": reply.cached_tokens,
        "output_tokens": reply.output_tokens,
    }


def _judged(judge: Callable[[Reply], Answer], key: bytes, found: dict[bytes, Reply], snapshot: Snapshot, position: int) -> Answer:
    """One request's answer; what has no line was never executed, or went missing."""
    reply = found.pop(key, None)
    return judge(reply if reply is not None else _absent(key, snapshot, position))


def _absent(key: bytes, snapshot: Snapshot, position: int) -> Reply:
    custom_id = key.hex()
    if position in snapshot.bad_lines:  # one bad line fails the whole batch (F32): this one is to blame, the others are not
        return Reply(custom_id=custom_id, outcome="errored", reason=snapshot.bad_lines[position])
    if snapshot.state == "failed":
        return Reply(custom_id=custom_id, outcome="errored", reason="another line failed the batch", retryable=True)
    outcome = NEVER_RAN.get(snapshot.status, "missing")
    reason = f"the batch was {outcome}" if outcome != "missing" else f"no line came back though the batch is {snapshot.status}"
    return Reply(custom_id=custom_id, outcome=outcome, reason=reason, retryable=True)


def _with_retry(job: Job, answer: Answer, attempt: int, receipt: Receipt, history: Counter[str], now: datetime) -> Answer:
    reply = answer.reply
    allowed = job.spec.policy.retry.allows(reply.outcome, history[reply.outcome] + 1)
    overdue = job.patience is not None and now - receipt.created_at > job.patience  # the deadline cancelled it: asking again is no use
    again = allowed and (reply.outcome != "errored" or reply.retryable) and not (reply.outcome == "cancelled" and overdue)
    return replace(answer, attempt=attempt, batch_id=receipt.batch_id, again=again)


def _outcomes_so_far(site: Site, shard: str, attempts: list[Attempt], before: int) -> dict[bytes, Counter[str]]:
    """How often each request had each outcome in earlier attempts. Only requests asked again are in the later ones."""
    history: dict[bytes, Counter[str]] = {}
    for attempt in attempts:
        if attempt.number < before and attempt.ended and attempt.ended.how == "harvested":
            table = pq.read_table(site.store.open(answers_key(shard, attempt.number)), columns=["request_key", "outcome", "again"])
            for line in table.filter(table.column("again")).to_pylist():
                history.setdefault(line["request_key"], Counter())[line["outcome"]] += 1
    return history


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


def _settle(site: Site, run: Run, shard: str, attempts: list[Attempt]) -> Settled:
    """Merge the attempts into one line per request, keep it under the fingerprint, and write the shard's last word."""
    facts = site.ledger.shard(shard)
    answers = site.answers(facts.fingerprint)
    harvested = [each for each in attempts if each.ended and each.ended.how == "harvested"]
    tables = [pq.read_table(site.store.open(answers_key(shard, each.number))) for each in harvested]
    everything = pa.concat_tables(tables)
    merged = _merge(everything)
    if merged.num_rows != facts.request_count:
        raise CountsDisagree(f"Shard {shard[:12]} holds {facts.request_count} requests, but {merged.num_rows} answers were harvested.")
    with site.scratch() as folder:
        path = Path(folder) / "answers.parquet"
        pq.write_table(merged, path, compression="zstd")
        site.store.put(answers.file_of(shard), path)
    settled = site.ledger.settle(
        Settled(
            shard=shard,
            answers=answers.file_of(shard),
            requests=facts.request_count,
            batches=sum(1 for each in attempts if each.receipt),
            usage=_usage(everything),
            alarms=_alarms(harvested),
        )
    )
    answers.close(shard)
    return settled


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


def _alarms(harvested: list[Attempt]) -> dict[str, int]:
    alarms: Counter[str] = Counter()
    for attempt in harvested:
        for reason in attempt.ended.reasons if attempt.ended else ():
            name, _, count = reason.rpartition(": ")
            alarms[name] += int(count)
    return dict(alarms)
