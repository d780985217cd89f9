"""Protocols: the settings of published numbers, per task. Numbers of different protocols must not be compared.

`lra` are the official settings of Long Range Arena (google-research/long-range-arena cd31e5c, `*/configs/base_*.py`).
`skyformer` are those of the Skyformer paper's code (pkuzengqi/Skyformer 1a677cb, `src/config.py`). `default` are those
of the config file.

Some differences from the original code remain under these settings.

  Both: read files; here data are generated. They average over masked positions too, that is over padding and black
    pixels. They apply dropout to attention weights and hidden units of the MLPs too; here dropout acts on the outputs
    only. They draw learnt positions with a standard deviation of .02 (Skyformer's code word embeddings too); here it is
    1.
  Skyformer: cycles Adam's b1 with the learning rate. It keeps the best checkpoint only after a fifth of the steps. It
    draws landmarks with replacement, and draws again in evaluation. It takes six iterations to the inverse; here a
    Cholesky solve gives it (`attention.skyformer.inverse=iteration` iterates, from another start).
  Long Range Arena: drops attention weights at another rate than the rest for Image (.2, rest .3) and Pathfinder (.1,
    rest .2). It has Xavier weights, and no biases in attention. A class token starts at zero and has a position. For
    Retrieval it pools the first position of encoders without a class token; "cls" here adds one.
"""

from collections.abc import Mapping
from typing import Any

from efficient_tx.checks import OptionError, one_of

# Long Range Arena, every task. Adam has decoupled weight decay, as in flax.optim.
LRA = {
    "model.causal": False,
    "model.norm": "layer",
    "model.mlp": "gelu",
    "optimizer.name": "adamw",
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.98,
    "optimizer.eps": 1e-9,
}

# Long Range Arena: ListOps, Text and Retrieval.
LRA_SEQUENCES = {
    **LRA,
    "model.layers": 4,
    "model.dropout": 0.1,
    "model.positions": "sinusoidal",
    "model.pool": "cls",
    "batch_size": 32,
    "optimizer.learning_rate": 0.05,
    "optimizer.schedule": "rsqrt",
    "optimizer.weight_decay": 0.1,
    "optimizer.clip": 0.0,
}

LISTOPS = {
    "task.train_size": 96000,
    "task.val_size": 2000,
    "task.test_size": 2000,
    "task.min_len": 500,
    "task.max_len": 2000,
}

PATHFINDER = {
    "task.train_size": 160000,
    "task.val_size": 20000,
    "task.test_size": 20000,
    "task.contour_length": 14,
    "task.legacy_mask": True,  # their mask is inputs > 0: black pixels count as padding
}

# Long Range Arena: Pathfinder and Path-X.
LRA_PATHFINDER = {
    **LRA,
    **PATHFINDER,
    "model.features": 32,
    "model.mlp_features": 32,
    "model.pool": "mean",
    "optimizer.learning_rate": 1e-3,
    "optimizer.schedule": "cosine",
    "optimizer.weight_decay": 0.0,
}

TEXT = {
    "task.train_size": 25000,
    "task.test_size": 25000,
    "task.max_len": 4000,  # from the paper's table; base_text_classification_config.py says 1000
    "task.validation": "test",  # both codes choose their checkpoint on test reviews
}

RETRIEVAL = {
    "task.train_size": 147086,
    "task.val_size": 18090,
    "task.test_size": 17437,
    "task.max_len": 4000,
}

IMAGE = {
    "task.train_size": 45000,
    "task.val_size": 5000,
    "task.test_size": 10000,
    "task.legacy_mask": True,  # their mask is inputs > 0: black pixels count as padding
}

# Options of a mixer apply only to runs with that mixer.
SKYFORMER = {
    "attention.skyformer.landmarks": 128,
    "attention.skyformer.ridge": 0.1,
    "attention.linformer.rank": 128,
    "attention.performer.random_features": 128,
    "attention.nystromformer.landmarks": 128,
    "attention.nystromformer.value_conv": 0,
    "model.causal": False,
    "model.layers": 2,
    "model.features": 64,
    "model.heads": 2,
    "model.head_dim": 32,
    "model.mlp_features": 128,
    "model.dropout": 0.1,
    "model.positions": "learned",
    "model.pool": "mean",
    "model.norm": "layer",
    "model.mlp": "gelu",
    "steps": 50000,
    "optimizer.name": "adamw",
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.eps": 1e-6,
    "optimizer.weight_decay": 0.0,
    "optimizer.schedule": "one_cycle",
    "optimizer.clip": 1.0,
    "optimizer.clip_by": "value",
}

PROTOCOLS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "lra": {
        "lra.listops": {
            **LRA_SEQUENCES,
            **LISTOPS,
            "task.drop_brackets": False,
            "model.heads": 8,
            "model.head_dim": 64,
            "model.features": 512,
            "model.mlp_features": 1024,
            "steps": 5000,
            "eval_every": 50,
            "optimizer.warmup": 1000,
        },
        "lra.pathfinder 32": {
            **LRA_PATHFINDER,
            "model.layers": 4,
            "model.heads": 4,
            "model.head_dim": 4,
            "model.dropout": 0.2,
            "model.positions": "sinusoidal",
            "steps": 62400,
            "batch_size": 512,
            "eval_every": 312,
            "optimizer.warmup": 312,
            "optimizer.clip": 0.0,
        },
        "lra.pathfinder 128": {
            **LRA_PATHFINDER,
            "model.layers": 1,
            "model.heads": 2,
            "model.head_dim": 8,
            "model.dropout": 0.1,
            "model.positions": "learned",
            "steps": 500000,
            "batch_size": 64,
            "eval_every": 2500,
            "optimizer.warmup": 2500,
            "optimizer.clip": 1.0,
            "optimizer.clip_by": "norm",
        },
        "lra.text": {
            **LRA_SEQUENCES,
            **TEXT,
            "task.val_size": 25000,
            "model.heads": 4,
            "model.head_dim": 64,
            "model.features": 256,
            "model.mlp_features": 1024,
            "steps": 20000,
            "eval_every": 100,
            "optimizer.warmup": 8000,
        },
        "lra.retrieval": {
            **LRA_SEQUENCES,
            **RETRIEVAL,
            "model.heads": 4,
            "model.head_dim": 32,
            "model.features": 128,
            "model.mlp_features": 512,
            "model.pair_head": "concatenation",
            "steps": 5000,
            "eval_every": 100,
            "optimizer.warmup": 8000,
        },
        "lra.image": {
            **LRA,
            **IMAGE,
            "model.layers": 1,
            "model.heads": 8,
            "model.head_dim": 8,
            "model.features": 128,
            "model.mlp_features": 128,
            "model.dropout": 0.3,
            "model.positions": "learned",
            "model.pool": "cls",
            "steps": 35000,
            "batch_size": 256,
            "eval_every": 175,
            "optimizer.learning_rate": 5e-4,
            "optimizer.schedule": "cosine",
            "optimizer.warmup": 175,
            "optimizer.weight_decay": 0.0,
            "optimizer.clip": 0.0,
        },
    },
    "skyformer": {
        "lra.listops": {
            **SKYFORMER,
            **LISTOPS,
            "task.drop_brackets": True,  # their pipeline is older than the fix of 2021-06-10
            "batch_size": 32,
            "eval_every": 500,
            "optimizer.learning_rate": 1e-4,
            "optimizer.warmup": 1000,
        },
        "lra.pathfinder 32": {
            **SKYFORMER,
            **PATHFINDER,
            "batch_size": 128,
            "eval_every": 500,
            "optimizer.learning_rate": 2e-4,
            "optimizer.warmup": 312,
        },
        "lra.text": {
            **SKYFORMER,
            **TEXT,
            "task.val_size": 6400,  # 200 batches; theirs cycle through the test reviews: each evaluation takes the next
            "batch_size": 32,
            "eval_every": 500,
            "optimizer.learning_rate": 1e-4,
            "optimizer.warmup": 80,
        },
        "lra.retrieval": {
            **SKYFORMER,
            **RETRIEVAL,
            "task.val_size": 4800,  # 300 batches; theirs cycle through the validation pairs
            "model.pair_head": "interaction",
            "batch_size": 16,
            "eval_every": 1000,
            "optimizer.learning_rate": 2e-4,
            "optimizer.warmup": 800,
        },
        "lra.image": {
            **SKYFORMER,
            **IMAGE,
            "batch_size": 256,
            "eval_every": 50,
            "optimizer.learning_rate": 1e-4,
            "optimizer.warmup": 175,
        },
    },
}

# Sources that replace the original data of a protocol: always a departure from it.
STAND_INS = {"generated", "spam", "sotu", "fashion_mnist"}

# Keys that change how a run is carried out, not what it computes: never a departure from a protocol.
HOUSEKEEPING = {
    "seed",
    "grad_accum",
    "lengths",
    "remat",
    "checkpoint_every",
    "log_every",
    "keep",
    "loggers",
    "debug_nans",
    "task.data_dir",
}


def key(task: Mapping[str, Any]) -> str:
    """A task's key in PROTOCOLS: its module, and its resolution if the module has several."""
    return f"{task['name']} {task['resolution']}" if "resolution" in task else task["name"]


def published(protocol: str, task: str) -> dict[str, Any]:
    """As `settings`; none of a protocol without any for this task."""
    return dict(PROTOCOLS.get(protocol, {}).get(task, {}))


def settings(protocol: str, task: str) -> dict[str, Any]:
    """Key -> value of a protocol for the task with this `key`.

    Raises:
      OptionError: there is no such protocol, or it has no settings for this task.
    """
    one_of(PROTOCOLS, protocol=protocol)
    if protocol == "default":
        return {}
    if task not in PROTOCOLS[protocol]:
        known = ", ".join(PROTOCOLS[protocol])
        raise OptionError("protocol", protocol, f"it has settings for {known} but not for {task}")
    return PROTOCOLS[protocol][task]
