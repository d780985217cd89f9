"""Parts of published ViTs: each is used, named in a line or refused, and none computes something else unsaid."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from efficient_tx.models.pretrained import load_pretrained
from efficient_tx.models.pretrained.positions import grid_of
from tests.support.published_vits import (
    CLASSES,
    HF,
    WIDTH,
    as_hugging_face,
    big_vision,
    close,
    draw,
    images,
    refused,
    timm_logits,
    timm_shapes,
    vit,
)  # fmt: skip

FAMILIES = {
    "timm": lambda: draw(timm_shapes(scales=True)),
    "Hugging Face": lambda: as_hugging_face(draw(timm_shapes())),
    "big_vision": lambda: big_vision("tok")[0],
}


@pytest.fixture(scope="module")
def model():
    """For files that are refused, which leaves it as it is."""
    return vit(**HF)


def parameters(model):
    return {".".join(map(str, place)) for place, x in nnx.iter_graph(model) if isinstance(x, nnx.Param)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_a_tensor_left_out_is_refused_or_named(tmp_path, family):
    """Kernels and scales of a block are refused; of all else, one line for each parameter that was not given."""
    tensors = FAMILIES[family]()
    model = vit(layer_scale=1.0 if family == "timm" else None)
    for name in tensors:
        if name.endswith(("proj.weight", "embedding/kernel", "projection.weight")) and "blocks" not in name:
            continue  # that of the patches, which identifies the family
        np.savez(tmp_path / "vit.npz", **{key: x for key, x in tensors.items() if key != name})
        start = jax.tree.map(lambda x: np.full_like(x, 7), nnx.state(model))
        nnx.update(model, start)
        try:
            lines = load_pretrained(model, tmp_path / "vit.npz")
        except ValueError as error:
            if name.endswith("cls_token"):
                assert "learned has 10 positions" in str(error)  # one is of the class token
            else:
                assert "a part of the checkpoint is missing" in str(error)
                assert name.endswith(("weight", "kernel", "scale")), name
            continue
        named = {line.split()[0] for line in lines if line.endswith(" is not there: it stays as initialised")}
        kept = {
            ".".join(map(str, place))
            for place, x in nnx.iter_graph(model)
            if isinstance(x, nnx.Param) and (x[...] == 7).all()
        }
        assert named == kept and named, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_a_tensor_more_is_refused_or_named(tmp_path, family):
    separator = "/" if family == "big_vision" else "."
    tensors = FAMILIES[family]()
    model = vit(layer_scale=1.0 if family == "timm" else None)
    for name in tensors:
        more = separator.join([*name.replace("qkv", "q").split(separator)[:-1], "more"])
        np.savez(tmp_path / "vit.npz", **tensors | {more: np.zeros(3, np.float32)})
        assert f"has {more}: this ViT has no such part" in refused(model, tmp_path / "vit.npz")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("vit.embeddings.register_tokens", "has vit.embeddings.register_tokens: a token more"),
        ("vit.embeddings.distillation_token", "has vit.embeddings.distillation_token: a token more"),
        ("vit.embeddings.detection_tokens", "has vit.embeddings.detection_tokens: a token more"),
        ("vit.norm_pre.weight", "has vit.norm_pre.weight: this ViT has no such part"),
        ("vit.encoder.layer.1.attention.attention.relative_position_bias.weight", "this ViT has no such part"),
        ("vit.layers.1.mlp.fc1.bias", "vit.layers.1.mlp.fc1.bias is there twice in "),
        (
            "vit.encoder.layer.1.layer_scale1.lambda1",
            "gives encoder.blocks.1.mixer_scale, .*the option layer_scale=1.0",
        ),
        ("vit.encoder.layer.2.norm1.bias", "has weights of 3 blocks, and here are 2"),
    ],
)
@pytest.mark.quick
def test_parts_that_this_vit_does_not_have(tmp_path, model, more, message):
    tensors = as_hugging_face(draw(timm_shapes())) | {more: np.ones(WIDTH, np.float32)}
    save_file(tensors, tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match=message):
        load_pretrained(model, tmp_path / "vit.safetensors")


@pytest.mark.quick
def test_a_file_without_weights_of_blocks(tmp_path, model):
    """As when a publisher gives the blocks names that we do not know."""
    tensors = as_hugging_face(draw(timm_shapes()))
    around = {name: x for name, x in tensors.items() if ".layer." not in name}
    path = tmp_path / "vit.safetensors"
    save_file(around, path)
    assert "has weights of 0 blocks, and here are 2" in refused(model, path)
    save_file({name.replace("encoder.layer.", "stages."): x for name, x in tensors.items()}, path)
    assert "has vit.stages.0." in refused(model, path)
    del tensors["vit.encoder.layer.1.output.dense.weight"]
    save_file(tensors, path)
    assert "encoder.blocks.1.mlp.down.kernel is not in " in refused(model, path)


@pytest.mark.quick
def test_what_pretraining_leaves_is_named(tmp_path):
    more = {
        "vit.embeddings.mask_token": (1, 1, WIDTH),
        "decoder.0.weight": (3, WIDTH),
        "vit.pooler.dense.bias": (WIDTH,),
    }
    tensors = as_hugging_face(draw(timm_shapes())) | draw(more)
    save_file(tensors, tmp_path / "vit.safetensors")
    lines = load_pretrained(vit(**HF), tmp_path / "vit.safetensors")[1:]
    names = ["decoder.0.weight", "representation.bias", "vit.embeddings.mask_token"]
    assert sorted(lines) == [f"  {name} has no place here" for name in names]
    tensors = big_vision("tok")[0]
    state = {f"opt/mu/{name}": x for name, x in tensors.items()} | {"opt/count": np.int64(3)}
    np.savez(tmp_path / "vit.npz", **{f"params/{name}": x for name, x in tensors.items()}, **state)
    lines = load_pretrained(vit(), tmp_path / "vit.npz")[1:]
    assert sorted(lines) == sorted(f"  {name} has no place here" for name in state)


@pytest.mark.slow
def test_a_head_comes_with_the_layers_in_front_of_it(tmp_path):
    """Where the model has no such layers the head is refused, unless it has other classes and is left out anyway."""
    path = tmp_path / "vit.npz"
    timm, linen = draw(timm_shapes()), big_vision("gap", representation=True)[0]
    wide = as_hugging_face(timm) | draw({"classifier.weight": (CLASSES, 2 * WIDTH)})
    for tensors, options, message in [
        (timm | {"fc_norm.weight": timm["norm.weight"]}, {}, "needs fc_norm.weight, which this ViT does not have"),
        (linen | {"MAPHead_0/probe": timm["cls_token"]}, {"pool": "mean"}, "needs MAPHead_0/probe"),
        (linen, {"pool": "mean"}, "is behind a tanh layer: the option representation=12 gives it a place"),
        (timm, {"representation": WIDTH}, "is behind no tanh layer: leave out the option representation"),
        (wide, HF, "reads 24 features, of the class token and the mean of the patches"),
    ]:  # fmt: skip
        np.savez(path, **tensors)
        assert message in refused(vit(**options), path)
        lines = load_pretrained(vit(**options, num_classes=CLASSES + 2), path)
        assert "  its head has 5 classes: the one here, of 7, stays as initialised" in lines


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu' in .*config.json: the MLP here has gelu, "),
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu' in "),
        ({"num_attention_heads": 3}, "num_attention_heads is 3 in .*config.json, and here are 2 heads"),
        ({"hidden_act": 3}, "config.json cannot be read: hidden_act is 3"),
        ({"layer_norm_eps": "1e-6"}, "config.json cannot be read: layer_norm_eps is '1e-6'"),
        ({"image_size": [12]}, "config.json cannot be read: "),
        ([], "config.json cannot be read: it is no object"),
        (None, "config.json cannot be read: "),
    ],
)
@pytest.mark.quick
def test_a_config_beside_the_file_that_says_otherwise(tmp_path, model, config, message):
    save_file(as_hugging_face(draw(timm_shapes())), tmp_path / "vit.safetensors")
    (tmp_path / "config.json").write_text("" if config is None else json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_pretrained(model, tmp_path / "vit.safetensors")


@pytest.mark.quick
def test_a_config_beside_the_file_names_the_options(tmp_path):
    save_file(as_hugging_face(draw(timm_shapes())), tmp_path / "vit.safetensors")
    config = {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "num_attention_heads": 2, "image_size": 12}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_pretrained(vit(**HF), tmp_path / "vit.safetensors")[1:] == [
        f"  Hugging Face has {option}, here it is {here}: the option {option} computes the same as there"
        for option, here in [("mlp=gelu", "gelu_erf"), ("norm_epsilon=1e-05", "1e-12")]
    ]
    assert len(load_pretrained(vit(mlp="gelu", norm_epsilon=1e-5), tmp_path / "vit.safetensors")) == 1
    lines = load_pretrained(vit(mlp="gelu", norm="rms", norm_epsilon=1e-5), tmp_path / "vit.safetensors")
    assert "Hugging Face has norm=layer, here it is rms" in lines[1]
    assert "  encoder.norm.bias has no place here" in lines
    (tmp_path / "config.json").write_text(json.dumps({"model": {"name": "vit"}, "seed": 0}))  # of a run of ours
    assert len(load_pretrained(vit(**HF), tmp_path / "vit.safetensors")) == 1


@pytest.mark.quick
def test_patches_of_another_shape_and_as_many_numbers(tmp_path, model):
    """48 numbers: 4 × 4 pixels of 3 channels, or 2 × 2 of 12."""
    tensors = draw(timm_shapes() | {"patch_embed.proj.weight": (WIDTH, 12, 2, 2)})
    save_file(tensors, tmp_path / "vit.safetensors")
    assert "patches are (2, 2, 12) in " in refused(model, tmp_path / "vit.safetensors")


@pytest.fixture
def rectangular(tmp_path):
    """A file of 3 × 5 patches and a class token: as many as 4 × 4, for which they were once taken."""
    tensors = draw(timm_shapes() | {"pos_embed": (1, 16, WIDTH)})
    save_file(tensors, tmp_path / "vit.safetensors")
    return tensors


@pytest.mark.quick
def test_rectangular_positions_of_the_same_grid(tmp_path, rectangular):
    model = vit(image_shape=(12, 20, 3), mlp="gelu_erf")
    assert len(load_pretrained(model, tmp_path / "vit.safetensors")) == 1
    np.testing.assert_array_equal(model.learned[...], rectangular["pos_embed"][0])


@pytest.mark.slow
def test_logits_of_rectangular_images(tmp_path, rectangular):
    model = vit(image_shape=(12, 20, 3), mlp="gelu_erf")
    load_pretrained(model, tmp_path / "vit.safetensors")
    close(model(images(12, 20)), timm_logits(rectangular, images(12, 20)))


@pytest.mark.parametrize(
    "config", [{"image_size": [12, 20]}, {"architecture": "vit", "pretrained_cfg": {"input_size": [3, 12, 20]}}]
)
@pytest.mark.quick
def test_rectangular_positions_onto_a_square(tmp_path, rectangular, config):
    """From 3 × 5 to 3 × 3 with the corners kept: every second column."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = vit(mlp="gelu_erf")
    lines = load_pretrained(model, tmp_path / "vit.safetensors")
    assert lines[1:] == ["  position embeddings resized from 3 × 5 to 3 × 3"]
    columns = rectangular["pos_embed"][0, 1:].reshape(3, 5, WIDTH)[:, ::2].reshape(9, WIDTH)
    np.testing.assert_allclose(model.learned[1:], columns, atol=1e-6)  # float32
    np.testing.assert_array_equal(model.learned[0], rectangular["pos_embed"][0, 0])


@pytest.mark.parametrize(
    ("length", "before", "grids", "expected"),
    [
        (225, (0, 1), [None, (14, 16)], (14, 16)),  # and a class token; or 15 × 15
        (224, (0, 1), [None, (14, 16)], (14, 16)),
        (225, (0, 1), [None, (7, 7)], (15, 15)),
        (225, (0, 1), [(14, 16), (15, 15)], (14, 16)),
        (13, (1,), [(2, 6), (3, 4)], (2, 6)),  # what the file says, though the model's grid fits it too
        (197, (0, 1), [(9, 9), (12, 12)], (14, 14)),  # what the file says does not fit
        (10, (1,), [None, (2, 5)], (3, 3)),  # with a class token, which the model's grid leaves no position for
        (10, (0,), [None, (2, 5)], (2, 5)),
    ],
)
@pytest.mark.quick
def test_the_grid_of_a_table(length, before, grids, expected):
    assert grid_of(length, before, grids) == expected


@pytest.mark.quick
def test_a_table_of_no_grid():
    for length, before in [(11, (0, 1)), (10, (0,)), (1, (1,)), (17, (0,))]:
        with pytest.raises(ValueError, match=f"learned has {length} positions: neither those of 3 × 4 patches nor"):
            grid_of(length, before, [None, (3, 4)])
