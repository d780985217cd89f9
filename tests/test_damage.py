"""Single flipped bits in every kind of file of a workdir: it is named, or the result is the same."""

import itertools
import json
import random
import shutil
from unittest import mock

import pytest

from efficient_tx.training.loop import Loop
from tests.support import toy
from tests.support.command import evaluate_here, finished_run, train_here

KINDS = (
    "metrics.jsonl", "metrics.crc32", "config.json", "crc32.json", "summary.json",
    "checkpoints/*/crc32.json", "checkpoints/*/state/**/*", "checkpoints/*/metrics.*",
)  # fmt: skip


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """The tiny run, dead in its 34th step."""
    path, calls, advance = tmp_path_factory.mktemp("unfinished") / "run", iter(range(1, 100)), Loop._advance

    def dying(self, *args):
        if next(calls) == 34:
            raise KeyboardInterrupt
        return advance(self, *args)

    with mock.patch.object(Loop, "_advance", dying):
        assert train_here(path)[0] == 130
    return path


def scores(file, *names):
    """Values in a JSON file."""
    content = json.loads(file.read_text())
    return [content[name] for name in names]


def result(path, command):
    """What a command has left."""
    if command == "train":
        return toy.lines(path), scores(path / "summary.json", "best_step", "test_accuracy", "last_test_accuracy")
    return scores(path / f"eval_test_{command}.json", "step", "accuracy", "loss")


def run(path, command):
    """Exit status, and what is said beside the usual."""
    if command == "train":
        status, out, error = train_here(path)
        return status, "\n".join(line for line in (out + error).splitlines() if not line.startswith("summary: "))
    status, _, error = evaluate_here(f"--workdir={path}", f"--checkpoint={command}")
    return status, error


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "best", "last"])
def test_no_flipped_bit_gives_another_result_in_silence(tmp_path, unfinished, command):
    """Training goes through both runs; evaluation reads the same files of both: one checkpoint of each."""
    generator, runs = random.Random(command), {"finished": finished_run()[0], "unfinished": unfinished}
    if command != "train":
        name = {"best": "finished", "last": "unfinished"}[command]
        runs = {name: runs[name]}
    expected = {}
    for name, path in runs.items():
        work = shutil.copytree(path, tmp_path / "work")
        assert run(work, command)[0] == 0
        expected[name] = result(work, command)
        shutil.rmtree(work)
    for name, kind in itertools.product(runs, KINDS):
        if (name, kind) == ("unfinished", "summary.json"):
            continue
        work = shutil.copytree(runs[name], tmp_path / "work")
        file = generator.choice(sorted(file for file in work.glob(kind) if file.is_file() and file.stat().st_size))
        content = bytearray(file.read_bytes())
        place, bit = generator.randrange(len(content)), generator.randrange(8)
        content[place] ^= 1 << bit
        file.write_bytes(content)
        status, said = run(work, command)
        parts = file.relative_to(work).parts
        named = "/".join(parts[:2]) in said
        where = (name, file, place, bit, said)
        assert status in (0, 2) and (named or (status == 0 and result(work, command) == expected[name])), where
        shutil.rmtree(work)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sweep[lr=0.1]/$x$ a", "a\\b*"])
def test_any_workdir_will_do(tmp_path, name):
    """From training to evaluation, the same as anywhere, also as the place where another run starts from."""
    path = tmp_path / name
    status, _, error = train_here(path)
    assert (status, error) == (0, "") and result(path, "train") == result(finished_run()[0], "train")
    status, out, error = evaluate_here(f"--workdir={path}")
    assert (status, error) == (0, "") and f" {path} " in out
    still = ["--config.optimizer.learning_rate=0.0", "--config.steps=1", f"--config.init_from={path}"]
    status, _, error = train_here(tmp_path / "other", *still)
    assert (status, error) == (0, "")
    accuracy = scores(path / "summary.json", "test_accuracy")
    assert scores(tmp_path / "other" / "summary.json", "test_accuracy") == accuracy
