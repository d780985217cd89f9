"""CIFAR-10 with a small ViT: 64 patches of 4 × 4 pixels, flips, shifts and mixup, 200 epochs.

Command:   python train.py --config=configs/vit_cifar10.py:skyformer --workdir=runs/cifar10
           (CIFAR-10 in array_record, as tensorflow_datasets prepares it, in ~/tensorflow_datasets or
           --config.task.data_dir=DIR)
Hardware:  one accelerator
Expected:  not run here, because CIFAR-10 is not available here. 2.7 million parameters; the best constant answer
           scores 10 %
"""

from efficient_tx.config import make_config


def get_config(argument=""):
    config = make_config(
        "efficient_tx.data.vision",
        argument,
        steps=70400,  # 200 epochs of 45,000 images
        batch_size=128,
        eval_every=1760,
        checkpoint_every=1760,
        task={"source": "cifar10", "augment": "flip_crop", "mixup": 0.2},
        model={
            "patch_size": 4,
            "features": 192,
            "layers": 6,
            "heads": 3,
            "mlp_features": 768,
            "drop_path": 0.1,
            "pool": "mean",
            "positions": "sincos",
        },
        optimizer={"learning_rate": 1e-3, "warmup": 3520, "weight_decay": 0.05},
    )
    for name, key in [("skyformer", "landmarks"), ("soft", "landmarks"), ("lev", "budget")]:
        if name in config.attention:
            config.attention[name][key] = 16
    return config
