"""Shapes of data that leave the process: XCom, ledger, plan, summary. Frozen, and strict about unknown keys."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

ProviderName = Literal["openai", "bedrock", "live"]
Tier = Literal["batch", "on_demand"]
Endpoint = Literal["/v1/chat/completions", "/v1/responses", "/v1/embeddings", "converse", "invoke"]
Outcome = Literal[
    "succeeded", "invalid", "truncated", "refused", "filtered", "errored", "expired", "cancelled", "missing", "rejected"
]  # fmt: skip
Format = Literal["parquet", "csv", "jsonl", "files"]
Compression = Literal["gzip", "zstd"]

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
PAID_OUTCOMES: tuple[Outcome, ...] = ("succeeded", "invalid", "truncated", "refused", "filtered")  # the provider billed tokens


class Wire(BaseModel):
    """A shape that leaves the process."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PinnedObject(Wire):
    """One input object, fixed at discovery: what is not pinned is not read."""

    uri: str
    etag: str
    version: str | None
    size: int  # bytes, as stored
    rows: int | None  # from the footer, where the format has one
    format: Format
    compression: Compression | None


class Shard(Wire):
    """Requests that become one provider batch per attempt. Stored as `shards/<key>/shard.json`."""

    key: str  # hash of its request keys: same requests, same key, whoever asks
    fingerprint: str
    provider: ProviderName
    endpoint: Endpoint
    model: str
    request_count: int
    request_bytes: int  # of its lines; a picture counts as the text that costs as much
    least: int = 1  # requests of a batch, as it was when the shard was planned; fewer are asked on demand
    seeded: bool = False  # `answers-0` holds what became of its requests before, and how they are asked now


class Receipt(Wire):
    """Proof that the provider took a shard."""

    batch_id: str
    token: str
    created_at: datetime  # the provider's clock


class Variant(Wire):
    """How a request is asked again. Its answer still counts as the answer to the request that the row asks."""

    provider: ProviderName | None = None  # None: the provider that the job names
    model: str | None = None  # None: the model that the job names
    max_output_tokens: int | None = None  # None: the limit that the job sets
    repair: bool = False  # the model is shown its answer and what is wrong with it
    alone: bool = False  # in a line of its own, where several requests share one


class Usage(Wire):
    """Tokens as the provider reported them. `unknown` counts paid answers that came without usage."""

    input_tokens: int = 0
    cached_tokens: int = 0  # part of input_tokens
    output_tokens: int = 0
    long_input_tokens: int = 0  # part of input_tokens: of requests so long that their model costs more for them
    long_cached_tokens: int = 0  # part of those
    long_output_tokens: int = 0  # part of output_tokens
    unknown: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(**{name: getattr(self, name) + getattr(other, name) for name in Usage.model_fields})


class Paid(Wire):
    """What one run bought of a shard from one model of one provider."""

    run: str  # URI of the run that claimed the attempts
    provider: ProviderName
    model: str
    batches: int
    answers: int  # that were paid for, over all attempts: not only those that were kept
    usage: Usage


class Settled(Wire):
    """A shard that needs no more driving. Stored as `shards/<key>/settled.json`; one line per request is in `answers`."""

    shard: str
    answers: str  # key of the Parquet file in the store
    requests: int
    paid: tuple[Paid, ...]
    alarms: dict[str, int]  # oddities in the result files, by name: counted, never trusted


class Estimate(Wire):
    """What a plan will cost, before it is paid. Tokens are measured from bytes; dollars are None where no price is known."""

    input_tokens: int
    output_tokens: int  # expected
    output_tokens_max: int | None  # if every answer used its whole limit; None: the job sets none
    usd: Decimal | None
    usd_low: Decimal | None = None  # the interval that the cost is expected in
    usd_high: Decimal | None = None
    usd_max: Decimal | None  # at that length
    measured_on: int = 0  # paid answers of this job that the tokens were calibrated on; 0: on none
    basis: str  # price table, its date and its tier


class Measured(Wire):
    """What the requests of a job have cost. Stored as `runs/<job>/measured.json`, in place of the one before."""

    model: str
    prompt_version: str
    answers: int  # that were paid for
    per_request: Decimal  # answers: some are asked for again
    input_factor: Decimal  # input tokens as billed, by those that were expected from the bytes
    cached_share: Decimal  # of the input tokens
    output_per_answer: Decimal  # tokens


class Plan(Wire):
    """What a run will do. Stored as `runs/<job>/<run>/plan.json`, once, and as approved beside it as `approved.json`."""

    fingerprint: str
    rows: int
    rejected: int
    reasons: dict[str, int]  # rejections, by reason
    unique: int  # distinct requests among the rows that are not rejected
    duplicates: int  # rows whose request another row of this run asks as well
    reused: int  # requests answered and paid for earlier
    adopted: int  # requests in flight in somebody else's shard
    submitted: int  # requests in this run's own shards
    shards: tuple[str, ...]  # own and adopted
    adopted_shards: tuple[str, ...]
    answers: tuple[str, ...]  # answer files that hold the reused requests
    slices: tuple[str, ...]  # row indexes, in order of the rows
    estimate: Estimate
    saved_usd: Decimal | None  # what the duplicates and the reused requests would have cost
    approved_at: datetime | None = None
    month_left: Decimal | None = None  # dollars that the budgets of the month left when it was approved
    seen: str  # digest of what was known then of others' answers and shards: looked at again only where it has changed
    stand_ins: tuple[str, ...] = ()  # whose answers count beside those of the job's own: of the run that is driven again
    since: datetime | None = None  # earlier answers are not taken: the start of a run that buys anew, also for what drives it again

    @property
    def own_shards(self) -> tuple[str, ...]:
        """The shards that this run pays for."""
        return tuple(shard for shard in self.shards if shard not in self.adopted_shards)


class Assembled(Wire):
    """The joined dataset, staged. Stored as `runs/<job>/<run>/assembled.json`."""

    outcomes: dict[Outcome, int]
    reasons: dict[str, dict[str, int]]  # per outcome other than succeeded: the most frequent reasons
    parts: tuple[str, ...]  # keys of staged Parquet files, in row order
    quarantine: tuple[str, ...]
    paid: tuple[Paid, ...]  # what this run bought, over all its shards
    taken_over: int = 0  # requests in adopted shards that this run has sent, because their own run had not
    alarms: dict[str, int]

    @property
    def usage(self) -> Usage:
        """The tokens that this run paid for."""
        return sum((each.usage for each in self.paid), Usage())


class Check(Wire):
    """One expectation, applied to the staged dataset."""

    expectation: str
    column: str | None
    bounds: str = ""  # its other arguments, for people
    severity: Literal["critical", "warning", "info"]
    success: bool
    unexpected: int | None
    examples: tuple[str, ...]  # ids of rows that broke it
    detail: str | None


class Audit(Wire):
    """The verdict on the staged dataset. Stored as `runs/<job>/<run>/audit.json`."""

    passed: bool
    share_succeeded: float
    reasons: tuple[str, ...]  # why it is held, empty when passed
    checks: tuple[Check, ...]


class Published(Wire):
    """A partition that readers see. Its manifest is the commit."""

    uri: str
    rows: int
    parts: tuple[str, ...]  # file names below uri


class Counts(Wire):
    """What became of the requests of a run."""

    unique: int
    duplicates: int
    reused: int
    adopted: int
    submitted: int


class Cost(Wire):
    """Dollars. None = unknown, never 0."""

    estimated: float | None
    estimated_low: float | None = None  # the interval that it was stated with
    estimated_high: float | None = None
    actual: float | None
    saved: float | None
    by_tier: dict[Tier, float | None]  # of what was paid
    basis: str


class Approval(Wire):
    """What was said to a run's cost. Stored as `runs/<job>/<run>/approval-<n>.json`, each once."""

    decision: Literal["approved", "refused", "timed_out"]
    by: str
    at: datetime
    estimate_usd: Decimal | None
    note: str = ""
    grant: int | None = None  # the question of a backfill that it goes back to


class Problem(Wire):
    """What a task of a run failed with, or why it had nothing to do. Stored as `runs/<job>/<run>/problem.json`; the last one stays."""

    task: str
    error: str  # class
    message: str


class Distribution(Wire):
    """How the values of a column are spread: the most frequent by name, or a histogram of ten bars."""

    kind: Literal["shares", "histogram"]
    bars: tuple[tuple[str, int], ...]  # what a bar stands for, and how many values
    total: int  # values that are not null
    low: float | None = None  # where the first bar of a histogram begins
    width: float | None = None  # of each bar
    in_last: tuple[int, ...] | None = None  # how many values stand in each bar of the last published run's histogram


class Summary(Wire):
    """What happened, in numbers that add up. Stored as `runs/<job>/<run>/summary.json`."""

    job: str
    run: str
    label: str  # what people call the run: Airflow's run id, or the command line's
    redrive_of: str | None  # the run whose failures this one drives again
    approvals: tuple[Approval, ...] = ()
    sample: int | None = None  # rows that it was asked to stay with: published beside the results
    state: Literal["published", "held", "failed", "planned"]  # planned: a dry run
    problem: str | None
    error: str | None = None  # the class of what stopped it
    partition: str
    model: str
    prompt_version: str
    started_at: datetime
    finished_at: datetime
    input_uris: tuple[str, ...]
    rows: int
    outcomes: dict[Outcome, int]
    reasons: dict[str, dict[str, int]]
    requests: Counts
    taken_over: int = 0  # of those that were adopted: sent by this run, because their own had not
    batches: int
    paid: int  # answers that this run paid for, over all attempts
    usage: Usage
    alarms: dict[str, int]
    cost_usd: Cost
    audit: Audit | None
    figures: dict[str, Distribution]  # per column of charts and drift, in this run
    drift: dict[str, float | None]  # per drift column: total variation distance to the last published run, 0..1
    drift_against: str | None
    columns: dict[str, str] = {}  # of the results: Arrow types by name
    changed_columns: tuple[str, ...] = ()  # what readers of the last published run's columns do not find any more, in words
    published: bool
    results: str | None
    quarantine: str | None
    report: str
