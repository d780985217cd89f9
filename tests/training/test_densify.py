"""train.py and eval.py on a run that starts with structured weights and ends with dense ones."""

import functools
import json
import random
import time

import pytest

from tests.support import toy
from tests.support.command import (
    SAMPLED,
    as_here,
    evaluate_here,
    finish,
    finished_run,
    scratch,
    start,
    train_here,
    wait_for_step,
)

pytestmark = pytest.mark.slow

DENSIFIED = [
    *SAMPLED, "--config.linear.mlp.name=monarch", "--config.densify_at=17", "--config.densify_warmup=5",
    "--config.optimizer.structured_lr=True", "--config.keep=100",
]  # fmt: skip


def read(path):
    return json.loads(path.read_text())


@functools.cache
def densified_run():
    """Workdir and output of a run that nothing disturbed."""
    finished_run()  # The data are there by then.
    path = scratch() / "densified"
    status, out, error = train_here(path, run=DENSIFIED)
    assert (status, error) == (0, "")
    return path, out


def validation(path, step):
    return next(line for line in toy.lines(path) if (line["step"], line["split"]) == (step, "validation"))


def test_a_run_ends_with_the_dense_model_and_is_evaluated_in_either_form():
    path, out = densified_run()
    summary = read(path / "summary.json")
    dense = summary["parameters"]
    # Two layers of 16 × 32 as Monarch with 4 blocks: 4 · 4 · 4 + 4 · 8 · 4 numbers each.
    assert f"step 17/40  {dense - 2 * (16 * 32 - 192):,} parameters become {dense:,}\n" in out
    assert out.count("first step: ") == 2
    for step in (10, 20):
        status, _, error = evaluate_here(f"--workdir={path}", f"--checkpoint={step}", "--split=validation")
        assert (status, error) == (0, "")
        result, line = read(path / f"eval_validation_{step}.json"), validation(path, step)
        assert result["accuracy"] == line["accuracy"] and result["loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert result["parameters"] == (dense if step == 20 else dense - 640)
    status, _, error = evaluate_here(f"--workdir={path}", "--checkpoint=last", "--set", "linear.mlp.blocks=2")
    assert (status, error.count("\n")) == (2, 1)
    assert "--set linear.mlp.blocks: the weights of step 40 are dense, as from step 17 on" in error


def test_killed_around_the_change_and_resumed_ends_with_the_same_lines(tmp_path):
    generator = random.Random(0)
    for _ in range(3):
        run = start("train.py", *DENSIFIED, f"--workdir={tmp_path / 'run'}", environment=as_here())
        if not (tmp_path / "run" / "metrics.jsonl").exists():
            wait_for_step(tmp_path / "run", 14)
        time.sleep(generator.uniform(0, 4))
        run.kill()
        finish(run)
    status, _, error = train_here(tmp_path / "run", run=DENSIFIED)
    assert (status, error) == (0, "")
    assert toy.lines(tmp_path / "run") == toy.lines(densified_run()[0])


def test_another_run_starts_from_either_form_of_it(tmp_path):
    """Nothing is learnt in between: what fits exactly has the accuracy of the best checkpoint."""
    path, _ = densified_run()
    source = read(path / "summary.json")
    still = ["--config.optimizer.learning_rate=0.0", "--config.steps=1", f"--config.init_from={path}"]
    status, out, error = train_here(tmp_path / "dense", *still, run=SAMPLED)
    assert (status, error) == (0, "")
    result = read(tmp_path / "dense" / "summary.json")
    assert (result["test_accuracy"], result["parameters"]) == (source["test_accuracy"], source["parameters"])
    status, out, error = train_here(tmp_path / "monarch", *still, "--config.linear.mlp.name=monarch", run=SAMPLED)
    assert (status, error) == (0, "")
    assert ("projected" in out) == (source["best_step"] >= 17)
