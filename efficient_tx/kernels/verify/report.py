"""The table of what was verified, as Markdown."""

from collections.abc import Sequence
from typing import Any

from efficient_tx.kernels.verify import figures
from efficient_tx.kernels.verify.targets import MIB, TARGETS

Rows = Sequence[dict[str, Any]]


def markdown(
    date: str, interpreted: Rows, moved: Rows, compiled: Rows, sections: Sequence[str] = (), *, quick: bool = False
) -> str:  # fmt: skip
    """The page `benchmarks/kernels.md`; `sections` are lines after the table of kernels, `quick` is the flag."""
    command = f"python -m efficient_tx.kernels.verify --all{' --quick' * quick}"
    programs = "The programs that CI compiles: every pair of values of an operation's cases. " if quick else ""
    versions = ", ".join(f"{name} {version}" for name, version in figures.versions().items())
    gates = ", ".join(name for name, target in TARGETS.items() if target.gate)
    recorded = ", ".join(name for name, target in TARGETS.items() if not target.gate)
    return "\n".join([
        "# Kernels, verified without an accelerator", "",
        f"By `{command}` on {date}; {versions}.", "",
        f"{programs}No kernel was run on a TPU or a GPU for this page: "
        "neither its speed nor its rounding there is shown. "
        f"Must compile and keep its limits: {gates}; recorded only: {recorded}.", "",
        "Each row has the largest figure of all cases of an operation. Error: the largest of an entry beside the plain "
        "formula in float64, as a share of the largest entry, in an interpreter (float32; bfloat16). On chip: MiB of "
        "VMEM, or of shared memory of a block. I/O: bytes that a kernel moves from and to main memory, as a multiple "
        "of the lower bound (every array once; for exact attention N² d² / M, M of the platform's smallest chip, where "
        "that is more): on a TPU by its grid and block specs, on a GPU by its loads and stores, of which the caches "
        "answer some. Temporaries: of main memory, as a share of arguments and outputs. Registers are of a thread; "
        "spills are bytes (GPU) or instructions (TPU); instructions are of PTX, or bundles.", "",
        *table(HEAD, rows(interpreted, moved, compiled)), "",
        *faulty(interpreted, compiled), "",
        *sections,
    ])  # fmt: skip


HEAD = (
    "kernels", "target", "programs", "error", "races", "I/O", "compile s", "on chip MiB", "temporaries", "registers",
    "spills", "instructions", "faults",
)  # fmt: skip


def rows(interpreted: Rows, moved: Rows, compiled: Rows) -> list[tuple]:
    found = []
    for operation in dict.fromkeys(row["operation"] for row in compiled):
        for name, target in TARGETS.items():
            mine = [row for row in compiled if (row["operation"], row["target"]) == (operation, name)]
            kernel = (operation, target.implementation)
            runs = [row for row in interpreted if (row["operation"], row["implementation"]) == kernel]
            if mine:
                ratios = [row["ratio"] for row in moved if (row["operation"], row["implementation"]) == kernel]
                io = f"{max(ratios):.2f}" if ratios else "–"
                found.append((operation, name, len(mine), *of_runs(runs), io, *of_programs(mine)))
    return found


def of_runs(runs: Rows) -> tuple:
    errors = []
    for narrow in (False, True):
        some = [max(row["forward"], row["gradient"]) for row in runs if ("bfloat16" in row["case"]) == narrow]
        errors.append(f"{max(some):.0e}" if some else "–")
    races = [row["races"] for row in runs if row["races"] is not None]
    return "; ".join(errors), sum(races) if races else "–"


def of_programs(rows: Rows) -> tuple:
    programs = [row["figures"] for row in rows if "figures" in row]
    kernels = [kernel for program in programs for kernel in program["kernels"]]

    def largest(figure: str) -> Any:
        return max((kernel[figure] for kernel in kernels if figure in kernel), default="–")

    on_chip = largest("on_chip")
    shares = [p["temporaries"] / (p["arguments"] + p["outputs"]) for p in programs]
    return (
        f"{sum(p['seconds'] for p in programs) / max(1, len(programs)):.1f}",
        on_chip if on_chip == "–" else f"{on_chip / MIB:.2f}",
        f"{max(shares):.2f}" if shares else "–",
        largest("registers"), largest("spills"), largest("instructions"),
        sum(bool(row["faults"]) for row in rows),
    )  # fmt: skip


def faulty(interpreted: Rows, compiled: Rows) -> list[str]:
    lines = [
        f"- {row['case']} {row['implementation']}, interpreted: errors {row['forward']:.0e}, {row['gradient']:.0e}"
        for row in interpreted
        if not holds(row)
    ]
    lines += [f"- {row['name']}: {fault}" for row in compiled for fault in row["faults"]]
    return ["## What must not be, or is only recorded", "", *lines] if lines else []


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def holds(row: dict[str, Any]) -> bool:
    """Whether a kernel ran and its errors are those of rounding."""
    return "failed" not in row and all(row[which] <= row["most"] for which in ("forward", "gradient"))


def sound(errors: list[dict[str, Any]], steps: list[dict[str, Any]], times: list[dict[str, Any]]) -> bool:
    """Whether all that is ours ran on the device, and the errors are those of rounding."""
    stopped = [row for row in steps if "failed" in row] + [row for row in times if "ours" in row["failed"]]
    return not stopped and all(map(holds, errors))


def of_errors(rows: Rows) -> list[str]:
    """The table of errors on an accelerator."""

    def figures_of(row):
        if "failed" in row:
            return row["failed"], "–", "–"
        return f"{row['forward']:.1e}", f"{row['gradient']:.1e}", row["most"]

    cells = [(row["name"], *figures_of(row), "yes" if holds(row) else "NO") for row in rows]
    return table(("kernel", "error", "of gradients", "most", "holds"), cells)


def of_times(rows: Rows) -> list[str]:
    """The table of milliseconds on an accelerator; a peer that did not run has its error's first words."""
    names = list(dict.fromkeys(name for row in rows for name in (*row["milliseconds"], *row["failed"])))

    def cell(row, name):
        return f"{row['milliseconds'][name]:.3f}" if name in row["milliseconds"] else row["failed"].get(name, "–")[:40]

    return table(("milliseconds", *names), [(row["name"], *(cell(row, name) for name in names)) for row in rows])


def of_steps(rows: Rows) -> list[str]:
    """The table of training steps on an accelerator."""
    cells = [(row["name"], row.get("failed") or f"{row['tokens_per_second']:,.0f}") for row in rows]
    return table(("training step, ListOps 2048", "tokens a second"), cells)
