"""collect: harvest what a batch answered, whatever its end; validate; decide which requests are asked again.

Both result files are read, counters never are. Each request of the attempt gets exactly one line, also when the
provider returned none for it, or two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pyarrow.parquet as pq

from nightshift.budgets import settle_attempts
from nightshift.errors import BatchLost, BatchRejected, BatchUnknown, NightshiftError, ProviderUnavailable, ResultsGone
from nightshift.judge import AS_IT_WAS, Answer, judge_for, write_answers
from nightshift.money.prices import tier_of
from nightshift.providers.forms import form_of
from nightshift.providers.protocol import Garbage, Provider, Reply, Snapshot
from nightshift.purse import Purse, purse_of
from nightshift.runs import Run, Site
from nightshift.settle import RANK, settle
from nightshift.shapes import Settled
from nightshift.steps.submit import open_where, payer_of
from nightshift.steps.wait import FILES_GRACE, is_waiting_for_files
from nightshift.stores.ledger import Attach, Attempt, Done, Ended, is_stuck, next_move
from nightshift.stores.shards import Left, answers_key, asked, pending, shared_lines

LOST_AFTER = timedelta(minutes=2)  # from the first "not known" here; the wait before has looked for longer


def collect(site: Site, run: Run, shard: str) -> Settled | None:
    """Harvest the current attempt. The shard's last word once it is settled, or None when it has to be submitted again.

    Raises BatchRejected when the provider refused the batch as a whole for a reason that a repetition would meet again,
    and BatchLost when it has not known the batch for a while and the job does not say to buy it again.
    """
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
        raise ProviderUnavailable(provider.where, f"batch {batch_id} is still {snapshot.status}.")
    if is_waiting_for_files(snapshot, site.now()):
        raise ProviderUnavailable(provider.where, f"batch {batch_id} is {snapshot.status} and its result files are not there yet.")
    if snapshot.state == "failed" and not snapshot.bad_lines and not snapshot.result_files:
        _end_without_answers(site, shard, attempt, attempts, snapshot, provider)
        return
    facts = site.ledger.shard(shard)
    left = asked(site.store, facts, attempt.claim)
    target = answers_key(shard, attempt.number)
    with site.scratch() as folder:
        try:
            groups = list(shared_lines(left, form_of(facts.endpoint).inputs_per_line))
            found, alarms = match_replies(list(left), unfold(provider.replies(snapshot, Path(folder)), groups))
        except ResultsGone as error:
            if snapshot.ended_at is None or site.now() - snapshot.ended_at < FILES_GRACE:
                raise  # they can lag behind the status; 30 days later they are gone (F61)
            _give_up(site, run, shard, attempt, attempts, provider, error)
            return
        payer = payer_of(site, run, attempt)
        purse = purse_of(site, payer, facts, attempts, found.values(), attempt.claim)
        again = _again_for(site, payer, shard, attempt, left, purse)
        judge = judge_for(run.job)
        answers = (
            (key, again(key, judge(found.pop(key) if key in found else _absent(key, snapshot, line, is_shared=len(group) > 1))))
            for line, group in enumerate(groups, start=1)
            for key in group
        )
        path = Path(folder) / "answers.parquet"
        origin = {
            "shard": shard,
            "attempt": attempt.number,
            "batch_id": batch_id,
            "answered_at": snapshot.ended_at or site.now(),
            "tier": tier_of(attempt.claim.provider),
            "stand_in": attempt.claim.model if attempt.claim.model != facts.model else None,
        }
        write_answers(path, run.job, answers, origin)
        site.store.create(target, path)  # who harvested first has decided what is asked again
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
    site.ledger.record_end(shard, attempt.number, ended)
    settle_attempts(site, shard, site.ledger.attempts(shard))
    if how == "rejected":
        raise BatchRejected(_batch_of(attempt), snapshot.reasons)


def unfold(replies: Iterable[Reply | Garbage], groups: Iterable[Sequence[bytes]]) -> Iterator[Reply | Garbage]:
    """Replies to lines that several requests share, as one reply each. `groups`: the keys of each line, under the id of the first.

    The tokens of a line are divided among its requests. A line that was refused is asked again, each of its requests alone: one of
    them may be to blame, the others are not.
    """
    shared = {group[0]: group for group in groups if len(group) > 1}
    for reply in replies:
        keys = shared.get(_key_of(reply.custom_id) or b"") if isinstance(reply, Reply) else None
        if keys is None or isinstance(reply, Garbage):
            yield reply
            continue
        for place, key in enumerate(keys):
            yield replace(
                reply,
                custom_id=key.hex(),
                vectors=reply.vectors[place : place + 1],
                is_shared=True,
                input_tokens=_part(reply.input_tokens, place, len(keys)),
                cached_tokens=_part(reply.cached_tokens, place, len(keys)) or 0,
                output_tokens=_part(reply.output_tokens, place, len(keys)),
            )


def _part(tokens: int | None, place: int, count: int) -> int | None:
    return None if tokens is None else tokens // count + (place < tokens % count)


def match_replies(keys: list[bytes], replies: Iterable[Reply | Garbage]) -> tuple[dict[bytes, Reply], dict[str, int]]:
    """Replies by request key, and the oddities met: lines twice, lines nobody asked for, lines that cannot be read.

    Of two lines for one request the better outcome stays, of equals the first; tokens of both are counted as paid.
    """
    asked, found, alarms = set(keys), {}, Counter[str]()
    for reply in replies:
        if isinstance(reply, Garbage):
            alarms[reply.alarm] += 1
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


def _absent(key: bytes, snapshot: Snapshot, line: int, *, is_shared: bool) -> Reply:
    """What became of a request that nothing came back for. `line`: the one that it stood in, which others may share."""
    custom_id = key.hex()
    if line in snapshot.bad_lines:  # one bad line fails the whole batch (F32): this one is to blame, the others are not
        return Reply(custom_id=custom_id, outcome="errored", reason=snapshot.bad_lines[line], is_shared=is_shared)
    if snapshot.state == "failed":
        return Reply(custom_id=custom_id, outcome="errored", reason="another line failed the batch", retryable=True)
    outcome = snapshot.absent
    reason = f"the batch was {outcome}" if outcome != "missing" else f"no line came back though the batch is {snapshot.status}"
    return Reply(custom_id=custom_id, outcome=outcome, reason=reason, retryable=True)


def _again_for(
    site: Site, run: Run, shard: str, attempt: Attempt, left: Mapping[bytes, Left | None], purse: Purse
) -> Callable[[bytes, Answer], Answer]:
    """The function that decides whether and how a request is asked again: by policy, bounded by count and by money."""
    retry, job, history = run.job.spec.policy.retry, run.job, _outcomes_so_far(site, shard, attempt)
    created = attempt.receipt.created_at if attempt.receipt else attempt.claim.claimed_at
    overdue = site.now() - created > job.patience  # the deadline cancelled it: asking again is no use
    rushed = job.spec.policy.on_demand and attempt.claim.provider != "live"

    def again(key: bytes, answer: Answer) -> Answer:
        reply, before = answer.reply, left[key]
        asked_as = before.variant if before else AS_IT_WAS
        answer = replace(answer, asked_as=asked_as)
        is_late = reply.outcome == "expired" or (reply.outcome == "cancelled" and overdue)
        if rushed and is_late:  # the batch's time is over: the rest is finished on demand
            variant = asked_as.model_copy(update={"provider": "live"})
            return replace(answer, again=variant) if purse.pays(variant) else answer
        if reply.outcome == "errored" and reply.is_shared and not reply.retryable:
            return replace(answer, again=asked_as.model_copy(update={"alone": True}))
        hopeless = (reply.outcome == "errored" and not reply.retryable) or (reply.outcome == "cancelled" and overdue)
        if hopeless or not retry.allows(reply.outcome, history.get(key, Counter())[reply.outcome] + 1):
            return answer
        variant = retry.variant(reply.outcome, asked_as, job.token_limit)
        return replace(answer, again=variant) if purse.pays(variant) else answer

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
