"""What follows a create call whose answer did not come: a look at the provider's list, more than once."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from nightshift.errors import NightshiftError, SubmissionInDoubt
from nightshift.providers.protocol import Provider
from nightshift.shapes import Receipt

CLOCK_SKEW = timedelta(hours=1)  # between the ledger's clock and the provider's, when looking for a batch
LIST_LAG_SECONDS = (0.0, 2.0, 5.0)  # between looks at the list: read-after-write is not promised


def look_after_doubt(provider: Provider, token: str, started: datetime, cause: Exception, sleep: Callable[[float], None]) -> Receipt:
    """The batch that the call has made after all. Raises SubmissionInDoubt where it is not listed, which never means "not there"."""
    for pause in LIST_LAG_SECONDS:
        sleep(pause)
        try:
            receipt = provider.find([token], started)
        except NightshiftError:  # a look-up that fails, for whatever reason, never means "not there"
            continue
        if receipt is not None:
            return receipt
    raise SubmissionInDoubt(token) from cause
