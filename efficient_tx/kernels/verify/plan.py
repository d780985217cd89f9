"""What is compiled: every operation's cases, forward and with gradients, for every target, or a selection of these."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from efficient_tx.kernels.case import OPERATIONS, Case, cases_of, label, production
from efficient_tx.kernels.verify.cover import cover
from efficient_tx.kernels.verify.program import Program, lowered, program
from efficient_tx.kernels.verify.targets import TARGETS, Target

PASSES = ("forward", "gradient")

# Most temporaries of a fallback, as `MOST_TEMPORARIES` of a kernel: XLA gives its loops copies of arrays in layouts of
# their own. Cotangents of keys that heads share are float32 ones of every head until they are added, and each head has
# a block of weights, 128 x 128. That is linear in the length all the same: of 65536 tokens one matrix of all pairs is
# at least 128 times the arrays.
MOST_OF_A_FALLBACK = 2.0
# Widest head for which no register may be spilled, in kernels of less than float32.
WIDEST = 128
GATES = tuple(name for name, target in TARGETS.items() if target.gate)


@dataclass(frozen=True)
class Compilation:
    """One case of an operation, which pass of it, and for which target."""

    operation: str
    values: Any
    which: str
    target: Target

    @property
    def name(self) -> str:
        return f"{label(self.operation, self.values)} {self.which} {self.target.name}"

    def case(self) -> Case:
        return cases_of(self.operation).case(**self.values)

    def lowered(self) -> jax.stages.Lowered:
        """Lowers it as a user's program would be: the operation chooses the implementation."""
        case = self.case()
        arguments = (case.arrays,) if self.which == "forward" else (case.arrays, case.outputs())
        return lowered(getattr(case, self.which)(), *arguments, target=self.target)

    def run(self, lowered: jax.stages.Lowered | None = None) -> Program:
        """Compiles it quickly, and if that takes too much memory as a user's program is compiled.

        Compiled quickly, what fits into a TPU's VMEM is in main memory.
        """
        lowered = self.lowered() if lowered is None else lowered
        found = program(lowered, self.target)
        return program(lowered, self.target, quickly=False) if judged_anew(self, found) else found


def everything(
    operations: Collection[str] = OPERATIONS, targets: Collection[str] = tuple(TARGETS)
) -> Iterator[Compilation]:
    """All compilations of these operations for these targets."""
    for operation in operations:
        for values in production(operation):
            for which in PASSES:
                for target in targets:
                    yield Compilation(operation, values, which, TARGETS[target])


def selection(
    operations: Collection[str] = OPERATIONS, targets: Collection[str] = GATES, strength: int = 2
) -> list[Compilation]:
    """Those that have every pair (strength 2) or triple (3) of values, passes and targets of each operation."""
    chosen = []
    for operation in operations:
        rows = list(everything([operation], targets))
        of_row = [{**row.values, "which": row.which, "target": row.target.name} for row in rows]
        chosen += [rows[number] for number in cover(of_row, strength)]
    return chosen


def share_of_temporaries(compilation: Compilation, program: Program) -> float:
    """Bytes of temporaries, divided by those of arrays, outputs and what is saved."""
    saved = compilation.case().saved_bytes() if compilation.which == "gradient" else 0
    return program.temporaries / (program.arguments + program.outputs + saved)


def most_temporaries(compilation: Compilation) -> float:
    case = compilation.case()
    return MOST_OF_A_FALLBACK if compilation.target.implementation in case.without else case.temporaries


def judged_anew(compilation: Compilation, program: Program) -> bool:
    """Whether a program that was compiled quickly takes so much memory that the one of a user is to be looked at."""
    return compilation.target.platform == "tpu" and share_of_temporaries(compilation, program) > most_temporaries(
        compilation
    )


def faults(compilation: Compilation, program: Program) -> list[str]:
    """What a compiled program has that it must not have, a line each."""
    case, target = compilation.case(), compilation.target
    found = []
    expected = target.implementation not in case.without
    if expected != bool(program.kernels):
        found.append(
            "no kernel in the program"
            if expected
            else f"a kernel, which cases.py says is without {target.implementation}"
        )
    if (share := share_of_temporaries(compilation, program)) > most_temporaries(compilation):
        found.append(f"temporaries of {program.temporaries} bytes, {share:.2f} times arrays, outputs and what is saved")
    narrow = any(jnp.issubdtype(x.dtype, jnp.inexact) and x.dtype.itemsize < 4 for x in case.arrays)
    for kernel in program.kernels:
        if kernel.tf32 and not narrow:
            found.append(f"{kernel.name}: {kernel.tf32} instructions of tf32 in float32")
        if kernel.registers and kernel.spills and narrow and compilation.values.get("dim", 0) <= WIDEST:
            found.append(f"{kernel.name}: {kernel.spills} bytes of registers spilled")
    return found
