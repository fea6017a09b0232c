"""What every contender of the benchmark asks, read by the standard library alone: some of them run where nothing of ours is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("job")
COLUMNS = ["review_id", "country", "stars", "text"]  # that are read: the id, and what the template prints
FILE_REQUESTS = 50_000
MODEL = "gpt-5.4-nano"
PARAMETERS = {"temperature": 0, "max_completion_tokens": 300}


def job_parts() -> tuple[str, str, dict[str, Any]]:
    """The system prompt, the user's template and the schema of the benchmark's job."""
    system, user = (FOLDER / "reviews.md").read_text(encoding="utf-8").removeprefix("system:\n").split("\nuser:\n")
    return system, user.rstrip("\n"), json.loads((FOLDER / "reviews.json").read_text(encoding="utf-8"))
