"""The schema: the keys of a config and their defaults, read from the signatures of classes and functions."""

import copy
import inspect
from collections.abc import Callable
from types import NoneType
from typing import Any, get_args

from flax import nnx
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from efficient_tx.checks import lookup
from efficient_tx.config.errors import at
from efficient_tx.config.keys import assign
from efficient_tx.config.names import (
    MODELS,
    mixer_class,
    parse_mixers,
    section_name,
    structure_class,
    task_module,
)
from efficient_tx.config.objects import kind_of
from efficient_tx.signatures import constructor
from efficient_tx.training import workdir
from efficient_tx.training.optimizer import make_optimizer

# The top-level keys of a run: the default, or the type of a key that is unset by default; and the meaning.
RUN: dict[str, tuple[Any, str]] = {
    "mixers": ("softmax", 'token mixers of the layers, repeated to depth: "gla*3,softmax"'),
    "protocol": ("default", "whose settings the others start from: a key of PROTOCOLS"),
    "seed": (0, "seed of parameters, batches, dropout and sampling; the task has its own seed"),
    "steps": (5000, "updates of the parameters"),
    "batch_size": (32, "examples of an update, over all devices and processes"),
    "grad_accum": (1, "micro-batches of a batch, one after the other: less memory, and in cache on a CPU"),
    "lengths": (1, "lengths that a micro-batch may be computed at, the shortest that holds it: less work on padding"),
    "eval_every": (500, "steps between evaluations on the validation split, each with a checkpoint"),
    "checkpoint_every": (500, "steps between further checkpoints"),
    "log_every": (50, "steps between lines of training metrics"),
    "keep": (2, "newest checkpoints that stay on disk, beside the best one"),
    "dtype": ("float32", "dtype of the computation: float32 or bfloat16; parameters are float32"),
    "remat": (False, "recompute each block in the backward pass, to save memory (XLA undoes it on CPU)"),
    "init_from": (
        str,
        "start from the best parameters of this workdir, a file of a run's weights, or a published ViT or BERT",
    ),
    "densify_at": (int, "step after which structured weights become dense ones; unset = never"),
    "densify_warmup": (100, "steps of a new learning-rate warm-up for these dense weights"),
    "loggers": (("tensorboard",), "where metrics go beside metrics.jsonl: tensorboard, wandb"),
    "debug_nans": (False, "stop inside the step at the first NaN (slow)"),
}

# Arguments that the builders pass themselves; they are not keys of the class's config section.
GIVEN = {
    "model": {"linear", "prefix", "epsilon", "segments", "post_norm", "remat", "dtype"},
    "mixer": {"heads", "head_dim", "linear", "dropout", "causal", "positions", "max_len", "dtype", "rngs"},
    "linear": {"use_bias", "dtype", "param_dtype"},
    "optimizer": {"scaling", "births", "rewarm"},
}


def make_config(module: str, argument: str = "", /, **settings: Any) -> ConfigDict:
    """A config for one task.

    Args:
      module: of the task, "lra.listops", or the path of a file that ends in .py.
      argument: "MIXERS+LINEAR+PROJECTIONS", the part of a config's path after the colon: a mixer pattern, the weight
        structure of the MLPs, and that of the mixers' projections. Parts left out are "softmax", "dense" and "dense".
      **settings: values for this task, by section: `steps=100, model={"layers": 4}`.

    Raises:
      ConfigError: an unknown name in the argument, or a setting with an unknown key or of another type.
      ValueError: the argument has more than three parts.
    """
    parts = argument.split("+") if argument else []
    if len(parts) > 3:
        raise ValueError(f"the argument is {argument!r}: it has at most three parts, MIXERS+LINEAR+PROJECTIONS")
    mixers, mlp, projections = [
        part or default for part, default in zip(parts + [""] * 3, ("softmax", "dense", "dense"))
    ]
    config = ConfigDict(
        {key: placeholder(value) if isinstance(value, type) else value for key, (value, _) in RUN.items()}
    )
    config.mixers = mixers
    config.task = task_options(module)
    models = MODELS[task_module(module).KIND]
    config.model = ConfigDict({"name": settings.get("model", {}).get("name", next(iter(models)))})
    config.linear = ConfigDict({"mlp": {"name": mlp}, "projections": {"name": projections}})
    config.optimizer = options(make_optimizer, GIVEN["optimizer"])
    config.structure = ConfigDict()  # of a compressed model only, see config.structure
    config = complete(config)
    for key, value in workdir.flatten(settings).items():
        assign(config, key, value)
    return config


def options(call: Callable | type, given: set[str] = frozenset()) -> ConfigDict:
    """A config section: the keyword arguments with defaults of a function, or of a class and its bases.

    An argument with the default None becomes a placeholder of its annotated type, or of text for the name of an object.
    Arguments in `given`, and those that a class inherits from flax, are left out.
    """
    section = ConfigDict()
    for name, parameter in signature(call).parameters.items():
        if parameter.default is parameter.empty or name in given:
            continue
        if parameter.default is None:
            kinds = [kind for kind in get_args(parameter.annotation) if kind is not NoneType]
            section[name] = placeholder(str if kind_of(parameter.annotation) else kinds[0])
        else:
            section[name] = parameter.default
    return section


def signature(call: Callable | type) -> inspect.Signature:
    """The arguments of a function, or of a class and its bases without flax's classes."""
    if not inspect.isclass(call):
        return inspect.signature(call)
    if issubclass(call, nnx.Linear) and "__init__" not in vars(call):
        return inspect.Signature()
    return vars(call).get("__signature__") or constructor(call)


def complete(config: ConfigDict) -> ConfigDict:
    """A copy whose sections model, attention.* and linear.* fit the names in it. Missing keys get their defaults.

    Sections of mixers that the pattern does not name are dropped, and so are keys that a named class does not have.
    """
    config = copy.deepcopy(config)
    with config.unlocked():
        attention, sections = config.get("attention", ConfigDict()), ConfigDict()
        for name in dict.fromkeys(parse_mixers(config.mixers)):
            section = section_name(name)
            sections[section] = attention.get(section, options(mixer_class(name), GIVEN["mixer"]))
        config.attention = sections
        for place in ("mlp", "projections"):
            section, where = config.linear[place], f"linear.{place}.name"
            config.linear[place] = named(section, structure_class(section.name, where), GIVEN["linear"])
        models = MODELS[task_module(config.task.name).KIND]
        with at("model"):
            config.model = named(config.model, lookup(models, config.model.name, "name"), GIVEN["model"])
    config.lock()
    return config


def named(section: ConfigDict, owner: type, given: set[str]) -> ConfigDict:
    """The options of the class `owner`, with the values that `section` has for them, and the section's name.

    Values of another type are not copied: they belong to another class. A number there may be a tuple here.
    """
    fresh = options(owner, given)
    fresh.name = section.name
    kept = [key for key in fresh if key in section and section.get_type(key) == fresh.get_type(key)]
    fresh.update({key: section[key] for key in kept})
    return fresh


def with_dense_weights(config: ConfigDict) -> ConfigDict:
    """A copy whose linear layers are all dense."""
    config = copy.deepcopy(config)
    with config.unlocked():
        config.linear = ConfigDict({place: {"name": "dense"} for place in ("mlp", "projections")})
        config.structure = ConfigDict()
    return complete(config)


def task_options(name: str) -> ConfigDict:
    """The section `task`: the module's name and the keyword arguments of its `get_task`."""
    section = ConfigDict({"name": name})
    section.update(options(task_module(name).get_task))
    return section


def owners(config: ConfigDict) -> dict[str, Callable | type]:
    """The class or function that takes the keys of each section: "attention.skyformer" -> Skyformer."""
    models = MODELS[task_module(config.task.name).KIND]
    return {
        "task": task_module(config.task.name).get_task,
        "model": models[config.model.name],
        "optimizer": make_optimizer,
        **{f"attention.{section_name(name)}": mixer_class(name) for name in parse_mixers(config.mixers)},
        **{
            f"linear.{place}": structure_class(config.linear[place].name, f"linear.{place}.name")
            for place in ("mlp", "projections")
        },
    }
