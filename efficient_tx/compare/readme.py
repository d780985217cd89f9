"""Generated tables of pages: mixers, structures, methods of compression, from attributes of their classes."""

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from efficient_tx.attention import ATTENTION, Mixer
from efficient_tx.compression import METHODS, SECOND, Method
from efficient_tx.config.methods import named_method
from efficient_tx.linear import LINEAR
from efficient_tx.linear.structured import Weight

BEGIN = "<!-- python -m efficient_tx.compare table --write {} -->"
END = "<!-- end of the generated tables -->"


def tables() -> dict[str, str]:
    """Page -> its tables, as Markdown, with a blank line between two of them."""
    return {"README.md": f"{mixer_table()}\n{structure_table()}", "docs/compressing.md": method_table(up="../")}


def mixer_table() -> str:
    """Name, paper, what is computed, cost, causality and file of every variant."""
    return table(
        ("token mixer", "paper", "what it computes", "cost in length n", "causal", "file"),
        (
            (f"`{name}`", paper(variant), variant.computes, variant.cost, causal(variant), file(variant))
            for name, variant in ATTENTION.items()
        ),
    )


def structure_table() -> str:
    """Name, paper, formula, parameters, projection and file of every structured weight."""
    return table(
        ("weight structure", "paper", "W, for y = x W", "parameters, n × n", "nearest to a dense weight", "file"),
        (
            (f"`{name}`", paper(weight), weight.computes, weight.size, weight.nearest, file(weight))
            for name, weight in LINEAR.items()
        ),
    )


def method_table(up: str) -> str:
    """Name, paper, what is minimised or kept, need of data and file of every compression but the projections."""
    classes = {name: made for name, made in (METHODS | SECOND).items() if isinstance(made, type)}
    return table(
        ("compression", "paper", "what it does", "needs", "file"),
        (
            (f"`{name}`", paper(method), method.computes, needs(name), file(method, up))
            for name, method in classes.items()
        ),
    )


def needs(name: str) -> str:
    """What a method needs with its default options; of a second stage, what it adds to a first one."""
    method = named_method(name) if name in METHODS else SECOND[name]
    return ", ".join(sorted(method.needs)) or "no data"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with one line per row."""
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]]) + "\n"


def causal(variant: type[Mixer]) -> str:
    return "yes" if variant.can_be_causal else "no"


def paper(cls: type[Mixer] | type[Weight] | type[Method]) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[\1](https://arxiv.org/abs/\1)", cls.paper)


def file(cls: type, up: str = "") -> str:
    """A link to the class's file; of a class from elsewhere its module's name. `up` leads to the repository's root."""
    root, path = Path(__file__).parents[2], getattr(sys.modules.get(cls.__module__), "__file__", None)
    if path is None or not Path(path).is_relative_to(root):
        return f"`{cls.__module__}`"
    return f"[{Path(path).name}]({up}{Path(path).relative_to(root).as_posix()})"


def replaced(text: str) -> str:
    """`text` with new tables between its markers.

    Raises:
      ValueError: the markers are missing.
    """
    for page, content in tables().items():
        before, begin, rest = text.partition(BEGIN.format(page))
        _, end, after = rest.partition(END)
        if end:
            return f"{before}{begin}\n{content}{end}{after}"
    raise ValueError(f"the lines {BEGIN.format('README.md')} and {END} are missing: the tables go between them")
