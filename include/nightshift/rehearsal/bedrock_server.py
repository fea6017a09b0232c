"""Bedrock in the rehearsal: the control plane of jobs, the runtime, and the quotas, as boto3 speaks to them.

Patterns and maxima that boto3 does not check are checked here, as AWS does. Fidelity is to `bedrock` as read on 2026-11-21.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import string
import time
from datetime import UTC, datetime
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response

from nightshift.money.prices import base_model, models_of
from nightshift.rehearsal import bedrock_desk
from nightshift.rehearsal.answers import broken
from nightshift.rehearsal.bedrock_desk import ACCOUNT, MAX_RECORDS, arn_of
from nightshift.rehearsal.book import ON_DEMAND, StoredBatch
from nightshift.rehearsal.state import State

ACCESS_KEY = "rehearsal"
JOB_NAME = re.compile(r"(?=.{1,63}$)[a-zA-Z0-9]{1,63}(-*[a-zA-Z0-9+\-.]){0,63}")
TOKEN = re.compile(r"(?=.{1,256}$)[a-zA-Z0-9]{1,256}(-*[a-zA-Z0-9]){0,256}")
ROLE = re.compile(r"arn:aws(-[^:]+)?:iam::([0-9]{12}):role/.+")
S3_URI = re.compile(r"(?=.{1,1024}$)s3://[a-z0-9][-.a-z0-9]{1,61}[a-z0-9](?:/[-!_*'().a-z0-9A-Z]+(?:/[-!_*'().a-z0-9A-Z]+)*)?/?")
TAG = re.compile(r"[a-zA-Z0-9\s._:/=+@-]*")
RUNNING = ("validating", "in_progress", "finalizing", "cancelling")
WORDS = {"validating": "Validating", "in_progress": "InProgress", "finalizing": "InProgress", "cancelling": "Stopping",
         "completed": "Completed", "cancelled": "Stopped", "failed": "Failed"}  # fmt: skip
ENDPOINTS = {"InvokeModel": "invoke", "Converse": "converse"}


class AwsError(Exception):
    """An answer that is an error, in the shape of AWS's REST-JSON."""

    def __init__(self, status: int, code: str, message: str) -> None:
        self.status, self.code, self.message = status, code, message
        super().__init__(message)


def add_bedrock(app: FastAPI, state: State) -> None:
    """Bedrock's routes, on the book, the engine and the faults of the rehearsal server."""

    @app.exception_handler(AwsError)
    async def shown(request: Request, error: AwsError) -> Response:
        return _json({"message": error.message}, error.status, {"x-amzn-errortype": error.code})

    _jobs(app, state)
    _models(app, state)
    _runtime(app, state)


def _jobs(app: FastAPI, state: State) -> None:
    @app.post("/model-invocation-job")
    async def create(request: Request) -> Response:
        region = _admit(state, request)
        body = orjson.loads(await request.body())
        _check(body)
        if state.use("create_500"):
            raise AwsError(500, "InternalServerException", "An internal server error occurred. Retry your request.")
        before = [job for job in _all(state) if job.settings["token"] == body["clientRequestToken"]]
        if before:
            return _json({"jobArn": arn_of(before[0])})
        running = sum(1 for job in _all(state) if job.model == body["modelId"] and job.status in RUNNING)
        if state.use("create_quota") or running >= state.faults.jobs_at_once:
            raise AwsError(
                400, "ServiceQuotaExceededException", "Too many batch inference jobs are submitted or in progress for this model."
            )
        job = _stored(state, body, region)
        state.book.add_batch(job)
        if state.use("create_500_after_accept"):
            raise AwsError(500, "InternalServerException", "An internal server error occurred. Retry your request.")
        shaped = orjson.dumps({"jobArn": arn_of(job)})
        return broken(shaped, len(shaped)) if state.use("create_cut_after_accept") else Response(shaped, media_type="application/json")

    @app.get("/model-invocation-jobs")
    def list_jobs(
        request: Request,
        nameContains: str | None = None,  # noqa: N803 — the API's own names
        statusEquals: str | None = None,  # noqa: N803
        submitTimeAfter: datetime | None = None,  # noqa: N803
        maxResults: int = 100,  # noqa: N803
        nextToken: int = 0,  # noqa: N803
        sortOrder: str = "Descending",  # noqa: N803
    ) -> Response:
        _admit(state, request)
        if nameContains is not None and not JOB_NAME.fullmatch(nameContains):
            raise AwsError(400, "ValidationException", f"nameContains {nameContains!r} is not part of a job name.")
        found = [
            _job(state, job)
            for job in _all(state)
            if state.visible(job.created_at, state.faults.list_lag_seconds)
            and (nameContains is None or nameContains in job.settings["jobName"])
            and (statusEquals is None or _word(state, job) == statusEquals)
            and (submitTimeAfter is None or job.created_at > submitTimeAfter.timestamp())
        ]
        if sortOrder == "Ascending":
            found.reverse()
        page = {"invocationJobSummaries": found[nextToken : nextToken + maxResults]}
        return _json(page if nextToken + maxResults >= len(found) else {**page, "nextToken": str(nextToken + maxResults)})

    @app.post("/model-invocation-job/{job:path}/stop")
    def stop(request: Request, job: str) -> Response:
        _admit(state, request)
        if state.use("cancel_500"):
            raise AwsError(500, "InternalServerException", "An internal server error occurred. Retry your request.")
        found = _find(state, job)
        if found.status not in RUNNING:
            raise AwsError(400, "ConflictException", f"The job is {_word(state, found)} and cannot be stopped.")
        state.engine.cancel(found.id)
        return _json({})

    @app.get("/model-invocation-job/{job:path}")
    def get(request: Request, job: str) -> Response:
        _admit(state, request)
        if state.use("poll_500"):
            raise AwsError(500, "InternalServerException", "An internal server error occurred. Retry your request.")
        if state.use("poll_html"):
            return HTMLResponse("<html><body>Welcome to the proxy</body></html>")
        if state.use("poll_404"):
            raise AwsError(404, "ResourceNotFoundException", "The provided job could not be found.")
        return _json(_job(state, _find(state, job)))


def _models(app: FastAPI, state: State) -> None:
    @app.get("/foundation-models/{name:path}")
    def foundation_model(request: Request, name: str) -> Response:
        region = _admit(state, request)
        if name != base_model(name) or not bedrock_desk.known_model(name):
            raise AwsError(400, "ValidationException", "The provided model identifier is invalid.")
        details = {
            "modelArn": f"arn:aws:bedrock:{region}::foundation-model/{name}",
            "modelId": name,
            "modelName": _title(name),
            "providerName": name.partition(".")[0],
            "inferenceTypesSupported": ["ON_DEMAND"],
        }
        return _json({"modelDetails": details})

    @app.get("/inference-profiles/{name:path}")
    def inference_profile(request: Request, name: str) -> Response:
        region = _admit(state, request)
        if name == base_model(name) or not bedrock_desk.known_model(name):
            raise AwsError(404, "ResourceNotFoundException", f"The inference profile {name} could not be found.")
        return _json(
            {
                "inferenceProfileName": name,
                "inferenceProfileArn": f"arn:aws:bedrock:{region}:{ACCOUNT}:inference-profile/{name}",
                "inferenceProfileId": name,
                "models": [{"modelArn": f"arn:aws:bedrock:{region}::foundation-model/{base_model(name)}"}],
                "status": "ACTIVE",
                "type": "SYSTEM_DEFINED",
            }
        )

    @app.post("/")
    async def service_quotas(request: Request) -> Response:
        _admit(state, request)
        if not request.headers.get("x-amz-target", "").endswith(".ListServiceQuotas"):
            raise AwsError(400, "UnknownOperationException", "The rehearsal knows ListServiceQuotas only.")
        if state.faults.quotas_denied:
            raise AwsError(400, "AccessDeniedException", "User is not authorized to perform: servicequotas:ListServiceQuotas")
        names = models_of("bedrock")
        quotas: list[dict[str, Any]] = [
            {"QuotaName": f"{quota} for {_title(name)}", "Value": float(value), "ServiceCode": "bedrock"}
            for name in names
            for quota, value in (
                ("Minimum number of records per batch inference job", state.faults.minimum_records),
                ("Records per batch inference job", MAX_RECORDS),
                ("Batch inference input file size (in GB)", 1),
            )
        ]
        return _json({"Quotas": quotas})


def _runtime(app: FastAPI, state: State) -> None:
    @app.post("/model/{name:path}/{endpoint}")
    async def ask(request: Request, name: str, endpoint: str) -> Response:
        _admit(state, request)
        if not bedrock_desk.known_model(name):
            raise AwsError(400, "ValidationException", "The provided model identifier is invalid.")
        if state.use("live_429"):
            raise AwsError(429, "ThrottlingException", "Too many requests, please wait before trying again.")
        if state.use("live_500"):
            raise AwsError(500, "InternalServerException", "An internal server error occurred. Retry your request.")
        if state.use("live_html"):
            return HTMLResponse("<html><body>Welcome to the proxy</body></html>")
        if state.is_full:
            raise AwsError(503, "ServiceUnavailableException", "Bedrock is unable to process your request.")
        body = orjson.loads(await request.body())
        async with state.slot():
            await asyncio.sleep(state.faults.live_seconds)
            status, shaped, tokens_in, tokens_out = bedrock_desk.answer(endpoint, name, body)
            if status != 200:
                raise AwsError(400, "ValidationException", shaped["message"])
            asked = request.headers.get("x-client-request-id") or secrets.token_hex(16)
            state.book.charge(f"{ON_DEMAND} {secrets.token_hex(8)}", [(asked, name, tokens_in, tokens_out)], "standard")
            return broken(orjson.dumps(shaped), 1 << 20) if state.use("live_cut") else _json(shaped)


def _admit(state: State, request: Request) -> str:
    """Check the credentials, as every route does first; the region that the call is for."""
    given = request.headers.get("authorization", "")
    scope = re.search(r"Credential=([^/]+)/\d{8}/([^/]+)/", given)
    if not scope and given != f"Bearer {state.key}":
        raise AwsError(403, "MissingAuthenticationTokenException", "Missing Authentication Token")
    if scope and scope[1] != ACCESS_KEY:
        raise AwsError(403, "UnrecognizedClientException", "The security token included in the request is invalid.")
    if state.use("rate_limit"):
        raise AwsError(429, "ThrottlingException", "Rate exceeded")
    return scope[2] if scope else "us-east-1"


def _check(body: dict[str, Any]) -> None:
    """The patterns and maxima of CreateModelInvocationJob, which boto3 leaves to the server."""
    inputs = body.get("inputDataConfig", {}).get("s3InputDataConfig", {}).get("s3Uri", "")
    outputs = body.get("outputDataConfig", {}).get("s3OutputDataConfig", {}).get("s3Uri", "")
    tags = body.get("tags") or []
    wrong = [
        name
        for name, value, pattern in (
            ("jobName", body.get("jobName", ""), JOB_NAME),
            ("clientRequestToken", body.get("clientRequestToken", ""), TOKEN),
            ("roleArn", body.get("roleArn", ""), ROLE),
            ("inputDataConfig.s3InputDataConfig.s3Uri", inputs, S3_URI),
            ("outputDataConfig.s3OutputDataConfig.s3Uri", outputs, S3_URI),
            *((f"tags.{tag['key']}", f"{tag['key']}{tag['value']}", TAG) for tag in tags),
        )
        if not pattern.fullmatch(value)
    ]
    if len(tags) > 200 or any(len(tag["key"]) > 128 or len(tag["value"]) > 256 for tag in tags):
        wrong.append("tags")
    if wrong:
        raise AwsError(400, "ValidationException", f"1 validation error detected: Value at {wrong[0]!r} failed to satisfy constraint.")
    if not bedrock_desk.known_model(body["modelId"]):
        raise AwsError(400, "ValidationException", f"The provided model identifier is invalid: {body['modelId']}.")
    if body.get("modelInvocationType", "InvokeModel") not in ENDPOINTS:
        raise AwsError(400, "ValidationException", "modelInvocationType is neither InvokeModel nor Converse.")


def _stored(state: State, body: dict[str, Any], region: str) -> StoredBatch:
    now = time.time()
    role = ROLE.fullmatch(body["roleArn"])
    return StoredBatch(
        id="".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(12)),
        endpoint=ENDPOINTS[body.get("modelInvocationType", "InvokeModel")],
        input_file_id=body["inputDataConfig"]["s3InputDataConfig"]["s3Uri"],
        metadata={tag["key"]: tag["value"] for tag in body.get("tags") or []},
        created_at=now,
        expires_at=now + min(state.engine.pace.window, 3600.0 * body.get("timeoutDurationInHours", 24)),
        model=body["modelId"],
        settings={
            "jobName": body["jobName"],
            "token": body["clientRequestToken"],
            "roleArn": body["roleArn"],
            "output": body["outputDataConfig"]["s3OutputDataConfig"]["s3Uri"],
            "region": region,
            "account": role[2] if role else ACCOUNT,
        },
    )


def _all(state: State) -> list[StoredBatch]:
    """Every job, newest first."""
    return [batch for batch in state.book.batches() if batch.settings]


def _find(state: State, name: str) -> StoredBatch:
    """A job by its ARN or its id."""
    found = state.book.batch(name.rpartition("/")[2])
    if found is None or not found.settings:
        raise AwsError(404, "ResourceNotFoundException", "The provided job could not be found.")
    return found


def _word(state: State, job: StoredBatch) -> str:
    """Bedrock's word for where a job is."""
    if job.status == "expired":
        return "PartiallyCompleted" if job.completed else "Expired"
    if state.faults.unknown_status and job.status == "in_progress":
        return "Contemplating"
    return WORDS[job.status]


def _job(state: State, job: StoredBatch) -> dict[str, Any]:
    running = job.status in RUNNING
    done = state.engine.progress(job, job.cancelling_at or time.time()) if running else job.completed + job.failed
    ended = max(job.completed_at or 0, job.failed_at or 0, job.expired_at or 0, job.cancelled_at or 0)
    shown = {
        "jobArn": arn_of(job),
        "jobName": job.settings["jobName"],
        "modelId": job.model,
        "clientRequestToken": job.settings["token"],
        "roleArn": job.settings["roleArn"],
        "status": _word(state, job),
        "message": job.errors[0]["message"] if job.errors else None,
        "submitTime": _moment(job.created_at),
        "lastModifiedTime": _moment(ended or job.created_at),
        "endTime": _moment(ended) if ended else None,
        "inputDataConfig": {"s3InputDataConfig": {"s3InputFormat": "JSONL", "s3Uri": job.input_file_id}},
        "outputDataConfig": {"s3OutputDataConfig": {"s3Uri": job.settings["output"]}},
        "timeoutDurationInHours": 24,
        "jobExpirationTime": _moment(job.expires_at),
        "modelInvocationType": {word: name for name, word in ENDPOINTS.items()}[job.endpoint],
        "totalRecordCount": 0 if job.status == "validating" else job.total + 7 * state.faults.odd_counts,
        "processedRecordCount": done,
        "successRecordCount": done - job.failed,
        "errorRecordCount": job.failed,
    }
    return {name: value for name, value in shown.items() if value is not None}


def _title(name: str) -> str:
    return name.partition(".")[2].partition(":")[0].replace("-", " ").title()


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    shown = {"x-amzn-requestid": secrets.token_hex(16), **(headers or {})}
    return Response(orjson.dumps(body), status, shown, "application/json")
