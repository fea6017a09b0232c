"""The job: what the user wants. Its contract, and its JSON Schema for editors; `job_file` reads it."""

from __future__ import annotations

import hashlib
import re
from datetime import date, timedelta
from decimal import Decimal
from functools import cached_property
from math import ceil
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import orjson
from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, field_validator, model_validator

from nightshift.dates import has_ticks
from nightshift.parameters import LIMIT, check_parameters
from nightshift.prompts import Prompt, parse_prompt
from nightshift.schemas import inlined
from nightshift.shapes import Compression, Endpoint, Format, Outcome, ProviderName, Variant, Wire

RETRYABLE: tuple[Outcome, ...] = ("invalid", "truncated", "refused", "filtered", "errored", "expired", "cancelled", "missing")
NAME = r"^[a-z][a-z0-9_]{0,62}$"
URI = re.compile(r"^(s3|gs|az|abfss?|file|memory)://")
PRESETS = ("@hourly", "@daily", "@weekly", "@monthly", "@quarterly", "@yearly")
CRON = re.compile(r"[0-9A-Za-z*,/#?LW-]+( +[0-9A-Za-z*,/#?LW-]+){4}")
OWN_DAGS = ("uploads", "upload_events", "backfill_uploads", "periodic_report")
DIMENSIONS = {
    "text-embedding-3-small": 1536,
    "text-embedding-3-large": 3072,
    "text-embedding-ada-002": 1536,
    "amazon.titan-embed-text-v2:0": 1024,
}  # where the request does not ask for fewer
BEDROCK_ENDPOINTS: tuple[Endpoint, ...] = ("converse", "invoke")


class Section(BaseModel):
    """A mapping of the job file."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Requirement(Section):
    """What a column must hold for its row to be asked at all. Rows that break it become `rejected` and cost nothing."""

    type: Literal["string", "integer", "number", "boolean"] = "string"
    optional: bool = Field(False, description="whether the value may be null or absent")
    min_length: int | None = Field(None, ge=0, description="in characters, white space at the ends not counted")
    max_length: int | None = Field(None, ge=1, description="in characters")
    minimum: float | None = None
    maximum: float | None = None
    enum: list[str | int | float] | None = Field(None, min_length=1)


class InputSpec(Section):
    """What to read."""

    uri: str = Field(description="object, pattern or folder; may use {{ ds }} and other run dates")
    id: str = Field(description="the column that names a row; unique in one run")
    require: dict[str, Requirement] = Field(default_factory=dict, description="the input contract, by column")
    format: Format | None = Field(
        None, description="only where the file name does not tell; files: each object is a row (uri, name, size, etag)"
    )
    compression: Compression | None = Field(None, description="only where the file name does not tell")
    connection: str = Field("aws_default", description="Airflow connection of the bucket")
    required: bool = Field(False, description="whether a scheduled run without input fails instead of ending as nothing to do")

    @field_validator("uri")
    @classmethod
    def _has_a_scheme(cls, uri: str) -> str:
        if not URI.match(uri):
            raise ValueError("expected a URI such as s3://bucket/prefix/*.parquet or file:///folder/*.jsonl")
        return uri


class ImagesSpec(Section):
    """Pictures that are asked about. A column's name alone says where they are."""

    columns: list[str] = Field(min_length=1, description="each holds an object's URI, an http(s) address, bytes, or a list of those")
    longest_side: int = Field(1024, ge=16, le=8000, description="in pixels; what is larger is made smaller before it is sent")
    format: Literal["jpeg", "png", "webp"] = Field("jpeg", description="that pictures are sent in")

    @model_validator(mode="before")
    @classmethod
    def _columns_alone(cls, given: Any) -> Any:
        columns = [given] if isinstance(given, str) else given
        return {"columns": columns} if isinstance(columns, list) else given

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, handler(core)]}


class RenditionSpec(Section):
    """A smaller copy of each row's first picture, published beside the results."""

    width: int = Field(ge=16, le=8000, description="in pixels, at most")
    format: Literal["webp", "avif", "jpeg", "png"] = "webp"
    quality: int = Field(80, ge=1, le=100)

    @property
    def name(self) -> str:
        """What its column is called."""
        return f"rendition_{self.width}_{self.format}"


class LimitsSpec(Section):
    """What one batch of the model may hold, where it is otherwise than the provider says or documents."""

    min_requests: int | None = Field(None, ge=1, description="fewer than that are asked on demand, at the full price")
    max_requests: int | None = Field(None, ge=1)
    max_bytes: int | None = Field(None, ge=1, description="of the whole input file")


class RequestSpec(Section):
    """What to ask which model."""

    provider: ProviderName = Field(
        description="openai: its Batch API; bedrock: its batch inference; live: any of their endpoints, asked one request at a time"
    )
    connection: str = Field("openai_default", description="Airflow connection to the provider; aws_default where it is Bedrock")
    endpoint: Endpoint = Field("/v1/chat/completions", description="converse where the provider is bedrock")
    model: str = Field(min_length=1)
    prompt: str = Field(
        description="prompt file, relative to the job file or to the folder above it; a row for which it prints a null is rejected, "
        "unless it says what stands in its place: `{{ text or '' }}`"
    )
    parameters: dict[str, Any] = Field(
        default_factory=dict,
        description="sampling parameters: max_output_tokens (whatever the provider calls it; without it nothing bounds what an answer "
        "costs), temperature, top_p and what else the model knows",
    )
    images: ImagesSpec | None = Field(
        None, description="column or columns of pictures: URI, address, bytes or a list; or {columns, longest_side: 1024, format: jpeg}"
    )
    limits: LimitsSpec = Field(default_factory=LimitsSpec)

    @property
    def is_on_bedrock(self) -> bool:
        """Whether the endpoint is one of Bedrock's."""
        return self.endpoint in BEDROCK_ENDPOINTS

    @property
    def is_embedding(self) -> bool:
        """Whether the answer is a vector."""
        return self.endpoint == "/v1/embeddings" or (self.endpoint == "invoke" and "titan-embed" in self.model)

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_provider(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        endpoint = given.get("endpoint", "converse" if given.get("provider") == "bedrock" else "/v1/chat/completions")
        connection = given.get("connection", "aws_default" if endpoint in BEDROCK_ENDPOINTS else "openai_default")
        return {**given, "endpoint": endpoint, "connection": connection}

    @field_validator("parameters")
    @classmethod
    def _leaves_the_request_alone(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        check_parameters(parameters)
        return parameters


class OutputSpec(Section):
    """What a good answer looks like, and what is kept beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    answer_schema: str | None = Field(None, alias="schema", description="JSON Schema file of the answer")
    keep: list[str] = Field(default_factory=list, description="input columns carried along")
    expectations: str | None = Field(None, description="Great Expectations suite file, audited before publication")
    renditions: list[RenditionSpec] = Field(
        default_factory=list,
        description="copies of each first picture: {width: 480, format: webp, quality: 80}; formats webp, avif, jpeg, png",
    )
    dimensions: int | None = Field(None, ge=1, le=16_384, description="numbers of an embedding, where neither model nor parameters tell")
    partition: str | None = Field(None, description="partition name; default dt={{ ds }} or the name of the input")


class Retry(Section):
    """How many times a request with this outcome is asked again, and of whom. A number alone says how many times."""

    times: int = Field(1, ge=0, le=5)
    model: str | None = Field(None, min_length=1, description="ask this model in place of the job's")

    @model_validator(mode="before")
    @classmethod
    def _number_alone(cls, given: Any) -> Any:
        return {"times": given} if isinstance(given, int) and not isinstance(given, bool) else given

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 5}, handler(core)]}


class RepairRetry(Retry):
    """How many times an invalid answer is asked to be mended. A number alone says how many times."""

    repair: bool = Field(True, description="show the model its answer and what is wrong with it")


class LongerRetry(Retry):
    """How many times an answer that was cut is asked again. A number alone says how many times."""

    token_factor: float = Field(2, ge=1, le=16, description="the token limit is multiplied by this each time")


class RetrySpec(Section):
    """How a request is asked again, by what became of it. What was answered and paid for costs again."""

    invalid: RepairRetry = RepairRetry(times=1)
    truncated: LongerRetry = LongerRetry(times=0)
    refused: Retry = Retry(times=0)
    filtered: Retry = Retry(times=0)
    errored: Retry = Retry(times=2)
    expired: Retry = Retry(times=2)
    cancelled: Retry = Field(Retry(times=2), description="cancelled by a person, and then resumed; not cancelled by the deadline")
    missing: Retry = Retry(times=2)
    lost: int = Field(0, ge=0, le=5, description="batches that the provider no longer knows; sending them again may pay twice")

    def allows(self, outcome: Outcome, times: int) -> bool:
        """Whether a request that has had this outcome `times` times may be asked once more."""
        return outcome in RETRYABLE and times <= getattr(self, outcome).times

    def variant(self, outcome: Outcome, before: Variant, limit: int | None) -> Variant:
        """How a request with this outcome is asked next; `before`: how it was asked, `limit`: the token limit of the job."""
        how: Retry = getattr(self, outcome)
        longest = before.max_output_tokens or limit
        changes: dict[str, Any] = {"repair": isinstance(how, RepairRetry) and how.repair}
        if how.model:
            changes["model"] = how.model
        if isinstance(how, LongerRetry) and longest:
            changes["max_output_tokens"] = ceil(longest * how.token_factor)
        return before.model_copy(update=changes)

    @property
    def models(self) -> tuple[str, ...]:
        """Models that are asked in place of the job's."""
        named = [getattr(self, outcome).model for outcome in RETRYABLE]
        return tuple(dict.fromkeys(model for model in named if model))


class Policy(Section):
    """Bounds: money, time, quality."""

    retry: RetrySpec = Field(default_factory=RetrySpec)
    budget_usd: Decimal | None = Field(None, gt=0, description="a run estimated above it is stopped before it costs")
    monthly_budget_usd: Decimal | None = Field(
        None, gt=0, description="all runs of the job in a calendar month (UTC); nothing is sent past it"
    )
    approve_above_usd: Decimal | None = Field(None, ge=0, description="a run estimated above it asks a person first")
    publish_at_least: float = Field(
        0.95,
        ge=0,
        le=1,
        description="share of the rows that must succeed, else the run is held; where too many are rejected, before it pays",
    )
    deadline_hours: float = Field(26, gt=0, le=336, description="a batch still running then is cancelled and harvested")
    on_demand: bool = Field(False, description="finish on demand what a batch has not run by its deadline or expiry, at the full price")
    max_requests_per_shard: int | None = Field(None, ge=1, description="smaller shards than the provider allows")

    @property
    def bound(self) -> Decimal | None:
        """What a run may spend unasked; None: as much as it takes."""
        return min((bound for bound in (self.budget_usd, self.approve_above_usd) if bound is not None), default=None)


class Together(Section):
    """Uploads that share a run."""

    files: int = Field(50, ge=1, le=10_000, description="in one run at most")
    minutes: float = Field(5, gt=0, le=1440, description="how long the first of them waits for others")


class UploadSpec(Section):
    """Uploads that start runs. A pattern alone says where they land."""

    uri: str = Field(description="pattern of uploads, each of which starts a run")
    queue: str | None = Field(None, description="URL of the SQS queue that the bucket's events go to; without it the inbox is listed")
    together: Together | None = Field(None, description="let uploads share a run: {files: 50, minutes: 5}; without it each has its own")

    @model_validator(mode="before")
    @classmethod
    def _pattern_alone(cls, given: Any) -> Any:
        return {"uri": given} if isinstance(given, str) else given

    @field_validator("uri")
    @classmethod
    def _is_a_pattern(cls, uri: str) -> str:
        if not URI.match(uri):
            raise ValueError("expected a URI pattern such as s3://bucket/inbox/*.parquet")
        return uri

    @field_validator("queue")
    @classmethod
    def _is_a_url(cls, queue: str | None) -> str | None:
        if queue is not None and not queue.startswith(("https://", "http://")):
            raise ValueError("expected the URL of an SQS queue, such as https://sqs.eu-west-1.amazonaws.com/123456789012/uploads")
        return queue

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(core)]}


class Figure(Section):
    """A figure of the periodic report, over all that a job has published in its period."""

    title: str = Field(min_length=1)
    value: str = Field("count(*)", description="SQL expression over the columns of the results, such as avg(confidence) or count(*)")
    by: list[str] = Field(default_factory=list, max_length=3, description="columns or SQL expressions that it is broken down by")
    share: bool = Field(False, description="as a share of the whole, within all but the last of `by`")


class ReportSpec(Section):
    """What the report shows beside the counts."""

    drift: list[str] = Field(
        default_factory=list, description="answer fields compared with the last published run: 0 spread alike, 1 nothing in common"
    )
    charts: list[str] = Field(default_factory=list, description="columns drawn as distributions")
    figures: list[Figure] = Field(default_factory=list, description="figures of the periodic report: {title, value, by, share}")


class NotifySpec(Section):
    """Airflow connections that are told: Slack, Slack webhook, SMTP or AWS (SNS)."""

    on_failure: list[str] = Field(default_factory=list, description="a run has failed")
    on_held: list[str] = Field(default_factory=list, description="a run's results are not good enough to be published")
    on_budget: list[str] = Field(default_factory=list, description="a budget has stopped a run")
    on_approval: list[str] = Field(default_factory=list, description="a run waits for a person")
    on_deadline: list[str] = Field(default_factory=list, description="a run is not done by policy.deadline_hours")
    on_success: list[str] = Field(default_factory=list, description="a run has published")


class JobFile(Section):
    """A Nightshift job: what to read, what to ask which model, what a good answer looks like."""

    name: str = Field(pattern=NAME, description="also the DAG id and the folder of the results")
    description: str = ""
    schedule: str | list[str] | None = Field(None, description="cron expression or several; each run reads the interval that just ended")
    timezone: str = Field("UTC", description="of the schedule, and of the dates in templates")
    start_date: date = date(2026, 1, 1)
    catchup: bool = Field(False, description="run every interval since start_date, not only the latest")
    on_upload: UploadSpec | None = Field(None, description="pattern of uploads, each of which starts a run; or {uri, queue, together}")
    owner: str = "nightshift"
    tags: list[Annotated[str, Field(min_length=1, max_length=100)]] = Field(default_factory=list)
    input: InputSpec
    request: RequestSpec
    output: OutputSpec = Field(default_factory=OutputSpec)
    policy: Policy = Field(default_factory=Policy)
    fresh: bool = Field(False, description="buy every answer anew in every run, whatever was answered before")
    report: ReportSpec = Field(default_factory=ReportSpec)
    notify: NotifySpec = Field(default_factory=NotifySpec)

    @property
    def schedules(self) -> tuple[str, ...]:
        """The cron expressions that start runs."""
        return () if self.schedule is None else (self.schedule,) if isinstance(self.schedule, str) else tuple(self.schedule)

    @property
    def stand_ins(self) -> tuple[str, ...]:
        """Models whose answers count in place of the job's own model's."""
        return tuple(model for model in self.policy.retry.models if model != self.request.model)

    @field_validator("name")
    @classmethod
    def _is_free(cls, name: str) -> str:
        if name in OWN_DAGS:
            raise ValueError(f"{name!r} is the name of a DAG of Nightshift's own")
        return name

    @field_validator("timezone")
    @classmethod
    def _is_a_zone(cls, timezone: str) -> str:
        try:
            ZoneInfo(timezone)
        except (ValueError, OSError, ZoneInfoNotFoundError) as error:
            raise ValueError("expected a time zone such as UTC or Europe/Berlin") from error
        return timezone

    @field_validator("schedule")
    @classmethod
    def _is_cron(cls, schedule: str | list[str] | None) -> str | list[str] | None:
        for each in [schedule] if isinstance(schedule, str) else schedule or ():
            if each not in PRESETS and not (CRON.fullmatch(each) and has_ticks(each)):
                raise ValueError('expected a cron expression of five fields, such as "0 2 * * *", or one of ' + ", ".join(PRESETS))
        return schedule or None


class Expectation(Section):
    """One line of a Great Expectations suite."""

    type: str
    kwargs: dict[str, Any] = Field(default_factory=dict)
    severity: Literal["critical", "warning", "info"] = "critical"

    @property
    def column(self) -> str | None:
        """The column that it looks at, if it names one."""
        named = self.kwargs.get("column")
        return named if isinstance(named, str) else None


class Suite(Section, extra="ignore"):
    """A Great Expectations suite, as far as it is read."""

    expectations: tuple[Expectation, ...]


class Job(Wire):
    """A job with everything it names: what a run freezes, so that an edit never changes a run under way."""

    spec: JobFile
    prompt_source: str
    answer_schema: dict[str, Any] | None
    expectations: tuple[Expectation, ...]

    @property
    def name(self) -> str:
        """The job's name, DAG id and results folder."""
        return self.spec.name

    @cached_property
    def prompt(self) -> Prompt:
        """The compiled prompt."""
        return parse_prompt(self.prompt_source)

    @cached_property
    def answer_shape(self) -> dict[str, Any] | None:
        """The answer's schema as its columns are made of it: with what it refers to in place of the references."""
        return None if self.answer_schema is None else inlined(self.answer_schema, self.answer_schema)

    @cached_property
    def digest(self) -> str:
        """Hash of the whole job: the same digest asks the same of the same input."""
        return hashlib.sha256(orjson.dumps(self.model_dump(mode="json"), option=orjson.OPT_SORT_KEYS)).hexdigest()

    @cached_property
    def recipe(self) -> str:
        """Hash of all that the results depend on: a change of schedule, budget or report makes no other results."""
        spec = self.spec.model_dump(mode="json")
        asked = {name: spec["request"][name] for name in ("provider", "endpoint", "model", "parameters", "images")}
        read = {name: spec["input"][name] for name in ("id", "require", "format", "compression")}
        expected = [each.model_dump(mode="json") for each in self.expectations]
        parts = [read, asked, spec["output"], self.prompt_source, self.answer_schema, expected]
        return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()

    @property
    def columns(self) -> tuple[str, ...]:
        """Every input column the job reads: id, contract, prompt, pictures, kept; each once."""
        spec, images = self.spec, self.spec.request.images
        named = [spec.input.id, *spec.input.require, *sorted(self.prompt.variables), *(images.columns if images else ()), *spec.output.keep]
        return tuple(dict.fromkeys(named))

    @property
    def kept(self) -> tuple[str, ...]:
        """Columns that are carried along to the results: the id, those of the input, and where the renditions are."""
        output = self.spec.output
        return tuple(dict.fromkeys([self.spec.input.id, *output.keep, *(each.name for each in output.renditions)]))

    @property
    def token_limit(self) -> int | None:
        """The token limit of an answer, where the job sets one."""
        limit = self.spec.request.parameters.get(LIMIT)
        return limit if isinstance(limit, int) else None

    @property
    def dimensions(self) -> int | None:
        """How many numbers an embedding has; None where the job asks for no embeddings, or where that is not known."""
        request = self.spec.request
        if not request.is_embedding:
            return None
        asked = request.parameters.get("dimensions")
        return self.spec.output.dimensions or (asked if isinstance(asked, int) else None) or DIMENSIONS.get(request.model)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the columns that an answer fills."""
        if self.spec.request.is_embedding:
            return ("embedding",)
        return ("answer",) if self.answer_schema is None else tuple(self.answer_schema.get("properties", {}))

    @property
    def patience(self) -> timedelta:
        """How long a batch may take before it is cancelled and harvested."""
        return timedelta(hours=self.spec.policy.deadline_hours)


def job_schema() -> dict[str, Any]:
    """JSON Schema of the job file, for editors."""
    schema = JobFile.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Nightshift job", **schema}
