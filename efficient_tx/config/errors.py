"""Errors that know which key of a config they are about."""

import contextlib
from collections.abc import Iterator

from efficient_tx.checks import OptionError


class ConfigError(ValueError):
    """A key or a section of a config, and what is wrong with it: "config.steps is 0: it must be at least 1".

    Attributes:
      key: dotted, "optimizer.learning_rate", or of a section, "attention.skyformer".
      fault: what is wrong, the rest of the line: "is 0: it must be at least 1".
    """

    def __init__(self, key: str, fault: str):
        super().__init__(f"config.{key} {fault}")
        self.key, self.fault = key, fault


@contextlib.contextmanager
def at(section: str = "") -> Iterator[None]:
    """Gives a ValueError its place: an OptionError the key of its option in `section`, any other one the section."""
    try:
        yield
    except ConfigError:
        raise
    except OptionError as error:
        key = f"{section}.{error.option}" if section else error.option
        raise ConfigError(key, f"is {error.value!r}: {error.rule}") from None
    except ValueError as error:
        if not section:
            raise
        raise ConfigError(section, f"cannot be used: {error}") from None
