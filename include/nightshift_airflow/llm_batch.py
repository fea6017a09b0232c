"""`bedrock:` models for Airflow's own `@task.llm_batch`, through this project's engine.

Found by apache-airflow-providers-common-ai (1.0.0, experimental there) through the entry point group
`airflow.providers.common.ai.batch_adapters`. Its connection is of type `pydanticai`, whose host names the AWS connection.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import orjson
from airflow.providers.common.ai.batch.base import (
    BatchAdapter,
    BatchRequest,
    BatchState,
    BatchStatus,
    ExtractedOutput,
    RawResultItem,
    SubmitResult,
)
from airflow.providers.common.ai.batch.output_schema import OutputSpec
from airflow.providers.common.ai.exceptions import LLMBatchLimitExceededError, LLMBatchModelMismatchError

from nightshift.errors import BatchUnknown, ShardHeld, WrongPlace
from nightshift.providers.bedrock import LIMITS, BedrockJobs
from nightshift.providers.bedrock_forms import ConverseForm
from nightshift.providers.protocol import Order, Question, Reply, Snapshot
from nightshift.shapes import Receipt
from nightshift.steps.submit import find, pay
from nightshift.steps.wait import is_waiting_for_files
from nightshift.stores.ledger import Attach, Attempt, Claim, Ended, Hold, Search, next_move
from nightshift_airflow.site import bedrock_access, site_for

DEFAULT_CONNECTION = "aws_default"
RUN = "@task.llm_batch"  # in place of the URI of a run of ours
OVER = ("Failed", "Stopped")
ENDED: dict[str, BatchStatus] = {
    "Completed": "completed",
    "PartiallyCompleted": "expired",  # what was not reached in time; what was is still fetched
    "Expired": "expired",
    "Stopped": "cancelled",
    "Failed": "failed",
}
ITEMS = {"errored": "errored", "expired": "expired", "cancelled": "cancelled"}  # every other outcome is an answer


class BedrockBatchAdapter(BatchAdapter):
    """Bedrock's model invocation jobs, asked by Converse; see BatchAdapter."""

    name: ClassVar[str] = "bedrock"
    max_requests: ClassVar[int] = LIMITS.requests
    max_payload_bytes: ClassVar[int] = LIMITS.request_bytes
    allows_per_request_model: ClassVar[bool] = False

    def __init__(self, *, api_key: str | None = None, base_url: str | None = None, client: BedrockJobs | None = None) -> None:
        """`base_url`, which a connection calls its host, is the id of an AWS connection. There is no key: AWS has its own."""
        self._site = site_for(None, f"{RUN} pid {os.getpid()}")
        super().__init__(client=client or BedrockJobs("converse", self._site.store, bedrock_access(base_url or DEFAULT_CONNECTION)))
        self._form = ConverseForm()

    def validate_requests(
        self, requests: list[BatchRequest], *, model: str, output_spec: OutputSpec, idempotency_key: str, **kwargs: Any
    ) -> None:
        """See BatchAdapter. A job of Bedrock has a smallest size as well."""
        self.check_custom_id_length(idempotency_key, len(requests))
        limits = self._client.limits(model)
        if not limits.least <= len(requests) <= limits.requests:
            raise LLMBatchLimitExceededError(
                f"A batch of {model} on Bedrock holds between {limits.least} and {limits.requests} requests; got {len(requests)}. "
                "Split the input with .expand(), or ask so few with @task.llm."
            )
        for index, request in enumerate(requests):
            if self.resolve_request_model(request.get("model"), default_bare_model=model, request_index=index) != model:
                raise LLMBatchModelMismatchError(f"A job of Bedrock asks one model; request {index} names another one.")
        size = sum(len(line) + 1 for line in self._lines(requests, model, idempotency_key, output_spec, kwargs))
        if size > limits.request_bytes:
            raise LLMBatchLimitExceededError(
                f"A job of Bedrock takes {limits.request_bytes:,} bytes of requests; these are {size:,}. Split the input with .expand()."
            )

    def submit(
        self,
        requests: list[BatchRequest],
        *,
        model: str,
        idempotency_key: str,
        input_fingerprint: str,
        output_spec: OutputSpec,
        **kwargs: Any,
    ) -> SubmitResult:
        """See BatchAdapter. The same key and input are the same job, however often this is called."""
        name = name_of(idempotency_key, input_fingerprint)
        labels = {"idempotency-key": idempotency_key, "input": input_fingerprint[:16]}
        with TemporaryDirectory(prefix="nightshift-") as folder:
            path = Path(folder) / "requests.jsonl"
            with path.open("wb") as file:
                file.writelines(line + b"\n" for line in self._lines(requests, model, idempotency_key, output_spec, kwargs))
            receipt = self._job(name, len(requests)) or self._send(name, model, path, len(requests), labels)
        return SubmitResult(batch_id=receipt.batch_id, provider_input_ref=None)

    def _job(self, name: str, count: int) -> Receipt | None:
        """The job of an input that goes on or has answers; None where it is to be sent. As for a shard, its claim says which it is.

        One that failed, was stopped or is not known any more is over for good: what is sent after it is another job.
        """
        ledger, now = self._site.ledger, self._site.now
        while True:
            match next_move(ledger.attempts(name), now=now()):
                case Attach(attempt=attempt, receipt=receipt):
                    ended = self._ended(attempt, receipt, count)
                    if ended is None:
                        return receipt
                    ledger.record_end(name, attempt.number, ended)
                case Hold(until=until, why=why):
                    raise ShardHeld(name, why, (until - now()).total_seconds())
                case Search() as search:
                    return find(self._site, name, search, self._open)
                case _:
                    return None

    def _ended(self, attempt: Attempt, receipt: Receipt, count: int) -> Ended | None:
        """What to write of a job that is over; None while there is something to wait for or to read."""
        try:
            status = self._open(attempt).poll(receipt.batch_id).status
        except BatchUnknown:
            return Ended(how="lost", status="lost", ended_at=self._site.now(), remaining=count)
        return Ended(how="rejected", status=status, ended_at=self._site.now(), remaining=count) if status in OVER else None

    def _send(self, name: str, model: str, path: Path, count: int, labels: dict[str, str]) -> Receipt:
        """Upload, then claim, create and record as for every shard."""
        attempts = self._site.ledger.attempts(name)
        claim = Claim(
            token=self._site.ledger.token(name, len(attempts) + 1),
            owner=self._site.owner,
            claimed_at=self._site.now(),
            where=self._client.where,
            run=RUN,
            provider="bedrock",
            model=model,
            asked=count,
        )
        uploaded = self._client.upload(claim.token, path)
        order = Order(uploaded=uploaded, model=model, token=claim.token, work=name, labels=labels)
        return pay(self._site, self._client, name, claim, order, attempts)

    def _open(self, attempt: Attempt) -> BedrockJobs:
        """The client, where it is the place at which an attempt was claimed."""
        if attempt.claim.where != self._client.where:
            raise WrongPlace(attempt.claim.token, attempt.claim.where, self._client.where)
        return self._client

    def get_batch(self, batch_id: str) -> BatchState:
        """See BatchAdapter. Counts come from the results, not from Bedrock's counters."""
        snapshot = self._poll(batch_id)
        now = datetime.now(UTC)
        is_there = not is_waiting_for_files(snapshot, now, latest=now)  # results can lag behind the status
        status = ENDED.get(snapshot.status, "in_progress") if is_there else "in_progress"
        return BatchState(status=status, counts=None, error_message="; ".join(snapshot.reasons) or None)

    def _poll(self, batch_id: str) -> Snapshot:
        try:
            return self._client.poll(batch_id)
        except BatchUnknown as error:
            raise JobNotFound(str(error)) from error

    def cancel_batch(self, batch_id: str) -> None:
        """See BatchAdapter."""
        self._client.cancel(batch_id)

    def iter_results(self, batch_id: str) -> Iterator[RawResultItem]:
        """See BatchAdapter."""
        return self._results(self._poll(batch_id))

    def _results(self, snapshot: Snapshot) -> Iterator[RawResultItem]:
        with TemporaryDirectory(prefix="nightshift-") as folder:
            for reply in self._client.replies(snapshot, Path(folder)):
                if isinstance(reply, Reply):
                    yield _item(reply)

    def build_output_directive(self, spec: OutputSpec) -> dict[str, Any]:
        """See BatchAdapter. Batches of Bedrock know no structured output: the schema is asked for in words."""
        return {"schema": spec.json_schema} if spec.is_structured else {}

    def extract_output(self, raw: RawResultItem, spec: OutputSpec) -> ExtractedOutput:
        """See BatchAdapter."""
        text = raw.raw.text
        if text is None:
            return ExtractedOutput(kind="absent")
        return ExtractedOutput(kind="json_text" if spec.is_structured else "text", text=text)

    def find_orphaned_batch(self, idempotency_key: str, input_fingerprint: str, not_before: str) -> str | None:
        """See BatchAdapter. Its claim says what there is to be found, however long ago."""
        found = self._job(name_of(idempotency_key, input_fingerprint), 0)
        return found.batch_id if found else None

    def _lines(
        self, requests: list[BatchRequest], model: str, idempotency_key: str, spec: OutputSpec, batch: dict[str, Any]
    ) -> Iterator[bytes]:
        """The records of a job, one at a time. What a request says counts before what the batch says."""
        for index, request in enumerate(requests):
            limit = request.get("max_tokens") or batch.get("max_tokens")
            parameters = {**(batch.get("request_params") or {}), **(request.get("params") or {})}
            asked = Question(
                model=model,
                system=request.get("system_prompt") or batch.get("system_prompt") or None,
                user=request["prompt"],
                parameters={**parameters, "max_output_tokens": limit} if limit else parameters,
                schema=self.build_output_directive(spec).get("schema"),
            )
            yield self._form.line(f"{idempotency_key}-{index}", orjson.dumps(self._form.body(asked)))


class JobNotFound(Exception):
    """Bedrock does not know a job; its code is what the operator goes by."""

    status_code = 404


def name_of(idempotency_key: str, input_fingerprint: str) -> str:
    """What the ledger calls one task instance's one input."""
    return "llm-batch-" + hashlib.sha256(f"{idempotency_key}/{input_fingerprint}".encode()).hexdigest()


def _item(reply: Reply) -> RawResultItem:
    status: Any = ITEMS.get(reply.outcome, "success")
    usage = {"input_tokens": reply.input_tokens or 0, "output_tokens": reply.output_tokens or 0} if reply.paid else None
    return RawResultItem(
        custom_id=reply.custom_id,
        index=int(number) if (number := reply.custom_id.rpartition("-")[2]).isdecimal() else -1,
        provider_status=status,
        model=reply.model,
        usage=usage,
        finish_reason=None if reply.outcome == "succeeded" else reply.outcome,
        error=None if status == "success" else {"message": reply.reason},
        raw=reply,
    )
