"""Image of Long Range Arena: CIFAR-10 in grey, its 1,024 pixels one by one, ten classes.

Command:   python train.py --config=configs/lra_image.py:skyformer --workdir=runs/image
           (--config.protocol=lra or skyformer for the published settings; without CIFAR-10 use Fashion-MNIST:
           python -m efficient_tx.data.fetch fashion_mnist, then --config.task.source=fashion_mnist; see lra/README.md)
Hardware:  one accelerator; or 2 CPU cores with --config.grad_accum=16, about 0.6 s per step of skyformer
Expected:  protocol skyformer: 40.77 % with skyformer, 40.57 % with softmax (Chen et al. 2021, arXiv 2111.00035,
           table 1, mean of 3 seeds); protocol lra: 42.44 % with softmax (Long Range Arena's README). Not reproduced
           here: CIFAR-10 was not available. The best constant answer scores 10 %. On Fashion-MNIST, least squares on
           the pixels scores 81.2 %.
"""

from efficient_tx.config import make_config


def get_config(argument=""):
    return make_config(
        "lra.image",
        argument,
        steps=10000,
        batch_size=64,
        optimizer={"learning_rate": 1e-3, "warmup": 500},
    )
