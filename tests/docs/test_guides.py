"""docs/your_own_mixer.md, your_own_score.md and your_own_task.md: their files do what the pages say."""

import dataclasses
import importlib
import re
import sys
from typing import Any

import jax
import numpy as np
import pytest

from efficient_tx.config.build import build_task
from efficient_tx.config.check import check
from efficient_tx.config.keys import section_of
from efficient_tx.config.load import ConfigFile
from efficient_tx.config.names import mixer_class, parse_mixers, task_sizes
from efficient_tx.data.batching import check_examples, collate
from efficient_tx.kernels import flash_attention
from efficient_tx.kernels.flash_attention import Mask, Score, causal, window
from efficient_tx.kernels.verify.program import compiled
from efficient_tx.kernels.verify.targets import TARGETS
from tests.docs.pages import write_files
from tests.support import ROOT
from tests.support.mixers import check_padding


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory of a new user, with the files of the pages."""
    for page in ("docs/your_own_mixer.md", "docs/your_own_score.md", "docs/your_own_task.md"):
        write_files(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("my_mixers", "my_scores"):
        monkeypatch.delitem(sys.modules, module, raising=False)  # of another folder
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
    lines = [row.split(" | ", 1)[1].strip(" |`").replace("\\|", "|") for row in table.strip().splitlines()[1:]]
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


def test_the_score_of_five_lines_is_its_formula(folder):
    """With one slope for all heads, as it comes; and the mask beside it."""
    mine = importlib.import_module("my_scores")
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 50, 2, 4))
    i, j = np.arange(50)[:, None], np.arange(50)
    logits = np.einsum("ihd,jhd->hij", q[0], k[0]) / 2 - np.log1p(abs(i - j))
    weights = np.exp(logits) * ((abs(i - j) < 32) | (j < 4))
    expected = np.einsum("hij,jhd->ihd", weights / weights.sum(-1, keepdims=True), v[0])
    with jax.enable_x64(True):
        out = flash_attention(q, k, v, score=mine.LogDistance(), mask=mine.near)
    np.testing.assert_allclose(out[0], expected, atol=1e-12)  # sums of 50 terms of order 1 in float64


@pytest.mark.parametrize(
    ("key", "value"),
    [("score", "my_scores:LogDistanse"), ("score", "alibj"), ("score", "my_scores:near"), ("mask", "near(3)")],
)
def test_mistakes_in_a_config_of_scores_print_what_the_page_says(folder, key, value):
    config = ConfigFile("quickstart:custom").resolve({f"attention.custom.{key}": value, "task.max_len": 16})
    with pytest.raises(ValueError) as error:
        check(config)
    assert_documented("docs/your_own_score.md", error.value)


@pytest.mark.aot
@pytest.mark.parametrize("target", ["h100", "v5e"])
def test_own_score_and_mask_are_kernels_of_chips_that_are_not_there(folder, target):
    """Forward and backward, with the gradient of a slope for each head."""
    mine, tokens = importlib.import_module("my_scores"), jax.ShapeDtypeStruct((1, 1024, 4, 64), np.dtype("bfloat16"))

    def loss(q, k, v, slopes):
        return flash_attention(q, k, v, score=mine.LogDistance(slopes), mask=mine.near).astype(np.float32).sum()

    gradient, slopes = jax.grad(loss, argnums=(0, 1, 2, 3)), jax.ShapeDtypeStruct((4,), np.float32)
    program = compiled(gradient, tokens, tokens, tokens, slopes, target=TARGETS[target])
    assert {kernel.name for kernel in program.kernels} == {
        "flash_attention", "flash_attention_queries", "flash_attention_keys"
    }  # fmt: skip
    assert target == "v5e" or not any(kernel.spills for kernel in program.kernels)


def test_mistakes_in_a_score_or_mask_print_what_the_page_says(folder):
    """Each line of the page that is not about a config, by a call that makes the mistake."""
    mine = importlib.import_module("my_scores")
    frozen = dataclasses.dataclass(frozen=True)

    def score(name, **members):
        return frozen(type(name, (Score,), members))()

    def mask(name, allowed, *fields):
        return frozen(type(name, (Mask,), {"allowed": allowed, "__annotations__": dict.fromkeys(fields, Any)}))

    class Plain(Score):
        slope: float = 1.0

    class Listed(Score):
        sizes: Any

    mistakes = [
        lambda: {"score": mine.LogDistance},
        lambda: {"score": Plain()},
        lambda: {"score": frozen(Listed)([1, 2])},
        lambda: {"score": mine.LogDistance(np.ones(3))},
        lambda: {"score": score("Compared", logits=lambda self, dot, *_: dot > 0)},
        lambda: {"score": score("Summed", logits=lambda self, dot, *_: dot.sum(-1, keepdims=True))},
        lambda: {"score": score("Normed", logits=lambda self, dot, q_norm, k_norm, *_: dot - q_norm - k_norm)},
        lambda: {"score": score("Unweighted", normalise=None)},
        lambda: {"mask": mask("Counted", lambda self, i, j, *_: i - j)()},
        lambda: {"mask": mask("Tabled", lambda self, i, j, *_: self.table[i] < j, "table")(np.ones(5))},
        lambda: {"mask": causal() and window(3)},
        lambda: {"mask": window},
    ]
    x, lines = np.ones((2, 5, 4, 8), np.float32), set()
    for mistake in mistakes:
        with pytest.raises((ValueError, TypeError, NotImplementedError)) as error:
            flash_attention(x, x, x, **mistake())
        assert "\n" not in str(error.value)
        assert_documented("docs/your_own_score.md", error.value)
        lines.add(str(error.value))
    assert len(lines) == len(documented("docs/your_own_score.md")) - 4  # those of a config


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
