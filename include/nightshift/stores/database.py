"""DuckDB as a tool of one step: on local disk, one thread, bounded memory, gone afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nightshift.arrow import keep_pandas_out

if TYPE_CHECKING:
    import duckdb

MEMORY_LIMIT = "200MB"  # a worker stays under 512 MB with Python and Arrow beside it; what does not fit spills


@contextmanager
def open_database(folder: Path, memory: str = MEMORY_LIMIT) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database in a scratch folder. One thread: results keep their order, and so their bytes."""
    import duckdb

    keep_pandas_out()
    connection = duckdb.connect(
        config={"threads": 1, "memory_limit": memory, "temp_directory": str(folder / "spill")},
    )
    try:
        yield connection
    finally:
        connection.close()


def literals(values: Iterable[object]) -> str:
    """Texts, or paths, as they stand in SQL, with commas between them."""
    return ", ".join("'" + str(value).replace("'", "''") + "'" for value in values)


def quoted(name: str) -> str:
    """A column's name as it stands in SQL."""
    return '"' + name.replace('"', '""') + '"'
