"""Path-X of Long Range Arena: Pathfinder with 128 x 128 pixels, 16,384 tokens.

Command:   python train.py --config=configs/lra_pathx.py:skyformer --workdir=runs/pathx
           (--config.protocol=lra for the published settings). Generated images need numba: pip install -e
           '.[pathfinder]'. 200,000 images take about half an hour on 2 cores, once, and 3.3 GB of disk
Hardware:  one accelerator; use --config.grad_accum=16 or --config.remat=True if memory is short. A step has four times
           the pixels of one of lra_pathfinder.py, so about 5 s per step of skyformer on 2 CPU cores (derived)
Expected:  chance, 50 %: in protocol lra all twelve models of Long Range Arena's README fail, softmax included
"""

from efficient_tx.config import make_config


def get_config(argument=""):
    return make_config(
        "lra.pathfinder",
        argument,
        steps=50000,
        batch_size=32,
        eval_every=2500,
        task={"resolution": 128},
        model={"pool": "mean"},
        optimizer={"learning_rate": 1e-3, "warmup": 2500},
    )
