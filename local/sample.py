# ruff: noqa: E501
"""A few thousand hotel reviews as a JSONL file, with everything that real files have: duplicates, empty and over-long
texts, emoji, Vietnamese, malformed lines. The same seed makes the same bytes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

OPENINGS = ("We stayed three nights.", "Business trip.", "Family holiday in July.", "Just one night near the airport.", "Second visit.", "")
GOOD = (
    "The room was clean and affordable.", "Staff were friendly and helpful from the first minute.", "Breakfast was excellent, with fresh coffee.",
    "Great location, five minutes from the beach.", "The bed was wonderfully comfortable.", "Lovely pool and a quiet garden.",
    "Fast wifi, and the gym was spotless.", "Superb value for the price.", "I loved the view from the balcony.", "Check-in was quick and easy.",
)  # fmt: skip
BAD = (
    "The bathroom was dirty and it smelled bad.", "Reception was rude and slow.", "The street noise was terrible, I could not sleep.",
    "Breakfast was cold and disappointing.", "Overpriced for what you get.", "The wifi never worked, which was annoying.",
    "The air conditioning was broken and nobody cared.", "Horrible mattress, my back hurts.", "The lift was out of order all week.", "I felt unsafe: the lock was broken.",
)  # fmt: skip
PLAIN = (
    "The hotel has eighty rooms.",
    "We arrived at nine in the evening.",
    "Parking is behind the building.",
    "The room had two beds and a desk.",
    "It is next to the station.",
)
VIETNAMESE = (
    "Phòng sạch sẽ và giá cả phải chăng.",
    "Nhân viên rất thân thiện, bữa sáng ngon.",
    "Phòng ồn ào, wifi yếu, tôi không hài lòng.",
    "Khách sạn gần biển, rất tuyệt vời! 😍",
)
EMOJI = ("😍", "👍🏽", "😡", "🏖️", "👨‍👩‍👧‍👦", "⭐⭐⭐⭐⭐", "🇻🇳")


def reviews(count: int, seed: int) -> Iterator[bytes]:
    """JSONL lines, `count` of them."""
    chance = random.Random(seed)
    texts: list[str] = []
    for number in range(count):
        row = {"review_id": f"r{seed}-{number:06d}", "hotel_id": f"h{chance.randrange(40):02d}", "stars": chance.randint(1, 5)}
        draw = chance.random()
        if draw < 0.004:
            yield b'{"review_id": "r%d-%06d", "text": "cut off in the mid' % (seed, number)
            continue
        if draw < 0.006:
            yield b"not json at all"
            continue
        if draw < 0.014:
            text: str | None = "" if draw < 0.010 else None
        elif draw < 0.017:
            text = "The corridor was long. " * 1200
        elif draw < 0.018:
            row["review_id"] = f"r{seed}-{max(0, number - 7):06d}"
            text = "The same id as another review. Good stay."
        elif draw < 0.12 and texts:
            text = chance.choice(texts)
        elif draw < 0.18:
            text = " ".join(chance.sample(VIETNAMESE, chance.randint(1, 3)))
        else:
            text = _review(chance, number)
        if text and len(text) < 1000:
            texts.append(text)
        yield json.dumps({**row, "text": text}, ensure_ascii=chance.random() < 0.5).encode()


def _review(chance: random.Random, number: int) -> str:
    pools = chance.choices((GOOD, BAD, PLAIN), weights=(5, 3, 1), k=1)[0]
    sentences = [chance.choice(OPENINGS), *chance.sample(pools, min(len(pools), chance.randint(1, 4)))]
    if chance.random() < 0.2:
        sentences.append(chance.choice(PLAIN))
    if chance.random() < 0.15:
        sentences.append(chance.choice(EMOJI))
    sentences.append(f"Room {number % 400 + 100}.")
    return " ".join(sentence for sentence in sentences if sentence)


def write_sample(path: Path, count: int = 3000, seed: int = 1) -> Path:
    """Write a sample file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line + b"\n" for line in reviews(count, seed)))
    return path
