"""A run: one interval, one upload, or one call of the command line. Where its files are, and what it was asked to do."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory

from nightshift.errors import LedgerCorrupt, ProviderUnavailable, is_permanent
from nightshift.job import Job, RequestSpec
from nightshift.providers.protocol import Limits, Provider
from nightshift.shapes import Outcome, PinnedObject, Plan, Summary, Wire
from nightshift.stores.answers import AnswerStore
from nightshift.stores.ledger import Claim, Ledger
from nightshift.stores.objects import Objects

VECTOR_BYTES = 32 << 20  # of a shard's embeddings: some copies of them are in memory when it is harvested and settled
PLAN_STANDS = timedelta(days=3)  # unapproved: so long what it counts on is kept; a question stays open for one of them


def utc_now() -> datetime:
    """The time, at the edge: everything that decides takes it as an argument."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What surrounds a run: its store, its buckets, its provider, its clock and its disk."""

    store: Objects
    open_input: Callable[[str], tuple[Objects, str]]  # object pattern → bucket, key pattern
    open_provider: Callable[[RequestSpec], Provider]
    owner: str  # who claims: readable, for messages
    poll_seconds: float
    scratch_folder: Path | None = None
    monthly_budget: Callable[[str], Decimal | None] = lambda connection: None  # dollars that all jobs of a connection may spend
    now: Callable[[], datetime] = utc_now
    stopped: Callable[[], bool] = lambda: False  # whether a person has stopped this process: nothing more is sent

    def scratch(self) -> AbstractContextManager[str]:
        """A folder on local disk, gone afterwards."""
        return TemporaryDirectory(prefix="nightshift-", dir=self.scratch_folder)

    @property
    def ledger(self) -> Ledger:
        """The ledger of this store."""
        return Ledger(self.store)

    def limits(self, job: Job) -> Limits:
        """What one batch may hold: as the job says, else as the provider does; of embeddings, what fits into memory."""
        request, given = job.spec.request, job.spec.request.limits
        found = self.open_provider(request).limits(request.model)
        requests = given.max_requests or found.requests
        return Limits(
            requests=min(requests, VECTOR_BYTES // (4 * job.dimensions)) if job.dimensions else requests,
            request_bytes=given.max_bytes or found.request_bytes,
            least=given.min_requests or found.least,
        )

    def answers(self, fingerprint: str) -> AnswerStore:
        """The answers of one fingerprint in this store."""
        return AnswerStore(self.store, fingerprint)


class Options(Wire):
    """How one run departs from what its job says."""

    fresh: bool = False  # buys every answer anew
    sample: int | None = None  # asks about so many rows only, and publishes beside the results
    dry_run: bool = False  # plans, and sends nothing


class Redrive(Wire):
    """What a run drives again: the rows of another run that ended in these outcomes."""

    run: str  # of the same job
    outcomes: tuple[Outcome, ...]


class RunInput(Options):
    """What a run was asked to do, frozen at discovery. Stored as `runs/<job>/<run>/input.json`, once."""

    run: str
    label: str
    started_at: datetime
    partition: str
    objects: tuple[PinnedObject, ...]
    job: Job
    redrive: Redrive | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """A run in its store."""

    store: Objects
    input: RunInput

    @property
    def job(self) -> Job:
        """The job as it was when the run began."""
        return self.input.job

    @property
    def uri(self) -> str:
        """Where the run's files are: all that XCom carries of it."""
        return self.store.uri_of(run_folder(self.job.name, self.input.run))

    def key(self, name: str) -> str:
        """The key of one of the run's files."""
        return f"{run_folder(self.job.name, self.input.run)}/{name}"

    @property
    def made_from(self) -> str:
        """What its results are made of: the same objects, asked the same, make the same partition."""
        return run_id(self.job.recipe, *(f"{found.uri} {found.version or found.etag}" for found in self.input.objects))


def check_models(site: Site, job: Job) -> None:
    """Raise AccessDenied or ModelNotFound now, where a provider would refuse every request of a job later."""
    provider = site.open_provider(job.spec.request)
    with suppress(ProviderUnavailable):  # submit will meet it again, where waiting can help
        for model in (job.spec.request.model, *job.spec.stand_ins):
            provider.check(model)


def approved_plan(run: Run) -> Plan:
    """The plan that a run carries out. Raises LedgerCorrupt where it was never approved."""
    stored = run.store.get_shape(run.key("approved.json"), Plan)
    if stored is None:
        raise LedgerCorrupt(run.key("approved.json"), "it does not exist; was the run approved?")
    return stored


def under_way(store: Objects, prefix: str, planned_after: datetime | None = None) -> list[str]:
    """The folders of runs below a prefix that are approved and have not come as far as their outcomes.

    `planned_after`: with those that were planned since then and are not approved, also where that was refused, or nobody has answered:
    a person may clear that task. A dry run is not approved ever.
    """
    written: dict[str, dict[str, float]] = {}
    for found in store.scan(prefix):
        folder, _, name = found.key.rpartition("/")
        written.setdefault(folder, {})[name] = found.modified
    since = planned_after.timestamp() if planned_after else math.inf

    def waits(folder: str, inside: Mapping[str, float]) -> bool:
        if inside.get("plan.json", -math.inf) < since:
            return False
        summary = store.get_shape(f"{folder}/summary.json", Summary) if "summary.json" in inside else None
        return summary is None or summary.state != "planned"

    ongoing = ((folder, inside) for folder, inside in written.items() if "assembled.json" not in inside)
    return [folder for folder, inside in ongoing if "approved.json" in inside or waits(folder, inside)]


def awaited_elsewhere(run: Run) -> frozenset[str]:
    """The shards of other runs that runs under way beside this one have adopted, and wait for."""
    others = [f"{folder}/approved.json" for folder in under_way(run.store, "runs")]
    plans = [run.store.get_shape(key, Plan) for key in others if key != run.key("approved.json")]
    return frozenset(shard for plan in plans if plan for shard in plan.adopted_shards)


def salt_of(run: Run) -> str:
    """What tells the shards of a run that buys again from those that were bought before; nothing for every other run."""
    return run.input.run if run.input.fresh or run.input.redrive else ""


def prompt_key(version: str) -> str:
    """Where a version of a prompt is kept, so that it can be asked again when its file has changed."""
    return f"prompts/{version}.md"


def run_folder(job: str, run: str) -> str:
    """The folder of a run in the store."""
    return f"runs/{job}/{run}"


def load_run(store: Objects, uri: str) -> Run:
    """A run from its URI. Raises LedgerCorrupt where it was never begun."""
    key = f"{store.key_of(uri).rstrip('/')}/input.json"
    found = store.get_shape(key, RunInput)
    if found is None:
        raise LedgerCorrupt(key, "it does not exist; was the run begun in another store?")
    return Run(store, found)


def run_id(*parts: str) -> str:
    """A run's name in the store: 16 hex digits, safe in every provider's names."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def work_of(shard: str, claim: Claim) -> str:
    """What an attempt asks, as a name: attempts that follow each other without an answer in between do the same work."""
    return run_id(shard, claim.provider, claim.model, *map(str, claim.after))


def last_run(store: Objects, job: str, *identity: str) -> str:
    """The name of the last run of an identity that was begun."""
    number, name = current_run(store, job, *identity)
    if number > 1 and store.head(f"{run_folder(job, name)}/input.json") is None:
        return _numbered(identity, number - 1)
    return name


def _numbered(identity: Sequence[str], number: int) -> str:
    return run_id(*identity, *([str(number)] if number > 1 else []))


def current_run(store: Objects, job: str, *identity: str) -> tuple[int, str]:
    """The run of an identity that is under way or comes next: its number and its name.

    One that has ended is not gone on with, but begun anew: published, held, or stopped for good before anything was approved.
    """
    for number in itertools.count(1):
        name = _numbered(identity, number)
        folder = run_folder(job, name)
        summary = store.get_shape(f"{folder}/summary.json", Summary)
        if summary is None or (summary.state == "failed" and (not is_permanent(summary.error) or store.head(f"{folder}/approved.json"))):
            return number, name
    raise AssertionError("counting has no end")
