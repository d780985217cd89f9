"""Multi-query associative recall (MQAR): accuracy against the size of the state in bytes, by mixer and number of pairs.

    python benchmarks/recall.py --out=DIR --mixers=softmax,local,linear,gla,skyformer    the table: one size, 3 seeds
    python benchmarks/recall.py --out=DIR --mixers=... --pairs=4,8,16 --sizes=0,1,2 --seeds=1 --conv=4     the figure

Every run is `train.py --config=configs/recall.py:MIXER` (2 layers, 64 wide, examples of 64 tokens) in its own workdir
below DIR, with three learning rates. The one with the best mean validation accuracy is reported, by its test accuracy;
with `--again=3` it runs with further seeds, three in all. A second start resumes where the first one stopped and only
reads finished runs: a last call with all settings draws the whole picture. Mixers are causal. One without a causal form
reads both directions, where the answer is not visible either. Queries and keys have rotary positions; a mixer that has
neither gets learnt ones.

The state is what a causal decoder keeps of earlier tokens, in all layers, in float32: keys and values of all tokens
(softmax) or of the window (local); a matrix of keys × values for each head (linear, with a normaliser; gla); and with a
convolution of size c the last c − 1 projected tokens. For a mixer that cannot decode, it is what queries read instead
of the tokens, such as landmarks and their values (`Mixer.state_bytes`).
"""

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from runs import summary, train

from efficient_tx.attention import ATTENTION, Mixer, MultiHead
from efficient_tx.commands import Parser, run
from efficient_tx.files import local_path

LENGTH, LAYERS, FEATURES, HEADS = 64, 2, 64, 2
# Three sizes of state: budgets of a mixer that has one; for others heads, if they change the size of the state.
BUDGETS, MORE_HEADS = (4, 16, 48), (8, 2, 1)


class Point(NamedTuple):
    """One mixer at one size, a budget or a number of heads, on one task."""

    mixer: str
    conv: int
    pairs: int
    size: int

    @property
    def variant(self) -> type[Mixer]:
        return ATTENTION[self.mixer]

    @property
    def options(self) -> dict[str, int]:
        """Options of the mixer."""
        conv = {"conv": self.conv} if issubclass(self.variant, MultiHead) else {}
        return conv | self.variant.within(self.size)

    @property
    def heads(self) -> int:
        return HEADS if self.variant.within(1) else self.size

    def settings(self) -> dict[str, object]:
        """Keys of the config."""
        options = {f"attention.{self.mixer}.{option}": value for option, value in self.options.items()}
        causal = {} if self.variant.can_be_causal else {"model.causal": False}
        positions = {} if self.variant.has_positions else {"model.positions": "learned"}
        return {**options, "task.pairs": self.pairs, "model.heads": self.heads, **causal, **positions}

    def state_bytes(self) -> int:
        """Bytes of the state, as the module's docstring defines it."""
        shapes = nnx.eval_shape(
            lambda: self.variant(FEATURES, heads=self.heads, max_len=LENGTH, rngs=nnx.Rngs(0), **self.options)
        )
        return LAYERS * shapes.state_bytes(LENGTH)


def sizes(mixer: str) -> tuple[int, ...]:
    """The sizes of the state: values of an option that changes the state but not the parameters."""
    if ATTENTION[mixer].within(1):
        return BUDGETS
    kept = {heads: Point(mixer, 0, 1, heads).state_bytes() for heads in MORE_HEADS}
    return MORE_HEADS if len(set(kept.values())) > 1 else (HEADS,)


class Result(NamedTuple):
    """Test accuracies over seeds at the learning rate that was best on validation."""

    rate: float
    accuracies: list[float]

    def __str__(self) -> str:
        return (
            f"{np.mean(self.accuracies):.3f}  ({min(self.accuracies):.3f} to {max(self.accuracies):.3f})"
            f"  learning rate {self.rate:g}"
        )


def measure(out: Path, point: Point, rates: Sequence[float], seeds: int, again: int, steps: int) -> Result:
    """Trains a point with every rate and seed, and with the best rate up to the seed `again`."""

    def trained(rate: float, seed: int) -> dict[str, float]:
        workdir = out / f"{point.mixer}-conv{point.conv}-pairs{point.pairs}-size{point.size}-rate{rate:g}-{seed}"
        settings = point.settings() | {"optimizer.learning_rate": rate}
        train(workdir, point.mixer, config="recall", seed=seed, steps=steps, eval_every=200, **settings)
        return summary(workdir)

    runs = {rate: [trained(rate, seed) for seed in range(seeds)] for rate in rates}
    best = max(rates, key=lambda rate: np.mean([run["val_accuracy"] for run in runs[rate]]))
    runs[best] += [trained(best, seed) for seed in range(seeds, again)]
    return Result(best, [run["test_accuracy"] for run in runs[best]])


MARKS = "os^Dv<>P*Xhp"


def draw(path: Path, results: Mapping[Point, Result], baselines: Mapping[int, Mapping[str, float]]) -> None:
    """Accuracy against bytes, a panel for each number of pairs; dashed without a convolution."""
    panels = sorted({point.pairs for point in results})
    figure = Figure(figsize=(1 + 4 * len(panels), 4.5), layout="constrained")
    for axes, pairs in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels):
        mixers = dict.fromkeys(point.mixer for point in results)
        for (index, mixer), conv in itertools.product(enumerate(mixers), sorted({point.conv for point in results})):
            points = sorted(
                (point.state_bytes(), result.accuracies)
                for point, result in results.items()
                if (point.mixer, point.conv, point.pairs) == (mixer, conv, pairs)
            )
            if points:
                # Open marks of their own: two mixers that recall all with as many bytes are both seen.
                look = {"color": f"C{index}", "linestyle": "-" if conv else "--", "markerfacecolor": "none"}
                look |= {"marker": MARKS[index % len(MARKS)], "markersize": 8}
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
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=local_path, required=True, help="where the runs, recall.png and recall.json go")
    parser.add_argument("--mixers", required=True, help="by commas; a convolution is for those with projections")
    parser.add_argument("--pairs", type=numbers, default=[8], help="to be remembered, by commas")
    parser.add_argument("--sizes", type=numbers, default=[1], help="which of a mixer's sizes, 0 to 2, by commas")
    parser.add_argument("--conv", type=numbers, default=[0, 4], help="sizes of the convolution, by commas")
    parser.add_argument("--rates", type=decimals, default="0.001,0.003,0.01", help="learning rates, by commas")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting")
    parser.add_argument("--again", type=int, default=0, help="runs of the best rate, if more than --seeds")
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds={arguments.seeds}: must be at least 1")
    mixers = arguments.mixers.split(",")
    if unknown := [mixer for mixer in mixers if mixer not in ATTENTION]:
        parser.error(f"--mixers has {unknown[0]!r}: use some of {', '.join(ATTENTION)}")
    results: dict[Point, Result] = {}
    for conv, pairs, mixer, index in itertools.product(arguments.conv, arguments.pairs, mixers, arguments.sizes):
        of_mixer = sizes(mixer)
        point = Point(mixer, conv, pairs, of_mixer[min(index, len(of_mixer) - 1)])
        if point in results:
            continue
        results[point] = measure(
            arguments.out, point, arguments.rates, arguments.seeds, arguments.again, arguments.steps
        )
        print(
            f"{mixer:9s}  conv {conv}  {pairs:2d} pairs  {point.state_bytes():7,} bytes  {results[point]}", flush=True
        )
        # Guesses depend on the number of pairs only.
        baselines = {n: {"one of its values": 1 / n} for n in {point.pairs for point in results}}
        draw(arguments.out / "recall.png", results, baselines)
        rows = [{**p._asdict(), "bytes": p.state_bytes(), **result._asdict()} for p, result in results.items()]
        (arguments.out / "recall.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    run(main)
