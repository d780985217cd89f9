"""Times one full training step of the Skyformer paper's ListOps model on this machine, for several mixers.

    python benchmarks/train_step.py [--rounds 9] [--scaling] [--out FILE.json]
    python benchmarks/train_step.py --mixers=softmax,gla,mamba2 [--lengths=2048,16384]    causal, and their growth

The model is 2 pre-norm layers, 64 wide, 2 heads of 32, MLP 128, dropout 0.1, sequences of 2048 real tokens, batch 32,
float32 (Chen et al. 2021, arXiv 2111.00035). The step is that of train.py: forward, backward and AdamW, in 16
micro-batches of 2, so that activations stay in the cache. PyTorch's scaled_dot_product_attention, forward and backward
at the same sizes, is measured beside it. All run in one process, in turns, and the table shows medians. On a shared
machine compare the ratios, not the seconds.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

from efficient_tx.attention import ATTENTION, Kernelized, Mixer, MultiHead, Skyformer, Softmax
from efficient_tx.commands import Parser, names_of, run
from efficient_tx.compare.flags import wholes
from efficient_tx.compare.timing import exponent
from efficient_tx.files import local_path
from efficient_tx.models.classifier import Classifier
from efficient_tx.training.step import init_state, make_train_step, split_batch

LAYERS, FEATURES, HEADS, MLP, VOCAB, CLASSES, LANDMARKS = 2, 64, 2, 128, 32, 10, 128
HEAD_DIM = FEATURES // HEADS
# Seconds between two measurements: PyTorch's threads spin for a while after their work is done.
PAUSE = 0.2


class Projections(MultiHead):
    """All of a mixer except the attention: the four projections, around q + k + v."""

    def attend(self, q, k, v, *, mask, key):
        return q + k + v


class Nothing(Mixer):
    """x -> x, without parameters."""

    def mix(self, x, *, mask, key):
        return x


# The paper's mixer; exact softmax and kernelized attention; and two mixers without attention.
MIXERS = {
    "nothing": Nothing,
    "identity": Projections,
    "skyformer": Skyformer,
    "softmax": Softmax,
    "kernelized": Kernelized,
}


CAUSAL = [name for name, cls in ATTENTION.items() if cls.can_be_causal]


class Size(NamedTuple):
    length: int
    batch: int
    micro_batches: int
    dropout: float


class Case(NamedTuple):
    """A call to time; `temporaries` is in bytes, `flops` counts the matrix products."""

    run: Callable[[], None]
    temporaries: int | None
    flops: float | None


def product_flops(mixer: str, size: Size) -> float:
    """Floating-point operations of the matrix products of one step: backward costs twice the forward pass.

    Attention recomputes its weights in the backward pass: 2 products forward and 5 backward, each L × L × head_dim. For
    Skyformer both κ(Q, Z) and κ(Z, K) count, at L × landmarks × head_dim. The solves cost less than a hundredth of
    that.
    """
    tokens = size.length * size.batch
    projections = {"nothing": 0, "identity": 4}.get(mixer, 4) * FEATURES**2
    linear = 3 * 2 * tokens * (2 * FEATURES * MLP + projections)
    columns = {"nothing": 0, "identity": 0, "skyformer": 2 * LANDMARKS}.get(mixer, size.length)
    return LAYERS * (linear + 7 * 2 * tokens * columns * FEATURES)


def training_step(mixer: str, size: Size, make: Callable[..., Mixer] | None = None) -> Case:
    model = Classifier(
        num_classes=CLASSES, vocab_size=VOCAB, max_len=size.length, mixers=[make or MIXERS[mixer]], features=FEATURES,
        layers=LAYERS, heads=HEADS, mlp_features=MLP, dropout=size.dropout, rngs=nnx.Rngs(0),
    )  # fmt: skip
    optimizer = optax.adamw(1e-4, eps=1e-6, weight_decay=0.0)
    step = make_train_step(nnx.split(model)[0], optimizer, seed=0, grad_accum=size.micro_batches)
    r = np.random.default_rng(0)
    batch = {
        "inputs": r.integers(1, VOCAB, (size.batch, size.length), dtype=np.int32),
        "mask": np.ones((size.batch, size.length), bool),
        "label": r.integers(0, CLASSES, size.batch, dtype=np.int32),
        "weight": np.ones(size.batch, np.float32),
    }
    batch, state = split_batch(batch, jax.local_devices()[:1]), init_state(model, optimizer)
    temporaries = step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    def run():
        nonlocal state
        state = jax.block_until_ready(step(state, batch))

    return Case(run, temporaries, product_flops(mixer, size))


def torch_attention(size: Size) -> Case | None:
    """PyTorch's attention of one layer, forward and backward; None if torch is not installed."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(os.cpu_count())
    shape = size.batch, HEADS, size.length, HEAD_DIM
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    cotangent = torch.randn(shape)

    def run():
        torch.nn.functional.scaled_dot_product_attention(q, k, v).backward(cotangent)
        q.grad = k.grad = v.grad = None

    return Case(run, None, 7 * 2 * size.batch * size.length**2 * FEATURES)


def matrix_product() -> Case:
    """A float32 product of two 2048 × 2048 matrices: the speed of the cores."""
    x = jnp.ones((2048, 2048))
    product = jax.jit(jnp.matmul)
    return Case(lambda: jax.block_until_ready(product(x, x)), None, 2.0 * 2048**3)


def in_turns(cases: dict[str, Case], rounds: int) -> dict[str, float]:
    """Median seconds of each case over `rounds` turns, after a first turn that does not count."""
    seconds = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, case in cases.items():
            start = time.perf_counter()
            case.run()
            seconds[name].append(time.perf_counter() - start)
            time.sleep(PAUSE)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {os.cpu_count()} cores, jax {jax.__version__}, load average {os.getloadavg()[0]:.1f}"


def compare(console: Console, size: Size, rounds: int) -> dict:
    """The table of the mixers at one size, and its figures."""
    cases = {"matrix product": matrix_product()}
    with console.status("compiling"):
        cases |= {name: training_step(name, size) for name in MIXERS}
        if torch := torch_attention(size):
            cases["torch attention"] = torch
    with console.status("measuring"):
        seconds = in_turns(cases, rounds)
    rate = cases["matrix product"].flops / seconds["matrix product"]
    identity = seconds["identity"]

    title = f"One step: length {size.length}, batch {size.batch} in {size.micro_batches}, dropout {size.dropout}"
    table = Table(title=title)
    for column in ("", "s", "steps/s", "× identity", "× nothing", "temp. MB", "matmul rate"):
        table.add_column(column, justify="right" if column else "left")
    figures = {}
    for name, case in cases.items():
        s = seconds[name]
        figures[name] = {
            "seconds": s,
            "temporary_bytes": case.temporaries,
            "matmul_share": case.flops / s / rate,
        }
        step = name in MIXERS
        table.add_row(
            name,
            f"{s:.3f}",
            f"{1 / s:.2f}" if step else "",
            f"{s / identity:.2f}" if step else "",
            f"{s / seconds['nothing']:.2f}" if step else "",
            f"{case.temporaries / 1e6:.0f}" if step else "",
            f"{case.flops / s / rate:.0%}",
        )
    console.print(table)
    console.print(
        "identity: the four projections around q + k + v; nothing: a mixer that returns its input; torch attention: "
        f"one layer, forward and backward; matrix product: 2048³, {rate / 1e9:.0f} GFLOP/s"
    )
    if "torch attention" in seconds:
        budget = identity + 1.5 * LAYERS * seconds["torch attention"]
        console.print(f"softmax {seconds['softmax']:.3f} s; identity + 1.5 × PyTorch's attention: {budget:.3f} s")
    else:
        console.print("PyTorch is not installed: pip install -e '.\\[bench]' puts its attention beside ours")
    return {"size": size._asdict(), "matmul_flops_per_second": rate, "figures": figures}


def scaling(console: Console, rounds: int, dropout: float) -> dict:
    """65,536 tokens per step at every length: Skyformer from 1k to 64k, and softmax at 8k."""
    lengths = [1024, 2048, 4096, 8192, 16384, 32768, 65536]
    sizes = {length: Size(length, 65536 // length, 65536 // max(length, 4096), dropout) for length in lengths}
    figures = {}
    table = Table(title=f"65,536 tokens a step, at most 4,096 or one example at a time, dropout {dropout}")
    for column in ("length", "identity s", "skyformer s", "µs a token", "temp. MB", "softmax s", "× skyformer"):
        table.add_column(column, justify="right")
    with console.status("compiling and measuring"):
        for length, size in sizes.items():
            names = ["identity", "skyformer", *(["softmax"] if length == 8192 else [])]
            cases = {name: training_step(name, size) for name in names}
            seconds = in_turns(cases, rounds)
            sky, softmax = seconds["skyformer"], seconds.get("softmax")
            figures[length] = {"seconds": seconds, "temporary_bytes": cases["skyformer"].temporaries}
            table.add_row(
                f"{length}",
                f"{seconds['identity']:.3f}",
                f"{sky:.3f}",
                f"{sky / 65536 * 1e6:.2f}",
                f"{cases['skyformer'].temporaries / 1e6:.0f}",
                f"{softmax:.3f}" if softmax else "",
                f"{softmax / sky:.1f}" if softmax else "",
            )
    console.print(table)
    return figures


def growth(console: Console, mixers: list[str], lengths: Sequence[int], rounds: int) -> dict:
    """Causal mixers of the table at several lengths, all steps of as many tokens, one example at a time."""
    tokens, seconds, temporaries = max(lengths), {}, {}
    for length in lengths:
        size = Size(length, tokens // length, tokens // length, 0.0)
        with console.status(f"length {length}"):
            cases = {name: training_step(name, size, causal(name)) for name in mixers}
            for name, took in in_turns(cases, rounds).items():
                seconds.setdefault(name, {})[length] = took
                temporaries.setdefault(name, {})[length] = cases[name].temporaries
    table = Table(
        title=f"{tokens:,} tokens a step, causal: seconds, and the growth of an example's time with its length"
    )
    for column in ("", *(f"{length:,}" for length in lengths), f"× {mixers[0]}", "exponent", "temp. MB"):
        table.add_column(column, justify="right" if column else "left")
    figures = {}
    for name, took in seconds.items():
        slope = exponent({length: took[length] * length for length in lengths})
        last = took[lengths[-1]] / seconds[mixers[0]][lengths[-1]]
        figures[name] = {"seconds": took, "exponent": slope, "temporary_bytes": temporaries[name]}
        row = (*(f"{took[length]:.3f}" for length in lengths), f"{last:.3f}", f"{slope:.2f}")
        table.add_row(name, *row, f"{temporaries[name][lengths[-1]] / 1e6:.0f}")
    console.print(table)
    return figures


def causal(name: str) -> Callable[..., Mixer]:
    return partial(ATTENTION[name], causal=True, **ATTENTION[name].within(LANDMARKS))


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each, in turns (median shown)")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro-batches", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.1, help="the paper's is 0.1; drawing it costs time as well")
    parser.add_argument("--scaling", action="store_true", help="also lengths from 1k to 64k (minutes)")
    parser.add_argument(
        "--mixers", type=names_of(CAUSAL, "mixer"), metavar="A,B", help="causal ones, instead of all else"
    )
    parser.add_argument("--lengths", type=wholes, default=(2048, 16384), help="for --mixers, shortest first")
    parser.add_argument("--out", type=local_path, help="write the figures as JSON")
    args = parser.parse_args()
    console = Console()
    ran_on = machine()
    console.print(ran_on)
    if args.mixers:
        record = {"machine": ran_on, "growth": growth(console, args.mixers, args.lengths, args.rounds)}
    else:
        size = Size(args.length, args.batch, args.micro_batches, args.dropout)
        record = {"machine": ran_on, **compare(console, size, args.rounds)}
    if args.scaling:
        record["scaling"] = scaling(console, max(3, args.rounds // 3), args.dropout)
    if args.out:
        args.out.write_text(json.dumps(record, indent=2) + "\n")
        console.print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
