"""How many requests a live server gets at once: more as long as it keeps up, half when it says no. Pure, so that it can be tested."""

from __future__ import annotations

from dataclasses import dataclass, replace

START = 8.0
FADING = 1.01  # per answer, so that one that was quick by chance is forgotten
SLOWER = 2.0  # times the best latency seen: from there on more at once only waits in the server's queue


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """An additive-increase, multiplicative-decrease window, as in TCP congestion control (RFC 5681)."""

    most: int
    size: float = START
    best_seconds: float | None = None  # the lowest latency seen
    held_until: float = 0.0  # monotonic: one overload is answered once, not once per request that was in flight

    @property
    def slots(self) -> int:
        """Requests that may be in flight."""
        return max(1, min(self.most, int(self.size)))

    def answered(self, seconds: float) -> Window:
        """A request came back after some seconds."""
        best = seconds if self.best_seconds is None else min(self.best_seconds * FADING, seconds)
        grown = self.size + 1.0 / self.size if seconds <= best * SLOWER else self.size
        return replace(self, size=min(float(self.most), grown), best_seconds=best)

    def refused(self, now: float, seconds: float) -> Window:
        """The server was overloaded, or did not answer within the timeout; `seconds`: how long it asked to be left alone."""
        if now < self.held_until:
            return self
        return replace(self, size=max(1.0, self.size / 2), held_until=now + seconds)
