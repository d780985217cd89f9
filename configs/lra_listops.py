"""ListOps of Long Range Arena: nested list operations of 500 to 2000 tokens, ten classes.

Command:   python train.py --config=configs/lra_listops.py:skyformer --workdir=runs/listops
           (--config.protocol=lra or skyformer for the published settings; :MIXERS+LINEAR+PROJECTIONS for others)
Hardware:  one accelerator; or 2 CPU cores with --config.grad_accum=16, about 0.5 s per step of skyformer, 40 minutes;
           two thirds of that with --config.lengths=4
Expected:  protocol skyformer: 38.69 % with skyformer, 38.37 % with softmax (Chen et al. 2021, arXiv 2111.00035,
           table 1, mean of 3 seeds, without brackets); protocol lra: 36.37 % with softmax (Long Range Arena's README).
           Not reproduced here yet. The best constant answer scores 18.0 %, the best guess from the root operator
           35.8 %.
"""

from efficient_tx.config import make_config


def get_config(argument=""):
    return make_config(
        "lra.listops",
        argument,
        steps=5000,
        batch_size=32,
        optimizer={"learning_rate": 1e-3, "warmup": 500},
    )
