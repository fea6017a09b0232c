"""What requests will cost before they are sent, from their bytes.

Tokens are not counted one by one: a tokenizer costs several times what encoding a row costs, and needs vocabularies
from the net. Bytes per token is measured instead: 4.4 on a mixed corpus, and half the limit is a usual short answer.
"""

from __future__ import annotations

from decimal import Decimal

from nightshift.job import Job
from nightshift.money.prices import basis, price_of
from nightshift.shapes import Estimate, Usage

BYTES_PER_TOKEN = Decimal("4.4")  # mean of o200k over a corpus with Vietnamese, accents and emoji
ENVELOPE_BYTES = 160  # id, method, url and quotes around a request's text: sent, but not read by the model
MESSAGE_TOKENS = 4  # what a chat message costs beside its text
DEFAULT_OUTPUT_TOKENS = 256  # where the job sets no limit
ANSWERED_SHARE = Decimal("0.3")  # of the limit that a short structured answer uses


def estimate_requests(job: Job, requests: int, request_bytes: int, *, model: str | None = None) -> Estimate:
    """The estimate for some requests of a job; `request_bytes` counts their whole lines. `model`: one asked in place of the job's."""
    request = job.spec.request
    model = model or request.model
    limit = int(request.parameters.get("max_output_tokens", DEFAULT_OUTPUT_TOKENS))
    text_bytes = max(0, request_bytes - requests * ENVELOPE_BYTES)
    input_tokens = int(text_bytes / BYTES_PER_TOKEN) + requests * MESSAGE_TOKENS
    expected = Usage(input_tokens=input_tokens, output_tokens=int(requests * limit * ANSWERED_SHARE))
    most = Usage(input_tokens=input_tokens, output_tokens=requests * limit)
    price = price_of(request.provider, model, "batch")
    return Estimate(
        input_tokens=input_tokens,
        output_tokens=expected.output_tokens,
        output_tokens_max=most.output_tokens,
        usd=_usd(price.of(expected)) if price else None,
        usd_max=_usd(price.of(most)) if price else None,
        basis=basis(request.provider, model, "batch"),
    )


def actual_cost(provider: str, model: str, usage: Usage) -> Decimal | None:
    """Dollars for tokens that were billed; None where the price is unknown or an answer came without usage."""
    price = price_of(provider, model, "batch")
    if price is None or usage.unknown:
        return None
    return price.of(usage)


def _usd(value: Decimal) -> Decimal:
    return value.quantize(Decimal("0.000001"))
