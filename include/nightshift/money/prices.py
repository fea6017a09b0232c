"""Prices: a table with a date and a source, and the rules for finding a model in it. Unknown is None, never 0."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from importlib.resources import files
from typing import Literal

from nightshift.shapes import Tier, Usage

READ_ON = "2026-11-21"
SOURCE = "litellm 1.109.1 price map; second-hand, not checked against the vendor's page"
MILLION = Decimal(1_000_000)
SNAPSHOT = re.compile(r"-\d{4}-\d{2}-\d{2}$")

PriceTier = Literal["batch", "standard"]
BOUGHT: dict[str, tuple[str, PriceTier]] = {"openai": ("openai", "batch"), "live": ("openai", "standard")}  # provider → table, tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Dollars per million tokens."""

    input: Decimal
    cached: Decimal | None  # None: no discount is published
    output: Decimal

    def of(self, usage: Usage) -> Decimal:
        """Dollars for tokens; cached tokens are a part of the input tokens."""
        cached = self.input if self.cached is None else self.cached
        fresh = usage.input_tokens - usage.cached_tokens
        return (fresh * self.input + usage.cached_tokens * cached + usage.output_tokens * self.output) / MILLION


def price_of(vendor: str, model: str, tier: PriceTier) -> Price | None:
    """The price of a model, by its name or by that of its dated snapshot; None where the table has none."""
    table = _table()
    return table.get((vendor, model, tier)) or table.get((vendor, SNAPSHOT.sub("", model), tier))


def price_at(provider: str, model: str) -> Price | None:
    """The price at which a provider asks a model; None where it is not known, as for a server of one's own."""
    vendor, tier = BOUGHT[provider]
    return price_of(vendor, model, tier)


def tier_of(provider: str) -> Tier:
    """Whether a provider is asked in batches or on demand."""
    return "batch" if BOUGHT[provider][1] == "batch" else "on_demand"


def basis(provider: str, model: str) -> str:
    """Where a price comes from, in words for a report."""
    tier = BOUGHT[provider][1]
    if price_at(provider, model) is None:
        return f"no {tier} price known for {model}: cost unknown (table of {READ_ON})"
    return f"{tier} prices of {READ_ON} ({SOURCE})"


@cache
def _table() -> dict[tuple[str, str, str], Price]:
    with files("nightshift.money").joinpath("prices.csv").open(encoding="utf-8") as file:
        return {(line["provider"], line["model"], line["tier"]): _price(line) for line in csv.DictReader(file)}


def _price(line: dict[str, str]) -> Price:
    cached = Decimal(line["cached"]) if line["cached"] else None
    return Price(input=Decimal(line["input"]), cached=cached, output=Decimal(line["output"] or "0"))
