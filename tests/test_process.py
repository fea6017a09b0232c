"""A process of the command line starts and ends with what it needs, and no more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

END = """
import atexit, threading, time
from nightshift.process import end_process

class Taken:
    def __del__(self): print("taken apart")

taken = Taken()
atexit.register(print, "called")
threading.Thread(target=lambda: (time.sleep(0.2), print("joined"))).start()
{last}
"""


def test_it_starts_without_threads_that_wait_for_matrices():
    code = "import os, nightshift.cli; print(os.environ['OPENBLAS_NUM_THREADS'])"
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=environment).strip() == "1"


@pytest.mark.parametrize(
    ("last", "said", "code"),
    [
        pytest.param("end_process(3)", ["joined", "called"], 3, id="leaves"),
        pytest.param("raise ValueError", ["joined", "called", "taken apart"], 1, id="fails as nobody expected"),
    ],
)
def test_it_ends_with_threads_joined_and_all_that_asked_called_and_its_modules_left_as_they_are(last, said, code):
    done = subprocess.run([sys.executable, "-c", END.format(last=last)], capture_output=True, text=True)
    assert (done.stdout.split("\n")[:-1], done.returncode) == (said, code)


def test_output_that_nobody_takes_is_told_at_the_end():
    code = "from nightshift.process import end_process; print('a summary'); end_process(0)"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, env=buffered)
    assert done.returncode == 120
    assert "No space left" in done.stderr
