"""What a run shows: plain lines or a bar, TensorBoard, wandb, the picture; and what its summary computes."""

import hashlib
import resource
import shutil
import struct
import sys
import types

import jax
import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from efficient_tx.training import curve, summary
from efficient_tx.training.errors import Refused, RunError
from efficient_tx.training.history import History
from efficient_tx.training.report import Report

TRAIN = {
    "step": 50,
    "split": "train",
    "loss": 1.25,
    "accuracy": 0.5,
    "learning_rate": 0.1,
    "grad_norm": 2.0,
    "examples_per_second": 80.0,
    "seconds": 5.0,
    "data_seconds": 0.5,
}
VALIDATION = {"step": 50, "split": "validation", "loss": 1.5, "accuracy": 0.25}


def make_report(path, *, start=0, **options):
    history = History(path / "metrics.jsonl")
    report = Report(path, history, **{"steps": 100, "batch_size": 8, "config": {"seed": 3}} | options)
    report.start(start)
    return report


def events(path):
    """All events in the folder, parsed from the record format: length, its CRC, the event, its CRC."""
    found = []
    for file in sorted(path.glob("events.out.tfevents.*")):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event, (crc,) = content[12 : 12 + length], struct.unpack("<I", content[12 + length : 16 + length])
            raw = crc32c(event)
            assert crc == (((raw >> 15) | (raw << 17)) + 0xA282EAD8) & 0xFFFFFFFF
            found.append(Event.FromString(event))
            content = content[16 + length :]
    return found


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    report = make_report(tmp_path)
    report.progress(50)
    report.add(TRAIN)
    report.add(VALIDATION)
    report.add(TRAIN | {"examples_per_second": None})
    report.close()
    # 50 steps of 8 at 80 examples a second are 5 s.
    assert capsys.readouterr().out.splitlines() == [
        "step 50/100  train  loss 1.2500  accuracy 0.5000  80 examples/s  0:00:05 left",
        "step 50/100  validation  loss 1.5000  accuracy 0.2500",
        "step 50/100  train  loss 1.2500  accuracy 0.5000  -:--:-- left",
    ]
    assert History(tmp_path / "metrics.jsonl").lines[:2] == [TRAIN, VALIDATION]


def test_the_time_left_counts_evaluations(tmp_path, monkeypatch, capsys):
    """It follows the clock since the first line, not the speed of the last interval."""
    now = [100.0]
    monkeypatch.setattr("efficient_tx.training.report.time", types.SimpleNamespace(monotonic=lambda: now[0]))
    report = make_report(tmp_path, steps=1000)
    for step, now[0] in ((100, 110.0), (200, 150.0), (300, 310.0)):
        report.add(TRAIN | {"step": step})
    report.close()
    # At first 900 steps of 8 at 80 examples a second; then 800 steps of 0.4 s; then 700 of one second.
    left = [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()]
    assert left == ["0:01:30 left", "0:05:20 left", "0:11:40 left"]


def test_a_curve_of_one_point_is_seen(tmp_path):
    """A line through it would be nothing: the same picture as without any."""
    pictures = []
    for lines in ([], [TRAIN]):
        curve.draw(tmp_path / "curve.png", lines, title="title", baselines={"constant": 0.1})
        pictures.append(matplotlib.image.imread(tmp_path / "curve.png")[..., :3])
    blue = [((image[..., 2] > 0.6) & (image[..., 0] < 0.5)).sum() for image in pictures]
    assert blue[0] == 0 and blue[1] > 20


def test_a_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    class Terminal(Console):
        def __init__(self, **options):
            super().__init__(**options, force_terminal=True, width=100)

    monkeypatch.setattr("efficient_tx.training.report.Console", Terminal)
    report = make_report(tmp_path)
    report.add(TRAIN)
    report.add(VALIDATION)
    report.progress(51)
    report.close()
    shown = capsys.readouterr().out
    assert "step 51/100" in shown and "loss 1.2500  accuracy 0.5000  80 examples/s" in shown and "0:00:05" in shown
    assert "step 50/100  validation  loss 1.5000  accuracy 0.2500" in shown
    assert "train  loss" not in shown


def test_processes_beside_the_first_are_silent(tmp_path, capsys):
    report = Report(
        tmp_path,
        History(tmp_path / "metrics.jsonl", writer=False),
        steps=1,
        batch_size=1,
        config={},
        loggers=("tensorboard",),
        active=False,
    )
    report.start(0)
    report.add(TRAIN)
    report.draw(last=True)
    report.close()
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_tensorboard_gets_every_number(tmp_path):
    report = make_report(tmp_path, loggers=("tensorboard",))
    report.add(TRAIN)
    report.add(VALIDATION)
    report.add(TRAIN | {"step": 60, "examples_per_second": None})
    # Read before the file is closed: a killed process has lost nothing.
    scalars = {
        (value.tag, event.step): value.simple_value for event in events(tmp_path) for value in event.summary.value
    }
    names = [name for name in TRAIN if name not in ("step", "split")]
    assert scalars == pytest.approx(
        {(f"train/{name}", 50): TRAIN[name] for name in names}
        | {(f"train/{name}", 60): TRAIN[name] for name in names if name != "examples_per_second"}
        | {(f"validation/{name}", 50): VALIDATION[name] for name in ("loss", "accuracy")}
    )
    report.close()


def test_tensorboard_gets_the_scores_and_the_settings_at_the_end(tmp_path):
    config = {"seed": 3, "mixers": "gla", "optimizer": {"learning_rate": 0.1, "schedule": None}, "loggers": ["a", "b"]}
    report = make_report(tmp_path, loggers=("tensorboard",), config=config)
    report.add(VALIDATION)
    report.close()
    report.summarise(100, {"val_accuracy": 0.25, "test_accuracy": 0.5, "last_test_accuracy": 0.375, "parameters": 7})
    found = {value.tag: value for event in events(tmp_path) for value in event.summary.value}
    assert found["test/accuracy"].simple_value == 0.5 and found["test/last_accuracy"].simple_value == 0.375
    content = found["_hparams_/session_start_info"].metadata.plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["mixers"].string_value == "gla" and settings["seed"].number_value == 3
    assert settings["optimizer.learning_rate"].number_value == 0.1 and "optimizer.schedule" not in settings
    assert "_hparams_/experiment" in found and found.keys() >= {"validation/accuracy"}


def test_tensorboard_hides_what_a_resumed_run_writes_again(tmp_path):
    make_report(tmp_path, loggers=("tensorboard",)).close()
    make_report(tmp_path, start=40, loggers=("tensorboard",)).close()
    starts = [event.step for event in events(tmp_path) if event.session_log.status == SessionLog.START]
    assert starts == [41]


def test_a_full_disk_ends_tensorboard_with_one_line(tmp_path):
    report = make_report(tmp_path, loggers=("tensorboard",))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(RunError, match=f"cannot write {tmp_path}.*: File too large"):
        for step in range(1000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
            try:
                report._loggers[0].write(TRAIN | {"step": step})
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_wandb_is_named_where_it_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    report = make_report(tmp_path, loggers=("wandb",))
    report.add(TRAIN)
    report.close()
    assert capsys.readouterr().out.splitlines()[0] == (
        "the logger 'wandb' is not installed (pip install wandb): going on without"
    )


def test_wandb_gets_the_lines_of_one_run(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish"), summary={}
    )
    module = types.SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", module)
    for _ in range(2):
        report = make_report(tmp_path, loggers=("wandb",))
        report.add(VALIDATION)
        report.close()
    report.summarise(50, {"val_accuracy": 0.25, "test_accuracy": 0.5})
    assert run.summary == {"test/accuracy": 0.5} and calls[-1] == "finish"
    first, line, finish, again, *_ = calls
    assert line == (50, {"validation/loss": 1.5, "validation/accuracy": 0.25}) and finish == "finish"
    assert first == again and first["config"] == {"seed": 3} and first["resume"] == "allow"
    # A new run in the same place is another; one that an older version began keeps its id, a hash of the place.
    old = hashlib.sha256(str(tmp_path.resolve()).encode()).hexdigest()[:16]
    for start in (0, 5):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        make_report(tmp_path, loggers=("wandb",), start=start)
        assert (calls[-1]["id"] == old) == bool(start) and calls[-1]["id"] != first["id"]
    (tmp_path / "wandb.json").write_text('{"id": "1"}')
    with pytest.raises(
        Refused, match=r"wandb\.json is damaged \(its CRC-32 differs .*: delete it, and this run is a new"
    ):
        make_report(tmp_path, loggers=("wandb",))


@pytest.mark.slow
def test_the_picture_shows_curves_and_baselines(tmp_path):
    lines = [TRAIN, VALIDATION, TRAIN | {"step": 90, "loss": 1.0}, VALIDATION | {"step": 90, "accuracy": 0.75}]

    def colours(lines, baselines):
        curve.draw(tmp_path / "curve.png", lines, title="title", baselines=baselines)
        image = matplotlib.image.imread(tmp_path / "curve.png")
        assert image.shape[0] > 300 and image.shape[1] > 900
        pixels = {tuple(pixel) for pixel in (image[..., :3] * 255).round().astype(int).reshape(-1, 3)}
        wanted = {
            f"C{i}": tuple((np.array(matplotlib.colors.to_rgb(f"C{i}")) * 255).round().astype(int)) for i in range(5)
        }
        return {name for name, colour in wanted.items() if colour in pixels}

    # The train curve, C0, is translucent.
    assert colours([], {}) == set()
    assert colours(lines, {}) == {"C1"}
    assert colours(lines, {"constant": 0.1, "root operator": 0.2}) == {"C1", "C2", "C3"}


def test_pictures_are_not_drawn_all_the_time(tmp_path, monkeypatch):
    now, drawn = [100.0], []
    monkeypatch.setattr("efficient_tx.training.report.time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("efficient_tx.training.report.curve.draw", lambda *_, **__: drawn.append(now[0]))
    report = make_report(tmp_path)
    for now[0] in (100.0, 109.0, 111.0):
        report.draw()
    report.draw(last=True)
    report.close()
    assert drawn == [100.0, 111.0, 111.0]


def test_speed_is_steps_over_seconds_of_all_processes():
    # 3 processes of a run: 10 steps in 5 s, 30 in 5 s, and one that only compiled.
    lines = [
        TRAIN | {"examples_per_second": 16.0, "seconds": 5.0},
        VALIDATION,
        TRAIN | {"examples_per_second": 48.0, "seconds": 5.0},
        TRAIN | {"examples_per_second": None, "seconds": 0.0},
    ]
    assert summary.steps_per_second(lines, batch_size=8) == pytest.approx(40 / 10)
    assert summary.steps_per_second(lines[3:], batch_size=8) is None


def test_peak_memory_says_of_what():
    ballast = np.ones(50_000_000)
    peak = summary.peak_memory()
    assert peak["peak_memory_of"] == "process" and ballast.nbytes < peak["peak_memory_bytes"] < 2**40


def test_parameters_are_counted():
    assert summary.parameter_count(nnx.Linear(3, 5, rngs=nnx.Rngs(0))) == 3 * 5 + 5


def test_versions_and_device_are_those_in_use():
    assert summary.versions()["jax"] == jax.__version__
    assert summary.device() == {"platform": "cpu", "kind": "cpu", "count": 4, "processes": 1}
