"""The figures of compiled programs in a file, and whether one of them has grown since they were written."""

import datetime
import json
import platform
from collections.abc import Collection, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from efficient_tx.files import write
from efficient_tx.kernels.verify.program import Kernel, Program, ptxas_version
from efficient_tx.kernels.verify.targets import TARGETS

# What the figures of a platform depend on: packages, and ptxas.
COMPILERS = {"tpu": ("jax", "jaxlib", "libtpu"), "cuda": ("jax", "jaxlib", "jax-cuda13-plugin", "ptxas")}
# How much larger than before a figure may be: compilers' choices move by a few per cent with any change.
GROWTH = 1.1


def versions() -> dict[str, str]:
    names = dict.fromkeys(name for of in COMPILERS.values() for name in of)
    return {"Python": platform.python_version()} | {name: version_of(name) for name in names}


def version_of(name: str) -> str:
    """The version of a package or of ptxas, "none" of what is not there."""
    if name == "ptxas":
        return ptxas_version()
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def comparable(stored: Mapping[str, Any], platform: str) -> bool:
    """Whether what is stored for a platform is of the compilers that are here: others may choose otherwise."""
    return all(stored["versions"].get(name) == version_of(name) for name in COMPILERS[platform])


def of_program(program: Program) -> dict[str, Any]:
    """What is stored of a program, as JSON has it; figures that a platform does not have are left out."""
    kernels = [{name: x for name, x in asdict(kernel).items() if x is not None} for kernel in program.kernels]
    figures = {name: getattr(program, name) for name in ("source", "arguments", "outputs", "temporaries", "loops")}
    return {"seconds": round(program.seconds, 2), **figures, "kernels": kernels}


def to_program(figures: Mapping[str, Any]) -> Program:
    """The program that `of_program` was given, but for its text."""
    return Program(**{**figures, "kernels": tuple(Kernel(**kernel) for kernel in figures["kernels"])}, text="")


def grown(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The static figures that have grown by more than a tenth since they were stored, a line each."""
    found = []

    def compare(what: str, old: float | None, new: float | None) -> None:
        if old is not None and new is not None and new > GROWTH * old:
            found.append(f"{what} grew from {old} to {new}")

    compare("temporaries", before["temporaries"], now["temporaries"])
    for name in dict.fromkeys(kernel["name"] for kernel in now["kernels"]):
        for figure in ("on_chip", "instructions", "spills", "registers"):
            compare(f"{figure} of {name}", *(largest(program, name, figure) for program in (before, now)))
    return found


def largest(program: Mapping[str, Any], name: str, figure: str) -> float | None:
    """Of the kernels of this name: a program may have several, of other sizes; None where none has the figure."""
    return max((k[figure] for k in program["kernels"] if k["name"] == name and figure in k), default=None)


def read(path: Path) -> dict[str, Any]:
    """The figures of programs by name that can be compared with those of now; empty where there are none."""
    stored = json.loads(path.read_text()) if path.exists() else {"programs": {}}
    platforms = {platform_of(name) for name in stored["programs"]}
    same = {platform for platform in platforms if comparable(stored, platform)}
    return {name: program for name, program in stored["programs"].items() if platform_of(name) in same}


def platform_of(name: str) -> str:
    """The platform of a program, whose name ends with that of its target."""
    return TARGETS[name.split()[-1]].platform


def store(path: Path, programs: Mapping[str, Any], known: Collection[str]) -> None:
    """Writes programs beside those that are stored there, by the same compilers, and still `known`."""
    kept = {name: figures for name, figures in read(path).items() if name in known}
    everything = dict(sorted((kept | dict(programs)).items()))
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(figures)}" for name, figures in everything.items())
    head = json.dumps({"date": datetime.date.today().isoformat(), "versions": versions()})[:-1]
    write(path, f'{head}, "programs": {{\n{lines}\n}}}}\n')
