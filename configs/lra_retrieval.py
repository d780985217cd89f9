"""Retrieval of Long Range Arena: do two documents belong together? Byte by byte, up to 4,000 bytes of each.

Command:   python train.py --config=configs/lra_retrieval.py:skyformer --workdir=runs/retrieval
           (--config.protocol=lra or skyformer for the published settings; without the AAN files use speeches:
           python -m efficient_tx.data.fetch sotu, then --config.task.source=sotu; see lra/README.md)
Hardware:  one accelerator; or 2 CPU cores with --config.grad_accum=16, about 2 to 3 s per step of skyformer
Expected:  protocol skyformer: 82.06 % with skyformer, 80.69 % with softmax (Chen et al. 2021, arXiv 2111.00035,
           table 1, mean of 3 seeds); protocol lra: 57.46 % with softmax (Long Range Arena's README). Not reproduced
           here: the AAN files were not available. The best constant answer scores 50 %. On speeches, the similarity
           of byte n-grams scores 63.6 %. On their first 1,024 bytes, skyformer scores 56.1 % after 1,500 steps,
           n-grams 58.6 %.
"""

from efficient_tx.config import make_config


def get_config(argument=""):
    return make_config(
        "lra.retrieval",
        argument,
        steps=5000,
        batch_size=32,
        optimizer={"learning_rate": 1e-3, "warmup": 500},
    )
