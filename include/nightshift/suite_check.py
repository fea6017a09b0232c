"""Whether Great Expectations can apply a suite at all: asked before anything is paid for.

It takes seconds and 290 MB to import, so that another process is asked, and of each suite once in a store.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import orjson

from nightshift.errors import JobInvalid, nearest
from nightshift.job import Expectation, Job
from nightshift.runs import run_id
from nightshift.stores.objects import Objects
from nightshift.suite import Build, builder, registered

LIBRARY = "great_expectations"


def check_suite(store: Objects, job: Job) -> None:
    """Raise JobInvalid where a job's suite has lines that can never be applied."""
    if not job.expectations:
        return
    lines = orjson.dumps([each.model_dump(mode="json") for each in job.expectations])
    known = f"suites/{run_id(version(LIBRARY), lines.decode())}"
    if store.head(known) is not None:
        return
    if problems := unusable(job.expectations) if LIBRARY in sys.modules else _asked_apart(lines):
        raise JobInvalid([f"{job.spec.output.expectations}: {why}" for why in problems])
    store.create(known, lines)


def unusable(expectations: Sequence[Expectation]) -> list[str]:
    """What is wrong with the lines of a suite that can never be applied. Imports Great Expectations: seconds."""
    if not expectations:
        return []
    build, known = builder(), registered()
    faults = ((number, each, _fault_of(build, known, each)) for number, each in enumerate(expectations, start=1))
    return [f"expectation {number}: {each.type}: {why}" for number, each, why in faults if why]


def _asked_apart(lines: bytes) -> list[str]:
    """The same of another process, which finds modules where this one does."""
    told = subprocess.run(
        [sys.executable, "-P", "-m", __name__],  # -P: not where this happens to run
        input=lines,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if told.returncode:
        raise ChildProcessError(f"The suite could not be looked at: {told.stderr.decode(errors='replace').strip()[-300:]}")
    problems: list[str] = orjson.loads(told.stdout.splitlines()[-1])
    return problems


def _fault_of(build: Build, known: Mapping[str, Collection[str]], expectation: Expectation) -> str | None:
    several = expectation.kwargs.get("regex_list")
    for pattern in (expectation.kwargs.get("regex"), *(several if isinstance(several, list) else ())):
        try:
            re.compile(pattern or "")
        except (re.error, TypeError) as error:
            return f"{pattern!r} is no regular expression: {error}"
    if expectation.type not in known:
        return f"there is no such expectation{nearest(expectation.type, known)}"
    try:
        build(expectation, 0)
    except Exception as error:  # noqa: BLE001 — of whichever pydantic it is built with
        return "; ".join(_told_by(error, known[expectation.type])) or str(error).splitlines()[0]
    least, most = (expectation.kwargs.get(name) for name in ("min_value", "max_value"))
    if isinstance(least, int | float) and isinstance(most, int | float) and least > most:
        return f"min_value {least} is above max_value {most}: no value is between"
    return None


def _told_by(error: Exception, arguments: Collection[str]) -> Iterator[str]:
    told: list[Mapping[str, Any]] = getattr(error, "errors", list)()
    for one in told:
        name = str(one["loc"][-1])
        if one["type"] == "value_error.extra":
            yield f"{name}: unknown argument{nearest(name, arguments)}"
        else:
            yield one["msg"] if name == "__root__" else f"{name}: {one['msg']}"


if __name__ == "__main__":
    sys.stdout.buffer.write(orjson.dumps(unusable([Expectation(**line) for line in orjson.loads(sys.stdin.buffer.read())])))
