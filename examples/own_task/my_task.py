"""A task of your own: labelled texts in a CSV file, read byte by byte. Task and config are this one file.

Command:   cd examples/own_task
           python -m efficient_tx.train --config=my_task.py --workdir=runs/texts
           python -m efficient_tx.eval --workdir=runs/texts
Duration:  under a minute on 2 CPU cores
Expected:  test accuracy 0.90 (softmax; 0.95 with --config=my_task.py:nystromformer), one seed; the best constant answer
           has 0.55. The 200 texts are made of twenty subjects and ten verdicts and show that the parts fit together, no
           more: take texts of your own
"""

import csv
from pathlib import Path

import numpy as np

from efficient_tx.config import make_config
from efficient_tx.task import Task

KIND = "tokens"  # what an example looks like, and so which model reads it
LABELS = ("negative", "positive")


def sizes(*, max_len: int, **_) -> dict:
    """What a model has to know, from the options of `get_task` alone: no data are touched."""
    return {"num_classes": len(LABELS), "vocab_size": 257, "max_len": max_len}


def get_task(*, path: str = "texts.csv", max_len: int = 48) -> Task:
    """The keyword arguments become keys of the config: --config.task.path=..., --config.task.max_len=...

    Args:
      path: a CSV file with the columns text and label; relative to this file's folder.
      max_len: longer texts are cut.
    """
    with (Path(__file__).parent / path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    examples = [{"inputs": ids(row["text"])[:max_len], "label": LABELS.index(row["label"])} for row in rows]
    splits = [[example for i, example in enumerate(examples) if i % 5 in part] for part in ((0, 1, 2), (3,), (4,))]
    share = np.mean([example["label"] for example in splits[2]])
    return Task(
        *splits,  # train, validation, test
        kind=KIND,
        name="texts",
        source=path,
        baselines={"constant": float(max(share, 1 - share))},
        **sizes(max_len=max_len),
    )


def ids(text: str) -> np.ndarray:
    """Bytes + 1, so that id 0 stays for the padding."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 1


def get_config(argument: str = ""):
    """What follows the colon of --config=my_task.py:MIXERS+LINEAR+PROJECTIONS is the argument."""
    return make_config(
        __file__,
        argument,
        steps=300,
        batch_size=16,
        eval_every=100,
        checkpoint_every=100,
        optimizer={"learning_rate": 2e-3, "warmup": 20},
    )
