"""Bedrock's model invocation jobs in the rehearsal: records from S3, answers in the shape of each model's maker, results to S3."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import orjson

from nightshift.errors import NightshiftError
from nightshift.money.prices import base_model, price_of
from nightshift.providers.bedrock_forms import TITAN, maker_of
from nightshift.rehearsal import model, vision
from nightshift.rehearsal.book import StoredBatch
from nightshift.rehearsal.engine import Line, Results
from nightshift.rehearsal.faults import Faults, drawn
from nightshift.stores.objects import Objects, open_objects

MAX_RECORDS = 50_000
ACCOUNT = "123456789012"
TITAN_SIZE = 1024
EVENT_SECONDS = 0.3  # after a job has ended, until its events go out
NO_ACCESS = "no-access"  # in the name of a role that may not read and write S3
NOT_IN_BATCH = ("toolConfig", "tools", "tool_choice", "guardrailConfig", "outputConfig", "response_format", "cachePoint", "cache_control")
SCHEMA_MARK = "JSON Schema:\n"
USER_MARK, END_MARK = "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"
CONVERSE_NULLS = {"image": None, "document": None, "video": None, "toolUse": None, "toolResult": None, "reasoningContent": None}


class BedrockDesk:
    """Jobs over folders of S3; see Desk."""

    def __init__(self, faults: Callable[[], Faults]) -> None:
        self._faults = faults

    def read(self, batch: StoredBatch) -> tuple[list[Line], list[dict[str, Any]]]:
        """See Desk. Bodies are not checked against the model: a wrong one fails as a record (F93)."""
        if NO_ACCESS in batch.settings["roleArn"]:
            return [], [_wrong(f"The role {batch.settings['roleArn']} does not have access to {batch.input_file_id}.")]
        try:
            raw = list(_records(batch.input_file_id))
        except NightshiftError as error:
            return [], [_wrong(f"Could not read {batch.input_file_id}: {error}")]
        lines: list[Line] = []
        for number, data in enumerate(raw, start=1):
            try:
                record = orjson.loads(data)
                body = record["modelInput"]
                lines.append(Line(custom_id=str(record.get("recordId") or f"{number:011d}"), body=dict(body)))
            except (ValueError, KeyError, TypeError, AttributeError):
                return [], [_wrong(f"Line {number} of the input is not a record with a modelInput.")]
        least = self._faults().minimum_records
        if len(lines) < least:
            return [], [_wrong(f"The input has {len(lines)} records, which is below the minimum of {least} per batch inference job.")]
        if len(lines) > MAX_RECORDS:
            return [], [_wrong(f"The input has {len(lines)} records, which is above the maximum of {MAX_RECORDS} per batch inference job.")]
        return lines, []

    def tokens(self, line: Line) -> int:
        """See Desk."""
        return _tokens(line.body)

    def model_of(self, batch: StoredBatch, line: Line) -> str:
        """See Desk."""
        return str(batch.model)

    def answer(self, batch: StoredBatch, line: Line, hit: Callable[[str], bool]) -> tuple[int, dict[str, Any], int, int]:
        """See Desk."""
        taboo = next((name for name in NOT_IN_BATCH if f'"{name}"'.encode() in orjson.dumps(line.body)), None)
        if taboo:
            return 400, _wrong(f"{taboo} is not supported in batch inference."), 0, 0
        return answer(batch.endpoint, str(batch.model), line.body, hit)

    def answered(self, line: Line, body: dict[str, Any], *, odd: bool) -> bytes:
        """See Desk. The input is echoed (F96)."""
        if odd:
            return orjson.dumps({"recordId": line.custom_id, "modelInput": line.body})
        return orjson.dumps({"recordId": line.custom_id, "modelInput": line.body, "modelOutput": body})

    def failed(self, line: Line, status: int, body: dict[str, Any]) -> bytes:
        """See Desk. The code is a number for some, and a string for others."""
        message = (body.get("error") or body)["message"]
        code = str(status) if drawn("code", line.custom_id, "string", 0.5) else status
        return orjson.dumps({"recordId": line.custom_id, "modelInput": line.body, "error": {"errorCode": code, "errorMessage": message}})

    def never_run(self, line: Line, status: str) -> list[bytes]:
        """See Desk. Some have a record that says so, the others have none."""
        if status == "cancelled" or drawn("never", line.custom_id, "silent", 0.5):
            return []
        error = {"errorCode": 408, "errorMessage": "The record was not processed before the job expired.", "expired": True}
        return [orjson.dumps({"recordId": line.custom_id, "modelInput": line.body, "error": error})]

    def stranger(self) -> bytes:
        """See Desk."""
        return orjson.dumps({"recordId": secrets.token_hex(32), "modelInput": {}, "modelOutput": {}})

    def write(self, batch: StoredBatch, results: Results, now: float) -> tuple[str | None, str | None]:
        """See Desk. Everything is in one file for each input file, in a folder of the job's own id."""
        lines, faults = [*results.output, *results.errors], self._faults()
        if not lines or faults.results_gone:
            return None, None
        bucket, folder = _folder(f"{batch.settings['output'].rstrip('/')}/{batch.id}")
        name = f"{batch.input_file_id.rpartition('/')[2]}.out"
        manifest = {
            "totalRecordCount": batch.total,
            "processedRecordCount": len(lines) + 3 * faults.odd_counts,
            "successRecordCount": len(results.output),
            "errorRecordCount": len(results.errors),
            "inputTokenCount": sum(tokens for _, _, tokens, _ in results.charges),
            "outputTokenCount": sum(tokens for _, _, _, tokens in results.charges),
        }

        def put() -> None:
            bucket.put(f"{folder}/{name}", b"".join(line + b"\n" for line in lines))
            if not faults.no_manifest:
                bucket.put(f"{folder}/manifest.json.out", orjson.dumps(manifest))

        if faults.events_queue:
            threading.Timer(EVENT_SECONDS, _tell, [faults.events_queue, batch]).start()
        if faults.results_lag_seconds:
            threading.Timer(faults.results_lag_seconds, put).start()
        else:
            put()
        return name, None


def known_model(name: str) -> bool:
    """Whether the rehearsal plays this model of Bedrock: those of the price table."""
    return price_of("bedrock", name, "standard") is not None


def answer(
    endpoint: str, name: str, body: Mapping[str, Any], hit: Callable[[str], bool] = lambda name: False
) -> tuple[int, dict[str, Any], int, int]:
    """(status, model output, input tokens, output tokens) of one request, in a job or on demand."""
    shape = "converse" if endpoint == "converse" else str(maker_of(name))
    if shape == TITAN and isinstance(body.get("inputText"), str):
        tokens, size = model.count_tokens(body["inputText"]), int(body.get("dimensions") or TITAN_SIZE)
        return 200, {"embedding": model.embed(body["inputText"], size), "inputTextTokenCount": tokens}, tokens, 0
    text = _asked_text(body, shape)
    if text is None:
        return 400, _wrong(f"Malformed input request for {name}: nothing that the model can read."), 0, 0
    tokens_in = _tokens(body)
    said = "I would say that this guest had a stay like any other." if hit("invalid") else model.answer(text, _schema_of(body))
    limit, tokens_out = _limit(body), model.count_tokens(said)
    cut = hit("truncated") or tokens_out > limit
    if cut:
        said, tokens_out = said[: min(len(said) // 2, int(limit * 4.4))], min(tokens_out, limit)
    ending = "truncated" if cut else "refused" if hit("refused") else "filtered" if hit("filtered") else "succeeded"
    shaped = SHAPES[shape](name, said if ending in ("succeeded", "truncated") else "", ending, tokens_in, tokens_out)
    if hit("no_usage"):
        for word in ("usage", "prompt_token_count", "generation_token_count"):
            shaped.pop(word, None)
    return 200, shaped, tokens_in, tokens_out


def _converse(name: str, text: str, ending: str, tokens_in: int, tokens_out: int) -> dict[str, Any]:
    word = {"truncated": "max_tokens", "refused": "refusal", "filtered": "content_filtered"}.get(ending, "end_turn")
    return {
        "output": {"message": {"role": "assistant", "content": [{"text": text, **CONVERSE_NULLS}]}},
        "stopReason": word,
        "usage": {
            "inputTokens": tokens_in,
            "outputTokens": tokens_out,
            "totalTokens": tokens_in + tokens_out,
            "cacheReadInputTokens": None,
            "cacheWriteInputTokens": None,
        },
        "metrics": {"latencyMs": 1},
        "additionalModelResponseFields": None,
        "trace": None,
    }


def _anthropic(name: str, text: str, ending: str, tokens_in: int, tokens_out: int) -> dict[str, Any]:
    word = {"truncated": "max_tokens", "refused": "refusal", "filtered": "refusal"}.get(ending, "end_turn")
    return {
        "id": f"msg_bdrk_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": f"{base_model(name).partition('.')[2]}-rehearsal",
        "content": [{"type": "text", "text": text}] if text else [],
        "stop_reason": word,
        "stop_sequence": None,
        "usage": {"input_tokens": tokens_in, "output_tokens": tokens_out},
    }


def _nova(name: str, text: str, ending: str, tokens_in: int, tokens_out: int) -> dict[str, Any]:
    shaped = _converse(name, text, ending, tokens_in, tokens_out)
    return {
        "output": {"message": {"role": "assistant", "content": [{"text": text}]}},
        **{key: shaped[key] for key in ("stopReason", "usage")},
    }


def _llama(name: str, text: str, ending: str, tokens_in: int, tokens_out: int) -> dict[str, Any]:
    stop = "length" if ending == "truncated" else "stop"
    return {"generation": text, "prompt_token_count": tokens_in, "generation_token_count": tokens_out, "stop_reason": stop}


def _mistral(name: str, text: str, ending: str, tokens_in: int, tokens_out: int) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "length" if ending == "truncated" else "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}}


SHAPES: dict[str, Callable[[str, str, str, int, int], dict[str, Any]]] = {
    "converse": _converse,
    "anthropic": _anthropic,
    "amazon": _nova,
    "meta": _llama,
    "mistral": _mistral,
    "openai": _mistral,
}


def _records(uri: str) -> Iterable[bytes]:
    """The lines of one `.jsonl` object, or of all below a prefix."""
    store, key = _folder(uri)
    keys = [key] if uri.endswith(".jsonl") else sorted(found.key for found in store.scan(key) if found.key.endswith(".jsonl"))
    for each in keys:
        with store.open(each) as file:
            yield from (line for line in file if line.strip())


def _folder(uri: str) -> tuple[Objects, str]:
    """The bucket that holds an object or a prefix, and its key there."""
    parts = urlsplit(uri)
    return _bucket(f"{parts.scheme}://{parts.netloc}"), parts.path.strip("/")


def arn_of(job: StoredBatch) -> str:
    """A job's ARN."""
    return f"arn:aws:bedrock:{job.settings['region']}:{job.settings['account']}:model-invocation-job/{job.id}"


def _tell(queue: str, job: StoredBatch) -> None:
    """Send the events of a job's end: the last one first, and all of them twice."""
    import boto3

    client = boto3.client("sqs")
    for status in ("Completed", "InProgress") * 2:
        detail = {
            "version": "0.0",
            "batchJobName": job.settings["jobName"],
            "batchJobArn": arn_of(job),
            "batchModelId": job.model,
            "status": status,
        }
        event = {"source": "aws.bedrock", "detail-type": "Batch Inference Job State Change", "resources": [arn_of(job)], "detail": detail}
        client.send_message(QueueUrl=queue, MessageBody=orjson.dumps(event).decode())


@cache
def _bucket(root: str) -> Objects:
    """A bucket, opened once: a session of boto3 takes half a second."""
    return open_objects(root)


def _asked_text(body: Mapping[str, Any], shape: str) -> str | None:
    """The first thing that the user says; None where the body is not one of this shape."""
    if shape == "meta":
        prompt = body.get("prompt")
        return prompt.partition(USER_MARK)[2].partition(END_MARK)[0] if isinstance(prompt, str) and USER_MARK in prompt else None
    content = next((each.get("content") for each in body.get("messages") or [] if each.get("role") == "user"), None)
    if isinstance(content, str):
        return content if shape in ("mistral", "openai") else None
    typed = shape == "anthropic"
    if shape in ("mistral", "openai") or not content or any(("type" in part) != typed for part in content):
        return None
    if seen := list(vision.pictures_in(content)):
        return " ".join(map(vision.describe, seen))
    return " ".join(str(part.get("text", "")) for part in content)


def _schema_of(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """The schema that the model is asked for, in words: a model that follows instructions would find it."""
    system = body.get("system") or body.get("prompt") or next((m["content"] for m in body["messages"] if m["role"] == "system"), "")
    told = system if isinstance(system, str) else "".join(part.get("text", "") for part in system)
    _, found, rest = told.partition(SCHEMA_MARK)
    if not found:
        return None
    try:
        schema: dict[str, Any] = orjson.loads(rest.partition(END_MARK)[0])
    except orjson.JSONDecodeError:
        return None
    return schema


def _tokens(body: Mapping[str, Any]) -> int:
    """Everything the model is billed for reading, and for looking at."""
    read = [body.get("system"), vision.without_pictures(body.get("messages")), body.get("prompt"), body.get("inputText")]
    text = "".join(part if isinstance(part, str) else orjson.dumps(part).decode() for part in read if part)
    return model.count_tokens(text) + sum(map(vision.tokens, vision.pictures_in(body.get("messages"))))


def _limit(body: Mapping[str, Any]) -> int:
    given = (body.get("inferenceConfig") or {}).get("maxTokens") or body.get("max_tokens") or body.get("max_gen_len") or 4096
    return int(given)


def _wrong(message: str) -> dict[str, Any]:
    return {"code": None, "message": message, "param": None, "line": None}
