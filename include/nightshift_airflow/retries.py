"""Our errors into Airflow's retries: what a person must mend fails at once, what may pass is tried again."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import RetryPolicy
from airflow.sdk.definitions.retry_policy import RetryDecision

from nightshift.errors import Permanent, ShardHeld

RETRIES = 4
RETRY_DELAY = timedelta(seconds=20)  # doubles


class ByErrorClass(RetryPolicy):
    """Permanent: fail now. Held: come back when that may be over. Anything else: Airflow's own backoff."""

    def evaluate(self, exception: BaseException, try_number: int, max_tries: int, context: Any = None) -> RetryDecision:
        """See RetryPolicy; runs in the worker."""
        if isinstance(exception, Permanent):
            return RetryDecision.fail(f"{type(exception).__name__}: somebody has to mend something first")
        if isinstance(exception, ShardHeld):
            return RetryDecision.retry(timedelta(seconds=max(exception.seconds_left, 1.0)), exception.why)
        return RetryDecision.default()

    def serialize(self) -> dict[str, Any]:
        """Nothing to keep: the policy has no settings."""
        return {}

    @classmethod
    def deserialize(cls, data: dict[str, Any]) -> ByErrorClass:
        """See serialize."""
        return cls()
