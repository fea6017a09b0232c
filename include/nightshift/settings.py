"""Settings that belong to the place Nightshift runs at, not to a job: read from the environment, once, at the edge."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from nightshift.errors import SettingInvalid

DEFAULT_REPORTS = "periodic_report=0 0 * * 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Where things are. Credentials are not here: each SDK finds its own."""

    store: str | None  # NIGHTSHIFT_STORE, s3://bucket/prefix or file:///dir
    jobs: Path  # NIGHTSHIFT_JOBS, the folder of job files
    poll_seconds: float  # NIGHTSHIFT_POLL_SECONDS, between two looks at a batch
    upload_poll_seconds: float  # NIGHTSHIFT_UPLOAD_POLL_SECONDS, between two looks at an inbox
    width: int  # NIGHTSHIFT_WIDTH, tasks of a run in Airflow that go on side by side
    store_connection: str  # NIGHTSHIFT_STORE_CONNECTION, the Airflow connection of the store
    bedrock_role_arn: str | None  # NIGHTSHIFT_BEDROCK_ROLE_ARN, the role that Bedrock reads and writes S3 as
    bedrock_files: str | None  # NIGHTSHIFT_BEDROCK_FILES, the S3 folder of its requests and results; None = the store
    bedrock_events: str | None  # NIGHTSHIFT_BEDROCK_EVENTS, the URL of an SQS queue with its job events; None = waits only look
    # NIGHTSHIFT_REPORTS, DAG id and cron of each periodic report: "periodic_report=@weekly; daily=@daily"
    reports: tuple[tuple[str, str], ...]
    report_to: tuple[str, ...]  # NIGHTSHIFT_REPORT_TO, Airflow connections that periodic reports are sent to
    monthly_budget_usd: Decimal | None  # NIGHTSHIFT_MONTHLY_BUDGET_USD, outside Airflow: what all jobs of a connection may spend
    prices: Path | None  # NIGHTSHIFT_PRICES, a CSV file whose prices count in place of the table's
    scratch: Path | None  # NIGHTSHIFT_SCRATCH, local disk for spools; None = the system's temporary folder


def read_settings(env: Mapping[str, str] = os.environ) -> Settings:
    """Settings from environment variables; relative folders are taken from the working directory."""
    scratch, prices = env.get("NIGHTSHIFT_SCRATCH"), env.get("NIGHTSHIFT_PRICES")
    return Settings(
        store=env.get("NIGHTSHIFT_STORE"),
        jobs=Path(env.get("NIGHTSHIFT_JOBS") or Path(__file__).parent.parent / "jobs"),
        poll_seconds=_seconds(env, "NIGHTSHIFT_POLL_SECONDS"),
        upload_poll_seconds=_seconds(env, "NIGHTSHIFT_UPLOAD_POLL_SECONDS"),
        width=_width(env.get("NIGHTSHIFT_WIDTH", "64")),
        store_connection=env.get("NIGHTSHIFT_STORE_CONNECTION", "aws_default"),
        bedrock_role_arn=env.get("NIGHTSHIFT_BEDROCK_ROLE_ARN"),
        bedrock_files=env.get("NIGHTSHIFT_BEDROCK_FILES"),
        bedrock_events=env.get("NIGHTSHIFT_BEDROCK_EVENTS"),
        reports=_named(env.get("NIGHTSHIFT_REPORTS", DEFAULT_REPORTS), "NIGHTSHIFT_REPORTS"),
        report_to=tuple(each.strip() for each in env.get("NIGHTSHIFT_REPORT_TO", "").split(",") if each.strip()),
        monthly_budget_usd=_dollars(env, "NIGHTSHIFT_MONTHLY_BUDGET_USD"),
        prices=Path(prices) if prices else None,
        scratch=_folder(scratch, "NIGHTSHIFT_SCRATCH") if scratch else None,
    )


def _named(text: str, name: str) -> tuple[tuple[str, str], ...]:
    """Pairs such as `a=x; b=y`."""
    pairs = [tuple(part.strip() for part in each.split("=", 1)) for each in text.split(";") if each.strip()]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise SettingInvalid([f"{name}={text!r}: expected names and schedules, such as {DEFAULT_REPORTS!r}"])
    return tuple((pair[0], pair[1]) for pair in pairs)


def _seconds(env: Mapping[str, str], name: str) -> float:
    try:
        found = float(env.get(name, "30"))
    except ValueError as error:
        raise SettingInvalid([f"{name}={env[name]!r}: expected a number of seconds"]) from error
    if not 0 < found < math.inf:
        raise SettingInvalid([f"{name}={env[name]!r}: expected a number of seconds above 0"])
    return found


def _folder(text: str, name: str) -> Path:
    if any(mark in text for mark in "*?["):
        raise SettingInvalid([f"{name}={text!r}: expected a folder without *, ? and [, which DuckDB would read as a pattern"])
    return Path(text)


def _width(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise SettingInvalid([f"NIGHTSHIFT_WIDTH={text!r}: expected a number of tasks, 1 or more"])
    return int(text)


def _dollars(env: Mapping[str, str], name: str) -> Decimal | None:
    return dollars(env[name], name) if env.get(name) else None


def dollars(text: object, name: str) -> Decimal:
    """An amount of dollars above nothing. Raises SettingInvalid naming where it stands."""
    try:
        found = Decimal(str(text))
    except InvalidOperation as error:
        raise SettingInvalid([f"{name}={text!r}: expected a number of dollars"]) from error
    if not found.is_finite() or found <= 0:
        raise SettingInvalid([f"{name}={text!r}: expected a number of dollars above 0"])
    return found
