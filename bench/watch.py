"""What Airflow's processes take while something runs in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import psutil


class Watch:
    """CPU seconds and memory of Airflow's processes, by what they are."""

    parts = ("scheduler", "triggerer", "api_server")

    def __init__(self, root: int) -> None:
        self._root = psutil.Process(root)

    def cpu(self) -> Counter[str]:
        """CPU seconds so far."""
        seen = Counter[str]()
        for part, times in self._each(psutil.Process.cpu_times):
            seen[part] += times.user + times.system
        return seen

    def memory(self) -> Counter[str]:
        """MB resident, of the largest process of each part."""
        seen = Counter[str]()
        for part, found in self._each(psutil.Process.memory_info):
            seen[part] = max(seen[part], found.rss // 1_000_000)
        return seen

    def _each(self, read: Callable[[psutil.Process], Any]) -> Iterator[tuple[str, Any]]:
        """What is read of each process, but of those that end meanwhile."""
        for process in self._root.children(recursive=True):
            try:
                line, found = " ".join(process.cmdline()), read(process)
            except psutil.Error:
                continue
            for part in self.parts:
                if part in line:
                    yield part, found
                    break
