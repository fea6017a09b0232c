"""Curator's own code over the same rows: `python -m bench.curator NAME FOLDER OUT`, with the Python of an environment that has it.

`make peers` makes that environment: curator wants versions of pandas and pydantic that cannot be installed beside ours. What it asks of
OpenAI is a file here, so neither the network nor its polling is measured. It does less than the steps it is held against: no keys, no
duplicates, no index of the rows, no accounts; an answer that comes twice is written twice, and the file of errors is not read.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import types
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from bench.question import COLUMNS, FILE_REQUESTS, MODEL, PARAMETERS, job_parts

OFFLINE = {"OPENAI_API_KEY": "sk-nobody", "TELEMETRY_ENABLED": "false", "HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


def _processor(work: Path) -> Any:
    """Its processor of OpenAI batches, whose files go to a folder, set up as its `LLM` does."""
    os.environ.update(OFFLINE)
    from bespokelabs.curator.llm.prompt_formatter import PromptFormatter
    from bespokelabs.curator.request_processor.batch.openai_batch_request_processor import OpenAIBatchRequestProcessor
    from bespokelabs.curator.request_processor.config import BatchRequestProcessorConfig
    from pydantic import BaseModel, ConfigDict, Field

    system, user, schema = job_parts()
    known = schema["properties"]
    sentiments, topics = tuple(known["sentiment"]["enum"]), tuple(known["topics"]["items"]["enum"])

    class Review(BaseModel):
        model_config = ConfigDict(extra="forbid")

        sentiment: Literal[sentiments]  # type: ignore[valid-type]
        score: Annotated[float, Field(ge=0, le=1)]
        topics: Annotated[list[Literal[topics]], Field(max_length=5)]  # type: ignore[valid-type]
        summary: Annotated[str, Field(min_length=1, max_length=400)]
        language: Annotated[str, Field(pattern="^[a-z]{2}$")]
        would_return: bool | None

    for name in COLUMNS:
        user = user.replace(f"{{{{ {name} }}}}", f"{{{name}}}")
    processor = OpenAIBatchRequestProcessor(
        BatchRequestProcessorConfig(model=MODEL, batch_size=FILE_REQUESTS, max_retries=0, require_all_responses=False)
    )
    processor.prompt_formatter = PromptFormatter(
        model_name=MODEL,
        prompt_func=lambda row: user.format_map(row),
        parse_func=lambda row, answer: {"review_id": row["review_id"], **answer.model_dump()},
        response_format=Review,
        generation_params=PARAMETERS,
        system_prompt=system,
    )
    processor.working_dir = str(work)
    processor.tracker = types.SimpleNamespace(num_parsed_responses=0, update_token_and_cost=lambda *given: None)
    processor.viewer_client = types.SimpleNamespace(stream_response=_nothing, session_completed=_nothing)
    return processor


async def _nothing(*args: Any) -> None:
    """What its viewer on the web would be told."""


def encode(folder: Path, out: Path) -> None:
    """Its requests, from rows to the bytes of batches."""
    from datasets import Dataset

    processor = _processor(out)
    rows = Dataset.from_parquet(str(folder / "reviews.parquet"), cache_dir=str(out / "cache"), columns=COLUMNS)
    for number, path in enumerate(processor.create_request_files(rows)):
        requests = processor.requests_from_generic_request_file(path, set())
        (out / f"batch-{number:05d}.jsonl").write_bytes(processor.create_batch_file(requests))


def collect(folder: Path, out: Path) -> None:
    """Its results, from OpenAI's lines to a dataset in Parquet. Its own files of requests stand in the folder of `prepare`."""
    from bespokelabs.curator.types.generic_batch import GenericBatch, GenericBatchRequestCounts

    for path in _prepared(folder).glob("requests_*.jsonl"):
        (out / path.name).symlink_to(path)
    processor, now = _processor(out), datetime.now(UTC)
    counts = GenericBatchRequestCounts(total=0, failed=0, succeeded=0, raw_request_counts_object={})
    for path in sorted(_prepared(folder).glob("answered_*.jsonl")):
        batch = GenericBatch(
            request_file=str(out / path.name.replace("answered_", "requests_")),
            id=path.stem,
            created_at=now,
            finished_at=now,
            status="finished",
            api_key_suffix="body",
            request_counts=counts,
            raw_status="completed",
            raw_batch={},
        )
        responses = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        asyncio.run(processor.generic_response_file_from_responses(responses, batch))
    processor.create_dataset_files("reviews").to_parquet(str(out / "reviews.parquet"))


def prepare(folder: Path, out: Path) -> None:
    """Its files of requests, and results under its own ids. Not measured. Results it would stop at, those without a text, are left out."""
    work = _prepared(folder)
    work.mkdir(exist_ok=True)
    encode(folder, work)
    for path in work.glob("batch-*.jsonl"):
        path.unlink()
    rows = sum(json.loads(path.read_text())["num_jobs"] for path in work.glob("metadata_*.json"))
    lines = _answered(folder, rows)
    for number, first in enumerate(range(0, rows, FILE_REQUESTS)):
        with (work / f"answered_{number}.jsonl").open("w", encoding="utf-8") as file:
            for row in range(first, min(first + FILE_REQUESTS, rows)):
                file.write(json.dumps({**next(lines), "custom_id": str(row)}, separators=(",", ":"), ensure_ascii=False) + "\n")


def _answered(folder: Path, rows: int) -> Iterator[dict[str, Any]]:
    """As many good results as there are rows; the last ones a second time, because the folder's have no duplicates."""
    given = 0
    while given < rows:
        before = given
        for path in sorted((folder / "results").glob("out-*.jsonl")):
            with path.open(encoding="utf-8") as file:
                for line in map(json.loads, file):
                    choice = line["response"]["body"]["choices"][0]
                    if choice["finish_reason"] == "stop" and choice["message"]["content"]:
                        given += 1
                        yield line
        if given == before:
            raise SystemExit(f"{folder / 'results'} holds no results: submit comes first")


def _prepared(folder: Path) -> Path:
    return folder.resolve() / "curator"


PEERS: dict[str, Callable[[Path, Path], None]] = {"curator-encode": encode, "curator-collect": collect}


def main() -> None:
    """Do one of them; `prepare` comes first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["prepare", *PEERS])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    {"prepare": prepare, **PEERS}[given.name](given.folder, given.out.resolve())


if __name__ == "__main__":
    main()
