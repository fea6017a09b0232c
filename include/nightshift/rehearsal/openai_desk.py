"""OpenAI's batches in the rehearsal: files of requests, validation as OpenAI reports it, answers in the shape of each endpoint."""

from __future__ import annotations

import base64
import secrets
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import orjson

from nightshift.job import DIMENSIONS
from nightshift.money.prices import price_of
from nightshift.providers.openai_forms import is_strict
from nightshift.rehearsal import model, vision
from nightshift.rehearsal.book import Book, StoredBatch
from nightshift.rehearsal.engine import Line, Results, error_body
from nightshift.rehearsal.faults import Faults

MAX_LINES = 50_000
MAX_INPUTS = 2_048
MAX_BYTES = 200_000_000
EXPIRED = {"code": "batch_expired", "message": "This request could not be executed before the completion window expired."}
CANCELLED = {"code": "batch_cancelled", "message": "This request could not be executed because the batch was cancelled."}


class OpenAIDesk:
    """Batches over files; see Desk."""

    def __init__(self, book: Book, faults: Callable[[], Faults]) -> None:
        self._book, self._faults = book, faults

    def read(self, batch: StoredBatch) -> tuple[list[Line], list[dict[str, Any]]]:
        """See Desk."""
        path = self._book.path_of(batch.input_file_id)
        with path.open("rb") as file:
            return validate(file, batch.endpoint, path.stat().st_size)

    def tokens(self, line: Line) -> int:
        """See Desk."""
        return _tokens(line.body)

    def model_of(self, batch: StoredBatch, line: Line) -> str:
        """See Desk."""
        return str(line.body.get("model"))

    def answer(self, batch: StoredBatch, line: Line, hit: Callable[[str], bool]) -> tuple[int, dict[str, Any], int, int]:
        """See Desk."""
        return answer(batch.endpoint, line.body, hit)

    def answered(self, line: Line, body: dict[str, Any], *, odd: bool) -> bytes:
        """See Desk."""
        return _dump(line.custom_id, (0 if odd else 200, body), None)

    def failed(self, line: Line, status: int, body: dict[str, Any]) -> bytes:
        """See Desk."""
        return _dump(line.custom_id, (status, body), None)

    def never_run(self, line: Line, status: str) -> list[bytes]:
        """See Desk."""
        return [_dump(line.custom_id, None, CANCELLED if status == "cancelled" else EXPIRED)]

    def stranger(self) -> bytes:
        """See Desk."""
        return _dump(secrets.token_hex(32), (200, {"choices": []}), None)

    def write(self, batch: StoredBatch, results: Results, now: float) -> tuple[str | None, str | None]:
        """See Desk."""
        errors = self._keep(results.errors, now)
        return self._keep(results.output, now), errors or ("" if self._faults().empty_error_file_id else None)

    def _keep(self, lines: list[bytes], now: float) -> str | None:
        if not lines:
            return None
        file_id = new_file_id()
        path = self._book.path_of(file_id)
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        self._book.add_file(file_id, f"{file_id}.jsonl", "batch_output", path.stat().st_size, now, None)
        return file_id


def new_file_id() -> str:
    """A file id as OpenAI spells it: `file-` and 22 characters."""
    alphabet = "ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz123456789"
    return "file-" + "".join(secrets.choice(alphabet) for _ in range(22))


def validate(raw: Iterator[bytes], endpoint: str, size: int) -> tuple[list[Line], list[dict[str, Any]]]:
    """The requests of an input file, and what is wrong with it, as OpenAI reports it."""
    lines: list[Line] = []
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()

    def wrong(code: str, message: str, number: int | None, param: str | None = None) -> None:
        errors.append({"code": code, "message": message, "param": param, "line": number})

    number = 0
    for number, data in enumerate(raw, start=1):
        try:
            line = orjson.loads(data)
            custom_id, method, url, body = line["custom_id"], line["method"], line["url"], line["body"]
        except orjson.JSONDecodeError:
            wrong("invalid_json_line", "This line is not parseable as valid JSON.", number)
            continue
        except (KeyError, TypeError) as error:
            wrong("missing_required_parameter", f"Missing required parameter: {error}.", number, str(error).strip("'"))
            continue
        if custom_id in seen:
            wrong(
                "duplicate_custom_id",
                f"The custom_id {custom_id!r} for this request is a duplicate of another request.",
                number,
                "custom_id",
            )
        if method != "POST":
            wrong("invalid_method", "The method must be POST.", number, "method")
        if url != endpoint:
            wrong("invalid_url", f"The URL provided for this request does not match the batch endpoint {endpoint}.", number, "url")
        if lines and body.get("model") != lines[0].body.get("model"):
            wrong("model_mismatch", "All requests of a batch have to name the same model.", number, "body.model")
        if body.get("stream"):
            wrong("invalid_request", "Streaming is not supported in the Batch API.", number, "body.stream")
        seen.add(custom_id)
        lines.append(Line(custom_id=custom_id, body=body))
    if number == 0:
        wrong("empty_file", "The input file is empty.", None)
    if number > MAX_LINES:
        wrong("too_many_tasks", f"The batch has {number} requests; the limit is {MAX_LINES}.", None)
    if size > MAX_BYTES:
        wrong("file_too_large", f"The input file is {size} bytes; the limit is {MAX_BYTES}.", None)
    return lines, errors


def answer(endpoint: str, body: Mapping[str, Any], hit: Callable[[str], bool] = lambda name: False) -> tuple[int, dict[str, Any], int, int]:
    """(status, response body, input tokens, output tokens) for one request, in a batch or on demand."""
    name = body.get("model")
    if not known_model(name):
        return 404, error_body(f"The model `{name}` does not exist or you do not have access to it.", "model_not_found"), 0, 0
    tokens_in = _tokens(body)
    if endpoint == "/v1/embeddings":
        return _embeddings(body, tokens_in)
    schema, strict = _schema_of(endpoint, body)
    if strict and schema is not None and not is_strict(schema):
        why = "Invalid schema for response_format: 'additionalProperties' is required to be false and every property to be required."
        return 400, error_body(why, "invalid_schema", "response_format"), 0, 0
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or body.get("max_output_tokens") or 4096
    text = "I would say that this guest had a stay like any other." if hit("invalid") else model.answer(_asked_text(endpoint, body), schema)
    tokens_out = model.count_tokens(text)
    cut = hit("truncated") or tokens_out > limit
    if cut:
        text, tokens_out = text[: min(len(text) // 2, int(limit * 4.4))], min(tokens_out, limit)
    ending = "truncated" if cut else "refused" if hit("refused") else "filtered" if hit("filtered") else "succeeded"
    shape = _chat if endpoint == "/v1/chat/completions" else _response
    shaped = shape(str(name), text, ending, tokens_in, tokens_out)
    if hit("no_usage"):
        shaped.pop("usage")
    return 200, shaped, tokens_in, tokens_out


def known_model(name: object) -> bool:
    """Whether the rehearsal plays this model: those of the price table, and its own."""
    return isinstance(name, str) and (name == model.NAME or price_of("openai", name, "standard") is not None)


def _chat(name: str, text: str, ending: str, tokens_in: int, tokens_out: int) -> dict[str, Any]:
    refusal = "I'm sorry, I can't help with that." if ending == "refused" else None
    finish = {"truncated": "length", "filtered": "content_filter"}.get(ending, "stop")
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None if refusal or ending == "filtered" else text,
        "refusal": refusal,
        "annotations": [],
    }
    return {
        "id": f"chatcmpl-{secrets.token_hex(14)}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": f"{name}-rehearsal",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
        "usage": {
            "prompt_tokens": tokens_in,
            "completion_tokens": tokens_out,
            "total_tokens": tokens_in + tokens_out,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
        },
        "service_tier": "default",
        "system_fingerprint": model.NAME,
    }


def _response(name: str, text: str, ending: str, tokens_in: int, tokens_out: int) -> dict[str, Any]:
    part = (
        {"type": "refusal", "refusal": "I'm sorry, I can't help with that."}
        if ending == "refused"
        else {"type": "output_text", "text": text, "annotations": []}
    )
    reason = {"truncated": "max_output_tokens", "filtered": "content_filter"}.get(ending)
    return {
        "id": f"resp_{secrets.token_hex(24)}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "incomplete" if reason else "completed",
        "error": None,
        "incomplete_details": {"reason": reason} if reason else None,
        "model": f"{name}-rehearsal",
        "output": [
            {"type": "message", "id": f"msg_{secrets.token_hex(16)}", "status": "completed", "role": "assistant", "content": [part]}
        ],
        "usage": {
            "input_tokens": tokens_in,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": tokens_out,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": tokens_in + tokens_out,
        },
    }


def _embeddings(body: Mapping[str, Any], tokens_in: int) -> tuple[int, dict[str, Any], int, int]:
    texts = body.get("input", "")
    texts = [texts] if isinstance(texts, str) else texts
    if len(texts) > MAX_INPUTS or not all(texts):
        return (
            400,
            error_body("'$.input' is invalid: between 1 and 2,048 texts, none of them empty.", "invalid_request_error", "input"),
            0,
            0,
        )
    size = int(body.get("dimensions") or DIMENSIONS.get(str(body.get("model")), model.EMBEDDING_SIZE))
    vectors = [_encoded(model.embed(str(text), size), body.get("encoding_format")) for text in texts]
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
    usage = {"prompt_tokens": tokens_in, "total_tokens": tokens_in}
    return 200, {"object": "list", "data": data, "model": f"{body.get('model')}-rehearsal", "usage": usage}, tokens_in, 0


def _encoded(vector: list[float], encoding: object) -> list[float] | str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if encoding == "base64" else vector


def _schema_of(endpoint: str, body: Mapping[str, Any]) -> tuple[dict[str, Any] | None, bool]:
    form = body.get("response_format") if endpoint == "/v1/chat/completions" else (body.get("text") or {}).get("format")
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        return None, False
    form = form.get("json_schema", form)
    return form.get("schema"), bool(form.get("strict"))


def _tokens(body: Mapping[str, Any]) -> int:
    """Everything the model is billed for reading, and for looking at."""
    schema = body.get("response_format") or body.get("text")
    turns = [body.get("messages"), body.get("input")]
    read = [body.get("instructions"), *vision.without_pictures(turns), schema]
    return model.count_tokens(_joined(read)) + sum(map(vision.tokens, vision.pictures_in(turns)))


def _joined(read: list[Any]) -> str:
    return "".join(part if isinstance(part, str) else orjson.dumps(part).decode() for part in read if part)


def _asked_text(endpoint: str, body: Mapping[str, Any]) -> str:
    """What is to be judged: the first thing that the user says. Later turns only ask for a better answer."""
    messages = body.get("messages") if endpoint == "/v1/chat/completions" else body.get("input")
    if isinstance(messages, str):
        return messages
    content = next((each.get("content") for each in messages or [] if each.get("role") == "user"), "")
    if isinstance(content, str):
        return content
    if seen := list(vision.pictures_in(content)):
        return " ".join(map(vision.describe, seen))
    return " ".join(str(part.get("text", "")) for part in content or [])


def _dump(custom_id: str, response: tuple[int, dict[str, Any]] | None, error: dict[str, str] | None) -> bytes:
    shaped = None if response is None else {"status_code": response[0], "request_id": secrets.token_hex(16), "body": response[1]}
    return orjson.dumps({"id": f"batch_req_{secrets.token_hex(16)}", "custom_id": custom_id, "response": shaped, "error": error})
