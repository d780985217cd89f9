"""Range checks of user options, and look-ups of names that people typed."""

import ast
import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class OptionError(ValueError):
    """An option has a wrong value: "landmarks is 1: it must be at least 2".

    Attributes:
      option: the option's name, dotted if it is in a section of a config.
      value: the given value.
      rule: the rest of the line: which values are allowed.
    """

    def __init__(self, option: str, value: Any, rule: str):
        super().__init__(f"{option} is {value!r}: {rule}")
        self.option, self.value, self.rule = option, value, rule

    def __reduce__(self):  # from process to process
        return type(self), (self.option, self.value, self.rule)

    def within(self, section: str) -> "OptionError":
        """The same error of an option in `section`."""
        return OptionError(f"{section}.{self.option}", self.value, self.rule)


def at_least(least: int, **options: int | None) -> None:
    """Raises OptionError for the first option below `least`; None means not given and passes."""
    for name, value in options.items():
        if value is not None and value < least:
            raise OptionError(name, value, f"it must be at least {least}")


def at_most(most: int, **options: int | None) -> None:
    """Raises OptionError for the first option above `most`; None means not given and passes."""
    for name, value in options.items():
        if value is not None and value > most:
            raise OptionError(name, value, f"it must be at most {most}")


def above_zero(**options: float | None) -> None:
    """Raises OptionError for the first option that is not a finite number above 0; None means not given and passes."""
    for name, value in options.items():
        if value is not None and not 0 < value < float("inf"):
            raise OptionError(name, value, "it must be a number above 0")


def one_of(choices: Collection[str], **options: str) -> None:
    """Raises OptionError for the first option that is not one of `choices`; the message names the nearest one."""
    for name, value in options.items():
        if value not in choices:
            near = nearest(value, choices)
            raise OptionError(name, value, f"choose one of {', '.join(choices)} (nearest: {near!r})")


def lookup(table: Mapping[str, T], name: str, where: str) -> T:
    """table[name]; an unknown name raises the OptionError of `one_of` for the option `where`."""
    one_of(table, **{where: name})
    return table[name]


def parse_call(text: str, where: str) -> tuple[str, dict[str, Any]]:
    """The name and the options in "name(option=value, ...)", "name" or "module:name(...)"; runs nothing.

    Args:
      text: what a person typed; values are Python's numbers, strings, tuples, True, False and None.
      where: the option that has this text, for the error.

    Raises:
      OptionError: the text has another form.
    """
    match = re.fullmatch(r"\s*([\w.]+(?::\w+)?)\s*(\(.*\))?\s*", text, re.DOTALL)
    try:
        # The name may be no Python name, so any other stands in for it.
        call = ast.parse(f"_{match[2] or '()'}", mode="eval").body if match else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
            if None not in options and len(options) == len(call.keywords):  # no **, nothing twice
                return match[1], options
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        pass
    raise OptionError(where, text, "give NAME or NAME(OPTION=VALUE, ...), with numbers or quoted text as values")


def nearest(name: str, choices: Iterable[str]) -> str:
    """The choice most similar to `name`."""
    return max(choices, key=lambda choice: similarity(name, choice))


def similarity(one: str, other: str) -> float:
    """How similar two names are, whatever their case: 1 if they are the same, 0 if they share no letter."""
    return difflib.SequenceMatcher(None, str(other).lower(), str(one).lower()).ratio()
