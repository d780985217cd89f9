"""Files of checkpoints: which ones are read, all shards of one as a whole, and what makes a line instead of weights."""

import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from efficient_tx.models.pretrained import SUFFIXES, load_pretrained
from tests.support.published_vits import (
    TORCH,
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


@pytest.fixture(scope="module")
def model():
    """For files that are refused, which leaves it as it is."""
    return vit()


def save(tensors, path):
    np.savez(path, **tensors) if path.suffix == ".npz" else save_file(tensors, path)


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.slow
def test_floats_become_float32(tmp_path, suffix, dtype):
    tensors = {name: x.astype(jnp.dtype(dtype)) for name, x in draw(timm_shapes()).items()}
    save(tensors, tmp_path / f"vit.{suffix}")
    model = vit(**TORCH)
    load_pretrained(model, tmp_path / f"vit.{suffix}")
    assert model.head.kernel.dtype == jnp.float32
    rounded = {name: np.asarray(x, np.float32) for name, x in tensors.items()}
    close(model(images()), timm_logits(rounded, images()))


NUMBERS = {
    "nan": np.array([np.nan] + 11 * [0], np.float32),
    "inf": np.array(2 * [np.inf] + 10 * [0], np.float16),
    "too large": np.array([1e300] + 11 * [0]),
    "complex64": np.zeros(WIDTH, np.complex64),
    "bool": np.zeros(WIDTH, bool),
    "int8": np.zeros(WIDTH, np.int8),
    "int64": np.zeros(WIDTH, np.int64),
}


@pytest.mark.parametrize("suffix", ["safetensors", pytest.param("npz", marks=pytest.mark.slow)])
def test_other_numbers_are_no_weights(tmp_path, model, suffix):
    path = tmp_path / f"vit.{suffix}"
    for kind, x in NUMBERS.items():
        save(draw(timm_shapes()) | {"blocks.1.norm2.bias": x}, path)
        line = refused(model, path)
        if kind in ("nan", "inf", "too large"):
            count = 2 if kind == "inf" else 1
            assert line == f"blocks.1.norm2.bias has {count} of 12 numbers in {path} that are not finite in float32"
        else:
            weights = "weights are float64, float32, float16, bfloat16"
            assert line == f"blocks.1.norm2.bias is {kind} in {path}: {weights}"


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4"])
@pytest.mark.quick
def test_floats_that_numpy_does_not_have(tmp_path, model, dtype):
    """Quantised files, by the format's own layout: the length of the header, the header, the data."""
    header = json.dumps({"head.weight": {"dtype": dtype, "shape": [2], "data_offsets": [0, 1 if dtype == "F4" else 2]}})
    content = len(header).to_bytes(8, "little") + header.encode() + bytes(1 if dtype == "F4" else 2)
    (tmp_path / "vit.safetensors").write_bytes(content)
    assert f"head.weight is {dtype}: weights are float64" in refused(model, tmp_path / "vit.safetensors")


@pytest.mark.quick
def test_text_and_bytes_are_no_weights(tmp_path, model):
    for x in (np.array(12 * ["0"]), np.array(12 * [b"0"]), np.zeros(12, "datetime64[s]"), np.zeros(12, "V1")):
        np.savez(tmp_path / "vit.npz", **draw(timm_shapes()) | {"norm.bias": x})
        assert f"norm.bias is {x.dtype} in " in refused(model, tmp_path / "vit.npz")


@pytest.mark.quick
def test_scalars_and_vectors_in_the_place_of_more_axes(tmp_path, model):
    for name, wrong, axes in [
        ("blocks.1.mlp.fc1.weight", np.ones((), np.float32), 2),
        ("patch_embed.proj.weight", np.ones((WIDTH, 48), np.float32), 4),
        ("pos_embed", np.ones(10, np.float32), 3),
        ("norm.weight", np.ones((1, WIDTH), np.float32), 1),
    ]:
        save_file(draw(timm_shapes()) | {name: wrong}, tmp_path / "vit.safetensors")
        line = refused(model, tmp_path / "vit.safetensors")
        assert line.startswith(f"{name} has the shape {wrong.shape} in ")
        assert line.endswith(f"it should have {axes} axes")


@pytest.mark.slow
def test_every_tensor_has_its_number_of_axes(tmp_path, model):
    """Numbers, empty arrays and more axes than there are, in the place of each tensor of a block and around it."""
    path = tmp_path / "vit.npz"
    for tensors in (draw(timm_shapes()), big_vision("tok")[0]):
        for name, x in tensors.items():
            if "blocks.0." in name or "encoderblock_0" in name:  # as the second block
                continue
            for wrong in (np.float32(1), x[None], x[..., :0]):
                np.savez(path, **tensors | {name: wrong})
                line = refused(model, path)
                assert name.removesuffix("kv.weight").removesuffix("kv.bias") in line
                assert "axes" in line or "is empty" in line or "3 parts" in line


def shards(tensors, folder, name="model"):
    """The tensors in two files and their index, as transformers saves them; returns its path."""
    names = list(tensors)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    places = {}
    for i, part in enumerate(parts, start=1):
        file = f"{name}-0000{i}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = folder / f"{name}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def test_shards_are_read_as_one(tmp_path):
    tensors = draw(timm_shapes())
    index = shards(as_hugging_face(tensors), tmp_path)
    assert str(index).endswith(SUFFIXES)  # by which train.py knows a file from a run
    save_file(as_hugging_face(tensors), tmp_path / "whole.safetensors")
    model, other = (vit(mlp="gelu_erf", norm_epsilon=1e-12) for _ in range(2))
    load_pretrained(model, tmp_path / "whole.safetensors")
    for path in (index, tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00002-of-00002.safetensors"):
        nnx.update(other, jax.tree.map(jnp.zeros_like, nnx.state(other)))
        assert load_pretrained(other, path) == [f"parameters of {path}, a checkpoint of Hugging Face"]
        jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(other))


@pytest.mark.quick
def test_shards_without_the_others(tmp_path, model):
    index = shards(as_hugging_face(draw(timm_shapes())), tmp_path)
    first, second = (tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    places, content = json.loads(index.read_text())["weight_map"], second.read_bytes()
    name = next(iter(places))

    second.unlink()
    for path in (first, index):
        assert refused(model, path) == f"{index} names {second.name}, which is not beside it"
    index.unlink()
    lone = f"{first} is one of 2 shards: model.safetensors.index.json, which names them, is not beside it"
    assert refused(model, first) == lone
    second.write_bytes(content)
    assert refused(model, first) == lone

    for changed, message in [
        ({"vit.more": first.name}, f"{index} and {first.name} differ: only one of them has vit.more"),
        ({name: second.name}, f"{index} and {first.name} differ: only one of them has {name}"),
        ({"vit.more": "../vit.safetensors"}, f"{index} cannot be read: Invalid name '../vit.safetensors'"),
        ({"vit.more": 3}, f"{index} cannot be read: "),
        (dict.fromkeys(places, first.name), f"{second} is no shard of {index.name} beside it"),
    ]:
        index.write_text(json.dumps({"weight_map": places | changed}))
        assert message in refused(model, second)
    for text in ("", "[]", "{}", '{"weight_map": []}'):
        index.write_text(text)
        assert f"{index} cannot be read: " in refused(model, first)


@pytest.mark.quick
def test_one_shard_under_another_name_lacks_blocks(tmp_path, model):
    tensors = as_hugging_face(draw(timm_shapes()))
    save_file({name: x for name, x in tensors.items() if "layer.1." not in name}, tmp_path / "vit.safetensors")
    assert "has weights of 1 blocks, and here are 2" in refused(model, tmp_path / "vit.safetensors")


@pytest.mark.parametrize("name", ["vit.npz", "vit.safetensors"])
def test_files_that_are_none(tmp_path, model, name):
    assert refused(model, tmp_path / name) == f"there is no file {tmp_path / name}"
    np.save(tmp_path / "array.npy", np.zeros(3))
    array = (tmp_path / "array.npy").read_bytes()
    for content in (b"", b"PK\x03\x04 and then nothing", b"\xff" * 100, b"\x80\x04.", array, bytes(8)):
        (tmp_path / name).write_bytes(content)
        assert f"{name} cannot be read: " in refused(model, tmp_path / name)


@pytest.mark.quick
def test_a_damaged_archive_is_one_line(tmp_path, model):
    path = tmp_path / "vit.npz"
    np.savez_compressed(path, **{"cls": np.arange(1000.0)})
    whole = path.read_bytes()
    start = whole.index(b"cls.npy") + len("cls.npy")
    method = whole.rindex(b"PK\x01\x02") + 10  # of compression, in the directory at the end
    for damaged in (
        whole[: start + 40] + b"\xff" * 20 + whole[start + 60 :],
        whole[:method] + b"\x63" + whole[method + 1 :],
    ):
        path.write_bytes(damaged)
        assert "vit.npz cannot be read: " in refused(model, path)


@pytest.mark.quick
def test_pickled_arrays_are_not_opened(tmp_path, model):
    np.savez(tmp_path / "vit.npz", cls=np.array([{}], object))
    line = refused(model, tmp_path / "vit.npz")
    assert "cannot be read: " in line and "allow_pickle" in line


@pytest.mark.quick
def test_files_without_tensors(tmp_path, model):
    for name in ("vit.npz", "vit.safetensors"):
        save({}, tmp_path / name)
        assert refused(model, tmp_path / name) == f"{tmp_path / name} has no tensors"
    with zipfile.ZipFile(tmp_path / "vit.npz", "w") as archive:
        archive.writestr("notes.txt", "no array")
    assert "vit.npz cannot be read: notes.txt is no array" in refused(model, tmp_path / "vit.npz")


@pytest.mark.slow
def test_damage_anywhere_is_one_line(tmp_path):
    """Bytes changed and files cut at random places: a ValueError, if the damage can be seen at all."""
    model, rng = vit(**TORCH), np.random.default_rng(0)
    for i in range(300):
        path = tmp_path / ("vit.npz" if i % 2 else "vit.safetensors")
        save(draw(timm_shapes()), path)
        content = bytearray(path.read_bytes())
        if i % 3:
            for place in rng.integers(min(len(content), 4000), size=3) * (-1) ** i:  # headers are at either end
                content[place] ^= int(rng.integers(1, 256))
        else:
            del content[rng.integers(len(content)) :]
        path.write_bytes(content)
        try:
            load_pretrained(model, path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
