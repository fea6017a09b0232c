"""What requests will cost before they are sent, from their bytes.

Tokens are not counted one by one: a tokenizer costs several times what encoding a row costs, and needs vocabularies
from the net. Bytes per token is measured instead: 4.4 on a mixed corpus, and half the limit is a usual short answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal

from nightshift.job import Job
from nightshift.money.prices import basis, price_at
from nightshift.shapes import Estimate, Shard, Usage, Variant

BYTES_PER_TOKEN = Decimal("4.4")  # mean of o200k over a corpus with Vietnamese, accents and emoji
ENVELOPE_BYTES = 160  # id, method, url and quotes around a request's text: sent, but not read by the model
MESSAGE_TOKENS = 4  # what a chat message costs beside its text
DEFAULT_OUTPUT_TOKENS = 256  # where the job sets no limit
REPAIR_BYTES = 160  # what is said about an answer that cannot be used
ANSWERED_SHARE = Decimal("0.3")  # of the limit that a short structured answer uses


def estimate_requests(job: Job, requests: int, request_bytes: int, *, asked_as: Variant | None = None) -> Estimate:
    """The estimate for some requests of a job; `request_bytes` counts their whole lines. `asked_as`: where they are asked again."""
    request, asked_as = job.spec.request, asked_as or Variant()
    provider, model = asked_as.provider or request.provider, asked_as.model or request.model
    limit = 0 if request.is_embedding else asked_as.max_output_tokens or job.token_limit or DEFAULT_OUTPUT_TOKENS
    repair_bytes = int(limit * ANSWERED_SHARE * BYTES_PER_TOKEN) + REPAIR_BYTES if asked_as.repair else 0
    text_bytes = max(0, request_bytes - requests * (ENVELOPE_BYTES - repair_bytes))
    input_tokens = int(text_bytes / BYTES_PER_TOKEN) + requests * MESSAGE_TOKENS
    expected = Usage(input_tokens=input_tokens, output_tokens=int(requests * limit * ANSWERED_SHARE))
    most = Usage(input_tokens=input_tokens, output_tokens=requests * limit)
    price = price_at(provider, model)
    return Estimate(
        input_tokens=input_tokens,
        output_tokens=expected.output_tokens,
        output_tokens_max=most.output_tokens,
        usd=_usd(price.of(expected)) if price else None,
        usd_max=_usd(price.of(most)) if price else None,
        basis=basis(provider, model),
    )


def estimate_variants(job: Job, variants: Mapping[Variant, int], shard: Shard) -> list[Estimate]:
    """The estimates for a shard's requests that are asked again, by how they are."""
    return [
        estimate_requests(job, count, count * shard.request_bytes // shard.request_count, asked_as=variant)
        for variant, count in variants.items()
    ]


def sum_estimates(job: Job, estimates: Sequence[Estimate]) -> Estimate:
    """Several estimates as one; a price that is unknown makes the sum unknown."""
    usd, usd_max = [each.usd for each in estimates], [each.usd_max for each in estimates]
    request = job.spec.request
    return Estimate(
        input_tokens=sum(each.input_tokens for each in estimates),
        output_tokens=sum(each.output_tokens for each in estimates),
        output_tokens_max=sum(each.output_tokens_max for each in estimates),
        usd=_sum(usd),
        usd_max=_sum(usd_max),
        basis="; ".join(dict.fromkeys(each.basis for each in estimates)) or basis(request.provider, request.model),
    )


def _sum(values: Sequence[Decimal | None]) -> Decimal | None:
    return None if None in values else sum((value for value in values if value is not None), Decimal(0))


def actual_cost(provider: str, model: str, usage: Usage) -> Decimal | None:
    """Dollars for tokens that were billed; None where the price is unknown or an answer came without usage."""
    price = price_at(provider, model)
    if price is None or usage.unknown:
        return None
    return price.of(usage)


def _usd(value: Decimal) -> Decimal:
    return value.quantize(Decimal("0.000001"))
