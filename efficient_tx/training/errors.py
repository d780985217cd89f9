"""Errors that end a run with one line and an exit status."""

import contextlib
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path

from efficient_tx.checks import OptionError


class RunError(Exception):
    """An error in one line: what happened, where, and what would help.

    Attributes:
      status: exit status of the program.
      resumable: whether the same command can resume the run.
      together: whether all processes of the run end with this error, after the same step.
      option: the option whose value begins the line; None if no option does.
    """

    status = 1
    resumable = True
    together = False

    def __init__(self, line: str, *, option: str | None = None):
        super().__init__(line)
        self.option = option

    @property
    def flag(self) -> str:
        """The line, with its option written as a command-line flag."""
        return f"--{self.option}={self}" if self.option else str(self)


class Refused(RunError):
    """The request cannot be fulfilled; nothing was changed."""

    status = 2
    resumable = False

    @classmethod
    def of(cls, error: ValueError) -> "Refused":
        """The refusal of a wrong setting; one of an option names it."""
        if isinstance(error, OptionError):
            return cls(f"{error.value}: {error.rule}", option=error.option)
        return cls(str(error))


class InUse(Refused):
    """The workdir belongs to a live run."""


class Gone(RunError):
    """A file or folder of the run was deleted or replaced while the run was using it."""

    resumable = False


class NonFinite(RunError):
    """The loss, a gradient or a parameter became infinite or NaN."""

    status = 3
    resumable = False
    together = True


class Interrupted(RunError):
    """A signal stopped the run at a step from which it can resume."""

    together = True

    def __init__(self, signum: int, line: str):
        super().__init__(f"stopped by {signal.Signals(signum).name}: {line}")
        self.status = 128 + signum


@contextlib.contextmanager
def refusing(where: str = "") -> Iterator[None]:
    """Turns errors from wrong settings, missing data or a missing package into Refused, with `where` in front."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise Refused(f"{where}: {error}" if where else str(error)) from error


def innermost(error: BaseException) -> traceback.FrameSummary:
    """The innermost place of an error that is not in another library."""
    ours, frames = str(Path(__file__).parents[1]), traceback.extract_tb(error.__traceback__)
    near = [frame for frame in frames if frame.filename.startswith(ours) or "site-packages" not in frame.filename]
    return (near or frames)[-1]


def not_finite(error: NonFinite | FloatingPointError) -> str:
    """The line on numbers that are not finite: a run's own, or what jax raises under debug_nans."""
    return str(error) if isinstance(error, NonFinite) else f"not finite: a NaN came up in {place_of_nan(error)}"


def place_of_nan(error: FloatingPointError) -> str:
    """Where the NaN of an error of `jax.debug_nans` came up: "FILE:LINE (function)", of the model's code.

    Of a NaN in a gradient it is the line whose gradient it is, and the text says so.
    """
    place = innermost(error.__cause__ or error)
    text = f"{place.filename}:{place.lineno} ({place.name})"
    return f"the gradient of {text}" if error.__cause__ else text
