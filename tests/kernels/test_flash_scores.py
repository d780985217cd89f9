"""The scores of flash_attention, shipped ones and a user's own, against plain NumPy; their parameters' gradients."""

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.kernels import flash_attention
from efficient_tx.kernels.flash_attention import SCORES, Score
from efficient_tx.kernels.flash_attention.score import alibi_slopes

HEADS, KEYS, QUERIES, BIAS = 4, 40, 23, 0.2
SLOPES = np.array([0.5, 0.1, 0.02, 0.0])
TABLE = np.random.default_rng(5).normal(size=(HEADS, 9))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 16 × 16 and 32 × 16 weights, so that short sequences have several, the last one ragged."""
    xla = importlib.import_module("efficient_tx.kernels.flash_attention.xla")
    monkeypatch.setattr(xla, "SQUARE", (16, 16))
    monkeypatch.setattr(xla, "TALL", (32, 16))


@dataclasses.dataclass(frozen=True)
class Student(Score):
    """A user's own: a Student-t kernel with a width for every head, normalised by its sum."""

    widths: Any
    power: int = 2

    normalise = "sum"
    needs_norms = True

    def logits(self, dot, q_norm, k_norm, i, j, head):
        return 2 * (q_norm + k_norm - dot) + 0.1 * head

    def weights(self, logits):
        return (1 + logits / self.widths) ** -self.power


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def of_sum(weights):
    return weights / weights.sum(-1, keepdims=True)


def distance(h, s, norms, i, j):
    """scale · ‖q − k‖² / 2, from s = scale · q·k + bias."""
    return norms + BIAS - s


# Name -> weights of a head from inner products `[queries, keys]`, half the scaled squared norms, and positions.
FORMULAS = {
    "softmax": lambda h, s, norms, i, j: softmax(s),
    "sigmoid": lambda h, s, norms, i, j: 1 / (1 + np.exp(-s)),
    "gaussian": lambda h, s, norms, i, j: np.exp(BIAS - distance(h, s, norms, i, j)),
    "power": lambda h, s, norms, i, j: of_sum(np.abs(s) ** 4),
    "soft_cap": lambda h, s, norms, i, j: softmax(50 * np.tanh(s / 50)),
    "alibi": lambda h, s, norms, i, j: softmax(s - 2.0 ** (-2 * (h + 1)) * np.abs(i - j)),
    "relative": lambda h, s, norms, i, j: softmax(s),
    "relu2": lambda h, s, norms, i, j: np.maximum(s, 0) ** 2,
    "power 3": lambda h, s, norms, i, j: of_sum(np.abs(s) ** 3),
    "soft_cap 2": lambda h, s, norms, i, j: softmax(2 * np.tanh(s / 2)),
    "alibi slopes": lambda h, s, norms, i, j: softmax(s - SLOPES[h] * np.abs(i - j)),
    "relative table": lambda h, s, norms, i, j: softmax(s + TABLE[h][np.clip(j - i, -4, 4) + 4]),
    "student": lambda h, s, norms, i, j: of_sum(
        (1 + (2 * (norms - (s - BIAS)) - 2 * BIAS + 0.1 * h) / (1.5 + h)) ** -2
    ),
}
OBJECTS = {
    "power 3": SCORES["power"](p=3.0),
    "soft_cap 2": SCORES["soft_cap"](cap=2.0),
    "alibi slopes": SCORES["alibi"](slopes=SLOPES),
    "relative table": SCORES["relative"](table=TABLE),
    "student": Student(widths=1.5 + np.arange(HEADS)),
}


def inputs():
    r = np.random.default_rng(0)
    return [r.normal(size=(2, *shape)) for shape in ((QUERIES, HEADS, 6), (KEYS, 2, 6), (KEYS, 2, 3))]


def test_every_shipped_score_has_a_formula_here():
    assert {*SCORES} <= {*FORMULAS}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.first(1)
def test_equals_its_formula_and_has_its_gradients(name):
    """Values against NumPy; gradients, also of the score's arrays, against those of the plain formula, in float64."""
    q, k, v = inputs()
    scale = 6**-0.5
    i, j = np.arange(QUERIES)[:, None] + KEYS - QUERIES, np.arange(KEYS)
    expected = np.zeros((2, QUERIES, HEADS, 3))
    for b, h in np.ndindex(2, HEADS):
        one_q, one_k, one_v = q[b, :, h], k[b, :, h // 2], v[b, :, h // 2]
        norms = scale / 2 * (np.square(one_q).sum(-1)[:, None] + np.square(one_k).sum(-1))
        expected[b, :, h] = FORMULAS[name](h, scale * one_q @ one_k.T + BIAS, norms, i, j) @ one_v
    w = np.random.default_rng(1).normal(size=expected.shape)
    score = OBJECTS.get(name, name)

    def loss(arrays, score, implementation):
        out = flash_attention(*arrays, score=score, bias=BIAS, implementation=implementation)
        return jnp.vdot(out, w), out

    with jax.enable_x64(True):
        wanted = (0, 1) if isinstance(score, Score) else 0
        static = (2,) if isinstance(score, Score) else (1, 2)
        run = jax.jit(jax.value_and_grad(loss, argnums=wanted, has_aux=True), static_argnums=static)
        found = {implementation: run((q, k, v), score, implementation) for implementation in ("xla", "reference")}
    for (_, out), _ in found.values():
        np.testing.assert_allclose(out, expected, atol=1e-11)  # sums of 40 terms of order 1 in float64
    for ours, theirs in zip(*(jax.tree.leaves(gradients) for _, gradients in found.values())):
        assert np.isfinite(ours).all() and np.abs(theirs).max() > 1e-6
        np.testing.assert_allclose(ours, theirs, atol=1e-10)


def test_alibi_slopes_are_the_papers():
    """1/2, 1/4, ..., 1/256 for 8 heads, and the roots between them for 16; 12 heads take those of 8 and four more."""
    np.testing.assert_allclose(alibi_slopes(8), 0.5 ** np.arange(1, 9))
    np.testing.assert_allclose(alibi_slopes(16), 0.5 ** np.arange(0.5, 8.5, 0.5), rtol=1e-6)
    np.testing.assert_allclose(alibi_slopes(12), [*0.5 ** np.arange(1, 9), *0.5 ** np.arange(0.5, 4.5)], rtol=1e-6)


def test_powers_neither_overflow_nor_divide_by_zero():
    """|10⁴⋅x|⁸ is beyond float32; a query that is zero has no weights, and finite gradients."""
    q, k, v = (x.astype(np.float32) for x in inputs())
    q *= 1e4
    q[:, 0] = 0
    score = SCORES["power"](p=8.0)
    out, gradients = jax.value_and_grad(lambda q: flash_attention(q, k, v, score=score).sum())(q)
    exact = flash_attention(q / 1e4, k, v, score=score)
    np.testing.assert_allclose(out, exact.sum(), rtol=1e-4)
    np.testing.assert_array_equal(exact[:, 0], 0)
    assert np.isfinite(gradients).all()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_weights_that_sum_to_nothing_give_zero_and_no_gradient(implementation):
    """Signed weights, as no shipped score has: those of a query that is zero sum to 0, though their values do not."""

    class Signed(Score):
        normalise = "sum"

        def weights(self, logits):
            return logits

    q, k, v = (x.astype(np.float32) for x in inputs())
    q[:, 0] = 0
    given = {"score": Signed(), "implementation": implementation}
    assert not flash_attention(q, k, v, **given)[:, 0].any()
    gradients = jax.grad(lambda q: jnp.sin(flash_attention(q, k, v, **given)).sum())(q)
    assert not gradients[:, 0].any() and np.abs(gradients).max() > 0


def test_a_static_field_is_a_program_and_an_array_is_none():
    """What a kernel is compiled for changes with numbers that are static only."""
    traced = []

    @dataclasses.dataclass(frozen=True)
    class Counted(Score):
        slope: Any
        power: float = 1.0

        def logits(self, dot, q_norm, k_norm, i, j, head):
            traced.append(self.power)
            return self.power * dot - self.slope * abs(i - j)

    q, k, v = (x.astype(np.float32) for x in inputs())
    run = jax.jit(lambda score: flash_attention(q, k, v, score=score, implementation="xla"))
    a = run(Counted(np.float32(0.1)))
    count = len(traced)
    b = run(Counted(np.float32(0.2)))
    assert len(traced) == count and np.abs(a - b).max() > 1e-3
    run(Counted(np.float32(0.1), 2.0))
    assert len(traced) > count


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("softmaxx", "score is 'softmaxx': choose one of softmax, sigmoid"),
        (3, "score is 3: choose one of"),
        (Score, "score is .*choose one of"),
        (SCORES["alibi"](slopes=np.ones(3)), r"Alibi.slopes.*its shape is \(3,\): pass one number or .* here 4"),
        (SCORES["soft_cap"](cap=[50.0]), "SoftCap.cap is a list: a field is an array, or can be hashed"),
    ],
)
def test_what_is_no_score_is_one_line(score, message):
    q, k, v = inputs()
    with pytest.raises((ValueError, TypeError), match=message) as error:
        flash_attention(q, k, v, score=score)
    assert "\n" not in str(error.value)


def test_a_class_without_the_decorator_is_one_line():
    class Forgotten(Score):
        cap: float = 3.0

    q, k, v = inputs()
    with pytest.raises(TypeError, match=r"Forgotten.cap is no field: decorate Forgotten with @dataclasses.dataclass"):
        flash_attention(q, k, v, score=Forgotten())
