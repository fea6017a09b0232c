"""Everything Nightshift raises on purpose.

NightshiftError
├── Permanent                     mend something; repeating it as it is cannot help
│   ├── Unusable                  something that was given to us, with every problem found
│   │   ├── JobInvalid            the job file, its prompt, schema or suite
│   │   └── SettingInvalid        an option, a form's field, a variable of the environment, a connection
│   ├── InputMissing              nothing there to read
│   ├── BucketMissing             the bucket itself does not exist
│   ├── InputUnreadable           there, but not what it says it is
│   ├── UpToDate                  the partition was made of the same objects by the same job
│   ├── InputChanged              the pinned object was replaced or deleted during the run
│   ├── AccessDenied              credentials missing, wrong, expired, or not allowed
│   ├── ModelNotFound             the provider does not offer this model
│   ├── RequestTooLarge           one request alone is over the limit for a whole batch
│   ├── BatchRejected             the provider refused the batch; nothing ran
│   │   └── CallRefused           it refused a call, and so took no batch
│   ├── ShardsFailed              shards that share a task with others cannot be settled
│   ├── BatchLost                 the provider no longer knows a batch that it took from us
│   ├── WrongPlace                a shard was sent elsewhere than this connection leads
│   ├── QuotaExhausted            the provider stopped billing us
│   ├── BudgetExceeded            the estimate is over the job's budget
│   ├── ApprovalNeeded            a person has to say yes first
│   ├── TooManyRejected           whatever is answered, too few rows can succeed
│   ├── PlanOutdated              a plan has waited so long that what it was to reuse may be gone
│   ├── RunHeld                   assembled, but not good enough to publish
│   ├── RunFailed                 a step before publication failed
│   ├── CountsDisagree            rows, requests and outcomes do not add up
│   └── LedgerCorrupt             a ledger object is not what was written
└── Transient                     come back later; nothing is lost
    ├── ProviderUnavailable       unreachable, overloaded, or talking nonsense
    │   ├── BatchUnknown          it has forgotten a batch of ours, or not heard of it yet
    │   └── ResultsGone           it knows the batch, and not the result files that the batch names
    ├── BatchUnfinished           there is nothing to harvest yet
    ├── QueueFull                 the provider takes no more batches for now
    ├── StoreUnavailable          the object store did not answer
    ├── DownloadIncomplete        fewer bytes came than the provider announced
    ├── RowInUse                  a run under way counts on the answer that is to be forgotten
    ├── ShardHeld                 a shard waits: for who is at it, for the provider's queue, or for room in a budget
    ├── SubmissionInDoubt         a create call was sent and its answer never came
    ├── ReportUnwritten           the results are published, and only their report is not written
    └── Interrupted               stopped in the middle; the same call goes on from there
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from decimal import Decimal
from typing import ClassVar


class NightshiftError(Exception):
    """Base of all errors; `exit_code` is what the command line ends with."""

    exit_code: ClassVar[int] = 1


class Permanent(NightshiftError):
    """Someone has to mend something before this can work."""

    exit_code = 2


class Transient(NightshiftError):
    """The same call may work later; nothing was lost."""

    exit_code = 2


class Unusable(Permanent):
    """What was given to us cannot be used. Carries every problem found, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class JobInvalid(Unusable):
    """The job file, or a file that it names."""


class SettingInvalid(Unusable):
    """An option, a form's field, a variable of the environment, or a connection."""


RUNS_ARE_LISTED = "`nightshift status JOB` lists its runs."
NAMED_IN_BRACKETS = "A run's name is the 16 hex digits that `nightshift status JOB` shows in brackets."


class InputMissing(Permanent):
    """Nothing to read at the given URI. `advice`: what to do about it."""

    def __init__(
        self, uri: str, why: str = "no object matches it", advice: str = "Check the bucket, the key and the pattern; nothing was sent."
    ) -> None:
        self.uri = uri
        super().__init__(f"Nothing to read at {uri}: {why}. {advice}")


class BucketMissing(Permanent):
    """The bucket of a URI does not exist: never just an interval without data."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        super().__init__(f"There is no bucket of {uri}. Check its name, its region and the connection; nothing was sent.")


class InputUnreadable(Permanent):
    """The object is there but cannot be read as what it should be."""

    def __init__(self, uri: str, why: str) -> None:
        self.uri = uri
        super().__init__(f"Cannot read {uri}: {why}. Nothing was sent.")


class UpToDate(Permanent):
    """The partition was made of the same objects by the same job: doing it again would make the same."""

    exit_code = 0

    def __init__(self, partition: str) -> None:
        self.partition = partition
        super().__init__(f"{partition} was made of the same objects by the same job. To buy its answers anew, set fresh.")


class InputChanged(Permanent):
    """The object was replaced or deleted after this run pinned it."""

    def __init__(self, uri: str, etag: str) -> None:
        self.uri, self.etag = uri, etag
        super().__init__(
            f"{uri} is no longer the object this run pinned (eTag {etag}): it was replaced or deleted meanwhile. "
            "Start a new run for the new object; this one cannot go on without the old one."
        )


class AccessDenied(Permanent):
    """Credentials are missing, wrong or expired, or not allowed to do this."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where} refused our credentials: {why}")


class ModelNotFound(Permanent):
    """The provider does not offer this model under these credentials."""

    def __init__(self, model: str, where: str) -> None:
        self.model = model
        super().__init__(f"Model {model!r} is not offered at {where}. Change request.model or the connection; nothing was sent.")


class RequestTooLarge(Permanent):
    """One request alone is over the limit for a whole batch."""

    def __init__(self, row: int, size: int, limit: int) -> None:
        self.row, self.size, self.limit = row, size, limit
        super().__init__(
            f"The request of row {row} is {size:,} bytes; a batch holds {limit:,}. "
            "Limit the column's max_length under input.require; nothing was sent."
        )


class BatchRejected(Permanent):
    """The provider took the batch and failed it as a whole; nothing ran and nothing is billed."""

    def __init__(self, batch_id: str, reasons: Sequence[str]) -> None:
        self.batch_id, self.reasons = batch_id, tuple(reasons)
        shown = "; ".join(self.reasons[:3]) or "no reason given"
        more = f" (and {len(self.reasons) - 3} more)" if len(self.reasons) > 3 else ""
        super().__init__(f"The provider rejected batch {batch_id}: {shown}{more}. Nothing ran and nothing is billed.")


class CallRefused(BatchRejected):
    """The provider refused a call, and so no batch came of it."""

    def __init__(self, where: str, why: str) -> None:
        self.batch_id, self.reasons = "", (why,)
        Permanent.__init__(self, f"{where} refused the call: {why.rstrip('.')}. Nothing ran and nothing is billed for it.")


class ShardsFailed(Permanent):
    """Shards that share a task cannot be settled. Carries what was said of each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class BatchLost(Permanent):
    """The provider has not known a batch of ours for a while: it may have run, and may be billed."""

    def __init__(self, where: str, batch_id: str) -> None:
        self.batch_id = batch_id
        super().__init__(
            f"{where} no longer knows batch {batch_id} that it took from us, or no longer has its results. Check that the "
            "connection still leads to the account that it was sent from, then run this again. To give it up and buy its "
            "requests again, set policy.retry.lost: 1; what it has answered may then be paid twice."
        )


class WrongPlace(Permanent):
    """A shard is under way at one endpoint, and the run's connection leads to another."""

    def __init__(self, shard: str, where: str, here: str) -> None:
        self.shard, self.where, self.here = shard, where, here
        super().__init__(
            f"Shard {shard[:12]} was sent to {where}, but the connection now leads to {here}, where nobody can look for it. "
            "Point the connection back until the shard is settled; nothing was sent."
        )


class QuotaExhausted(Permanent):
    """The account has no credit or the provider stopped billing it."""

    def __init__(self, why: str) -> None:
        super().__init__(f"The provider's billing stopped us: {why} Top up the account, then run this again; nothing is lost.")


class PlanOutdated(Permanent):
    """A plan has waited for its approval for so long that what it counts on may have been dropped."""

    def __init__(self, run: str, days: int) -> None:
        self.run = run
        super().__init__(
            f"{run} was planned more than {days} days ago: what it counts on may have been tidied away since. "
            "Run it again from its first task, and it is planned anew; nothing was sent."
        )


class BudgetExceeded(Permanent):
    """What is about to be bought does not fit into a budget; it was not sent."""

    exit_code = 4

    def __init__(
        self, estimate: Decimal, budget: Decimal, name: str = "policy.budget_usd", spent: Decimal = Decimal(0), shard: str = ""
    ) -> None:
        """`shard`: the one that does not fit, where it is not the whole run."""
        self.estimate, self.budget, self.name, self.spent = estimate, budget, name, spent
        what = f"Shard {shard[:12]}" if shard else "It"
        so_far = f", of which ${spent:.4f} are spent or in flight" if spent else ""
        super().__init__(
            f"{what} is estimated at ${estimate:.4f}; {name} allows ${budget:.4f}{so_far}. "
            "Raise the budget or shrink the input; nothing more was sent, and what was paid for is kept."
        )


class ApprovalNeeded(Permanent):
    """The estimate needs a person's yes, and nobody gave it."""

    exit_code = 4

    def __init__(self, estimate: Decimal | None, limit: Decimal, said: str = "") -> None:
        """`said`: what became of the question, where somebody was asked."""
        self.estimate, self.limit = estimate, limit
        cost = "at an unknown cost (no price for this model)" if estimate is None else f"at ${estimate:.4f}"
        advice = "Approve it (--yes on the command line, the task `approve` in Airflow)"
        super().__init__(
            f"{said}{'. ' if said else ''}The run is estimated {cost}; policy.approve_above_usd lets ${limit:.4f} pass without asking. "
            f"{'Clear the task `approve` to be asked again' if said else advice}; nothing was sent."
        )


class TooManyRejected(Permanent):
    """So many rows break the input contract that the run could not be published, whatever is answered."""

    exit_code = 3

    def __init__(self, rejected: int, rows: int, least: float, reasons: Mapping[str, int]) -> None:
        why = ", ".join(f"{count:,} {reason}" for reason, count in list(reasons.items())[:3])
        super().__init__(
            f"{rejected:,} of {rows:,} rows are rejected ({why}), so that at most {1 - rejected / rows:.2%} can succeed; "
            f"policy.publish_at_least asks for {least:.2%}. Mend the rows, or what is asked of them; nothing was sent."
        )


class RunHeld(Permanent):
    """The results are assembled and staged, but not good enough to be published."""

    exit_code = 3

    def __init__(self, reasons: Sequence[str], report: str) -> None:
        self.reasons, self.report = tuple(reasons), report
        super().__init__(
            f"Held, not published: {'; '.join(reasons)}. What was answered is kept, and not paid again; "
            f"readers still see the old partition. Report: {report}"
        )


GO_ON = "Mend it and clear the failed tasks; what was paid for is found again."
BEGIN_ANEW = "Nothing was sent. Mend it, then start a new run or clear all tasks of this one: it keeps to what it began with."


class RunFailed(Permanent):
    """A step failed before anything was published; what was paid for is kept."""

    exit_code = 1

    def __init__(self, why: str, report: str | None, advice: str = GO_ON) -> None:
        where = f" Report: {report}" if report else ""
        super().__init__(f"Not published: {why.rstrip('.')}. {advice}{where}")


class CountsDisagree(Permanent):
    """Rows, requests and outcomes do not add up: publishing would hide a loss."""

    exit_code = 1


class LedgerCorrupt(Permanent):
    """A ledger object cannot be read back as what was written."""

    exit_code = 1

    def __init__(self, key: str, why: str) -> None:
        super().__init__(f"Ledger object {key} is damaged: {why}. Nothing is sent for this shard until a person has looked.")


class ProviderUnavailable(Transient):
    """The provider is unreachable, overloaded, or answered with something that is not its API."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where} is unavailable: {why}")


class BatchUnknown(ProviderUnavailable):
    """The provider does not know a batch that it gave us a receipt for (yet, or any more)."""

    def __init__(self, where: str, batch_id: str) -> None:
        self.batch_id = batch_id
        super().__init__(where, f"it does not know batch {batch_id} that it took from us.")


class ResultsGone(ProviderUnavailable):
    """A batch has ended and names result files that are not there: not yet, or not any more."""

    def __init__(self, where: str, file_id: str) -> None:
        self.file_id = file_id
        super().__init__(where, f"result file {file_id} is not there.")


class BatchUnfinished(Transient):
    """A batch goes on; there is nothing to harvest yet."""

    def __init__(self, where: str, batch_id: str, why: str) -> None:
        super().__init__(f"{where} has not finished batch {batch_id}: {why}.")


class QueueFull(Transient):
    """The provider has as many batches of ours as it takes; nothing was created."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where} takes no more batches for now: {why}")


class StoreUnavailable(Transient):
    """The object store is unreachable or answered with a server error."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"Object store {where} is unavailable: {why}")


class DownloadIncomplete(Transient):
    """A result file came shorter than announced; it is fetched again."""

    def __init__(self, file_id: str, received: int, expected: int) -> None:
        self.file_id, self.received, self.expected = file_id, received, expected
        super().__init__(f"Result file {file_id} broke off after {received:,} of {expected:,} bytes; it will be fetched again.")


class RowInUse(Transient):
    """A run that counts on the row can still be gone on with."""

    def __init__(self, run: str) -> None:
        self.run = run
        super().__init__(
            f"{run} is under way, waits for approval, or can be gone on with, and counts on a row that is to be forgotten. "
            "Let it come to its end first; a plan that nobody approves is over after some days."
        )


class ShardHeld(Transient):
    """A shard cannot be sent now: somebody is at it, the provider's queue is full, or a budget has no room yet."""

    def __init__(self, shard: str, why: str, seconds_left: float) -> None:
        self.shard, self.why, self.seconds_left = shard, why, seconds_left
        super().__init__(f"Shard {shard[:12]} waits: {why}. Looked at again in {seconds_left:.0f} s.")


class SubmissionInDoubt(Transient):
    """A create call left, its answer did not come, and the batch is not in the provider's list (yet)."""

    def __init__(self, token: str) -> None:
        self.token = token
        super().__init__(
            f"No answer came to a create call (token {token}). Nothing is sent again before its claim has lapsed and the "
            "provider's list has been searched for the token."
        )


class ReportUnwritten(Transient):
    """The results are published, and their report could not be written."""

    def __init__(self, results: str, why: Exception) -> None:
        self.results = results
        super().__init__(f"The results are published at {results}, but their report was not written ({why}). The same command writes it.")


class Interrupted(Transient):
    """Another shard failed, or a person stopped the process; this work can be gone on with."""

    exit_code = 130


def nearest(word: str, known: Collection[str]) -> str:
    """What was probably meant, as the end of a message; nothing where nothing comes near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def is_permanent(name: str | None) -> bool:
    """Whether an error of this name is one that somebody has to mend."""
    known = globals().get(name or "")
    return isinstance(known, type) and issubclass(known, Permanent)
