"""Layers of any model swapped for others, and parameters carried from one model to another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.linear import LINEAR, Dense, LowRank, Monarch, replace, transfer
from efficient_tx.linear.replacement import relative_error


class Block(nnx.Module):
    def __init__(self, up, rngs):
        self.up = up
        self.norm = nnx.LayerNorm(8, rngs=rngs)


class Foreign(nnx.Module):
    """Nothing of ours: a layer shared by twelve blocks, layers in all that NNX keeps modules in, and three to leave."""

    def __init__(self, rngs=None):
        rngs = rngs or nnx.Rngs(0)
        up = nnx.Linear(8, 12, rngs=rngs)
        self.blocks = nnx.List([Block(up, rngs) for _ in range(12)])
        self.sequence = nnx.Sequential(nnx.Linear(12, 8, use_bias=False, rngs=rngs), nnx.relu)
        self.parts = nnx.data((nnx.Linear(8, 8, rngs=rngs), {"down": nnx.Linear(8, 5, rngs=rngs), "up": [up]}))
        self.named = nnx.Dict(half=nnx.Linear(8, 8, dtype=jnp.bfloat16, rngs=rngs))
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=rngs)
        self.adapted = nnx.LoRALinear(8, 8, lora_rank=2, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = x + self.sequence(block.up(block.norm(x)))
        x = self.adapted(self.attention(self.parts[0](x)))
        return self.parts[1]["down"](x + self.named.half(x)), self.parts[1]["up"][0](x)


PATHS = [("blocks", 0, "up"), ("named", "half"), ("parts", 0), ("parts", 1, "down"), ("sequence", "layers", 0)]


def variables(model):
    return {path: variable for path, variable in nnx.iter_graph(model) if isinstance(variable, nnx.Variable)}


@pytest.mark.slow
def test_every_linear_layer_of_a_foreign_model_is_projected_in_place():
    model, old = Foreign(), Foreign()
    before = variables(model)
    projections = replace(model, lambda path, layer: type(layer) is nnx.Linear, LowRank, rank=3)
    assert [projection.path for projection in projections] == PATHS
    for projection, (kernel, layer) in zip(
        projections,
        [
            (old.blocks[0].up.kernel, model.blocks[11].up),
            (old.named["half"].kernel, model.named["half"]),
            (old.parts[0].kernel, model.parts[0]),
            (old.parts[1]["down"].kernel, model.parts[1]["down"]),
            (old.sequence.layers[0].kernel, model.sequence.layers[0]),
        ],
    ):
        u, s, v = np.linalg.svd(np.asarray(kernel[...]), full_matrices=False)
        assert type(layer) is LowRank and layer.rank == 3
        np.testing.assert_allclose(layer.to_dense(), (u[:, :3] * s[:3]) @ v[:3], atol=1e-5)  # float32
        assert relative_error([projection]) == pytest.approx(np.linalg.norm(s[3:]) / np.linalg.norm(s), rel=1e-5)
    squares = [np.sum(np.linalg.svd(old.parts[0].kernel[...], compute_uv=False)[k:] ** 2) for k in (3, 0)]
    assert relative_error(projections[2:3]) ** 2 == pytest.approx(squares[0] / squares[1], rel=1e-5)
    # One layer is still one, whatever leads to it.
    assert len({id(block.up) for block in model.blocks} | {id(model.parts[1]["up"][0])}) == 1
    assert model.sequence.layers[0].bias is None and model.named["half"].dtype == jnp.bfloat16
    assert type(model.adapted) is nnx.LoRALinear and type(model.attention.query) is nnx.LinearGeneral
    # Biases, and all that is no weight of a replaced layer, are the very same variables.
    after = variables(model)
    replaced = {(*path, "kernel") for path in PATHS}
    assert {path: after[path] is before[path] for path in before if path not in replaced} == dict.fromkeys(
        before.keys() - replaced, True
    )


@pytest.mark.slow
def test_a_replaced_model_computes_with_its_new_weights():
    """At full rank nothing changes: a forward pass through every kind of container."""
    model, x = Foreign(), jax.random.normal(jax.random.key(0), (3, 4, 8))
    expected = model(x)
    projections = replace(model, lambda path, layer: True, LowRank, rank=12)
    assert relative_error(projections) < 1e-6
    for a, b in zip(model(x), expected):
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2)  # one layer rounds to bfloat16, by up to 2^-8
    graphdef, params = nnx.split(model)
    jax.eval_shape(lambda params: nnx.merge(graphdef, params)(x), params)


@pytest.mark.slow
def test_select_is_asked_once_per_layer_with_its_first_path():
    model, asked = Foreign(), []
    replace(model, lambda path, layer: asked.append((path, type(layer))), Monarch)
    assert asked == [(path, nnx.Linear) for path in PATHS]
    projections = replace(model, lambda path, layer: "parts" in path, Monarch, blocks=2)
    assert [projection.path for projection in projections] == PATHS[2:4]
    # Structured layers are linear layers too.
    replace(model, lambda path, layer: isinstance(layer, Monarch), Dense)
    assert type(model.parts[0]) is Dense and type(model.named["half"]) is nnx.Linear


class Stacked(nnx.Module):
    def __init__(self):
        self.layers = nnx.vmap(lambda key: nnx.Linear(4, 4, rngs=nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 3))


class Tied(nnx.Module):
    def __init__(self):
        self.one, self.two = (nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(2))
        self.two.kernel = self.one.kernel


@pytest.mark.quick
@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda: nnx.Linear(4, 4, rngs=nnx.Rngs(0)), {}, "the model is itself a linear layer"),
        (Stacked, {}, r"layers is a stack of layers, its kernel has shape \(3, 4, 4\)"),
        (Tied, {}, "one shares its kernel with another module"),
        (Foreign, {"blocks": 0}, "blocks is 0"),
    ],
)
def test_what_cannot_be_replaced_is_named(make, options, words):
    with pytest.raises(ValueError, match=words):
        replace(make(), lambda path, layer: True, Monarch, **options)


class Net(nnx.Module):
    """Two layers of a structure and some that never change."""

    def __init__(self, linear=nnx.Linear, sizes=(6, 9), embed=5, seed=0, **options):
        rngs, (n, m) = nnx.Rngs(seed), sizes
        self.embed = nnx.Embed(embed, n, rngs=rngs)
        self.layers = nnx.List([linear(n, m, rngs=rngs, **options), linear(m, n, rngs=rngs, **options)])
        self.head = nnx.Linear(n, 2, rngs=rngs)
        self.head.bias[...] = jnp.full(2, seed, jnp.float32)
        for layer in self.layers:
            layer.bias[...] = jax.random.normal(rngs.params(), layer.bias.shape)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return self.head(self.layers[1](nnx.tanh(self.layers[0](x))))


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.first(2)
def test_a_structure_becomes_dense_and_dense_becomes_the_nearest_structure(name):
    square = {"sizes": (8, 8)}  # one shape, so that both layers share their programs
    source, target = Net(LINEAR[name], seed=1, **square), Net(Dense, **square)
    projections = transfer(source, target)
    assert len(projections) == (0 if name == "dense" else 2) and relative_error(projections) < 1e-6
    tokens = jnp.arange(5)
    step = getattr(LINEAR[name], "input_step", 0.0)  # inputs rounded to a step of the largest
    np.testing.assert_allclose(target(tokens), source(tokens), atol=1e-5 + step)
    back = Net(LINEAR[name], seed=2, **square)
    transfer(target, back)
    for i, layer in enumerate(back.layers):
        expected = LINEAR[name].from_dense(target.layers[i].kernel[...], target.layers[i].bias[...])
        np.testing.assert_allclose(layer.to_dense(), expected.to_dense(), atol=1e-6)
        np.testing.assert_array_equal(layer.bias[...], source.layers[i].bias[...])
    np.testing.assert_array_equal(back.embed.embedding[...], source.embed.embedding[...])
    np.testing.assert_array_equal(back.head.bias[...], np.ones(2))


def test_equal_forms_are_copied_and_other_options_projected():
    source = Net(Monarch, sizes=(8, 8), blocks=2, seed=1)
    same = Net(Monarch, sizes=(8, 8), blocks=2, dtype=jnp.bfloat16)
    assert transfer(source, same) == []
    np.testing.assert_array_equal(same.layers[0].w1[...], source.layers[0].w1[...])
    projections = transfer(source, Net(Monarch, sizes=(8, 8), blocks=4))
    assert [projection.path for projection in projections] == [("layers", 0), ("layers", 1)]
    assert 0.01 < relative_error(projections) < 1


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ({"embed": 4}, {}, r"embed.embedding is \(4, 6\) there and \(5, 6\) here"),
        ({"sizes": (6, 8)}, {"linear": LowRank}, r"layers.0: kernel has shape \(6, 8\): this layer is 6 × 9"),
        ({"linear": LowRank}, {}, "layers.0.kernel is absent there"),
    ],
)
@pytest.mark.first(1)
def test_what_differs_otherwise_is_named(source, target, words):
    with pytest.raises(ValueError, match=words):
        transfer(Net(**source), Net(**target))


@pytest.mark.quick
def test_what_only_the_source_has_is_named():
    source = Net()
    source.scale = nnx.Param(jnp.ones(3))
    with pytest.raises(ValueError, match=r"scale is \(3,\) there and absent here"):
        transfer(source, Net())
