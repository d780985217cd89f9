"""Work in several processes: order, errors, and no process left behind."""

import os
import pickle
import signal
import subprocess
import sys
import time

import pytest

from efficient_tx.checks import OptionError
from efficient_tx.kernels.verify.plan import selection
from efficient_tx.kernels.verify.processes import each

TWO = {"jobs": 2, "progress": str, "what": "done"}


def square(x):
    if x == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid(), x * x


def slowly(folder):
    if folder:
        (folder / str(os.getpid())).touch()
        time.sleep(600)


def both_started(folder):
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.1)


def ended(folder):
    """Whether the processes that left their numbers in the folder end."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if not any(os.path.exists(f"/proc/{path.name}") for path in folder.iterdir()):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_keep_their_order(jobs):
    told = []
    results = list(each(square, [3, 1, 2], jobs=jobs, progress=told.append, what="squares", name="x = {}".format))
    assert [result for _, result in results] == [9, 1, 4]
    assert (os.getpid() in {process for process, _ in results}) == (jobs == 1)
    assert told == ["squares: 1 of 3, x = 3", "squares: 2 of 3, x = 1", "squares: 3 of 3, x = 2"]


@pytest.mark.slow
def test_a_process_that_is_killed_is_named():
    with pytest.raises(ChildProcessError, match=r"^one of 2 processes was ended, as for want of memory: use fewer"):
        list(each(square, [1, 5, 2], **TWO))


def refuse(x):
    raise OptionError("x", x, "it must be another")


@pytest.mark.slow
def test_an_error_in_a_process_is_that_of_the_caller():
    with pytest.raises(OptionError, match=r"^x is 3: it must be another$"):
        list(each(refuse, [3, 1], **TWO))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_the_one_that_started_them(number, tmp_path):
    code = f"""
import pathlib
from tests.kernels.verify import test_processes as there
list(there.each(there.slowly, [pathlib.Path({str(tmp_path)!r})] * 2, **there.TWO))
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    both_started(tmp_path)
    parent.send_signal(number)
    parent.wait()
    assert ended(tmp_path)


@pytest.mark.slow
def test_processes_end_with_the_iterator(tmp_path):
    results = each(slowly, [None, tmp_path, tmp_path], **TWO)
    next(results)
    both_started(tmp_path)
    results.close()
    assert ended(tmp_path)


@pytest.mark.quick
def test_a_compilation_goes_to_another_process():
    """Its target is known there by its name."""
    for compilation in selection():
        there = pickle.loads(pickle.dumps(compilation))
        assert there == compilation and there.target is compilation.target
