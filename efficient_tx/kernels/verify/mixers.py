"""Every token mixer's program for chips that are not there, looked at for loops that should be one operation.

On an accelerator a loop over heads, examples or tokens leaves most of the chip idle. A mixer that has one nevertheless
says why in its class: `one_by_one`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.attention import ATTENTION
from efficient_tx.kernels.verify.loops import Loop, loops
from efficient_tx.kernels.verify.program import Program, compiled
from efficient_tx.kernels.verify.targets import Target

# Thirteen, as no method has it: a loop that turns so often, or a multiple, is over examples.
EXAMPLES, TOKENS, HEADS, FEATURES = 13, 4096, 8, 512


def program_of(name: str, target: Target) -> Program:
    """A mixer with its defaults, forward and gradient, in bfloat16, compiled for one chip."""

    def make():
        return ATTENTION[name](FEATURES, heads=HEADS, max_len=TOKENS, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    graphdef, params = nnx.split(nnx.eval_shape(make))

    def run(params, x, mask, keys, cotangent):
        def forward(params, x):
            return nnx.merge(graphdef, params)(x, mask=mask, key=keys)

        out, pull = jax.vjp(forward, params, x)
        return out, pull(cotangent)

    x = jax.ShapeDtypeStruct((EXAMPLES, TOKENS, FEATURES), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((EXAMPLES, TOKENS), jnp.bool_)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), EXAMPLES))
    return compiled(run, params, x, mask, keys, x, target=target)


def serial(loop: Loop) -> str | None:
    """What a loop runs over one by one that could be side by side: "tokens", "examples", "heads", or None."""
    if loop.trips is None or "searchsorted" in loop.name:  # this one halves a list
        return None
    if loop.trips >= TOKENS // 2:
        return "tokens"
    if loop.trips % EXAMPLES == 0:
        return "examples"
    return "heads" if loop.trips == HEADS else None


def faults(name: str, program: Program) -> list[str]:
    """The loops that should be one operation and that the mixer's class does not account for, a line each."""
    return [] if ATTENTION[name].one_by_one else serial_loops(program)


def serial_loops(program: Program) -> list[str]:
    return [
        f"a loop over {over}: {loop.trips} turns, {loop.name}"
        for loop in loops(program.text)
        if (over := serial(loop)) is not None
    ]
