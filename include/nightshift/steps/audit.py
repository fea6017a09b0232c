"""audit: run the job's Great Expectations suite on the staged dataset, before readers can see it.

Great Expectations costs seconds and 240 MB to import, so it is imported here, inside the step, and nowhere else.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from nightshift.job import Expectation, Job
from nightshift.runs import Run, Site
from nightshift.shapes import Assembled, Audit, Check, Plan

if TYPE_CHECKING:
    import pandas as pd

EXAMPLES = 5


def audit(site: Site, run: Run, plan: Plan, assembled: Assembled) -> Audit:
    """The verdict on the staged dataset: the share of rows that succeeded, and every expectation."""
    stored = site.store.get_shape(run.key("audit.json"), Audit)
    if stored is not None:
        return stored
    checks = run_suite(run.job, _frame(site, run.job, assembled)) if run.job.expectations else ()
    return site.store.settle(run.key("audit.json"), verdict(run.job, plan.rows, assembled, checks))


def verdict(job: Job, rows: int, assembled: Assembled, checks: tuple[Check, ...]) -> Audit:
    """Decide: held when too few rows succeeded or a critical expectation failed."""
    share = assembled.outcomes["succeeded"] / rows if rows else 0.0
    least = job.spec.policy.publish_at_least
    reasons = [f"{share:.2%} of the rows succeeded, policy.publish_at_least asks for {least:.2%}"] if share < least or not rows else []
    reasons += [_broken(check) for check in checks if not check.success and check.severity == "critical"]
    return Audit(passed=not reasons, share_succeeded=share, reasons=tuple(reasons), checks=checks)


def run_suite(job: Job, frame: pd.DataFrame) -> tuple[Check, ...]:
    """Apply the suite to a frame of the columns that it names."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    logging.getLogger("great_expectations._docs_decorators").addFilter(lambda record: record.levelno > logging.INFO)  # 216 lines at import
    import great_expectations as gx
    from great_expectations.exceptions.exceptions import GreatExpectationsError
    from great_expectations.expectations.registry import get_expectation_impl

    context = gx.get_context(mode="ephemeral")
    quiet: Any = {"globally": False, "metric_calculations": False}  # else tqdm fills the task's log
    context.variables.progress_bars = quiet
    definition = context.data_sources.add_pandas("staged").add_dataframe_asset("rows").add_batch_definition_whole_dataframe("all")
    batch = definition.get_batch(batch_parameters={"dataframe": frame})
    checks = []
    for expectation in job.expectations:
        try:
            built = get_expectation_impl(expectation.type)(**expectation.kwargs)
            result = batch.validate(
                built,
                result_format={
                    "result_format": "COMPLETE",
                    "unexpected_index_column_names": [job.spec.input.id],
                    "return_unexpected_index_query": False,
                },
            ).to_json_dict()
        except (GreatExpectationsError, ValueError, TypeError) as error:
            # A suite line that cannot even be applied is red, not green: nobody has checked what it asks for.
            result = {"success": False, "exception_info": {"exception_message": str(error).splitlines()[0]}}
        checks.append(_check(expectation, result, job.spec.input.id))
    return tuple(checks)


def _frame(site: Site, job: Job, assembled: Assembled) -> pd.DataFrame:
    """The columns that the suite names, and the id; the others are never loaded."""
    tables = []
    for key in assembled.parts:
        with site.store.open(key) as file:
            parquet = pq.ParquetFile(file)
            columns = sorted(_named_columns(job) & set(parquet.schema_arrow.names))
            tables.append(parquet.read(columns=columns))
    frame: pd.DataFrame = pa.concat_tables(tables).to_pandas()
    return frame


def _named_columns(job: Job) -> set[str]:
    named = {job.spec.input.id}
    for expectation in job.expectations:
        for name, value in expectation.kwargs.items():
            if name.startswith("column"):
                named |= {value} if isinstance(value, str) else set(value) if isinstance(value, list) else set()
    return named


def _check(expectation: Expectation, result: Mapping[str, Any], id_column: str) -> Check:
    found = result.get("result") or {}
    examples = [str(each.get(id_column)) for each in found.get("unexpected_index_list") or [] if isinstance(each, dict)]
    failed = (result.get("exception_info") or {}) if not result["success"] else {}
    observed = found.get("observed_value")
    observed = round(observed, 4) if isinstance(observed, float) else observed
    return Check(
        expectation=expectation.type,
        column=expectation.column,
        severity=expectation.severity,
        success=bool(result["success"]),
        unexpected=found.get("unexpected_count"),
        examples=tuple(examples[:EXAMPLES]),
        detail=_exception_message(failed) or (f"observed {observed}" if observed is not None else None),
    )


def _exception_message(info: Mapping[str, Any]) -> str | None:
    """Great Expectations nests this once per metric, or not at all."""
    for inner in (info, *info.values()):
        if isinstance(inner, Mapping) and inner.get("exception_message"):
            return str(inner["exception_message"]).splitlines()[0][:300]
    return None


def _broken(check: Check) -> str:
    rows = f" for {check.unexpected} rows (such as {', '.join(check.examples)})" if check.unexpected else ""
    return f"{check.expectation}{f' on {check.column}' if check.column else ''} failed{rows}{f': {check.detail}' if check.detail else ''}"
