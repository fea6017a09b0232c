"""Long texts that wait on local disk for the line that they go into: of a shard whose answers all fail they are more than memory holds."""

from __future__ import annotations

from pathlib import Path

SHORT = 256  # characters of a text that may as well stay in memory


class Waiting(str):
    """Where a text is, in place of it: its start and its size."""

    __slots__ = ()


class Texts:
    """Texts in a file of their own, gone with its folder."""

    def __init__(self, folder: Path) -> None:
        path = folder / "texts"
        self._written, self._end = path.open("wb", buffering=1 << 20), 0
        self._read = path.open("rb", buffering=0)

    def put(self, text: str | None) -> str | None:
        """A text that is to wait, or where it is."""
        if text is None or len(text) <= SHORT or isinstance(text, Waiting):
            return text
        data = text.encode("utf-8", "surrogatepass")
        self._written.write(data)
        self._end += len(data)
        return Waiting(f"{self._end - len(data)} {len(data)}")

    def get(self, text: str | None) -> str | None:
        """The text itself."""
        if not isinstance(text, Waiting):
            return text
        start, size = map(int, text.split())
        self._written.flush()
        self._read.seek(start)
        return self._read.read(size).decode("utf-8", "surrogatepass")

    def close(self) -> None:
        """Let go of the file."""
        self._written.close()
        self._read.close()
