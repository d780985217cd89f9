"""The README's table of token mixers, from what their classes say of themselves."""

import re
import sys
from pathlib import Path

from efficient_tx.attention import ATTENTION, Mixer

BEGIN = "<!-- python -m efficient_tx.compare table --write README.md -->"
END = "<!-- end of the generated table -->"


def mixer_table() -> str:
    """Markdown: name, paper, what is computed, cost, causality and file of every variant."""
    lines = [
        "| token mixer | paper | what it computes | cost in length n | causal | file |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(mixer_line(name, variant) for name, variant in ATTENTION.items())]) + "\n"


def mixer_line(name: str, variant: type[Mixer]) -> str:
    paper = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[\1](https://arxiv.org/abs/\1)", variant.paper)
    # Of the file that the table's reader would open, from the repository's root.
    path = Path(sys.modules[variant.__module__].__file__)
    path = path.relative_to(Path(__file__).parents[2]).as_posix()
    causal = "yes" if variant.can_be_causal else "no"
    return f"| `{name}` | {paper} | {variant.computes} | {variant.cost} | {causal} | [{Path(path).name}]({path}) |"


def replaced(text: str) -> str:
    """`text` with the table between its markers as it is now.

    Raises:
      ValueError: the markers are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the lines {BEGIN} and {END} are missing: the table goes between them")
    return f"{before}{begin}\n{mixer_table()}{end}{after}"
