"""Sentences: English ones out of the State of the Union addresses, drawn by a seed."""

import os
import re

from efficient_tx.checks import OptionError, at_least
from efficient_tx.data import fetched, order

# The shortest are headings and what an abbreviation has cut off.
WORDS = range(5, 51)


def sentences(count: int, *, data_dir: str | os.PathLike | None = None, seed: int = 0) -> list[str]:
    """Different sentences of 5 to 50 words, as fetched by `python -m efficient_tx.data.fetch sotu`.

    Args:
      count: number of sentences; a larger one has those of a smaller one first.
      data_dir: see `task.data_directory`.
      seed: of their order.

    Raises:
      FileNotFoundError: the addresses are not there.
      ValueError: a file differs from what was fetched, or there are fewer sentences.
    """
    at_least(1, count=count)
    at_least(0, seed=seed)
    found = {
        sentence
        for _, text in fetched.read(fetched.find("sotu", data_dir, "addresses"))
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(text.decode().split()))
        if len(sentence.split()) in WORDS
    }
    if count > len(found):
        raise OptionError("count", count, f"there are {len(found)} sentences")
    return sorted(found, key=lambda sentence: order.place(sentence.encode(), seed))[:count]
