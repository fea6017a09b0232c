"""What a process of the command line does without. Imported first of all; a worker shares its process with others, and keeps it."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from typing import NoReturn

# Nothing here multiplies matrices; the threads that do wait for some at every start, busily.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Imports make objects by the hundred thousand, and most stay: looking at them at every 700, as Python does, is a seventh of a start.
gc.set_threshold(100_000, 50, 50)

_codes: list[int] = []


def end_process(code: int) -> NoReturn:
    """End this process with an exit code and with everything that Python does at an end, but for taking its own modules apart.

    That is a tenth of a second, and with Great Expectations a whole one, for what nobody looks at any more.
    """
    _codes.append(code)
    sys.exit(code)


@atexit.register  # early, to be called late: threads are joined by then, and whatever else asked to be called has been
def _end() -> None:
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream:  # which a process may be started without
                stream.flush()
    except (OSError, ValueError):  # of a reader that has gone, a disk that is full: Python tells of it in its own words and exit code
        return
    if _codes:
        os._exit(_codes[-1])
