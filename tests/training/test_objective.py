"""Objective: a regression with float labels, whose error is better when it is lower, through the real loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.data.batching import collate, evaluation_batches
from efficient_tx.task import Objective
from efficient_tx.training import curve, objective
from efficient_tx.training.checkpoint import Checkpoints
from efficient_tx.training.evaluation import make_evaluate, trained_parameters
from efficient_tx.training.history import History
from tests.support import toy


def score(outputs, batch):
    """Squared error, and the absolute one as a metric."""
    difference, weight = outputs[:, 0] - batch["label"], batch["weight"]
    total = weight.sum()
    return {"loss": ((difference**2 * weight).sum(), total), "error": ((abs(difference) * weight).sum(), total)}


REGRESSION = Objective(score, metrics=("error",), best="error", higher_is_better=False, label_dtype="float32")


def split(count, seed):
    """The label is the share of token 1."""
    items = toy.split(count, seed)
    return [{"inputs": item["inputs"], "label": float((item["inputs"] == 1).mean())} for item in items]


TASK = dataclasses.replace(
    toy.TASK,
    train=split(40, 0),
    validation=split(30, 1),
    test=split(30, 2),
    num_classes=1,
    objective=REGRESSION,
    baselines={"mean": 0.2},
)


def errors(params, examples):
    """Of the toy model, one example at a time in numpy, without dropout."""
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(params))
    predicted = [
        params["embed"][example["inputs"]].mean(0) @ params["logits"]["kernel"][:, 0] + params["logits"]["bias"][0]
        for example in examples
    ]
    return np.array(predicted) - [example["label"] for example in examples]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("regression")
    loop = toy.make_loop(path, task=TASK, model=toy.Model(nnx.Rngs(0), outputs=1), keep=100)
    return path, loop, loop.run()


@pytest.mark.quick
def test_labels_of_a_batch_have_the_objectives_dtype():
    batch = collate(TASK.train[:4], TASK)
    assert batch["label"].dtype == np.float32 and batch["weight"].dtype == np.float32
    np.testing.assert_allclose(batch["label"], [item["label"] for item in TASK.train[:4]])
    assert collate(toy.TASK.train[:4], toy.TASK)["label"].dtype == np.int32


@pytest.mark.quick
def test_a_task_without_one_is_a_classification():
    assert objective.objective_of(toy.TASK) is objective.CLASSIFICATION
    assert objective.objective_of(TASK) is REGRESSION
    assert objective.CLASSIFICATION.names == ("loss", "accuracy") and REGRESSION.names == ("loss", "error")


def test_losses_and_errors_are_those_of_numpy(run):
    path, _, state = run
    *_, line = [line for line in toy.lines(path) if line["split"] == "validation"]
    assert set(line) == {"step", "split", "loss", "error"}
    wrong = errors(state.params, TASK.validation)
    # float32 sums of 30 terms below one.
    assert line["loss"] == pytest.approx((wrong**2).mean(), rel=1e-5)
    assert line["error"] == pytest.approx(abs(wrong).mean(), rel=1e-5)
    scores = make_evaluate(nnx.split(toy.Model(nnx.Rngs(0), outputs=1))[0], REGRESSION)(
        state.params, evaluation_batches(TASK.test, TASK, batch_size=8)
    )
    wrong = errors(state.params, TASK.test)
    assert scores.means == pytest.approx({"loss": (wrong**2).mean(), "error": abs(wrong).mean()}, rel=1e-5)
    assert scores.count == 30
    trained = [line for line in toy.lines(path) if line["split"] == "train"]
    assert all({"loss", "error", "grad_norm"} <= set(line) and "accuracy" not in line for line in trained)
    assert trained[-1]["error"] < trained[0]["error"]


def test_the_lowest_error_is_the_best_checkpoint(run):
    path, loop, _ = run
    validation = {line["step"]: line["error"] for line in toy.lines(path) if line["split"] == "validation"}
    best = min(validation, key=validation.get)
    assert History(path / "metrics.jsonl").ranked(REGRESSION)[0] == best
    said = []
    step, _, params = trained_parameters(str(path), "best", loop._stages, said.append)
    assert said == [f"{path} has no crc32.json, as in older versions: read unchecked"]  # the loop alone makes none
    assert step == best
    assert abs(errors(params, TASK.validation)).mean() == pytest.approx(validation[best], rel=1e-5)


@pytest.mark.slow
def test_the_best_checkpoint_stays_while_others_go(tmp_path):
    """Its parameters move away from where the error was least: the first of three validations."""
    options = {"learning_rate": 0.15, "warmup": 0, "schedule": "constant", "clip": 0.0, "name": "sgd"}
    plan = {"steps": 9, "eval_every": 3, "checkpoint_every": 3, "keep": 1}
    loop = toy.make_loop(tmp_path, task=TASK, model=toy.Model(nnx.Rngs(0), outputs=1), optimizer=options, **plan)
    loop.run()
    found = {line["step"]: line["error"] for line in toy.lines(tmp_path) if line["split"] == "validation"}
    assert Checkpoints(tmp_path / "checkpoints").steps() == sorted({min(found, key=found.get), 9})


@pytest.mark.quick
def test_ranking_goes_the_objectives_way(tmp_path):
    history = History(tmp_path / "metrics.jsonl")
    for step, error in [(1, 0.7), (2, 0.2), (3, 0.2), (4, 0.9)]:
        history.append({"step": step, "split": "validation", "loss": -error, "error": error})
        history.append({"step": step, "split": "train", "loss": 0.0, "error": 0.0})
    assert history.ranked(REGRESSION) == [2, 3, 1, 4]
    assert history.ranked(dataclasses.replace(REGRESSION, higher_is_better=True)) == [4, 1, 2, 3]
    assert history.ranked(dataclasses.replace(REGRESSION, best="loss")) == [4, 1, 2, 3]


@pytest.mark.quick
def test_what_is_shown_has_the_objectives_names(run_report, capsys):
    report, path = run_report
    line = {"step": 50, "split": "validation", "loss": 1.5, "error": 0.25}
    report.add(line)
    report.add(line | {"split": "train", "examples_per_second": None, "seconds": 0.0})
    report.draw(last=True)
    report.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 50/100  validation  loss 1.5000  error 0.2500",
        "step 50/100  train  loss 1.5000  error 0.2500  -:--:-- left",
    ]
    assert (path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def run_report(tmp_path):
    history = History(tmp_path / "metrics.jsonl")
    report = toy.Report(tmp_path, history, steps=100, batch_size=8, config={}, objective=REGRESSION)
    report.start(0)
    return report, tmp_path


@pytest.mark.quick
def test_the_picture_shows_the_objectives_metric(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("matplotlib.axes.Axes.set", lambda self, **labels: shown.append(labels["ylabel"]))
    lines = [{"step": 1, "split": "validation", "loss": 1.0, "error": 0.5}]
    curve.draw(tmp_path / "curve.png", lines, title="", metric="error", baselines={"mean": 0.2})
    assert shown == ["loss", "error"]


@pytest.mark.quick
def test_rows_of_weight_zero_count_nowhere_in_a_classification():
    batch = {"label": np.array([1, 99]), "weight": np.array([1.0, 0.0])}
    found = objective.classification(jnp.array([[0.0, 0.0], [jnp.nan, jnp.inf]]), batch)
    assert tuple(map(float, found["loss"])) == (pytest.approx(np.log(2)), 1.0)
    assert tuple(map(float, found["accuracy"])) == (0.0, 1.0)
