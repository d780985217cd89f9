"""MiniLM made smaller by every method: seconds, memory, agreement with the original, and time of a forward pass.

    for name in minilm sotu spam; do python -m efficient_tx.data.fetch $name; done
    python benchmarks/minilm.py --out=DIR [--methods="svd;stat"] [--budgets=0.75,0.5,0.25] [--calibration=256]

Each method runs in a process of its own, whose largest memory is reported, on English sentences of the State of the
Union addresses; agreement is that of the embeddings of 500 other sentences: the mean cosine, and Spearman's correlation
of the similarities of all their pairs. The probe is the test accuracy of a linear classifier of embeddings of e-mails,
spam or not, fitted to 500 of them and tested on 500 others (standard error about 1 %); that of the original is in the
first lines. The compressed models see no labels, and are not trained. The forward pass is that of 32 texts of 128
tokens, in turns with the original in the same process. Budgets are of all layers of MLPs and projections: those that a
method leaves count as they are. Methods by gradients have no loss here and are left out.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import jax
import numpy as np
from flax import nnx

from efficient_tx.commands import Parser, parts, run
from efficient_tx.compare.commands.compression import budgets
from efficient_tx.compare.embeddings import agreement, embed, linear_probe
from efficient_tx.compare.flags import whole
from efficient_tx.compare.timing import machine
from efficient_tx.compression import COMPARED, compress
from efficient_tx.compression.budget import of_touched
from efficient_tx.compression.cost import multiplications, stored
from efficient_tx.compression.model import linear_layers
from efficient_tx.config.methods import named_method
from efficient_tx.data import spam
from efficient_tx.data.batching import first_examples
from efficient_tx.data.sentences import sentences
from efficient_tx.data.wordpiece import WordPiece
from efficient_tx.files import local_path
from efficient_tx.models.pretrained import pretrained_bert
from efficient_tx.task import data_directory

SENTENCES, EMAILS, ROWS, LENGTH, ROUNDS, BATCH = 500, 500, 32, 128, 9, 32


def calls(models, inputs, mask):
    """Median seconds of a forward pass of each model, in turns."""
    runs = []
    for model in models:
        graphdef, params = nnx.split(model)

        def forward(params, inputs, mask, graphdef=graphdef):
            return nnx.merge(graphdef, params).encode(inputs, mask, None)[0]

        compiled = jax.jit(forward)
        jax.block_until_ready(compiled(params, inputs, mask))
        runs.append((compiled, params))
    seconds = [[] for _ in runs]
    for _ in range(ROUNDS):
        for (compiled, params), times in zip(runs, seconds):
            began = time.perf_counter()
            jax.block_until_ready(compiled(params, inputs, mask))
            times.append(time.perf_counter() - began)
    return [statistics.median(times) for times in seconds]


def probe(model) -> float:
    """Test accuracy of a linear classifier of a model's embeddings of e-mails, spam or not."""
    task = spam.get_task(train_size=EMAILS, test_size=EMAILS, max_len=LENGTH)
    train, test = (first_examples(split, task, EMAILS) for split in (task.train, task.test))
    found, asked = (embed(model, batch["inputs"], batch["mask"]) for batch in (train, test))
    return linear_probe(found, train["label"], asked, test["label"])


def measure(name: str, budget: float, calibration: int) -> dict:
    """One method at one budget, in this process."""
    folder = data_directory() / "minilm"
    words = WordPiece(folder, max_len=LENGTH)
    texts = sentences(SENTENCES + calibration)
    model, original = (pretrained_bert(folder, num_classes=2) for _ in range(2))  # gathering calls it, with a head
    inputs, mask = words.batch(texts[SENTENCES:])
    rest = {"label": np.zeros(BATCH, np.int32), "weight": np.ones(BATCH, np.float32)}
    starts = range(0, len(inputs) - BATCH + 1, BATCH)
    batches = [{"inputs": inputs[i : i + BATCH], "mask": mask[i : i + BATCH], **rest} for i in starts]
    began = time.perf_counter()
    try:
        method = named_method(name)
        left = of_touched(method, model, budget, "mlp|projections")
        done = compress(model, method, left, batches=batches)
    except ValueError as error:
        return {"method": name, "budget": budget, "refused": str(error)}
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    asked, real = words.batch(texts[:SENTENCES])
    alike = agreement(embed(original, asked, real), embed(model, asked, real))
    full = np.full((ROWS, LENGTH), 1000)
    before, after = calls((original, model), full, np.ones(full.shape, bool))
    layers = [[layer.module for layer in linear_layers(one)] for one in (original, model)]
    return {
        "method": name, "budget": budget, "seconds": seconds, "peak_bytes": peak, "share": done.after / done.before,
        "stored": sum(map(stored, layers[1])) / sum(map(stored, layers[0])),
        "cosine": alike.cosine, "rank_correlation": alike.rank_correlation, "probe": probe(model),
        "speedup": before / after,
        "ideal": sum(map(multiplications, layers[0])) / sum(map(multiplications, layers[1])),
        "error": max(change.error for change in done.changes),
    }  # fmt: skip


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    free = [name for name in COMPARED if "gradients" not in named_method(name).needs]
    add("--out", type=local_path, required=True, help="for minilm.json; a second call goes on")
    add("--methods", type=parts, default=free, metavar="A;B", help="as of compress --method; default: as there")
    add("--budgets", type=budgets, default=(0.75, 0.5, 0.25), help="shares of the bytes; default 0.75,0.5,0.25")
    add("--calibration", type=whole, default=256, help="sentences; default 256")
    add("--one", action="store_true", help="measure here and print JSON: what each process does")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.methods[0], arguments.budgets[0], arguments.calibration)))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "minilm.json"
    if file.exists():
        known = json.loads(file.read_text())
        if "probe" not in known:
            raise SystemExit(f"{file} is of an older version, with budgets of the layers touched: use a new --out")
    else:
        known = {"probe": probe(pretrained_bert(data_directory() / "minilm", num_classes=2)), "rows": []}
    rows = known["rows"]
    print(machine(), f"the original: probe {known['probe']:.1%}", sep="\n")
    for budget in arguments.budgets:
        for name in arguments.methods:
            found = [row for row in rows if (row["method"], row["budget"]) == (name, budget)]
            if not found:
                command = [sys.executable, __file__, "--one", f"--methods={name};", f"--budgets={budget}",
                           f"--calibration={arguments.calibration}", f"--out={arguments.out}"]  # fmt: skip
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(done.stderr)
                found = [json.loads(done.stdout.splitlines()[-1])]
                rows += found
                file.write_text(json.dumps(known | {"machine": machine()}, indent=1))
            print(line(found[0]), flush=True)


def line(row: dict) -> str:
    about = f"{row['budget']:5g}  {row['method']:22s}"
    if "refused" in row:
        return f"{about} {row['refused']}"
    return (
        f"{about} {row['stored']:6.1%} of the bytes  ranks {row['rank_correlation']:.4f}  cosine {row['cosine']:.4f}  "
        f"probe {row['probe']:.1%}  "
        f"{row['seconds']:6.1f} s  {row['peak_bytes'] / 2**30:.2f} GiB  {row['speedup']:.2f} x as fast, "
        f"ideal {row['ideal']:.2f}"
    )


if __name__ == "__main__":
    run(main)
