"""Amazon Bedrock: model invocation jobs as batches, and the runtime for what is asked on demand.

Shapes, patterns, limits and odd behaviours: `bedrock` and `bedrock-runtime` as read on 2026-11-21 (botocore 1.44.5). A job reads
its requests from S3 and writes its results there, as a role of its own, so both lie in a folder of ours and nothing is downloaded
from Bedrock itself. Creating a job is idempotent by its token; all the same it goes out once, and a doubt is looked up.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from uuid import uuid4

import orjson

from nightshift.aws import default_session, make_client
from nightshift.errors import (
    AccessDenied,
    BatchUnknown,
    CallRefused,
    InputMissing,
    ModelNotFound,
    NightshiftError,
    ProviderUnavailable,
    QueueFull,
    ResultsGone,
    SettingInvalid,
)
from nightshift.money.prices import base_model
from nightshift.providers.doubt import CLOCK_SKEW, look_after_doubt
from nightshift.providers.forms import form_of
from nightshift.providers.looks import SharedLooks
from nightshift.providers.protocol import BatchState, Garbage, Limits, Order, Reply, Snapshot
from nightshift.providers.results import read_file
from nightshift.shapes import Endpoint, Outcome, Receipt
from nightshift.stores.ledger import CREATE_TIMEOUT
from nightshift.stores.objects import Objects

if TYPE_CHECKING:
    import boto3

STATES: dict[str, BatchState] = {
    "Submitted": "running",
    "Validating": "running",
    "Scheduled": "running",
    "InProgress": "running",
    "Stopping": "running",
    "Completed": "ended",
    "PartiallyCompleted": "ended",
    "Stopped": "ended",
    "Expired": "ended",
    "Failed": "failed",
}  # an unknown status is a running one (F45)
ANSWERED = ("Completed", "PartiallyCompleted")  # something ran, whatever the counters say
RUNNING = ("Submitted", "Validating", "Scheduled", "InProgress")
ABSENT: dict[str, Outcome] = {"PartiallyCompleted": "expired", "Expired": "expired", "Stopped": "cancelled"}  # F58
INVOCATION = {"converse": "Converse", "invoke": "InvokeModel"}

LIMITS = Limits(requests=50_000, request_bytes=1_000_000_000, least=100)  # where neither the job nor Service Quotas says otherwise
QUOTAS = {
    "minimum number of records per batch inference job": "least",
    "records per batch inference job": "requests",
    "records per input file per batch inference job": "requests",
    "batch inference input file size (in gb)": "gigabytes",
}  # as Service Quotas calls them, before " for " and the model's name
GIGABYTE = 1_000_000_000
SHORTEST_HOURS, LONGEST_HOURS = 24, 168  # of a job
NAME = "nightshift-"  # and an attempt's token: no underscore, no colon, at most 63 characters
S3_URI = re.compile(r"s3://[a-z0-9][-.a-z0-9]{1,61}[a-z0-9](/[-!_*'().a-z0-9A-Z]+)*")
ROLE_ARN = re.compile(r"arn:aws(-[^:]+)?:iam::([0-9]{12}):role/.+")
ROLE_HINT = "set NIGHTSHIFT_BEDROCK_ROLE_ARN (in Airflow, bedrock.role_arn under the connection's service_config)"
FILES_HINT = "set NIGHTSHIFT_BEDROCK_FILES to a folder on S3 (in Airflow, bedrock.files under the connection's service_config)"
DENIED_CODES = frozenset(
    {
        "AccessDenied",
        "AccessDeniedException",
        "ExpiredToken",
        "ExpiredTokenException",
        "IncompleteSignature",
        "InvalidClientTokenId",
        "InvalidSignatureException",
        "MissingAuthenticationTokenException",
        "RequestExpired",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    }
)
PASSING_CODES = frozenset(
    {"ConflictException", "RequestLimitExceeded", "Throttling", "ThrottlingException", "TooManyRequestsException"}
)  # of any service that is asked on the way, STS among them; some of them come as a 400
OUR_FAULT = ("ValidationException", "ResourceNotFoundException")


@dataclass(frozen=True, kw_only=True)
class BedrockAccess:
    """How to get into Bedrock, from `AWS_*` or from an Airflow connection."""

    session: boto3.Session | None = None  # None: boto3's own defaults
    clients: tuple[tuple[str, str], ...] = ()  # more arguments of every client, such as region_name
    endpoints: tuple[tuple[str, str], ...] = ()  # service → URL, where it is not AWS's own
    role_arn: str | None = None
    files: Objects | None = None  # None: the store

    @property
    def opened(self) -> boto3.Session:
        """The session that was given, or the process's own as it is now."""
        return self.session or default_session()

    @cached_property
    def looks(self) -> SharedLooks[Mapping[str, Any]]:
        """What all who wait for jobs by this access share."""
        return SharedLooks()

    def client(self, service: str, **config: Any) -> Any:
        """A boto3 client. Raises AccessDenied where boto3 finds no region or no credentials."""
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        arguments: dict[str, Any] = dict(self.clients)
        if url := dict(self.endpoints).get(service):
            arguments["endpoint_url"] = url
        try:
            return make_client(self.opened, service, config=Config(**config), **arguments)
        except (BotoCoreError, ValueError) as error:
            raise AccessDenied("AWS", f"{error} Set AWS_* variables or a profile; inside Airflow, the connection.") from error


class BedrockJobs:
    """The provider `bedrock`."""

    def __init__(
        self, endpoint: Endpoint, store: Objects, access: BedrockAccess | None = None, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._endpoint, self._access, self._sleep = endpoint, access or BedrockAccess(), sleep
        self._files, self._form = self._access.files or store, form_of(endpoint)
        self._limits: dict[str, Limits] = {}

    @property
    def where(self) -> str:
        """The endpoint, the account, which the endpoint alone does not tell, and the folder on S3 in which jobs are found."""
        role = ROLE_ARN.fullmatch(self._access.role_arn or "")
        return f"{self._control.meta.endpoint_url} of account {role[2] if role else 'unknown'} by way of {self._files.uri}"

    @cached_property
    def _control(self) -> Any:
        return self._access.client("bedrock", retries={"mode": "standard", "total_max_attempts": 4}, connect_timeout=5, read_timeout=60)

    @cached_property
    def _once(self) -> Any:
        """The client of the one call that costs: no retries, and done before the claim's lease is."""
        patience = CREATE_TIMEOUT.total_seconds()
        return self._access.client(
            "bedrock", retries={"mode": "standard", "total_max_attempts": 1}, connect_timeout=patience / 3, read_timeout=patience * 2 / 3
        )

    def limits(self, model: str) -> Limits:
        """See Provider. The account's own where Service Quotas tells them, else those that are documented."""
        if model not in self._limits:
            self._limits[model] = quotas_of(model, self._access)
        return self._limits[model]

    def check(self, model: str) -> None:
        """See Provider. Whether the role may do what it has to shows only when a job is validated, which costs nothing either."""
        if not ROLE_ARN.fullmatch(self._access.role_arn or ""):
            given = f"{self._access.role_arn!r} is not the ARN of a role" if self._access.role_arn else "no role is set"
            raise SettingInvalid([f"Bedrock reads and writes S3 as a role of its own, and {given}: {ROLE_HINT}."])
        uri = self._files.uri_of("bedrock")
        if not S3_URI.fullmatch(uri):
            why = "has characters that Bedrock does not take" if uri.startswith("s3://") else "is not on S3"
            raise SettingInvalid([f"The requests and results of Bedrock go through {uri}, which {why}: {FILES_HINT}."])
        check_model(model, self._control)

    def upload(self, token: str, path: Path) -> str:
        """See Provider. Into a folder of its own each time: of two workers at one attempt neither changes what the other sends."""
        key = f"{_folder(token)}/{uuid4().hex[:12]}/requests.jsonl"
        self._files.put(key, path)
        return self._files.uri_of(key)

    def create(self, order: Order, may_send: Callable[[], bool]) -> Receipt:
        """See Provider. Raises QueueFull where the account has as many jobs of the model as it may."""
        from botocore.exceptions import BotoCoreError, ClientError

        client, started = self._once, datetime.now(UTC)
        if not may_send():
            raise ProviderUnavailable(self.where, "the claim on this shard lapsed before the call went out; nothing was sent.")
        try:
            created = client.create_model_invocation_job(
                jobName=NAME + order.token,
                clientRequestToken=order.token,
                roleArn=self._access.role_arn,
                modelId=order.model,
                modelInvocationType=INVOCATION[self._endpoint],
                inputDataConfig={"s3InputDataConfig": {"s3Uri": order.uploaded}},
                outputDataConfig={"s3OutputDataConfig": {"s3Uri": f"{order.uploaded.rpartition('/')[0]}/out/"}},
                timeoutDurationInHours=min(max(ceil(order.window / timedelta(hours=1)), SHORTEST_HOURS), LONGEST_HOURS),
                tags=[{"key": f"nightshift-{name}", "value": value} for name, value in order.labels.items()],
            )
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if status >= 500 or status == 408 or _code(error) == "ConflictException":
                return look_after_doubt(self, order.token, started, error, self._sleep)
            with self._errors():
                raise
        except never_left():
            with self._errors():  # it certainly never left
                raise
        except (BotoCoreError, ValueError) as error:  # no answer, or not the API's
            return look_after_doubt(self, order.token, started, error, self._sleep)
        if not isinstance(arn := created.get("jobArn"), str):
            return look_after_doubt(self, order.token, started, ValueError("the answer holds no job"), self._sleep)
        return Receipt(batch_id=arn, token=order.token, created_at=started)

    def find(self, tokens: Sequence[str], since: datetime) -> Receipt | None:
        """See Provider. By the job's name, which holds the token: the list knows a filter for that."""
        for token in tokens:
            found = [
                job
                for job in self._jobs(nameContains=NAME + token, submitTimeAfter=since - CLOCK_SKEW)
                if token in (job.get("clientRequestToken"), str(job.get("jobName")).removeprefix(NAME))
            ]
            if found:
                oldest = min(found, key=lambda job: job["submitTime"])
                return Receipt(batch_id=oldest["jobArn"], token=token, created_at=oldest["submitTime"])
        return None

    def is_busy(self) -> bool:
        """See Provider."""
        return any(next(iter(self._jobs(statusEquals=status)), None) is not None for status in RUNNING)

    def _jobs(self, order: str = "Ascending", **filters: Any) -> Iterator[Mapping[str, Any]]:
        """Jobs, oldest first or in another order. What is not clearly a list is an outage, never an empty list."""
        with self._errors():
            pages = self._control.get_paginator("list_model_invocation_jobs").paginate(sortBy="CreationTime", sortOrder=order, **filters)
            for page in pages:
                if not isinstance(page.get("invocationJobSummaries"), list):
                    raise ProviderUnavailable(self.where, "its list of jobs is not a list of jobs.")
                yield from page["invocationJobSummaries"]

    def _job(self, arn: str) -> Mapping[str, Any]:
        from botocore.exceptions import ClientError

        try:
            with self._errors(passing=OUR_FAULT):
                job: Mapping[str, Any] = self._control.get_model_invocation_job(jobIdentifier=arn)
        except ClientError as error:
            self._access.looks.forget(arn)
            raise BatchUnknown(self.where, arn) from error
        return job

    def poll(self, batch_id: str, *, waiting: bool = False) -> Snapshot:
        """See Provider. The result files are looked for once the job has ended: before, they may be half of what comes (F94)."""
        looks = self._access.looks
        job = looks.look(batch_id, lambda: ((str(each.get("jobArn")), each) for each in self._jobs("Descending"))) if waiting else None
        if job is None:
            job = self._job(batch_id)
        status = job.get("status")
        if not isinstance(status, str):
            raise ProviderUnavailable(self.where, f"its answer about job {batch_id} holds no status")
        state = STATES.get(status, "running")
        if state != "running":
            looks.forget(batch_id)
        files, processed = () if state == "running" else tuple(self._results(job, batch_id)), job.get("processedRecordCount") or 0
        ended_at = job.get("endTime") or job.get("lastModifiedTime")
        return Snapshot(
            state=state,
            status=status,
            done=processed,
            total=job.get("totalRecordCount") or 0,
            result_files=files,
            reasons=(str(job["message"]),) if job.get("message") else (),
            bad_lines={},
            ended_at=ended_at if isinstance(ended_at, datetime) and state != "running" else None,
            absent=ABSENT.get(status, "missing"),
            # The counter decides whether to wait a little longer for files (F60), and nothing else.
            awaits_files=state != "running" and not files and (processed > 0 or status in ANSWERED),
            is_stopping=status == "Stopping",
        )

    def _results(self, job: Mapping[str, Any], arn: str) -> Iterable[str]:
        """Keys of the result files: below the prefix that was given, in a folder of the job's own id (F87); not the manifest (F88)."""
        out = str(job["outputDataConfig"]["s3OutputDataConfig"]["s3Uri"])
        if not out.startswith(f"{self._files.uri}/"):
            raise AccessDenied(
                self.where, f"the results of {arn} are under {out}, and we look under {self._files.uri}; {FILES_HINT} as it was."
            )
        folder = f"{self._files.key_of(out).rstrip('/')}/{arn.rpartition('/')[2]}"
        return sorted(found.key for found in self._files.scan(folder) if found.key.endswith(".jsonl.out"))

    def replies(self, snapshot: Snapshot, scratch: Path) -> Iterator[Reply | Garbage]:
        """See Provider. What the manifest counts is compared with what was read, where there is one (F89), and never believed."""
        records = 0
        for number, key in enumerate(snapshot.result_files):
            with self._download(key, scratch / f"results-{number}.jsonl").open("rb") as file:
                for reply in read_file(self._form, file):
                    records += 1
                    yield reply
        for folder in dict.fromkeys(key.rpartition("/")[0] for key in snapshot.result_files):
            counted = _processed(self._files.get(f"{folder}/manifest.json.out"))
            if counted is not None and counted != records:
                yield Garbage(reason=f"the manifest counts {counted} records, {records} were read", alarm="manifests that count otherwise")

    def _download(self, key: str, path: Path) -> Path:
        try:
            return self._files.download(key, path)
        except InputMissing as error:  # somebody else has settled the shard meanwhile, and removed it
            raise ResultsGone(self.where, key) from error

    def cancel(self, batch_id: str) -> None:
        """See Provider. One that comes too late or is lost is no error: who waits looks again, and asks again (F48, F49)."""
        try:
            with self._errors():
                self._control.stop_model_invocation_job(jobIdentifier=batch_id)
        except (CallRefused, ProviderUnavailable):
            self.poll(batch_id)

    def clean(self, token: str, batch_id: str | None) -> None:
        """See Provider. The results echo every prompt (F96), so nothing of a settled job stays."""
        self._files.delete([found.key for found in self._files.scan(_folder(token))])

    @contextmanager
    def _errors(self, passing: Sequence[str] = ()) -> Iterator[None]:
        with translated(self.where, passing):
            yield


class BedrockRuntime:
    """Bedrock on demand, as a live server: Converse and InvokeModel."""

    hint = "It needs bedrock:InvokeModel on the model, and access to the model in this region."

    def __init__(self, endpoint: Endpoint, access: BedrockAccess | None = None) -> None:
        self._endpoint, self._access = endpoint, access or BedrockAccess()

    @cached_property
    def _client(self) -> Any:
        return self._access.client("bedrock-runtime")

    @cached_property
    def where(self) -> str:
        """The runtime's URL."""
        return str(self._client.meta.endpoint_url).rstrip("/")

    def check(self, model: str) -> None:
        """See Api."""
        check_model(model, self._access.client("bedrock", retries={"mode": "standard", "total_max_attempts": 4}, connect_timeout=5))

    def call(self, model: str, custom_id: str, body: bytes) -> tuple[str, dict[str, str]]:
        """See Api. Signed by botocore, or with the key that Bedrock gives out for itself."""
        from botocore.auth import SigV4Auth
        from botocore.awsrequest import AWSRequest

        url = f"{self.where}/model/{quote(model, safe='-._~')}/{self._endpoint}"
        headers = {"Content-Type": "application/json", "X-Client-Request-Id": custom_id}
        if key := os.environ.get("AWS_BEARER_TOKEN_BEDROCK"):
            return url, {**headers, "Authorization": f"Bearer {key}"}
        request = AWSRequest("POST", url, headers, body)
        with translated(self.where):
            credentials = self._access.opened.get_credentials()
            if credentials is None:
                raise AccessDenied("AWS", "there are no credentials. Set AWS_* variables or a profile; inside Airflow, the connection.")
            SigV4Auth(credentials.get_frozen_credentials(), "bedrock", self._client.meta.region_name).add_auth(request)
        return url, dict(request.headers.items())


def check_model(model: str, control: Any) -> None:
    """Raise ModelNotFound where Bedrock does not offer a model in this region. A caller who may not ask passes: only a no is a no."""
    from botocore.exceptions import ClientError

    where, is_arn = str(control.meta.endpoint_url), model.startswith("arn:")  # a custom or imported model is known only to its own account
    try:
        with translated(where, (*OUR_FAULT, "AccessDeniedException")):
            if ":application-inference-profile/" in model or ":inference-profile/" in model or (model != base_model(model) and not is_arn):
                control.get_inference_profile(inferenceProfileIdentifier=model)
            elif not is_arn or ":foundation-model/" in model:
                control.get_foundation_model(modelIdentifier=base_model(model))
    except ClientError as error:
        if _code(error) in OUR_FAULT:
            raise ModelNotFound(model, f"{where} ({_message(error)})") from error


def quotas_of(model: str, access: BedrockAccess) -> Limits:
    """What Service Quotas says of batches of a model; what it does not say, or not to us, is as documented."""
    from botocore.exceptions import BotoCoreError, ClientError

    found: dict[str, list[float]] = {}
    config: dict[str, Any] = {"retries": {"mode": "standard", "total_max_attempts": 3}, "connect_timeout": 3, "read_timeout": 10}
    try:
        control, quotas = access.client("bedrock", **config), access.client("service-quotas", **config)
        name = str(control.get_foundation_model(modelIdentifier=base_model(model))["modelDetails"]["modelName"])
        for page in quotas.get_paginator("list_service_quotas").paginate(ServiceCode="bedrock"):
            for quota in page["Quotas"]:
                kind, _, of = str(quota["QuotaName"]).casefold().rpartition(" for ")
                if of == name.casefold() and kind in QUOTAS:
                    found.setdefault(QUOTAS[kind], []).append(float(quota["Value"]))
    except (BotoCoreError, ClientError, NightshiftError, KeyError, TypeError, ValueError):
        return LIMITS
    return Limits(
        requests=int(min(found.get("requests", [LIMITS.requests]))),
        request_bytes=int(min(found["gigabytes"]) * GIGABYTE) if "gigabytes" in found else LIMITS.request_bytes,
        least=int(max(found.get("least", [LIMITS.least]))),
    )


@contextmanager
def translated(where: str, passing: Sequence[str] = ()) -> Iterator[None]:
    """boto3's errors as ours; those with a code in `passing` are left for the caller, who knows what they mean."""
    from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError

    try:
        yield
    except ClientError as error:
        code, message = _code(error), _message(error)
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in passing:
            raise
        if code in DENIED_CODES or status in (401, 403):
            raise AccessDenied(where, f"{message} Check the credentials, their region and what they may do.") from error
        if code == "ServiceQuotaExceededException":
            raise QueueFull(where, message) from error
        if status in (408, 429) or status >= 500 or code in PASSING_CODES:
            raise ProviderUnavailable(where, f"{code}: {message}") from error
        raise CallRefused(where, message) from error
    except credential_errors() as error:
        raise AccessDenied("AWS", f"{error} Set AWS_* variables or a profile; inside Airflow, the connection.") from error
    except ParamValidationError as error:
        raise CallRefused(where, str(error).partition("\n")[2] or str(error)) from error
    except BotoCoreError as error:
        raise ProviderUnavailable(where, f"{type(error).__name__}: {str(error)[:300]}") from error


def credential_errors() -> tuple[type[Exception], ...]:
    """What botocore raises before a call goes out, where it has no credentials or cannot renew them."""
    from botocore import exceptions as known

    return (
        known.NoCredentialsError,
        known.PartialCredentialsError,
        known.CredentialRetrievalError,
        known.TokenRetrievalError,
        known.SSOError,
        known.NoAuthTokenError,
    )


def never_left() -> tuple[type[Exception], ...]:
    """What botocore raises where a call has certainly not gone out."""
    from botocore import exceptions as known

    return (known.EndpointConnectionError, known.ConnectTimeoutError, known.ParamValidationError, *credential_errors())


def _folder(token: str) -> str:
    """Where the requests and the results of an attempt are."""
    return f"bedrock/{token}"


def _processed(manifest: bytes | None) -> int | None:
    """How many records a manifest counts; None where there is none that can be read."""
    try:
        counted = orjson.loads(manifest or b"null")["processedRecordCount"]
    except (ValueError, KeyError, TypeError):
        return None
    return counted if isinstance(counted, int) else None


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _message(error: Any) -> str:
    text = str(error.response.get("Error", {}).get("Message") or error).strip().partition("\n")[0][:300]
    return text if text.endswith(".") else f"{text}."
