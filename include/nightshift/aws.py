"""boto3's own defaults: credentials and regions from `AWS_*`, a profile, or the machine's role."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import boto3

FILES = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
_making = Lock()


def default_session() -> boto3.Session:
    """The session of this environment, one for all: a session parses megabytes of JSON before its first client, a quarter of a second.

    Another one once the environment or a file of credentials has changed: static keys are read once a session.
    """
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    files = (Path(environment.get(name, default)).expanduser() for name, default in FILES.items())
    with _making:
        return _session(tuple(sorted(environment.items())), tuple(map(_changed_at, files)))


def make_client(session: boto3.Session, service: str, **arguments: Any) -> Any:
    """A client of a session, one at a time: clients may be shared between threads, the making of them may not."""
    maker: Any = session
    with _making:
        return maker.client(service, **arguments)


@lru_cache(maxsize=1)
def _session(environment: tuple[tuple[str, str], ...], files: tuple[int, ...]) -> boto3.Session:
    import boto3

    return boto3.Session()


def _changed_at(path: Path) -> int:
    """When a file was changed, in nanoseconds; 0 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
