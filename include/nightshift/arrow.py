"""What Python and pyarrow do on the way, and need not."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa


class _Refusing:
    """An importer that has no pandas, and says so before any other is asked."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        """See importlib.abc.MetaPathFinder."""
        if name == "pandas":
            raise ModuleNotFoundError("not now", name=name)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Let the garbage collector rest while many objects come and none of them is part of a cycle: it would look at all, again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def keep_pandas_out() -> None:
    """Let pyarrow find out that there is no pandas, so that it does not import it with the first list that becomes a column.

    That costs 1.4 CPU-seconds and 70 MB in every process that can import pandas, for lists that pandas has nothing to do with.
    Who asks pyarrow for pandas' own things (`Table.to_pandas`) gets them as ever: it then looks again. A process that has pandas
    already is left as it is.
    """
    if "pandas" not in sys.modules:
        sys.meta_path.insert(0, _Refusing)
        try:
            pa.array([])
        finally:
            sys.meta_path.remove(_Refusing)
