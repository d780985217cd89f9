"""What ends a run with one line for people, and the exit status it ends with."""

import contextlib
import signal
from collections.abc import Iterator


class RunError(Exception):
    """One line: what happened, where, and what would work.

    Attributes:
      status: exit status of the program.
      resumable: whether the same command, given again, goes on from where the run ended.
      option: whose value the line begins with, None where it begins with no option.
    """

    status = 1
    resumable = True

    def __init__(self, line: str, *, option: str | None = None):
        super().__init__(line)
        self.option = option

    @property
    def flag(self) -> str:
        """The line with its option as a flag of the command line."""
        return f"--{self.option}={self}" if self.option else str(self)


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
