"""Errors that name the config key they are about."""

import contextlib
import traceback
from collections.abc import Collection, Iterator
from pathlib import Path

from efficient_tx.checks import OptionError

# Files that a user did not write: this package, what starts it, what Python generates, and Python's own.
OURS = (str(Path(__file__).parents[1]), "<frozen", "<string>", str(Path(traceback.__file__).parent))


class ConfigError(ValueError):
    """A fault in a key or section of a config: "config.steps is 0: it must be at least 1".

    Attributes:
      key: dotted key, "optimizer.learning_rate", or section, "attention.skyformer".
      fault: the rest of the line: "is 0: it must be at least 1".
    """

    def __init__(self, key: str, fault: str):
        super().__init__(f"config.{key} {fault}")
        self.key, self.fault = key, fault


@contextlib.contextmanager
def at(section: str = "", *, others: Collection[str] = ()) -> Iterator[None]:
    """Turns an OptionError into the ConfigError of its key in `section`, other ValueErrors into that of the section.

    OptionErrors of the `others` stay: they are of an outer section.
    """
    try:
        yield
    except ConfigError:
        raise
    except OptionError as error:
        if error.option in others:
            raise
        key = f"{section}.{error.option}" if section else error.option
        raise ConfigError(key, f"is {error.value!r}: {error.rule}") from None
    except ValueError as error:
        if not section:
            raise
        raise ConfigError(section, f"cannot be used: {error}") from None


def blame(error: Exception) -> str:
    """One line on an error in a module of the user's own: its type, its message, and the user's line that led to it."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [
        frame for frame in frames if not frame.filename.startswith(OURS) and "site-packages" not in frame.filename
    ]
    place = f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
