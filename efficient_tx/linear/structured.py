"""Structured: the base class of structured weights: signature of `nnx.Linear`, bias, counts, to and from dense."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.signatures import constructor


class Factor(NamedTuple):
    """One array of a structured weight.

    Attributes:
      shape: shape of the array.
      fan_in: number of entries that one output of the factor sums over; may be a mean over the outputs.
      variance: initial variance of the entries; None is 1 / fan_in, which preserves the variance of the input.
    """

    shape: tuple[int, ...]
    fan_in: float
    variance: float | None = None


def pad(x: jax.Array, size: int) -> jax.Array:
    """x with zeros appended along its last axis up to `size`."""
    missing = size - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def scale_array(array: nnx.Variable, factor: float) -> None:
    """Multiplies an array by a number, in place and in its dtype."""
    array[...] *= jnp.asarray(factor, array.dtype)


def growing(values: Iterable[int], size: Callable[[int], int]) -> Sequence[int]:
    """The values without those whose size is at least that of a later one, which can hold more: sizes increase."""
    found: list[int] = []
    for value in values:
        while found and size(found[-1]) >= size(value):
            found.pop()
        found.append(value)
    return found


# Input numbers per chunk of tokens: together with the intermediate products about the size of a core's cache.
CHUNK = 2**18


def in_chunks(multiply: Callable[..., jax.Array], x: jax.Array, *weights: jax.Array) -> jax.Array:
    """multiply(x, *weights); on CPUs by chunks of tokens, so that intermediate results stay in cache.

    In training this makes several successive small products up to four times faster. Chunks are equal and have 128
    tokens or more. If no such chunk size divides the number of tokens, and on other devices, all tokens are processed
    at once.

    Args:
      multiply: (x `[..., in]`, *weights) -> `[..., out]`, separately for each token.
      x: `[..., in]`.
      *weights: further arguments of `multiply`, the same for all chunks.
    """
    tokens = math.prod(x.shape[:-1])
    counts = range(max(1, -(-x.size // CHUNK)), tokens // 128 + 1)
    count = next((count for count in counts if tokens % count == 0), 1)
    if count == 1:
        return multiply(x, *weights)

    def one_by_one(x, *weights):
        out = jax.lax.map(lambda chunk: multiply(chunk, *weights), x.reshape(count, -1, x.shape[-1]))
        return out.reshape(*x.shape[:-1], -1)

    return jax.lax.platform_dependent(x, *weights, cpu=one_by_one, default=multiply)


class Weight:
    """The interface of every row of `LINEAR` in addition to `nnx.Linear`: sizes, conversion to and from dense.

    Attributes:
      in_features, out_features: widths of input and output.
      bias: what is added to the product, `[out_features]`, an `nnx.Param`; None without.
      paper: authors, year and arXiv id, or another place of publication; empty for the dense layer.
      computes: the formula of the weight W in y = x W.
      size: number of parameters of an n × n weight.
      nearest: method that finds the nearest weight to a dense one.
      own_projection: whether that weight is an approximation that no other structure gives: a method of compression.
      input_step: the inputs of a token are rounded to multiples of input_step times the largest of them; 0 means no
        rounding. So the output may differ from x · to_dense() by half a step in every input.
      latent: whether the parameters are rounded for use, so that they are not the weight itself.
      fits_under_jit: whether `project` and `from_dense` work under jit.
      of_one_size: option -> the value with which `sized_by` has nothing to choose.
      formerly: option -> its value in a run that was stored before this was an option (`config.stored`).
    """

    paper: ClassVar[str] = ""
    computes: ClassVar[str] = ""
    size: ClassVar[str] = ""
    nearest: ClassVar[str] = ""
    own_projection: ClassVar[bool] = True
    input_step: float = 0.0
    latent: bool = False
    fits_under_jit: ClassVar[bool] = True
    of_one_size: ClassVar[Mapping[str, Any]] = {}
    formerly: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.__signature__ = constructor(cls)

    @staticmethod
    def sized_by(n: int, m: int) -> tuple[str, Sequence[Any]] | None:
        """The option that sets the storage of an n × m weight, and its values in order of increasing storage.

        A value that padding makes at least as large as a later one is left out. None for a structure with a fixed size.
        """
        return None

    @staticmethod
    def timed_with(n: int) -> Sequence[Mapping[str, Any]]:
        """Options for timing an n × n weight."""
        return ({},)

    @property
    def parameters(self) -> int:
        """Number of trained parameters, with the bias."""
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self, nnx.Param)))

    @property
    def bytes_stored(self) -> int:
        """Bytes of the arrays that hold the layer."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(self)))

    @property
    def multiplies(self) -> int:
        """Multiplications of the layer for one input vector: in matrix products and in activations.

        Work that is done once per call, for any number of vectors, does not count. A Fourier transform of n real
        numbers counts n ⌈log₂ n⌉, of n complex numbers twice as much; a complex product counts 4.
        """
        raise NotImplementedError

    def check_width(self, x: jax.Array) -> None:
        """Raises ValueError, one line, unless the last axis of `x` has `in_features` entries."""
        if not x.ndim or x.shape[-1] != self.in_features:
            name = type(self).__name__
            raise ValueError(f"x has shape {x.shape}: this {name} takes [..., in_features], here {self.in_features}")

    def to_dense(self) -> jax.Array:
        """The weight as one matrix, `[in_features, out_features]`, in the dtype of the parameters.

        The bias is not in it: the layer's output is x · to_dense() + `bias`.
        """
        raise NotImplementedError

    def rescale(self, factor: float) -> None:
        """Multiplies the weight by a positive number, in place; not the bias."""
        raise NotImplementedError

    def project(self, kernel: jax.Array, bias: jax.Array | None = None) -> None:
        """Sets this layer to the best approximation of a dense layer with this structure and options; deterministic.

        Args:
          kernel: `[in_features, out_features]`, floating; the fit is float32 at least.
          bias: `[out_features]`, copied; None sets the bias to zeros if the layer has one.

        Raises:
          ValueError: a shape that does not fit, or a bias for a layer without one.
        """
        if kernel.shape != (self.in_features, self.out_features):
            raise ValueError(f"kernel has shape {kernel.shape}: this layer is {self.in_features} × {self.out_features}")
        if bias is not None and self.bias is None:
            raise ValueError("bias is given, but this layer was made with use_bias=False")
        with jax.default_matmul_precision("highest"):
            self.set_dense(kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32)))
        if self.bias is not None:
            self.bias[...] = jnp.broadcast_to(0.0 if bias is None else bias, self.bias.shape).astype(self.param_dtype)

    def set_dense(self, kernel: jax.Array) -> None:
        """Sets only the weight, to the nearest one to `kernel` `[in_features, out_features]`, float32 at least."""
        raise NotImplementedError

    @classmethod
    def from_dense(cls, kernel: jax.Array, bias: jax.Array | None = None, **options: Any) -> Self:
        """The layer of this structure that is nearest to a dense one in Frobenius norm; deterministic.

        Args:
          kernel: `[in_features, out_features]`, floating. The parameters get its dtype unless `param_dtype` is given;
            the fit is float32 at least.
          bias: `[out_features]`, copied; it becomes the layer's `bias`, which `to_dense` does not hold. None makes a
            layer without bias.
          **options: options of the structure, as in its constructor.

        Raises:
          ValueError: the kernel is not a matrix.
        """
        if kernel.ndim != 2:
            raise ValueError(f"kernel has shape {kernel.shape}: from_dense takes a matrix [in_features, out_features]")
        options = {"param_dtype": kernel.dtype} | options
        layer = cls(*kernel.shape, use_bias=bias is not None, rngs=nnx.Rngs(0), **options)
        layer.project(kernel, bias)
        return layer


class Structured(Weight, nnx.Module):
    """A linear layer whose weight is a product of small factors.

    A structure implements `factors`, `multiply` and `fit`, and `weights` if it does not multiply with the factors
    themselves.

    Args:
      in_features: width of the input, any size (structures pad internally).
      out_features: width of the output, any size.
      use_bias: whether to add a bias, initially zero.
      dtype: dtype of the computation; None promotes input and factors.
      param_dtype: dtype of the stored factors.
      rngs: source of the initial factors, drawn so that the output's variance is that of a dense layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
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
        for name, factor in self.factors().items():
            setattr(self, name, nnx.Param(self.draw(rngs.params(), name, factor)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in_features]` -> `[..., out_features]`.

        Raises:
          ValueError: the input has another width.
        """
        self.check_width(x)
        names = [*self.factors(), *([] if self.bias is None else ["bias"])]
        dtype = self.dtype or jnp.result_type(x, *(getattr(self, name)[...] for name in names))
        out = self.multiply(x.astype(dtype), **self.weights(dtype))
        return out if self.bias is None else out + self.bias[...].astype(dtype)

    def factors(self) -> dict[str, Factor]:
        """The factors by name; each is stored as a parameter of this name."""
        raise NotImplementedError

    def draw(self, key: jax.Array, name: str, factor: Factor) -> jax.Array:
        """The initial factor `name`: normal with mean zero and the factor's variance."""
        del name
        deviation = math.sqrt(1 / factor.fan_in if factor.variance is None else factor.variance)
        return jax.random.normal(key, factor.shape, self.param_dtype) * jnp.asarray(deviation, self.param_dtype)

    def weights(self, dtype: jnp.dtype) -> dict[str, jax.Array]:
        """The arguments of `multiply`, from the stored factors. By default: the factors in `dtype`."""
        return {name: getattr(self, name)[...].astype(dtype) for name in self.factors()}

    def multiply(self, x: jax.Array, **weights: jax.Array) -> jax.Array:
        """x · W, without the bias: `[..., in_features]` -> `[..., out_features]`."""
        raise NotImplementedError

    def fit(self, kernel: jax.Array) -> dict[str, jax.Array]:
        """The factors whose weight is nearest to `kernel` `[in_features, out_features]` in Frobenius norm."""
        raise NotImplementedError

    @property
    def multiplies(self) -> int:
        """Multiplications for one input vector. By default: one for every entry of a factor."""
        return sum(math.prod(factor.shape) for factor in self.factors().values())

    def to_dense(self) -> jax.Array:
        """The weight as one matrix, `[in_features, out_features]`, in the dtype of the factors."""
        return self.multiply(jnp.eye(self.in_features, dtype=self.param_dtype), **self.weights(self.param_dtype))

    def rescale(self, factor: float) -> None:
        """Multiplies the weight by a positive number, in place. By default: the last factor, in which it is linear."""
        *_, last = self.factors()
        scale_array(getattr(self, last), factor)

    def set_dense(self, kernel: jax.Array) -> None:
        for name, value in self.fit(kernel).items():
            getattr(self, name)[...] = value.astype(self.param_dtype)


class Whole(Structured):
    """A structure that is multiplied as one matrix: its `weights` are that matrix, "kernel", anew in each call.

    So it saves bytes and no time.
    """

    def multiply(self, x: jax.Array, *, kernel: jax.Array) -> jax.Array:
        return x @ kernel

    @property
    def multiplies(self) -> int:
        return self.in_features * self.out_features

    def to_dense(self) -> jax.Array:
        return self.weights(self.param_dtype)["kernel"]
