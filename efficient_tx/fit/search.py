"""The largest batch that fits: memory grows linearly with it, so a line through two sizes says where to look."""

from collections.abc import Callable

# Nobody asks for more, and counters of a program are int32.
MOST = 1 << 20
# By so much a larger batch is known not to fit: exactly one step below 100.
WITHIN = 100
# Sizes after which the line is not believed any more: steps are doubled up to what does not fit, then intervals halved.
PATIENCE = 4


def largest(memory: Callable[[int], float], limit: float, start: int) -> int:
    """The largest whole number, up to 1 %, whose `memory` is within the limit; 0 if that of 1 is not.

    Both it and the next one that is looked at, at most 1 % above, have been asked for: the line only says where to
    look. MOST is the end.

    Args:
      memory: does not fall; may be infinite. Every call compiles: a few are made.
      limit: of memory.
      start: the first number asked for; twice it, or half of it if that is too much, is the second.
    """
    known = {start: memory(start)}
    second = 2 * start if known[start] <= limit else start // 2
    if second:
        known[second] = memory(second)
    while True:
        before, low = sorted([0, 0, *(number for number, taken in known.items() if taken <= limit)])[-2:]
        high = min((number for number, taken in known.items() if taken > limit), default=MOST + 1)
        margin = max(1, low // WITHIN)
        if high - low <= margin:
            return low
        if len(known) < 2 + PATIENCE:
            ask = min(max(crossing(known, limit), low + margin), max(high - margin, low + 1))
        else:
            ask = low + 2 * (low - before) if low and high > MOST else (low + high) // 2
        ask = min(ask, MOST)
        known[ask] = memory(ask)


def crossing(known: dict[int, float], limit: float) -> int:
    """Where the line through the smallest number and the one nearest to the limit reaches it; MOST if it does not.

    Not through the two nearest: near its limit a compiler computes anew what it would store, and memory hardly rises.
    """
    one, *others = sorted(number for number, taken in known.items() if taken < float("inf")) or [0]
    if not others:
        return 1
    other = min(others, key=lambda number: abs(known[number] - limit))
    slope = (known[other] - known[one]) / (other - one)
    return min(MOST, int(one + (limit - known[one]) / slope)) if slope > 0 else MOST
