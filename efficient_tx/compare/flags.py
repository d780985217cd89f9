"""Flags of the commands: parsers of their values; a wrong value ends in one line."""

import argparse
from pathlib import Path

from efficient_tx.commands import parts
from efficient_tx.files import local_path


def path(text: str) -> Path:
    """A path of this machine: see `local_path`."""
    try:
        return local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def whole(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def wholes(text: str) -> tuple[int, ...]:
    """A list of integers of at least 1, ascending."""
    return tuple(sorted(set(map(whole, parts(text)))))


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number
