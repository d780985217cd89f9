"""The training step of the Skyformer paper's ListOps model, as an accelerator runs it."""

from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from efficient_tx.attention import ATTENTION
from efficient_tx.models.classifier import Classifier
from efficient_tx.training.step import init_state, make_train_step, split_batch

# Chen et al. 2021, arXiv 2111.00035: 2 layers, 64 wide, 2 heads, MLP 128, dropout 0.1, batches of 32 sequences.
LENGTH, BATCH, VOCAB, CLASSES = 2048, 32, 32, 10
MIXERS = ("skyformer", "softmax")


def listops_step(mixer: str, devices: list[jax.Device], *, length: int = LENGTH, batch: int = BATCH) -> tuple[Any, ...]:
    """The mapped step (state, batch) -> state, a first state, and a batch of real tokens, for these devices."""
    model = Classifier(
        num_classes=CLASSES, vocab_size=VOCAB, max_len=length, mixers=[ATTENTION[mixer]], features=64, layers=2,
        heads=2, mlp_features=128, dropout=0.1, rngs=nnx.Rngs(0),
    )  # fmt: skip
    optimizer = optax.adamw(1e-4)
    r = np.random.default_rng(0)
    examples = {
        "inputs": r.integers(1, VOCAB, (batch, length), dtype=np.int32),
        "mask": np.ones((batch, length), bool),
        "label": r.integers(0, CLASSES, batch, dtype=np.int32),
        "weight": np.ones(batch, np.float32),
    }
    step = make_train_step(nnx.split(model)[0], optimizer, seed=0, devices=devices)
    return step, init_state(model, optimizer), split_batch(examples, devices)
