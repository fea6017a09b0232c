"""boto3's own defaults: credentials and regions from `AWS_*`, a profile, or the machine's role."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import boto3


def default_session() -> boto3.Session:
    """The session of this environment, one for all: a session parses megabytes of JSON before its first client, a quarter of a second."""
    return _session(tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))))


@cache
def _session(environment: tuple[tuple[str, str], ...]) -> boto3.Session:
    import boto3

    return boto3.Session()
