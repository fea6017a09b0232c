"""DuckDB as a tool of one step: on local disk, one thread, bounded memory, gone afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import duckdb

MEMORY_LIMIT = "200MB"  # a worker stays under 512 MB with Python and Arrow beside it; what does not fit spills


@contextmanager
def open_database(folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database in a scratch folder. One thread: results keep their order, and so their bytes."""
    import duckdb

    connection = duckdb.connect(
        str(folder / "step.duckdb"),
        config={"threads": 1, "memory_limit": MEMORY_LIMIT, "temp_directory": str(folder / "spill")},
    )
    try:
        yield connection
    finally:
        connection.close()
