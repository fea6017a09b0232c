"""The price table and its rules: contracts/prices.md, line by line."""

from __future__ import annotations

from datetime import date
from decimal import Decimal

import pytest

from nightshift.errors import SettingInvalid
from nightshift.money import prices
from nightshift.money.prices import basis, farewell, price_at, price_of, read_prices
from nightshift.shapes import Usage

MILLION = Usage(input_tokens=1_000_000, output_tokens=1_000_000)
TODAY = date(2026, 11, 22)


@pytest.fixture
def own_prices(tmp_path, monkeypatch):
    def use(text: str):
        path = tmp_path / "ours.csv"
        path.write_text(text)
        monkeypatch.setenv("NIGHTSHIFT_PRICES", str(path))
        prices._table.cache_clear()

    yield use
    monkeypatch.undo()
    prices._table.cache_clear()


@pytest.mark.parametrize(
    ("provider", "model", "usd"),
    [
        pytest.param("openai", "gpt-5.4-nano", "0.725", id="a batch"),
        pytest.param("live", "gpt-5.4-nano", "1.45", id="on demand"),
        pytest.param("openai", "gpt-5.4-nano-2026-03-05", "0.725", id="a dated snapshot"),
        pytest.param("bedrock", "amazon.nova-lite-v1:0", "0.15", id="bedrock"),
        pytest.param("bedrock", "us.anthropic.claude-haiku-4-5-20251001-v1:0", "3.30", id="a regional profile costs a tenth more"),
        pytest.param("bedrock", "global.anthropic.claude-haiku-4-5-20251001-v1:0", "3.00", id="a global one does not"),
        pytest.param("bedrock", "anthropic.claude-sonnet-5", "6.00", id="half, where no batch price is published"),
    ],
)
def test_a_million_tokens_each_way_cost_what_the_table_says(provider, model, usd):
    assert price_at(provider, model).of(MILLION) == Decimal(usd)


def test_an_unknown_model_has_no_price_and_says_so():
    assert price_at("openai", "gpt-of-tomorrow") is None
    assert "cost unknown" in basis("openai", "gpt-of-tomorrow")


@pytest.mark.parametrize(
    ("usage", "usd"),
    [
        pytest.param(Usage(input_tokens=1_000_000, cached_tokens=400_000), "0.802", id="cached tokens are a part of the input"),
        pytest.param(
            Usage(input_tokens=1_000_000, long_input_tokens=1_000_000), "2.50", id="a long request costs the long price, all of it"
        ),
        pytest.param(Usage(input_tokens=1_000_000, long_input_tokens=500_000), "1.875", id="beside short ones"),
        pytest.param(
            Usage(input_tokens=1_000_000, cached_tokens=600_000, long_input_tokens=600_000, long_cached_tokens=600_000),
            "0.65",
            id="and cached",
        ),
    ],
)
def test_cached_and_long_tokens_cost_their_own(usage, usd):
    assert price_at("openai", "gpt-5.4").of(usage) == Decimal(usd)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        pytest.param("gpt-5-mini", "gpt-5-mini is shut down on 2026-12-11", id="within a month"),
        pytest.param("o4-mini", "o4-mini was to be shut down on 2026-10-23", id="past it"),
        pytest.param("gpt-5.1", None, id="months away"),
        pytest.param("gpt-5.4", None, id="not known to end"),
    ],
)
def test_models_that_end_are_named_in_time(model, said):
    found = farewell("openai", model, TODAY)
    assert (found is None) if said is None else (found or "").startswith(said)


def test_a_users_own_prices_count_and_are_named_as_the_source(own_prices):
    own_prices("provider,model,tier,input,output\nopenai,qwen-at-home,standard,0.5,0.5\nopenai,gpt-5.4-nano,batch,0.09,0.5\n")
    assert price_at("live", "qwen-at-home").of(MILLION) == Decimal("1.0")
    assert price_at("openai", "gpt-5.4-nano").of(MILLION) == Decimal("0.59")
    assert basis("openai", "gpt-5.4-nano") == "batch prices of ours.csv"
    assert price_of("openai", "gpt-5.4", "batch").input == Decimal("1.25"), "what the file does not name stays as it was"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        pytest.param("model,price\n", "ours.csv:1: expected the columns", id="columns"),
        pytest.param("provider,model,tier,input,output\nopenai,a,batch,x,1\n", "ours.csv:2", id="no number"),
        pytest.param(
            "provider,model,tier,input,output\nopenai,a,batch,-1,1\n", "ours.csv:2: not a line of prices: a price is", id="below nothing"
        ),
        pytest.param(
            "provider,model,tier,input,output\nopenai,a,cheap,1,1\n", "expected openai or bedrock, and batch or standard", id="tier"
        ),
        pytest.param("provider,model,tier,input,output\nopenai\n", "ours.csv:2", id="short line"),
    ],
)
def test_prices_that_cannot_be_used_say_which_line_to_mend(own_prices, text, what):
    own_prices(text)
    with pytest.raises(SettingInvalid, match=what):
        price_at("openai", "a")


def test_a_price_file_that_is_not_there_is_named(monkeypatch, own_prices):
    own_prices("")
    monkeypatch.setenv("NIGHTSHIFT_PRICES", "/nowhere/prices.csv")
    with pytest.raises(SettingInvalid, match="cannot be read"):
        price_at("openai", "a")


def test_the_table_holds_a_long_price_only_beside_an_ordinary_one():
    table = read_prices("provider,model,tier,above,input,output\nopenai,a,batch,1000,2,2\n", None)
    assert table == {}
