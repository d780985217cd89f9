"""Associative recall (MQAR) against the size of the state: which mixer keeps how many pairs in how many bytes.

    python benchmarks/recall.py --out=DIR                                    the table: one size a mixer, 3 seeds
    python benchmarks/recall.py --out=DIR --pairs=4,8,16 --sizes=0,1,2 --seeds=1 --conv=4     the figure

Every run is `train.py --config=configs/recall.py:MIXER` (2 layers, 64 wide, examples of 64 tokens) in a workdir of its
own below DIR, with three learning rates; the one with the best mean validation accuracy is reported, by its test
accuracy. Started again, it goes on where it was stopped, and what is finished is only read: so the last call of all
settings draws the whole picture. Mixers are causal, skyformer aside, which has no causal form: it sees both directions,
where the answer is not to be seen either.

The state is what a causal decoder keeps of the tokens before, in all layers, in float32: keys and values of all tokens
(softmax) or of the window (local), a matrix of keys × values for each head (linear, which has a normaliser beside it;
gla), and with a convolution of size c the last c − 1 projected tokens. In skyformer, which cannot decode, it is what
queries read instead of the tokens: landmarks and their values.
"""

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from runs import summary, train

LENGTH, LAYERS, FEATURES, HEADS = 64, 2, 64, 2
# Three sizes of state for each mixer, by an option that leaves the parameters as they are.
SIZES: dict[str, tuple[str, tuple[int, ...]]] = {
    "softmax": ("model.heads", (HEADS,)),
    "local": ("attention.local.window", (4, 16, 48)),
    "linear": ("model.heads", (8, 2, 1)),
    "gla": ("model.heads", (8, 2, 1)),
    "skyformer": ("attention.skyformer.landmarks", (4, 16, 48)),
}


class Point(NamedTuple):
    """One mixer at one size on one task."""

    mixer: str
    conv: int
    pairs: int
    size: int

    def settings(self) -> dict[str, object]:
        """Keys of the config."""
        option = SIZES[self.mixer][0]
        causal = {"model.causal": False} if self.mixer == "skyformer" else {}
        return {f"attention.{self.mixer}.conv": self.conv, "task.pairs": self.pairs, option: self.size, **causal}

    def state_bytes(self) -> int:
        """What the module's docstring counts."""
        head = FEATURES // self.size if self.mixer in ("linear", "gla") else 0
        numbers = {
            "softmax": 2 * LENGTH * FEATURES,
            "local": 2 * self.size * FEATURES,
            "linear": self.size * head * (head + 1),
            "gla": self.size * (head // 2) * head,
            "skyformer": 2 * self.size * FEATURES,
        }[self.mixer]
        projected = 2 * FEATURES if self.mixer == "gla" else 3 * FEATURES
        return 4 * LAYERS * (numbers + max(self.conv - 1, 0) * projected)


class Result(NamedTuple):
    """Test accuracies over seeds at the learning rate that was best on validation."""

    rate: float
    accuracies: list[float]

    def __str__(self) -> str:
        return (
            f"{np.mean(self.accuracies):.3f}  ({min(self.accuracies):.3f} to {max(self.accuracies):.3f})"
            f"  learning rate {self.rate:g}"
        )


def measure(out: Path, point: Point, rates: Sequence[float], seeds: int, steps: int) -> Result:
    """Trains a point with every rate and seed."""
    runs = {}
    for rate in rates:
        runs[rate] = []
        for seed in range(seeds):
            workdir = out / f"{point.mixer}-conv{point.conv}-pairs{point.pairs}-size{point.size}-rate{rate:g}-{seed}"
            settings = point.settings() | {"optimizer.learning_rate": rate}
            train(workdir, point.mixer, config="recall", seed=seed, steps=steps, eval_every=200, **settings)
            runs[rate].append(summary(workdir))
    best = max(rates, key=lambda rate: np.mean([run["val_accuracy"] for run in runs[rate]]))
    return Result(best, [run["test_accuracy"] for run in runs[best]])


def draw(path: Path, results: Mapping[Point, Result], baselines: Mapping[int, Mapping[str, float]]) -> None:
    """Accuracy against bytes, a panel for each number of pairs; dashed without a convolution."""
    panels = sorted({point.pairs for point in results})
    figure = Figure(figsize=(1 + 4 * len(panels), 4.5), layout="constrained")
    for axes, pairs in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels):
        for (index, mixer), conv in itertools.product(enumerate(SIZES), sorted({point.conv for point in results})):
            points = sorted(
                (point.state_bytes(), result.accuracies)
                for point, result in results.items()
                if (point.mixer, point.conv, point.pairs) == (mixer, conv, pairs)
            )
            if points:
                look = {"color": f"C{index}", "linestyle": "-" if conv else "--", "marker": "o" if conv else "x"}
                label = f"{mixer}, conv={conv}" if pairs == panels[0] else None
                axes.plot([x for x, _ in points], [np.mean(y) for _, y in points], label=label, **look)
        for name, accuracy in baselines[pairs].items():
            axes.axhline(accuracy, color="gray", linestyle=":", linewidth=1)
            axes.text(0.01, accuracy + 0.01, name, transform=axes.get_yaxis_transform(), fontsize=8, color="gray")
        axes.set(xlabel="state, KiB", title=f"{pairs} pairs, {LENGTH} tokens", ylim=(0, 1.03))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda size, _: f"{size / 1024:g}")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test accuracy")
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def decimals(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the runs, recall.png and recall.json go")
    parser.add_argument("--mixers", default=",".join(SIZES), help="by commas")
    parser.add_argument("--pairs", type=numbers, default=[8], help="to be remembered, by commas")
    parser.add_argument("--sizes", type=numbers, default=[1], help="which of a mixer's sizes, 0 to 2, by commas")
    parser.add_argument("--conv", type=numbers, default=[0, 4], help="sizes of the convolution, by commas")
    parser.add_argument("--rates", type=decimals, default="0.001,0.003,0.01", help="learning rates, by commas")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting")
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds={arguments.seeds}: must be at least 1")
    mixers = arguments.mixers.split(",")
    if set(mixers) - set(SIZES):
        parser.error(f"--mixers has {min(set(mixers) - set(SIZES))!r}: use some of {', '.join(SIZES)}")
    results: dict[Point, Result] = {}
    for conv, pairs, mixer, index in itertools.product(arguments.conv, arguments.pairs, mixers, arguments.sizes):
        sizes = SIZES[mixer][1]
        point = Point(mixer, conv, pairs, sizes[min(index, len(sizes) - 1)])
        if point in results:
            continue
        results[point] = measure(arguments.out, point, arguments.rates, arguments.seeds, arguments.steps)
        print(
            f"{mixer:9s}  conv {conv}  {pairs:2d} pairs  {point.state_bytes():7,} bytes  {results[point]}", flush=True
        )
        # The number of pairs is all that the guesses depend on.
        baselines = {n: {"one of its values": 1 / n} for n in {point.pairs for point in results}}
        draw(arguments.out / "recall.png", results, baselines)
        rows = [{**p._asdict(), "bytes": p.state_bytes(), **result._asdict()} for p, result in results.items()]
        (arguments.out / "recall.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
