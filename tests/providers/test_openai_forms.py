from __future__ import annotations

import json

import pytest

from nightshift.errors import SettingInvalid
from nightshift.providers.openai import OpenAIAccess, OpenAIBatches
from nightshift.providers.openai_forms import ChatForm, ResponsesForm, is_strict
from nightshift.providers.protocol import Garbage, Question

KEY = "ab" * 32
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}


def line(response=None, error=None) -> bytes:
    return json.dumps({"id": "x", "custom_id": KEY, "response": response, "error": error}).encode()


def chat(finish="stop", content="hi", refusal=None, status=200, **changes) -> bytes:
    body = {
        "model": "m-2026-01-01",
        "choices": [{"message": {"content": content, "refusal": refusal}, "finish_reason": finish}],
        "usage": USAGE,
    }
    return line({"status_code": status, "body": {**body, **changes}})


def failed(status, code, message="why") -> bytes:
    return line({"status_code": status, "body": {"error": {"message": message, "type": "t", "param": None, "code": code}}})


@pytest.mark.parametrize(
    ("raw", "outcome", "paid", "retryable"),
    [
        pytest.param(chat(), "succeeded", True, False, id="answered"),
        pytest.param(chat("length", "hi there, I"), "truncated", True, False, id="F75 cut by the token limit"),
        pytest.param(chat(refusal="no"), "refused", True, False, id="F76 refused"),
        pytest.param(chat("content_filter", None), "filtered", True, False, id="F77 filtered"),
        pytest.param(chat(content=""), "invalid", True, False, id="F79 empty"),
        pytest.param(chat(choices=[]), "invalid", True, False, id="F79 no choices"),
        pytest.param(chat("tool_calls", None), "invalid", True, False, id="F80 a tool call"),
        pytest.param(chat(choices=None), "invalid", True, False, id="F79 null in place of choices"),
        pytest.param(chat(choices=[{"message": None}]), "invalid", True, False, id="F79 null in place of a message"),
        pytest.param(chat("eos"), "succeeded", True, False, id="at its end, in another word"),
        pytest.param(chat("STOP"), "succeeded", True, False, id="at its end, in capitals"),
        pytest.param(chat("max_tokens", "hi the"), "truncated", True, False, id="F75 cut, in another word"),
        pytest.param(chat("abort", "hi the"), "errored", True, True, id="broken off"),
        pytest.param(chat("a word nobody knows", "hi the"), "errored", True, False, id="perhaps halfway"),
        pytest.param(chat(usage={}), "succeeded", True, False, id="F85 usage without a word"),
        pytest.param(chat(usage={"prompt_tokens": None, "completion_tokens": None}), "succeeded", True, False, id="F85 usage of nulls"),
        pytest.param(chat(usage={"prompt_tokens": -1}), "succeeded", True, False, id="F85 usage that cannot be"),
        pytest.param(chat(usage="a lot"), "succeeded", True, False, id="F85 usage in words"),
        pytest.param(chat(status=0), "errored", False, True, id="F70 status 0"),
        pytest.param(failed(500, "server_error"), "errored", False, True, id="F83 server error"),
        pytest.param(failed(429, "rate_limit_exceeded"), "errored", False, True, id="F83 rate limited"),
        pytest.param(failed(400, "context_length_exceeded"), "errored", False, False, id="F82 too long"),
        pytest.param(failed(400, "content_policy_violation"), "filtered", False, False, id="F77 refused by policy"),
        pytest.param(failed(404, "model_not_found"), "errored", False, False, id="F40 no such model"),
        pytest.param(failed(200, "server_error"), "errored", False, False, id="F71 an error under a status that says all is well"),
        pytest.param(failed(200, 502), "errored", False, True, id="F71 an error that has a status of its own"),
        pytest.param(line({"status_code": 400, "body": {"message": "too long", "code": 400}}), "errored", False, False, id="F82 flat"),
        pytest.param(line({"status_code": 400, "body": {"error": "too long"}}), "errored", False, False, id="F82 a word for an error"),
        pytest.param(line({"status_code": 400, "body": "<html>"}), "errored", False, False, id="a proxy's no"),
        pytest.param(line({"status_code": 502, "body": "<html>"}), "errored", False, True, id="a proxy's outage"),
        pytest.param(line({"status_code": 502, "body": []}), "errored", False, True, id="nothing of any contract, and no answer"),
        pytest.param(line(None, "over"), "errored", False, True, id="a word for an error"),
        pytest.param(line(None, {"code": "content_filter", "message": "x"}), "filtered", False, False, id="F77 without a response"),
        pytest.param(line({"status_code": 400, "body": None}, {"code": 400}), "errored", False, False, id="F72 and no asking again"),
        pytest.param(line(None, {"code": "batch_expired", "message": "over"}), "expired", False, True, id="F56 expired"),
        pytest.param(line(None, {"code": "batch_cancelled", "message": "x"}), "cancelled", False, True, id="F57 cancelled"),
        pytest.param(line(None, {"code": "batch_canceled", "message": "x"}), "cancelled", False, True, id="F57 the other spelling"),
        pytest.param(line(None, {"code": "new_code", "message": "x"}), "errored", False, True, id="unknown code"),
        pytest.param(line(None, None), "errored", False, True, id="F70 neither response nor error"),
        pytest.param(
            line({"status_code": 500, "body": None}, {"message": "x", "code": 500}), "errored", False, True, id="F72 the way of vLLM"
        ),
    ],
)
def test_every_ending_of_a_chat_request_is_told_apart(raw, outcome, paid, retryable):
    reply = ChatForm().read(raw)[0]
    assert (reply.custom_id, reply.outcome, reply.paid, reply.retryable) == (KEY, outcome, paid, retryable)
    assert outcome == "succeeded" or reply.reason or outcome == "refused"


ANSWER = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "hi"}]}


def response(status="completed", parts=(("output_text", "hi"),), **changes) -> bytes:
    content = [{"type": kind, "text": text} if kind == "output_text" else {"type": kind, "refusal": text} for kind, text in parts]
    output = [{"type": "reasoning", "summary": []}, {"type": "message", "role": "assistant", "content": content}]
    usage = {"input_tokens": 7, "output_tokens": 3, "input_tokens_details": {"cached_tokens": 2}}
    return line({"status_code": 200, "body": {"status": status, "output": output, "usage": usage, "model": "m", "error": None, **changes}})


@pytest.mark.parametrize(
    ("raw", "outcome", "text"),
    [
        pytest.param(response(), "succeeded", "hi", id="answered"),
        pytest.param(response(parts=(("output_text", "a"), ("output_text", "b"))), "succeeded", "ab", id="several parts"),
        pytest.param(response(parts=(("refusal", "no"),)), "refused", "no", id="F76 refused"),
        pytest.param(response("incomplete", incomplete_details={"reason": "max_output_tokens"}), "truncated", "hi", id="F75 cut"),
        pytest.param(response("incomplete", incomplete_details={"reason": "content_filter"}), "filtered", "hi", id="F77 filtered"),
        pytest.param(response("failed", error={"code": "server_error", "message": "x"}), "errored", "hi", id="failed"),
        pytest.param(response(output=None), "invalid", None, id="F79 null in place of output"),
        pytest.param(response(output=[{"type": "mcp_call", "content": {"a": 1}}, ANSWER]), "succeeded", "hi", id="what a tool says"),
        pytest.param(response(output=[{"type": "message", "content": "hi"}]), "succeeded", "hi", id="a plain text"),
        pytest.param(response(parts=()), "invalid", None, id="F79 empty"),
    ],
)
def test_every_ending_of_a_responses_request_is_told_apart(raw, outcome, text):
    reply = ResponsesForm().read(raw)[0]
    assert (reply.outcome, reply.text, reply.paid) == (outcome, text, True)


@pytest.mark.parametrize(("code", "retryable"), [("server_error", True), ("invalid_prompt", False), ("context_length_exceeded", False)])
def test_a_response_that_failed_is_asked_again_only_where_that_can_help(code, retryable):
    reply = ResponsesForm().read(response("failed", error={"code": code, "message": "x"}))[0]
    assert (reply.outcome, reply.retryable, reply.reason) == ("errored", retryable, f"{code}: x")


def test_what_a_model_thinks_aloud_is_no_part_of_its_answer():
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
        {"type": "text", "text": "h"},
        {"type": "text", "text": "i"},
    ]
    reply = ChatForm().read(chat(content=parts))[0]
    assert (reply.outcome, reply.text, reply.input_tokens) == ("succeeded", "hi", 7)


@pytest.mark.parametrize("form", [ChatForm(), ResponsesForm()], ids=["chat", "responses"])
def test_tokens_are_read_and_F85_missing_usage_is_not_zero(form):
    raw = chat() if isinstance(form, ChatForm) else response()
    reply = form.read(raw)[0]
    assert (reply.input_tokens, reply.cached_tokens, reply.output_tokens) == (7, 2, 3)
    without = json.loads(raw)
    del without["response"]["body"]["usage"]
    assert form.read(json.dumps(without).encode())[0].input_tokens is None


def test_F86_the_snapshot_that_answered_is_kept():
    assert ChatForm().read(chat())[0].model == "m-2026-01-01"


@pytest.mark.parametrize("raw", [b'{"custom_id": "ab', b"[]", b'{"custom_id": 7}', b'{"no": "id"}', b"\xff\xfe"])
def test_F65_F73_a_line_that_cannot_be_read_is_garbage(raw):
    assert isinstance(ChatForm().read(raw)[0], Garbage)


def test_a_readable_id_with_an_odd_body_is_an_error_of_that_request():
    reply = ChatForm().read(json.dumps({"custom_id": KEY, "response": {"status_code": 200, "body": {"choices": "none"}}}).encode())[0]
    assert (reply.custom_id, reply.outcome) == (KEY, "errored")


def test_bodies_carry_the_schema_and_the_endpoints_own_names():
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}
    arguments = {"model": "m", "system": "S", "user": "U", "parameters": {"max_output_tokens": 5, "temperature": 0}, "schema": schema}
    asked = ChatForm().body(Question(**arguments))
    assert asked["max_completion_tokens"] == 5
    assert asked["messages"] == [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert asked["response_format"]["json_schema"] == {"name": "answer", "strict": True, "schema": schema}
    asked = ResponsesForm().body(Question(**arguments))
    assert (asked["max_output_tokens"], asked["instructions"], asked["store"]) == (5, "S", False)
    assert asked["text"]["format"] == {"type": "json_schema", "name": "answer", "strict": True, "schema": schema}


def closed(**properties) -> dict:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "strict"),
    [
        ({"type": "object", "properties": {"a": {}}, "required": ["a"], "additionalProperties": False}, True),
        ({"type": "object", "properties": {"a": {}}, "required": ["a"]}, False),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": False}, False),
        ({"type": "array", "items": {"type": "object", "properties": {"a": {}}}}, False),
        (closed(a={"type": "object", "additionalProperties": {"type": "string"}}), False),
        (closed(a={"anyOf": [{"type": "object", "properties": {"b": {}}}, {"type": "null"}]}), False),
        (closed(a={"anyOf": [closed(b={}), {"type": "null"}]}), True),
        ({**closed(a={"$ref": "#/$defs/A"}), "$defs": {"A": {"type": "object", "properties": {"b": {}}}}}, False),
        ({**closed(a={"$ref": "#/$defs/A"}), "$defs": {"A": closed(b={})}}, True),
        ({**closed(a={}), "not": {"type": "null"}}, False),
        (closed(a={**closed(b={}), "dependentRequired": {"b": ["b"]}}), False),
    ],
)
def test_strict_is_only_asked_where_it_is_accepted(schema, strict):
    assert is_strict(schema) is strict


@pytest.mark.parametrize(
    ("given", "variable", "address"),
    [
        pytest.param("http://127.0.0.1:8790/v1", "https://elsewhere/v1", "http://127.0.0.1:8790/v1", id="named"),
        pytest.param(None, "https://elsewhere/v1", "https://elsewhere/v1", id="in the environment"),
        pytest.param(None, "", "https://api.openai.com/v1", id="an empty variable"),
        pytest.param(None, None, "https://api.openai.com/v1", id="nowhere"),
    ],
)
def test_the_address_is_what_is_named_else_the_environments_else_openais(monkeypatch, given, variable, address):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    if variable is not None:
        monkeypatch.setenv("OPENAI_BASE_URL", variable)
    assert OpenAIBatches("/v1/chat/completions", OpenAIAccess(base_url=given, api_key="x")).where == address


@pytest.mark.parametrize("given", ["127.0.0.1:8790", "http://", "ftp://x/v1", "not a url"])
def test_an_address_that_is_none_is_refused(given):
    with pytest.raises(SettingInvalid, match="OPENAI_BASE_URL, in Airflow the connection's host"):
        _ = OpenAIBatches("/v1/chat/completions", OpenAIAccess(base_url=given, api_key="x")).where
