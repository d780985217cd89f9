"""Progress of a comparison: it takes minutes before the first table."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def progress(console: Console) -> Iterator[Callable[[str], None]]:
    """Yields what shows a line: beside a spinner on a terminal, elsewhere on standard error, one every few seconds."""
    began = time.monotonic()
    if console.is_terminal:
        with console.status("starting") as status:
            yield lambda line: status.update(f"{line} ({time.monotonic() - began:.0f} s)")
        return
    told = began

    def say(line: str) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= SECONDS_BETWEEN_LINES:
            told = now
            print(f"{now - began:.0f} s: {line}", file=sys.stderr, flush=True)

    yield say


def counted(console: Console) -> Progress:
    """A bar with a line on what is done, how many of how many, and the time left; only on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
