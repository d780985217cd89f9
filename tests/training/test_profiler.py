"""What a run says of its step, and traces of some: neither compiles anything or changes a number."""

import re

import jax
import pytest

from efficient_tx.report.flops import of_steps
from efficient_tx.training.evaluation import prefetch
from efficient_tx.training.profiler import Profiler
from tests.support import toy
from tests.support.command import finished_run, train_here
from tests.support.workdirs import config_of


@pytest.mark.slow
def test_a_profiled_run_has_a_trace_and_the_same_lines(tmp_path):
    path, out = finished_run()
    status, printed, error = train_here(tmp_path, "--profile=3:4")
    assert status == 0, error
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert f"profile of the steps up to 4: {tmp_path}/profile" in printed and "profile of" not in out
    assert toy.lines(tmp_path) == toy.lines(path)


def test_the_step_is_compiled_once_and_its_figures_are_said(tmp_path, capsys):
    compiled = []

    def note(name, seconds, **about):
        if name.endswith("backend_compile_duration"):
            compiled.append(about.get("fun_name"))

    loop = toy.make_loop(tmp_path, steps=2)
    _, state = loop._restore()
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        loop._advance(state, prefetch(loop._batches, 0, 1))
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert compiled.count("jit(_fun)") == 1, compiled
    assert "on each device" in capsys.readouterr().out


def test_a_step_at_several_lengths_has_at_most_so_many_operations(tmp_path, capsys):
    toy.make_loop(tmp_path, steps=1, lengths=2).run()
    assert re.search("matrix products and solves: at most [0-9.e+]+ FLOP a step", capsys.readouterr().out)


def test_a_run_says_the_operations_of_its_step():
    _, out = finished_run()
    settings = {"task.max_len": 24, "model.features": 16, "model.mlp_features": 32, "model.dropout": 0.1}
    each = of_steps(config_of("softmax", batch_size=8, **settings))[0].operations / len(jax.local_devices())
    assert f"matrix products and solves: {each:.3g} FLOP a step" in out
    assert "  embedding " in out and "encoder.blocks.mlp " in out


@pytest.mark.quick
def test_the_range_of_a_trace(tmp_path, monkeypatch):
    """A run that resumes within the range traces the rest; one that stops within it writes what there is."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))

    def steps(first, last):
        calls.clear()
        profiler = Profiler(tmp_path, 3, 4)
        for step in range(first, last + 1):
            profiler.before(step, None)
            calls.append(step)
            profiler.after(step, None, lambda line: None)
        profiler.close()
        return [*calls]

    assert steps(1, 5) == [1, 2, "start", 3, 4, "stop", 5]
    assert steps(4, 5) == ["start", 4, "stop", 5]
    assert steps(2, 3) == [2, "start", 3, "stop"]
    assert steps(5, 6) == [5, 6]


@pytest.mark.parametrize("text", ["3", "4:3", "0:2", "3:41", "a:b"])
def test_a_wrong_range_is_refused(text, tmp_path):
    status, _, error = train_here(tmp_path / "run", f"--profile={text}")
    assert status == 2 and f"--profile={text}: give the first and the last step to trace, of 1 to 40" in error
    assert not (tmp_path / "run" / "config.json").exists()
