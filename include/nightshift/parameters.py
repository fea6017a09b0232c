"""Parameters of a request: handed on to the model as they stand, but for those that Nightshift writes, and those that are misspelt."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import orjson

RESERVED = (
    "model", "messages", "input", "instructions", "stream", "n", "response_format", "text", "tools", "system", "prompt", "toolConfig",
    "guardrailConfig", "outputConfig", "anthropic_version", "schemaVersion", "inputText",
)  # fmt: skip
LIMIT = "max_output_tokens"
OTHER_LIMITS = ("max_tokens", "max_completion_tokens", "maxTokens", "max_gen_len", "maxTokenCount")  # what providers call it
USUAL = (  # what is nearly one of these is one, misspelt
    LIMIT, "temperature", "top_p", "top_k", "stop", "seed", "frequency_penalty", "presence_penalty", "repetition_penalty", "reasoning",
    "reasoning_effort", "verbosity", "logprobs", "top_logprobs", "logit_bias", "dimensions", "service_tier", "thinking", "min_p",
    "stop_sequences", "truncation", "metadata", "user",
)  # fmt: skip
NEARLY = 0.85  # as alike as `temprature`, and more than `top_n` and `top_p`


def check_parameters(parameters: Mapping[str, Any]) -> None:
    """Raise ValueError for what cannot be set here, or is probably not what was meant."""
    if taken := sorted(parameters.keys() & set(RESERVED)):
        raise ValueError(f"{', '.join(taken)} cannot be set here: Nightshift writes it from the rest of the job")
    for name in sorted(parameters.keys() - set(USUAL)):
        if meant := difflib.get_close_matches(name, USUAL, n=1, cutoff=NEARLY):
            raise ValueError(f"{name}: no such parameter is known here; did you mean {meant[0]!r}?")
    limit = parameters.get(LIMIT, 1)
    if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= 10_000_000:
        raise ValueError(f"{LIMIT} has to be a whole number of at least 1")
    try:
        orjson.dumps(parameters)
    except TypeError as error:
        raise ValueError(f"a value that no JSON request can carry ({error})") from error
