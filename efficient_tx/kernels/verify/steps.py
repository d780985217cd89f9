"""The program of a training step mapped over several chips: what they tell each other, what stays where it is."""

import collections
import math
import re
import time
from dataclasses import dataclass

import jax

from efficient_tx.kernels.verify.loops import Loop, loops
from efficient_tx.kernels.verify.program import CALL, QUICKLY, compile_anew
from efficient_tx.kernels.verify.targets import Target
from efficient_tx.kernels.verify.training import Recipe, lowered

CHIPS = 4

# As operations of XLA, asynchronous ones by what begins them.
COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
    "ragged-all-to-all",
)  # fmt: skip
HOST = ("infeed", "outfeed", "send", "recv")


@dataclass(frozen=True)
class Step:
    """Attributes:
    seconds: time of the compilation.
    collectives: how many of each kind.
    among: the groups of chips that they are of, each once.
    reduced: numbers that are summed over the chips.
    parameters, sums: numbers of parameters, and of sums of the loss and metrics with their divisors.
    state: number of arrays of the training state, and of those in whose memory a new one is written.
    host: transfers from and to the host, and callbacks.
    kernels: how often each kernel is called, and each routine of another library.
    loops: those outside of kernels.
    temporaries: bytes of main memory of a chip.
    arguments: bytes of main memory of a chip, the state and its part of the batch.
    """

    seconds: float
    collectives: dict[str, int]
    among: tuple[str, ...]
    reduced: int
    parameters: int
    sums: int
    state: int
    written_over: int
    host: tuple[str, ...]
    kernels: dict[str, int]
    loops: list[Loop]
    temporaries: int
    arguments: int


def compiled_step(recipe: Recipe, target: Target) -> Step:
    """Compiles a step for four chips of a kind.

    Raises:
      jax.errors.JaxRuntimeError: the compiler's word, as that it does not fit the main memory.
    """
    low, state = lowered(recipe, target.devices(CHIPS))
    began = time.perf_counter()
    done = compile_anew(low, QUICKLY if target.platform == "tpu" else {})
    seconds, text, memory = time.perf_counter() - began, done.as_text(), done.memory_analysis()
    called = collections.Counter(
        re.sub(r"[.\d]+$", "", name) if call == "tpu_custom_call" else kernel_of(call, rest)
        for name, call, rest in CALL.findall(text)
        if call not in MARKS
    )
    collective = [(kind, shape, rest) for shape, kind, rest in OPERATION.findall(text) if kind in COLLECTIVES]
    return Step(
        seconds=seconds,
        collectives=dict(collections.Counter(kind for kind, *_ in collective)),
        among=tuple(dict.fromkeys(groups(rest) for *_, rest in collective)),
        reduced=sum(numbers(shape) for kind, shape, _ in collective if kind == "all-reduce"),
        parameters=sum(x.size for x in jax.tree.leaves(state.params)),
        sums=len(jax.tree.leaves(state.window)) - 2,  # the gradient's norm is of what was summed
        state=len(jax.tree.leaves(state)),
        written_over=aliases(text),
        host=tuple(
            [kind for _, kind, _ in OPERATION.findall(text) if kind in HOST]
            + [call for call in called if "callback" in call or "host" in call.lower()]
        ),
        kernels=dict(called),
        loops=loops(text),
        temporaries=memory.temp_size_in_bytes,
        arguments=memory.argument_size_in_bytes,
    )


def faults(step: Step) -> list[str]:
    """What a step must not have, a line each."""
    found = []
    if other := set(step.collectives) - {"all-reduce"}:
        found.append(f"collectives that do not sum: {', '.join(sorted(other))}")
    if len(step.among) != 1:
        found.append(f"sums among {len(step.among)} groups of chips: {'; '.join(step.among)}")
    if not step.parameters <= step.reduced <= step.parameters + step.sums:
        found.append(f"{step.reduced} numbers are summed: {step.parameters} parameters, {step.sums} sums of metrics")
    if step.written_over != step.state:
        found.append(f"{step.written_over} of {step.state} arrays of the state are written over")
    if step.host:
        found.append(f"the host takes part: {', '.join(step.host)}")
    if not any(name.startswith(OURS) for name in step.kernels):
        found.append("no kernel in the program")
    return found


OURS = ("flash_attention", "gated_linear_attention")
# No routines: how a TPU's compiler marks what it knows of indices.
MARKS = ("GatherScatterIndicesBitpacked", "AssumeGatherIndicesInBound")
OPERATION = re.compile(rf"^\s*(?:ROOT )?%?\S+ = (.*?) ({'|'.join(COLLECTIVES + HOST)})(?:-start)?\((.*)$", re.MULTILINE)


def kernel_of(call: str, rest: str) -> str:
    """The name of a Triton kernel, or that of another routine."""
    name = re.search(r'\bname = "(\w+)"', rest)
    return name[1] if call == "__gpu$xla.gpu.triton" and name else call


def groups(rest: str) -> str:
    return re.search(r"replica_groups=(\{\{.*?\}\}|\[[^ ]*\]<=\[\d+\]|\{\})", rest)[1]


def numbers(shape: str) -> int:
    """Of an array or a tuple of arrays, as XLA writes its type."""
    return sum(math.prod(map(int, filter(None, sizes.split(",")))) for sizes in re.findall(r"\w\d+\[([\d,]*)\]", shape))


def aliases(text: str) -> int:
    """How many outputs are written to the memory of arguments."""
    found = re.search(r"input_output_alias=\{(.*?)\}(?:, \w+=|\n)", text)
    return len(re.findall(r"(?:may|must)-alias", found[1])) if found else 0
