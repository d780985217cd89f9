"""ListOps from the files of Long Range Arena: a line has an expression, a tab and its value.

( ( ( [MAX 4 ) 3 ) ] )<tab>4        parentheses say nothing that the brackets do not
"""

import pathlib

import numpy as np

from lra import release
from lra.expressions import VOCABULARY, Expressions, first_fault, offsets_of

_IDS = {name.encode(): i for i, name in enumerate(VOCABULARY) if i}
_SPACED = bytes.maketrans(b"()", b"  ")
_CHECKED = 2**18  # tokens that are checked at once, few enough for the processor's cache


def find(source: str) -> pathlib.Path:
    """The directory of the three files in an unpacked archive. Raises FileNotFoundError."""
    return release.find(
        source,
        ["listops-1000", "lra_release/listops-1000", ""],
        lambda place: (place / "basic_train.tsv").is_file(),
        holds="listops-1000/basic_train.tsv, basic_val.tsv and basic_test.tsv",
        missing="basic_train.tsv (beside basic_val.tsv and basic_test.tsv, first line Source<tab>Target) is",
    )


def read(path: pathlib.Path, size: int, min_len: int, max_len: int) -> Expressions:
    """The first `size` expressions of a file that are within the length bounds, or as many as there are.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line that was read is no expression with its value, or none is within the bounds.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file (ListOps needs it beside basic_train.tsv)")
    tokens, labels, kept = [], bytearray(), []
    checked = pending = 0  # lines, and tokens since
    with open(path, "rb") as file:
        if file.readline().split() != [b"Source", b"Target"]:
            raise ValueError(f"{path}, line 1: the header must be Source<tab>Target")
        for number, line in enumerate(file):
            text, _, label = line.rstrip().rpartition(b"\t")
            if len(label) != 1 or not label.isdigit():
                raise ValueError(f"{path}, line {number + 2}: expected an expression, a tab and its value from 0 to 9")
            try:
                expression = _tokens(text)
            except ValueError as error:
                raise ValueError(f"{path}, line {number + 2}: {error}") from None
            tokens.append(expression)
            labels += label
            pending += len(expression)
            if min_len < len(expression) < max_len:
                kept.append(number)
            if len(kept) == size:
                break
            if pending >= _CHECKED:
                _check(path, tokens, labels, checked)
                checked, pending = len(tokens), 0
    _check(path, tokens, labels, checked)
    if not kept:
        raise ValueError(f"{path}: no expression longer than {min_len=} and shorter than {max_len=}")
    tokens = [tokens[number] for number in kept]
    labels = np.frombuffer(labels, np.uint8)[kept] - ord("0")
    return Expressions(np.frombuffer(b"".join(tokens), np.uint8), offsets_of([len(one) for one in tokens]), labels)


def _tokens(text: bytes) -> bytes:
    """The token ids of an expression in words. Raises ValueError, what is wrong with it."""
    try:
        tokens = bytes(map(_IDS.__getitem__, text.translate(_SPACED).split()))
    except KeyError as error:
        word = error.args[0][:20].decode(errors="replace")
        raise ValueError(f"{word!r} is none of ( ) {' '.join(VOCABULARY[1:])}") from None
    if not tokens or text.count(b"(") != text.count(b")"):
        raise ValueError("expected an expression, with as many ( as )")
    return tokens


def _check(path: pathlib.Path, tokens: list[bytes], labels: bytes, start: int) -> None:
    """Raises ValueError for the first of the lines from `start` that is no expression with its value."""
    lines = tokens[start:]
    values = np.frombuffer(bytes(labels[start:]), np.uint8) - ord("0")
    expressions = Expressions(np.frombuffer(b"".join(lines), np.uint8), offsets_of([len(one) for one in lines]), values)
    if lines and (fault := first_fault(expressions)):
        raise ValueError(f"{path}, line {start + fault[0] + 2}: {fault[1]}")
