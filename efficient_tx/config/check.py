"""Checks a config before a run touches disk or data."""

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from efficient_tx.checks import OptionError, at_least, at_most, one_of
from efficient_tx.config.build import build_model, build_stages
from efficient_tx.config.errors import ConfigError, at, blame
from efficient_tx.config.keys import flatten
from efficient_tx.config.names import DEEPEST, mixer_class, parse_mixers, task_without_data
from efficient_tx.config.schema import task_options
from efficient_tx.linear import Dense
from efficient_tx.linear.structured import Weight
from efficient_tx.numerics.random import check_rate
from efficient_tx.task import Task
from efficient_tx.training.loggers import LOGGERS

# Longer sequences and wider layers fit no machine. The limit is far above Path-X and the needle tasks.
LONGEST = 2**24
# Of each a program of the whole model is compiled.
MOST_LENGTHS = 32
# What the counters and sizes of a program can hold: int32.
LARGEST = 2**31 - 1
FLOAT32 = float(jnp.finfo(jnp.float32).max)


def check(config: ConfigDict) -> None:
    """Raises ConfigError, one line, for anything in `config` that cannot work; touches neither disk nor data.

    The model is built and called on abstract values, so its own errors appear here.
    """
    numbers(config)
    counts = ("batch_size", "grad_accum", "lengths", "eval_every", "checkpoint_every", "log_every", "keep")
    sizes = ("features", "layers", "heads", "head_dim", "mlp_features")
    with at():
        at_least(0, steps=config.steps)
        at_least(1, **{key: config[key] for key in counts})
        at_most(MOST_LENGTHS, lengths=config.lengths)
        if not 0 <= config.seed < 2**32:
            raise OptionError("seed", config.seed, "it must be in [0, 2^32)")
        if config.batch_size % config.grad_accum:
            raise OptionError("grad_accum", config.grad_accum, f"it must divide batch_size {config.batch_size}")
        for name in config.loggers:
            one_of(LOGGERS, loggers=name)
    with at("model"):
        whole = {key: config.model[key] for key in sizes if isinstance(config.model.get(key), int)}
        at_least(1, **whole)
        at_most(DEEPEST, layers=whole.pop("layers", None))
        at_most(LONGEST, **whole)
        # A model with stages has a tuple of each.
        for key, most in {"depths": DEEPEST, "features": LONGEST, "heads": LONGEST}.items():
            stages = config.model.get(key)
            for size in stages if isinstance(stages, tuple) else ():
                at_most(most, **{key: size if isinstance(size, int) else None})
        check_rate(config.model.dropout)
    with at("task"):
        max_len = config.task.get("max_len", 1)
        at_least(1, max_len=max_len)
        at_most(LONGEST, max_len=max_len)
    if other := set(config.task) ^ set(task_options(config.task.name)):
        fault = (
            f"is {config.task.name!r}, but {min(other)} is an option of one task only: choose the task by its config"
        )
        own = f"a config file calls make_config({config.task.name!r})"
        raise ConfigError("task.name", f"{fault}; {own}")
    with at("task"):
        shape = task_without_data(config.task)
    if config.lengths > 1 and shape.kind == "image":
        raise ConfigError("lengths", f"is {config.lengths}: images have no padding, use 1")

    def forward(model):
        return model(**empty_inputs(shape), key=jax.random.key(0))

    with at("model"):
        model = nnx.eval_shape(lambda: build_model(config, shape))
        try:
            nnx.eval_shape(forward, model)
        except (TypeError, NotImplementedError) as error:
            if all(mixer_class(name).family != "own" for name in parse_mixers(config.mixers)):
                raise
            raise ConfigError("mixers", f"is {config.mixers!r}: {blame(error)}") from None
    if config.densify_at is not None:
        with at():
            check_densify(config, model)
    build_stages(config, model)


def numbers(config: ConfigDict) -> None:
    """Raises ConfigError for a number, alone or in a tuple, that is not finite in float32 or no int32, seeds aside."""
    for key, value in flatten(config).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not abs(number) <= FLOAT32:
                raise ConfigError(key, f"is {value!r}: it must be a finite number")
            if isinstance(number, int) and abs(number) > LARGEST and key.rpartition(".")[2] != "seed":
                raise ConfigError(key, f"is {value!r}: it must be at most {LARGEST}")


def empty_inputs(task: Task) -> dict[str, jax.Array]:
    """The arguments of a model's call for a batch of one example without content."""
    if task.kind == "image":
        return {"inputs": jnp.zeros((1, *task.image_shape))}
    tokens = jnp.zeros((1, task.max_len), jnp.float32 if task.vocab_size is None else jnp.int32)
    inputs = {"inputs": tokens, "mask": tokens == 0}
    if task.own_masks:
        inputs["positions"] = jnp.zeros((1, task.max_len), jnp.int32)
    return {**inputs, "inputs2": tokens, "mask2": tokens == 0} if task.kind == "token_pairs" else inputs


def check_densify(config: ConfigDict, model: nnx.Module) -> None:
    """Raises OptionError if `densify_at` or `densify_warmup` cannot work for `model`, which may be abstract."""
    if not 1 <= config.densify_at < config.steps:
        rule = f"it must be at least 1 and less than steps={config.steps}"
        raise OptionError("densify_at", config.densify_at, rule)
    at_least(0, densify_warmup=config.densify_warmup)
    if not any(isinstance(layer, Weight) and not isinstance(layer, Dense) for _, layer in nnx.iter_modules(model)):
        rule = "no weight is structured: choose a structure, as linear.mlp.name=monarch"
        raise OptionError("densify_at", config.densify_at, rule)


def check_objective(model: nnx.Module, task: Task) -> None:
    """Raises ValueError if a task's own objective cannot score the model's outputs; computes nothing."""
    objective = task.objective
    if objective is None:
        return
    shape = (1, task.max_len) if task.kind == "token_labels" else (1,)
    batch = {"label": jnp.zeros(shape, objective.label_dtype), "weight": jnp.ones(shape, jnp.float32)}

    def score(model):
        outputs = model(**empty_inputs(task), key=None).astype(jnp.float32)
        # Outputs [B, 1] minus labels [B] would silently be [B, B].
        with jax.numpy_rank_promotion("raise"):
            return objective.score(outputs, batch)

    try:
        scores = nnx.eval_shape(score, model)
    except Exception as error:  # in a module of the user's own
        raise ValueError(f"the objective of the task cannot be used: {blame(error)}") from None
    for name in objective.names:
        pair = scores.get(name, ())
        if len(pair) != 2 or any(part.shape for part in pair):
            raise ValueError(f"the objective of the task gives no pair of scalars, (sum, weight), as {name!r}")
