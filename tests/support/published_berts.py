"""A small BERT as transformers saves it, and its plain formula of the tensors in the file."""

import json

import numpy as np
from safetensors.numpy import save_file
from scipy.special import erf

from efficient_tx.attention import Softmax
from efficient_tx.models import Bert
from tests.support.published_vits import layer_norm

# Sizes at which nothing is equal by chance.
WIDTH, HEADS, LAYERS, HIDDEN, VOCAB, PLACES, SEGMENTS = 12, 3, 2, 20, 30, 10, 2
CONFIG = {
    "model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-3, "num_attention_heads": HEADS,
    "is_decoder": False,
}  # fmt: skip
LENGTHS = np.array([[7], [4], [2]])


def tensors():
    """Those of a BertModel by name: scales of norms within 0.5 of 1, all others of 0."""
    shapes = {
        "embeddings.word_embeddings.weight": (VOCAB, WIDTH),
        "embeddings.position_embeddings.weight": (PLACES, WIDTH),
        "embeddings.token_type_embeddings.weight": (SEGMENTS, WIDTH),
        "embeddings.LayerNorm.weight": (WIDTH,),
        "embeddings.LayerNorm.bias": (WIDTH,),
        "pooler.dense.weight": (WIDTH, WIDTH),
        "pooler.dense.bias": (WIDTH,),
    }
    for i in range(LAYERS):
        layers = {
            "attention.self.query": (WIDTH, WIDTH), "attention.self.key": (WIDTH, WIDTH),
            "attention.self.value": (WIDTH, WIDTH), "attention.output.dense": (WIDTH, WIDTH),
            "intermediate.dense": (HIDDEN, WIDTH), "output.dense": (WIDTH, HIDDEN),
            "attention.output.LayerNorm": (WIDTH,), "output.LayerNorm": (WIDTH,),
        }  # fmt: skip
        for name, shape in layers.items():
            shapes[f"encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"encoder.layer.{i}.{name}.bias"] = shape[:1]
    generator = np.random.default_rng(0)
    return {
        name: (name.endswith("LayerNorm.weight") + generator.random(shape) - 0.5).astype(np.float32)
        for name, shape in shapes.items()
    }


def save(folder, named=None, config=CONFIG):
    """Writes the tensors and a config.json (None is none) to a folder; returns the folder."""
    folder.mkdir(exist_ok=True)
    save_file(tensors() if named is None else named, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def texts():
    """Ids, segments and mask, each `[3, 7]`; what stands at padding means nothing."""
    generator = np.random.default_rng(1)
    ids, segments = generator.integers(0, VOCAB, (3, 7)), generator.integers(0, SEGMENTS, (3, 7))
    return ids.astype(np.int32), segments.astype(np.int32), np.arange(7) < LENGTHS


def hidden(t, ids, segments, epsilon=CONFIG["layer_norm_eps"]):
    """The last hidden states `[length, WIDTH]` of one text without padding, in float64."""
    t = {name: x.astype(np.float64) for name, x in t.items()}

    def norm(x, name):
        return layer_norm(x, t[f"{name}.weight"], t[f"{name}.bias"], epsilon)

    def dense(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    x = t["embeddings.word_embeddings.weight"][ids] + t["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + t["embeddings.token_type_embeddings.weight"][segments], "embeddings.LayerNorm")
    for i in range(LAYERS):
        at = f"encoder.layer.{i}"
        q, k, v = (
            dense(x, f"{at}.attention.self.{name}").reshape(len(x), HEADS, -1) for name in ("query", "key", "value")
        )
        scores = np.exp(np.einsum("ihd,jhd->hij", q, k) / np.sqrt(q.shape[-1]))
        mixed = np.einsum("hij,jhd->ihd", scores / scores.sum(-1, keepdims=True), v).reshape(len(x), -1)
        x = norm(x + dense(mixed, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm")
        y = dense(x, f"{at}.intermediate.dense")
        x = norm(x + dense(0.5 * y * (1 + erf(y / np.sqrt(2))), f"{at}.output.dense"), f"{at}.output.LayerNorm")
    return x


def bert(mixers=(Softmax,), *, rngs, **options):
    """Our Bert of these sizes, with a head of 3 classes."""
    sizes = {
        "vocab_size": VOCAB, "max_len": PLACES, "features": WIDTH, "layers": LAYERS, "heads": HEADS,
        "mlp_features": HIDDEN, "num_classes": 3, "norm_epsilon": CONFIG["layer_norm_eps"],
    }  # fmt: skip
    return Bert(mixers=list(mixers), rngs=rngs, **sizes | options)
