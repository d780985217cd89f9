"""From dense to structured weights and back, on small ListOps: the accuracy after projection, tuning and densifying.

    python benchmarks/dense_and_structured.py --out=DIR [--structure=monarch] [--seeds=3] [--steps=1500]

Four models per seed, each a run of `train.py --config=configs/quickstart.py:softmax...` in a workdir below DIR: dense;
structured in MLPs and projections from the start; the dense one projected onto the structure (its accuracy at once, and
tuned for 10 % of the steps at half of the learning rate); structured for 70 % of the steps and then dense (reverse
sparsification). Prints the validation accuracy of each, mean and range over seeds, and draws curves.png. A second start
resumes where the first one stopped.
"""

import argparse

from runs import draw, last_accuracy, summary, train, validation

from efficient_tx.commands import Parser, run
from efficient_tx.files import local_path
from efficient_tx.linear import LINEAR


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=local_path, required=True, help="where the runs and curves.png go")
    parser.add_argument("--structure", default="monarch", choices=LINEAR)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model")
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    structured, steps = f"softmax+{arguments.structure}+{arguments.structure}", arguments.steps
    tuning = max(steps // 10, 1)

    kinds = ("dense", "structured", "projected", "tuned", "densified")
    workdirs = {kind: [arguments.out / f"{kind}-{seed}" for seed in range(arguments.seeds)] for kind in kinds}
    for seed, (dense, whole, projected, tuned, densified) in enumerate(zip(*workdirs.values())):
        train(dense, "softmax", seed=seed, steps=steps)
        train(whole, structured, seed=seed, steps=steps)
        # One step with learning rate 0: the evaluation is that of the projection.
        start = {"init_from": dense, "optimizer.warmup": 0}
        train(projected, structured, seed=seed, steps=1, **start, **{"optimizer.learning_rate": 0.0})
        train(tuned, structured, seed=seed, steps=tuning, **start, **{"optimizer.learning_rate": 1e-3})
        train(densified, structured, seed=seed, steps=steps, densify_at=steps * 7 // 10)

    for kind, folders in workdirs.items():
        print(f"{kind:11s} {last_accuracy(folders)}  {summary(folders[0])['parameters']:,} parameters")
    curves = {kind: [validation(folder) for folder in workdirs[kind]] for kind in ("dense", "structured", "densified")}
    draw(arguments.out / "curves.png", curves, summary(workdirs["dense"][0])["baselines"])


if __name__ == "__main__":
    run(main)
