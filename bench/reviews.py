"""The benchmark's data: hotel reviews as a table, and what a provider answers about them. The same for the same seed.

Ten rows in a hundred repeat an earlier one to the letter; twelve are Vietnamese, eight accented European, six with emoji; quotes,
line breaks, tabs and backslashes occur. 716 bytes of text on average (40 to 400 words, log-normal).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

CHUNK = 20_000  # rows made at once, and rows of a row group
POOL = 40_000  # earlier rows that may be repeated
TOPICS = ["cleanliness", "staff", "location", "food", "room", "noise", "value", "facilities", "wifi", "safety", "other"]
SENTIMENTS = ["positive", "neutral", "negative", "mixed"]
OUTCOMES = ["valid", "cut", "breaks the schema", "error", "expired", "missing"]
SHARES = [0.973, 0.010, 0.010, 0.005, 0.001, 0.001]
TWICE = 0.0005  # of the valid lines
EMOJI = ["😀", "😍", "🏖️", "👍", "👎", "🌊", "☕", "🛏️", "🔥", "💯", "😡", "🙏🏽", "👨‍👩‍👧", "✨", "🇻🇳", "🍜", "🐜", "😴"]
COUNTRIES = ["VN", "US", "FR", "DE", "GB", "JP", "TH", "ES", "IT", "BR", "PL", "CZ", "AU", "IN", "Côte d'Ivoire", "Türkiye"]


SCHEMA = pa.schema(
    [("review_id", pa.string()), ("hotel_id", pa.int64()), ("text", pa.string()), ("country", pa.string()), ("stars", pa.int8())]
)
Review = tuple[str, str, int]  # text, country, stars


def write_reviews(path: Path, rows: int, seed: int = 7) -> None:
    """Write a Parquet file of reviews."""
    rng = np.random.default_rng(seed)
    vocabulary = {name: _words(name) for name in ("en", "vi", "eu")}
    pool: list[Review] = []
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for first in range(0, rows, CHUNK):
            count = min(CHUNK, rows - first)
            texts, countries, stars = zip(*_reviews(rng, vocabulary, pool, count), strict=True)
            ids = [f"rv-{first + i:09d}" for i in range(count)]
            columns = [ids, rng.integers(1, 30_000, count), texts, countries, stars]
            arrays = [pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), row_group_size=count)


def _reviews(rng: np.random.Generator, vocabulary: dict[str, npt.NDArray[Any]], pool: list[Review], count: int) -> Iterator[Review]:
    lengths = np.clip(np.exp(rng.normal(np.log(115), 0.55, count)), 40, 400).astype(int)
    languages = rng.choice(np.array(["en", "vi", "eu"], dtype=object), count, p=[0.80, 0.12, 0.08])
    repeats, has_emoji, has_break, has_quote, is_odd = (rng.random(count) < share for share in (0.10, 0.06, 0.15, 0.20, 0.005))
    stars = rng.choice([1, 2, 3, 4, 5], count, p=[0.1, 0.08, 0.15, 0.29, 0.38])
    countries = rng.integers(0, len(COUNTRIES), count)
    words = {name: rng.choice(known, int(lengths.sum()), p=_zipf(len(known))) for name, known in vocabulary.items()}
    at = 0
    for i in range(count):
        if repeats[i] and pool:
            yield pool[int(rng.integers(0, len(pool)))]
            continue
        length = int(lengths[i])
        text = _sentences(words[languages[i]][at : at + length].tolist(), i)
        at += length
        if has_quote[i]:
            text[length // 3] = f'"{text[length // 3]}"'
        if has_emoji[i]:
            text[length // 2] += " " + EMOJI[i % len(EMOJI)]
            text[-1] += " " + EMOJI[(i // 7) % len(EMOJI)] * (1 + i % 3)
        if has_break[i]:
            text[length // 2] += "\n" if i % 4 else "\r\n\r\n-"
        if is_odd[i]:
            text[0] = ("C:\\temp\\photo ", "\tTabbed ", "weird\x0bctl ")[i % 3] + text[0]
        review = (" ".join(text), COUNTRIES[countries[i]], int(stars[i]))
        if len(pool) < POOL:
            pool.append(review)
        elif i % 20 == 0:
            pool[int(rng.integers(0, len(pool)))] = review
        yield review


def _sentences(words: list[str], number: int) -> list[str]:
    """Words with capitals, commas and ends of sentences, of 6 to 20 words each."""
    start = 0
    while start < len(words):
        end = min(len(words), start + 6 + (start * 7 + number) % 15)
        words[start] = words[start].capitalize()
        words[end - 1] += "." if (number + end) % 9 else ("!" if number % 2 else "?")
        if end - start > 8:
            words[start + 4] += ","
        start = end
    return words


def _words(language: str) -> npt.NDArray[Any]:
    text = Path(__file__).with_name("words").joinpath(f"{language}.txt").read_text(encoding="utf-8")
    return np.array(list(dict.fromkeys(text.split())), dtype=object)


def _zipf(count: int, exponent: float = 0.95) -> npt.NDArray[np.float64]:
    weights = 1.0 / np.arange(1, count + 1) ** exponent
    return weights / weights.sum()


def write_results(folder: Path, name: str, custom_ids: Sequence[str], seed: int = 11) -> Counter[str]:
    """Write the two result files of one OpenAI batch, `out-<name>.jsonl` (shuffled) and `err-<name>.jsonl`; how many ended how."""
    rng = np.random.default_rng([seed, len(custom_ids)])
    count = len(custom_ids)
    outcomes = rng.choice(len(OUTCOMES), count, p=SHARES)
    lengths, tokens, scores = rng.integers(14, 34, count), rng.integers(520, 1100, count), rng.random(count)
    words, answered, failed, told = _words("en"), list[str](), list[str](), Counter[str]()
    for i, custom_id in enumerate(custom_ids):
        outcome = OUTCOMES[outcomes[i]]
        told[outcome] += 1
        mark = f"{i:08x}" * 4
        if outcome in ("error", "expired"):
            failed.append(_dumped(_failure(custom_id, mark, outcome, i)))
        elif outcome != "missing":
            summary = " ".join(rng.choice(words, lengths[i])).capitalize() + "."
            answer = _answer(i, summary, float(scores[i]), outcome)
            answered.append(_dumped(_success(custom_id, mark, answer, outcome, int(tokens[i]), 60 + int(lengths[i]))))
            if outcome == "valid" and scores[i] < TWICE:
                told["twice"] += 1
                answered.append(answered[-1])
    rng.shuffle(answered)
    for kind, lines in (("out", answered), ("err", failed)):
        (folder / f"{kind}-{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return told


def _answer(number: int, summary: str, score: float, outcome: str) -> str:
    if number % 9 == 0:
        summary = f'The guest said "{summary[:-1]}" – “mostly”.'
    if number % 31 == 0:
        summary += "\nPhòng sạch 👍"
    answer = {
        "sentiment": SENTIMENTS[number * 7 % 4],
        "score": round(score, 2),
        "topics": list(dict.fromkeys(TOPICS[(number + 3 * j * j) % 11] for j in range(number % 6))),
        "summary": summary,
        "language": ("en", "vi", "fr", "de")[number * 7 % 4],
        "would_return": (True, False, None)[number % 3],
    }
    if outcome == "breaks the schema":
        answer.update([{"sentiment": "very positive"}, {"score": 7}, {"language": "English"}, {"extra": 1}][number % 4])
    text = json.dumps(answer, ensure_ascii=False)
    return text[: len(text) * 2 // 3] if outcome == "cut" else text


def _success(custom_id: str, mark: str, answer: str, outcome: str, asked: int, answered: int) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer, "refusal": None, "annotations": []}
    finish = "length" if outcome == "cut" else "stop"
    body = {
        "id": f"chatcmpl-{mark[:29]}",
        "object": "chat.completion",
        "created": 1760000000,
        "model": "gpt-5.4-nano-2026-03-17",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
        "usage": {
            "prompt_tokens": asked,
            "completion_tokens": answered,
            "total_tokens": asked + answered,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0, "audio_tokens": 0, "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0,
            },
        },
        "service_tier": "default",
        "system_fingerprint": f"fp_{mark[:10]}",
    }  # fmt: skip
    return _line(custom_id, mark, {"status_code": 200, "request_id": mark, "body": body}, None)


def _failure(custom_id: str, mark: str, outcome: str, number: int) -> dict[str, Any]:
    if outcome == "expired":
        why = "This request could not be executed before the completion window expired."
        return _line(custom_id, mark, None, {"code": "batch_expired", "message": why})
    code = 429 if number % 3 else 500
    error = {"message": "Rate limit reached" if code == 429 else "The server had an error", "type": "requests", "param": None, "code": None}
    return _line(custom_id, mark, {"status_code": code, "request_id": mark, "body": {"error": error}}, None)


def _line(custom_id: str, mark: str, response: dict[str, Any] | None, error: dict[str, Any] | None) -> dict[str, Any]:
    return {"id": f"batch_req_{mark}", "custom_id": custom_id, "response": response, "error": error}


def _dumped(line: dict[str, Any]) -> str:
    return json.dumps(line, separators=(",", ":"))


def main() -> None:
    """`python -m bench.reviews OUT.parquet ROWS`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("rows", type=int)
    given = parser.parse_args()
    write_reviews(given.out, given.rows)


if __name__ == "__main__":
    main()
