"""Scores, masks and weight structures with options, which a config gives as text.

"module:name" is one of a user's own; others have this project's names.
"""

import ast
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, get_args

from efficient_tx.checks import OptionError, parse_call
from efficient_tx.config.errors import ConfigError, at, blame
from efficient_tx.config.names import attribute, structure_class
from efficient_tx.kernels.flash_attention import Mask, Score, causal, prefix, window
from efficient_tx.linear import Form

MASKS: dict[str, Callable[..., Mask]] = {"causal": causal, "window": window, "prefix": prefix}
OPERATORS = {ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.Invert: operator.invert}
# Types of arguments that are text in a config.
KINDS = (Score, Mask, Form)


def kind_of(annotation: Any) -> type | None:
    """The one of `KINDS` that an argument of this annotation takes, or None."""
    return next((kind for kind in KINDS if kind in (annotation, *get_args(annotation))), None)


def with_objects(cls: type, section: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options of `cls` in a section, with objects in place of the text that names them.

    Raises:
      ConfigError: text that names none, of the key in the section `where`.
    """
    made = dict(section)
    for name, parameter in inspect.signature(cls).parameters.items():
        if (kind := kind_of(parameter.annotation)) and isinstance(made.get(name), str):
            made[name] = named(made[name], kind, f"{where}.{name}")
    return made


def named(text: str, kind: type, where: str) -> Any:
    """The Score, Mask or Form of this name; a name of a score in `SCORES` stays one, and "" is no mask and no form."""
    if kind is Form:
        return form(text, where) if text else None
    if ":" not in text:
        return text if kind is Score else expression(text, where) if text else None
    found = attribute(text, where)
    if isinstance(found, type) and issubclass(found, kind):
        try:
            return found()
        except Exception as error:  # in a class of the user's own
            raise ConfigError(where, f"is {text!r}, which cannot be made: {blame(error)}") from None
    if not isinstance(found, kind):
        raise ConfigError(where, f"is {text!r}: that is no efficient_tx.kernels.flash_attention.{kind.__name__}")
    return found


def form(text: str, where: str) -> Form:
    """The weight structure of "monarch(blocks=4)" or "module:Class(rank=2)"; names and options only, no sizes.

    Raises:
      ConfigError: an unknown structure or option, or a value of another type, of the key `where`.
    """
    with at():
        name, options = parse_call(text, where)
    structure = structure_class(name, where)
    try:
        return Form(structure, **options)
    except ValueError as error:
        raise ConfigError(where, f"is {text!r}: {error}") from None


def expression(text: str, where: str) -> Mask:
    """The mask of "window(64) | prefix(4)": calls of `MASKS` with numbers, combined by &, | and ~."""
    try:
        return value(ast.parse(text.strip(), mode="eval").body)
    except (KeyError, SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        fault = f"{error}; " if isinstance(error, OptionError) else ""
        wanted = f"give module:name, or {', '.join(MASKS)} combined by &, | and ~, as in 'window(64) | prefix(4)'"
        raise ConfigError(where, f"is {text!r}: {fault}{wanted}") from None


def value(node: ast.AST) -> Mask:
    match node:
        case ast.BinOp(left, op, right):
            return OPERATORS[type(op)](value(left), value(right))
        case ast.UnaryOp(op, operand):
            return OPERATORS[type(op)](value(operand))
        case ast.Call(ast.Name(name), arguments, []):
            return MASKS[name](*map(ast.literal_eval, arguments))
    raise ValueError(ast.dump(node))
