"""Several processes of one run: what is refused, what each says when another is lost, and that they must agree."""

import contextlib
import copy
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from efficient_tx.training import processes
from efficient_tx.training.checkpoint import Checkpoints
from efficient_tx.training.errors import Refused, RunError
from efficient_tx.training.identity import contents, identity
from tests.support import toy
from tests.support.command import SAMPLED, TINY, evaluate_here, finish, start, train_here, wait_for_step


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((None, 2, 0), "--num_processes=2: a run over several processes needs coordinator_address too"),
        (
            (None, None, 0),
            "--process_id=0: a run over several processes needs coordinator_address and num_processes too",
        ),
        (("127.0.0.1:1", 0, 0), "--num_processes=0: a run has at least 1 process"),
        (("127.0.0.1:1", 2, 2), "--process_id=2: it must lie in [0, 1], there are 2 processes"),
        (("127.0.0.1:1", 2, -1), "--process_id=-1: it must lie in [0, 1], there are 2 processes"),
        (("1.2.3.4", 2, 1), "--coordinator_address=1.2.3.4: it must be HOST:PORT of process 0, like 10.0.0.1:1234"),
        (("a:b", 2, 1), "--coordinator_address=a:b: it must be HOST:PORT of process 0, like 10.0.0.1:1234"),
        (("a:70000", 2, 1), "--coordinator_address=a:70000: it must be HOST:PORT of process 0, like 10.0.0.1:1234"),
    ],
)
def test_what_cannot_be_right_is_refused(arguments, line):
    with pytest.raises(Refused) as caught:
        processes.join(*arguments)
    assert caught.value.flag == line


def test_a_port_in_use_is_refused():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(Refused, match=f"port {port} of this machine cannot be used"):
            processes.join(f"127.0.0.1:{port}", 2, 0)


def test_the_first_differences_are_named(monkeypatch):
    facts = {"rate": 0.1, "code": "crc 1", "seed": 0}
    monkeypatch.setattr(processes, "gathered", lambda text: [text] * 3)
    processes.agree(facts)
    monkeypatch.setattr(processes, "gathered", lambda text: [text, text, b'{"rate": 0.2, "code": "crc 1"}'])
    with pytest.raises(Refused) as caught:
        processes.agree(facts)
    assert str(caught.value) == (
        "the processes of the run differ: rate is 0.1 in process 0 and 0.2 in process 2; "
        "seed is 0 in process 0 and 'absent' in process 2"
    )


def test_what_must_be_the_same():
    config = {"optimizer": {"learning_rate": 0.1}, "task": {"name": "toy", "data_dir": "/here"}, "log_every": 5}
    facts = identity(config, toy.TASK)
    assert facts["optimizer.learning_rate"] == 0.1 and facts["task.name"] == "toy"
    assert re.fullmatch("crc [0-9a-f]{8}", facts["the code of efficient_tx"])
    assert facts["the train data"].startswith("40 examples, crc ")
    # Where the data lie, and how often lines are written, may differ between hosts.
    assert identity({**config, "task": {"name": "toy", "data_dir": "/there"}, "log_every": 7}, toy.TASK) == facts
    assert identity({**config, "optimizer": {"learning_rate": 0.2}}, toy.TASK) != facts


def test_other_data_have_another_digest():
    split = toy.split(5, 0)
    digests = {contents(split), contents(split[:4]), contents(split[::-1])}
    for name, value in (("label", 1 - split[2]["label"]), ("inputs", split[2]["inputs"] + 1)):
        other = copy.deepcopy(split)
        other[2][name] = value
        digests.add(contents(other))
    assert len(digests) == 5 and contents(copy.deepcopy(split)) in digests
    assert contents([]) == "0 examples, crc 00000000"


def test_processes_that_have_drifted_apart_are_named(monkeypatch):
    monkeypatch.setattr(processes.jax, "process_count", lambda: 4)
    monkeypatch.setattr(processes, "gathered", lambda text: [text, text, b"8", b"9"])
    with pytest.raises(
        RunError, match="the parameters are not the same in processes 2, 3 as in process 0: they are not saved"
    ):
        processes.check_equal(7, "the parameters")
    monkeypatch.setattr(processes, "gathered", lambda text: [text] * 4)
    processes.check_equal(7, "the parameters")


def test_a_state_that_is_not_everybodys_is_not_saved(monkeypatch, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"weight": np.ones(3)})
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "gathered", lambda text: [text, b"0"])
    with pytest.raises(RunError, match="the parameters of step 2 are not the same in process 1 as in process 0"):
        checkpoints.save(2, {"weight": np.ones(3)})
    assert checkpoints.steps() == [1]


def test_what_nobody_foresaw_is_told_with_its_traceback(tmp_path):
    """Though C++ writes its standard error to a file by then."""
    lines = [
        "from efficient_tx import commands",
        "from efficient_tx.training.processes import ending_in_a_line",
        "def main():",
        "    ending_in_a_line(lambda words: 'of jaxlib')",
        "    raise TypeError('unforeseen')",
        "commands.run(main)",
    ]
    ended = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert ended.returncode == 1 and ended.stderr.endswith("TypeError: unforeseen\n")


@pytest.mark.parametrize(("before", "said", "status"), [("", "of jaxlib", 1), ("last_words('mine', 3)", "mine", 3)])
def test_who_learns_first_of_a_loss_has_the_last_word(tmp_path, before, said, status):
    lines = [
        "import os",
        "from efficient_tx.training.processes import ending_in_a_line, last_words",
        "ending_in_a_line(lambda words: 'of jaxlib')",
        before,
        "os.abort()",
    ]
    ended = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    (line,) = ended.stderr.splitlines()
    assert line.partition(";")[0] == said and ended.returncode == status


@contextlib.contextmanager
def pair(workdir, *options, of_second=(), script="train.py", **settings):
    """The two processes of a tiny run."""
    port = free_port()
    joined = [f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2", *options]
    run = [*SAMPLED, f"--workdir={workdir}", *joined]
    each = [start(script, *run, f"--process_id={index}", *of_second * index, **settings) for index in (0, 1)]
    try:
        yield each
    finally:
        for process in each:
            process.kill()


LATE = """
import sys, time
from efficient_tx import train
from efficient_tx.training.loop import Loop

def late(owner, name):
    original = getattr(owner, name)
    def wait(*args, once=[]):
        if not once and "--process_id=1" in sys.argv:
            once.append(time.sleep(35))
        return original(*args)
    setattr(owner, name, wait)

late(*{"data": (train, "build_task"), "step": (Loop, "_advance")}[sys.argv.pop(1)])
train.command()
"""


@pytest.fixture(scope="module")
def late_pairs(tmp_path_factory):
    """Where a run of one is, and by what process 1 is 35 s late with two processes: they wait while others run."""
    path = tmp_path_factory.mktemp("late")
    (path / "late.py").write_text(LATE)
    assert train_here(path / "alone", run=SAMPLED)[0] == 0  # The data are there by then.
    with contextlib.ExitStack() as stack:
        script, environment = f"{path / 'late.py'} ", {"PYTHONPATH": "."}
        yield (
            path,
            {
                what: stack.enter_context(pair(path / what, script=script + what, environment=environment))
                for what in ("data", "step")
            },
        )


# What happens to which process, and what the other one says.
ENDS = {
    "process 1 is killed": (1, signal.SIGKILL, "process 0 of the run lost another one"),
    "process 0 is killed": (0, signal.SIGKILL, "process 1 of the run lost another one"),
    "process 1 stands still": (1, signal.SIGSTOP, "process 0 of the run lost another one: process 1 gives no sign"),
    "Ctrl-C in process 0": (0, signal.SIGINT, "process 1 of the run lost another one"),
}


@pytest.mark.slow
@pytest.mark.usefixtures("late_pairs")
@pytest.mark.parametrize("what", ENDS)
def test_each_ends_in_a_line_when_it_loses_the_other(tmp_path, what):
    victim, number, line = ENDS[what]
    endless = ["--config.steps=100000", "--config.eval_every=100000", "--heartbeat_timeout=10"]
    with pair(tmp_path / "run", *endless) as each:
        wait_for_step(tmp_path / "run", 14)
        each[victim].send_signal(number)
        since = time.monotonic()
        status, _, error = finish(each[1 - victim])
        # The time-out of 10 s is not kept to the second, and the machine may be busy.
        assert time.monotonic() - since < 60
        waits, said = error.splitlines()
        assert waits.startswith(f"process {1 - victim} waits for process {victim} of the run at 127.0.0.1:")
        assert status == 1 and said.startswith(line)
        if number == signal.SIGINT:
            status, _, error = finish(each[victim])
            assert status == 130 and error.splitlines()[-1].startswith("stopped by SIGINT; the same command goes on: ")


@pytest.mark.slow
@pytest.mark.usefixtures("late_pairs")
def test_two_configs_do_not_train_together(tmp_path):
    with pair(tmp_path / "run", of_second=["--config.optimizer.learning_rate=0.01"]) as each:
        for process in each:
            status, _, error = finish(process)
            assert status == 2
            assert error.splitlines()[-1] == (
                "the processes of the run differ: optimizer.learning_rate is 0.002 in process 0 and 0.01 in process 1"
            )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("late_pairs")
def test_one_alone_gives_up(tmp_path):
    alone = {}
    for index in (0, 1):
        address = f"127.0.0.1:{free_port()}"
        many = [f"--coordinator_address={address}", "--num_processes=3", "--join_timeout=3", f"--process_id={index}"]
        alone[address] = start("train.py", *TINY, f"--workdir={tmp_path / 'run'}", *many)
    for index, (address, process) in enumerate(alone.items()):
        status, _, error = finish(process)
        others = "processes 1, 2" if index == 0 else "processes 0, 2"
        waits, said = error.splitlines()
        assert waits == f"process {index} waits for {others} of the run at {address}"
        assert status == 1
        assert said.startswith(f"process {index} waited 3 s in vain until {others} had joined the run at ")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["data", "step"])
def test_a_process_may_be_later_than_another(late_pairs, what):
    """35 s later with its data, or with its first step: gloo by itself waits for 30 s. They do what one does."""
    path, pairs = late_pairs
    for process in pairs[what]:
        status, _, error = finish(process)
        assert status == 0, error
    for line, alone in zip(toy.lines(path / what), toy.lines(path / "alone"), strict=True):
        # The sums over two devices are added in another order, and the updates carry the difference on.
        assert line.pop("split") == alone.pop("split") and line == pytest.approx(alone, rel=1e-3)
    status, _, error = evaluate_here(f"--workdir={path / what}")
    assert status == 0, error
