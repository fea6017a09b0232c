"""The trigger form of a job: what one run may do otherwise than its job says. What does not fit is refused by the form itself."""

from __future__ import annotations

from pathlib import Path

from airflow.sdk import Param

from nightshift.job import RETRYABLE, URI, JobFile
from nightshift.job_file import prompt_files
from nightshift.money.prices import models_of

AGAIN = "Driving failures again"  # a section of the form


def form_of(spec: JobFile, path: Path) -> dict[str, Param]:
    """Parameters by name. Their defaults are what the job says, so that a scheduled run needs none."""
    request = spec.request
    vendor = "bedrock" if request.is_on_bedrock else "openai"
    return {
        "input": Param(
            None,
            type=["null", "string"],
            pattern=URI.pattern,
            title="Input",
            description=f"object, pattern or folder to read in place of the job's, such as {spec.input.uri}; a partition of its own, "
            "but for what the schedule reads of a day: that replaces the day's",
        ),
        "model": Param(
            request.model,
            type="string",
            enum=list(dict.fromkeys([request.model, *spec.stand_ins, *models_of(vendor, embedding=request.is_embedding)])),
            title="Model",
            description="asked in place of the job's; the answers of two models are never mixed up",
        ),
        "prompt": Param(
            None,
            type=["null", "string"],
            pattern=r"^([0-9a-f]{12}|[^\s]+\.md)$",
            examples=prompt_files(path),
            title="Prompt version",
            description="a prompt file, or a version that was asked before (12 hex digits, from a report); empty: the job's own",
        ),
        "sample": Param(
            None,
            type=["null", "integer"],
            minimum=1,
            title="Sample",
            description="ask about so many rows only, always the same ones; they are published beside the results",
        ),
        "dry_run": Param(False, type="boolean", title="Dry run", description="plan and estimate; send nothing"),
        "fresh": Param(False, type="boolean", title="Fresh", description="buy every answer anew, whatever was answered before"),
        "redrive": Param(
            None,
            type=["null", "string"],
            title="Redrive",
            section=AGAIN,
            description="an earlier run of this job whose failures are driven again, by its run id here or in the store",
        ),
        "outcomes": Param(
            None,
            type=["null", "array"],
            items={"type": "string", "enum": list(RETRYABLE)},
            title="Outcomes",
            section=AGAIN,
            description="rows that ended so; empty: all that can be driven again",
        ),
    }
