"""The pages of the documentation and their fenced blocks.

A block's first word is its language, what follows says what the tests do with it:

    ```python             run, in this process
    ```python parsed      parsed only, as it needs what is not here
    ```python FILE        written to that path of the page's folder (csv too)
    ```bash               commands, whose names, flags and keys are checked
    ```text, ```bibtex    nothing
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from tests.support import ROOT

GUIDES = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "lra/README.md", *GUIDES]

# Appended to runs of the shipped quickstart: minutes become seconds, and nothing else changes.
SHORT = """
    --config.steps=4 --config.batch_size=8 --config.grad_accum=1 --config.eval_every=2 --config.log_every=2
    --config.task.train_size=300 --config.task.val_size=50 --config.task.test_size=50 --config.task.min_len=4
    --config.task.max_len=24
"""
# And to runs of a page's own config.
SHORT_OWN = "--config.steps=4 --config.eval_every=2 --config.log_every=2"


class Block(NamedTuple):
    language: str
    what: str
    text: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(*found) for found in re.findall(r"^```(\w*) ?(.*)\n([\s\S]*?)^```$", text, re.MULTILINE)]


def write_files(page: str, folder: Path) -> list[Path]:
    """Writes the files that a page shows into a folder."""
    paths = []
    for language, what, text in blocks(page):
        if language in ("python", "csv") and what not in ("", "parsed"):
            paths.append(folder / what)
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            paths[-1].write_text(text, encoding="utf-8")
    return paths


def commands(page: str) -> list[list[str]]:
    """The words of every `python ...` command in the bash blocks of a page, without the word python."""
    lines = [line for block in blocks(page) if block.language == "bash" for line in block.text.splitlines()]
    split = [part for line in lines for part in line.partition("  #")[0].split("&&")]
    words = [shlex.split(part) for part in split]
    return [rest for first, *rest in filter(None, words) if first == "python" and rest[:2] != ["-m", "venv"]]
