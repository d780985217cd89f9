"""Pathfinder: at which step does a mixer leave chance?

    python benchmarks/pathfinder.py --out=DIR --mixers=skyformer,softmax [--contour_length=6] [--hours=3]

Every run is `train.py --config=configs/lra_pathfinder.py:MIXER` with rotary positions in rows and columns, a
convolution of 4 pixels on queries, keys and values, no dropout, 32 images per step and 2,000 for validation. The runs
go one after the other, in the workdirs DIR/MIXER, for at most `--hours` each. A second start resumes where the first
one stopped, for the same time again.

A run has left chance at the first evaluation from which on the 95 % interval of every accuracy lies above 1/2 (with
2,000 images, above 52.2 %). At least three such evaluations are needed: at chance, one of 40 evaluations is expected
there.
"""

import argparse
import math
from collections.abc import Sequence

from runs import Curve, draw, train, validation

from efficient_tx.attention import ATTENTION
from efficient_tx.commands import Parser, run
from efficient_tx.files import local_path
from lra.pathfinder.drawing import CONTOUR_LENGTHS

IMAGES = 2000
SETTINGS = {
    "batch_size": 32,
    "task.val_size": IMAGES,
    "task.test_size": IMAGES,
    "model.positions": "rope2d",
    "model.dropout": 0.0,
    "optimizer.learning_rate": 5e-4,
    "optimizer.warmup": 500,
    "eval_every": 250,
    "checkpoint_every": 250,
}


def leaves_chance(curve: Curve, images: int) -> int | None:
    """The step from which on all accuracies, at least three, have a normal 95 % interval above 1/2; None if none is."""
    above: list[int] = []
    for step, accuracy in curve:
        lowest = accuracy - 1.96 * math.sqrt(accuracy * (1 - accuracy) / images)
        above = [*above, step] if lowest > 0.5 else []
    return above[0] if len(above) >= 3 else None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=local_path, required=True, help="where the runs and pathfinder.png go")
    parser.add_argument("--mixers", required=True, help="by commas")
    parser.add_argument("--contour_length", type=int, default=6, choices=CONTOUR_LENGTHS, help="dashes of a contour")
    parser.add_argument("--steps", type=int, default=20000, help="of a whole run")
    parser.add_argument("--hours", type=float, default=3, help="that a run may take")
    options = parser.parse_args(arguments)
    mixers = options.mixers.split(",")
    if unknown := [mixer for mixer in mixers if mixer not in ATTENTION]:
        parser.error(f"--mixers has {unknown[0]!r}: use some of {', '.join(ATTENTION)}")
    settings = SETTINGS | {"task.contour_length": options.contour_length, "steps": options.steps}
    curves = {}
    for mixer in mixers:
        workdir = options.out / mixer
        conv = {f"attention.{mixer}.conv": 4}
        train(workdir, mixer, config="lra_pathfinder", seed=0, seconds=3600 * options.hours, **settings, **conv)
        curve = validation(workdir)
        if not curve:
            print(f"{mixer:15s} not evaluated yet: start again, it goes on", flush=True)
            continue
        curves[mixer] = [curve]
        left = leaves_chance(curve, IMAGES)
        said = "still at chance" if left is None else f"left chance at step {left:,}"
        print(f"{mixer:15s} {said}; {curve[-1][1]:.4f} at step {curve[-1][0]:,}, the last of {len(curve)} evaluations")
        title = f"Pathfinder, 32 x 32 pixels, {options.contour_length} dashes"
        draw(options.out / "pathfinder.png", curves, {"chance": 0.5}, title)


if __name__ == "__main__":
    run(main)
