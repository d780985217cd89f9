"""Sum: W = A + B, of two weight structures.

Low rank plus a weight approximation is the oldest of these: robust principal component analysis (Candès et al. 2011,
arXiv 0912.3599) has a sparse second part, LoftQ (Li et al. 2023, arXiv 2310.08659) a quantised one. As there, the parts
are fitted in turn, each to what the other leaves.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.checks import OptionError
from efficient_tx.linear.form import Form
from efficient_tx.linear.low_rank import LowRank
from efficient_tx.linear.monarch_weight import Monarch
from efficient_tx.linear.packed import Packed
from efficient_tx.linear.structured import Weight

# A fit ends with the round that lowers the error by less than this share of it, or after so many rounds.
TOLERANCE = 1e-3
ROUNDS = 100


@partial(jax.jit, static_argnums=0)
def compiled_nearest(form: Form, kernel: jax.Array) -> tuple[nnx.State, jax.Array]:
    layer = form.from_dense(kernel)
    return nnx.split(layer)[1], layer.to_dense()


def nearest(form: Form, kernel: jax.Array) -> tuple[nnx.State, jax.Array]:
    """The parameters of the layer of a form that is nearest to `kernel` `[n, m]`, and its weight, `[n, m]`."""
    run = compiled_nearest if form.structure.fits_under_jit else compiled_nearest.__wrapped__
    return run(form, kernel)


def alternate(
    forms: tuple[Form, Form], kernel: jax.Array
) -> tuple[tuple[nnx.State, nnx.State], list[jax.Array]]:  # fmt: skip
    """Parameters of two parts whose sum approximates `kernel` `[n, m]`, and the error after every round.

    The first form begins alone, which is round 0. In a round the second part becomes the projection of W − A, then the
    first one that of W − B. Each step is the best one given the other part, so the error does not increase; a round
    whose projections, which may be fits, increase it is dropped. See `TOLERANCE` and `ROUNDS`.

    Returns:
      The parameters, in the order of `forms`; and ‖W − A − B‖, float32 scalars at least, that decrease.
    """
    first, second = forms
    a, dense = nearest(first, kernel)
    b, _ = nearest(second, jnp.zeros_like(kernel))
    errors = [jnp.linalg.norm(kernel - dense)]
    for _ in range(ROUNDS):
        new_b, other = nearest(second, kernel - dense)
        new_a, dense = nearest(first, kernel - other)
        error = jnp.linalg.norm(kernel - dense - other)
        if not error < errors[-1]:
            break
        a, b = new_a, new_b
        errors.append(error)
        if errors[-2] - error < TOLERANCE * errors[-2]:
            break
    return (a, b), errors


class Sum(Weight, nnx.Module):
    """y = x A + x B, with A and B of any two structures but this one; the parts are the layers `first` and `second`.

    `from_dense` alternates the projections A of W − B and B of W − A, once from the A nearest to W and once from the B
    nearest to W, and keeps the better end. The error never increases, so the result is at least as good as each part
    alone; it is a local optimum. An end is a round that lowers the error by less than a thousandth of it, or round 100.
    A sum with the default parts is found up to 0.1 % of its norm (13 × 7 to 128 × 96, one draw each); the projection of
    a projection moves by less than 1 %. The fit does not work under jit.

    Args:
      in_features: width of the input.
      out_features: width of the output.
      first: form of A, in a config as text, "monarch(blocks=4)"; None is monarch with 8 blocks.
      second: form of B, in a config as text, "low_rank(rank=32)"; None is low rank, of an eighth of the smaller side.
        A square weight with the defaults has half of the dense parameters.
      use_bias: whether to add a bias, initially zero.
      dtype: dtype of the computation; None promotes input and parameters.
      param_dtype: dtype of the parameters.
      rngs: source of the initial parameters. Each part has half of the output's variance.

    Raises:
      ValueError: a part that is a sum or no Form, or whose options its structure refuses.
    """

    paper = "Candès et al. 2011, arXiv 0912.3599; Li et al. 2023, arXiv 2310.08659"
    computes = "A + B, of two other structures"
    size = "those of A and B, packed for inference where they can be"
    nearest = "alternating between the parts, a local optimum"
    fits_under_jit = False

    @staticmethod
    def sized_by(n: int, m: int) -> tuple[str, Sequence[Form]]:
        return "second", [Form(LowRank, rank=rank) for rank in range(1, min(n, m) + 1)]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        first: Form | None = None,
        second: Form | None = None,
        use_bias: bool = True,
        dtype: jnp.dtype | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype)) if use_bias else None
        low = Form(LowRank, rank=-(-min(in_features, out_features) // 8))
        self._forms = (first or Form(Monarch, blocks=8), second or low)
        self.first, self.second = (
            part(form, name, in_features, out_features, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            for name, form in zip(("first", "second"), self._forms)
        )
        self.input_step = max(self.first.input_step, self.second.input_step)
        self.latent = self.first.latent or self.second.latent

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in_features]` -> `[..., out_features]`; raises ValueError for an input of another width."""
        self.check_width(x)
        out = self.first(x) + self.second(x)
        return out if self.bias is None else out + self.bias[...].astype(out.dtype)

    @property
    def parameters(self) -> int:
        """Number of trained parameters, as the parts count them, with the bias."""
        return self.first.parameters + self.second.parameters + (0 if self.bias is None else self.out_features)

    @property
    def multiplies(self) -> int:
        """Multiplications of both parts, as they count them."""
        return self.first.multiplies + self.second.multiplies

    def to_dense(self) -> jax.Array:
        return self.first.to_dense() + self.second.to_dense()

    def rescale(self, factor: float) -> None:
        self.first.rescale(factor)
        self.second.rescale(factor)

    def set_dense(self, kernel: jax.Array) -> None:
        there, errors = alternate(self._forms, kernel)
        back, others = alternate(self._forms[::-1], kernel)
        best = back[::-1] if others[-1] < errors[-1] else there
        for layer, found in zip((self.first, self.second), best):
            nnx.update(layer, jax.tree.map(lambda x: x.astype(self.param_dtype), found))

    def pack(self) -> "PackedSum":
        """The layer for inference, its parts packed where their structures can be; raises ValueError as they do."""
        return PackedSum(self)


class PackedSum(Packed):
    """The two parts, each packed if it can be; else its arrays as they are, in plain variables.

    Attributes:
      first, second: the parts, without bias.
    """

    def __init__(self, layer: Sum):
        super().__init__(layer)
        self.first, self.second = (
            part.pack() if hasattr(part, "pack") else without_parameters(part) for part in (layer.first, layer.second)
        )

    __call__ = Sum.__call__
    to_dense = Sum.to_dense


def without_parameters(layer: Weight) -> Weight:
    """A copy of a layer whose parameters are plain variables."""

    def trained(x):
        return isinstance(x, nnx.Param)

    return jax.tree.map(lambda x: nnx.Variable(x[...]) if trained(x) else x, layer, is_leaf=trained)


def part(form: Form, name: str, in_features: int, out_features: int, **common: Any) -> Weight:
    """One of the layers of a sum, without bias and with half of a dense layer's variance; ValueErrors name `name`."""
    if not isinstance(form, Form):
        raise OptionError(name, form, "it must be a Form, as Form(Monarch, blocks=4)")
    if issubclass(form.structure, Sum):
        raise OptionError(name, form, "a part of a sum must not be a sum")
    try:
        layer = form(in_features, out_features, use_bias=False, **common)
    except ValueError as error:
        raise OptionError(name, form, str(error)) from None
    layer.rescale(0.5**0.5)
    return layer
