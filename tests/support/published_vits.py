"""Published ViTs as plain formulas of the tensors in their checkpoints, in each family's names and layouts."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx, traverse_util
from scipy.special import erf

from efficient_tx.attention import Softmax
from efficient_tx.models import ViT
from efficient_tx.models.pretrained import load_pretrained

# Sizes at which nothing is equal by chance: 3 × 3 patches of 4 × 4 × 3 = 48 numbers.
WIDTH, HEADS, LAYERS, HIDDEN, CLASSES, SIDE, PATCH = 12, 2, 2, 20, 5, 12, 4
# Options of our ViT with which models of torch, and those of Hugging Face, compute the same.
TORCH = {"mlp": "gelu_erf"}
HF = {"mlp": "gelu_erf", "norm_epsilon": 1e-12}


def images(height=SIDE, width=SIDE):
    return (4 * np.random.default_rng(1).random((3, height, width, 3)) - 2).astype(np.float32)


def vit(mixers=(Softmax,), **options):
    """Our ViT of these sizes."""
    sizes = {
        "num_classes": CLASSES, "image_shape": (SIDE, SIDE, 3), "patch_size": PATCH, "features": WIDTH,
        "layers": LAYERS, "heads": HEADS, "mlp_features": HIDDEN,
    }  # fmt: skip
    return ViT(mixers=list(mixers), rngs=nnx.Rngs(0), **sizes | options)


def close(logits, expected):
    assert np.abs(expected).max() > 0.5  # logits that 1e-4 is small beside
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def draw(shapes):
    """Tensors of these shapes: scales of norms within 0.5 of 1, all others of 0; the same with any version of NumPy."""
    generator = np.random.default_rng(0)
    norms = re.compile(r"(norm\w*|ls\d)\.(weight|gamma)$|/scale$")
    return {
        name: (bool(norms.search(name)) + generator.random(shape) - 0.5).astype(np.float32)
        for name, shape in sorted(shapes.items())
    }


def layer_norm(x, scale, bias, epsilon):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * scale + bias


def attention(q, k, v):
    q, k, v = (x.reshape(len(x), HEADS, -1).swapaxes(0, 1) for x in (q, k, v))
    scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]))
    return (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(q.shape[1], -1)


def patches_of(image, weight, bias):
    """A strided convolution by hand: weight `[features, channels, height, width]`."""
    size = weight.shape[-1]
    cells = [(i, j) for i in range(0, image.shape[0], size) for j in range(0, image.shape[1], size)]
    return np.stack([np.einsum("ijc,fcij->f", image[i : i + size, j : j + size], weight) + bias for i, j in cells])


TIMM_BLOCK = {
    "norm1.weight": (WIDTH,), "norm1.bias": (WIDTH,), "norm2.weight": (WIDTH,), "norm2.bias": (WIDTH,),
    "attn.qkv.weight": (3 * WIDTH, WIDTH), "attn.qkv.bias": (3 * WIDTH,),
    "attn.proj.weight": (WIDTH, WIDTH), "attn.proj.bias": (WIDTH,),
    "mlp.fc1.weight": (HIDDEN, WIDTH), "mlp.fc1.bias": (HIDDEN,),
    "mlp.fc2.weight": (WIDTH, HIDDEN), "mlp.fc2.bias": (WIDTH,),
}  # fmt: skip


def timm_shapes(scales=False):
    scale = {"ls1.gamma": (WIDTH,), "ls2.gamma": (WIDTH,)} if scales else {}
    return {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, 10, WIDTH), "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,), "norm.weight": (WIDTH,), "norm.bias": (WIDTH,),
        "head.weight": (CLASSES, WIDTH), "head.bias": (CLASSES,),
        **{f"blocks.{i}.{name}": shape for i in range(LAYERS) for name, shape in (TIMM_BLOCK | scale).items()},
    }  # fmt: skip


def timm_logits(t, pictures, epsilon=1e-6):
    """timm's VisionTransformer from the tensors of its state_dict."""
    t = {name: x.astype(np.float64) for name, x in t.items()}
    logits = []
    for image in pictures:
        x = patches_of(image, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"])
        x = np.concatenate([t["cls_token"][0], x]) + t["pos_embed"][0]
        for i in range(LAYERS):
            b = {name.removeprefix(f"blocks.{i}."): x for name, x in t.items()}
            y = layer_norm(x, b["norm1.weight"], b["norm1.bias"], epsilon)
            q, k, v = np.split(y @ b["attn.qkv.weight"].T + b["attn.qkv.bias"], 3, axis=-1)
            y = attention(q, k, v) @ b["attn.proj.weight"].T + b["attn.proj.bias"]
            x = x + y * b.get("ls1.gamma", 1)
            y = layer_norm(x, b["norm2.weight"], b["norm2.bias"], epsilon)
            y = y @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"]
            y = 0.5 * y * (1 + erf(y / np.sqrt(2))) @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
            x = x + y * b.get("ls2.gamma", 1)
        x = layer_norm(x, t["norm.weight"], t["norm.bias"], epsilon)
        logits.append(x[0] @ t["head.weight"].T + t["head.bias"])
    return np.array(logits)


def as_hugging_face(t):
    """The tensors of a timm state_dict as transformers' ViTForImageClassification saves them."""
    plain = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        "head": "classifier",
    }
    inner = {
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    }  # fmt: skip
    named = {}
    for name, x in t.items():
        stem, leaf = (name, "") if name in plain else (name.rpartition(".")[0], name[name.rfind(".") :])
        if stem in plain:
            named[plain[stem] + leaf] = x
            continue
        _, i, stem = stem.split(".", 2)
        if stem == "attn.qkv":
            for part, piece in zip(("query", "key", "value"), np.split(x, 3)):
                named[f"vit.encoder.layer.{i}.attention.attention.{part}{leaf}"] = piece
        else:
            named[f"vit.encoder.layer.{i}.{inner[stem]}{leaf}"] = x
    return named


class Linen(linen.Module):
    """big_vision's ViT: linen gives its parameters the very names of a checkpoint."""

    pool: str
    representation: bool = False
    scan: bool = False

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(WIDTH, (PATCH, PATCH), (PATCH, PATCH), padding="VALID", name="embedding")(x)
        x = x.reshape(len(x), -1, WIDTH)
        x = x + self.param("pos_embedding", linen.initializers.zeros, (1, x.shape[1], WIDTH))
        if self.pool == "tok":
            cls = self.param("cls", linen.initializers.zeros, (1, 1, WIDTH))
            x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], axis=1)
        x = LinenEncoder(self.scan, name="Transformer")(x)
        x = x[:, 0] if self.pool == "tok" else x.mean(axis=1)
        if self.representation:
            x = jnp.tanh(linen.Dense(WIDTH, name="pre_logits")(x))
        return linen.Dense(CLASSES, name="head")(x)


class LinenEncoder(linen.Module):
    scan: bool

    @linen.compact
    def __call__(self, x):
        if self.scan:
            stack = linen.scan(LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
            x, _ = stack(name="encoderblock")(x)
        else:
            for i in range(LAYERS):
                x, _ = LinenBlock(name=f"encoderblock_{i}")(x)
        return linen.LayerNorm(name="encoder_norm")(x)


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        y = linen.LayerNorm()(x)
        x = x + linen.MultiHeadDotProductAttention(HEADS)(y, y)
        return x + LinenMlp(name="MlpBlock_0")(linen.LayerNorm()(x)), None


class LinenMlp(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.gelu(linen.Dense(HIDDEN)(x))
        return linen.Dense(WIDTH)(x)


@functools.cache
def big_vision(pool, **options):
    """The tensors of a checkpoint by name, and its logits."""
    module = Linen(pool, **options)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images())["params"]
    tensors = draw({name: x.shape for name, x in traverse_util.flatten_dict(shapes, sep="/").items()})
    params = traverse_util.unflatten_dict(tensors, sep="/")
    return tensors, np.asarray(module.apply({"params": params}, images()))


def as_augreg(tensors):
    """The names before linen, with the class token's position embedding in front of the others."""
    old = {"MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1", "MlpBlock_0": "MlpBlock_3"}
    named = {}
    for name, x in tensors.items():
        for new, before in {"LayerNorm_1": "LayerNorm_2", **old}.items():
            name = name.replace(new, before)
        named[name] = x
    table = named.pop("pos_embedding")
    first = np.full((1, 1, WIDTH), 0.25, np.float32)
    named["Transformer/posembed_input/pos_embedding"] = np.concatenate([first, table], axis=1)
    named["cls"] = named["cls"] - first  # the sum is what the model sees
    return named


def refused(model, path):
    """The one line with which a file is refused."""
    with pytest.raises(ValueError) as error:
        load_pretrained(model, path)
    assert "\n" not in str(error.value)
    return str(error.value)
