"""Bedrock's two ways of asking as forms: `converse`, one shape for every model, and `invoke`, the model maker's own.

Shapes: `bedrock` and `bedrock-runtime` as read on 2026-11-21 (botocore 1.44.5). Batches know no structured output, so a schema is
asked for in words. What a model answers tells which maker's shape it is, so reading needs no model name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec
import orjson

from nightshift.providers.endings import EMPTY, REFUSED, SUCCEEDED, ending_of
from nightshift.providers.openai_forms import as_vector, wrong
from nightshift.providers.protocol import PICTURES, Garbage, Question, Reply
from nightshift.providers.results import Tokens, read_lines
from nightshift.shapes import Variant

ANTHROPIC_VERSION = "bedrock-2023-05-31"
DEFAULT_MAX_TOKENS = 1024  # where a job sets no limit and the maker wants one
PLAIN = {"max_output_tokens": "maxTokens", "temperature": "temperature", "top_p": "topP", "top_k": "topK", "stop": "stopSequences"}
CONVERSE_PLAIN = {name: word for name, word in PLAIN.items() if name != "top_k"}  # every model has another name for it there
ANTHROPIC = {"max_output_tokens": "max_tokens", "stop": "stop_sequences"}
META = {"max_output_tokens": "max_gen_len"}
MISTRAL = {"max_output_tokens": "max_tokens"}
RETRYABLE_STATUS = frozenset({408, 424, 429})  # and every 5xx
EXPIRED = "expired"


class Block(msgspec.Struct, gc=False):
    text: str | None = None


class Turn(msgspec.Struct, gc=False):
    content: list[Block] | str | None = None
    refusal: str | None = None  # gpt-oss


class Output(msgspec.Struct, gc=False):
    message: Turn | None = None


class Usage(msgspec.Struct, gc=False):
    """Tokens in the words of every maker."""

    input_tokens: Tokens | None = None  # Anthropic
    output_tokens: Tokens | None = None
    cache_read_input_tokens: Tokens | None = None
    cache_creation_input_tokens: Tokens | None = None
    inputTokens: Tokens | None = None  # Converse, Nova
    outputTokens: Tokens | None = None
    cacheReadInputTokens: Tokens | None = None
    cacheWriteInputTokens: Tokens | None = None
    cacheReadInputTokenCount: Tokens | None = None
    cacheWriteInputTokenCount: Tokens | None = None
    prompt_tokens: Tokens | None = None  # Mistral, gpt-oss
    completion_tokens: Tokens | None = None


class Choice(msgspec.Struct, gc=False):
    message: Turn | None = None
    finish_reason: str | None = None
    stop_reason: str | None = None


class ModelOutput(msgspec.Struct, gc=False):
    """An answer of any maker: those fields are set that are its own. Converse's explicit nulls are like no field (F90)."""

    content: list[Block] | None = None  # Anthropic
    stop_reason: str | None = None  # Anthropic, Llama
    model: str | None = None
    output: Output | None = None  # Converse, Nova
    stopReason: str | None = None
    generation: str | None = None  # Llama
    prompt_token_count: Tokens | None = None
    generation_token_count: Tokens | None = None
    choices: list[Choice] | None = None  # Mistral, gpt-oss
    embedding: list[float] | None = None  # Titan
    inputTextTokenCount: Tokens | None = None
    usage: Usage | None = None


class Error(msgspec.Struct, gc=False):
    errorCode: int | str | None = None
    errorMessage: str | None = None
    expired: bool | None = None
    retryable: bool | None = None


class Record(msgspec.Struct, gc=False):
    recordId: str
    modelOutput: ModelOutput | None = None
    error: Error | None = None


class BedrockForm:
    """What both ways have in common: the lines of a job's files."""

    inputs_per_line = 1  # Titan, too, embeds one text per record

    def picture(self, media_type: str, base64: str) -> dict[str, Any]:
        """See Form."""
        return {"image": {"format": media_type.rpartition("/")[2], "source": {"bytes": base64}}}

    def fold(self, bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """See Form."""
        return bodies[0]

    def __init__(self) -> None:
        self._decoder = msgspec.json.Decoder(Record)

    def line(self, custom_id: str, body: bytes) -> bytes:
        """See Form."""
        return b'{"recordId":"%b","modelInput":%b}' % (custom_id.encode(), body)

    def opened(self, line: bytes) -> tuple[str, dict[str, Any]]:
        """See Form."""
        record = orjson.loads(line)
        return record["recordId"], record["modelInput"]

    def answered(self, custom_id: str, status: int, body: dict[str, Any]) -> bytes:
        """See Form."""
        if status == 200:
            return orjson.dumps({"recordId": custom_id, "modelOutput": body})
        return orjson.dumps({"recordId": custom_id, "error": {"errorCode": status, "errorMessage": body["error"]["message"]}})

    def read(self, lines: bytes) -> list[Reply | Garbage]:
        """See Form."""
        return read_lines(lines, self._decoder, self._reply, "recordId")

    def _reply(self, record: Record) -> Reply:
        if record.error is not None or record.modelOutput is None:
            return _failed(record.recordId, record.error)
        said = record.modelOutput
        if said.embedding is not None:
            tokens, vectors = said.inputTextTokenCount, (as_vector(said.embedding),)
            return Reply(
                custom_id=record.recordId,
                outcome="succeeded",
                paid=True,
                input_tokens=tokens,
                output_tokens=None if tokens is None else 0,
                vectors=vectors,
            )
        text, word, refusal = _said(said)
        ending = REFUSED if refusal else ending_of(word)
        if ending is SUCCEEDED and not text:
            ending = EMPTY
        tokens_in, cached, tokens_out = _tokens(said)
        return Reply(
            custom_id=record.recordId,
            outcome=ending.outcome,
            text=refusal or text or None,
            reason=ending.reason,
            retryable=ending.retryable,
            paid=True,
            model=said.model,
            input_tokens=tokens_in,
            cached_tokens=cached,
            output_tokens=tokens_out,
        )


class ConverseForm(BedrockForm):
    """`converse`: one shape for every model that answers in words."""

    def body(self, asked: Question) -> dict[str, Any]:
        """The body of a Converse call, less the model. What Converse has no word for goes on to the model as it is."""
        inference, others = _renamed(asked.parameters, CONVERSE_PLAIN)
        body: dict[str, Any] = {"messages": [_seeing(_turn("user", asked.user), asked.pictures)]}
        if told := _told(asked):
            body["system"] = [{"text": told}]
        if inference:
            body["inferenceConfig"] = inference
        if others:
            body["additionalModelRequestFields"] = others
        return body

    def vary(self, body: dict[str, Any], variant: Variant, answer: str | None, reason: str | None) -> dict[str, Any]:
        """A body as it is asked again. Its model is not part of it."""
        return _with_turns(_with_inference_limit(body, variant), variant, answer, reason, _turn)


class InvokeForm(BedrockForm):
    """`invoke`: the bodies of InvokeModel, each maker's own."""

    def body(self, asked: Question) -> dict[str, Any]:
        """The body for the model's maker. Raises ValueError where Nightshift does not know how to ask it."""
        maker = maker_of(asked.model)
        if maker is None:
            raise ValueError(f"nobody here knows the body of {asked.model!r}; use endpoint: converse, or one of {', '.join(MAKERS)}")
        body = MAKERS[maker].body(_told(asked), asked.user, asked.parameters)
        if asked.pictures:
            body["messages"] = [_seeing(turn, asked.pictures) for turn in body["messages"]]
        return body

    def picture(self, media_type: str, base64: str) -> dict[str, Any]:
        """See Form. In Anthropic's words; Nova's are those of Converse, which only its bodies have."""
        return {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": base64}}

    def vary(self, body: dict[str, Any], variant: Variant, answer: str | None, reason: str | None) -> dict[str, Any]:
        """A body as it is asked again, by the maker whose body it is."""
        return MAKERS[_maker_of_body(body)].vary(body, variant, answer, reason)


class _Maker(Protocol):
    """One model maker's body."""

    def body(self, system: str | None, user: str, parameters: Mapping[str, Any]) -> dict[str, Any]: ...

    def vary(self, body: dict[str, Any], variant: Variant, answer: str | None, reason: str | None) -> dict[str, Any]: ...


class _Anthropic:
    """Anthropic Messages."""

    def body(self, system: str | None, user: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        named, others = _renamed(parameters, ANTHROPIC)
        body = {"anthropic_version": ANTHROPIC_VERSION, "max_tokens": DEFAULT_MAX_TOKENS, **named, **others}
        if system:
            body["system"] = system
        return {**body, "messages": [_typed_turn("user", user)]}

    def vary(self, body: dict[str, Any], variant: Variant, answer: str | None, reason: str | None) -> dict[str, Any]:
        return _with_turns(_with_limit(body, variant, "max_tokens"), variant, answer, reason, _typed_turn)


class _Nova:
    """Amazon Nova."""

    def body(self, system: str | None, user: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        inference, others = _renamed(parameters, PLAIN)
        body: dict[str, Any] = {"schemaVersion": "messages-v1", **others, "messages": [_turn("user", user)]}
        if system:
            body["system"] = [{"text": system}]
        return {**body, "inferenceConfig": inference} if inference else body

    def vary(self, body: dict[str, Any], variant: Variant, answer: str | None, reason: str | None) -> dict[str, Any]:
        return _with_turns(_with_inference_limit(body, variant), variant, answer, reason, _turn)


class _Llama:
    """Meta Llama 3 and later: one string with its marks around every turn."""

    def body(self, system: str | None, user: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        named, others = _renamed(parameters, META)
        turns = [*([("system", system)] if system else []), ("user", user)]
        prompt = "<|begin_of_text|>" + "".join(self._turn(*turn) for turn in turns) + self._open("assistant")
        return {"prompt": prompt, **named, **others}

    def vary(self, body: dict[str, Any], variant: Variant, answer: str | None, reason: str | None) -> dict[str, Any]:
        changed = _with_limit(body, variant, "max_gen_len")
        if variant.repair and answer:
            changed["prompt"] = body["prompt"] + answer + "<|eot_id|>" + self._turn("user", wrong(reason)) + self._open("assistant")
        return changed

    @staticmethod
    def _open(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    def _turn(self, role: str, text: str) -> str:
        return f"{self._open(role)}{text}<|eot_id|>"


class _Mistral:
    """Mistral and other models that are asked as in chat completions, such as gpt-oss."""

    def body(self, system: str | None, user: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        named, others = _renamed(parameters, MISTRAL)
        messages = [_plain_turn("system", system)] if system else []
        return {"messages": [*messages, _plain_turn("user", user)], **named, **others}

    def vary(self, body: dict[str, Any], variant: Variant, answer: str | None, reason: str | None) -> dict[str, Any]:
        return _with_turns(_with_limit(body, variant, "max_tokens"), variant, answer, reason, _plain_turn)


class _Titan:
    """Amazon Titan Text Embeddings: one text a record."""

    def body(self, system: str | None, user: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        return {"inputText": user, **parameters}

    def vary(self, body: dict[str, Any], variant: Variant, answer: str | None, reason: str | None) -> dict[str, Any]:
        return dict(body)


TITAN = "titan-embed"  # in the id of a model that embeds
MAKERS: dict[str, _Maker] = {
    TITAN: _Titan(),
    "anthropic": _Anthropic(),
    "amazon": _Nova(),
    "meta": _Llama(),
    "mistral": _Mistral(),
    "openai": _Mistral(),
}


MAKERS_THAT_SEE = ("anthropic",)  # with invoke; the others are shown pictures with converse


def maker_of(model: str) -> str | None:
    """Whose body a model wants: from its id, that of an inference profile, or an ARN of either; None where it is not known."""
    name = model.rpartition("/")[2]
    if TITAN in name:
        return TITAN
    return next((maker for maker in MAKERS if name.startswith(f"{maker}.") or f".{maker}." in name), None)


def _maker_of_body(body: Mapping[str, Any]) -> str:
    if "anthropic_version" in body:
        return "anthropic"
    if "schemaVersion" in body:
        return "amazon"
    if "inputText" in body:
        return TITAN
    return "meta" if "prompt" in body else "mistral"


def _told(asked: Question) -> str | None:
    """What the model is told before it is asked: the prompt's system part, and the schema in words."""
    if asked.schema is None:
        return asked.system
    told = (
        "Answer with exactly one JSON object and nothing around it, no code fence, no comment. "
        f"It has to be valid under this JSON Schema:\n{orjson.dumps(asked.schema).decode()}"
    )
    return f"{asked.system}\n\n{told}" if asked.system else told


def _renamed(parameters: Mapping[str, Any], words: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A job's parameters in a maker's words, and those that are passed on as they are."""
    named = {words[name]: value for name, value in parameters.items() if name in words}
    return named, {name: value for name, value in parameters.items() if name not in words}


def _seeing(turn: dict[str, Any], pictures: bool) -> dict[str, Any]:
    """A turn of the user with a place for pictures."""
    return {**turn, "content": [*turn["content"], PICTURES]} if pictures else turn


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"text": text}]}


def _typed_turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _plain_turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _with_limit(body: dict[str, Any], variant: Variant, name: str) -> dict[str, Any]:
    return {**body, name: variant.max_output_tokens} if variant.max_output_tokens else dict(body)


def _with_inference_limit(body: dict[str, Any], variant: Variant) -> dict[str, Any]:
    if not variant.max_output_tokens:
        return dict(body)
    return {**body, "inferenceConfig": {**body.get("inferenceConfig", {}), "maxTokens": variant.max_output_tokens}}


def _with_turns(body: dict[str, Any], variant: Variant, answer: str | None, reason: str | None, turn: Any) -> dict[str, Any]:
    if variant.repair and answer:
        body["messages"] = [*body["messages"], turn("assistant", answer), turn("user", wrong(reason))]
    return body


def _said(said: ModelOutput) -> tuple[str, str | None, str | None]:
    """The text of an answer, the word on how it ended, and what the model said in declining."""
    if said.generation is not None:
        return said.generation, said.stop_reason, None
    if said.choices:
        choice = said.choices[0]
        return _text(choice.message), choice.finish_reason or choice.stop_reason, choice.message.refusal if choice.message else None
    if said.output is not None:
        return _text(said.output.message), said.stopReason, None
    return "".join(block.text or "" for block in said.content or []), said.stop_reason, None


def _text(turn: Turn | None) -> str:
    content = turn.content if turn else None
    return content if isinstance(content, str) else "".join(block.text or "" for block in content or [])


def _tokens(said: ModelOutput) -> tuple[int | None, int, int | None]:
    """Input tokens, cached ones included, which Anthropic and Converse count apart; cached ones; output tokens. None: not said."""
    if said.generation is not None:
        return said.prompt_token_count, 0, said.generation_token_count
    usage = said.usage
    if usage is None:
        return None, 0, None
    fresh = _first(usage.input_tokens, usage.inputTokens, usage.prompt_tokens)
    read = _first(usage.cache_read_input_tokens, usage.cacheReadInputTokens, usage.cacheReadInputTokenCount) or 0
    written = _first(usage.cache_creation_input_tokens, usage.cacheWriteInputTokens, usage.cacheWriteInputTokenCount) or 0
    return None if fresh is None else fresh + read + written, read, _first(usage.output_tokens, usage.outputTokens, usage.completion_tokens)


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _failed(record_id: str, error: Error | None) -> Reply:
    """A record with an error in place of an answer. It is not billed; records that the job did not reach say so in words."""
    if error is None:
        return Reply(custom_id=record_id, outcome="errored", reason="neither an answer nor an error", retryable=True)
    reason = ": ".join(str(part) for part in (error.errorCode, error.errorMessage) if part) or "an error without a word"
    if error.expired or EXPIRED in (error.errorMessage or "").lower():
        return Reply(custom_id=record_id, outcome="expired", reason=reason, retryable=True)
    code = str(error.errorCode or "")
    status = int(code) if code.isdigit() else 0
    retryable = error.retryable if error.retryable is not None else status in RETRYABLE_STATUS or status >= 500 or status == 0
    return Reply(custom_id=record_id, outcome="errored", reason=reason, retryable=retryable)
