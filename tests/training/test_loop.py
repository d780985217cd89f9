"""The loop: what it writes is what a plain loop computes, whenever it is stopped and wherever it goes on."""

import itertools
import json
import os
import re
import shutil
import signal
import threading
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efficient_tx.data.batching import train_batches
from efficient_tx.training import loop as loop_module
from efficient_tx.training import metrics
from efficient_tx.training.checkpoint import Checkpoints
from efficient_tx.training.errors import Interrupted, NonFinite, Refused, RunError, place_of_nan
from efficient_tx.training.evaluation import prefetch
from efficient_tx.training.loop import Plan
from efficient_tx.training.optimizer import make_optimizer
from efficient_tx.training.report import Report
from efficient_tx.training.signals import StopSignals
from efficient_tx.training.step import clear_window, init_state, make_train_step, split_batch
from tests.support import toy

PLAN = Plan(**toy.PLAN)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nobody stopped: its folder and its last state."""
    path = tmp_path_factory.mktemp("straight")
    return path, toy.make_loop(path).run()


def steps(path):
    return Checkpoints(path / "checkpoints").steps()


def kept(path, keep=2):
    """The steps whose checkpoints stay at the end: the newest and the best, the earliest of equals."""
    validation = [line for line in toy.lines(path) if line["split"] == "validation"]
    best = max(validation, key=lambda line: (line["accuracy"], -line["step"]))["step"]
    return sorted({best, *[step for step in range(24) if PLAN.saves(step)][-keep:]})


def stop_after(monkeypatch, step):
    """A SIGTERM that arrives during `step`."""
    monkeypatch.setattr(StopSignals, "after", lambda self, done: signal.SIGTERM if done == step else self.received)


def test_lines_are_those_of_a_plain_loop(straight):
    path, final = straight
    model = toy.Model(nnx.Rngs(0))
    optimizer, schedule = make_optimizer(steps=23, learning_rate=0.05, warmup=3)
    step = make_train_step(nnx.split(model)[0], optimizer, seed=0)
    batches = train_batches(toy.TASK, batch_size=8, seed=0)
    state, seen, expected = init_state(model, optimizer), [], []
    for number in range(1, 24):
        state = step(clear_window(state), split_batch(batches[number - 1], jax.devices()))
        seen.append(metrics.means(state.window))
        if number % 4 == 0 or number == 23:
            mean = {name: np.mean([one[name] for one in seen]) for name in seen[0]}
            expected.append({"step": number, "split": "train", **mean, "learning_rate": float(schedule(number - 1))})
            seen = []
    lines = [line for line in toy.lines(path) if line["split"] == "train"]
    assert [set(line) for line in lines] == [set(line) for line in expected]
    for line, wanted in zip(lines, expected):
        # Both add up float32 numbers, in another order.
        assert {k: v for k, v in line.items() if k != "split"} == pytest.approx(
            {k: v for k, v in wanted.items() if k != "split"}, rel=1e-6
        )
    np.testing.assert_array_equal(
        final.params["logits"]["kernel"].get_value(), state.params["logits"]["kernel"].get_value()
    )


def test_validation_is_what_numpy_computes(straight):
    path, state = straight
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(state.params))
    losses, right = [], []
    for example in toy.TASK.validation:
        logits = params["embed"][example["inputs"]].mean(0) @ params["logits"]["kernel"] + params["logits"]["bias"]
        losses.append(np.log(np.exp(logits).sum()) - logits[example["label"]])
        right.append(logits.argmax() == example["label"])
    last = [line for line in toy.lines(path) if line["split"] == "validation"][-1]
    assert last["step"] == 23 and last["accuracy"] == np.mean(right)
    assert last["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_everything_happens_when_it_is_due(straight):
    path, state = straight
    assert [(line["step"], line["split"]) for line in toy.lines(path)] == [
        (4, "train"), (6, "validation"), (8, "train"), (12, "train"), (12, "validation"), (16, "train"),
        (18, "validation"), (20, "train"), (23, "train"), (23, "validation"),
    ]  # fmt: skip
    assert steps(path) == kept(path) and int(state.step) == 23
    saved = [step for step in range(1, 24) if PLAN.saves(step)]
    assert saved == [5, 6, 10, 12, 15, 18, 20, 23]


def test_fields_and_timings_of_a_line(straight):
    lines = [json.loads(text) for text in (straight[0] / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        names = {"step", "split", "loss", "accuracy"}
        if line["split"] == "train":
            names |= {"learning_rate", "grad_norm", "examples_per_second", "seconds", "data_seconds"}
            assert 0 <= line["data_seconds"] <= line["seconds"]
            counted = 3 if line["step"] in (4, 23) else 4  # the very first step compiles
            assert line["examples_per_second"] * line["seconds"] == pytest.approx(8 * counted)
        assert set(line) == names


def test_waiting_for_data_is_counted_and_compilation_is_not(tmp_path, monkeypatch):
    """By a clock that a batch moves by 2 s, a step by 3, the first by 100, saving and evaluation by 1000."""
    now = [0.0]

    def taking(seconds, call):
        def slow(*arguments, **options):
            result = call(*arguments, **options)
            now[0] += next(seconds)
            return result

        return slow

    def slow_batches(*arguments):
        for batch in prefetch(*arguments):
            now[0] += 2
            yield batch

    monkeypatch.setattr(loop_module, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(loop_module, "prefetch", slow_batches)
    loop = toy.make_loop(tmp_path, steps=12, log_every=6, eval_every=12, checkpoint_every=3)
    loop._cost = lambda state, batch: "of no interest here"
    loop._train_step = taking(itertools.chain([100], itertools.repeat(3)), loop._train_step)
    loop._save = taking(itertools.repeat(1000), loop._save)
    loop._validate = taking(itertools.repeat(1000), loop._validate)
    loop.run()
    first, second = loop._history.of("train")
    assert (first["data_seconds"], first["seconds"]) == (5 * 2, 5 * (2 + 3))
    assert (second["data_seconds"], second["seconds"]) == (6 * 2, 6 * (2 + 3))
    assert first["examples_per_second"] == second["examples_per_second"] == 8 / 5
    assert loop.compile_seconds == 100


@pytest.mark.slow
def test_the_best_checkpoint_stays_beside_the_newest(tmp_path):
    loop = toy.make_loop(tmp_path, keep=1, eval_every=3, checkpoint_every=100, optimizer={"learning_rate": 0.0})
    loop.run()
    # Without learning all validation lines are equal, and the earliest is the best.
    assert steps(tmp_path) == [3, 23]


def test_stopped_and_resumed_is_as_if_never_stopped(straight, tmp_path, monkeypatch):
    """Within a log window, after a line, at an evaluation that the signal leaves to the next process, at the end."""
    for step in (1, 4, 6, 23):
        with monkeypatch.context() as patch, pytest.raises(Interrupted, match=f"SIGTERM: step {step} of 23") as stop:
            stop_after(patch, step)
            toy.make_loop(tmp_path).run()
        assert stop.value.status == 143 and steps(tmp_path)[-1] == step
    state = toy.make_loop(tmp_path).run()
    assert toy.lines(tmp_path) == toy.lines(straight[0])
    assert steps(tmp_path) == steps(straight[0])
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(straight[1])):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.slow
def test_mfac_goes_on_with_the_gradients_that_it_had(tmp_path, monkeypatch):
    """The window of 5 has wrapped around at the stop."""
    options = {"optimizer": {"name": "mfac", "window": 5, "learning_rate": 1e-3}}
    straight = toy.make_loop(tmp_path / "straight", **options).run()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_after(patch, 13)
        toy.make_loop(tmp_path / "stopped", **options).run()
    resumed = toy.make_loop(tmp_path / "stopped", **options).run()
    assert toy.lines(tmp_path / "stopped") == toy.lines(tmp_path / "straight")
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(straight), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_finished_run_has_nothing_to_do(straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    loop = toy.make_loop(tmp_path / "run")
    assert int(loop.run().step) == 23 and loop.compile_seconds == 0.0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_signal_during_evaluation_stops_it_and_it_is_made_up_for(straight, tmp_path):
    loop = toy.make_loop(tmp_path)
    evaluate = loop.evaluate

    def interrupted(params, batches, check):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(params, batches, check)

    loop.evaluate = interrupted
    with pytest.raises(Interrupted, match="SIGINT: step 6") as stop:
        loop.run()
    assert stop.value.status == 130
    assert [line["step"] for line in toy.lines(tmp_path)] == [4]
    toy.make_loop(tmp_path).run()
    assert toy.lines(tmp_path) == toy.lines(straight[0])


def test_a_second_signal_does_not_wait():
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.after(1) == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_closed_terminal_is_a_signal_that_may_come_twice_or_be_ignored():
    """Shell and kernel both send it; nohup ignores it."""
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.after(1) == signal.SIGHUP
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.after(1) is None
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.after(2) == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_damaged_checkpoints_are_passed_over_and_the_lines_are_the_same(straight, tmp_path, capsys):
    shutil.copytree(straight[0], tmp_path / "run")
    newest = max(
        (tmp_path / "run" / "checkpoints" / "23").rglob("*"), key=lambda path: path.stat().st_size * path.is_file()
    )
    os.truncate(newest, newest.stat().st_size // 2)
    loop = toy.make_loop(tmp_path / "run")
    loop.run()
    shown = capsys.readouterr().out
    assert "checkpoints/23 is damaged" in shown and "resuming from step 20 of 23" in shown
    assert toy.lines(tmp_path / "run") == toy.lines(straight[0]) and steps(tmp_path / "run") == kept(straight[0])
    for step in steps(tmp_path / "run"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step) / "state")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(Refused, match=r"checkpoints/\d+ does not open.*no other is left"):
        toy.make_loop(tmp_path / "run").run()
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(("learning_rate", "reason"), [(1e30, "step 2 is not finite"), (1e39, "the update of step 1 ")])
def test_what_is_not_finite_is_never_saved(tmp_path, learning_rate, reason):
    optimizer = {"learning_rate": learning_rate, "warmup": 0, "schedule": "constant", "clip": 0.0}
    loop = toy.make_loop(tmp_path, checkpoint_every=1, optimizer=optimizer)
    with pytest.raises(NonFinite, match=reason) as stop:
        loop.run()
    assert stop.value.status == 3
    assert steps(tmp_path) == [1] * (learning_rate == 1e30)
    assert toy.lines(tmp_path) == []


@pytest.mark.slow
def test_a_nan_is_found_by_its_line(tmp_path):
    """What debug_nans does with the mapped step: jax runs it again, operation by operation."""

    class Broken(toy.Model):
        def __call__(self, inputs, **options):
            return super().__call__(inputs, **options) + jnp.log(-1.0 - inputs[:, :1])

    with jax.debug_nans(True), pytest.raises(FloatingPointError) as caught:
        toy.make_loop(tmp_path, model=Broken(nnx.Rngs(0))).run()
    assert any("jnp.log(-1.0 - inputs" in str(entry.statement) for entry in caught.traceback)
    path, line = re.fullmatch(r"(.*):(\d+) \(__call__\)", place_of_nan(caught.value)).groups()
    assert "jnp.log(-1.0 - inputs" in Path(path).read_text().splitlines()[int(line) - 1]


@pytest.mark.slow
@pytest.mark.parametrize(("grad_accum", "lengths"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_nan_in_a_gradient_is_found_by_the_line_of_the_forward_pass(grad_accum, lengths, monkeypatch):
    """Under pmap, within micro-batches and at several lengths: the gradient of √(0·x) is 0·∞."""
    monkeypatch.setattr("efficient_tx.training.lengths.MULTIPLE", 2)  # the examples have six tokens

    class Broken(toy.Model):
        def __call__(self, inputs, **options):
            y = super().__call__(inputs, **options)
            return y + jnp.sqrt(0.0 * y)  # here

    model, optimizer = Broken(nnx.Rngs(0)), optax.sgd(0.1)
    step = make_train_step(nnx.split(model)[0], optimizer, seed=0, grad_accum=grad_accum, lengths=lengths)
    batch = split_batch(next(iter(train_batches(toy.TASK, batch_size=8, seed=0))), jax.local_devices())
    with jax.debug_nans(True), pytest.raises(FloatingPointError) as caught:
        step(init_state(model, optimizer), batch)
    path, line = re.fullmatch(r"the gradient of (.*):(\d+) \(__call__\)", place_of_nan(caught.value)).groups()
    assert Path(path).read_text().splitlines()[int(line) - 1].endswith("# here")


@pytest.mark.slow
def test_nothing_is_lost_where_a_line_cannot_be_written(straight, tmp_path, monkeypatch):
    def full(self, line):
        if line["step"] == 16:
            raise RunError("cannot write metrics.jsonl: No space left on device")
        return append(self, line)

    append = toy.History.append
    with monkeypatch.context() as patch, pytest.raises(RunError):
        patch.setattr(toy.History, "append", full)
        toy.make_loop(tmp_path).run()
    assert steps(tmp_path) == [12, 15]
    toy.make_loop(tmp_path).run()
    assert toy.lines(tmp_path) == toy.lines(straight[0])


@pytest.mark.slow
def test_steps_neither_compile_nor_make_the_host_wait(tmp_path, monkeypatch):
    """Once each kind of event has happened, steps are dispatched only; a line, checkpoint or evaluation waits."""
    plan = {"steps": 60, "log_every": 5, "eval_every": 10, "checkpoint_every": 6}
    compiled, waits, step = [], [], 0
    real, progress = jax.block_until_ready, Report.progress

    def count(self, number):
        nonlocal step
        step = number
        progress(self, number)

    def compiles(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(step)

    monkeypatch.setattr(Report, "progress", count)
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: waits.append(step) or real(tree))
    jax.monitoring.register_event_duration_secs_listener(compiles)
    try:
        toy.make_loop(tmp_path, **plan).run()
    finally:
        jax.monitoring.clear_event_listeners()
    assert compiled and max(compiled) <= 10
    assert {wait for wait in waits if wait > 10} == {
        step for step in range(11, 61) if any(step % every == 0 for every in (5, 6, 10))
    }


@pytest.mark.slow
def test_no_thread_outlives_a_run(tmp_path):
    before = threading.active_count()
    toy.make_loop(tmp_path, steps=3).run()
    deadline = time.monotonic() + 60  # however busy the machine is, they end
    while threading.active_count() > before + 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before + 2


@pytest.mark.slow
def test_schedule_free_parameters_are_evaluated_averaged(tmp_path):
    loop = toy.make_loop(tmp_path, optimizer={"name": "schedule_free_adamw"})
    state = loop.run()
    at_training_point = loop.evaluate(state.params, loop._validation)
    line = loop._history.of("validation")[-1]
    assert line["loss"] != pytest.approx(at_training_point.means["loss"], rel=1e-4)


@pytest.mark.first(2)
@pytest.mark.parametrize("what", ["", "checkpoints", "metrics.jsonl", "metrics.crc32"])
def test_a_workdir_that_is_deleted_during_the_run_ends_it(tmp_path, monkeypatch, what):
    """At the next line or checkpoint; nothing is made again, and what is left is enough to go on where there is any."""
    path, advance, done = tmp_path / "run", loop_module.Loop._advance, iter(range(1, 100))

    def deleted(self, *args):
        if next(done) == 6:
            shutil.rmtree(path / what) if (path / what).is_dir() else (path / what).unlink()
        return advance(self, *args)

    loop = toy.make_loop(path)
    monkeypatch.setattr(loop_module.Loop, "_advance", deleted)
    with pytest.raises(RunError, match=f"{path}.* was deleted or replaced during the run") as caught:
        loop.run()
    assert caught.value.status == 1 and "\n" not in str(caught.value) and not (path / what).exists()


def test_a_run_whose_checkpoints_are_gone_says_so_and_starts_again(straight, tmp_path, capsys):
    path = shutil.copytree(straight[0], tmp_path / "run")
    shutil.rmtree(path / "checkpoints")
    assert "starting from step 0 again" not in capsys.readouterr().out
    loop = toy.make_loop(path)
    loop._restore()
    assert f"{path}/checkpoints has lost its checkpoints: starting from step 0 again" in capsys.readouterr().out


def test_damaged_lines_are_restored_before_the_run_goes_on(straight, tmp_path, monkeypatch, capsys):
    path = shutil.copytree(straight[0], tmp_path / "run")
    shutil.rmtree(path / "checkpoints" / "23")
    content = (path / "metrics.jsonl").read_bytes()
    (path / "metrics.jsonl").write_bytes(content.replace(b'"step": 8', b'"step": 9'))
    toy.make_loop(path).run()
    assert toy.lines(path) == toy.lines(straight[0])
    words = "line 3 is damaged (CRC-32 differs from metrics.crc32): restored from the checkpoint of step 20"
    assert f"{path}/metrics.jsonl: {words}" in capsys.readouterr().out
