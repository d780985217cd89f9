"""Learning curves of many models on small ListOps, in one picture: mean and range over seeds.

    python benchmarks/learning_curves.py --out=DIR [--models=softmax,skyformer+monarch,...] [--seeds=3] [--steps=1500]

Every run is `train.py --config=configs/quickstart.py:MODEL` (2 layers, 64 wide, expressions below 128 tokens) in its
own workdir below DIR. MODEL is a mixer, in which a query meets about 32 keys, landmarks or features, and after a plus
the weight structure of the MLPs. A second start resumes where the first one stopped. The printed accuracy is the
validation accuracy at the end: mean, lowest and highest seed.
"""

import argparse
import json

from runs import draw, last_accuracy, summary, train, validation

from efficient_tx.attention import ATTENTION
from efficient_tx.commands import Parser, run
from efficient_tx.files import local_path
from efficient_tx.linear import LINEAR

BUDGET = 32


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=local_path, required=True, help="where the runs, curves.png and curves.json go")
    parser.add_argument("--models", default=",".join(ATTENTION), help="MIXER or MIXER+LINEAR, by commas; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--positions", default="learned", help="of mixers with queries and keys; others: learned")
    arguments = parser.parse_args()
    models = arguments.models.split(",")
    for model in models:
        mixer, _, linear = model.partition("+")
        if mixer not in ATTENTION or linear not in ("", *LINEAR):
            choices = f"MIXER of {', '.join(ATTENTION)}, and after a + one of {', '.join(LINEAR)}"
            parser.error(f"--models has {model!r}: use a {choices}")

    curves = {}
    for model in models:
        mixer = model.partition("+")[0]
        settings = {f"attention.{mixer}.{option}": value for option, value in ATTENTION[mixer].within(BUDGET).items()}
        if ATTENTION[mixer].has_positions:
            settings["model.positions"] = arguments.positions
        workdirs = [arguments.out / f"{model}-{seed}" for seed in range(arguments.seeds)]
        for seed, workdir in enumerate(workdirs):
            train(workdir, model, seed=seed, steps=arguments.steps, **settings)
        curves[model] = [validation(workdir) for workdir in workdirs]
        about = summary(workdirs[0])
        size = f"{about['parameters']:,} parameters  {about['steps_per_second']:.1f} steps/s"
        print(f"{model:27s} {last_accuracy(workdirs)}  {size}", flush=True)
        draw(arguments.out / "curves.png", curves, about["baselines"])
        (arguments.out / "curves.json").write_text(json.dumps(curves))


if __name__ == "__main__":
    run(main)
