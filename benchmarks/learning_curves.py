"""Learning curves of many mixers on small ListOps, in one picture: mean and range over seeds.

    python benchmarks/learning_curves.py --out=DIR [--mixers=softmax,skyformer,...] [--seeds=3] [--steps=1500]

Every run is `train.py --config=configs/quickstart.py:MIXER` (2 layers, 64 wide, expressions below 128 tokens) in a
workdir of its own below DIR, where a query meets about 32 keys, landmarks or features. Started again, it goes on where
it was stopped. The printed accuracy of a mixer is that of validation at the end: mean, lowest and highest seed.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from efficient_tx.attention import ATTENTION

ROOT = Path(__file__).parent.parent
MIXERS = "softmax,kernelized,skyformer,nystromformer,soft,sigmoid,lev,hyper,performer,gla,bigbird,vmean"
BUDGET = 32


def run(workdir: Path, mixer: str, seed: int, steps: int) -> None:
    """Trains one model to its end; a finished workdir is left as it is."""
    sizes = ATTENTION[mixer].within(BUDGET).items()
    command = [
        sys.executable, ROOT / "train.py", f"--config={ROOT}/configs/quickstart.py:{mixer}", f"--workdir={workdir}",
        f"--config.seed={seed}", f"--config.steps={steps}", "--config.eval_every=100", "--config.checkpoint_every=500",
        "--config.loggers=()", *(f"--config.attention.{mixer}.{option}={value}" for option, value in sizes),
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def validation(workdir: Path) -> list[tuple[int, float]]:
    """(step, accuracy) of every evaluation."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["accuracy"]) for line in lines if line["split"] == "validation"]


def draw(path: Path, curves: Mapping[str, np.ndarray], steps: list[int], baselines: Mapping[str, float]) -> None:
    """Writes the picture: accuracy `[seeds, evaluations]` of every mixer over steps."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    for index, (mixer, accuracy) in enumerate(sorted(curves.items(), key=lambda item: -item[1][:, -1].mean())):
        style = {"color": f"C{index % 10}", "linestyle": ("-", "--", ":")[index // 10 % 3]}
        axes.plot(steps, accuracy.mean(0), label=f"{mixer} ({accuracy[:, -1].mean():.3f})", **style)
        axes.fill_between(steps, accuracy.min(0), accuracy.max(0), color=style["color"], alpha=0.1, linewidth=0)
    for name, accuracy in baselines.items():
        axes.axhline(accuracy, color="gray", linestyle="-.", linewidth=1)
        axes.annotate(name, (steps[0], accuracy), textcoords="offset points", xytext=(0, 3), color="gray")
    axes.set(xlabel="step", ylabel="validation accuracy (mean and range over seeds)", title="ListOps below 128 tokens")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", title="mixer (at the end)")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the runs, curves.png and curves.json go")
    parser.add_argument("--mixers", default=MIXERS, help="names of ATTENTION, by commas")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each mixer")
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    mixers = arguments.mixers.split(",")
    unknown = [mixer for mixer in mixers if mixer not in ATTENTION]
    if unknown:
        parser.error(f"--mixers has {unknown[0]!r}: choose among {', '.join(ATTENTION)}")

    curves, steps, summary = {}, [], {}
    for mixer in mixers:
        workdirs = [arguments.out / f"{mixer}-{seed}" for seed in range(arguments.seeds)]
        for seed, workdir in enumerate(workdirs):
            run(workdir, mixer, seed, arguments.steps)
        points = [validation(workdir) for workdir in workdirs]
        steps = [step for step, _ in points[0]]
        curves[mixer] = np.array([[accuracy for _, accuracy in line] for line in points])
        summary = json.loads((workdirs[0] / "summary.json").read_text())
        last = curves[mixer][:, -1]
        scores = f"{last.mean():.3f}  ({last.min():.3f} to {last.max():.3f})"
        size = f"{summary['parameters']:,} parameters  {summary['steps_per_second']:.1f} steps/s"
        print(f"{mixer:14s} {scores}  {size}", flush=True)
        draw(arguments.out / "curves.png", curves, steps, summary["baselines"])
        values = {name: accuracy.tolist() for name, accuracy in curves.items()}
        (arguments.out / "curves.json").write_text(json.dumps({"steps": steps, "validation_accuracy": values}))


if __name__ == "__main__":
    main()
