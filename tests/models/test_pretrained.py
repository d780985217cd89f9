"""Published checkpoints onto our ViT: logits of the authors' formulas, written from each file's own tensors."""

import textwrap

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import efficient_tx.train
from efficient_tx.attention import Fourier, Soft
from efficient_tx.models.pretrained import load_pretrained
from tests.support.command import here
from tests.support.published_vits import (
    HF,
    PATCH,
    TORCH,
    WIDTH,
    as_augreg,
    as_hugging_face,
    big_vision,
    close,
    draw,
    images,
    timm_logits,
    timm_shapes,
    vit,
)  # fmt: skip

# What timm 1.0.31 and transformers 5.23.0 (torch 2.14) print for the first image of these very files, with and without
# LayerScale; both take all of the tensors under the names that stand here.
PRINTED = {
    False: [-0.74134, -0.38404, -1.5601, -1.81322, 0.40872],
    True: [1.12238, -0.04332, 2.0957, 1.55758, -1.22409],
}


@pytest.mark.quick
def test_the_formula_is_the_libraries():
    for scales, expected in PRINTED.items():
        logits = timm_logits(draw(timm_shapes(scales)), images())
        np.testing.assert_allclose(logits[0], expected, atol=1e-5)  # five decimals


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.slow
def test_timm(tmp_path, scales):
    tensors = draw(timm_shapes(scales))
    save_file(tensors, tmp_path / "deit.safetensors")
    model = vit(**TORCH, layer_scale=1.0 if scales else None)
    (line,) = load_pretrained(model, tmp_path / "deit.safetensors")
    assert line == f"parameters of {tmp_path}/deit.safetensors, a checkpoint of timm"
    close(model(images()), timm_logits(tensors, images()))


@pytest.mark.slow
def test_hugging_face(tmp_path):
    tensors = draw(timm_shapes())
    save_file(as_hugging_face(tensors), tmp_path / "vit.safetensors")
    model = vit(**HF)
    assert len(load_pretrained(model, tmp_path / "vit.safetensors")) == 1
    close(model(images()), timm_logits(tensors, images(), epsilon=1e-12))


@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/"])
@pytest.mark.first(1)
def test_big_vision(tmp_path, prefix):
    tensors, expected = big_vision("gap", representation=True)
    np.savez(tmp_path / "vit.npz", **{prefix + name: x for name, x in tensors.items()})
    model = vit(pool="mean", representation=WIDTH)
    assert len(load_pretrained(model, tmp_path / "vit.npz")) == 1
    close(model(images()), expected)


@pytest.mark.slow
def test_big_vision_scanned(tmp_path):
    """One array over all blocks for each of a block's, as flax's own scan over the depth makes it."""
    tensors, expected = big_vision("tok", scan=True)
    assert "Transformer/encoderblock/LayerNorm_0/scale" in tensors
    np.savez(tmp_path / "vit.npz", **tensors)
    model = vit()
    assert len(load_pretrained(model, tmp_path / "vit.npz")) == 1
    close(model(images()), expected)


@pytest.mark.slow
def test_stacked_blocks_are_the_same_blocks(tmp_path):
    tensors, _ = big_vision("tok")
    np.savez(tmp_path / "loop.npz", **tensors)
    blocks = {name: x for name, x in tensors.items() if "encoderblock_" in name}
    scan = {name: x for name, x in tensors.items() if name not in blocks}
    for name in blocks:
        stacked = name.replace("encoderblock_1", "encoderblock_0")
        both = [tensors[stacked], tensors[stacked.replace("encoderblock_0", "encoderblock_1")]]
        scan[stacked.replace("encoderblock_0", "encoderblock")] = np.stack(both)
    np.savez(tmp_path / "scan.npz", **scan)
    loop, model = vit(), vit()
    for file, target in (("loop.npz", loop), ("scan.npz", model)):
        assert len(load_pretrained(target, tmp_path / file)) == 1
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loop), nnx.state(model))


@pytest.mark.parametrize("rename", [dict, as_augreg])
@pytest.mark.slow
def test_class_tokens_with_and_without_a_position(tmp_path, rename):
    tensors, expected = big_vision("tok")
    np.savez(tmp_path / "vit.npz", **rename(tensors))
    model = vit()
    assert len(load_pretrained(model, tmp_path / "vit.npz")) == 1
    close(model(images()), expected)


@pytest.mark.parametrize("side", [8, 20])
def test_positions_of_another_grid_are_resized(tmp_path, side):
    """From 3 × 3 patches to 2 × 2, the corners, and to 5 × 5, where every second point is an old one."""
    tensors, _ = big_vision("tok")
    np.savez(tmp_path / "vit.npz", **tensors)
    model = vit(image_shape=(side, side, 3))
    count = side // PATCH
    lines = load_pretrained(model, tmp_path / "vit.npz")
    assert lines[1:] == [f"  position embeddings resized from 3 × 3 to {count} × {count}"]
    table, old = np.asarray(model.learned[...]), tensors["pos_embedding"].reshape(3, 3, WIDTH)
    np.testing.assert_array_equal(table[0], 0)
    grid = table[1:].reshape(count, count, WIDTH)
    for i in range(count):
        for j in range(count):
            y, x = 2 * i / (count - 1), 2 * j / (count - 1)
            top, left = min(int(y), 1), min(int(x), 1)
            rows = [(1 - x + left) * old[row, left] + (x - left) * old[row, left + 1] for row in (top, top + 1)]
            expected = (1 - y + top) * rows[0] + (y - top) * rows[1]
            np.testing.assert_allclose(grid[i, j], expected, atol=1e-6)


@pytest.mark.quick
def test_what_does_not_fit_is_told(tmp_path):
    """Another head, another pooling, mixers with fewer projections, and options that compute something else."""
    tensors = draw(timm_shapes()) | {"fc_norm.weight": np.ones(WIDTH, np.float32)}
    del tensors["norm.bias"]
    save_file(tensors, tmp_path / "vit.safetensors")
    model = vit([Soft, Fourier], num_classes=7, pool="mean")
    before = np.asarray(model.head.bias[...])
    mixer = "encoder.blocks.{}.mixer.{}.{}"
    nowhere = [mixer.format(0, "k", leaf) for leaf in ("bias", "kernel")]
    nowhere += [mixer.format(1, name, leaf) for name in ("out", "q", "k", "v") for leaf in ("bias", "kernel")]
    lines = load_pretrained(model, tmp_path / "vit.safetensors")[1:]
    assert sorted(lines) == sorted([
        "  timm has mlp=gelu_erf, here it is gelu: the option mlp=gelu_erf computes the same as there",
        "  its head has 5 classes: the one here, of 7, stays as initialised",
        "  encoder.norm.bias is not there: it stays as initialised",
        "  fc_norm.weight has no place here",
        *(f"  {name} has no place here" for name in ["cls", *nowhere]),
    ])  # fmt: skip
    np.testing.assert_array_equal(model.head.bias[...], before)
    np.testing.assert_array_equal(model.learned[...], tensors["pos_embed"][0, 1:])
    kernel = np.split(tensors["blocks.0.attn.qkv.weight"], 3)[2].T
    np.testing.assert_array_equal(model.encoder.blocks[0].mixer.v.kernel[...], kernel)


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, {"dist_token": (1, 1, WIDTH)}, "has dist_token: .*distilled DeiT"),
        ({}, {"reg_token": (1, 4, WIDTH)}, "has reg_token"),
        ({}, {"pos_embed": (1, 11, WIDTH)}, "learned has 11 positions"),
        ({"patch_size": 6}, {}, r"embedding.kernel is \(48, 12\) in .* and \(108, 12\) here$"),
        ({"mlp_features": 21}, {}, r"\(20,\) in .* and \(21,\) here; 5 others differ too"),
        ({}, {"patch_embed.proj.weight": None}, "is no checkpoint of a ViT.*patch_embed.proj.weight"),
    ],
)
def test_refusals_change_nothing(tmp_path, options, change, message):
    shapes = {name: shape for name, shape in (timm_shapes() | change).items() if shape}
    save_file(draw(shapes), tmp_path / "vit.safetensors")
    model = vit(**options)
    before = jax.tree.map(np.asarray, nnx.state(model))
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(model, tmp_path / "vit.safetensors")
    assert "\n" not in str(error.value)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))


def test_other_heads_are_refused_where_the_file_says_them(tmp_path):
    np.savez(tmp_path / "vit.npz", **big_vision("tok")[0])
    with pytest.raises(ValueError, match=r"query/kernel has 2 heads in .* and 3 here"):
        load_pretrained(vit(heads=3), tmp_path / "vit.npz")


TASK = """
    import numpy as np
    from efficient_tx.task import Task
    KIND = "image"
    def sizes(**_):
        return {"num_classes": 3, "vocab_size": None, "max_len": 144, "image_shape": (12, 12, 3)}
    def get_task(*, data_dir: str | None = None):
        some = [{"inputs": np.full((12, 12, 3), i / 8, np.float32), "label": i % 3} for i in range(8)]
        return Task(some, some, some, kind=KIND, name="grey", source="drawn", **sizes())
"""
CONFIG = """
    from efficient_tx.config import make_config
    def get_config(argument=""):
        model = {"name": "NAME", "patch_size": 4, "features": 12, "layers": 2, "heads": 2, "mlp_features": 20}
        model = model if "NAME" == "vit" else {"name": "NAME"}
        return make_config("grey", argument, steps=1, batch_size=4, model=model)
"""


def train(folder, name, *arguments):
    (folder / "grey.py").write_text(textwrap.dedent(TASK))
    (folder / f"{name}.py").write_text(textwrap.dedent(CONFIG.replace("NAME", name)))
    return here(efficient_tx.train.command, *arguments)


@pytest.mark.slow
def test_a_run_starts_from_a_file(tmp_path, monkeypatch):
    """With structured MLPs: dense weights of the file, projected."""
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "vit.safetensors"
    save_file(as_hugging_face(draw(timm_shapes())), path)
    status, out, error = train(
        tmp_path, "vit", f"--config={tmp_path}/vit.py:softmax+monarch", f"--workdir={tmp_path}/run",
        f"--config.init_from={path}", "--config.model.mlp=gelu_erf",
    )  # fmt: skip
    assert (status, error) == (0, "")
    for line in (
        f"parameters of {path}, a checkpoint of Hugging Face",
        "  Hugging Face has norm_epsilon=1e-12, here it is 1e-06: the option norm_epsilon=1e-12 computes",
        "  its head has 5 classes: the one here, of 3, stays as initialised",
        "  encoder.blocks.1.mlp.up projected, relative error 0.",
        "  all 4 projected layers, relative error 0.",
    ):
        assert line in out
    for name, words in [("vit", "there is no file"), ("pyramid", "of a bert for texts, here is pyramid")]:
        missing = tmp_path / "nothing.npz"
        status, out, error = train(
            tmp_path, name, f"--config={tmp_path}/{name}.py", f"--workdir={tmp_path}/{name}",
            f"--config.init_from={missing}",
        )  # fmt: skip
        assert (status, out) == (2, "")
        assert error.startswith(f"--config.init_from={missing}: ") and words in error and error.count("\n") == 1
