"""What ends a run with one line for people, and the exit status it ends with."""

import contextlib
import signal
from collections.abc import Iterator


class RunError(Exception):
    """One line: what happened, where, and what would work.

    Attributes:
      status: exit status of the program.
      resumable: whether the same command, given again, goes on from where the run ended.
    """

    status = 1
    resumable = True


class Refused(RunError):
    """What was asked for cannot be done; nothing was changed."""

    status = 2
    resumable = False


class NonFinite(RunError):
    """The loss, a gradient or a parameter became infinite or NaN."""

    status = 3
    resumable = False


class Interrupted(RunError):
    """A signal asked the run to stop, and it did so at a step from which it can go on."""

    def __init__(self, signum: int, line: str):
        super().__init__(f"stopped by {signal.Signals(signum).name}: {line}")
        self.status = 128 + signum


@contextlib.contextmanager
def refusing(where: str = "") -> Iterator[None]:
    """Turns what wrong settings, missing data or a missing package raise into Refused, headed by `where`."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise Refused(f"{where}: {error}" if where else str(error)) from error
