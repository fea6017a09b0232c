"""What is kept from happening on the way."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

WITHOUT = "import sys; from nightshift.arrow import keep_pandas_out; keep_pandas_out(); import pyarrow as pa; "
SAYS_WHETHER_IT_IS_THERE = "print('pandas' in sys.modules)"


@pytest.mark.parametrize(
    ("does", "is_there"),
    [
        ("pa.array(['a', None]); pa.table({'a': pa.array([1])})", "False"),
        ("pa.table({'a': pa.array([1])}).to_pandas()", "True"),
        ("import pandas; assert pa.array(pandas.Series([1, 2])).to_pylist() == [1, 2]", "True"),
    ],
)
def test_pandas_comes_where_it_is_asked_for_and_nowhere_else(does, is_there):
    done = subprocess.run(
        [sys.executable, "-c", f"{WITHOUT}{does}; {SAYS_WHETHER_IT_IS_THERE}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == is_there


def test_a_process_that_has_pandas_keeps_it():
    code = "import sys, pandas; from nightshift.arrow import keep_pandas_out; keep_pandas_out(); import pyarrow as pa; "
    check = "assert pa.array(pandas.Series([1])).to_pylist() == [1]; assert sys.modules['pandas'] is pandas"
    subprocess.run([sys.executable, "-c", code + check], check=True)


FAULTS = """
import resource
from nightshift.arrow import keep_freed_memory
if {keeps}: keep_freed_memory()
for _ in range(100):
    batch = [bytearray(b"x" * (1 << 20)) for _ in range(8)]
    del batch
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="mallopt is glibc's")
def test_what_is_freed_is_there_for_the_next_batch_and_is_not_faulted_in_again():
    given, kept = (int(subprocess.check_output([sys.executable, "-c", FAULTS.format(keeps=keeps)])) for keeps in (False, True))
    assert kept < given / 5


@pytest.mark.parametrize("step", ["plan", "collect"])
def test_the_steps_that_move_rows_import_neither_pandas_nor_great_expectations(step):
    code = f"import sys, nightshift.steps.{step}; print(sorted({{'pandas', 'great_expectations'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
