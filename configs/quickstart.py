"""Quickstart: Skyformer learns a small ListOps (the same grammar, fewer than 128 tokens) on a laptop's CPU.

Command:   python train.py --config=configs/quickstart.py --workdir=runs/quickstart
Hardware:  2 CPU cores, 2 to 4 minutes
Expected:  50 % test accuracy (50.9 and 51.1 % measured here, one seed, on one and on two devices); the best constant
           answer scores 15 %, the best guess from the root operator 33 %
"""

from efficient_tx.config import make_config

PROTOCOLS = ("default",)  # the published settings belong to the full task: lra_listops.py


def get_config(argument=""):
    config = make_config(
        "lra.listops",
        argument or "skyformer",
        steps=1500,
        batch_size=64,
        grad_accum=4,
        eval_every=250,
        checkpoint_every=250,
        task={"train_size": 50000, "val_size": 1000, "test_size": 2000, "min_len": 8, "max_len": 128},
        model={"dropout": 0.0},
        optimizer={"learning_rate": 2e-3, "warmup": 100},
    )
    if "skyformer" in config.attention:
        config.attention.skyformer.landmarks = 32
    return config
