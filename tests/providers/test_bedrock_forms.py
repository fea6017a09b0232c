"""Bodies in every maker's words, and every ending of a record."""

from __future__ import annotations

import json

import pytest

from nightshift.money.prices import base_model, price_at
from nightshift.providers.bedrock_forms import ConverseForm, InvokeForm, maker_of
from nightshift.providers.protocol import Garbage, Question
from nightshift.shapes import Usage, Variant

KEY = "ab" * 32
PARAMETERS = {"max_output_tokens": 60, "temperature": 0, "top_k": 5, "stop": ["END"]}
SCHEMA = {"type": "object", "properties": {"mood": {"type": "string"}}}
REPAIR = Variant(repair=True, max_output_tokens=120)
USAGE = {"inputTokens": 7, "outputTokens": 3, "totalTokens": 10, "cacheReadInputTokens": None}


def record(output=None, **others) -> bytes:
    return json.dumps({"recordId": KEY, "modelInput": {"messages": "echoed"}, "modelOutput": output, **others}).encode()


def converse(stop="end_turn", text="hi", **changes) -> bytes:
    content = [{"text": text, "image": None, "toolUse": None}]
    return record(
        {"output": {"message": {"role": "assistant", "content": content}}, "stopReason": stop, "usage": USAGE, "trace": None, **changes}
    )


def claude(stop="end_turn", text="hi") -> bytes:
    usage = {"input_tokens": 5, "output_tokens": 3, "cache_read_input_tokens": 2}
    return record({"content": [{"type": "text", "text": text}], "stop_reason": stop, "model": "claude-x", "usage": usage})


def chat(finish: str, content="hi", **message) -> bytes:
    return record({"choices": [{"message": {"content": content, **message}, "finish_reason": finish}]})


def failed(**error) -> bytes:
    return json.dumps({"recordId": KEY, "modelInput": {}, "error": error}).encode()


@pytest.mark.parametrize(
    ("raw", "outcome", "paid", "retryable"),
    [
        pytest.param(converse(), "succeeded", True, False, id="F90 Converse with nulls"),
        pytest.param(converse("max_tokens"), "truncated", True, False, id="F75 cut"),
        pytest.param(converse("model_context_window_exceeded"), "truncated", True, False, id="F82 context window"),
        pytest.param(converse("content_filtered", ""), "filtered", True, False, id="F77 filtered"),
        pytest.param(converse("guardrail_intervened", ""), "filtered", True, False, id="F77 guardrail"),
        pytest.param(converse("tool_use", ""), "invalid", True, False, id="F80 tool call"),
        pytest.param(converse(text=""), "invalid", True, False, id="F79 empty"),
        pytest.param(claude(), "succeeded", True, False, id="Anthropic"),
        pytest.param(claude("refusal", ""), "refused", True, False, id="F76 Anthropic refuses"),
        pytest.param(claude("max_tokens"), "truncated", True, False, id="F75 Anthropic cut"),
        pytest.param(record({"generation": "hi", "prompt_token_count": 7, "generation_token_count": 3, "stop_reason": "stop"}), "succeeded", True, False, id="Llama"),
        pytest.param(record({"generation": "h", "prompt_token_count": 7, "generation_token_count": 3, "stop_reason": "length"}), "truncated", True, False, id="F75 Llama cut"),
        pytest.param(record({"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}), "succeeded", True, False, id="Mistral"),
        pytest.param(chat("content_filter"), "filtered", True, False, id="F77 gpt-oss is filtered"),
        pytest.param(chat("function_call"), "invalid", True, False, id="F80 gpt-oss calls a tool"),
        pytest.param(chat("stop", content=None, refusal="no"), "refused", True, False, id="F76 gpt-oss refuses"),
        pytest.param(chat("a word nobody knows"), "errored", True, False, id="perhaps halfway"),
        pytest.param(converse(usage={"inputTokens": -1}), "succeeded", True, False, id="F85 usage that cannot be"),
        pytest.param(failed(errorCode=400, errorMessage="bad"), "errored", False, False, id="F93 a body that the model cannot read"),
        pytest.param(failed(errorCode="400", errorMessage="bad"), "errored", False, False, id="the code as a string"),
        pytest.param(failed(errorCode=500, errorMessage="oops"), "errored", False, True, id="F83 server error"),
        pytest.param(failed(errorCode=429, errorMessage="slow"), "errored", False, True, id="F83 throttled"),
        pytest.param(failed(errorCode=400, errorMessage="x", retryable=True), "errored", False, True, id="said to be retryable"),
        pytest.param(failed(errorCode=408, errorMessage="x", expired=True), "expired", False, True, id="F58 not reached in time"),
        pytest.param(failed(errorMessage="The job expired."), "expired", False, True, id="F58 in words"),
        pytest.param(record(), "errored", False, True, id="F70 neither answer nor error"),
        pytest.param(record({"output": 7}), "errored", True, True, id="an answer outside the contract"),
    ],
)  # fmt: skip
def test_every_ending_of_a_record_is_told_apart(raw, outcome, paid, retryable):
    reply = ConverseForm().read(raw)[0]
    assert (reply.custom_id, reply.outcome, reply.paid, reply.retryable) == (KEY, outcome, paid, retryable)
    assert outcome in ("succeeded", "refused") or reply.reason


@pytest.mark.parametrize("raw", [converse(), claude()])
def test_tokens_count_the_cached_ones_too(raw):
    reply = ConverseForm().read(raw)[0]
    assert (reply.input_tokens, reply.output_tokens) == (7, 3)


@pytest.mark.parametrize("line", [b"not json", b'{"modelOutput": {}}', b'{"recordId": 7}'])
def test_lines_that_name_no_request_are_garbage(line):
    assert isinstance(ConverseForm().read(line)[0], Garbage)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            "anthropic.claude-sonnet-5",
            {"anthropic_version": "bedrock-2023-05-31", "max_tokens": 60, "stop_sequences": ["END"], "temperature": 0, "top_k": 5},
        ),
        (
            "us.amazon.nova-lite-v1:0",
            {"schemaVersion": "messages-v1", "inferenceConfig": {"maxTokens": 60, "temperature": 0, "topK": 5, "stopSequences": ["END"]}},
        ),
        ("meta.llama3-3-70b-instruct-v1:0", {"max_gen_len": 60, "temperature": 0, "top_k": 5, "stop": ["END"]}),
        ("mistral.mistral-large-2407-v1:0", {"max_tokens": 60, "temperature": 0, "top_k": 5, "stop": ["END"]}),
    ],
)
def test_each_makers_body_has_the_parameters_in_its_words(model, expected):
    body = InvokeForm().body(Question(model=model, system="S", user="U", parameters=PARAMETERS, schema=SCHEMA))
    assert expected.items() <= body.items()
    told = json.dumps(body)
    assert "JSON Schema" in told
    assert "response_format" not in told, "batches know no structured output"
    again = InvokeForm().vary(body, REPAIR, "half an answ", "not valid JSON")
    assert "120" in json.dumps(again)
    assert "half an answ" in json.dumps(again)
    assert "not valid JSON" in json.dumps(again)
    assert "half an answ" not in json.dumps(body), "the body that was asked first stays as it is"


def test_converse_hands_on_what_it_has_no_word_for():
    body = ConverseForm().body(Question(model="m", system=None, user="U", parameters=PARAMETERS, schema=None))
    assert body == {
        "messages": [{"role": "user", "content": [{"text": "U"}]}],
        "inferenceConfig": {"maxTokens": 60, "temperature": 0, "stopSequences": ["END"]},
        "additionalModelRequestFields": {"top_k": 5},
    }
    again = ConverseForm().vary(body, REPAIR, "bad", "why")
    assert [turn["role"] for turn in again["messages"]] == ["user", "assistant", "user"]
    assert again["inferenceConfig"]["maxTokens"] == 120


@pytest.mark.parametrize(
    ("model", "maker", "base"),
    [
        ("anthropic.claude-sonnet-5", "anthropic", "anthropic.claude-sonnet-5"),
        ("us.anthropic.claude-sonnet-5", "anthropic", "anthropic.claude-sonnet-5"),
        ("global.amazon.nova-2-lite-v1:0", "amazon", "amazon.nova-2-lite-v1:0"),
        ("arn:aws:bedrock:us-east-1::foundation-model/meta.llama4-scout-17b-instruct-v1:0", "meta", "meta.llama4-scout-17b-instruct-v1:0"),
        ("arn:aws:bedrock:eu-west-1:123456789012:inference-profile/eu.amazon.nova-pro-v1:0", "amazon", "amazon.nova-pro-v1:0"),
        ("gpt-5.4-nano", None, "gpt-5.4-nano"),
    ],
)
def test_a_model_is_known_by_any_of_its_names(model, maker, base):
    assert (maker_of(model), base_model(model)) == (maker, base)


@pytest.mark.parametrize(
    ("provider", "model", "dollars"),
    [
        ("bedrock", "amazon.nova-lite-v1:0", "0.03"),
        ("live", "amazon.nova-lite-v1:0", "0.06"),
        ("bedrock", "us.amazon.nova-lite-v1:0", "0.03"),
        ("bedrock", "us.anthropic.claude-haiku-4-5-20251001-v1:0", "0.55"),
        ("bedrock", "global.anthropic.claude-haiku-4-5-20251001-v1:0", "0.50"),
        ("bedrock", "anthropic.claude-sonnet-4-6", "1.50"),
        ("bedrock", "arn:aws:bedrock:us-east-1:123456789012:application-inference-profile/abc", None),
    ],
)
def test_prices_follow_the_profile_and_half_of_what_is_not_published(provider, model, dollars):
    price = price_at(provider, model)
    cost = price.of(Usage(input_tokens=1_000_000)) if price else None
    assert (None if cost is None else f"{cost:.2f}") == dollars
