"""Names to objects: the one place that looks keys of a config up in the tables."""

import contextlib
import copy
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType, NoneType
from typing import get_args

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from efficient_tx.attention import ATTENTION
from efficient_tx.linear import LINEAR, densify, structured_learning_rates
from efficient_tx.linear.structured import Structured
from efficient_tx.models import Classifier, DualEncoder, Pyramid, TokenClassifier, ViT
from efficient_tx.names import lookup
from efficient_tx.numerics.random import check_rate
from efficient_tx.sizes import at_least
from efficient_tx.task import Task
from efficient_tx.training.loggers import LOGGERS
from efficient_tx.training.optimizer import make_optimizer
from efficient_tx.training.stages import Stage, make_stages

# What reads the examples of each kind, by name; the first one unless a config says otherwise.
MODELS: dict[str, dict[str, type[nnx.Module]]] = {
    "tokens": {"transformer": Classifier},
    "token_labels": {"transformer": TokenClassifier},
    "token_pairs": {"transformer": DualEncoder},
    "image": {"vit": ViT, "pyramid": Pyramid},
}
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}

# Sequences beyond this would not fit any machine; it is far above Path-X and the needle tasks.
LONGEST = 2**24

# Folded into the key of `config.seed` for the parameters: above every step number, which the training step folds in.
PARAMETERS = 2**31

# What build.py passes to a class by itself, and so is no option of its config section.
GIVEN = {
    "model": {"linear", "prefix", "remat", "dtype"},
    "mixer": {"heads", "head_dim", "linear", "dropout", "causal", "positions", "max_len", "dtype", "rngs"},
    "linear": {"use_bias", "dtype", "param_dtype"},
    "optimizer": {"scaling", "births", "rewarm"},
}


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Puts `where` in front of what a ValueError says, unless it names a place in the config already."""
    try:
        yield
    except ValueError as error:
        raise ValueError(error if str(error).startswith("config.") else f"{where}: {error}") from None


def options(function: Callable | type, given: set[str] = frozenset()) -> ConfigDict:
    """A config section: the keyword arguments with defaults of a function, or of a class and its bases.

    An argument whose default is None becomes a placeholder of its annotated type. `given` are left out.
    """
    calls = [function]
    if inspect.isclass(function):
        ours = [base for base in inspect.getmro(function) if base not in inspect.getmro(nnx.Linear)]
        calls = [base.__init__ for base in ours if "__init__" in vars(base)]
    section = ConfigDict()
    for call in calls:
        for name, parameter in inspect.signature(call).parameters.items():
            if parameter.default is parameter.empty or name in given or name in section:
                continue
            if parameter.default is None:
                kinds = [kind for kind in get_args(parameter.annotation) if kind is not NoneType]
                section[name] = placeholder(kinds[0])
            else:
                section[name] = parameter.default
    return section


def parse_mixers(pattern: str) -> list[str]:
    """The layers of a mixer pattern: "gla*3,softmax" -> ["gla", "gla", "gla", "softmax"].

    Raises:
      ValueError: a name that is no key of ATTENTION, or a part that is neither NAME nor NAME*COUNT.
    """
    layers = []
    for part in pattern.split(","):
        match = re.fullmatch(r"(\w+)(?:\*([1-9]\d*))?", part.strip())
        if not match:
            raise ValueError(f"config.mixers is {pattern!r}: {part!r} is no NAME or NAME*COUNT, as in 'gla*3,softmax'")
        lookup(ATTENTION, match[1], "config.mixers")
        layers += [match[1]] * int(match[2] or 1)
    return layers


def complete(config: ConfigDict) -> ConfigDict:
    """A copy whose sections fit the names in it: model, attention.*, linear.*. Missing keys get their defaults.

    Sections of variants that the pattern does not name are dropped, and so are keys that a named class does not have.
    """
    config = copy.deepcopy(config)
    with config.unlocked():
        attention = config.get("attention", ConfigDict())
        config.attention = ConfigDict(
            {
                name: attention.get(name, options(ATTENTION[name], GIVEN["mixer"]))
                for name in dict.fromkeys(parse_mixers(config.mixers))
            }
        )
        for place in ("mlp", "projections"):
            config.linear[place] = named(config.linear[place], LINEAR, GIVEN["linear"], f"config.linear.{place}")
        models = MODELS[task_module(config.task.name).KIND]
        config.model = named(config.model, models, GIVEN["model"], "config.model")
    config.lock()
    return config


def with_dense_weights(config: ConfigDict) -> ConfigDict:
    """A copy whose linear layers are all dense."""
    config = copy.deepcopy(config)
    with config.unlocked():
        config.linear = ConfigDict({place: {"name": "dense"} for place in ("mlp", "projections")})
    return complete(config)


def named(section: ConfigDict, table: Mapping[str, type], given: set[str], where: str) -> ConfigDict:
    """The options of the class that `section.name` names in `table`, with the values that `section` has of them.

    Those of another type are another class's: where that has a number, this one may have a tuple of the same name.
    """
    fresh = options(lookup(table, section.name, f"{where}.name"), given)
    fresh.name = section.name
    kept = [key for key in fresh if key in section and section.get_type(key) == fresh.get_type(key)]
    fresh.update({key: section[key] for key in kept})
    return fresh


def task_module(name: str) -> ModuleType:
    """The module that makes a task with `get_task`.

    With `KIND` it says what the examples look like, and with `sizes`, from the options of `get_task` and without
    touching data, the num_classes, vocab_size, max_len and image_shape of the task. With `split_by`, if it has one, it
    names the options that may move a training example of a source into the validation or the test split.

    Raises:
      ValueError: there is no such module, or it makes no task.
    """
    try:
        module = importlib.import_module(name)
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(
            f"config.task.name is {name!r}: {error}; give a module with get_task, as 'lra.listops'"
        ) from None
    for needed in ("get_task", "KIND", "sizes"):
        if not hasattr(module, needed):
            raise ValueError(f"config.task.name is {name!r}: that module has no {needed}, so it makes no task")
    if module.KIND not in MODELS:
        raise ValueError(f"config.task.name is {name!r}, of kind {module.KIND!r}: models read {', '.join(MODELS)}")
    return module


def task_options(name: str) -> ConfigDict:
    """The section `task`: the module's name and the keyword arguments of its `get_task`."""
    section = ConfigDict({"name": name})
    section.update(options(task_module(name).get_task))
    return section


def build_task(config: ConfigDict) -> Task:
    """The task of `config.task`; generates its data on first use.

    Raises:
      ValueError: settings that no data can meet, or data that the user must bring and that are not there.
    """
    arguments = dict(config.task)
    with naming("config.task"):
        return task_module(arguments.pop("name")).get_task(**arguments)


def build_linear(section: ConfigDict, where: str) -> Callable[..., nnx.Module]:
    """A factory of linear layers with the signature of `nnx.Linear`, from {name, options}."""
    arguments = dict(section)
    structure = lookup(LINEAR, arguments.pop("name"), f"{where}.name")

    def make(in_features, out_features, **given):
        with naming(where):
            return structure(in_features, out_features, **given, **arguments)

    return make


def build_mixer(name: str, section: ConfigDict, linear: Callable[..., nnx.Module]) -> Callable[..., nnx.Module]:
    """A factory of one token mixer, which names its config section in the errors of its constructor."""

    def make(features, **sizes):
        with naming(f"config.attention.{name}"):
            return ATTENTION[name](features, linear=linear, **sizes, **section)

    return make


def build_model(config: ConfigDict, task: Task) -> nnx.Module:
    """The model of a config for a task's kind and sizes, initialised from `config.seed`.

    Raises:
      ValueError: a name, a size or a combination that no model has.
    """
    arguments = dict(config.model)
    model = lookup(MODELS[task.kind], arguments.pop("name"), "config.model.name")
    features, heads = arguments["features"], arguments["heads"]
    # A model of stages has a tuple of each.
    if isinstance(features, int) and arguments.get("head_dim") is None and features % heads:
        raise ValueError(f"config.model.heads is {heads}: {features} features do not divide into it; set head_dim too")
    tokens = {"vocab_size": task.vocab_size, "max_len": task.max_len}
    projections = build_linear(config.linear.projections, "config.linear.projections")
    mixers = [build_mixer(name, config.attention[name], projections) for name in parse_mixers(config.mixers)]
    with naming("config.model"):
        return model(
            num_classes=task.num_classes,
            **({"image_shape": task.image_shape} if task.kind == "image" else tokens),
            mixers=mixers,
            linear=build_linear(config.linear.mlp, "config.linear.mlp"),
            remat=config.remat,
            dtype=lookup(DTYPES, config.dtype, "config.dtype"),
            rngs=nnx.Rngs(jax.random.fold_in(jax.random.key(config.seed), PARAMETERS)),
            **arguments,
        )


def build_stages(config: ConfigDict, model: nnx.Module) -> tuple[list[Stage], Callable]:
    """What a run trains, in one or two stages, and the schedule, step -> learning rate.

    Args:
      config: of the run.
      model: of `config`; its values count where the run is trained, elsewhere it may be abstract.
    """
    schedules = []

    def make(model, births):
        scaling = structured_learning_rates(model) if config.optimizer.structured_lr else None
        optimizer, schedule = make_optimizer(
            steps=config.steps, scaling=scaling, births=births, rewarm=config.densify_warmup, **config.optimizer
        )
        schedules.append(schedule)
        return optimizer

    transforms = [] if config.densify_at is None else [(config.densify_at, densify)]
    try:
        return make_stages(model, transforms, make), schedules[0]
    except ValueError as error:
        raise ValueError(f"config.{error}") from None


def check(config: ConfigDict) -> None:
    """Raises ValueError, one line, for whatever in `config` cannot work; touches neither disk nor data.

    The model is built and called on abstract values, so that its own refusals come out here.
    """
    for key in ("steps", "batch_size", "grad_accum", "eval_every", "checkpoint_every", "log_every", "keep"):
        at_least(1, **{f"config.{key}": config[key]})
    for key in ("features", "layers", "heads", "head_dim", "mlp_features"):
        if isinstance(config.model.get(key), int):
            at_least(1, **{f"config.model.{key}": config.model[key]})
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"config.seed is {config.seed}: it must be in [0, 2^32)")
    with naming("config.model"):
        check_rate(config.model.dropout)
    max_len = config.task.get("max_len", 1)
    at_least(1, **{"config.task.max_len": max_len})
    if max_len > LONGEST:
        raise ValueError(f"config.task.max_len is {max_len}: it must be at most {LONGEST}")
    if config.batch_size % config.grad_accum:
        raise ValueError(f"config.grad_accum is {config.grad_accum}: it must divide batch_size {config.batch_size}")
    for name in config.loggers:
        lookup(LOGGERS, name, "config.loggers")
    module = task_module(config.task.name)
    if other := set(config.task) ^ set(task_options(config.task.name)):
        raise ValueError(
            f"config.task.name is {config.task.name!r}, but {min(other)} is an option of one task only: choose the "
            "task by its config file"
        )
    with naming("config.task"):
        sizes = module.sizes(**config.task)
    shape = Task(*((),) * 3, kind=module.KIND, name="", source="", **sizes)

    def forward(model):
        return model(**empty_inputs(shape), key=jax.random.key(0))

    with naming("config.model"):
        model = nnx.eval_shape(lambda: build_model(config, shape))
        nnx.eval_shape(forward, model)
    if config.densify_at is not None:
        check_densify(config, model)
    build_stages(config, model)


def empty_inputs(task: Task) -> dict[str, jax.Array]:
    """A batch of one example without content: what a model of the task is called with."""
    if task.kind == "image":
        return {"inputs": jnp.zeros((1, *task.image_shape))}
    tokens = jnp.zeros((1, task.max_len), jnp.float32 if task.vocab_size is None else jnp.int32)
    inputs = {"inputs": tokens, "mask": tokens == 0}
    if task.own_masks:
        inputs["positions"] = jnp.zeros((1, task.max_len), jnp.int32)
    return {**inputs, "inputs2": tokens, "mask2": tokens == 0} if task.kind == "token_pairs" else inputs


def check_densify(config: ConfigDict, model: nnx.Module) -> None:
    """Raises ValueError where `densify_at` or `densify_warmup` cannot work for an (abstract) model."""
    if not 1 <= config.densify_at < config.steps:
        raise ValueError(
            f"config.densify_at is {config.densify_at}: it must be at least 1 and less than steps={config.steps}"
        )
    at_least(0, **{"config.densify_warmup": config.densify_warmup})
    if not any(isinstance(layer, Structured) for _, layer in nnx.iter_modules(model)):
        raise ValueError(
            f"config.densify_at is {config.densify_at}, but no weight is structured: choose a structure, as "
            "--config.linear.mlp.name=monarch"
        )
