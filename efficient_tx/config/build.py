"""Builds the objects of a resolved config: task, model, stages."""

import math
from collections.abc import Callable

import jax
from flax import nnx
from ml_collections import ConfigDict

from efficient_tx.checks import OptionError, lookup
from efficient_tx.config.errors import at, blame
from efficient_tx.config.names import (
    DTYPES,
    MODELS,
    is_ours,
    mixer_class,
    parse_mixers,
    section_name,
    structure_class,
    task_module,
    task_sizes,
    task_without_data,
)
from efficient_tx.config.objects import with_objects
from efficient_tx.config.structure import entries, rebuild
from efficient_tx.linear import densify, structured_learning_rates
from efficient_tx.task import Objective, Task
from efficient_tx.training.devices import divide_cores
from efficient_tx.training.objective import CLASSIFICATION
from efficient_tx.training.optimizer import make_optimizer
from efficient_tx.training.stages import Stage, make_stages
from efficient_tx.training.summary import parameter_count

# Folded into the key of `config.seed` for the parameters. The training step folds in step numbers, which are smaller.
PARAMETERS = 2**31


def build_task(config: ConfigDict) -> Task:
    """The task of `config.task`; its data are generated on first use.

    Raises:
      ConfigError: settings that no data can satisfy, damaged data, or a module whose task contradicts its KIND or
        sizes().
      OSError: data that the user must provide are missing, or a file cannot be read or written.
      ModuleNotFoundError: the data need a package that is not installed.
    """
    arguments = dict(config.task)
    module = task_module(arguments.pop("name"))
    with at("task"):
        try:
            task = module.get_task(**arguments)
        except OptionError:
            raise
        except Exception as error:
            if is_ours(config.task.name) and isinstance(error, OSError | ValueError | ModuleNotFoundError):
                raise
            raise ValueError(blame(error)) from None
        if not isinstance(task, Task):
            raise ValueError(f"get_task returned a {type(task).__name__}, not an efficient_tx.task.Task")
        for name, value in {"kind": module.KIND, **task_sizes(config.task)}.items():
            if getattr(task, name) != value:
                where = "KIND" if name == "kind" else "sizes()"
                raise ValueError(f"{where} says that {name} is {value!r}, and the task has {getattr(task, name)!r}")
    return task


def share_cores(*configs: ConfigDict) -> None:
    """Makes the cores of a CPU devices that share the examples of each config's micro-batch, unless jax has started."""

    def of_model(config):
        return parameter_count(nnx.eval_shape(lambda: build_model(config, task_without_data(config.task))))

    examples = math.gcd(*(config.batch_size // config.grad_accum for config in configs))
    divide_cores(examples, parameters=lambda: max(map(of_model, configs)))


def build_linear(section: ConfigDict, where: str) -> Callable[..., nnx.Module]:
    """A factory of linear layers with the signature of `nnx.Linear`, from a section {name, options}."""
    arguments = dict(section)
    structure = structure_class(arguments.pop("name"), f"{where}.name")
    arguments = with_objects(structure, arguments, where)

    def make(in_features, out_features, **given):
        with at(where):
            return structure(in_features, out_features, **given, **arguments)

    return make


def build_mixer(name: str, section: ConfigDict, linear: Callable[..., nnx.Module]) -> Callable[..., nnx.Module]:
    """A factory of one token mixer; errors of its constructor name the mixer's config section, or that of its sizes."""

    where = f"attention.{section_name(name)}"

    def make(features, **sizes):
        # These are keys of the model, but for the length, which is the task's.
        with at(where, others=sizes.keys() - {"max_len"}):
            cls = mixer_class(name)
            try:
                return cls(features, linear=linear, **sizes, **with_objects(cls, section, where))
            except ValueError:
                raise
            except Exception as error:  # in a class or a score of the user's own
                raise ValueError(blame(error)) from None

    return make


def build_model(config: ConfigDict, task: Task) -> nnx.Module:
    """The model of a config for a task's kind and sizes, initialised from `config.seed`.

    Raises:
      ConfigError: a name, size or combination that no model supports.
    """
    arguments = dict(config.model)
    with at("model"):
        model = lookup(MODELS[task.kind], arguments.pop("name"), "name")
        features, heads = arguments["features"], arguments["heads"]
        # A model with stages (the pyramid) has a tuple of each.
        if isinstance(features, int) and arguments.get("head_dim") is None and features % heads:
            raise OptionError("heads", heads, f"{features} features do not divide into it; set head_dim too")
    with at():
        dtype = lookup(DTYPES, config.dtype, "dtype")
    tokens = {"vocab_size": task.vocab_size, "max_len": task.max_len}
    projections = build_linear(config.linear.projections, "linear.projections")
    mixers = [
        build_mixer(name, config.attention[section_name(name)], projections) for name in parse_mixers(config.mixers)
    ]
    with at("model"):
        built = model(
            num_classes=task.num_classes,
            **({"image_shape": task.image_shape} if task.kind == "image" else tokens),
            mixers=mixers,
            linear=build_linear(config.linear.mlp, "linear.mlp"),
            remat=config.remat,
            dtype=dtype,
            rngs=nnx.Rngs(jax.random.fold_in(jax.random.key(config.seed), PARAMETERS)),
            **arguments,
        )
    rebuild(built, entries(config))
    return built


def build_stages(
    config: ConfigDict, model: nnx.Module, objective: Objective = CLASSIFICATION
) -> tuple[list[Stage], Callable]:
    """The stages of a run, one or two, and its schedule: step -> learning rate.

    Args:
      config: of the run.
      model: model of `config`. Its values are used only in training; otherwise it may be abstract.
      objective: of the task.
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
    with at("optimizer"):
        return make_stages(model, transforms, make, objective), schedules[0]
