"""Expressions of ListOps: their tokens, their values, and whether a sequence of tokens is one."""

from typing import NamedTuple

import numpy as np

VOCABULARY = ("<pad>", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")  # a token's id is its index
DIGIT, OPERATOR, CLOSER = VOCABULARY.index("0"), VOCABULARY.index("[MIN"), VOCABULARY.index("]")


class Expressions:
    """Ragged token sequences with labels, a random-access source. Item i is a view without a copy.

    Attributes:
      tokens: uint8, all sequences one after the other.
      offsets: int64 `[n + 1]`; sequence i is tokens[offsets[i]:offsets[i + 1]].
      labels: uint8 `[n]`, values 0 to 9.
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray, labels: np.ndarray):
        self.tokens, self.offsets, self.labels = tokens, offsets, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | int]:
        """{"inputs": uint8 `[length]`, "label": int}. Raises IndexError outside [0, len)."""
        if not 0 <= index < len(self):
            raise IndexError(f"expression {index} of {len(self)}")
        return {"inputs": self.tokens[self.offsets[index] : self.offsets[index + 1]], "label": int(self.labels[index])}

    def part(self, start: int, stop: int) -> "Expressions":
        """Expressions start to stop (excluded)."""
        return Expressions(self.tokens, self.offsets[start : stop + 1], self.labels[start:stop])

    def without_closers(self) -> "Expressions":
        """The same expressions without their closing brackets."""
        tokens = self.tokens[self.offsets[0] : self.offsets[-1]]
        offsets = self.offsets - self.offsets[0]
        closers = np.flatnonzero(tokens == CLOSER)
        return Expressions(tokens[tokens != CLOSER], offsets - np.searchsorted(closers, offsets), self.labels)

    def roots(self) -> np.ndarray:
        """The first token of each expression, `[n]`: its root operator (or the only digit)."""
        return self.tokens[self.offsets[:-1]]


def offsets_of(lengths: list[int] | np.ndarray) -> np.ndarray:
    """Where sequences of these lengths begin, one after the other, and where the last one ends: int64 `[n + 1]`."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


class Level(NamedTuple):
    """The nodes of one depth, all trees side by side, in reading order; columns `[nodes]`.

    The arguments of a level's operators, in order, are the nodes of the next level.
    """

    tree: np.ndarray  # integer, the tree of each node
    token: np.ndarray  # uint8, its id
    args: np.ndarray  # integer, its number of arguments, 0 for a digit


def measure(levels: list[Level]) -> tuple[list[np.ndarray], np.ndarray]:
    """Number of tokens of each node's subtree, level by level, and the values `[trees]` of the roots."""
    lengths, values = [], np.zeros(0, np.int64)
    for level in reversed(levels):
        length, value = np.ones(len(level.token), np.int64), level.token.astype(np.int64) - DIGIT
        is_operator = level.args > 0
        if is_operator.any():
            args = level.args[is_operator].astype(np.int64)
            starts = np.cumsum(args) - args
            length[is_operator] = 2 + np.add.reduceat(lengths[-1], starts)
            # Sorted within each operator: digits are below 10, so 10 x (rank of the operator) keeps the groups apart.
            ordered = np.sort(10 * np.repeat(np.arange(len(args)), args) + values) % 10
            results = {
                "[MIN": ordered[starts],
                "[MAX": ordered[starts + args - 1],
                "[MED": (ordered[starts + (args - 1) // 2] + ordered[starts + args // 2]) // 2,
                "[SM": np.add.reduceat(values, starts) % 10,
            }
            which = level.token[is_operator]
            value[is_operator] = np.select([which == VOCABULARY.index(name) for name in results], results.values())
        lengths.append(length)
        values = value
    return lengths[::-1], values.astype(np.uint8)


def first_fault(expressions: Expressions) -> tuple[int, str] | None:
    """The first sequence that is no expression or whose label is not its value, and what is wrong; None if all fit.

    Args:
      expressions: `offsets` begins with 0 and no sequence is empty; the tokens are in [1, 16).
    """
    tokens, offsets, labels = expressions.tokens, expressions.offsets, expressions.labels
    starts, lengths = offsets[:-1], np.diff(offsets)
    closes = tokens == CLOSER
    opens = (tokens >= OPERATOR) & ~closes
    pending = np.cumsum(opens.astype(np.int32) - closes)  # operators without their closing bracket, after each token
    pending -= np.repeat(np.append(0, pending[offsets[1:-1] - 1]), lengths)  # of the same sequence
    depth = pending - opens  # operators around a token
    roots = np.add.reduceat(~closes & (depth == 0), starts, dtype=np.int64)
    faults = {
        "a closing bracket for every operator, and an operator before every closing bracket, expected": (
            (pending[offsets[1:] - 1] != 0) | (np.minimum.reduceat(pending, starts) < 0)
        ),
        "one expression expected, not several side by side": roots != 1,
        "an operator has no arguments": np.logical_or.reduceat(opens & np.append(closes[1:], False), starts),
    }
    malformed = np.flatnonzero(np.any(list(faults.values()), axis=0))
    sound = malformed[0] if len(malformed) else len(labels)
    if sound:
        values = measure(_levels(tokens[: offsets[sound]], depth, lengths[:sound]))[1]
        wrong = np.flatnonzero(values != labels[:sound])
        if len(wrong):
            return wrong[0], f"the expression has the value {values[wrong[0]]}, not {labels[wrong[0]]}"
    return (sound, next(what for what, found in faults.items() if found[sound])) if len(malformed) else None


def _levels(tokens: np.ndarray, depth: np.ndarray, lengths: np.ndarray) -> list[Level]:
    """The levels of well-formed expressions of these lengths, from their tokens and the operators around each token."""
    nodes = np.flatnonzero(tokens != CLOSER)
    depths = depth[nodes]
    order = np.argsort(depths.astype(np.min_scalar_type(depths.max())), kind="stable")
    places = np.split(nodes[order], np.cumsum(np.bincount(depths))[:-1])
    trees = np.repeat(np.arange(len(lengths)), lengths)
    levels = []
    for here, below in zip(places, [*places[1:], nodes[:0]]):
        args, operators = np.zeros(len(here), np.int64), np.flatnonzero(tokens[here] >= OPERATOR)
        # The operator around a node is the last one before it in the level above.
        args[operators] = np.bincount(np.searchsorted(here[operators], below) - 1, minlength=len(operators))
        levels.append(Level(trees[here], tokens[here], args))
    return levels
