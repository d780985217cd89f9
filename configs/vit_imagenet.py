"""ImageNet-1k with the plain ViT-S/16 of Beyer et al. 2022 (arXiv 2205.01580), 90 epochs at 224 pixels.

Command:   python train.py --config=configs/vit_imagenet.py --workdir=runs/imagenet --config.dtype=bfloat16
           (300 epochs: --config.steps=371588; ImageNet in array_record, as tensorflow_datasets prepares it, in
           ~/tensorflow_datasets or --config.task.data_dir=DIR)
Hardware:  accelerators; the authors used a TPU v3 with 8 cores, 6 to 7 hours. Only two steps on small images were run
           here. Two threads of the host prepare the batches, about 170 images per second each (processor time here,
           JPEGs of 500 × 375 pixels); faster training waits for them.
Expected:  76.5 % on the validation set after 90 epochs, 80 % after 300 (google-research/big_vision,
           configs/vit_s16_i1k.py, and the paper's abstract)

Differences from the authors' code: weight decay applies to every parameter, not to matrices only; the cosine would end
a warm-up later than the run, which ends at 2 % of the peak; Adam's first moment is float32; linear layers start from
LeCun's normal distribution, not from Glorot's uniform one; mixup draws a weight for each image, and its partner from
the whole split; images are resized with antialiasing, and evaluation takes a 7/8 square of the picture in one step.
"""

from efficient_tx.config import make_config


def get_config(argument=""):
    return make_config(
        "efficient_tx.data.vision",
        argument,
        steps=111476,  # 90 epochs of 1,268,355 images
        batch_size=1024,
        eval_every=2500,
        checkpoint_every=2500,
        task={"source": "imagenet2012", "augment": "randaugment", "mixup": 0.2},
        model={
            "patch_size": 16,
            "features": 384,
            "layers": 12,
            "heads": 6,
            "mlp_features": 1536,
            "pool": "mean",
            "positions": "sincos",
            "representation": 384,
        },
        # As much as theirs at the peak: their 1e-4 is not multiplied by the learning rate, here it is 0.1 × 1e-3.
        optimizer={"learning_rate": 1e-3, "schedule": "cosine", "warmup": 10000, "weight_decay": 0.1, "clip": 1.0},
    )
