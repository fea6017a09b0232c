"""submit: make sure that a shard is with the provider exactly once, from any attempt, any run, any machine.

The input file is uploaded before the claim, so that a claim covers one short create call. A claim without a receipt
is looked up at the provider by its token before anything is sent again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nightshift.errors import Permanent, ShardHeld, SubmissionInDoubt, Transient
from nightshift.providers.protocol import Provider
from nightshift.runs import Run, Site
from nightshift.shapes import Receipt
from nightshift.stores.ledger import CREATE_TIMEOUT, LEASE, Attach, Done, Ended, Hold, Search, Send, next_move
from nightshift.stores.shards import asked_by, key_of_line, requests_key


def submit(site: Site, run: Run, shard: str) -> Receipt | None:
    """The receipt of a shard's current attempt; None once the shard is settled.

    Raises ShardHeld while somebody else holds a fresh claim or the provider's queue is full.
    """
    move = next_move(site.ledger.attempts(shard), now=site.now())
    match move:
        case Done():
            return None
        case Attach(receipt=receipt):
            return receipt
        case Hold(until=until, why=why):
            raise ShardHeld(shard, why, (until - site.now()).total_seconds())
        case Send(attempt=attempt) | Search(attempt=attempt):
            provider = site.open_provider(run.job.spec.request)
            if isinstance(move, Search):
                found = _find(site, shard, provider, move)
                if found is not None:
                    return found
            return _send(site, run, shard, provider, attempt)


def _find(site: Site, shard: str, provider: Provider, search: Search) -> Receipt | None:
    """A batch that an attempt left behind when it died; its receipt is written late, under its own attempt."""
    receipt = provider.find(search.tokens, search.since)
    if receipt is None:
        return None
    attempt = next(each.number for each in site.ledger.attempts(shard) if each.claim.token == receipt.token)
    return site.ledger.record_receipt(shard, attempt, receipt)


def _send(site: Site, run: Run, shard: str, provider: Provider, attempt: int) -> Receipt:
    """Upload, claim, create, record. Whatever happens in between is found again by the claim's token."""
    ledger = site.ledger
    with site.scratch() as folder:
        path, count = _write_requests(site, shard, attempt, Path(folder))
        uploaded = provider.upload(f"nightshift-{shard[:12]}-{attempt}", path)
    site.answers(ledger.shard(shard).fingerprint).announce(shard, run.uri)
    claim = ledger.claim(shard, attempt, site.owner, site.now())
    if claim is None:
        raise ShardHeld(shard, "another worker", LEASE.total_seconds())
    last_moment = claim.claimed_at + LEASE - 2 * CREATE_TIMEOUT  # a process that slept past it must not send any more
    labels = {"shard": shard[:12], "job": run.job.name, "attempt": str(attempt)}
    with _refusals_recorded(site, shard, attempt, count):
        receipt = provider.create(uploaded, claim.token, labels, lambda: site.now() <= last_moment)
    return ledger.record_receipt(shard, attempt, receipt)


@contextmanager
def _refusals_recorded(site: Site, shard: str, attempt: int, count: int) -> Iterator[None]:
    """A refused create call ends its attempt, so that the next one need not wait for the claim to lapse. A doubt does not."""
    try:
        yield
    except SubmissionInDoubt:
        raise
    except (Permanent, Transient) as error:
        ended = Ended(how="refused", status="refused", ended_at=site.now(), remaining=count, reasons=(str(error)[:500],))
        site.ledger.record_end(shard, attempt, ended)
        raise


def _write_requests(site: Site, shard: str, attempt: int, folder: Path) -> tuple[Path, int]:
    """The lines of one attempt as a local file, and their count: all of the shard's, or those to be asked again."""
    path = site.store.download(requests_key(shard), folder / "requests.jsonl")
    chosen = asked_by(site.store, shard, site.ledger.attempts(shard), attempt)
    if chosen is None:
        return path, site.ledger.shard(shard).request_count
    rest = folder / "rest.jsonl"
    with path.open("rb") as source, rest.open("wb") as target:
        target.writelines(line for line in source if key_of_line(line) in chosen)
    return rest, len(chosen)
