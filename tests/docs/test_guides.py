"""docs/your_own_mixer.md and docs/your_own_task.md: their files do what the pages say."""

import importlib
import re
import sys

import jax
import numpy as np
import pytest

from efficient_tx.config.build import build_task
from efficient_tx.config.keys import section_of
from efficient_tx.config.load import ConfigFile
from efficient_tx.config.names import mixer_class, parse_mixers, task_sizes
from efficient_tx.data.batching import check_examples, collate
from tests.docs.pages import write_files
from tests.support import ROOT
from tests.support.mixers import check_padding


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory of a new user, with the files of both pages."""
    for page in ("docs/your_own_mixer.md", "docs/your_own_task.md"):
        write_files(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_mixers", raising=False)  # of another folder
    return tmp_path


def test_own_mixers_keep_the_promises_of_padding(folder):
    assert parse_mixers("my_mixers:Shift,softmax") == ["my_mixers:Shift", "softmax"]
    check_padding(mixer_class("my_mixers:SquaredReLU"))
    q = np.random.default_rng(0).normal(size=(3, 1, 6, 1, 4)).astype(np.float32)
    weights = np.maximum(q[0, 0, :, 0] @ q[1, 0, :, 0].T, 0) ** 3
    weights /= np.maximum(weights.sum(1, keepdims=True), 1e-6)
    out = importlib.import_module("my_mixers").squared_relu(*q, power=3)
    np.testing.assert_allclose(out[0, :, 0], weights @ q[2, 0, :, 0], rtol=1e-4, atol=1e-6)  # float32


def test_own_task_is_read_from_its_csv(folder):
    task = build_task(ConfigFile("my_task.py").resolve({}))
    assert [len(split) for split in (task.train, task.validation, task.test)] == [2, 2, 2]
    assert bytes(np.array(task.train[0]["inputs"] - 1, np.uint8)) == b"this is a good film"
    assert [task.train[0]["label"], task.train[1]["label"]] == [1, 0]


def test_own_objective_is_a_regression(folder):
    task = build_task(ConfigFile("my_ratings.py").resolve({}))
    batch = collate([*task.train[:2], task.train[0]], task)
    batch["weight"][2] = 0  # fills up the batch
    assert batch["label"].dtype == np.float32
    outputs = np.array([[4.0], [1.0], [np.nan]], np.float32)  # labels are 5 and 4
    sums = jax.tree.map(float, task.objective.score(outputs, batch))
    assert sums == {"loss": (1.0 + 9.0, 2.0), "error": (1.0 + 3.0, 2.0)}


def documented(page):
    """The lines of a page's table of mistakes, as patterns: "..." stands for anything."""
    table = (ROOT / page).read_text(encoding="utf-8").split("| mistake | line |")[1].split("\n\n")[0]
    lines = [row.split(" | ", 1)[1].strip(" |`") for row in table.strip().splitlines()[1:]]
    return [re.escape(line).replace(re.escape("..."), ".*") for line in lines]


def assert_documented(page, error):
    line = " ".join(str(error).split())
    assert any(re.match(pattern, line) for pattern in documented(page)), f"{page} has no such line: {line}"


@pytest.mark.parametrize(
    ("config", "typed"),
    [
        ("quickstart:my_mixer:SquaredReLU", {}),
        ("quickstart:my_mixers:SquaredRelu", {}),
        ("quickstart:SquaredReLU", {}),
        ("quickstart:my_mixers:Plain", {}),
        ("quickstart:my_mixers:SquaredReLU", {"attention.SquaredReLU.powr": 3}),
    ],
)
def test_mistakes_in_a_mixer_print_what_the_page_says(folder, config, typed):
    with (folder / "my_mixers.py").open("a") as file:
        file.write("\n\nclass Plain:\n    pass\n")
    importlib.invalidate_caches()
    sys.modules.pop("my_mixers", None)
    with pytest.raises(ValueError) as error:
        made = ConfigFile(config).config()
        for key in typed:
            section_of(made, key)
    message = getattr(error.value, "rule", error.value)  # the flag stands in front of the rest
    assert_documented("docs/your_own_mixer.md", message)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("KIND = ", "KINDS = "),
        ('KIND = "tokens"', 'KIND = "token"'),
        ("texts.csv", "text.csv"),
        ('"num_classes": len(LABELS)', '"num_classes": 3 if _ else 2'),
        ("return Task(", "return dict(train=0) or Task("),
        ("max_len: int = 64):", "max_len: int = 64, seed):"),
        ("max_len, **_", "max_len"),
        ('LABELS = ("negative"', 'LABELS = ("neutral"'),
        (', "max_len": max_len}', "}"),
        ("LABELS.index(", "2 * LABELS.index("),
        ('index(row["label"])', 'index(row["label"]) / 2'),
        ("np.int32(1)", "np.float64(1)"),
        ('"label": LABELS', '"labels": LABELS'),
        ("for i in range(3)", "for i in (0, 1, 9)"),
    ],
)
def test_mistakes_in_a_task_print_what_the_page_says(folder, old, new):
    path = folder / "my_task.py"
    text = path.read_text(encoding="utf-8").replace("__file__", '"my_task.py"')
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises((ValueError, OSError)) as error:
        config = ConfigFile("my_task.py").resolve({})
        task_sizes(config.task)
        check_examples(build_task(config))
    message = getattr(error.value, "rule", error.value)
    assert_documented("docs/your_own_task.md", re.sub(r"'[^']*/my_task.py'", "'my_task.py'", str(message)))
