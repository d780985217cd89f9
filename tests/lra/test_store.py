"""Data made on first use are stored once, whatever is killed, damaged or run at the same time."""

import io
import random
import re
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from lra import listops, store

SHORT = {"train_size": 400, "val_size": 50, "test_size": 60, "min_len": 10, "max_len": 60}
MORE = SHORT | {"train_size": 20000}


def contents(task):
    return [
        (item["inputs"].tolist(), item["label"]) for part in (task.train, task.validation, task.test) for item in part
    ]


def python(script, tmp_path, **options):
    """A fresh interpreter that runs a file without a `__main__` guard."""
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, str(tmp_path / "script.py")]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def test_what_cannot_be_read_is_no_matter_of_the_data_directory(tmp_path):
    with pytest.raises(ValueError, match=rf"^\[Errno 21\] Is a directory: '{tmp_path}'$"):
        store.stored(tmp_path / "data", lambda: {"a": np.frombuffer(tmp_path.read_bytes())}, store.Form())


KILL_WHILE_GENERATING = """
import os; from lra import parallel, store; chunks = parallel.chunks
def dying(*arguments):
    for index, chunk in enumerate(chunks(*arguments)):
        index == 2 and os.kill(os.getpid(), 9)
        yield chunk
parallel.chunks = dying
"""
KILL_WHILE_WRITING = "import os; os.fsync = lambda handle: os.kill(os.getpid(), 9)\n"


def generating(data_dir):
    return f"from lra import listops; listops.get_task(data_dir={str(data_dir)!r}, **{MORE})"


@pytest.mark.slow
def test_kill_9_leaves_nothing_in_the_way(tmp_path):
    for script, leftovers in ((KILL_WHILE_GENERATING, 0), (KILL_WHILE_WRITING, 1)):
        process = python(script + generating(tmp_path), tmp_path)
        process.communicate(timeout=60)  # returns when the workers, which hold stderr too, have ended
        assert process.returncode == -signal.SIGKILL
        (directory,) = (tmp_path / "listops").iterdir()
        assert len(list(directory.iterdir())) == leftovers
    task = listops.get_task(data_dir=str(tmp_path), **MORE)
    assert [path.name for path in directory.iterdir()] == ["data.npz"]
    whole = listops.get_task(data_dir=str(tmp_path / "whole"), **MORE)
    np.testing.assert_array_equal(task.train.tokens, whole.train.tokens)


def test_two_processes_at_once_and_no_main_guard(tmp_path):
    script = "print('once'); import threading; threading.Thread(target=input).start()\n" + generating(tmp_path)
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = [python(script, tmp_path, **options) for _ in range(2)]
    outputs = [process.communicate("\n", timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [out for out, _ in outputs] == ["once\n"] * 2
    assert sorted("20110 to make" in err for _, err in outputs) == [False, True]  # the other one waited, or came later
    (directory,) = (tmp_path / "listops").iterdir()
    assert [path.name for path in directory.iterdir()] == ["data.npz"]


def damages(count):
    """Where bits are flipped: at both ends of a file, and in between."""
    rng = random.Random(0)
    return lambda good: [
        *range(0, 60, 120 // count),
        *rng.sample(range(len(good)), count // 2),
        *range(len(good) - 60, len(good), 120 // count),
    ]


@pytest.mark.parametrize("count", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_damage_is_noticed_wherever_it_is(tmp_path, capsys, count):
    expected = contents(listops.get_task(data_dir=str(tmp_path), **SHORT))
    (path,) = tmp_path.glob("listops/*/data.npz")
    good = path.read_bytes()
    rng = random.Random(0)
    noticed = 0
    places = damages(count)(good)
    for at in places:
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :])
        assert contents(listops.get_task(data_dir=str(tmp_path), **SHORT)) == expected, at
        noticed += "is damaged: generating it again" in capsys.readouterr().err
    assert noticed >= (50 if count == 60 else 3)  # what is not noticed are dates and versions in the archive's headers
    for size in (0, 10, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        assert contents(listops.get_task(data_dir=str(tmp_path), **SHORT)) == expected
        assert f"{path} is damaged" in capsys.readouterr().err


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Path and arrays of a store."""
    root = tmp_path_factory.mktemp("good")
    listops.get_task(data_dir=str(root), **SHORT)
    (path,) = root.glob("listops/*/data.npz")
    return path, dict(np.load(path))


def other(array, place, value):
    array = array.copy()
    array[place] = value
    return array


FOREIGN = {
    "keys": (lambda a: {"a": a["tokens"], "b": a["labels"]}, "it holds a, b, not tokens, offsets, labels"),
    "one more": (lambda a: a | {"more": a["labels"]}, "it holds tokens, offsets, labels, more, not"),
    "nothing": (lambda a: {}, "it holds nothing, not tokens"),
    "label": (lambda a: a | {"labels": other(a["labels"], 70, 10)}, "labels holds 10, which is not in [0, 9]"),
    "token": (lambda a: a | {"tokens": other(a["tokens"], 5, 16)}, "tokens holds 16, which is not in [1, 15]"),
    "padding": (lambda a: a | {"tokens": other(a["tokens"], 5, 0)}, "tokens holds 0, which is not in [1, 15]"),
    "fewer labels": (lambda a: a | {"labels": a["labels"][1:]}, "labels is uint8 [509], not uint8 [510]"),
    "dtype": (lambda a: a | {"labels": a["labels"].astype(float)}, "labels is float64 [510], not uint8 [510]"),
    "axes": (lambda a: a | {"tokens": a["tokens"][None]}, "not uint8 [any]"),
    "first offset": (lambda a: a | {"offsets": other(a["offsets"], 0, 1)}, "offsets are from 1 to"),
    "last offset": (lambda a: a | {"tokens": a["tokens"][:-1]}, "offsets are from 0 to"),
    "an offset": (lambda a: a | {"offsets": other(a["offsets"], 9, a["offsets"][5])}, "offsets give lengths from -"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_whole_file_of_other_data_is_refused_and_kept(tmp_path, good, name):
    change, says = FOREIGN[name]
    path = tmp_path / good[0].relative_to(good[0].parents[2])
    path.parent.mkdir(parents=True)
    np.savez(path, **change(good[1]))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is whole, but not what is kept there") as error:
        listops.get_task(data_dir=str(tmp_path), **SHORT)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert path.read_bytes() == before


def test_a_header_is_not_believed(tmp_path):
    """Bytes that are said to be Python objects would be taken for addresses; numpy's `memmap` does so."""
    values = np.arange(8, dtype=np.int64)
    form = store.Form(a=store.Array("int64", (8,), 0, 7))

    def refused(header, says, **options):
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (8,)} | header)
        with zipfile.ZipFile(tmp_path / "data.npz", "w", **options) as archive:
            archive.writestr("a.npy", file.getvalue() + values.tobytes())
        with pytest.raises(ValueError, match=f"data.npz is whole, but not what is kept there.*{says}"):
            store.stored(tmp_path, lambda: {"a": values}, form)

    refused({"descr": "|O"}, "a holds Python objects")
    refused({"descr": [("x", "|O")]}, "a holds Python objects")
    refused({"shape": (7,)}, "a has more or fewer values than its shape")
    refused({"shape": (9,)}, "a has more or fewer values than its shape")
    refused({"descr": "<f8"}, "a is float64")
    refused({}, "a is compressed", compression=zipfile.ZIP_DEFLATED)


def test_what_is_made_is_checked_before_it_is_written(tmp_path):
    for made in (np.nan, 1.5, -0.5):
        with pytest.raises(ValueError, match=r"a holds (nan|1.5|-0.5), which is not in \[0, 1\]"):
            store.stored(tmp_path, lambda: {"a": np.float64(made)}, store.Form(a=store.ACCURACY))  # noqa: B023
    assert list(tmp_path.iterdir()) == []


def test_arrays_stay_on_disk_until_they_are_used(tmp_path):
    made = {"a": np.arange(60, dtype=np.int16).reshape(3, 4, 5), "b": np.asfortranarray(np.eye(3)), "c": np.array(2.5)}
    form = store.Form(
        a=store.Array("int16", (3, None, 5), 0, 59),
        b=store.Array("float64", (3, 3), 0, 1),
        c=store.Array("float64", (), 0, np.inf),
    )
    for _ in range(2):
        arrays = store.stored(tmp_path, lambda: made, form)
        assert arrays.keys() == made.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, made[name])
            assert array.dtype == made[name].dtype and not array.flags.writeable
    script = f"""
import resource
from lra import store
import numpy as np, pathlib
place = pathlib.Path({str(tmp_path / "large")!r})
form = store.Form(a=store.Array("uint8", (200, 2**20), 0, 255))
store.stored(place, lambda: dict(a=np.zeros((200, 2**20), np.uint8)), form)
"""
    assert python(script, tmp_path).wait(timeout=60) == 0
    limited = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (100 * 2**20,) * 2)\n"
    process = python(limited + script, tmp_path)  # 100 MB of its own memory, for an array of 200 MB
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


def test_a_full_disk_or_a_wrong_place_is_said_in_one_line(tmp_path):
    script = """
import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try: {}
except OSError as error: print(error)
"""
    process = python(script.format(generating(tmp_path)), tmp_path, stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=60)
    assert re.fullmatch(r".*data.npz.*\(File too large\): set config.task.data_dir or \$EFFICIENT_TX_DATA.*\n", out)
    assert not list(tmp_path.glob("listops/*/*"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Not a directory.*EFFICIENT_TX_DATA"):
        listops.get_task(data_dir=str(tmp_path / "file"), **SHORT)


def test_neither_jax_nor_network(tmp_path):
    script = """
import socket, sys
def refuse(*arguments): raise RuntimeError("network")
socket.socket.connect = socket.getaddrinfo = refuse
{}
assert not {{"jax", "flax", "grain", "tensorflow"}} & set(sys.modules)
"""
    process = python(script.format(generating(tmp_path)), tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
