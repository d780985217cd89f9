"""The command, on tiny models; and its short runs, beside runs of `train`."""

import json
import re
import types

import pytest

from efficient_tx.config.load import ConfigFile
from efficient_tx.predict import __main__, records
from efficient_tx.predict.__main__ import command
from efficient_tx.predict.measures import MEASURES
from efficient_tx.predict.ranking import scored
from efficient_tx.training.disk import read_checked
from tests.support import toy
from tests.support.command import TINY, here, train_here
from tests.support.workdirs import config_of, write_run

RUN = [argument for argument in TINY if argument.startswith("--config.")]
QUICK = ["--config=quickstart", *RUN, "--budget=0.1"]


def predict_here(*arguments):
    return here(command, *arguments)


@pytest.mark.quick
def test_short_runs_have_the_devices_of_runs(monkeypatch):
    seen = []
    monkeypatch.setattr(__main__, "share_cores", lambda first, *others: seen.extend([first, *others]))
    monkeypatch.setattr(__main__, "build_task", lambda config: None)
    monkeypatch.setattr(__main__, "check_examples", lambda task: None)
    monkeypatch.setattr(__main__, "measure", lambda *_: {"measured": len(seen)})
    configs = [ConfigFile(f"quickstart:{name}").resolve({}) for name in ("softmax", "vmean")]
    candidates = [__main__.Candidate("t", "a method", config) for config in configs]
    rows = __main__.measured(candidates, types.SimpleNamespace(out=None, budget=0.1), print)
    assert [row["measured"] for row in rows] == [2, 2]
    assert seen == configs
    assert __main__.measured([], types.SimpleNamespace(out=None, budget=0.1), print) == []


@pytest.mark.slow
def test_a_short_run_is_the_beginning_of_the_run(tmp_path):
    """And a second call measures only what is missing."""
    out = tmp_path / "a.json"
    status, printed, error = predict_here(*QUICK, "--mixers=softmax,vmean", f"--out={out}")
    assert status == 0, error
    rows = {row["method"]: row for row in json.loads(out.read_text())["rows"]}
    status, _, error = train_here(tmp_path / "whole", "--config.log_every=1", "--config.eval_every=4")
    assert status == 0, error
    lines = toy.lines(tmp_path / "whole")
    losses = [line["loss"] for line in lines if line["split"] == "train"][:4]
    (seen,) = [line for line in lines if line["split"] == "validation" and line["step"] == 4]
    softmax = rows["softmax"]
    assert softmax["steps"] == 4 and softmax["mean_loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert (softmax["seen"], softmax["validation_loss"]) == pytest.approx((seen["accuracy"], seen["loss"]), rel=1e-6)
    summary = read_checked(tmp_path / "whole" / "summary.json")
    assert softmax["parameters"] == summary["parameters"] > rows["vmean"]["parameters"]
    assert softmax["error"] == 0 and softmax["final"] is None and {*MEASURES} <= {*softmax}

    status, printed, error = predict_here(*QUICK, "--mixers=softmax,vmean,linear", f"--out={out}")
    assert status == 0, error
    again = {row["method"]: row for row in json.loads(out.read_text())["rows"]}
    assert [again[name] for name in rows] == [*rows.values()] and len(again) == 3
    assert len(re.findall(r"│ (softmax|vmean|linear) ", printed)) == 3


@pytest.mark.quick
def test_what_a_file_knows_of_finished_runs_stays(monkeypatch, tmp_path):
    """Asked of the same method as a new one, which has no final score yet."""
    monkeypatch.setattr(__main__, "build_task", lambda config: None)
    monkeypatch.setattr(__main__, "check_examples", lambda task: None)
    monkeypatch.setattr(__main__, "measure", lambda *_: {"seen": 0.5})
    config, options = ConfigFile("quickstart:vmean").resolve({}), types.SimpleNamespace(out=tmp_path / "k", budget=0.1)
    (first,) = __main__.measured([__main__.Candidate("runs", "vmean", config, 0.75)], options, print)
    before = records.read(options.out, "out")
    (second,) = __main__.measured([__main__.Candidate("quickstart", "vmean", config)], options, print)
    assert (second["task"], second["final"], second["seen"]) == ("quickstart", None, 0.5)
    assert records.read(options.out, "out") == before == [first]


@pytest.mark.quick
def test_methods_that_began_with_others_parameters_teach_nothing(tmp_path):
    for method, test in (("vmean", 0.3), ("linear", 0.5), ("softmax", 0.6)):
        write_run(tmp_path / method, config_of(method), test=test)
    layer = {"encoder.blocks.0.mlp.up": {"name": "low_rank", "rank": 2}}
    write_run(tmp_path / "svd", config_of("softmax") | {"structure": layer, "steps": 0})
    write_run(tmp_path / "begun", config_of("pool", init_from="a/run"))
    assert {one.method.split(",")[0] for one in __main__.finished([tmp_path])} == {"vmean", "linear", "softmax"}
    assert len(list(__main__.finished([tmp_path]))) == 3


@pytest.mark.slow
def test_finished_runs_teach_and_are_scored(tmp_path):
    """Two tasks of three methods; the file that is written is one to learn from."""
    for length in (16, 24):
        for method, test in (("vmean", 0.3), ("linear", 0.5), ("softmax", 0.6)):
            config = config_of(method, **{"task.max_len": length, "task.train_size": 300, "task.val_size": 50,
                                          "task.test_size": 50, "steps": 40, "batch_size": 8,
                                          "grad_accum": 1})  # fmt: skip
            write_run(tmp_path / "runs" / f"{method}-{length}", config, test=test)
    write_run(tmp_path / "runs" / "other", config_of("pool", **{"task.max_len": 20}), test=0.5)
    out = tmp_path / "known.json"
    status, printed, error = predict_here("--score", tmp_path / "runs", "--budget=0.05", f"--out={out}")
    assert status == 0 and "it has 1 finished methods, and needs 3: it is left out" in error, error
    rows = records.read(out, "out")
    assert {row["budget"] for row in rows} == {0.05}
    tasks = records.known(rows, 0.05)
    assert [sorted(task.final) for task in tasks] == [[0.3, 0.5, 0.6]] * 2 and len({task.task for task in tasks}) == 2
    found = scored(tasks)
    assert f"{found['parameters'][0]:.2f}" in printed and "needs no predictor" in printed
    status, printed, error = predict_here(*QUICK, "--mixers=softmax,vmean", "--known", out)
    assert status == 0, error
    assert "learnt from 6 methods of 2 tasks" in printed and "on a task left out of the learning" in printed
    assert "these were measured after 0.05 of the steps, the methods here after 0.1" in printed


@pytest.mark.slow
def test_what_diverges_comes_last(tmp_path):
    wild = ["--config.optimizer.learning_rate=1e30", "--config.optimizer.warmup=0", "--config.optimizer.clip=0"]
    status, printed, error = predict_here(*QUICK, *wild, "--mixers=linear,vmean", f"--out={tmp_path}/a.json")
    assert status == 0, error
    assert "linear: the loss or a gradient of step" in printed and "is not finite" in printed


def test_what_comes_with_the_package_can_be_learnt_from():
    tasks = records.known(records.read(records.SHIPPED, "known"), 0.01)
    assert len(tasks) >= 3 and all(len(task.methods) >= 5 for task in tasks)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "--config says what to rank, --score what to learn from: use one of them"),
        (["--config=quickstart", "--score", "a"], "--config says what to rank"),
        (["--config=quickstart", "--mixers=softmax"], "--mixers: name two or more"),
        (["--config=quickstart", "--mixers=softmx,vmean"], "config.mixers is 'softmx'"),
        (["--config=quickstart:gla", "--mixers=softmax,vmean"], "--config=quickstart:gla: what follows the colon"),
        (["--config=quickstart", "--budget=2"], "argument --budget: '2' is no share of the steps"),
        (["--config=quickstart", "--budget=x"], "argument --budget: 'x' is no share of the steps"),
        (["--score", "/nowhere"], "--score=/nowhere: it is no folder of runs"),
        (["--score", "/tmp", "--mixers=gla"], "--score takes the configs of its runs"),
        (["--config=quickstart", "--out=a.csv"], "--out=a.csv: it is written as JSON"),
        (["--config=quickstart", "--out=/nowhere/a.json"], "--out=/nowhere/a.json: there is no folder /nowhere"),
        (["--config=quickstart", "--mixers=gla,vmean", "--known", "/nowhere"], "--known=/nowhere: No such file"),
        (
            ["--config=quickstart", "--mixers=gla,vmean", "--config.init_from=a"],
            "--config.init_from=a: the models here",
        ),
        (["--config=quickstart", "--mixer=gla"], "--mixer=gla is no flag: the nearest is --mixers"),
    ],
)
def test_a_mistake_is_one_line(arguments, line):
    status, printed, error = predict_here(*arguments)
    assert (status, printed) == (2, "") and line in error and error.count("\n") == 1


def test_a_file_of_something_else_is_refused(tmp_path):
    for text in ("{", "[]", '{"rows": [{"task": "a"}]}', '{"rows": [{"task": "a", "method": "b", "seen": "x"}]}'):
        (tmp_path / "a.json").write_text(text)
        status, _, error = predict_here(*QUICK, "--mixers=gla,vmean", "--known", tmp_path / "a.json")
        assert status == 2 and "it holds no measures" in error and error.count("\n") == 1
