"""Toeplitz: W[i, j] = t[j − i], constant along every diagonal, multiplied with Fourier transforms.

A Toeplitz matrix is a corner of a circulant matrix, which is diagonal in the Fourier basis (Golub and Van Loan, Matrix
Computations, §4.8): y = irfft(rfft(x) · rfft(t)), in time n log n instead of n². The nearest Toeplitz matrix in
Frobenius norm has the mean of each diagonal as its entries.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from efficient_tx.linear.structured import Factor, Structured


class Toeplitz(Structured):
    """A linear layer whose weight is constant along its diagonals; transforms are float32 at least.

    It has in + out − 1 parameters.

    Args:
      causal: whether output j sees the inputs i ≤ j only; then there are only the `out` diagonals with j ≥ i.
      circulant: whether diagonals wrap around, t[(j − i) mod n] with n = max(in, out) parameters: a circular
        convolution. A layer that is not square is its top left corner.

    Raises:
      ValueError: both causal and circulant.
    """

    paper = "Golub and Van Loan, §4.8"
    computes = "W_ij = t_(j − i)"
    size = "2·n − 1, n if causal or circulant"
    nearest = "mean of every diagonal"

    def __init__(
        self, in_features: int, out_features: int, *, causal: bool = False, circulant: bool = False, **common: Any
    ):
        # Imported here: importing the structures must import no more than flax does.
        from scipy.fft import next_fast_len

        if causal and circulant:
            raise ValueError("causal=True and circulant=True: what wraps around is not causal; use one of the two")
        self.causal = causal
        self.circulant = circulant
        self.seen = min(in_features, out_features) if causal else in_features
        if circulant:
            self.count, self.first, self.length = max(in_features, out_features), 0, max(in_features, out_features)
        else:
            self.first = 0 if causal else in_features - 1
            self.count = self.first + out_features
            # A shorter transform would wrap around into an output.
            self.length = next_fast_len(self.seen + out_features - 1, real=True)
        super().__init__(in_features, out_features, **common)

    def factors(self) -> dict[str, Factor]:
        # Causal: output j sums over min(j + 1, in) inputs; their mean keeps the mean output variance at 1.
        heard = sum(min(j + 1, self.in_features) for j in range(self.out_features)) / self.out_features
        return {"diagonals": Factor((self.count,), fan_in=heard if self.causal else self.in_features)}

    def multiply(self, x: jax.Array, *, diagonals: jax.Array) -> jax.Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        inputs = jnp.fft.rfft(x[..., : self.seen].astype(wide), self.length)
        product = jnp.fft.irfft(inputs * jnp.fft.rfft(diagonals.astype(wide), self.length), self.length)
        return product[..., self.first : self.first + self.out_features].astype(x.dtype)

    @property
    def multiplies(self) -> int:
        """Real multiplications for one input vector; the transform of the weight is shared by all vectors.

        In the radix-2 count, a complex transform of N points needs ½ N ⌈log₂ N⌉ complex products of 4 real products
        each, and a real transform half of that. There are two real transforms, and N // 2 + 1 complex products between
        them.
        """
        return 2 * self.length * math.ceil(math.log2(self.length)) + 4 * (self.length // 2 + 1)

    def places(self) -> jnp.ndarray:
        """The index of the stored number at [i, j], int32 `[in_features, out_features]`; `count` means none."""
        lag = jnp.arange(self.out_features) - jnp.arange(self.in_features)[:, None]
        if self.circulant:
            return lag % self.count
        return jnp.where(lag + self.first < 0, self.count, lag + self.first)

    def to_dense(self) -> jax.Array:
        return self.diagonals[...].at[self.places()].get(mode="fill", fill_value=0)

    def fit(self, kernel: jax.Array) -> dict[str, jax.Array]:
        empty, places = jnp.zeros(self.count, kernel.dtype), self.places()
        total = empty.at[places].add(kernel, mode="drop")
        return {"diagonals": total / empty.at[places].add(1, mode="drop")}
