"""collect: harvest what a batch answered, whatever its end; validate; decide which requests are asked again.

Both result files are read, counters never are. Each request of the attempt gets exactly one line, also when the
provider returned none for it, or two.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from nightshift.again import BYSTANDER, ask_again
from nightshift.answer_writer import AnswerWriter
from nightshift.arrow import collector_paused, keep_pandas_out
from nightshift.budgets import give_back, settle_attempts
from nightshift.columns import answers_schema, rows_at_once
from nightshift.errors import BatchLost, BatchRejected, BatchUnfinished, BatchUnknown, NightshiftError, ProviderUnavailable, ResultsGone
from nightshift.job import Job
from nightshift.matching import AT_ONCE, Matching, unfold, with_tokens
from nightshift.money.prices import long_above, tier_of
from nightshift.providers.forms import form_of
from nightshift.providers.protocol import Garbage, Provider, Reply, Snapshot
from nightshift.retry_budget import retry_budget_of
from nightshift.runs import Run, Site
from nightshift.settle import settle
from nightshift.shapes import Settled, Shard
from nightshift.steps.submit import open_where, payer_of
from nightshift.steps.wait import files_due, is_waiting_for_files
from nightshift.stores.ledger import Attach, Attempt, Done, Ended, is_stuck, next_move
from nightshift.stores.shards import Left, answers_key, asked_of, pending, shared_lines
from nightshift.typed import Read
from nightshift.validation import Answer, reader_for, usage_of_replies, validator_for

LOST_AFTER = timedelta(minutes=2)  # from the first "not known" here; the wait before has looked for longer


def collect(site: Site, run: Run, shard: str) -> Settled | None:
    """Harvest the current attempt. The shard's last word once it is settled, or None when it has to be submitted again.

    Raises BatchUnfinished while the batch goes on, BatchRejected when the provider refused the batch as a whole
    for a reason that a repetition would meet again, and BatchLost when it has not known the batch for a while and the job
    does not say to buy it again.
    """
    keep_pandas_out()
    ledger = site.ledger
    if (word := ledger.settled(shard)) is not None:
        settle_attempts(site, shard, ledger.attempts(shard))  # who has settled it may have died before this
        return word
    attempts = ledger.attempts(shard)
    match next_move(attempts, now=site.now()):
        case Attach(attempt=attempt):
            _harvest(site, run, shard, attempt, attempts)
        case Done():
            return _settle(site, run, shard, attempts)
        case _:
            return None
    attempts = ledger.attempts(shard)
    return _settle(site, run, shard, attempts) if isinstance(next_move(attempts, now=site.now()), Done) else None


def _settle(site: Site, run: Run, shard: str, attempts: list[Attempt]) -> Settled:
    """The last word on a shard. What its batches have left in our store is removed, which may fail: the word stands."""
    word = settle(site, shard, attempts)
    settle_attempts(site, shard, attempts)
    for attempt in attempts:
        with suppress(NightshiftError):
            open_where(site, run, shard, attempt).clean(attempt.claim.token, attempt.receipt.batch_id if attempt.receipt else None)
    return word


def _harvest(site: Site, run: Run, shard: str, attempt: Attempt, attempts: list[Attempt]) -> None:
    """Read everything the batch left, write the attempt's answers, then its end. Repeating it writes the same."""
    provider, batch_id = open_where(site, run, shard, attempt), _batch_of(attempt)
    snapshot = _look(site, run, shard, attempt, attempts, provider)
    if snapshot is None:
        return
    if snapshot.state == "running":
        raise BatchUnfinished(provider.where, batch_id, f"it is still {snapshot.status}")
    latest = attempt.began_at + payer_of(site, run, attempt).job.patience
    if is_waiting_for_files(snapshot, site.now(), latest):
        raise ProviderUnavailable(provider.where, f"batch {batch_id} is {snapshot.status} and its result files are not there yet.")
    if snapshot.state == "failed" and not snapshot.bad_lines and not snapshot.result_files:
        _end_without_answers(site, shard, attempt, attempts, snapshot, provider)
        return
    try:
        ended = _write_answers(site, run, shard, attempt, attempts, snapshot, provider)
    except ResultsGone as error:
        if site.now() < files_due(snapshot, latest):
            raise  # they can lag behind the status; 30 days later they are gone (F61)
        _give_up(site, run, shard, attempt, attempts, provider, error)
        return
    site.ledger.record_end(shard, attempt.number, ended)


def _write_answers(
    site: Site, run: Run, shard: str, attempt: Attempt, attempts: list[Attempt], snapshot: Snapshot, provider: Provider
) -> Ended:
    """Write the answers file of an attempt from all that its batch has left; how it has ended. Who is first decides what is asked again."""
    facts, waiting = site.ledger.shard(shard), pending(site.store, shard, attempt.claim.after)
    left, per_line = asked_of(waiting, facts, attempt.claim), form_of(facts.endpoint).inputs_per_line
    with site.scratch() as folder, collector_paused():
        writer = AnswerWriter(run.job, _origin(site, facts, attempt, snapshot), Path(folder))
        matching = Matching(left, writer.hold)
        replies = provider.replies(snapshot, Path(folder))
        failed = write_valid(writer, run.job, matching, unfold(replies, shared_lines(left, per_line)) if per_line > 1 else replies, left)
        failed.update(_absent(matching.absent, snapshot, shared_lines(left, per_line)))
        above, payer = long_above(attempt.claim.provider, attempt.claim.model), payer_of(site, run, attempt)
        bought = writer.usage(above) + usage_of_replies(failed.values(), above)
        budget = partial(retry_budget_of, site, payer, facts, attempts, bought, attempt)
        rest = [each for key, each in waiting.items() if key not in left]
        for key, answer in ask_again(site, payer, attempt, facts, left, failed, rest, budget).items():
            writer.add(key, answer)
        path = Path(folder) / "answers.parquet"
        writer.write(path)
        is_first = site.store.create(answers_key(shard, attempt.number), path)
    asked_again = len(waiting) - len(left) + writer.asked_again
    return Ended(
        how="harvested",
        status=snapshot.status,
        ended_at=site.now(),
        remaining=asked_again if is_first else len(pending(site.store, shard, (*attempt.claim.after, attempt.number))),
        reasons=tuple(f"{name}: {count}" for name, count in sorted(matching.alarms.items())),
    )


def _origin(site: Site, facts: Shard, attempt: Attempt, snapshot: Snapshot) -> dict[str, Any]:
    """The columns that are the same in every line of an attempt's answers."""
    return {
        "shard": facts.key,
        "attempt": attempt.number,
        "batch_id": _batch_of(attempt),
        "answered_at": snapshot.ended_at or site.now(),
        "tier": tier_of(attempt.claim.provider),
        "stand_in": attempt.claim.model if attempt.claim.model != facts.model else None,
    }


def write_valid(
    writer: AnswerWriter,
    job: Job,
    matching: Matching,
    replies: Iterable[Reply | Garbage],
    left: Mapping[bytes, Left | None],
) -> dict[bytes, Answer]:
    """Write the valid answers as they come; give the others, by request."""
    others, validate = dict[bytes, Answer](), validator_for(job)
    read = None if any(left.values()) else reader_for(job)  # each that is asked again says how: they are few, and taken one by one

    def put(key: bytes, answer: Answer) -> None:
        if answer.output is None:
            others[key] = replace(answer, reply=writer.hold(answer.reply))
        else:
            before = left[key]
            writer.add(key, replace(answer, asked_as=before.variant) if before else answer)

    for succeeded in matching.successes(replies, rows_at_once(answers_schema(job), AT_ONCE)):
        for key, reply in _add_all(writer, read, succeeded) if read else succeeded:
            put(key, validate(reply))
    invalid = [key for key in matching.twice if key in others]  # in the order of the lines: repeating it writes the same
    writer.count_twice({key: further for key, further in matching.twice.items() if key not in others})
    for key in invalid:
        put(key, _better(others.pop(key), [writer.recall(reply) for reply in matching.twice[key]], validate))
    others.update((key, validate(reply)) for key, reply in matching.failed.items())
    return others


def _better(first: Answer, further: Sequence[Reply], validate: Callable[[Reply], Answer]) -> Answer:
    """Of an invalid answer and further lines for its request the one that stays, with the tokens of all: a valid one, else the first."""
    for reply in further:
        answer = validate(reply)
        if answer.output is not None:
            return replace(answer, reply=with_tokens(reply, [first.reply, *(each for each in further if each is not reply)]))
    return replace(first, reply=with_tokens(first.reply, further))


def _add_all(writer: AnswerWriter, read: Read, succeeded: Sequence[tuple[bytes, Reply]]) -> Sequence[tuple[bytes, Reply]]:
    """Add all answers that can be read at once; give the others, which have to be looked at one by one."""
    outputs, are_read = read([reply.text for _, reply in succeeded])
    if all(are_read):
        writer.add_all(succeeded, outputs)
        return ()
    writer.add_all(list(compress(succeeded, are_read)), outputs)
    return [each for each, is_read in zip(succeeded, are_read, strict=True) if not is_read]


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


def _end_without_answers(site: Site, shard: str, attempt: Attempt, attempts: list[Attempt], snapshot: Snapshot, provider: Provider) -> None:
    """The provider failed the batch as a whole: later, when its queue was full; never, for any other reason."""
    stuck = is_stuck([each for each in attempts if each.number < attempt.number], site.now())
    how = "queue_full" if snapshot.queue_full and not stuck else "rejected"
    ended = Ended(
        how=how,
        status=snapshot.status,
        ended_at=site.now(),
        remaining=attempt.claim.asked,
        alone=how == "queue_full" and not provider.is_busy(),
        reasons=snapshot.reasons[:10],
    )
    if how == "rejected":
        give_back(site, shard, attempt.claim, attempt.number, attempts)
    site.ledger.record_end(shard, attempt.number, ended)
    settle_attempts(site, shard, site.ledger.attempts(shard))
    if how == "rejected":
        raise BatchRejected(_batch_of(attempt), snapshot.reasons)


def _absent(keys: Collection[bytes], snapshot: Snapshot, groups: Iterable[Sequence[bytes]]) -> Iterator[tuple[bytes, Answer]]:
    """What became of the requests that nothing came back for. `groups`: the requests of each line."""
    if keys:
        lines = dict(enumerate(groups, start=1))
        is_named = not snapshot.bad_lines.keys().isdisjoint(lines)
        for line, group in lines.items():
            for key in group:
                if key in keys:
                    yield key, Answer(reply=_nothing(key, snapshot, line, is_shared=len(group) > 1, is_named=is_named))


def _nothing(key: bytes, snapshot: Snapshot, line: int, *, is_shared: bool, is_named: bool) -> Reply:
    """What became of a request that nothing came back for. `line`: the one that it stood in, which others may share.

    `is_named`: whether the provider has named lines of the batch that it cannot take.
    """
    custom_id = key.hex()
    if line in snapshot.bad_lines:  # one bad line fails the whole batch (F32): this one is to blame, the others are not
        return Reply(custom_id=custom_id, outcome="errored", reason=snapshot.bad_lines[line], is_shared=is_shared)
    if snapshot.state == "failed":
        reason = BYSTANDER if is_named else "the batch failed"
        return Reply(custom_id=custom_id, outcome="errored", reason=reason, retryable=True, is_bystander=is_named)
    outcome = snapshot.absent
    reason = f"the batch was {outcome}" if outcome != "missing" else f"no line came back though the batch is {snapshot.status}"
    return Reply(custom_id=custom_id, outcome=outcome, reason=reason, retryable=True)
