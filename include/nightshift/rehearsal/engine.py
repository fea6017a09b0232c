"""The rehearsal's batch engine: validation, progress, results. What a batch has done is a function of time, so a restart resumes it."""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from nightshift.providers.openai_forms import is_strict
from nightshift.rehearsal import model
from nightshift.rehearsal.book import Book, StoredBatch
from nightshift.rehearsal.faults import Faults, drawn

MAX_LINES = 50_000
MAX_BYTES = 200_000_000
ERRORS_SHOWN = 100
TICK_SECONDS = 0.05
RUNNING = ("validating", "in_progress", "finalizing", "cancelling")
EXPIRED = {"code": "batch_expired", "message": "This request could not be executed before the completion window expired."}
SERVER_ERROR = {
    "error": {
        "message": "The server had an error while processing your request.",
        "type": "server_error",
        "param": None,
        "code": "server_error",
    }
}
CANCELLED = {"code": "batch_cancelled", "message": "This request could not be executed because the batch was cancelled."}


@dataclass(slots=True, kw_only=True)
class Pace:
    """How fast batches go, in seconds."""

    validating: float = 0.2
    running: float = 1.0  # at least; a large batch takes longer
    finalizing: float = 0.1
    cancelling: float = 0.3
    window: float = 86_400.0
    lines_per_second: float = 20_000.0


@dataclass(slots=True, kw_only=True)
class Line:
    """One parsed request of a batch."""

    custom_id: str
    body: dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Results:
    """Lines of the two result files, and what they cost."""

    output: list[bytes] = field(default_factory=list)
    errors: list[bytes] = field(default_factory=list)
    charges: list[tuple[str, str, int, int]] = field(default_factory=list)


class Engine:
    """Moves batches along in a thread of its own."""

    def __init__(self, book: Book, pace: Pace, faults: Callable[[], Faults], clock: Callable[[], float] = time.time) -> None:
        self._book, self.pace, self._faults, self._clock = book, pace, faults, clock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="rehearsal-engine", daemon=True)

    def start(self) -> None:
        """Go on with whatever the book holds."""
        self._thread.start()

    def stop(self) -> None:
        """Stop between two batches."""
        self._stop.set()
        self._thread.join(timeout=30)

    def _loop(self) -> None:
        while not self._stop.wait(TICK_SECONDS):
            for batch in reversed(self._book.batches()):
                if batch.status in RUNNING:
                    self.advance(batch.id)

    def advance(self, batch_id: str) -> None:
        """Take one batch as far as the clock allows."""
        now, pace = self._clock(), self.pace
        batch = self._book.batch(batch_id)
        if batch is None:
            return
        if batch.status == "validating" and now >= batch.created_at + pace.validating:
            self._validate(batch, now)
        elif batch.status == "in_progress" and now >= min(batch.expires_at, self._due(batch)):
            self._change(batch.id, "in_progress", status="finalizing", finalizing_at=now)
        elif batch.status == "finalizing" and batch.finalizing_at is not None and now >= batch.finalizing_at + pace.finalizing:
            expired = batch.expires_at < self._due(batch)
            self._finish(batch, "expired" if expired else "completed", self.progress(batch, min(now, batch.expires_at)), now)
        elif batch.status == "cancelling" and batch.cancelling_at is not None and now >= batch.cancelling_at + pace.cancelling:
            self._finish(batch, "cancelled", self.progress(batch, batch.cancelling_at), now)

    def progress(self, batch: StoredBatch, at: float) -> int:
        """How many requests of a batch have run at a moment."""
        if batch.in_progress_at is None:
            return 0
        length = max(self._due(batch) - batch.in_progress_at, 1e-9)
        return min(batch.total, int(batch.total * (at - batch.in_progress_at) / length))

    def cancel(self, batch_id: str) -> StoredBatch | None:
        """Begin to stop a batch; the batch as it is then."""
        with self._book.changing():
            batch = self._book.batch(batch_id)
            if batch is not None and batch.status in ("validating", "in_progress", "finalizing"):
                batch.status, batch.cancelling_at = "cancelling", self._clock()
                self._book.save(batch)
            return batch

    def _due(self, batch: StoredBatch) -> float:
        """When a batch will have run all its requests."""
        return (batch.in_progress_at or self._clock()) + max(self.pace.running, batch.total / self.pace.lines_per_second)

    def _change(self, batch_id: str, expected: str, **values: Any) -> None:
        """Change a batch that is still in the expected status: a cancel may have come in between."""
        with self._book.changing():
            batch = self._book.batch(batch_id)
            if batch is not None and batch.status == expected:
                for name, value in values.items():
                    setattr(batch, name, value)
                self._book.save(batch)

    def _validate(self, batch: StoredBatch, now: float) -> None:
        """The whole batch fails on one bad line; nothing runs then and nothing is billed."""
        lines, errors = validate(self._read(batch), batch.endpoint, self._book.path_of(batch.input_file_id).stat().st_size)
        tokens = sum(model.count_tokens(_text(line.body)) for line in lines)
        name = str(lines[0].body.get("model")) if lines else None
        limit = self._faults().enqueued_token_limit
        if not errors and limit is not None and tokens + self._enqueued(name) > limit:
            message = (
                f"Enqueued token limit reached for {name} in organization org-rehearsal. Limit: {limit:,} enqueued tokens. "
                "Please try again once some in_progress batches have been completed."
            )
            errors = [{"code": "token_limit_exceeded", "message": message, "param": None, "line": None}]
        if errors:
            self._change(batch.id, "validating", status="failed", failed_at=now, errors=errors[:ERRORS_SHOWN])
        else:
            self._change(
                batch.id, "validating", status="in_progress", in_progress_at=now, total=len(lines), model=name, input_tokens=tokens
            )

    def _enqueued(self, name: str | None) -> int:
        return sum(each.input_tokens for each in self._book.batches() if each.model == name and each.status in RUNNING)

    def _read(self, batch: StoredBatch) -> Iterator[bytes]:
        with self._book.path_of(batch.input_file_id).open("rb") as file:
            yield from file

    def _finish(self, batch: StoredBatch, status: str, done: int, now: float) -> None:
        """Run what ran, write the result files, charge, and only then show the end: in one transaction with the bill."""
        faults = self._faults()
        lines, _ = validate(self._read(batch), batch.endpoint, 0)
        order = random.Random(batch.id)
        order.shuffle(lines)
        if status == "completed" and any(drawn(batch.id, line.custom_id, "never_run", faults.never_run) for line in lines):
            status = "expired"
        results = Results()
        for position, line in enumerate(lines):
            if position >= done or drawn(batch.id, line.custom_id, "never_run", faults.never_run):
                results.errors.append(_dump(line.custom_id, None, CANCELLED if status == "cancelled" else EXPIRED))
            elif drawn("once", line.custom_id, "errored_once", faults.errored_once) and self._book.errors_first(batch.id, line.custom_id):
                results.errors.append(_dump(line.custom_id, (500, SERVER_ERROR), None))
            else:
                run_line(batch, line, faults, results)
        order.shuffle(results.output)
        order.shuffle(results.errors)
        output, errors = self._write(results.output, now), self._write(results.errors, now)
        with self._book.changing():
            current = self._book.batch(batch.id)
            if current is None or current.status != batch.status:
                return
            current.status = "failed" if faults.fails_at_the_end else status
            setattr(current, f"{current.status}_at", now)
            current.output_file_id, current.error_file_id = output, errors or ("" if faults.empty_error_file_id else None)
            current.completed, current.failed = len(results.output), len(results.errors) if status == "completed" else 0
            self._book.charge(batch.id, results.charges, "batch")
            self._book.save(current)

    def _write(self, lines: list[bytes], now: float) -> str | None:
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


def run_line(batch: StoredBatch, line: Line, faults: Faults, results: Results) -> None:
    """Answer one request of a batch into the result files, with the faults drawn for it."""

    def hit(name: str) -> bool:
        return drawn(batch.id, line.custom_id, name, getattr(faults, name))

    custom_id = line.custom_id
    if hit("unknown"):
        results.output.append(_dump(secrets.token_hex(32), (200, {"choices": []}), None))
    if hit("errored"):
        results.errors.append(_dump(custom_id, (500, SERVER_ERROR), None))
        return
    if hit("bad_request"):
        results.errors.append(
            _dump(custom_id, (400, _error("This model's maximum context length is exceeded.", "context_length_exceeded")), None)
        )
        return
    status, body, tokens_in, tokens_out = answer(batch.endpoint, line.body, hit)
    if status != 200:
        results.errors.append(_dump(custom_id, (status, body), None))
        return
    results.charges.append((custom_id, str(line.body.get("model")), tokens_in, tokens_out))
    if hit("missing"):
        return
    dumped = _dump(custom_id, (0 if hit("status_zero") else 200, body), None)
    results.output.append(dumped[: len(dumped) // 2] if hit("garbage") else dumped)
    if hit("duplicate"):
        results.output.append(dumped)


def answer(endpoint: str, body: Mapping[str, Any], hit: Callable[[str], bool] = lambda name: False) -> tuple[int, dict[str, Any], int, int]:
    """(status, response body, input tokens, output tokens) for one request, in a batch or on demand."""
    name = body.get("model")
    if not known_model(name):
        return 404, _error(f"The model `{name}` does not exist or you do not have access to it.", "model_not_found"), 0, 0
    tokens_in = model.count_tokens(_text(body))
    if endpoint == "/v1/embeddings":
        return _embeddings(body, tokens_in)
    schema, strict = _schema_of(endpoint, body)
    if strict and schema is not None and not is_strict(schema):
        why = "Invalid schema for response_format: 'additionalProperties' is required to be false and every property to be required."
        return 400, _error(why, "invalid_schema", "response_format"), 0, 0
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
    from nightshift.money.prices import price_of

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
    size = int(body.get("dimensions") or model.EMBEDDING_SIZE)
    vectors = [_encoded(model.embed(str(text), size), body.get("encoding_format")) for text in texts]
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
    usage = {"prompt_tokens": tokens_in, "total_tokens": tokens_in}
    return 200, {"object": "list", "data": data, "model": f"{body.get('model')}-rehearsal", "usage": usage}, tokens_in, 0


def _encoded(vector: list[float], encoding: object) -> list[float] | str:
    import base64
    import struct

    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if encoding == "base64" else vector


def _schema_of(endpoint: str, body: Mapping[str, Any]) -> tuple[dict[str, Any] | None, bool]:
    form = body.get("response_format") if endpoint == "/v1/chat/completions" else (body.get("text") or {}).get("format")
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        return None, False
    form = form.get("json_schema", form)
    return form.get("schema"), bool(form.get("strict"))


def _text(body: Mapping[str, Any]) -> str:
    """Everything the model is billed for reading."""
    schema = body.get("response_format") or body.get("text")
    read = [body.get("instructions"), body.get("messages"), body.get("input"), schema]
    return "".join(part if isinstance(part, str) else orjson.dumps(part).decode() for part in read if part)


def _asked_text(endpoint: str, body: Mapping[str, Any]) -> str:
    """What is to be judged: the first thing that the user says. Later turns only ask for a better answer."""
    messages = body.get("messages") if endpoint == "/v1/chat/completions" else body.get("input")
    if isinstance(messages, str):
        return messages
    content = next((each.get("content") for each in messages or [] if each.get("role") == "user"), "")
    if isinstance(content, str):
        return content
    return " ".join(str(part.get("text", "")) for part in content or [])


def _dump(custom_id: str, response: tuple[int, dict[str, Any]] | None, error: dict[str, str] | None) -> bytes:
    shaped = None if response is None else {"status_code": response[0], "request_id": secrets.token_hex(16), "body": response[1]}
    return orjson.dumps({"id": f"batch_req_{secrets.token_hex(16)}", "custom_id": custom_id, "response": shaped, "error": error})


def _error(message: str, code: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}
