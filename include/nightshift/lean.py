"""What a process of the command line does without. Imported before numpy is; a worker shares its process with others, and keeps it."""

from __future__ import annotations

import os

# Nothing here multiplies matrices; the threads that do wait for some at every start, busily.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
