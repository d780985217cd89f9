"""The seam between an operation and its implementations: one gradient rule and one choice for every platform.

Which device a program is for is known only when it is lowered: the default backend may be a CPU while the program is
compiled for a TPU. So a call has a choice for every platform, of which `kernels/platform.py` keeps one.
"""

import dataclasses
import importlib
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from efficient_tx.kernels.forward_mode import reverse_only
from efficient_tx.kernels.platform import by_platform
from efficient_tx.numerics.flops import counting

# The platform, by jax's name, that an implementation of an accelerator is compiled for.
PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}


class Implementation(Protocol):
    """A module of an operation's folder. Options and sizes are hashable, arrays are the operation's operands: pytrees.

    `outputs` and `saved` have the same structure, shapes and dtypes in all implementations of an operation, because a
    program for several platforms has one of each.
    """

    def unsupported(self, options: Hashable, *arrays: Any) -> str | None:
        """The reason, from options, static shapes and dtypes, why these arguments are refused, or None."""

    def sizes(self, options: Hashable, *arrays: Any) -> Hashable:
        """The sizes of its blocks for these arguments."""

    def forward(self, options: Hashable, sizes: Hashable, *arrays: Any) -> tuple[Any, Any]:
        """The outputs, and what `backward` needs beside the arrays and the outputs.

        An implementation whose kernels would write what nobody reads also has `primal`, of the same arguments, which
        returns the outputs alone: it is called where no gradient follows.
        """

    def backward(self, options: Hashable, sizes: Hashable, arrays: tuple, outputs: Any, saved: Any, cotangents: Any):
        """The cotangent of every array, None for one without (a mask), from those of the outputs."""


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation, called with the name of an implementation (None chooses), its options and its arrays.

    The modules of the folder `efficient_tx/kernels/<name>` are its implementations. "reference" has `unsupported` and a
    `forward(options, *arrays)` that returns the outputs alone, and is differentiated by jax, in both modes; the others
    follow `Implementation` and have reverse mode only. Pallas files are imported on first use.

    Attributes:
      name: the folder's name, also in errors.
      implementations: the names of its modules, best first.
      open_loops: whether its XLA form has loops whose number of turns only a run tells: the plain formula is counted
        in place of it.
    """

    name: str
    implementations: tuple[str, ...]
    open_loops: bool = False

    def __call__(
        self,
        implementation: str | None,
        options: Hashable,
        *arrays: Any,
        interpret: Any = False,
        sizes: Hashable | None = None,
    ) -> Any:
        """The outputs.

        Args:
          implementation: a name, or None: for every platform the first implementation that has no reason against it.
          options: the operation's static options.
          *arrays: its operands; gradients flow to those of a floating dtype.
          interpret: what the `interpret` of a Pallas kernel's call shall be; needs the name of such an implementation.
          sizes: block sizes for the implementation of this name; None uses its own.

        Raises:
          ValueError: one line, an unknown implementation or the reason why it does not support the arguments.
          NotImplementedError: forward-mode differentiation of another implementation than the reference; a named
            Pallas implementation in a program for another platform.
        """
        chosen = self.choose(implementation, options, arrays, interpret)
        if "reference" in chosen.values() or (implementation is None and self.open_loops and counting.value):
            return self.module("reference").forward(options, *arrays)
        if sizes is not None and implementation is None:
            raise ValueError(f"{self.name}: block sizes are those of one implementation, name it")
        blocks = {
            name: self.module(name).sizes(options, *arrays) if sizes is None else sizes for name in chosen.values()
        }
        plan = Plan(
            self, options, tuple((platform, name, blocks[name]) for platform, name in chosen.items()), interpret
        )
        return run(plan, vary_alike(jax.tree.map(partial(marked, op=self.name), arrays)))

    def module(self, implementation: str) -> Any:
        return importlib.import_module(f"efficient_tx.kernels.{self.name}.{implementation}")

    def choose(self, implementation: str | None, options: Hashable, arrays: tuple, interpret: Any) -> dict[str, str]:
        """Implementations by platform; "default" is any other, and missing where a named one cannot run elsewhere."""
        if implementation is not None and implementation not in self.implementations:
            raise ValueError(
                f"{self.name} has no implementation {implementation!r}: choose one of {', '.join(self.implementations)}"
            )
        if interpret and implementation not in PLATFORMS:
            pallas = [name for name in self.implementations if name in PLATFORMS]
            raise ValueError(
                f"{self.name}: interpret=True is for Pallas kernels, "
                + (f"pass implementation={' or '.join(map(repr, pallas))}" if pallas else "and it has none")
            )
        reasons = {
            name: self.module(name).unsupported(options, *arrays)
            for name in self.implementations
            if implementation in (None, name)
        }
        if implementation is not None:
            if reasons[implementation]:
                raise ValueError(f"{self.name} cannot use implementation {implementation!r}: {reasons[implementation]}")
            return {"default" if interpret else PLATFORMS.get(implementation, "default"): implementation}
        able = [name for name, reason in reasons.items() if reason is None]
        if not able:
            raise ValueError(f"{self.name}: {'; '.join(f'{name}: {reason}' for name, reason in reasons.items())}")
        default = next(name for name in able if name not in PLATFORMS)
        if default == "reference":
            return {"default": default}
        return {PLATFORMS[name]: name for name in able if name in PLATFORMS} | {"default": default}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static in a call of an operation: the key under which its programs are traced once.

    Attributes:
      op: the operation.
      options: its options.
      chosen: platform, implementation and block sizes of every alternative.
      interpret: the `interpret` of Pallas calls.
    """

    op: Op
    options: Hashable
    chosen: tuple[tuple[str, str, Hashable], ...]
    interpret: Any

    def call(self, direction: str, *args: Any) -> Any:
        """`primal`, `forward` or `backward` of the implementation for the platform of the program."""
        alternatives = {}
        for platform, name, sizes in self.chosen:
            module = self.op.module(name)
            if direction == "primal" and not hasattr(module, "primal"):
                function = partial(outputs_of, module.forward, self.options, sizes)
            else:
                function = partial(getattr(module, direction), self.options, sizes)
            keywords = {"interpret": self.interpret} if name in PLATFORMS else {}
            alternatives[platform] = partial(function, **keywords)
        if [*alternatives] == ["default"]:
            return alternatives["default"](*args)
        (platform, name, _), *_ = self.chosen
        only = f"{self.op.name}: implementation={name!r} runs on {platform} only"
        other = "this program is for another platform: pass interpret=True, or None"
        return by_platform(alternatives, *args, missing=f"{only}, and {other}")


def outputs_of(forward: Callable, *args: Any, **keywords: Any) -> Any:
    return forward(*args, **keywords)[0]


@partial(jax.jit, static_argnums=0)
def primal(plan: Plan, arrays: tuple) -> Any:
    return plan.call("primal", *arrays)


@partial(jax.jit, static_argnums=0)
def forward(plan: Plan, arrays: tuple) -> tuple[Any, Any]:
    return plan.call("forward", *arrays)


@partial(jax.jit, static_argnums=0)
def backward(plan: Plan, arrays: tuple, outputs: Any, saved: Any, cotangents: Any) -> tuple:
    return tuple(plan.call("backward", arrays, outputs, saved, cotangents))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(plan: Plan, arrays: tuple) -> Any:
    return primal(plan, arrays)


def run_forward(plan, arrays):
    outputs, saved = forward(plan, arrays)
    return outputs, (arrays, outputs, saved)


def run_backward(plan, kept, cotangents):
    return (backward(plan, *kept, cotangents),)


run.defvjp(run_forward, run_backward)


def marked(x: jax.Array, op: str) -> jax.Array:
    return reverse_only(x, op) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else x


def vary_alike(arrays: Any) -> Any:
    """Within `jax.shard_map`, marks all arrays as varying over the axes that one of them varies over.

    So each has a cotangent of its own in every shard, as `backward` returns them, and jax adds those of an array that
    is the same in all shards.
    """

    def axes(x):
        return jax.typeof(x).manual_axis_type.varying

    def mark(x):
        missing = tuple(every - axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    every = frozenset().union(*map(axes, jax.tree.leaves(arrays)))
    return jax.tree.map(mark, arrays)
