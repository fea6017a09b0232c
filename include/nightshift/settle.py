"""The last word on a shard: its attempts merged into one line per request, proven against what they asked, and kept for reuse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nightshift.columns import GROUP_ROWS, kept_lines, rows_at_once, write_answers
from nightshift.errors import CountsDisagree
from nightshift.money.prices import long_above, tier_of
from nightshift.runs import Site
from nightshift.shapes import Paid, ProviderName, Settled, Shard, Usage
from nightshift.stores.ledger import Attempt
from nightshift.stores.objects import Objects
from nightshift.stores.shards import (
    answers_key,
    frozen_keys,
    harvested,
    key_bytes,
    keys_in,
    open_answers,
    read_answers,
    sorted_keys,
    without_doubles,
)

Mask = npt.NDArray[np.bool_]
TOKENS = ("input_tokens", "cached_tokens", "output_tokens")
CHECKED = ("request_key", "stand_in", "outcome", "paid", *TOKENS)
RANK: dict[str, int] = {"succeeded": 3, "invalid": 2, "truncated": 2, "refused": 2, "filtered": 2}  # of two lines the better stays


def settle(site: Site, shard: str, attempts: list[Attempt]) -> Settled:
    """Merge the attempts into one line per request, keep it under the fingerprint, and write the shard's last word."""
    facts = site.ledger.shard(shard)
    answers = site.answers(facts.fingerprint)
    keys, numbers = frozen_keys(site.store, shard), harvested(attempts)
    tables = {number: read_answers(site.store, shard, number, CHECKED) for number in numbers}
    everything = pa.concat_tables(tables.values())
    if len(numbers) == 1 and everything.num_rows == facts.request_count:  # its file is the last word as it stands
        check_shard(facts, attempts, tables, keys, everything)
        site.store.copy(answers_key(shard, numbers[0]), answers.file_of(shard))
    else:
        kept = _best(everything)
        check_shard(facts, attempts, tables, keys, everything.filter(pa.array(kept)))
        with site.scratch() as folder:
            path = Path(folder) / "answers.parquet"
            _write_kept(site.store, shard, numbers, kept, path)
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


def check_shard(facts: Shard, attempts: list[Attempt], tables: Mapping[int, pa.Table], keys: bytes, merged: pa.Table) -> None:
    """Prove from the files that every request of a shard was asked and has one last word. Raises CountsDisagree, naming ids."""
    for attempt in attempts:
        if attempt.number in tables and tables[attempt.number].num_rows != attempt.claim.asked:
            raise CountsDisagree(
                f"Attempt {attempt.number} of shard {facts.key[:12]} asked {attempt.claim.asked} requests, "
                f"but {tables[attempt.number].num_rows} answers were harvested."
            )
    asked, found = sorted_keys(keys), without_doubles(sorted_keys(key_bytes(merged.column("request_key"))))
    if found.tobytes() != asked.tobytes():
        named = ", ".join(key.hex()[:16] for key in np.setxor1d(found, asked)[:5].tolist())
        raise CountsDisagree(
            f"Shard {facts.key[:12]} holds {facts.request_count} requests, but {len(found)} were answered; in only one of them: {named}."
        )


def distinct(attempts: Iterable[Attempt]) -> list[Attempt]:
    """Attempts without those that have the same batch as one before: two live attempts can have finished the same work."""
    seen: set[str] = set()
    kept = []
    for attempt in attempts:
        batch = attempt.receipt.batch_id if attempt.receipt else None
        if batch is None or batch not in seen:
            kept.append(attempt)
        if batch is not None:
            seen.add(batch)
    return kept


def paid_by(attempts: Iterable[Attempt], tables: Mapping[int, pa.Table]) -> tuple[Paid, ...]:
    """What each run bought of a shard: whoever claimed an attempt pays for it."""
    bought: dict[tuple[str, ProviderName, str], list[Attempt]] = {}
    for attempt in distinct(attempts):
        if attempt.receipt:
            bought.setdefault((attempt.claim.run, attempt.claim.provider, attempt.claim.model), []).append(attempt)
    paid = []
    for (run, provider, model), own in bought.items():
        found = [tables[attempt.number].filter(tables[attempt.number].column("paid")) for attempt in own if attempt.number in tables]
        usage = sum((usage_of(table, long_above(provider, model)) for table in found), Usage())
        answers, batches = sum(table.num_rows for table in found), len(own) if tier_of(provider) == "batch" else 0
        paid.append(Paid(run=run, provider=provider, model=model, batches=batches, answers=answers, usage=usage))
    return tuple(paid)


def _best(everything: pa.Table) -> Mask:
    """Which lines of all attempts are the last word: per request and model asked a success, else what was paid, else the latest.

    What a stand-in answered stands beside the word of the job's own model, which may be all that another job accepts.
    """
    lines = zip(keys_in(everything), *(everything.column(name).to_pylist() for name in ("stand_in", "outcome")), strict=True)
    best: dict[tuple[bytes, str | None], tuple[int, int]] = {}
    for position, (key, stand_in, outcome) in enumerate(lines):
        rank = RANK.get(outcome, 0)
        if rank >= best.get((key, stand_in), (0, 0))[0]:
            best[key, stand_in] = (rank, position)
    kept = np.zeros(everything.num_rows, bool)
    kept[[position for _, position in best.values()]] = True
    return kept


def _write_kept(objects: Objects, shard: str, numbers: Iterable[int], kept: Mask, path: Path) -> None:
    """Write the lines of some attempts that are kept to a file, a row group of theirs after the other: each is as large as memory holds."""
    seen, writer = 0, None
    with ExitStack() as stack:
        for number in numbers:
            file = stack.enter_context(open_answers(objects, shard, number))
            writer = writer or stack.enter_context(write_answers(path, file.schema_arrow))
            count = file.metadata.num_rows
            for lines in kept_lines(file, kept[seen : seen + count]):
                writer.write_table(lines, rows_at_once(lines.schema, GROUP_ROWS))
            seen += count


def usage_of(everything: pa.Table, above: int | None) -> Usage:
    """Tokens over all attempts: what was paid, not only what was kept. `above`: input tokens that make a request a long one."""
    paid = everything.filter(everything.column("paid"))
    long = paid.filter(pc.greater(paid.column("input_tokens"), above)) if above is not None else paid.slice(0, 0)
    return Usage(
        **{name: _total(paid, name) for name in TOKENS},
        **{f"long_{name}": _total(long, name) for name in TOKENS},
        unknown=paid.column("input_tokens").null_count,
    )


def _total(table: pa.Table, name: str) -> int:
    return int(pc.sum(table.column(name)).as_py() or 0)


def _alarms(attempts: Iterable[Attempt]) -> dict[str, int]:
    alarms: Counter[str] = Counter()
    for attempt in attempts:
        for reason in attempt.ended.reasons if attempt.ended and attempt.is_harvested else ():
            name, _, count = reason.rpartition(": ")
            alarms[name] += int(count)
    return dict(alarms)
