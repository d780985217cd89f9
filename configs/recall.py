"""Recall: which value followed this key? Multi-query associative recall, and other tasks that separate mixers.

Command:   python train.py --config=configs/recall.py:linear --workdir=runs/mqar --config.attention.linear.conv=4
           (--config.task.pairs=16, --config.task.max_len=256, --config.model.causal=False for both directions;
           --config.task.kind=copy, needle, parity or count, with their options: efficient_tx/data/recall/)
Hardware:  2 CPU cores, under two minutes of processor time for softmax, including the start
Expected:  MQAR, 8 pairs in 64 tokens, test accuracy with conv=4, measured here over three seeds: softmax 100 %, linear
           99.6 to 99.7 %. At the best of three learning rates (benchmarks/recall.py): linear 99.9 to 100 %; skyformer
           with 16 landmarks, in both directions, 90 to 97 %; gla 78 to 97 %; local with a window of 16 tokens 73 to
           74 %. A guess among the 8 values scores 12.5 %

The short convolution, conv=4, lets a value see its key. Without it this takes a layer of its own (Arora et al. 2023,
arXiv 2312.04927). Rotary positions need queries and keys: `tensor`, `fourier`, `vmean` and `pool` take
--config.model.positions=learned.
"""

from efficient_tx.config import make_config


def get_config(argument=""):
    return make_config(
        "efficient_tx.data.recall",
        argument,
        steps=1000,
        batch_size=64,
        eval_every=200,
        checkpoint_every=1000,
        model={"causal": True, "dropout": 0.0, "positions": "rope"},
        optimizer={"learning_rate": 3e-3, "warmup": 100},
    )
