"""The base of every config: the keys that no class owns. All others are read from the classes they build."""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from efficient_tx.build import GIVEN, MODELS, complete, options, task_module, task_options
from efficient_tx.training.optimizer import make_optimizer


def run_settings() -> ConfigDict:
    """The top-level keys of a run, with their defaults."""
    return ConfigDict(
        {
            "mixers": "softmax",  # token mixers by layer, repeated to depth: "gla*3,softmax"
            "protocol": "default",  # a key of configs/protocols.py: whose settings the others start from
            "seed": 0,  # of parameters, batches, dropout and sampling; the task has a seed of its own
            "steps": 5000,  # updates of the parameters
            "batch_size": 32,  # examples of an update, over all devices and processes
            "grad_accum": 1,  # parts that a batch is cut into, one after the other: less memory, and in cache on a CPU
            "eval_every": 500,  # steps between evaluations on the validation split, each with a checkpoint
            "checkpoint_every": 500,  # steps between further checkpoints
            "log_every": 50,  # steps between lines of training metrics
            "keep": 2,  # newest checkpoints that stay on disk, the best one aside
            "dtype": "float32",  # of the computation: float32 or bfloat16; parameters are float32
            "remat": False,  # recompute each block in the backward pass, to save memory (XLA undoes it on CPU)
            "init_from": placeholder(str),  # workdir whose best parameters to start from, or a .npz or .safetensors ViT
            "densify_at": placeholder(int),  # step after which structured weights go on as dense ones; unset = never
            "densify_warmup": 100,  # steps over which the learning rate of those weights rises again
            "loggers": ("tensorboard",),  # beside metrics.jsonl: tensorboard, wandb
            "debug_nans": False,  # stop inside the step at the first NaN (slow)
        }
    )


def make_config(module: str, argument: str = "", /, **settings: Any) -> ConfigDict:
    """A config for one task.

    Args:
      module: of the task, "lra.listops".
      argument: "MIXERS+LINEAR+PROJECTIONS", what follows the colon in --config=FILE.py:ARGUMENT: a mixer pattern, the
        weight structure of the MLPs, and that of the mixers' projections; "softmax+dense+dense" where left out.
      **settings: what this task sets otherwise, by section: `steps=100, model={"layers": 4}`.

    Raises:
      ValueError: the argument has more than three parts or an unknown name, or a setting has an unknown key.
    """
    parts = argument.split("+") if argument else []
    if len(parts) > 3:
        raise ValueError(f"config argument is {argument!r}: it has at most three parts, MIXERS+LINEAR+PROJECTIONS")
    mixers, mlp, projections = [
        part or default for part, default in zip(parts + [""] * 3, ("softmax", "dense", "dense"))
    ]
    config = run_settings()
    config.mixers = mixers
    config.task = task_options(module)
    models = MODELS[task_module(module).KIND]
    config.model = ConfigDict({"name": settings.get("model", {}).get("name", next(iter(models)))})
    config.linear = ConfigDict({"mlp": {"name": mlp}, "projections": {"name": projections}})
    config.optimizer = options(make_optimizer, GIVEN["optimizer"])
    config = complete(config)
    config.update(settings)
    return config
