"""Pathfinder of Long Range Arena: 32 x 32 pixels as 1024 tokens; do both markers lie on one contour?

Command:   python train.py --config=configs/lra_pathfinder.py:skyformer --workdir=runs/pathfinder
           (--config.task.contour_length=6 or 9 for easier images; --config.protocol=lra or skyformer for the published
           settings). Generated images need numba: pip install -e '.[pathfinder]'
Hardware:  one accelerator; or 2 CPU cores with --config.grad_accum=16, about 1.3 s per step of skyformer, 18 hours
           (derived: 2.15 times the CPU time of a step of lra_listops.py:skyformer, measured in turns; softmax takes 4
           times as long)
Expected:  protocol skyformer: 70.73 % with skyformer, 65.26 % with softmax (Chen et al. 2021, arXiv 2111.00035,
           table 1, mean of 3 seeds); protocol lra: 71.40 % with softmax (Long Range Arena's README). Not reproduced
           here yet. Chance is 50 %, and many runs stay there.
"""

from efficient_tx.config import make_config


def get_config(argument=""):
    return make_config(
        "lra.pathfinder",
        argument,
        steps=50000,
        batch_size=128,
        model={"pool": "mean"},
        optimizer={"learning_rate": 1e-3, "warmup": 1000},
    )
