"""The form of an endpoint, and the lines of a shard under it."""

from __future__ import annotations

from collections.abc import Callable

import orjson

from nightshift.providers.bedrock_forms import ConverseForm, InvokeForm
from nightshift.providers.openai_forms import ChatForm, EmbeddingsForm, ResponsesForm
from nightshift.providers.protocol import Form
from nightshift.shapes import Endpoint, Variant

FORMS: dict[Endpoint, Callable[[], Form]] = {
    "/v1/chat/completions": ChatForm,
    "/v1/responses": ResponsesForm,
    "/v1/embeddings": EmbeddingsForm,
    "converse": ConverseForm,
    "invoke": InvokeForm,
}


def form_of(endpoint: Endpoint) -> Form:
    """How models are asked at an endpoint."""
    return FORMS[endpoint]()


def vary_line(form: Form, line: bytes, variant: Variant, answer: str | None, reason: str | None) -> bytes:
    """A line of a shard as it is asked again. `answer`, `reason`: what came last, and what is wrong with it, for a repair."""
    custom_id, body = form.opened(line)
    return form.line(custom_id, orjson.dumps(form.vary(body, variant, answer, reason)))
