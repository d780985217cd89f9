"""The names in a config and their meaning: mixers, weight structures, models, tasks."""

import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
from flax import nnx

from efficient_tx.attention import ATTENTION, Mixer
from efficient_tx.checks import lookup
from efficient_tx.config import trust
from efficient_tx.config.errors import ConfigError, at, blame
from efficient_tx.files import local_path
from efficient_tx.linear import LINEAR
from efficient_tx.linear.structured import Weight
from efficient_tx.models import Bert, Classifier, DualEncoder, Pyramid, TokenClassifier, ViT
from efficient_tx.task import Task, check_sizes

# The models for each kind of examples, by name; the first one is the default.
MODELS: dict[str, dict[str, type[nnx.Module]]] = {
    "tokens": {"transformer": Classifier, "bert": Bert},
    "token_labels": {"transformer": TokenClassifier},
    "token_pairs": {"transformer": DualEncoder},
    "image": {"vit": ViT, "pyramid": Pyramid},
}
# A program has every layer in it: more would be traced and compiled for hours.
DEEPEST = 1024
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}


def parse_mixers(pattern: str) -> list[str]:
    """The layers of a mixer pattern: "gla*3,softmax" -> ["gla", "gla", "gla", "softmax"].

    Raises:
      ConfigError: an unknown mixer, a part that is neither NAME nor NAME*COUNT, too many layers, or two classes with
        the same section.
    """
    layers = []
    for part in pattern.split(","):
        match = re.fullmatch(r"(\w+|[\w.]+:\w+)(?:\*([1-9]\d{,17}))?", part.strip())
        if not match:
            raise ConfigError("mixers", f"is {pattern!r}: {part!r} is no NAME or NAME*COUNT, as in 'gla*3,softmax'")
        mixer_class(match[1])
        count = int(match[2] or 1)
        if len(layers) + count > DEEPEST:
            raise ConfigError("mixers", f"is {pattern!r}: it must have at most {DEEPEST} layers")
        layers += [match[1]] * count
    sections = {section_name(name): name for name in layers}
    if clash := [name for name in layers if sections[section_name(name)] != name]:
        other = sections[section_name(clash[0])]
        raise ConfigError("mixers", f"has {clash[0]!r} and {other!r}, whose options share a section: rename a class")
    return layers


def section_name(mixer: str) -> str:
    """The section of a mixer's options inside `attention`: its name, or the name of its class."""
    return mixer.rpartition(":")[2]


def mixer_class(name: str) -> type[Mixer]:
    """The class of a key of ATTENTION, or of "module:Class". ConfigError: none that a config may name."""
    return _class(name, ATTENTION, Mixer, "mixers", "efficient_tx.attention.Mixer")


def structure_class(name: str, where: str) -> type[Weight]:
    """The class of a key of LINEAR, or of "module:Class". Raises ConfigError for the key `where` if there is none."""
    return _class(name, LINEAR, Weight, where, "efficient_tx.linear.structured.Structured")


def _class(name: str, table: Mapping[str, type], base: type, where: str, of: str) -> type:
    if ":" not in name:
        with at():
            return lookup(table, name, where)
    found = attribute(name, where)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(where, f"is {name!r}: that is no subclass of {of}")
    return found


def attribute(name: str, where: str) -> Any:
    """What "module:name" names, of a module that a config may name. Raises ConfigError for the key `where`."""
    module, _, last = name.partition(":")
    if fault := trust.refusal(module):
        raise ConfigError(where, f"is {name!r}: {fault}")
    try:
        home = importlib.import_module(module)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(where, f"is {name!r}: {error} ({_looked_in()})") from None
    except Exception as error:  # out of a module of the user's own
        raise ConfigError(where, f"is {name!r}, which cannot be imported: {blame(error)}") from None
    found = getattr(home, last, None)
    if found is None:
        raise ConfigError(where, f"is {name!r}: the module {module} has no {last}")
    return found


def _looked_in() -> str:
    return "modules are looked for in the working directory and on PYTHONPATH"


def is_ours(module: str) -> bool:
    """Whether a module belongs to this project, whose errors say all that a person needs."""
    return module.split(".")[0] in ("lra", "efficient_tx")


def absolute_task(name: str) -> str:
    """The name of a task. The path of a file becomes absolute: it is stored, and read from another folder."""
    return str(local_path(name).absolute()) if name.endswith(".py") else name


def task_module(name: str) -> ModuleType:
    """The module that makes a task: its dotted name, or the path of a file that ends in .py.

    `get_task` makes the task. `KIND` is the kind of its examples. `sizes` returns num_classes, vocab_size, max_len and
    image_shape of the task, from the options of `get_task` and without reading data. `split_by`, which is optional,
    names the options that may move a training example of a source into the validation or the test split.

    Raises:
      ConfigError: there is no such module, a config must not name it, or it makes no task.
    """
    if fault := trust.refusal(name):
        raise ConfigError("task.name", f"is {name!r}: {fault}")
    try:
        module = _from_file(local_path(name)) if name.endswith(".py") else importlib.import_module(name)
    except (ImportError, OSError, SyntaxError) as error:
        fault = f"is {name!r}: {error}; give a module with get_task, as 'lra.listops', or a file ({_looked_in()})"
        raise ConfigError("task.name", fault) from None
    except Exception as error:  # any mistake in a module of the user's own
        raise ConfigError("task.name", f"is {name!r}, which cannot be imported: {blame(error)}") from None
    for needed in ("get_task", "KIND", "sizes"):
        if not hasattr(module, needed):
            raise ConfigError("task.name", f"is {name!r}: that module has no {needed}, so it makes no task")
    if module.KIND not in MODELS:
        raise ConfigError("task.name", f"is {name!r}, whose KIND is {module.KIND!r}: choose one of {', '.join(MODELS)}")
    return module


def _from_file(path: Path) -> ModuleType:
    """The module in a file. It is executed once, so its classes stay the same objects."""
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    name = f"task_file {path.absolute()}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def task_sizes(task: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that a model needs to know of the task in the section `task`, without reading data."""
    options = {key: value for key, value in task.items() if key != "name"}
    with at("task"):
        module = task_module(task["name"])
        try:
            sizes = module.sizes(**options)
        except TypeError as error:  # a mistake in a module of the user's own
            raise ValueError(f"its module's sizes() does not take its options: {error}") from None
        check_sizes(module.KIND, sizes)
        return sizes


def task_without_data(task: Mapping[str, Any]) -> Task:
    """The task in the section `task` as far as a model needs it: its kind and its sizes, without examples."""
    return Task(*((),) * 3, kind=task_module(task["name"]).KIND, name="", source="", **task_sizes(task))
