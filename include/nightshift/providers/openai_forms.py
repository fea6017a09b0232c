"""OpenAI's endpoints as forms: how chat completions, responses and embeddings are asked, and how their answers read.

Shapes: contracts of the OpenAI API as read on 2026-11-21 (openai 3.54.0). Unknown fields are ignored, missing ones expected.
"""

from __future__ import annotations

import struct
from base64 import b64decode
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Generic, TypeVar

import msgspec
import orjson

from nightshift.providers.endings import EMPTY, REFUSED, SUCCEEDED, Ending, ending_of
from nightshift.providers.protocol import PICTURES, Garbage, Question, Reply
from nightshift.providers.results import Tokens, read_lines
from nightshift.shapes import Endpoint, Outcome, Variant

NEVER_RUN: dict[str, Outcome] = {"batch_expired": "expired", "batch_cancelled": "cancelled", "batch_canceled": "cancelled"}
FILTERED_CODES = frozenset({"content_filter", "content_policy_violation", "responsible_ai_policy_violation"})
RETRYABLE_STATUS = frozenset({0, 408, 409, 425, 429})  # and every 5xx; 0 was seen in batches that reported no failure (F70)
PASSING_CODES = ("server_error", "rate_limit_exceeded", "vector_store_timeout")  # of an answer that failed
UNSTRICT = ("patternProperties", "allOf", "oneOf", "not", "if", "then", "else", "dependentRequired", "dependentSchemas")


class Error(msgspec.Struct, gc=False):
    code: str | int | None = None
    message: str | None = None


class Part(msgspec.Struct, gc=False):
    type: str = ""
    text: str | None = None
    refusal: str | None = None


class Message(msgspec.Struct, gc=False):
    content: str | list[Part] | None = None  # parts: of servers whose models think aloud
    refusal: str | None = None


NOTHING = Message()


class Choice(msgspec.Struct, gc=False):
    message: Message | None = None
    finish_reason: str | None = None


NO_CHOICE = Choice()


Place = Annotated[int, msgspec.Meta(ge=0, lt=2048)]  # of an input: a request has no more


class Details(msgspec.Struct, gc=False):
    cached_tokens: Tokens | None = None


class ChatUsage(msgspec.Struct, gc=False):
    prompt_tokens: Tokens | None = None
    completion_tokens: Tokens | None = None
    prompt_tokens_details: Details | None = None


class Answered(msgspec.Struct, gc=False):
    error: Error | str | None = None
    message: str | None = None  # of an error that is the body itself, as of older vLLM


class ChatBody(Answered, gc=False):
    choices: list[Choice] | None = None
    usage: ChatUsage | None = None
    model: str | None = None


class Item(msgspec.Struct, gc=False):
    type: str = ""
    content: list[Part | str] | dict[str, Any] | str | None = None  # parts, of a message; whatever its tool says, of another


class Incomplete(msgspec.Struct, gc=False):
    reason: str | None = None


class ResponsesUsage(msgspec.Struct, gc=False):
    input_tokens: Tokens | None = None
    output_tokens: Tokens | None = None
    input_tokens_details: Details | None = None


class ResponsesBody(Answered, gc=False):
    status: str | None = None
    output: list[Item] | None = None
    usage: ResponsesUsage | None = None
    model: str | None = None
    incomplete_details: Incomplete | None = None


class Vector(msgspec.Struct, gc=False):
    index: Place
    embedding: str | list[float] | None = None


class EmbeddingsBody(Answered, gc=False):
    data: list[Vector] | None = None
    usage: ChatUsage | None = None
    model: str | None = None


Body = TypeVar("Body", bound=Answered)


class Response(msgspec.Struct, Generic[Body], gc=False):
    status_code: int = 0
    body: Body | str | None = None  # a string: what a proxy said


class Line(msgspec.Struct, Generic[Body], gc=False):
    custom_id: str
    response: Response[Body] | None = None
    error: Error | str | None = None


class OpenAIForm(Generic[Body]):
    """What the endpoints have in common: the lines of a batch's files. Each says how its own answers read."""

    endpoint: Endpoint
    inputs_per_line = 1

    def __init__(self, line: type[Line[Body]]) -> None:
        self._decoder = msgspec.json.Decoder(line)

    def fold(self, bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """See Form."""
        return bodies[0]

    def picture(self, media_type: str, base64: str) -> dict[str, Any]:
        """See Form."""
        return {"type": "image_url", "image_url": {"url": f"data:{media_type};base64,{base64}"}}

    def line(self, custom_id: str, body: bytes) -> bytes:
        """See Form."""
        return b'{"custom_id":"%b","method":"POST","url":"%b","body":%b}' % (custom_id.encode(), self.endpoint.encode(), body)

    def opened(self, line: bytes) -> tuple[str, dict[str, Any]]:
        """See Form."""
        request = orjson.loads(line)
        return request["custom_id"], request["body"]

    def answered(self, custom_id: str, status: int, body: dict[str, Any]) -> bytes:
        """See Form."""
        return orjson.dumps({"custom_id": custom_id, "response": {"status_code": status, "body": body}, "error": None})

    def read(self, lines: bytes) -> list[Reply | Garbage]:
        """See Form. Lines of either file."""
        return read_lines(lines, self._decoder, self._told, "custom_id")

    def _told(self, line: Line[Body]) -> Reply:
        response, key = line.response, line.custom_id
        if line.error is not None or response is None:
            return _refused(key, response.status_code if response else 0, line.error, "no response and no error")
        status, body = response.status_code, response.body
        if body is None or isinstance(body, str):
            return _refused(key, 0 if status == 200 else status, None, (body or "").strip().partition("\n")[0][:200])
        if status != 200 or (body.error is not None and self._is_refused(body)):
            return _refused(key, status, body.error, body.message)
        return self._reply(key, body)

    def _is_refused(self, body: Body) -> bool:
        """Whether an error in a body says that the request was refused."""
        return True

    def _reply(self, key: str, body: Body) -> Reply:
        raise NotImplementedError


class ChatForm(OpenAIForm[ChatBody]):
    """`/v1/chat/completions`."""

    endpoint: Endpoint = "/v1/chat/completions"

    def __init__(self) -> None:
        super().__init__(Line[ChatBody])

    def body(self, asked: Question) -> dict[str, Any]:
        """The request body; `max_output_tokens` goes under this endpoint's own name."""
        messages = [] if asked.system is None else [{"role": "system", "content": asked.system}]
        content = [{"type": "text", "text": asked.user}, PICTURES] if asked.pictures else asked.user
        body = {"model": asked.model, "messages": [*messages, {"role": "user", "content": content}], **_renamed(asked.parameters)}
        if asked.schema is not None:
            body["response_format"] = {"type": "json_schema", "json_schema": _named(asked.schema)}
        return body

    def vary(self, body: dict[str, Any], variant: Variant, answer: str | None, reason: str | None) -> dict[str, Any]:
        """A body as it is asked again."""
        return _varied(body, variant, answer, reason, turns="messages", limit="max_completion_tokens")

    def _reply(self, key: str, body: ChatBody) -> Reply:
        usage, choice = body.usage, body.choices[0] if body.choices else NO_CHOICE
        message = choice.message or NOTHING
        content = message.content if isinstance(message.content, str) else _joined(message.content, "text")
        ending = _chat_ending(choice, message.refusal, content)
        return Reply(
            custom_id=key,
            outcome=ending.outcome,
            text=message.refusal or content,
            reason=ending.reason,
            retryable=ending.retryable,
            paid=True,
            model=body.model,
            input_tokens=usage.prompt_tokens if usage else None,
            cached_tokens=_cached(usage.prompt_tokens_details if usage else None),
            output_tokens=usage.completion_tokens if usage else None,
        )


class ResponsesForm(OpenAIForm[ResponsesBody]):
    """`/v1/responses`."""

    endpoint: Endpoint = "/v1/responses"

    def picture(self, media_type: str, base64: str) -> dict[str, Any]:
        """See Form."""
        return {"type": "input_image", "image_url": f"data:{media_type};base64,{base64}"}

    def __init__(self) -> None:
        super().__init__(Line[ResponsesBody])

    def body(self, asked: Question) -> dict[str, Any]:
        """The request body. `store` is off: answers live in our store, not in the provider's."""
        content = [{"type": "input_text", "text": asked.user}, PICTURES] if asked.pictures else asked.user
        turns = [{"role": "user", "content": content}]
        body: dict[str, Any] = {"model": asked.model, "input": turns, "store": False, **asked.parameters}
        if asked.system is not None:
            body["instructions"] = asked.system
        if asked.schema is not None:
            body["text"] = {"format": {"type": "json_schema", **_named(asked.schema)}}
        return body

    def vary(self, body: dict[str, Any], variant: Variant, answer: str | None, reason: str | None) -> dict[str, Any]:
        """A body as it is asked again."""
        return _varied(body, variant, answer, reason, turns="input", limit="max_output_tokens")

    def _is_refused(self, body: ResponsesBody) -> bool:
        return body.status is None  # one with a status tells of an answer that failed

    def _reply(self, key: str, body: ResponsesBody) -> Reply:
        usage, contents = body.usage, [item.content for item in body.output or () if item.type == "message"]
        parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, Part)]
        text = _joined(parts, "output_text") or "".join(content for content in contents if isinstance(content, str))
        refusal = next((part.refusal for part in parts if part.type == "refusal"), None)
        ending = _responses_ending(body, text, refusal)
        return Reply(
            custom_id=key,
            outcome=ending.outcome,
            text=refusal or text or None,
            reason=ending.reason,
            retryable=ending.retryable,
            paid=ending.outcome != "errored" or usage is not None,
            model=body.model,
            input_tokens=usage.input_tokens if usage else None,
            cached_tokens=_cached(usage.input_tokens_details if usage else None),
            output_tokens=usage.output_tokens if usage else None,
        )


class EmbeddingsForm(OpenAIForm[EmbeddingsBody]):
    """`/v1/embeddings`. Vectors come as base64: a third of the bytes, and exactly the numbers."""

    endpoint: Endpoint = "/v1/embeddings"
    inputs_per_line = 32  # so many inputs of 8,192 tokens are below the 300,000 of one request

    def __init__(self) -> None:
        super().__init__(Line[EmbeddingsBody])

    def body(self, asked: Question) -> dict[str, Any]:
        """The request body: one input."""
        return {"model": asked.model, "input": asked.user, "encoding_format": "base64", **asked.parameters}

    def fold(self, bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """See Form."""
        return {**bodies[0], "input": [body["input"] for body in bodies]}

    def vary(self, body: dict[str, Any], variant: Variant, answer: str | None, reason: str | None) -> dict[str, Any]:
        """A body as it is asked again."""
        return {**body, "model": variant.model} if variant.model else dict(body)

    def _reply(self, key: str, body: EmbeddingsBody) -> Reply:
        """With the vectors of all inputs of its line, in their order."""
        vectors = {each.index: as_vector(each.embedding) for each in body.data or () if each.embedding is not None}
        return Reply(
            custom_id=key,
            outcome="succeeded",
            paid=True,
            model=body.model,
            input_tokens=body.usage.prompt_tokens if body.usage else None,
            output_tokens=0 if body.usage else None,
            vectors=tuple(vectors.get(index, b"") for index in range(max(vectors, default=-1) + 1)),
        )


def as_vector(given: str | Sequence[float]) -> bytes:
    """An embedding as float32, little endian; nothing where it is no embedding."""
    try:
        return b64decode(given, validate=True) if isinstance(given, str) else struct.pack(f"<{len(given)}f", *given)
    except (ValueError, OverflowError, struct.error):
        return b""


def _named(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": "answer", "strict": is_strict(schema), "schema": schema}


def is_strict(schema: Mapping[str, Any]) -> bool:
    """Whether a schema is in the subset that `strict: true` accepts: closed objects with every property required, wherever they stand."""
    properties, kind = schema.get("properties"), schema.get("type")
    if isinstance(properties, Mapping) or kind == "object" or (isinstance(kind, list) and "object" in kind):
        named = properties if isinstance(properties, Mapping) else {}
        if schema.get("additionalProperties") is not False or set(schema.get("required", ())) != set(named):
            return False
    if any(name in schema for name in UNSTRICT):
        return False
    below = [schema.get("items"), *schema.get("anyOf", ())]
    for name in ("properties", "$defs", "definitions"):
        below += (schema.get(name) or {}).values()
    return all(is_strict(inner) for inner in below if isinstance(inner, Mapping))


def _varied(body: dict[str, Any], variant: Variant, answer: str | None, reason: str | None, *, turns: str, limit: str) -> dict[str, Any]:
    changed = dict(body)
    if variant.model:
        changed["model"] = variant.model
    if variant.max_output_tokens:
        changed[limit] = variant.max_output_tokens
    if variant.repair and answer:
        changed[turns] = [*body[turns], {"role": "assistant", "content": answer}, {"role": "user", "content": wrong(reason)}]
    return changed


def wrong(reason: str | None) -> str:
    """What a model is told about an answer that cannot be used."""
    return f"That answer cannot be used: {reason or 'it breaks the schema'}. Answer the first message again, as asked for."


def _renamed(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {"max_completion_tokens" if name == "max_output_tokens" else name: value for name, value in parameters.items()}


def _joined(parts: Sequence[Part] | None, kind: str) -> str | None:
    return "".join(part.text or "" for part in parts if part.type == kind) if parts else None


def _chat_ending(choice: Choice, refusal: str | None, content: str | None) -> Ending:
    if refusal:
        return REFUSED
    ending = ending_of(choice.finish_reason)
    if content or ending is not SUCCEEDED:
        return ending
    return Ending("invalid", "empty answer: no choices") if choice is NO_CHOICE else EMPTY


def _responses_ending(body: ResponsesBody, text: str, refusal: str | None) -> Ending:
    if refusal:
        return REFUSED
    if body.status == "incomplete":
        return ending_of((body.incomplete_details.reason if body.incomplete_details else None) or "length")
    if body.status not in ("completed", None):
        reason = _shown(body.error) or f"response status {body.status}"
        return Ending("errored", reason, retryable=body.error is None or _code(body.error) in PASSING_CODES)
    return SUCCEEDED if text else EMPTY


def _refused(key: str, status: int, error: Error | str | None, otherwise: str | None) -> Reply:
    """A line without an answer: never executed, filtered, or an error, which hides inside the response's body as well (F71). Not billed.

    `status`: HTTP's, 0 where there is none; `otherwise`: what is said where no error says it.
    """
    code, reason = _code(error), _shown(error) or otherwise or f"HTTP status {status}"
    if code in FILTERED_CODES:
        return Reply(custom_id=key, outcome="filtered", reason=reason)
    return Reply(custom_id=key, outcome=NEVER_RUN.get(code, "errored"), reason=reason, retryable=_may_pass(status, error))


def _may_pass(status: int, error: Error | str | None) -> bool:
    """Whether asking again can help: by the HTTP status; where that says nothing of the error, by the error's own code."""
    code = _code(error)
    if status in (0, 200) and code.isdigit():
        status = int(code)
    return status in RETRYABLE_STATUS or status >= 500


def _code(error: Error | str | None) -> str:
    return str(error.code) if isinstance(error, Error) else ""


def _shown(error: Error | str | None) -> str | None:
    if not isinstance(error, Error):
        return error
    return ": ".join(str(part) for part in (error.code, error.message) if part) or None


def _cached(details: Details | None) -> int:
    return (details.cached_tokens or 0) if details else 0
