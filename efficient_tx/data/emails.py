"""E-mails of SpamAssassin's public corpus, as `python -m efficient_tx.data.fetch spam` stores them."""

import pathlib
import re

from efficient_tx.data import fetched

_SAME = 1024  # e-mails that agree in this many bytes, except for white space and case, count as one

Labelled = list[tuple[bytes, int]]


def bodies(folder: pathlib.Path) -> Labelled:
    """The bodies of the fetched e-mails, each once, 1 for spam. Headers are left out, because they tell the label.

    Raises:
      ValueError: a file is missing or differs from what was fetched.
    """
    found: dict[bytes, tuple[bytes, int]] = {}
    for name, email in fetched.read(folder):
        body = re.split(rb"\r?\n\r?\n", email, maxsplit=1)[-1].strip()
        found.setdefault(b" ".join(body.lower().split())[:_SAME], (body, int(name.startswith("spam"))))
    return list(found.values())
