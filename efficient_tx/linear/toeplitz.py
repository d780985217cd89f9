"""Toeplitz: W[i, j] = t[j − i], the same number along every diagonal, multiplied by Fourier transforms.

A Toeplitz matrix is a corner of a circulant one, and a circulant matrix is diagonal in the Fourier basis (Golub and
Van Loan, Matrix Computations, §4.8): y = irfft(rfft(x) · rfft(t)), n log n in place of n². The nearest Toeplitz matrix
in Frobenius norm has on every diagonal the mean of that diagonal.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from efficient_tx.linear.structured import Factor, Structured


class Toeplitz(Structured):
    """A linear layer whose weight is constant along its diagonals; transforms are float32 at least.

    It has in + out − 1 numbers.

    Args:
      causal: output j sees the inputs i ≤ j only: the out diagonals with j ≥ i.
      circulant: diagonals wrap around, t[(j − i) mod n] with n = max(in, out) numbers: a circular convolution, of
        which a layer that is not square is the top left corner.

    Raises:
      ValueError: causal and circulant at once.
    """

    paper = "Golub and Van Loan, §4.8"
    computes = "W_ij = t_(j − i)"
    size = "2·n − 1, n if causal or circulant"
    nearest = "mean of every diagonal"

    def __init__(
        self, in_features: int, out_features: int, *, causal: bool = False, circulant: bool = False, **common: Any
    ):
        # Not above: importing the structures imports no more than flax does.
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
            # Anything shorter than inputs and outputs together would wrap into an output.
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
        """Real multiplications for one input vector; the transform of the weight serves all of them.

        By the radix-2 count, a complex transform of N points makes ½ N ⌈log₂ N⌉ complex products of 4 real ones each,
        one of real numbers half of that. There are two of these, and N // 2 + 1 complex products between them.
        """
        return 2 * self.length * math.ceil(math.log2(self.length)) + 4 * (self.length // 2 + 1)

    def places(self) -> jnp.ndarray:
        """Which of the stored numbers stands at [i, j], int32 `[in_features, out_features]`; `count`: none does."""
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
