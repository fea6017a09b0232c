"""Measurements: what the product costs in time and in memory, and what it survives."""

from __future__ import annotations

import atexit
import os
from contextlib import suppress
from pathlib import Path

with suppress(ModuleNotFoundError):  # a peer has an environment of its own
    import nightshift.process  # noqa: F401  first of all: see there

PEAK = "NIGHTSHIFT_BENCH_PEAK"  # names a file that a process of the benchmark leaves its peak of memory in


def peak(pid: int | str = "self") -> float:
    """The most memory that a process has had, in MB. What `wait4` says begins with the peak of the parent."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


if path := os.environ.pop(PEAK, None):
    atexit.register(lambda: Path(path).write_text(f"{peak():.1f}"))
