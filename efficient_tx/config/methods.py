"""Methods of compression by name: "svd", "low_rank(rank=8)", "monarch+eora"."""

from efficient_tx.checks import OptionError, lookup, parse_call
from efficient_tx.compression import METHODS, SECOND, Method


def named_method(text: str) -> Method:
    """The method of a text: its name with options, and after a plus that of a second stage.

    Raises:
      OptionError: an unknown name or option, or a wrong value.
    """
    first, plus, second = text.partition("+")
    method = one(first, METHODS)
    return one(second, SECOND, method) if plus else method


def one(text: str, table: dict, *before: Method) -> Method:
    name, options = parse_call(text, "method")
    make = lookup(table, name, "method")
    try:
        return make(*before, **options)
    except (TypeError, ValueError) as error:
        raise OptionError("method", text, str(error)) from None
