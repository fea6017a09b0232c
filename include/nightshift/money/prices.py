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
PROFILE = re.compile(r"^(?P<region>us|us-gov|eu|apac|jp|au|ca|sa|me|global)\.(?P<model>[a-z0-9]+\..+)$")  # of Bedrock
REGIONAL_SURCHARGE = Decimal("1.1")  # of a profile that stays in its region, for the models below
SURCHARGED = re.compile(r"^(anthropic\.claude-[a-z]+-(4-[5-9]|[5-9])|amazon\.nova-2)")
BATCH_SHARE = Decimal("0.5")  # of the standard price, where a batch price of Bedrock is not published

PriceTier = Literal["batch", "standard"]
BOUGHT: dict[str, tuple[str, PriceTier]] = {
    "openai": ("openai", "batch"),
    "bedrock": ("bedrock", "batch"),
    "live": ("openai", "standard"),
}  # provider → table, tier; a model of Bedrock is found in Bedrock's


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

    def times(self, factor: Decimal) -> Price:
        """Another price, by a factor."""
        cached = None if self.cached is None else self.cached * factor
        return Price(input=self.input * factor, cached=cached, output=self.output * factor)


def models_of(vendor: str) -> list[str]:
    """Every model of a vendor that has a price."""
    return list(dict.fromkeys(model for of, model, _ in _table() if of == vendor))


def base_model(model: str) -> str:
    """A Bedrock model's own id, from that of an inference profile or an ARN of either; any other name as it is."""
    name = model.rpartition("/")[2] if model.startswith("arn:") and "application-inference-profile" not in model else model
    profile = PROFILE.match(name)
    return profile["model"] if profile else name


def price_of(vendor: str, model: str, tier: PriceTier) -> Price | None:
    """The price of a model, by its name, that of its dated snapshot or its profile; None where the table has none."""
    if vendor == "bedrock":
        return _bedrock_price(model, tier)
    return _table().get((vendor, model, tier)) or _table().get((vendor, SNAPSHOT.sub("", model), tier))


def _bedrock_price(model: str, tier: PriceTier) -> Price | None:
    base = base_model(model)
    price = _table().get(("bedrock", base, tier))
    if price is None and tier == "batch":
        standard = _table().get(("bedrock", base, "standard"))
        price = standard.times(BATCH_SHARE) if standard else None
    profile = PROFILE.match(model.rpartition("/")[2])
    is_dearer = profile is not None and profile["region"] != "global" and SURCHARGED.match(base) is not None
    return price.times(REGIONAL_SURCHARGE) if price and is_dearer else price


def price_at(provider: str, model: str) -> Price | None:
    """The price at which a provider asks a model; None where it is not known, as for a server of one's own."""
    vendor, tier = BOUGHT[provider]
    return price_of(vendor, model, tier) or (price_of("bedrock", model, tier) if provider == "live" else None)


def tier_of(provider: str) -> Tier:
    """Whether a provider is asked in batches or on demand."""
    return "batch" if BOUGHT[provider][1] == "batch" else "on_demand"


def basis(provider: str, model: str) -> str:
    """Where a price comes from, in words for a report."""
    tier = BOUGHT[provider][1]
    if price_at(provider, model) is None:
        return f"no {tier} price known for {model}: cost unknown (table of {READ_ON})"
    assumed = ", half the standard price where none is published" if provider == "bedrock" and not _has_batch_price(model) else ""
    return f"{tier} prices of {READ_ON} ({SOURCE}{assumed})"


def _has_batch_price(model: str) -> bool:
    return ("bedrock", base_model(model), "batch") in _table()


@cache
def _table() -> dict[tuple[str, str, str], Price]:
    with files("nightshift.money").joinpath("prices.csv").open(encoding="utf-8") as file:
        return {(line["provider"], line["model"], line["tier"]): _price(line) for line in csv.DictReader(file)}


def _price(line: dict[str, str]) -> Price:
    cached = Decimal(line["cached"]) if line["cached"] else None
    return Price(input=Decimal(line["input"]), cached=cached, output=Decimal(line["output"] or "0"))
