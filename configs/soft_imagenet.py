"""ImageNet-1k with the backbone of SOFT (Lu et al. 2021, arXiv 2110.11945), size Tiny by default, 300 epochs.

Command:   python train.py --config=configs/soft_imagenet.py --workdir=runs/soft --config.dtype=bfloat16
           (--config.model.size=small, medium, large or huge; --config.attention.soft.symmetric_norm=True for SOFT++;
           :MIXERS by stage, as skyformer*3,softmax; data as in vit_imagenet.py)
Hardware:  accelerators; only its shapes were checked here. On the CPU use soft_fashion.py
Expected:  top-1 on the validation set 79.3 % (Tiny), 82.2 % (Small), 82.9 % (Medium), 83.1 % (Large), 83.3 % (Huge);
           SOFT++ 79.4, 82.4, 83.1, 83.3 and 83.4 % (README of fudan-zvg/SOFT)

Batch, learning rate, warm-up, weight decay, clipping and drop path are the authors' for Tiny (config/SOFT_Tiny.yaml at
413dd60, defaults of main.py at 0c9acb4, README: 8 GPUs with 128 images each). For Huge their config has a learning rate
of 2.7e-4 with 32 images per GPU. Differences: no CutMix, random erasing, label smoothing or moving average of the
weights; RandAugment and mixup are this project's (theirs: mixup 0.8, alternating with CutMix); the learning rate ends
at 0.3 % of the peak, not at 5 %; LayerNorm replaces BatchNorm; drop path drops branches, not single entries.
"""

from efficient_tx.config import make_config


def get_config(argument=""):
    config = make_config(
        "efficient_tx.data.vision",
        argument or "soft*3,softmax",
        steps=371588,  # 300 epochs of 1,268,355 images
        batch_size=1024,
        eval_every=2500,
        checkpoint_every=2500,
        task={"source": "imagenet2012", "augment": "randaugment", "mixup": 0.8},
        model={"name": "pyramid", "size": "tiny", "drop_path": 0.1},
        optimizer={"learning_rate": 1e-3, "schedule": "cosine", "warmup": 12386, "weight_decay": 0.05, "clip": 1.0},
    )
    if "soft" in config.attention:
        published = {"grid": True, "bottleneck": "convolution", "landmarks": 49, "value_conv": -1}
        config.attention.soft.update({**published, "inverse": "iteration", "iterations": 20})
    return config
