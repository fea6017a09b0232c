"""Pages that promise something are held to the tests and to the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (F\d+) \| (.+?) \| (.+?) \| (.*?) ?\| (.+?) \|$", re.MULTILINE)
TESTED = re.compile(r"def (test_\w+)|id=\"([^\"]+)\"")


def entries() -> list[tuple[str, ...]]:
    return ROW.findall((ROOT / "docs" / "failures.md").read_text())


def numbers_in_names() -> set[str]:
    """Every catalogue number in the name of a test or of one of its cases."""
    names = (name for path in (ROOT / "tests").rglob("test_*.py") for found in TESTED.findall(path.read_text()) for name in found)
    return {number for name in names for number in re.findall(r"(?<![A-Za-z0-9])F\d+(?!\d)", name.replace("_", " "))}


def test_every_entry_of_the_catalogue_is_listed_once_and_in_order():
    assert [number for number, *_ in entries()] == [f"F{i:02d}" for i in range(1, 111)]


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry[0])
def test_an_entry_has_a_test_or_says_why_it_does_not_apply(entry):
    number, _, happens, cost, retry = entry
    if retry == "—":
        assert "does not apply" in happens
    else:
        assert number in numbers_in_names(), f"{number} is said to be handled, but no test has it in its name"
        assert cost
