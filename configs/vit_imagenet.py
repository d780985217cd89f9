"""ImageNet-1k with the plain ViT-S/16 of Beyer et al. 2022 (arXiv 2205.01580), 90 epochs at 224 pixels.

Command:   python train.py --config=configs/vit_imagenet.py --workdir=runs/imagenet --config.dtype=bfloat16
           (300 epochs: --config.steps=371588; ImageNet in array_record, as tensorflow_datasets prepares it, in
           ~/tensorflow_datasets or --config.task.data_dir=DIR)
Hardware:  accelerators; theirs was a TPU v3 with 8 cores, 6 to 7 hours. Nothing but two steps on small images has run
           here. Two threads of the host prepare the batches, about 170 images a second each (processor time here, JPEGs
           of 500 × 375 pixels): anything that trains faster waits for them.
Expected:  76.5 % on the validation set after 90 epochs, 80 % after 300 (google-research/big_vision,
           configs/vit_s16_i1k.py, and the paper's abstract)

What is left different from theirs: weight decay takes every parameter, not matrices only; the cosine would end a
warm-up later than the run, at 2 % of the peak; Adam's first moment is float32; linear layers start from LeCun's normal
distribution, not from Glorot's uniform one; mixup draws a share for each image, and its partner from all of the split;
images are resized with antialiasing, and evaluation takes a 7/8 square of the picture in one go.
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
        # Their weight decay of 1e-4 is what a step subtracts at the peak, whatever its learning rate: ours is times it.
        optimizer={"learning_rate": 1e-3, "schedule": "cosine", "warmup": 10000, "weight_decay": 0.1, "clip": 1.0},
    )
