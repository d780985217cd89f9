"""Complex numbers in Pallas kernels, which have none: tuples of the real part and, where there is one, the other."""

import jax
import jax.numpy as jnp

Planes = tuple[jax.Array, ...]


def split(x: jax.Array) -> Planes:
    return (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)


def join(planes: Planes) -> jax.Array:
    return jax.lax.complex(*planes) if len(planes) == 2 else planes[0]


def plus(a: Planes, b: Planes) -> Planes:
    return tuple(x + y for x, y in zip(a, b))


def times(a: Planes, b: Planes) -> Planes:
    if len(a) == 1:
        return (a[0] * b[0],)
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def exp(a: Planes) -> Planes:
    size = jnp.exp(a[0])
    return (size,) if len(a) == 1 else (size * jnp.cos(a[1]), size * jnp.sin(a[1]))


def where(condition: jax.Array, a: Planes, b: Planes) -> Planes:
    return tuple(jnp.where(condition, x, y) for x, y in zip(a, b))


def constant(value: float, like: Planes) -> Planes:
    """A real number in the shape of `like`."""
    return tuple(jnp.full_like(x, 0 if n else value) for n, x in enumerate(like))
