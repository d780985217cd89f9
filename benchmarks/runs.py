"""Training runs of the benchmarks, most of them on small ListOps, and their learning curves in one picture."""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
Curve = list[tuple[int, float]]


def train(
    workdir: Path,
    model: str,
    *,
    config: str = "quickstart",
    seed: int,
    steps: int,
    seconds: float | None = None,
    **settings: Any,
) -> None:
    """Trains `configs/CONFIG.py:MODEL` to its end, or for `seconds` more; a finished workdir is left as it is."""
    settings = {"seed": seed, "steps": steps, "eval_every": 100, "checkpoint_every": 500, "loggers": "()"} | settings
    command = [sys.executable, ROOT / "train.py", f"--config={ROOT}/configs/{config}.py:{model}"]
    command += [f"--workdir={workdir.absolute()}", *(f"--config.{key}={value}" for key, value in settings.items())]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    allowed = [0]
    try:
        status = run.wait(seconds)
    except subprocess.TimeoutExpired:
        run.terminate()
        status = run.wait()
        allowed += [128 + signal.SIGTERM, -signal.SIGTERM]  # it has saved its state, or had not begun
    except KeyboardInterrupt:
        run.wait()  # it gets the signal from the terminal too, and saves its state
        raise SystemExit(128 + signal.SIGINT) from None
    if status not in allowed:
        raise SystemExit(status)  # train.py has printed the reason


def validation(workdir: Path) -> Curve:
    """(step, accuracy) of every evaluation so far."""
    path = workdir / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return [(line["step"], line["accuracy"]) for line in lines if line["split"] == "validation"]


def summary(workdir: Path) -> dict[str, Any]:
    """summary.json of a finished run."""
    return json.loads((workdir / "summary.json").read_text())


def last_accuracy(workdirs: Sequence[Path]) -> str:
    """Validation accuracy at the end, "mean (lowest to highest)" over the runs."""
    last = [validation(workdir)[-1][1] for workdir in workdirs]
    return f"{np.mean(last):.3f}  ({min(last):.3f} to {max(last):.3f})"


def draw(
    path: Path,
    curves: Mapping[str, Sequence[Curve]],
    baselines: Mapping[str, float],
    title: str = "ListOps below 128 tokens",
) -> None:
    """Writes the picture: mean and range of the accuracy over the runs of each model, best model first."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    accuracies = {name: np.array([[accuracy for _, accuracy in run] for run in runs]) for name, runs in curves.items()}
    steps = {name: [step for step, _ in runs[0]] for name, runs in curves.items()}
    for index, name in enumerate(sorted(curves, key=lambda name: -accuracies[name][:, -1].mean())):
        accuracy = accuracies[name]
        style = {"color": f"C{index % 10}", "linestyle": ("-", "--", ":")[index // 10 % 3]}
        style["marker"] = "o" if len(steps[name]) == 1 else None  # a line through one point is nothing
        axes.plot(steps[name], accuracy.mean(0), label=f"{name} ({accuracy[:, -1].mean():.3f})", **style)
        low, high = accuracy.min(0), accuracy.max(0)
        axes.fill_between(steps[name], low, high, color=style["color"], alpha=0.1, linewidth=0)
    first = min(min(values) for values in steps.values())
    for name, accuracy in baselines.items():
        axes.axhline(accuracy, color="gray", linestyle="-.", linewidth=1)
        axes.annotate(name, (first, accuracy), textcoords="offset points", xytext=(0, 3), color="gray")
    axes.set(xlabel="step", ylabel="validation accuracy (mean and range over seeds)", title=title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", title="model (at the end)")
    figure.savefig(path, dpi=120)
