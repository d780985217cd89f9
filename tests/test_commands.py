"""What all command lines share: one line and an exit status for Ctrl-C, lost output, little memory and wrong words."""

import argparse
import os
import signal
import subprocess
import sys

import pytest

from efficient_tx import commands
from efficient_tx.compare.commands.compression import budgets
from efficient_tx.compare.flags import wholes
from tests.support import ROOT

pytestmark = pytest.mark.quick

# (words that start a command, a package that it imports before anything is done)
HEAVY = [
    (["train.py"], "jax"),
    (["eval.py"], "jax"),
    (["-m", "efficient_tx.train"], "jax"),
    (["-m", "efficient_tx.eval"], "jax"),
    (["-m", "efficient_tx.sweep"], "jax"),
    (["-m", "efficient_tx.report"], "jax"),
    (["-m", "efficient_tx.inspect"], "jax"),
    (["-m", "efficient_tx.compare"], "rich"),
    (["-m", "efficient_tx.data.fetch"], "numpy"),
    (["-m", "lra"], "numpy"),
]


@pytest.mark.parametrize(("words", "package"), HEAVY, ids=lambda value: str(value[-1]))
def test_ctrl_c_while_importing_is_no_traceback(words, package, tmp_path):
    (tmp_path / f"{package}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def command(body, *, out, **options):
    """A command whose `main` is `body`, in a process, and its standard output in the file or pipe `out`."""
    program = f"import sys\nfrom efficient_tx.commands import run\ndef main():\n    {body}\nrun(main, **{options})\n"
    return subprocess.run(
        [sys.executable, "-c", program], stdout=out, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60
    )


def closed_pipe():
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


LINE = "print('x', flush=True); print('y'); sys.stderr.write('all is done\\n')"


@pytest.mark.parametrize("reason", ["Broken pipe", "No space left on device"])
def test_a_command_goes_on_if_its_output_is_lost(reason):
    """And says so once. Its status tells of it, unless its results are files."""
    for prints, status in ((True, 1), (False, 0)):
        out = closed_pipe() if reason == "Broken pipe" else os.open("/dev/full", os.O_WRONLY)
        try:
            done = command(LINE, out=out, prints=prints)
        finally:
            os.close(out)
        assert (done.returncode, done.stderr) == (
            status,
            f"standard output: {reason}; what follows is not shown\nall is done\n",
        )


def test_output_that_is_read_is_as_ever():
    done = command("print('\\udcff', 'x')\n    print('y')\n    return 3", out=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (3, "\\udcff x\ny\n", "")


@pytest.mark.parametrize(
    ("body", "status", "line"),
    [
        ("raise KeyboardInterrupt", 130, "stopped by SIGINT\n"),
        ("raise MemoryError('Unable to allocate 8 TiB')", 2, "out of memory (Unable to allocate 8 TiB): use less\n"),
        ("raise RuntimeError('RESOURCE_EXHAUSTED: 9\\n bytes')", 2, "out of memory (RESOURCE_EXHAUSTED: 9 bytes): use"),
        ("sys.exit(3)", 3, ""),
    ],
)
def test_how_a_command_ends(body, status, line, capsys):
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stopped:
            commands.run(lambda: exec(body), smaller="less")
    finally:
        signal.signal(signal.SIGINT, before)
    error = capsys.readouterr().err
    assert stopped.value.code == status and error.startswith(line) and error.count("\n") == bool(line)


def test_a_fault_of_ours_is_not_hidden():
    done = command("raise RuntimeError('a fault')", out=subprocess.PIPE)
    assert done.returncode == 1 and "Traceback" in done.stderr and "a fault" in done.stderr


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("split=train", "'split=train' is no flag: flags begin with two dashes, as --split=train"),
        ("foo", "'foo' is no flag: flags begin with two dashes, as --"),
        ("--splt=train", "--splt=train is no flag: the nearest is --split"),
        ("--spl", "--spl is no flag: the nearest is --split"),
    ],
)
def test_unknown_arguments_name_the_flag_that_was_meant(argument, line, capsys):
    parser = commands.Parser()
    parser.add_argument("--split")
    parser.add_argument("--workdir")
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--workdir=a", argument])
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1) and error.startswith(line)


def test_lists_are_split_at_semicolons_if_they_have_any():
    """Of every flag: a reader who has met one such list writes the others so."""
    names = commands.names_of(("a", "b", "c"), "letter")
    assert names("c;a") == names("c,a") == names(" a ; c ") == ["a", "c"]
    assert wholes("64;16") == wholes("16,64") == (16, 64) and budgets("0.25;0.5") == budgets("0.5,0.25") == (0.5, 0.25)
    for parser in (names, wholes, budgets):
        with pytest.raises(argparse.ArgumentTypeError):
            parser(";")
