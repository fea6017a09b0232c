"""The model behind the rehearsal servers: VADER, a sentiment lexicon, answering in the JSON Schema that the request asks for.

It is a lexicon and not an LLM: it reads the first user message, ignores instructions, and knows English only (other
languages come out neutral). Embeddings are feature hashing of words and their pairs.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import orjson

NAME = "vader-3.3.2"
WORD = re.compile(r"\w+", re.UNICODE)
SENTENCE = re.compile(r"(?<=[.!?])\s+")
POSITIVE, NEGATIVE = 0.05, -0.05  # VADER's own thresholds for its compound score
EMBEDDING_SIZE = 384
TOPIC_WORDS: dict[str, tuple[str, ...]] = {
    "cleanliness": ("clean", "dirty", "spotless", "stain", "smell", "dust", "mold", "hair"),
    "staff": ("staff", "reception", "service", "host", "waiter", "manager", "friendly", "rude", "helpful"),
    "location": ("location", "centre", "center", "beach", "station", "walk", "view", "central"),
    "food": ("breakfast", "food", "dinner", "restaurant", "coffee", "buffet", "meal"),
    "room": ("room", "bed", "bathroom", "shower", "pillow", "suite", "balcony"),
    "noise": ("noise", "noisy", "loud", "quiet", "street", "thin walls"),
    "value": ("price", "cheap", "expensive", "value", "affordable", "worth", "overpriced"),
    "facilities": ("pool", "gym", "spa", "lift", "elevator", "parking", "air conditioning"),
    "wifi": ("wifi", "wi-fi", "internet"),
    "safety": ("safe", "unsafe", "lock", "theft", "security"),
}


def answer(text: str, schema: Mapping[str, Any] | None) -> str:
    """What the model says about a text: JSON under the schema, or a word without one."""
    score = compound(text)
    if schema is None:
        return sentiment(score)
    return orjson.dumps(_fill("", schema, text, score)).decode()


def compound(text: str) -> float:
    """VADER's compound score, -1 to 1."""
    return float(_analyzer().polarity_scores(text)["compound"])


def sentiment(score: float) -> str:
    """The class of a compound score."""
    return "positive" if score >= POSITIVE else "negative" if score <= NEGATIVE else "neutral"


def count_tokens(text: str) -> int:
    """Tokens as the rehearsal bills them: four and a bit bytes each, as on a mixed corpus."""
    return max(1, round(len(text.encode("utf-8", "replace")) / 4.4))


def embed(text: str, size: int = EMBEDDING_SIZE) -> list[float]:
    """A unit vector by feature hashing of words and pairs of words: texts that share words lie near each other."""
    vector = [0.0] * size
    words = [word.lower() for word in WORD.findall(text)]
    for feature in [*words, *(f"{a} {b}" for a, b in pairwise(words))]:
        digest = int.from_bytes(hashlib.blake2b(feature.encode(), digest_size=8).digest(), "big")
        vector[digest % size] += 1.0 if digest >> 63 else -1.0
    norm = math.sqrt(sum(value * value for value in vector)) or 1.0
    return [round(value / norm, 6) for value in vector]


def _fill(name: str, schema: Mapping[str, Any], text: str, score: float) -> Any:
    """A value under a schema, as near to the text's meaning as a lexicon gets."""
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return _choose(schema["enum"], text, score)
    for variants in (schema.get("anyOf"), schema.get("oneOf")):
        if variants:
            return _fill(name, next((each for each in variants if each.get("type") != "null"), variants[0]), text, score)
    kind = schema.get("type")
    kind = next((each for each in kind if each != "null"), "null") if isinstance(kind, list) else kind
    match kind:
        case "object":
            return {key: _fill(key, inner, text, score) for key, inner in schema.get("properties", {}).items()}
        case "array":
            return _items(schema, text, score)
        case "boolean":
            return score >= POSITIVE
        case "integer":
            low, high = schema.get("minimum", 1), schema.get("maximum", 5)
            return round(low + (score + 1) / 2 * (high - low))
        case "number":
            low, high = schema.get("minimum", 0), schema.get("maximum", 1)
            # Lexicon scores crowd near zero; half the range is the least certainty of a three-way choice.
            return round(low + (0.5 + abs(score) / 2) * (high - low), 3)
        case "string":
            return _sentence(text)[: schema.get("maxLength", 300)] or "-"
    return None


def _choose(options: Sequence[Any], text: str, score: float) -> Any:
    word = sentiment(score)
    if word in options:
        return word
    return next(iter(_topics(text, options)), options[0])


def _items(schema: Mapping[str, Any], text: str, score: float) -> list[Any]:
    items = schema.get("items", {})
    if "enum" in items:
        return _topics(text, items["enum"])[: schema.get("maxItems", 5)] or [option for option in items["enum"] if option == "other"]
    return [_fill("", items, text, score)] if schema.get("minItems", 1) else []


def _topics(text: str, options: Sequence[Any]) -> list[Any]:
    lowered = text.lower()
    return [option for option in options if any(word in lowered for word in TOPIC_WORDS.get(str(option), (str(option),)))]


def _sentence(text: str) -> str:
    return SENTENCE.split(text.strip(), maxsplit=1)[0]


@cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
