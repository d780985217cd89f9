"""Kernels support only reverse-mode differentiation; forward mode raises an error that names an alternative."""

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_refuse = Primitive("refuse_forward_mode")


def reverse_only(x: jax.Array, op: str) -> jax.Array:
    """Returns `x`, of any shape, marked so that forward-mode differentiation raises; reverse mode works.

    For the inputs of a `custom_vjp`: reverse mode transposes the mark away, forward mode evaluates it.

    Raises:
      NotImplementedError: with `jax.jvp`, `jax.jacfwd` or `jax.linearize`; the message names the kernel `op`.
    """

    @jax.custom_jvp
    def mark(x):
        return x

    @mark.defjvp
    def _(primals, tangents):
        return primals[0], _refuse.bind(tangents[0], op=op)

    return mark(x)


def _raise(*_, op: str, **__):
    raise NotImplementedError(
        f"{op}: forward-mode differentiation works with implementation='reference' only; the others have jax.vjp"
    )


_refuse.def_impl(_raise)
_refuse.def_abstract_eval(lambda x, **_: x)
mlir.register_lowering(_refuse, _raise)
ad.primitive_transposes[_refuse] = lambda cotangent, *_, **__: [cotangent]
batching.primitive_batchers[_refuse] = lambda args, dims, *, op: (_refuse.bind(*args, op=op), dims[0])
