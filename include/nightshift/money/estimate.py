"""What requests will cost before they are sent, from their bytes, and from what this job's requests have cost before.

Tokens are not counted one by one: a tokenizer costs several times what encoding a row costs, and needs vocabularies
from the net. Bytes per token is measured instead: 4.4 on a mixed corpus. An answer is taken to be as long as its schema
says, until answers of the job have been paid for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, TypeVar

import orjson

from nightshift.job import Job
from nightshift.money.prices import basis, price_at
from nightshift.shapes import Estimate, Measured, Shard, Usage, Variant
from nightshift.stores.objects import Objects

BYTES_PER_TOKEN = Decimal("4.4")  # mean of o200k over a corpus with Vietnamese, accents and emoji
ENVELOPE_BYTES = 160  # id, method, url and quotes around a request's text: sent, but not read by the model
MESSAGE_TOKENS = 4  # what a chat message costs beside its text
UNLIMITED_TOKENS = Decimal(80)  # of an answer in free words, where the job sets no limit
REPAIR_BYTES = 160  # what is said about an answer that cannot be used
ANSWERED_SHARE = Decimal("0.3")  # of the limit that an answer in free words uses
STRING_BYTES = 40  # of a string in an answer, a short sentence; half of maxLength where that is less
LIST_ITEMS = 2  # in a list of an answer, where the schema allows for so many
UNMEASURED, MEASURED = Decimal("0.25"), Decimal("0.10")  # of the estimate, to either side: held by tests
ENOUGH_ANSWERS = 100  # to measure on
NOTHING = Decimal(0)

Amount = TypeVar("Amount", int, Decimal)


def estimate_requests(
    job: Job, requests: int, request_bytes: int, *, asked_as: Variant | None = None, measured: Measured | None = None, once: bool = False
) -> Estimate:
    """The estimate for some requests of a job; `request_bytes` counts their whole lines. `asked_as`: where they are asked again.

    `measured`: what this job's requests have cost before; it counts where they asked the same model. `once`: without what is asked again.
    """
    request, asked_as = job.spec.request, asked_as or Variant()
    provider, model = asked_as.provider or request.provider, asked_as.model or request.model
    known = measured if measured is not None and measured.model == model else None
    limit = 0 if request.is_embedding else asked_as.max_output_tokens or job.token_limit  # None: the model's own, which may be very long
    answer_tokens = known.output_per_answer if known else expected_answer_tokens(job, limit)
    answer_tokens = answer_tokens if limit is None else min(Decimal(limit), answer_tokens)
    repair_bytes = int(answer_tokens * BYTES_PER_TOKEN) + REPAIR_BYTES if asked_as.repair else 0
    text_bytes = max(0, request_bytes - requests * (ENVELOPE_BYTES - repair_bytes))
    tokens = int(text_bytes / BYTES_PER_TOKEN) + requests * MESSAGE_TOKENS
    times = known.per_request if known and not once else Decimal(1)
    input_tokens = int(tokens * times * known.input_factor) if known else tokens
    cached_tokens = int(input_tokens * known.cached_share) if known else 0
    price = price_at(provider, model)
    above = price.above if price else None
    expected = _usage(requests, input_tokens, cached_tokens, int(requests * times * answer_tokens), above)
    most = None if limit is None else _usage(requests, input_tokens, 0, int(requests * times * limit), above)
    usd, spread = price.of(expected) if price else None, MEASURED if known and known.answers >= ENOUGH_ANSWERS else UNMEASURED
    return Estimate(
        input_tokens=input_tokens,
        output_tokens=expected.output_tokens,
        output_tokens_max=most.output_tokens if most else None,
        usd=_usd(usd),
        usd_low=_usd(None if usd is None else usd * (1 - spread)),
        usd_high=_usd(None if usd is None else usd * (1 + spread)),
        usd_max=_usd(price.of(most) if price and most else None),
        measured_on=known.answers if known else 0,
        basis=basis(provider, model),
    )


def _usage(requests: int, input_tokens: int, cached_tokens: int, output_tokens: int, above: int | None) -> Usage:
    """Tokens of requests that are all of the same size."""
    is_long = above is not None and input_tokens > above * requests
    return Usage(
        input_tokens=input_tokens,
        cached_tokens=cached_tokens,
        output_tokens=output_tokens,
        long_input_tokens=input_tokens if is_long else 0,
        long_cached_tokens=cached_tokens if is_long else 0,
        long_output_tokens=output_tokens if is_long else 0,
    )


def expected_answer_tokens(job: Job, limit: int | None) -> Decimal:
    """How long an answer is, as far as the schema tells; in free words, a part of the limit."""
    if job.answer_shape is None:
        return UNLIMITED_TOKENS if limit is None else limit * ANSWERED_SHARE
    return answer_bytes(job.answer_shape) / BYTES_PER_TOKEN


def answer_bytes(schema: Any) -> Decimal:
    """How many bytes a value under a JSON Schema usually has."""
    if not isinstance(schema, Mapping):
        return Decimal(STRING_BYTES)
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if choices:
        return Decimal(sum(len(orjson.dumps(each)) for each in choices)) / len(choices)
    variants = [each for each in schema.get("anyOf") or schema.get("oneOf") or () if each != {"type": "null"}]
    if variants:
        return sum(map(answer_bytes, variants), Decimal(0)) / len(variants)
    kind = schema.get("type")
    match next((each for each in kind if each != "null"), "null") if isinstance(kind, list) else kind:
        case "object":
            fields = schema.get("properties", {}).items()
            return sum((len(orjson.dumps(name)) + 2 + answer_bytes(inner) for name, inner in fields), Decimal(1))
        case "array":
            items = min(max(LIST_ITEMS, int(schema.get("minItems", 0))), int(schema.get("maxItems", LIST_ITEMS)))
            return 2 + items * (1 + answer_bytes(schema.get("items")))
        case "number" | "boolean":
            return Decimal(5)
        case "integer" | "null":
            return Decimal(2)
    return Decimal(2 + min(STRING_BYTES, int(schema.get("maxLength", 2 * STRING_BYTES)) // 2))


def estimate_variants(job: Job, variants: Mapping[Variant, int], shard: Shard, measured: Measured | None) -> list[Estimate]:
    """The estimates for a shard's requests that are asked again, by how they are."""
    return [
        estimate_requests(job, count, count * shard.request_bytes // shard.request_count, asked_as=variant, measured=measured)
        for variant, count in variants.items()
    ]


def sum_estimates(job: Job, estimates: Sequence[Estimate]) -> Estimate:
    """Several estimates as one; a price that is unknown makes the sum unknown."""
    request = job.spec.request
    return Estimate(
        input_tokens=sum(each.input_tokens for each in estimates),
        output_tokens=sum(each.output_tokens for each in estimates),
        output_tokens_max=_sum([each.output_tokens_max for each in estimates], 0),
        usd=_sum([each.usd for each in estimates], NOTHING),
        usd_low=_sum([each.usd_low for each in estimates], NOTHING),
        usd_high=_sum([each.usd_high for each in estimates], NOTHING),
        usd_max=_sum([each.usd_max for each in estimates], NOTHING),
        measured_on=min((each.measured_on for each in estimates), default=0),
        basis="; ".join(dict.fromkeys(each.basis for each in estimates)) or basis(request.provider, request.model),
    )


def _sum(values: Sequence[Amount | None], nothing: Amount) -> Amount | None:
    known = [value for value in values if value is not None]
    return sum(known, nothing) if len(known) == len(values) else None


def measured_before(store: Objects, job: Job) -> Measured | None:
    """What requests of a job have cost, by its last run that tells; None before there was one."""
    return store.get_shape(measured_key(job), Measured)


def measured_key(job: Job) -> str:
    """Where it stands."""
    return f"runs/{job.name}/measured.json"


def is_worth_keeping(new: Measured, old: Measured | None, *, sample: bool) -> bool:
    """Whether a measure takes the place of the last one: the newest does, unless it tells less of the job's next run.

    A handful of answers tells less than many did, and a sample of another model or prompt tells of what is only being tried.
    """
    if old is None:
        return True
    if (new.model, new.prompt_version) != (old.model, old.prompt_version):
        return not sample
    return new.answers >= min(old.answers, ENOUGH_ANSWERS)


def measure(job: Job, requests: int, request_bytes: int, answers: int, usage: Usage) -> Measured | None:
    """What requests have cost, as a measure for the next; None where that is not known of all of them."""
    expected = estimate_requests(job, requests, request_bytes)
    if not answers or not requests or usage.unknown or not usage.input_tokens or not expected.input_tokens:
        return None
    return Measured(
        model=job.spec.request.model,
        prompt_version=job.prompt.version,
        answers=answers,
        per_request=_ratio(answers, requests),
        input_factor=_ratio(usage.input_tokens * requests, expected.input_tokens * answers),
        cached_share=_ratio(usage.cached_tokens, usage.input_tokens),
        output_per_answer=_ratio(usage.output_tokens, answers),
    )


def _ratio(part: int, whole: int) -> Decimal:
    return (Decimal(part) / whole).quantize(Decimal("0.000001"))


def actual_cost(provider: str, model: str, usage: Usage) -> Decimal | None:
    """Dollars for tokens that were billed; None where the price is unknown or an answer came without usage."""
    price = price_at(provider, model)
    if price is None or usage.unknown:
        return None
    return price.of(usage)


def _usd(value: Decimal | None) -> Decimal | None:
    return None if value is None else value.quantize(Decimal("0.000001"))
