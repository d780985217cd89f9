"""Learning curves of many models on small ListOps, in one picture: mean and range over seeds.

    python benchmarks/learning_curves.py --out=DIR [--models=softmax,skyformer+monarch,...] [--seeds=3] [--steps=1500]

Every run is `train.py --config=configs/quickstart.py:MODEL` (2 layers, 64 wide, expressions below 128 tokens) in a
workdir of its own below DIR; MODEL is a mixer, where a query meets about 32 keys, landmarks or features, and after a
plus the weight structure of the MLPs. Started again, it goes on where it was stopped. The printed accuracy of a model
is that of validation at the end: mean, lowest and highest seed.
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
from efficient_tx.linear import LINEAR

ROOT = Path(__file__).parent.parent
MODELS = "softmax,kernelized,skyformer,nystromformer,soft,sigmoid,lev,hyper,performer,gla,bigbird,vmean"
BUDGET = 32


def run(workdir: Path, model: str, seed: int, steps: int) -> None:
    """Trains one model to its end; a finished workdir is left as it is."""
    mixer = model.partition("+")[0]
    sizes = ATTENTION[mixer].within(BUDGET).items()
    command = [
        sys.executable, ROOT / "train.py", f"--config={ROOT}/configs/quickstart.py:{model}", f"--workdir={workdir}",
        f"--config.seed={seed}", f"--config.steps={steps}", "--config.eval_every=100", "--config.checkpoint_every=500",
        "--config.loggers=()", *(f"--config.attention.{mixer}.{option}={value}" for option, value in sizes),
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def validation(workdir: Path) -> list[tuple[int, float]]:
    """(step, accuracy) of every evaluation."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["accuracy"]) for line in lines if line["split"] == "validation"]


def draw(path: Path, curves: Mapping[str, np.ndarray], steps: list[int], baselines: Mapping[str, float]) -> None:
    """Writes the picture: accuracy `[seeds, evaluations]` of every model over steps."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    for index, (model, accuracy) in enumerate(sorted(curves.items(), key=lambda item: -item[1][:, -1].mean())):
        style = {"color": f"C{index % 10}", "linestyle": ("-", "--", ":")[index // 10 % 3]}
        axes.plot(steps, accuracy.mean(0), label=f"{model} ({accuracy[:, -1].mean():.3f})", **style)
        axes.fill_between(steps, accuracy.min(0), accuracy.max(0), color=style["color"], alpha=0.1, linewidth=0)
    for name, accuracy in baselines.items():
        axes.axhline(accuracy, color="gray", linestyle="-.", linewidth=1)
        axes.annotate(name, (steps[0], accuracy), textcoords="offset points", xytext=(0, 3), color="gray")
    axes.set(xlabel="step", ylabel="validation accuracy (mean and range over seeds)", title="ListOps below 128 tokens")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", title="model (at the end)")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the runs, curves.png and curves.json go")
    parser.add_argument("--models", default=MODELS, help="MIXER or MIXER+LINEAR, by commas")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model")
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    models = arguments.models.split(",")
    for model in models:
        mixer, _, linear = model.partition("+")
        if mixer not in ATTENTION or linear not in ("", *LINEAR):
            choices = f"MIXER of {', '.join(ATTENTION)}, and after a + one of {', '.join(LINEAR)}"
            parser.error(f"--models has {model!r}: use a {choices}")

    curves, steps, summary = {}, [], {}
    for model in models:
        workdirs = [arguments.out / f"{model}-{seed}" for seed in range(arguments.seeds)]
        for seed, workdir in enumerate(workdirs):
            run(workdir, model, seed, arguments.steps)
        points = [validation(workdir) for workdir in workdirs]
        steps = [step for step, _ in points[0]]
        curves[model] = np.array([[accuracy for _, accuracy in line] for line in points])
        summary = json.loads((workdirs[0] / "summary.json").read_text())
        last = curves[model][:, -1]
        scores = f"{last.mean():.3f}  ({last.min():.3f} to {last.max():.3f})"
        size = f"{summary['parameters']:,} parameters  {summary['steps_per_second']:.1f} steps/s"
        print(f"{model:27s} {scores}  {size}", flush=True)
        draw(arguments.out / "curves.png", curves, steps, summary["baselines"])
        values = {name: accuracy.tolist() for name, accuracy in curves.items()}
        (arguments.out / "curves.json").write_text(json.dumps({"steps": steps, "validation_accuracy": values}))


if __name__ == "__main__":
    main()
