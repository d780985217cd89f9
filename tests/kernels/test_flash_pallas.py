"""The Pallas kernels of flash_attention in interpret mode, against the plain formula in float64."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.kernels import flash_attention
from efficient_tx.kernels.flash_attention import SCORES, Score, causal, documents, padding, prefix, window
from efficient_tx.kernels.flash_attention.elementwise import PRIMITIVES
from efficient_tx.kernels.flash_attention.options import Options
from efficient_tx.kernels.op import PLATFORMS

KERNELS = ("pallas_tpu", "pallas_gpu")
SIZES = {name: importlib.import_module(f"efficient_tx.kernels.flash_attention.{name}").BlockSizes for name in KERNELS}
# Small, so that short sequences have several blocks, and rows of queries and of keys differ.
BLOCKS = {"pallas_tpu": SIZES["pallas_tpu"](128, 128, 128, 128), "pallas_gpu": SIZES["pallas_gpu"](32, 16, 16, 32, 4)}
KEYS, BIAS = 150, -0.3
IDS = np.sort(np.random.default_rng(0).integers(0, 3, size=(2, KEYS)), axis=1)
REAL = np.arange(KEYS) < np.array([[70], [0]])


def inputs(queries, keys, heads, groups, dim, v_dim, dtype=np.float32):
    r = np.random.default_rng(queries)
    shapes = (queries, heads, dim), (keys, groups, dim), (keys, groups, v_dim)
    return [np.asarray(r.normal(size=(2, *shape)), dtype) for shape in shapes]


def value_and_gradients(arrays, score, **options):
    """Output, log-sum-exp where there is one, and the gradients of inputs and score of a random sum of both."""
    heads = arrays[0].shape[2]
    if isinstance(score, str):
        score = SCORES[score]().given(heads=heads, bias=BIAS)
    with_lse = score.normalise == "softmax"
    r = np.random.default_rng(1)
    w = r.normal(size=(*arrays[0].shape[:3], arrays[2].shape[3]))
    w_lse = r.normal(size=arrays[0].shape[:3])

    def loss(arrays, score):
        found = flash_attention(*arrays, score=score, bias=BIAS, return_lse=with_lse, **options)
        out, lse = found if with_lse else (found, jnp.zeros(w_lse.shape))
        total = jnp.vdot(out.astype(w.dtype), w) + jnp.vdot(jnp.where(jnp.isfinite(lse), lse, 0), w_lse)
        return total, (out, lse)

    (_, values), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(arrays, score)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), (values, gradients))


def assert_equals_the_formula(arrays, kernel, score, rtol, **options):
    """Errors relative to the largest number of each array."""
    found = value_and_gradients(arrays, score, implementation=kernel, block_sizes=BLOCKS[kernel], **options)
    options.pop("interpret")
    with jax.enable_x64(True):
        exact = [np.asarray(x, np.float64) for x in arrays]
        expected = value_and_gradients(exact, score, implementation="reference", **options)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected))):
        finite = np.isfinite(theirs)
        np.testing.assert_array_equal(ours[~finite], theirs[~finite])
        largest = np.abs(theirs[finite]).max(initial=1e-3)
        np.testing.assert_allclose(ours[finite], theirs[finite], atol=rtol * largest)


class Shares(Score):
    """Weights divided by their sum, of norms and of the head's number: what no shipped score asks for."""

    normalise = "sum"
    needs_norms = True

    def logits(self, dot, q_norm, k_norm, i, j, head):
        return dot / (1 + head) - q_norm - k_norm

    def weights(self, logits):
        return jnp.exp(logits)


# Queries, keys, heads, groups, dim and v_dim; score; mask.
CASES = {
    "softmax, grouped, causal": ((40, KEYS, 4, 2, 16, 32), "softmax", causal()),
    "gaussian, padding": ((40, KEYS, 2, 1, 16, 16), "gaussian", padding(REAL)),
    "alibi, window and sink": ((KEYS, KEYS, 2, 2, 16, 16), "alibi", causal() & (window(30) | prefix(3))),
    "sigmoid, documents": ((40, KEYS, 2, 2, 8, 16), "sigmoid", documents(IDS[:, -40:], IDS) & ~window(7)),
    "power": ((KEYS, 70, 2, 2, 16, 16), "power", None),
    "soft_cap, one key": ((40, 1, 2, 2, 16, 16), "soft_cap", None),
    "relu2, one query": ((1, KEYS, 2, 2, 16, 16), "relu2", padding(REAL)),
    "softmax, nobody": ((40, KEYS, 2, 2, 16, 16), "softmax", prefix(0)),
    "softmax, whole blocks": ((128, 256, 1, 1, 16, 16), "softmax", None),
    "shares by head, padding": ((40, KEYS, 2, 1, 16, 16), Shares(), padding(REAL)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.first(1)
def test_equals_the_formula_and_its_gradients(kernel, case):
    sizes, score, mask = CASES[case]
    # float32 sums of 256 terms; the quotients by small inner products of a power lose two digits.
    rtol = 2e-3 if score == "power" else 2e-6
    assert_equals_the_formula(inputs(*sizes), kernel, score, rtol, mask=mask, interpret=True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.slow
def test_bfloat16_is_rounded_once_a_product(kernel):
    """Weights and cotangents are rounded to 8 bits before a product, sums are not: errors of a few times 2⁻⁹."""
    arrays = inputs(40, KEYS, 4, 2, 16, 16, jnp.bfloat16)
    for score in ("softmax", "gaussian"):
        assert_equals_the_formula(arrays, kernel, score, 2**-6, mask=causal() & padding(REAL), interpret=True)


@pytest.mark.slow
def test_two_cores_of_a_tpu_do_not_race():
    """The interpreter of TPUs: two cores share the axes declared parallel, memory that is not written is NaN."""
    from tests.support.races import races_found, two_cores

    for score, mask in (("alibi", causal() & documents(IDS)), ("gaussian", padding(REAL))):
        arrays = inputs(KEYS, KEYS, 2, 1, 16, 16)
        assert_equals_the_formula(arrays, "pallas_tpu", score, 2e-6, mask=mask, interpret=two_cores())
        assert not races_found()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.slow
def test_works_under_vmap_checkpoint_and_shard_map(kernel):
    arrays = inputs(20, 40, 2, 2, 16, 16)
    mask = np.arange(40) < np.array([[30], [11]])

    def gradient(q, k, v, mask, implementation=kernel, interpret=True):
        def loss(q, k, v):
            out = flash_attention(q, k, v, mask=mask, causal=True, implementation=implementation, interpret=interpret)
            return jnp.square(out).sum()

        return jax.grad(jax.checkpoint(loss), (0, 1, 2))(q, k, v)

    expected = jax.jit(partial(gradient, implementation="reference", interpret=False))(*arrays, mask)
    # Without the check of what varies over devices, which the loops of jax's interpreter fail; the next test has it.
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("devices")
    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)

    def one(q, k, v, mask):
        return jax.tree.map(lambda x: x[0], gradient(q[None], k[None], v[None], mask[None]))

    for found in (jax.jit(run)(*arrays, mask) for run in (mapped, jax.vmap(one))):
        for ours, theirs in zip(found, expected):
            np.testing.assert_allclose(ours, theirs, atol=2e-6 * np.abs(theirs).max())  # float32


@pytest.mark.parametrize("kernel", KERNELS)
def test_is_traced_within_shard_map(kernel):
    """Where jax checks what varies over devices; segments and parameters of a score included."""
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("devices")

    def gradient(arrays, ids, slopes):
        def loss(arrays, slopes):
            score, mask = SCORES["alibi"](slopes), documents(ids) & causal()
            return flash_attention(*arrays, score=score, mask=mask, implementation=kernel).sum()

        return jax.grad(loss, (0, 1))(arrays, slopes)

    whole = jax.sharding.PartitionSpec()
    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=(spec, spec, whole), out_specs=(spec, whole))
    text = str(jax.jit(mapped).trace(inputs(KEYS, KEYS, 2, 1, 16, 16), IDS, np.ones(2, np.float32)).jaxpr)
    assert "flash_attention_queries" in text and "flash_attention_keys" in text


def integer(x):
    return jax.lax.convert_element_type(x, jnp.int32)


# A function of every primitive that a score may use; those of calls and constants are in all of them.
FUNCTIONS = {
    name: getattr(jax.lax, name)
    for name in (
        "abs", "ceil", "cos", "exp", "exp2", "floor", "log", "log1p", "logistic", "neg", "round", "rsqrt", "sign",
        "sin", "sqrt", "square", "stop_gradient", "tan", "tanh",
    )
} | {
    "clamp": lambda x: jax.lax.clamp(-x, x, x),
    "integer_pow": lambda x: jax.lax.integer_pow(x, 3),
    "rem": lambda x: jax.lax.rem(x, jnp.full_like(x, 3)),
} | {
    name: lambda x, name=name: getattr(jax.lax, name)(x, x + 1)
    for name in ("add", "div", "max", "min", "mul", "pow", "sub")
} | {
    name: lambda x, name=name: jnp.where(getattr(jax.lax, name)(x, x + 1), x, 0.0)
    for name in ("eq", "ge", "gt", "le", "lt", "ne")
} | {
    name: lambda x, name=name: jnp.where(getattr(jax.lax, f"bitwise_{name}")(x > 0, x < 1), x, 0.0)
    for name in ("and", "or", "xor")
} | {
    "not": lambda x: jnp.where(jax.lax.bitwise_not(x > 0), x, 0.0),
} | {
    name: lambda x, name=name: getattr(jax.lax, name)(integer(x), integer(x)).astype(x.dtype)
    for name in ("shift_left", "shift_right_arithmetic", "shift_right_logical")
}  # fmt: skip
STRUCTURAL = {
    "add_any", "broadcast_in_dim", "convert_element_type", "copy", "custom_jvp_call", "jit", "one_minus_square", "pjit",
    "select_n",
}  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.slow
def test_what_a_score_may_use_is_what_a_kernel_is_lowered_with(kernel):
    """Every primitive of a platform's list in one score; one that is not on it is a reason."""
    platform = PLATFORMS[kernel]
    if platform == "cuda" and jax.__version_info__ >= (0, 12):
        platform = None  # which lowers Triton kernels only where there is a GPU
    listed = PRIMITIVES[PLATFORMS[kernel]] - STRUCTURAL
    missing = {"pallas_tpu": [], "pallas_gpu": ["round"]}[kernel]
    assert listed == FUNCTIONS.keys() - missing
    if kernel == "pallas_tpu":
        listed -= {"sign"}  # which is lowered where jax sees a TPU only

    class All(SCORES["softmax"]):
        names = sorted(listed)

        def logits(self, dot, q_norm, k_norm, i, j, head):
            return sum(FUNCTIONS[name](dot) for name in self.names)

    text = str(jax.make_jaxpr(lambda x: All().logits(x, None, None, 0, 0, 0))(np.float32(1)))
    assert all(f" {name}" in text for name in listed)
    arrays = [jax.ShapeDtypeStruct((1, 16, 1, 16), jnp.float32)] * 3

    def loss(q, k, v):
        return flash_attention(q, k, v, score=All(), implementation=kernel).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays)
    if platform is not None:
        traced.lower(lowering_platforms=(platform,))
    for name in missing:

        class Other(SCORES["softmax"]):
            def logits(self, dot, q_norm, k_norm, i, j, head, name=name):
                return FUNCTIONS[name](dot)

        with pytest.raises(ValueError, match=f"the score needs {name}, which a kernel cannot compute"):
            jax.eval_shape(lambda q, k, v: flash_attention(q, k, v, score=Other(), implementation=kernel), *arrays)


# A TPU's kernels have two precisions, a GPU's all with a name of jax's.
UNUSUAL = {"pallas_tpu": jax.lax.Precision.HIGH, "pallas_gpu": jax.lax.DotAlgorithmPreset.F32_F32_F32}


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_a_kernel_cannot_do_is_a_reason_and_another_is_chosen(kernel):
    q, k, v = inputs(8, 8, 2, 2, 16, 16)

    class Sorted(SCORES["softmax"]):
        def logits(self, dot, q_norm, k_norm, i, j, head):
            return jnp.sort(dot, axis=0)

    table = jnp.arange(3.0)

    class Closed(SCORES["softmax"]):
        def logits(self, dot, q_norm, k_norm, i, j, head):
            return dot * table.sum()

    for arrays, options, reason in (
        ((q, k, v), {"score": "relative"}, "a relative bias is looked up in a table"),
        ((q, k, v), {"score": Sorted()}, "the score needs .*sort, which a kernel cannot compute"),
        ((q, k, v), {"score": Closed()}, "the score holds an array that is no field of it"),
        ((q, k, v), {"score": SCORES["alibi"](np.ones((2, 3)))}, r"one number a head of a score, Alibi.slopes has"),
        ((q, k, v), {"mask": np.ones((2, 1, 8, 8), bool)}, "one of all pairs is quadratic"),
        ([x.astype(np.float16) for x in (q, k, v)], {}, "it takes float32 and bfloat16, not float16"),
        ([np.zeros((2, 8, 2, 512), np.float32)] * 3, {}, "its heads have at most 256 dims, these 512"),
        ((q, k, v), {"precision": UNUSUAL[kernel]}, f"precision is {UNUSUAL[kernel]}: .* kernels have"),
    ):
        with pytest.raises(ValueError, match=f"cannot use implementation '{kernel}': .*{reason}"):
            flash_attention(*arrays, implementation=kernel, **options)
        if not isinstance(options.get("score"), (Sorted, SCORES["alibi"])):
            assert np.isfinite(flash_attention(*arrays, **options)).all()


@pytest.mark.quick
def test_a_precision_may_be_a_name():
    q, k, v = inputs(8, 8, 2, 2, 16, 16)
    for name in ("highest", "default"):
        traced = jax.make_jaxpr(partial(flash_attention, implementation="pallas_tpu", precision=name))(q, k, v)
        assert "pallas_call" in str(traced)


@pytest.mark.quick
def test_lists_that_scalar_memory_does_not_hold_are_a_reason():
    """2,048 tokens in blocks of 512: 16 numbers an example; a row that visits the first blocks needs no list."""
    ids = np.zeros((4, 2048), np.int32)
    q = np.zeros((4, 2048, 1, 16), np.float32)
    tpu = importlib.import_module("efficient_tx.kernels.flash_attention.pallas_tpu")

    def reason(mask, most):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tpu, "MOST_SCALARS", most)
            options = Options(scale=1.0, bias=0.0, precision=jax.lax.Precision.HIGHEST)
            return tpu.unsupported(options, q, q, q, SCORES["softmax"](), mask, None)

    assert reason(documents(ids), 64) is None
    assert reason(documents(ids), 63) == "its lists of blocks have 64 numbers: scalar memory holds 63"
    assert reason(causal() & documents(ids), 63) is not None
    assert reason(window(100), 12) is None and reason(window(100), 11) is not None
    assert reason(causal(), 15) is not None and reason(None, 1) is None
