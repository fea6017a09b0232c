"""Prices: a table with a date and a source, and the rules for finding a model in it. Unknown is None, never 0."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import date, timedelta
from decimal import Decimal, InvalidOperation
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

from nightshift.errors import SettingInvalid
from nightshift.settings import read_settings
from nightshift.shapes import Tier, Usage

READ_ON = "2026-11-21"
SOURCE = "litellm 1.109.1 price map; second-hand, not checked against the vendor's page"
MILLION = Decimal(1_000_000)
SNAPSHOT = re.compile(r"-\d{4}-\d{2}-\d{2}$")
PROFILE = re.compile(r"^(?P<region>us|us-gov|eu|apac|jp|au|ca|sa|me|global)\.(?P<model>[a-z0-9]+\..+)$")  # of Bedrock
REGIONAL_SURCHARGE = Decimal("1.1")  # of a profile that stays in its region, for the models below
SURCHARGED = re.compile(r"^(anthropic\.claude-[a-z]+-(4-[5-9]|[5-9])|amazon\.nova-2)")
BATCH_SHARE = Decimal("0.5")  # of the standard price, where a batch price of Bedrock is not published
NOTICE = timedelta(days=30)  # before a model is shut down, for it to be said
COLUMNS = ("provider", "model", "tier", "above", "input", "cached", "output", "retires")
REQUIRED = {"provider", "model", "tier", "input", "output"}

PriceTier = Literal["batch", "standard"]
BOUGHT: dict[str, tuple[str, PriceTier]] = {
    "openai": ("openai", "batch"),
    "bedrock": ("bedrock", "batch"),
    "live": ("openai", "standard"),
}  # provider → table, tier; a model of Bedrock is found in Bedrock's
_Key = tuple[str, str, str]  # vendor, model, tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Dollars per million tokens."""

    input: Decimal
    cached: Decimal | None  # None: no discount is published
    output: Decimal
    above: int | None = None  # input tokens of one request; where it has more, all of it costs `long`
    long: Price | None = None
    retires: date | None = None  # when the model is shut down, as far as that is known
    origin: str = f"prices of {READ_ON} ({SOURCE})"

    def of(self, usage: Usage) -> Decimal:
        """Dollars for tokens; cached tokens are a part of the input tokens, and long requests a part of all."""
        if self.long is None:
            return self._of(usage.input_tokens, usage.cached_tokens, usage.output_tokens)
        return self.long._of(usage.long_input_tokens, usage.long_cached_tokens, usage.long_output_tokens) + self._of(
            usage.input_tokens - usage.long_input_tokens,
            usage.cached_tokens - usage.long_cached_tokens,
            usage.output_tokens - usage.long_output_tokens,
        )

    def _of(self, input_tokens: int, cached_tokens: int, output_tokens: int) -> Decimal:
        cached = self.input if self.cached is None else self.cached
        return ((input_tokens - cached_tokens) * self.input + cached_tokens * cached + output_tokens * self.output) / MILLION

    def times(self, factor: Decimal) -> Price:
        """Another price, by a factor."""
        return replace(
            self,
            input=self.input * factor,
            cached=None if self.cached is None else self.cached * factor,
            output=self.output * factor,
            long=None if self.long is None else self.long.times(factor),
        )


def models_of(vendor: str, *, embedding: bool | None = None) -> list[str]:
    """Every model of a vendor that has a price; only those that make embeddings, or only the others, where that is said."""
    found = dict.fromkeys(model for of, model, _ in _table() if of == vendor)
    return [model for model in found if embedding is None or makes_embeddings(model) is embedding]


def makes_embeddings(model: str) -> bool:
    """Whether a model answers with vectors, by its name: all that do say so."""
    return "embed" in model


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


def long_above(provider: str, model: str) -> int | None:
    """The input tokens above which one request costs more; None where it never does, as far as is known."""
    price = price_at(provider, model)
    return price.above if price else None


def tier_of(provider: str) -> Tier:
    """Whether a provider is asked in batches or on demand."""
    return "batch" if BOUGHT[provider][1] == "batch" else "on_demand"


def basis(provider: str, model: str) -> str:
    """Where a price comes from, in words for a report."""
    tier, price = BOUGHT[provider][1], price_at(provider, model)
    if price is None:
        return f"no {tier} price known for {model}: cost unknown (table of {READ_ON})"
    assumed = ", half the standard price where none is published" if provider == "bedrock" and not _has_batch_price(model) else ""
    return f"{tier} {price.origin}{assumed}"


def farewell(provider: str, model: str, today: date) -> str | None:
    """What to say of a model that has been shut down, or is about to be; None of every other one."""
    price = price_at(provider, model)
    if price is None or price.retires is None or price.retires - today > NOTICE:
        return None
    when = "was to be shut down on" if price.retires <= today else "is shut down on"
    return f"{model} {when} {price.retires.isoformat()}: move the job to another model"


def _has_batch_price(model: str) -> bool:
    return ("bedrock", base_model(model), "batch") in _table()


@cache
def _table() -> dict[_Key, Price]:
    """The table that comes with this package, with the lines of NIGHTSHIFT_PRICES in place of its own."""
    shipped = files("nightshift.money").joinpath("prices.csv").read_text(encoding="utf-8")
    own = read_settings().prices
    return {**read_prices(shipped, None), **(_own_prices(own) if own else {})}


def _own_prices(path: Path) -> dict[_Key, Price]:
    try:
        return read_prices(path.read_text(encoding="utf-8-sig"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingInvalid([f"NIGHTSHIFT_PRICES={path}: cannot be read: {error}"]) from error


def read_prices(text: str, path: Path | None) -> dict[_Key, Price]:
    """Prices from the lines of a CSV file; `path`: where it is, if it is a user's own. Raises SettingInvalid naming the line to mend."""
    lines = csv.DictReader(text.splitlines())
    if lines.fieldnames is None or not REQUIRED <= set(lines.fieldnames) <= set(COLUMNS):
        raise SettingInvalid([f"{path}:1: expected the columns {','.join(COLUMNS)}, found {','.join(lines.fieldnames or ())}"])
    found: dict[_Key, Price] = {}
    longs: list[tuple[_Key, int, Price]] = []
    for number, line in enumerate(lines, start=2):
        try:
            price, above = _price(line), line.get("above")
            key = (line["provider"], line["model"], line["tier"])
            if key[0] not in ("openai", "bedrock") or key[2] not in ("batch", "standard"):
                raise ValueError(f"{key[0]} and {key[2]}: expected openai or bedrock, and batch or standard")
            if above:
                longs.append((key, int(above), price))
            else:
                found[key] = price if path is None else replace(price, origin=f"prices of {path.name}")
        except (InvalidOperation, ValueError, TypeError, AttributeError) as error:
            raise SettingInvalid([f"{path}:{number}: not a line of prices: {error!s}"]) from error
    for key, above_tokens, price in longs:
        if key in found:
            found[key] = replace(found[key], above=above_tokens, long=price)
    return found


def _price(line: dict[str, str]) -> Price:
    amounts = [Decimal(line[name] or "0") for name in ("input", "output")]
    cached = Decimal(line["cached"]) if line.get("cached") else None
    if any(not amount.is_finite() or amount < 0 for amount in (*amounts, cached or Decimal(0))):
        raise ValueError("a price is a number of dollars per million tokens, 0 or more")
    retires = date.fromisoformat(line["retires"]) if line.get("retires") else None
    return Price(input=amounts[0], cached=cached, output=amounts[1], retires=retires)


def retirements(provider: str, models: Iterable[str], today: date) -> list[str]:
    """What is to be said of some models' ends."""
    return [said for model in models if (said := farewell(provider, model, today))]
