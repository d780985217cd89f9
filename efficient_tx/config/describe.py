"""The meaning of each config key, from the "Args:" sections of docstrings."""

import inspect
import re
from collections.abc import Callable

from ml_collections import ConfigDict

from efficient_tx.config.schema import RUN, owners

# Keys that no docstring describes: they choose the class or module that takes the other keys.
CHOICES = {
    "task.name": "module that makes the task, or a file of your own",
    "model.name": "which model reads the examples",
    "linear.mlp.name": "weight structure of the MLPs",
    "linear.projections.name": "weight structure of the mixers' projections",
}


def describe(config: ConfigDict) -> dict[str, str]:
    """Dotted key -> one line on its meaning, for every key of a resolved config; empty if no docstring describes it."""
    lines = {key: text for key, (_, text) in RUN.items()} | CHOICES
    for section, owner in owners(config).items():
        known = arguments(owner)
        options = config
        for part in section.split("."):
            options = options[part]
        lines = {f"{section}.{key}": sentence(known.get(key, "")) for key in options} | lines
    return lines


def sentence(text: str) -> str:
    """The first sentence of a text, without its full stop."""
    return re.split(r"(?<!et al)\.(?: |$)", text, maxsplit=1)[0]


def arguments(call: Callable | type) -> dict[str, str]:
    """Argument -> text, from the docstring of a function, or of a class, its `function` and its bases."""
    if not inspect.isclass(call):
        return parse(call)
    sources = [*call.__mro__]
    if function := getattr(call, "function", None):
        sources.insert(1, function)
    known: dict[str, str] = {}
    for source in sources:
        known = parse(source) | known
    return known


def parse(documented: Callable | type) -> dict[str, str]:
    """Argument -> text on one line, from the "Args:" section of a docstring; "a, b: text" describes both."""
    text = inspect.cleandoc(documented.__doc__ or "")
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    if not section:
        return {}
    entries = re.findall(r"^  (\*{0,2}\w[\w, ]*): (.*?)(?=^  \S|\Z)", section[1], re.MULTILINE | re.DOTALL)
    return {name.strip(): " ".join(text.split()) for names, text in entries for name in names.split(",")}
