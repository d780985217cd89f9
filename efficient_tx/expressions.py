"""Expressions that people type: a name with options, "low_rank(rank=8)"."""

import ast
from typing import Any


def parse_call(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of "name" or "name(option=value, ...)", with plain values.

    Raises:
      ValueError: it is neither.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            return node.func.id, {word.arg: ast.literal_eval(word.value) for word in node.keywords if word.arg}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    raise ValueError(f"{text!r} is no name with options, as in low_rank(rank=8)")
