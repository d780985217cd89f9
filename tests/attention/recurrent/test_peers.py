"""The recurrent family against others: plain loops of flash-linear-attention, whole layers of transformers."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import ATTENTION
from efficient_tx.attention.recurrent.hgrn import hgrn
from efficient_tx.attention.recurrent.mamba2 import mamba2
from efficient_tx.attention.recurrent.retnet import retnet
from efficient_tx.kernels import delta_rule, gated_linear_attention
from tests.support.packages import installed

pytestmark = [pytest.mark.slow, pytest.mark.torch]
BATCH, LENGTH, HEADS, HEAD_DIM, V_DIM = 2, 150, 3, 16, 24  # no multiple of a chunk
RNG = np.random.default_rng(0)


def plain(rule: str):
    """The module of the loops of `rule`, read by itself: the package's others need Triton."""
    path = Path(installed("fla").__path__[0]) / "ops" / rule / "naive.py"
    spec = importlib.util.spec_from_file_location(f"{rule}_naive", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def tokens(unit: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    q, k, v = (normal(BATCH, LENGTH, HEADS, width) for width in (HEAD_DIM, HEAD_DIM, V_DIM))
    return (q, k / np.linalg.norm(k, axis=-1, keepdims=True), v) if unit else (q, k, v)


def theirs(function, *arrays: np.ndarray, **others):
    """The numpy arrays that a function of torch tensors returns."""
    torch = installed("torch")
    given = {name: torch.tensor(x) if isinstance(x, np.ndarray) else x for name, x in others.items()}
    found = function(*map(torch.tensor, arrays), **given)
    return jax.tree.map(lambda x: x.detach().numpy(), found, is_leaf=torch.is_tensor)


def close(found: jax.Array, expected: np.ndarray) -> None:
    """Equal up to the rounding of two orders of float32 sums over 150 tokens."""
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("rule", ["gla", "simple_gla"])
def test_gated_linear_attention_is_their_loop(rule):
    """With a decay of each channel, and of each head."""
    of_channels = [HEAD_DIM] if rule == "gla" else []
    decays, state = -np.abs(normal(BATCH, LENGTH, HEADS, *of_channels)), normal(BATCH, HEADS, HEAD_DIM, V_DIM)
    q, k, v = tokens()
    loop = getattr(plain(rule), f"naive_recurrent_{rule}")
    expected = theirs(loop, q, k, v, decays, initial_state=state, output_final_state=True)
    found = gated_linear_attention(q, k, v, log_decay=decays, initial_state=state)
    jax.tree.map(close, found, tuple(expected))


def test_mamba2_without_its_skip_is_their_loop():
    step, rate = np.abs(normal(BATCH, LENGTH, HEADS)), np.abs(normal(HEADS))
    q, k, v = tokens()
    loop = plain("simple_gla").naive_recurrent_simple_gla
    expected, _ = theirs(loop, q, k, step[..., None] * v, -step * rate, scale=1.0)
    close(mamba2(q, k, v, step=step, rate=rate, causal=True), expected)


def test_retention_is_their_matrix():
    q, k, v = tokens()
    expected = theirs(plain("retention").naive_retention, *(x.swapaxes(1, 2) for x in (q, k, v)))
    close(retnet(q, k, v, causal=True), expected.swapaxes(1, 2))


def test_the_delta_rule_is_their_loop():
    q, k, v = tokens(unit=True)
    beta, state = RNG.uniform(size=(BATCH, LENGTH, HEADS)).astype(np.float32), normal(BATCH, HEADS, HEAD_DIM, V_DIM)
    arrays = (x.swapaxes(1, 2) for x in (q, k, v, beta))
    out, last = theirs(plain("delta_rule").delta_rule_recurrence, *arrays, initial_state=state)
    found = delta_rule(q, k, v, beta=beta, initial_state=state)
    jax.tree.map(close, found, (out.swapaxes(1, 2), last))


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_gated_delta_rule_is_their_loop(per_channel):
    q, k, v = tokens(unit=True)
    beta, state = RNG.uniform(size=(BATCH, LENGTH, HEADS)).astype(np.float32), normal(BATCH, HEADS, HEAD_DIM, V_DIM)
    decays = -np.abs(normal(BATCH, LENGTH, HEADS, *([HEAD_DIM] if per_channel else [])))
    loop = (
        plain("kda").naive_recurrent_kda if per_channel else plain("gated_delta_rule").naive_recurrent_gated_delta_rule
    )
    expected = theirs(loop, q, k, v, beta=beta, g=decays, initial_state=state, output_final_state=True)
    found = delta_rule(q, k, v, beta=beta, log_decay=decays, initial_state=state)
    jax.tree.map(close, found, tuple(expected))


def test_hgrn_is_their_loop():
    forget, v = normal(BATCH, LENGTH, 1, 8), normal(BATCH, LENGTH, 1, 8)
    keep = jax.nn.sigmoid(forget)
    given = np.asarray((1 - keep) * v)[:, :, 0], np.asarray(jnp.log(keep))[:, :, 0]
    expected, _ = theirs(plain("hgrn").naive_recurrent_hgrn, *given)
    close(hgrn(forget, v, causal=True)[:, :, 0], expected)


def layer(name: str, features: int, **options) -> nnx.Module:
    return ATTENTION[name](features, causal=True, **options, rngs=nnx.Rngs(0))


def taps(made: nnx.Module) -> np.ndarray:
    """The weights `[channels, 1, size]` of the convolutions of all channels, as torch has them."""
    return np.concatenate([conv.weight[...].T for conv in made.values()])[:, None]


def set_weights(module, **weights: np.ndarray) -> None:
    """Overwrites the parameters of a torch module: all of them, by their names with __ for a dot."""
    torch = installed("torch")
    state = {name.replace("__", "."): torch.tensor(np.asarray(x)) for name, x in weights.items()}
    module.load_state_dict(state, strict=True)


def test_mamba2_is_the_layer_of_transformers():
    transformers = installed("transformers")
    made = layer("mamba2", 32, heads=4, states=8)
    config = transformers.Mamba2Config(
        hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=1, use_conv_bias=False, num_hidden_layers=1,
        layer_norm_epsilon=1e-5,
    )  # fmt: skip
    peer = importlib.import_module("transformers.models.mamba2.modeling_mamba2").Mamba2Mixer(config, 0).eval()
    rows = [part.kernel[...].T for part in (made.gate, made.v, made.k, made.q, made.time)]
    convolutions = {name: made.short_conv[name] for name in ("v", "k", "q")}
    scale = 1 + 0.1 * normal(64)
    made.norm.scale[...] = jnp.asarray(scale)
    set_weights(
        peer, in_proj__weight=np.concatenate(rows), conv1d__weight=taps(convolutions), dt_bias=made.time_bias[...],
        A_log=made.log_rate[...], D=made.skip[...], norm__weight=scale, out_proj__weight=made.out.kernel[...].T,
    )  # fmt: skip
    x = normal(BATCH, LENGTH, 32)
    close(made(x), theirs(peer, x))


def test_gated_delta_is_the_layer_of_transformers():
    """Qwen3-Next's, whose rows are those of one head after another, and which normalises before the gate, too."""
    transformers = installed("transformers")
    made = layer("gated_delta", 32, heads=2, head_dim=8, expand_v=2.0)
    config = transformers.Qwen3NextConfig(
        hidden_size=32, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=16, linear_conv_kernel_dim=4, num_hidden_layers=1, layer_types=["linear_attention"],
        rms_norm_eps=made.norm.epsilon,
    )  # fmt: skip
    module = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    peer = module.Qwen3NextGatedDeltaNet(config, 0).eval()

    def by_head(*parts: nnx.Module) -> np.ndarray:
        return np.concatenate([part.kernel[...].T.reshape(2, -1, 32) for part in parts], axis=1).reshape(-1, 32)

    scale = 1 + 0.1 * normal(16)
    made.norm.scale[...] = jnp.asarray(scale)
    set_weights(
        peer, in_proj_qkvz__weight=by_head(made.q, made.k, made.v, made.gate), norm__weight=scale,
        in_proj_ba__weight=by_head(made.beta, made.decay), dt_bias=made.decay_bias[...], A_log=made.decay_rate[...],
        conv1d__weight=taps({name: made.short_conv[name] for name in "qkv"}), out_proj__weight=made.out.kernel[...].T,
    )  # fmt: skip
    x = normal(BATCH, LENGTH, 32)
    close(made(x), theirs(peer, x))
