"""lra alone: the list of what data there are, and tasks written as shards that numpy alone can read."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from efficient_tx.task import Task
from lra import __main__ as command
from lra import export, listops
from lra.tasks import TASKS
from tests.support import ROOT

pytestmark = pytest.mark.quick

SMALL = ["--train_size=40", "--val_size=7", "--test_size=5", "--min_len=3", "--max_len=30", "--seed=3"]


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """A data folder of the test's own."""
    monkeypatch.setenv("EFFICIENT_TX_DATA", str(tmp_path / "data"))


def read(folder, split):
    """The examples of a split, by the docstring of lra/export.py alone."""
    for path in sorted(folder.glob(f"{split}-*.npz")):
        with np.load(path, allow_pickle=False) as shard:
            for i, label in enumerate(shard["label"]):
                example = {"label": int(label)}
                for name, offsets in (("inputs", "offsets"), ("inputs2", "offsets2"), ("mask", "offsets")):
                    if name in shard:
                        example[name] = shard[name][shard[offsets][i] : shard[offsets][i + 1]]
                yield example


def test_shards_hold_the_examples_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "SHARD", 16)
    assert export.main(["listops", f"--out={tmp_path}", *SMALL]) == 0
    folder = tmp_path / "listops"
    assert str(folder) in capsys.readouterr().out
    task = listops.get_task(train_size=40, val_size=7, test_size=5, min_len=3, max_len=30, seed=3)
    for split in ("train", "validation", "test"):
        source = getattr(task, split)
        found = list(read(folder, split))
        assert len(found) == len(source)
        for i, example in enumerate(found):
            assert example.keys() == {"inputs", "label"}
            np.testing.assert_array_equal(example["inputs"], source[i]["inputs"])
            assert example["label"] == source[i]["label"]
    assert len(list(folder.glob("train-*-of-00003.npz"))) == 3
    about = json.loads((folder / "task.json").read_text())
    assert about["options"]["seed"] == 3 and about["sizes"] == {"train": 40, "validation": 7, "test": 5}
    assert (about["vocab_size"], about["num_classes"], about["kind"]) == (16, 10, "tokens")
    sums = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == {path.name for path in folder.iterdir()} - {"SHA256SUMS"}
    for name, checksum in sums.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == checksum
    assert export.main(["listops", f"--out={tmp_path / 'again'}", *SMALL]) == 0
    assert (tmp_path / "again" / "listops" / "SHA256SUMS").read_text() == (folder / "SHA256SUMS").read_text()


@pytest.mark.parametrize("at", [0, 2, 8])
def test_the_task_may_stand_anywhere(tmp_path, at):
    arguments = ["--out", str(tmp_path), *SMALL]
    assert export.main([*arguments[:at], "listops", *arguments[at:]]) == 0
    assert json.loads((tmp_path / "listops" / "task.json").read_text())["options"]["seed"] == 3


def test_what_makes_a_task_what_it_is_cannot_be_changed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        export.main(["path-x", f"--out={tmp_path}", "--resolution=32"])
    assert "--resolution=32" in capsys.readouterr().err


def test_pairs_and_masks_are_written_too(tmp_path):
    generator = np.random.default_rng(0)

    def example(i):
        tokens = generator.integers(0, 9, i).astype(np.uint16)
        return {"inputs": tokens, "inputs2": tokens[: i // 2], "mask": tokens > 3, "label": i % 2}

    examples = [example(i) for i in range(6)]
    task = Task(examples, examples[:2], examples[3:], "token_pairs", 2, 9, 6, "toy", "here")
    export.export(task, tmp_path / "toy", {"seed": 0})
    found = list(read(tmp_path / "toy", "test"))
    for one, other in zip(found, examples[3:], strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_folder_is_whole_or_not_there(tmp_path):
    class Broken(list):
        def __getitem__(self, i):
            raise ValueError("item 3 is damaged")

    good = [{"inputs": np.arange(3), "label": 0}]
    task = Task(good, good, Broken(good), "tokens", 2, 9, 6, "toy", "here")
    with pytest.raises(ValueError, match="item 3"):
        export.export(task, tmp_path / "toy", {})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "mine").write_text("")
    with pytest.raises(FileExistsError):
        export.export(task, tmp_path / "toy", {})
    assert [path.name for path in (tmp_path / "toy").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["listpos", "--out=x"], ["'listpos'", "'listops'"]),
        (["listops"], ["--out"]),
        (["listops", "--out=x", "--train_sise=3"], ["--train_sise=3"]),
        (["listops", "--out=x", "--seed=a"], ["--seed", "'a'"]),
        (["listops", "--out=x", "--drop_brackets=perhaps"], ["'perhaps'", "true"]),
        (["listops", "--out=x", "--max_len=2"], ["max_len 2: no length"]),
        (["--data_dir", "text", "listops", "--out=x", "--max_len=2"], ["max_len 2: no length"]),
        (["text", "--out=x"], ["aclImdb", "fetch"]),
        (["retrieval-sotu", "--out=x"], ["python -m efficient_tx.data.fetch sotu"]),
        (["listops", "--out=/dev/null/x"], ["/dev/null: no folder can be made there"]),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = export.main(arguments)
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (2, 1)
    assert all(word in error for word in words)
    assert not (tmp_path / "x").exists()


def test_the_list_names_every_task_and_what_is_missing(capsys):
    states = {name: (there, where) for name, there, where in command.check()}
    assert set(states) == set(TASKS)
    assert all(states[name][0] for name in ("listops", "pathfinder", "path-x"))  # which are made here
    missing = [name for name in TASKS if not states[name][0]]
    assert {"text-spam", "retrieval-sotu", "image-fashion_mnist", "retrieval"} <= set(missing)
    for name in missing:
        assert "\n" not in states[name][1]
    with pytest.raises(SystemExit) as stopped:
        command.main(["--check", f"--data_dir={'a' * 5000}"])
    out, error = capsys.readouterr()
    assert (stopped.value.code, out, error.count("\n")) == (2, "", 1) and "File name too long" in error
    command.main(["--check"])
    out = capsys.readouterr().out
    assert all(name in out for name in TASKS) and "missing" in out


def test_the_data_need_neither_jax_nor_the_trainer():
    program = (
        "import sys; from lra import listops, text, retrieval, image, pathfinder, export, __main__; "
        "print(sorted({'jax', 'flax', 'optax', 'orbax', 'tensorflow', 'efficient_tx.training'} & set(sys.modules)))"
    )
    root = ROOT
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
