"""The rungs that need no accelerator: interpreters, for every operation; compilers, for every case and target."""

import itertools
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from importlib.metadata import packages_distributions
from typing import Any

import jax
import jax.numpy as jnp

from efficient_tx.kernels.case import cases_of, label, nbytes, production, small
from efficient_tx.kernels.verify import accuracy, figures
from efficient_tx.kernels.verify.cover import cover
from efficient_tx.kernels.verify.loads import account as traffic_of_loads
from efficient_tx.kernels.verify.plan import Compilation, faults, judged_anew
from efficient_tx.kernels.verify.processes import each
from efficient_tx.kernels.verify.program import digest, ptxas
from efficient_tx.kernels.verify.targets import TARGETS
from efficient_tx.kernels.verify.traffic import account as traffic_of_blocks
from efficient_tx.kernels.verify.traffic import traffic

# Cases whose traffic is counted: few, and of at most so many bytes, because the program around is run on the host.
COUNTED, LARGEST = 3, 1 << 26
ACCOUNTS = {"pallas_tpu": traffic_of_blocks, "pallas_gpu": traffic_of_loads}

# An operation, the values of one of its cases, and an implementation.
Call = tuple[str, Any, str]


def missing(targets: Collection[str]) -> list[str]:
    """What compiling for these targets needs and this machine lacks, a line each."""
    platforms = {TARGETS[name].platform for name in targets}
    have = {package for packages in packages_distributions().values() for package in packages}
    lines = []
    if "tpu" in platforms and "libtpu" not in have:
        lines.append("no libtpu, which compiles for TPUs: pip install 'jax[tpu]'")
    if "cuda" in platforms and "jax-cuda13-plugin" not in have:
        version = jax.__version__
        plugins = f"jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}"
        lines.append(f"no CUDA plugin of jax, which compiles for GPUs: pip install --no-deps {plugins}")
    if "cuda" in platforms:
        try:
            ptxas()
        except FileNotFoundError as error:
            lines.append(str(error))
    return lines


def interpreted(operations: Collection[str], progress: Callable[[str], Any], jobs: int = 1) -> Iterator[dict[str, Any]]:
    """Runs a selection of the small cases of each operation, with fresh arrays.

    Yields:
      a row for each case and Pallas implementation: its errors beside float64, the most that rounding explains, and
      the races of a TPU's.
    """
    chosen: list[Call] = []
    for operation in operations:
        rows = list(small(operation))
        for values in (rows[number] for number in cover(rows, 2)):
            without = cases_of(operation).case(**values).without
            chosen += [(operation, values, name) for name in ACCOUNTS if name not in without]
    run = partial(interpret, seed=random.randrange(2**31))
    yield from each(run, chosen, jobs=jobs, progress=progress, what="interpreting", name=named)


def named(call: Call) -> str:
    operation, values, implementation = call
    return f"{label(operation, values)} {implementation}"


def interpret(call: Call, seed: int) -> dict[str, Any]:
    operation, values, implementation = call
    case = cases_of(operation).case(**values)
    row = {"operation": operation, "case": label(operation, values), "implementation": implementation}
    row |= accuracy.errors(case, seed, implementation=implementation, interpret=True)
    row["most"] = accuracy.most(case)
    row["races"] = accuracy.races(case, seed) if implementation == "pallas_tpu" else None
    return row


def accounts(
    operations: Collection[str], implementations: Collection[str], progress: Callable[[str], Any], jobs: int = 1
) -> Iterator[dict[str, Any]]:
    """Counts the bytes that kernels move, on some production cases of each operation.

    Yields:
      a row for each kernel of a case: the bytes, the lower bound, and their ratio.
    """
    chosen: list[Call] = []
    for operation, implementation in itertools.product(operations, implementations):
        fitting = []
        for values in production(operation):
            case = cases_of(operation).case(**values)
            if implementation not in case.without and nbytes((case.arrays, case.outputs())) <= LARGEST:
                fitting.append(values)
        chosen += [(operation, fitting[number], implementation) for number in cover(fitting, 2)[:COUNTED]]
    for rows in each(account, chosen, jobs=jobs, progress=progress, what="bytes moved", name=named):
        yield from rows


def account(call: Call) -> list[dict[str, Any]]:
    operation, values, implementation = call
    case = cases_of(operation).case(**values)
    # What is moved depends on lists of blocks, and not on numbers of standard normal arrays.
    arrays = case.filled(0, lambda _, x: jnp.zeros(x.shape, x.dtype))
    cotangents = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), case.outputs())
    on_chip = min(target.on_chip for target in TARGETS.values() if target.implementation == implementation)
    least = case.traffic(on_chip) if case.traffic else 0.0
    run = case.gradient(implementation=implementation, interpret=True)
    row = {"operation": operation, "implementation": implementation, "case": label(operation, values)}
    return [
        row
        | {"kernel": found.kernel, "moved": found.moved, "least": max(found.once, least), "ratio": found.ratio(least)}
        for found in traffic(run, arrays, cotangents, of=ACCOUNTS[implementation])
    ]


def compilations(
    planned: Collection[Compilation], stored: Mapping[str, Any], progress: Callable[[str], Any], jobs: int = 1
) -> Iterator[dict[str, Any]]:
    """Compiles what is planned and not yet `stored` with the same source.

    Yields:
      a row for each: its figures, and under "faults" what it must not have.
    """
    known = [(compilation, stored.get(compilation.name)) for compilation in planned]
    name = lambda item: item[0].name  # noqa: E731
    yield from each(compiled, known, jobs=jobs, progress=progress, what="compiling", name=name)


def compiled(item: tuple[Compilation, Mapping[str, Any] | None]) -> dict[str, Any]:
    compilation, known = item
    row = {"name": compilation.name, "operation": compilation.operation, "target": compilation.target.name}
    lowered = compilation.lowered()
    try:
        program = None if known is None or known["source"] != digest(lowered) else figures.to_program(known)
        if program is None or judged_anew(compilation, program):
            program = compilation.run(lowered)
    except jax.errors.JaxRuntimeError as error:
        return row | {"faults": [f"does not compile: {' '.join(str(error).split())[:200]}"]}
    return row | {"faults": faults(compilation, program), "figures": figures.of_program(program)}
