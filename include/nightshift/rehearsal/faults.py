"""The menu of faults: what a real provider does on a bad day, switched on one by one.

Shares are per request and drawn from a hash of batch and request, so that a run can be repeated. Counts go down with
each use. Names in brackets are entries of the failure catalogue.
"""

from __future__ import annotations

import hashlib

from pydantic import BaseModel, ConfigDict, Field


class Faults(BaseModel):
    """Settings of a rehearsal server. `PUT /rehearsal/faults` replaces them while it runs."""

    model_config = ConfigDict(extra="forbid")

    # What becomes of requests: shares, 0 to 1
    errored: float = Field(0, ge=0, le=1, description="500 inside the error file, retryable (F83)")
    errored_once: float = Field(0, ge=0, le=1, description="the same, but only the first time that a request is run")
    bad_request: float = Field(0, ge=0, le=1, description="400 inside the error file, not retryable (F71)")
    status_zero: float = Field(0, ge=0, le=1, description="status_code 0 in the output file (F70)")
    missing: float = Field(0, ge=0, le=1, description="no line at all (F66)")
    duplicate: float = Field(0, ge=0, le=1, description="the line stands twice (F67)")
    unknown: float = Field(0, ge=0, le=1, description="an extra line for a request nobody sent (F68)")
    garbage: float = Field(0, ge=0, le=1, description="the line is cut in the middle (F65)")
    truncated: float = Field(0, ge=0, le=1, description="cut by the token limit (F75)")
    refused: float = Field(0, ge=0, le=1, description="the model declines (F76)")
    filtered: float = Field(0, ge=0, le=1, description="a content filter stops it (F77)")
    invalid: float = Field(0, ge=0, le=1, description="prose in place of JSON (F78)")
    no_usage: float = Field(0, ge=0, le=1, description="the answer comes without usage (F85)")
    never_run: float = Field(0, ge=0, le=1, description="the batch expires before this request runs (F56)")

    # What happens to calls: how many more times
    create_500_after_accept: int = Field(0, ge=0, description="the batch is stored, the answer is a 500 (F33)")
    create_cut_after_accept: int = Field(0, ge=0, description="the batch is stored, the connection breaks (F33)")
    create_500: int = Field(0, ge=0, description="a 500 and nothing is stored")
    create_quota: int = Field(0, ge=0, description="429 insufficient_quota (F39)")
    poll_500: int = Field(0, ge=0, description="a look at a batch fails (F44)")
    poll_html: int = Field(0, ge=0, description="a look answers with a proxy's HTML page (F44)")
    poll_404: int = Field(0, ge=0, description="a look does not find the batch (F46)")
    content_502: int = Field(0, ge=0, description="a download fails (F62)")
    content_404: int = Field(0, ge=0, description="a result file is not there yet (F60)")
    content_cut: int = Field(0, ge=0, description="a download breaks off (F63)")
    content_short: int = Field(0, ge=0, description="a download ends early and looks complete (F64)")
    cancel_500: int = Field(0, ge=0, description="a cancel fails (F49)")
    rate_limit: int = Field(0, ge=0, description="any call: 429 with retry-after (F26)")

    # What happens to requests on demand: how many more times
    live_429: int = Field(0, ge=0, description="429 with retry-after (F99)")
    live_500: int = Field(0, ge=0, description="a 500")
    live_cut: int = Field(0, ge=0, description="answered and billed, and the connection breaks (F100)")
    live_html: int = Field(0, ge=0, description="a proxy's HTML page (F101)")

    # How it behaves
    live_seconds: float = Field(0, ge=0, description="how long a request on demand takes")
    live_capacity: int | None = Field(None, ge=1, description="requests on demand at once; the next one is a 503 (F99)")
    file_hidden_seconds: float = Field(0, ge=0, description="an uploaded file is unknown to create for a while (F30)")
    results_lag_seconds: float = Field(
        0, ge=0, description="a batch has ended and does not name its result files for a while, nor that of errors for half of it (F60)"
    )
    results_gone: bool = Field(False, description="result files are named and not there any more (F61)")
    fails_at_the_end: bool = Field(False, description="a batch ends as failed after its work was done and billed (F59)")
    list_lag_seconds: float = Field(0, ge=0, description="new batches are not listed for a while (F33)")
    enqueued_token_limit: int | None = Field(None, ge=1, description="input tokens in the queue per model (F22)")
    minimum_records: int = Field(100, ge=1, description="fewer records than that fail a job of Bedrock")
    jobs_at_once: int = Field(20, ge=0, description="more jobs of a model of Bedrock are a ServiceQuotaExceededException (F25)")
    quotas_denied: bool = Field(False, description="Service Quotas is not to be read")
    events_queue: str | None = Field(None, description="SQS queue for job events of Bedrock; they come twice and in no order (F51)")
    no_manifest: bool = Field(False, description="a job of Bedrock leaves no manifest (F89)")
    empty_error_file_id: bool = Field(False, description='error_file_id is "" on a clean batch (F54)')
    odd_counts: bool = Field(False, description="request_counts do not add up (F47)")
    unknown_status: bool = Field(False, description="in_progress is called by a word nobody knows (F45)")


def drawn(batch: int | str, custom_id: str, fault: str, share: float) -> bool:
    """Whether this request of this batch (its number, or a word for all) has the fault: the same every time, independent between faults."""
    if share <= 0:
        return False
    digest = hashlib.blake2b(f"{batch}/{custom_id}/{fault}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64
