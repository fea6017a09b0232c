"""How an answer ended, in the words of every maker: a word that nobody here knows is a doubt, and no good answer is made of it."""

from __future__ import annotations

from typing import NamedTuple

from nightshift.shapes import Outcome


class Ending(NamedTuple):
    """What an answer's last word makes of it."""

    outcome: Outcome
    reason: str | None = None
    retryable: bool = False  # for `errored`: whether asking again can help


SUCCEEDED, REFUSED, EMPTY = Ending("succeeded"), Ending("refused"), Ending("invalid", "empty answer")
_TRUNCATED, _FILTERED = Ending("truncated", "token limit reached"), Ending("filtered", "content filter")
_CALLED = Ending("invalid", "a tool call in place of an answer")
ENDINGS: dict[str | None, Ending] = {
    **dict.fromkeys((None, "", "stop", "end_turn", "stop_sequence", "eos", "eos_token", "complete", "completed", "finish"), SUCCEEDED),
    **dict.fromkeys(("length", "max_tokens", "max_output_tokens", "model_length"), _TRUNCATED),
    "model_context_window_exceeded": Ending("truncated", "context window exceeded"),
    "refusal": REFUSED,
    **dict.fromkeys(("content_filter", "content_filtered", "safety"), _FILTERED),
    "guardrail_intervened": Ending("filtered", "a guardrail intervened"),
    **dict.fromkeys(("tool_calls", "tool_use", "function_call"), _CALLED),
    "malformed_model_output": Ending("invalid", "malformed model output"),
    "malformed_tool_use": Ending("invalid", "malformed tool use"),
    **{
        word: Ending("errored", f"the server broke off its answer: {word}", retryable=True)
        for word in ("abort", "aborted", "cancelled", "error", "insufficient_system_resource", "pause_turn")
    },
}


def ending_of(word: str | None) -> Ending:
    """What the word makes of an answer with which it ends (`finish_reason`, `stopReason`)."""
    known = ENDINGS.get(word) or ENDINGS.get((word or "").casefold())
    return known or Ending("errored", f"its answer ended as {word!r}, which may be halfway")
