"""Time of the factorisations that compression is made of, beside LAPACK's own for the same matrices.

    python benchmarks/factorisations.py [--sizes=256,512,1024,2048] [--rounds=5]

Each is in float64, n × n, in turns with LAPACK in one process and on as many threads; medians. LAPACK's part is what
nobody can do without: for a singular value decomposition ?gesdd, for one in the norm of the inputs ?syevd and ?gesdd,
for an interpolative decomposition ?geqp3, for the R of 8 n tokens in blocks ?geqrf of all at once, for Monarch's slices
?gesdd of each in float32.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.linalg import lapack

from efficient_tx.commands import Parser, run
from efficient_tx.compare.flags import whole, wholes
from efficient_tx.compare.timing import in_turns, machine
from efficient_tx.compression.eora import compensation
from efficient_tx.compression.interpolative import interpolation, pivoted
from efficient_tx.compression.low_rank import svd
from efficient_tx.compression.statistics import tall_qr
from efficient_tx.linear import Monarch

BLOCKS = 4


def pairs(n: int) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Name -> ours and LAPACK's part."""
    draw = np.random.default_rng(n)
    matrix = draw.standard_normal((n, n))
    tokens = draw.standard_normal((8 * n, n)) @ np.diag(np.geomspace(1, 0.01, n))
    moment = tokens.T @ tokens / len(tokens)
    single = jnp.asarray(matrix, jnp.float32)
    side = n // BLOCKS
    slices = [np.asarray(single[i : i + side, j : j + side]) for i in range(0, n, side) for j in range(0, n, side)]

    def by_blocks() -> np.ndarray:
        found = np.zeros((0, n))
        for rows in np.split(tokens, 8):
            found = tall_qr([found, rows])
        return found

    def interpolative() -> np.ndarray:
        return interpolation(*pivoted(matrix), n // 2)

    return {
        "singular values": (lambda: svd(matrix), lambda: lapack.dgesdd(matrix, full_matrices=0)),
        "in the inputs' norm": (
            lambda: compensation(matrix, moment, n // 2),
            lambda: (lapack.dsyevd(moment), lapack.dgesdd(matrix, full_matrices=0)),
        ),
        "interpolative": (interpolative, lambda: lapack.dgeqp3(matrix)),
        "R of 8 n tokens": (by_blocks, lambda: lapack.dgeqrf(tokens)),
        "monarch's slices": (
            lambda: jax.block_until_ready(Monarch.from_dense(single, blocks=BLOCKS).w1[...]),
            lambda: [lapack.sgesdd(one, full_matrices=0) for one in slices],
        ),
    }


def measure(n: int, rounds: int) -> Mapping[str, tuple[float, float]]:
    """Name -> median seconds of ours and of LAPACK's part."""
    found = pairs(n)
    runs = {(name, who): calls[who] for name, calls in found.items() for who in (0, 1)}
    seconds = in_turns(runs, rounds, max_seconds=60.0)
    return {name: (seconds[name, 0], seconds[name, 1]) for name in found}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=wholes, default=(256, 512, 1024, 2048), help="n, by commas")
    parser.add_argument("--rounds", type=whole, default=5)
    arguments = parser.parse_args()
    console, table = Console(), Table(title="seconds, and × LAPACK's part")
    console.print(machine(), highlight=False)
    table.add_column("factorisation")
    found = {n: measure(n, arguments.rounds) for n in arguments.sizes}
    for n in arguments.sizes:
        table.add_column(f"n = {n:,}", justify="right")
    for name in found[arguments.sizes[0]]:
        table.add_row(name, *(f"{found[n][name][0]:.3f}  {found[n][name][0] / found[n][name][1]:.2f} ×" for n in found))
    console.print(table)


if __name__ == "__main__":
    run(main)
