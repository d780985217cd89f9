"""Methods of compression by name: "svd", "low_rank(rank=8)", "monarch+eora", "sum(first='ternary')"."""

import inspect

from efficient_tx.checks import OptionError, lookup, parse_call
from efficient_tx.compression import METHODS, SECOND, Method
from efficient_tx.config.errors import ConfigError
from efficient_tx.config.objects import with_objects
from efficient_tx.linear import LINEAR
from efficient_tx.linear.form import check_options


def named_method(text: str) -> Method:
    """The method of a text: its name with options, and after a plus that of a second stage.

    Options of a weight structure are as in a config: a part of a sum is text, "low_rank(rank=8)".

    Raises:
      OptionError: an unknown name or option, or a wrong value.
    """
    first, plus, second = text.partition("+")
    method = one(first, METHODS)
    if plus:
        method = one(second, SECOND, method)
        method.name = text
    return method


def one(text: str, table: dict, *before: Method) -> Method:
    name, options = parse_call(text, "method")
    make = lookup(table, name, "method")
    try:
        if name in LINEAR:
            options = with_objects(LINEAR[name], options, name)
        else:
            own = inspect.signature(make).parameters
            check_options(name, {key: one for key, one in own.items() if one.kind is one.KEYWORD_ONLY}, options)
        method = make(*before, **options)
        method.name = text
        return method
    except ConfigError as error:
        raise OptionError("method", text, f"{error.key} {error.fault}") from None
    except (TypeError, ValueError) as error:
        raise OptionError("method", text, str(error)) from None
