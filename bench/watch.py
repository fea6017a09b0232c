"""What Airflow's processes take while something runs in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import psutil


class Watch:
    """CPU seconds and memory of Airflow's processes, by what they are."""

    parts = ("scheduler", "triggerer", "api_server")

    def __init__(self, root: int) -> None:
        self._root = psutil.Process(root)

    def cpu(self) -> Counter[str]:
        """CPU seconds so far."""
        seen = Counter[str]()
        for part, process in self._each():
            times = process.cpu_times()
            seen[part] += times.user + times.system
        return seen

    def memory(self) -> Counter[str]:
        """MB resident, of the largest process of each part."""
        seen = Counter[str]()
        for part, process in self._each():
            seen[part] = max(seen[part], process.memory_info().rss // 1_000_000)
        return seen

    def _each(self) -> Iterator[tuple[str, psutil.Process]]:
        for process in self._root.children(recursive=True):
            try:
                line = " ".join(process.cmdline())
            except psutil.Error:
                continue
            for part in self.parts:
                if part in line:
                    yield part, process
                    break
