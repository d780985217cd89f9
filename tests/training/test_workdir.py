"""The workdir belongs to one config and one live process; its text files are whole at any moment."""

import contextlib
import errno
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from efficient_tx import files
from efficient_tx.training import disk, workdir
from efficient_tx.training.disk import read_checked, write_checked, write_json
from efficient_tx.training.errors import Gone, Refused, RunError
from efficient_tx.training.history import History
from efficient_tx.training.workdir import Workdir, diverged, read_config

pytestmark = pytest.mark.quick

CONFIG = {"steps": 10, "log_every": 5, "loggers": ("tensorboard",), "task": {"name": "toy", "data_dir": None}}


def open_run(path, **changes):
    run = Workdir(path, CONFIG | changes)
    run.claim()
    run.begin()
    return run


def test_claiming_a_new_folder_writes_nothing(tmp_path):
    Workdir(tmp_path / "a" / "b", CONFIG).claim()
    assert list(tmp_path.iterdir()) == []


def test_config_is_stored_and_another_is_refused_by_key(tmp_path):
    open_run(tmp_path / "run").release()
    assert read_config(tmp_path / "run") == json.loads(json.dumps(CONFIG))
    with pytest.raises(Refused, match=r"steps is 10 there and 20 here\. Use .*, or extend it to 20 steps: .*--ext"):
        open_run(tmp_path / "run", steps=20)
    with pytest.raises(Refused, match=r"extra is 'absent' there and 1 here; task\.name is 'toy' there and 'x' here"):
        open_run(tmp_path / "run", task={"name": "x", "data_dir": None}, extra=1)
    with pytest.raises(Refused, match="and 4 more keys"):
        open_run(tmp_path / "run", **{f"key{index}": 1 for index in range(12)})
    # Refusing has changed nothing, and left no lock.
    open_run(tmp_path / "run").release()


def test_a_run_of_an_older_version_goes_on_with_the_defaults_of_new_keys(tmp_path):
    """`complete` adds what has come since; a config that it cannot complete is compared as it is stored."""
    run = Workdir(tmp_path / "run", {"steps": 10})
    run.claim()
    run.begin()
    run.release()

    def complete(stored):
        if "steps" not in stored:
            raise ValueError("config.json has no steps")
        return {"conv": 0, **stored}

    today = Workdir(tmp_path / "run", {"steps": 10, "conv": 0}, complete=complete)
    today.claim()
    today.begin()
    assert read_config(tmp_path / "run") == {"steps": 10, "conv": 0}
    today.release()
    with pytest.raises(Refused, match="conv is 0 there and 4 here"):
        Workdir(tmp_path / "run", {"steps": 10, "conv": 4}, complete=complete).claim()
    write_checked(tmp_path / "run" / "config.json", {"stops": 10})
    with pytest.raises(Refused, match="steps is 'absent' there and 10 here; stops is 10 there and 'absent' here"):
        Workdir(tmp_path / "run", {"steps": 10}, complete=complete).claim()


def test_some_keys_may_change_and_are_stored_anew(tmp_path):
    open_run(tmp_path / "run").release()
    changes = {"log_every": 1, "loggers": [], "task": {"name": "toy", "data_dir": "/elsewhere"}}
    open_run(tmp_path / "run", **changes).release()
    assert read_config(tmp_path / "run") == CONFIG | changes


def test_a_live_run_keeps_others_out(tmp_path):
    run = open_run(tmp_path / "run")
    with pytest.raises(Refused, match=rf"in use by a live run \(process {os.getpid()}\)"):
        open_run(tmp_path / "run")
    # Processes of one run that do not write need no lock.
    Workdir(tmp_path / "run", CONFIG, writer=False).claim()
    run.release()
    open_run(tmp_path / "run").release()


def test_a_dead_process_leaves_no_lock(tmp_path):
    program = (
        "import os, sys; from efficient_tx.training.workdir import Workdir; "
        "Workdir(sys.argv[1], {}).begin(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, tmp_path / "run"]).returncode == -9
    assert (tmp_path / "run" / "lock").exists()
    Workdir(tmp_path / "run", {}).claim()


def test_what_is_no_workdir_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="is a file"):
        open_run(tmp_path / "file")
    for missing in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(Refused, match=f"{missing} is not the workdir of a run"):
            read_config(missing)
    (tmp_path / "run").mkdir()
    for content in ('{"steps": 10', "3"):
        (tmp_path / "run" / "config.json").write_text(content)
        with pytest.raises(Refused, match=r"config\.json is damaged"):
            open_run(tmp_path / "run")


def test_a_folder_that_cannot_be_made_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir.os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(Refused, match=f"cannot be made: {tmp_path} cannot be written"):
        Workdir(tmp_path / "a" / "b", CONFIG).claim()


def test_an_error_of_the_disk_leaves_the_old_file(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", {"old": 1})

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(RunError, match=r"x\.json: No space left on device"):
        patch.setattr(workdir.os, "fsync", fail)
        write_json(tmp_path / "x.json", {"new": 1})
    assert json.loads((tmp_path / "x.json").read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


SUMMARY = {"best_step": 5, "val_accuracy": 0.5, "test_accuracy": 0.25, "baselines": {"constant": 0.125}}


@pytest.mark.first(1)
@pytest.mark.parametrize("stride", [41, 1])
def test_no_flipped_bit_of_a_json_file_passes(tmp_path, stride):
    """The config is refused unless it reads as that of the run, the summary is made again, and each is named."""
    run = open_run(tmp_path / "run")
    run.finish(SUMMARY)
    run.release()
    for name in ("config.json", "summary.json", "crc32.json"):
        file = tmp_path / "run" / name
        whole = file.read_bytes()
        for place, bit in itertools.islice(itertools.product(range(len(whole)), range(8)), 0, None, stride):
            content = bytearray(whole)
            content[place] ^= 1 << bit
            file.write_bytes(content)
            said = []
            again = Workdir(tmp_path / "run", CONFIG, warn=said.append)
            try:
                again.claim()
                assert said and again.summary() in (None, SUMMARY), (name, place, bit)
            except Refused as error:
                said.append(str(error))
            assert all(name in line and "\n" not in line and str(file.parent) in line for line in said)
            again.release()
            file.write_bytes(whole)
    assert Workdir(tmp_path / "run", CONFIG, warn=pytest.fail).summary() == SUMMARY


def test_a_kill_between_checksum_and_file_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "x.json"
    for number in range(3):
        write_checked(file, {"number": number})
        with monkeypatch.context() as patch:
            patch.setattr(disk, "write_bytes", lambda path, content: path != file and files.write(path, content))
            write_checked(file, {"number": 100})
        assert read_checked(file) == {"number": number}
    file.write_text('{"number": 7}')
    with pytest.raises(ValueError, match=r"is damaged \(its CRC-32 differs from that in crc32\.json\)"):
        read_checked(file)


def test_a_run_that_diverged_says_so_until_it_begins_again(tmp_path):
    run = open_run(tmp_path / "run")
    assert diverged(run.path) is None
    run.diverge("the loss of step 3 is not finite")
    run.release()
    run.diverge("without the lock")
    assert diverged(run.path) == "the loss of step 3 is not finite"
    again = open_run(tmp_path / "run")
    assert diverged(again.path) is None
    shutil.rmtree(tmp_path / "run")
    again.diverge("of a folder that is gone")  # the divergence is what ends the run, and is said
    assert not (tmp_path / "run").exists()
    again.release()


def test_files_without_checksums_are_read_with_a_note(tmp_path):
    """As those of an older version; from then on they have some. A summary of another form is none."""
    open_run(tmp_path / "run").release()
    (tmp_path / "run" / "crc32.json").unlink()
    said = []
    run = Workdir(tmp_path / "run", CONFIG, warn=said.append)
    run.begin()
    assert said == [f"{tmp_path}/run has no crc32.json, as in older versions: config.json was read unchecked"]
    assert read_config(tmp_path / "run") == run.config and (tmp_path / "run" / "crc32.json").exists()
    run.release()
    for number, form in enumerate([[], 3, {}, SUMMARY | {"baselines": 3}, SUMMARY | {"test_accuracy": "high"}], 2):
        (tmp_path / "run" / "crc32.json").unlink(missing_ok=True)
        (tmp_path / "run" / "summary.json").write_text(json.dumps(form))
        run = Workdir(tmp_path / "run", CONFIG, warn=said.append)
        assert run.summary() is None and len(said) == number and "summary.json is damaged (" in said[-1]


def test_a_folder_that_is_deleted_or_replaced_ends_the_run(tmp_path):
    for act in (shutil.rmtree, lambda path: path.rename(tmp_path / "elsewhere")):
        run = open_run(tmp_path / "run")
        act(tmp_path / "run")
        open_run(tmp_path / "run")
        with pytest.raises(Gone, match=f"{tmp_path}/run/lock was deleted or replaced during the run"):
            run.finish(SUMMARY)
        assert not (tmp_path / "run" / "summary.json").exists()
        shutil.rmtree(tmp_path / "run")


def test_what_killed_processes_left_is_removed(tmp_path):
    open_run(tmp_path / "run").release()
    names = {entry.name for entry in (tmp_path / "run").iterdir()}
    for name in (".summary.json.0123456789abcdef.tmp", ".eval_test_best.json.0123456789abcdef.tmp"):
        (tmp_path / "run" / name).write_text("{")
    open_run(tmp_path / "run").release()
    # Another process may be writing the results of an evaluation.
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == {
        *names,
        ".eval_test_best.json.0123456789abcdef.tmp",
    }


@pytest.mark.parametrize("name", ["gs://bucket/run", "run\n1", "\udcff", "a" * 300, "~nobody.here/run"])
def test_impossible_names_are_refused_before_anything_is_written(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused) as caught:
        Workdir(name, CONFIG).claim()
    assert caught.value.option == "workdir" and "\n" not in caught.value.flag and list(tmp_path.iterdir()) == []


def line(step, split="validation", accuracy=0.5):
    return {"step": step, "split": split, "loss": 1.0, "accuracy": accuracy}


def test_lines_survive_and_a_half_written_one_does_not_count(tmp_path):
    path = tmp_path / "metrics.jsonl"
    history = History(path)
    history.rewind(0)
    for step in (1, 2, 3, 3):
        history.append(line(step, "validation" if step == 3 else "train"))
    whole = path.read_bytes()
    assert [json.loads(text) for text in whole.decode().splitlines()] == history.lines
    for end in range(len(whole) - 1, len(whole) - 60, -7):
        path.write_bytes(whole[:end])
        again = History(path)
        assert again.lines == history.lines[:3]
        again.rewind(3)
        assert path.read_bytes() == whole[: whole[:-1].rindex(b"\n") + 1]


def test_rewinding_drops_what_comes_after(tmp_path):
    history = History(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        history.append(line(step))
    history.rewind(2)
    assert history.lines == History(tmp_path / "metrics.jsonl").lines == [line(1), line(2)]
    assert history.validated(2) and not history.validated(3)


def test_who_does_not_write_follows_only(tmp_path):
    history = History(tmp_path / "metrics.jsonl", writer=False)
    history.append(line(1))
    history.rewind(0)
    assert list(tmp_path.iterdir()) == [] and history.lines == []


def test_a_number_that_is_not_finite_is_null(tmp_path):
    history = History(tmp_path / "metrics.jsonl")
    history.append(line(1) | {"loss": float("nan"), "grad_norm": float("inf")})
    assert history.lines[0] == json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (history.lines[0]["loss"], history.lines[0]["grad_norm"]) == (None, None)


def test_the_best_is_the_earliest_of_the_highest(tmp_path):
    history = History(tmp_path / "metrics.jsonl")
    for step, accuracy in [(1, 0.2), (2, 0.7), (3, 0.9), (4, 0.9), (5, 0.1)]:
        history.append(line(step, accuracy=accuracy))
        history.append(line(step, "train", accuracy=1.0))
    assert history.ranked() == [3, 4, 2, 1, 5]


def test_a_full_disk_names_the_file_and_keeps_its_lines(tmp_path):
    history = History(tmp_path / "metrics.jsonl")
    history.append(line(1))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(RunError, match=r"cannot write .*metrics\.jsonl: File too large"):
            history.append(line(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert History(tmp_path / "metrics.jsonl").lines == [line(1)]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("file/run", "cannot be a folder: Not a directory"),
        ("a" * 300, "cannot be a folder: File name too long"),
        ("a\0b", "has control characters"),
    ],
)
def test_a_path_that_cannot_be_a_folder_is_refused_before_any_work(tmp_path, name, fault):
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match=fault) as caught:
        Workdir(tmp_path / name, CONFIG).claim()
    assert caught.value.option == "workdir" and "\0" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_system_without_locks_is_said_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(workdir.fcntl, "flock", flock)
    run = open_run(tmp_path / "run")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "lock: this file system has no locks (No locks available)" in error
    assert read_config(run.path) == json.loads(json.dumps(CONFIG))
    run.release()


@pytest.mark.parametrize("number", range(1, 8))
def test_a_kill_while_a_run_is_extended_leaves_the_old_run_or_the_new_one(tmp_path, monkeypatch, number):
    """Each file that is written or deleted is the first that the kill spares; another start makes it the new run."""
    path = tmp_path / "run"
    old = Workdir(path, {"steps": 10})
    old.begin()
    old.finish({"best_step": 10, "val_accuracy": 0.5, "test_accuracy": 0.5, "baselines": {}})
    old.release()

    class Killed(BaseException):
        pass

    calls = itertools.count(1)

    def stop(function):
        def stopped(*arguments, **options):
            if next(calls) == number:
                raise Killed
            return function(*arguments, **options)

        return stopped

    new = Workdir(path, {"steps": 20})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop(os.replace))
        patch.setattr(Path, "unlink", stop(Path.unlink))
        with contextlib.suppress(Killed):
            new.extend()
    new.release()
    assert read_config(path)["steps"] in (10, 20)
    again = Workdir(path, {"steps": 20})
    assert again.extend() in (10, None)
    assert read_config(path) == {"steps": 20} and again.summary() is None and again.extended() == [10]
    again.release()


def test_a_damaged_note_of_an_extension_is_named(tmp_path):
    said = []
    run = Workdir(tmp_path / "run", CONFIG, warn=said.append)
    run.begin()
    assert run.extended() == [] and said == []
    write_checked(run.path / "extended.json", {"from": [5]})
    (run.path / "extended.json").write_text('{"from": [4]}')
    assert run.extended() == run.extended() == [] and len(said) == 1
    assert "extended.json is damaged (" in said[0]
    run.release()
