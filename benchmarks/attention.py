"""Times attention, forward and backward, on this machine: ours beside PyTorch's, jax's and each other.

    python benchmarks/attention.py [--rounds 9] [--only softmax,causal] [--out FILE.json]

Each group runs in turns in one process, and the table shows medians and their ratio to the group's first row. On a
shared machine compare the ratios, not the milliseconds. A group that needs PyTorch is shorter without it.

    softmax   2 heads of 32 in float32, 8 examples of 2,048 tokens and 2 of 8,192: ours, scaled_dot_product_attention of
              PyTorch, jax.nn.dot_product_attention
    own       the same with a score of one's own that computes the softmax's
    causal    the causal form, which needs half of the products
    gla       gated linear attention at 16,384 tokens
    products  what share of the rate of this machine's matrix products is reached
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"

import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from efficient_tx.commands import Parser, names_of, run
from efficient_tx.files import local_path
from efficient_tx.kernels import flash_attention, gated_linear_attention
from efficient_tx.kernels.flash_attention import Score

HEADS, HEAD_DIM = 2, 32
SIZES = {"8 × 2,048": (8, 2048), "2 × 8,192": (2, 8192)}
# Seconds between two measurements: PyTorch's threads spin for a while after their work is done.
PAUSE = 0.2
# Products of queries × keys × head_dim: two forward, five backward, of two operations each.
OPERATIONS = 2 * 7

Row = tuple[str, Callable[[], object]]


@dataclass(frozen=True)
class Own(Score):
    """The softmax, written out as one's own: the inner product, and a number that a user might add."""

    shift: float = 1.0

    def logits(self, dot, q_norm, k_norm, i, j, head):
        return dot + self.shift


def arrays(batch: int, length: int) -> list[jax.Array]:
    r = np.random.default_rng(0)
    return [jnp.asarray(r.normal(size=(batch, length, HEADS, HEAD_DIM)), jnp.float32) for _ in range(3)]


def ours(function: Callable, q: jax.Array, k: jax.Array, v: jax.Array) -> Callable[[], object]:
    """A call of the compiled gradient, warmed up."""
    gradient = jax.jit(jax.grad(lambda q, k, v: jnp.square(function(q, k, v)).sum(), (0, 1, 2)))
    jax.block_until_ready(gradient(q, k, v))
    return lambda: jax.block_until_ready(gradient(q, k, v))


def pytorch(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False) -> Callable[[], object]:
    import torch

    torch.set_num_threads(os.cpu_count())
    tensors = [torch.from_numpy(np.asarray(x).swapaxes(1, 2).copy()).requires_grad_() for x in (q, k, v)]

    def call():
        for tensor in tensors:
            tensor.grad = None
        torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal).square().sum().backward()

    call()
    return call


def softmax(batch: int, length: int) -> list[Row]:
    x = arrays(batch, length)
    rows = [("PyTorch", pytorch(*x))] if importlib.util.find_spec("torch") else []
    return [*rows, ("flash_attention", ours(flash_attention, *x)), ("jax.nn", ours(jax.nn.dot_product_attention, *x))]


def own(batch: int, length: int) -> list[Row]:
    x = arrays(batch, length)
    return [
        ("score='softmax'", ours(flash_attention, *x)),
        ("a score of one's own", ours(lambda *x: flash_attention(*x, score=Own()), *x)),
    ]


def causal(batch: int, length: int) -> list[Row]:
    x = arrays(batch, length)
    rows = [("all keys", ours(flash_attention, *x))]
    rows.append(("causal", ours(lambda *x: flash_attention(*x, causal=True), *x)))
    return rows + ([("causal, PyTorch", pytorch(*x, causal=True))] if importlib.util.find_spec("torch") else [])


def gla() -> list[Row]:
    x = arrays(1, 16384)
    decay = -jnp.abs(x[0]) / 16
    return [
        ("flash_attention", ours(flash_attention, *x)),
        ("gla", ours(lambda q, k, v: gated_linear_attention(q, k, v, log_decay=decay)[0], *x)),
    ]


def products() -> list[Row]:
    """As many operations as the attention of 8 × 2,048 tokens has, in products of squares that fill the caches."""
    batch, length = SIZES["8 × 2,048"]
    side = 1024
    count = round(OPERATIONS * batch * HEADS * length**2 * HEAD_DIM / (2 * side**3))
    r = np.random.default_rng(0)
    square = jnp.asarray(r.normal(size=(side, side)) / side**0.5, jnp.float32)

    @jax.jit
    def multiply(x):
        return jax.lax.fori_loop(0, count, lambda _, x: jnp.matmul(x, square), x)

    jax.block_until_ready(multiply(square))
    return [
        ("flash_attention", ours(flash_attention, *arrays(batch, length))),
        ("matrix products alone", lambda: jax.block_until_ready(multiply(square))),
    ]


GROUPS: dict[str, Callable[[], dict[str, list[Row]]]] = {
    **{
        name: lambda name=name, function=function: {f"{name}, {size}": function(*SIZES[size]) for size in SIZES}
        for name, function in (("softmax", softmax), ("own", own), ("causal", causal))
    },
    "gla": lambda: {"gla, 1 × 16,384": gla()},
    "products": lambda: {"products, 8 × 2,048": products()},
}


def timed(rows: list[Row], rounds: int) -> dict[str, float]:
    """Median milliseconds of each row, run in turns."""
    times: dict[str, list[float]] = {name: [] for name, _ in rows}
    for _ in range(rounds):
        for name, call in rows:
            time.sleep(PAUSE)
            began = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(found) for name, found in times.items()}


def main(argv: list[str]) -> None:
    parser = Parser(prog="python benchmarks/attention.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each row (default: 9)")
    parser.add_argument("--only", type=names_of(GROUPS, "group"), default=list(GROUPS), metavar="A,B",
                        help="default: all of " + ", ".join(GROUPS))  # fmt: skip
    parser.add_argument("--out", type=local_path, help="a file for the figures, as JSON")
    args = parser.parse_args(argv)
    found = {}
    for group in args.only:
        for title, rows in GROUPS[group]().items():
            found[title] = timed(rows, args.rounds)
            table = Table(title=title)
            for head in ("", "ms", "ratio"):
                table.add_column(head, justify="left" if not head else "right")
            first = next(iter(found[title].values()))
            for name, ms in found[title].items():
                table.add_row(name, f"{ms:.1f}", f"{ms / first:.3f}")
            Console().print(table)
    machine = {"cores": os.cpu_count(), "jax": jax.__version__, "processor": platform.processor() or platform.machine()}
    if args.out:
        Path(args.out).write_text(
            json.dumps({"machine": machine, "rounds": args.rounds, "medians_ms": found}, indent=1)
        )


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
