"""Fashion-MNIST with a small backbone of SOFT: three stages of 7 × 7, 4 × 4 and 2 × 2 tokens, one epoch.

Command:   python -m efficient_tx.data.fetch fashion_mnist
           python train.py --config=configs/soft_fashion.py --workdir=runs/soft_fashion
Hardware:  2 CPU cores, minutes
Expected:  88.6 % test accuracy (measured here, one seed); the best constant answer scores 10 %, the nearest class mean
           67.8 %
"""

from efficient_tx.config import make_config


def get_config(argument=""):
    config = make_config(
        "efficient_tx.data.vision",
        argument or "soft*2,softmax",
        steps=850,
        batch_size=64,
        eval_every=425,
        checkpoint_every=425,
        task={"source": "fashion_mnist"},
        model={"name": "pyramid", "features": (32, 64, 128), "depths": (1, 1, 1), "heads": (1, 2, 4)},
        optimizer={"learning_rate": 2e-3, "warmup": 100, "weight_decay": 0.05},
    )
    if "soft" in config.attention:
        config.attention.soft.update({"grid": True, "bottleneck": "convolution", "landmarks": 16, "value_conv": -1})
    return config
