"""Weights as safetensors: stable names, what is read back, and the line on what does not fit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from efficient_tx.attention import S4D, Softmax
from efficient_tx.linear import Dense, Monarch, Ternary
from efficient_tx.models import Classifier
from efficient_tx.models.weights import load_weights, save_weights

pytestmark = pytest.mark.quick


def model(seed=0, linear=Dense, mixer=Softmax, **sizes):
    given = {
        "num_classes": 3,
        "vocab_size": 9,
        "max_len": 8,
        "features": 8,
        "layers": 1,
        "heads": 2,
        "mlp_features": 12,
    }
    return Classifier(mixers=[mixer], linear=linear, rngs=nnx.Rngs(seed), **given | sizes)


def arrays(made):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(made)))


def test_names_are_paths_and_stay_so(tmp_path):
    """Other people's scripts read them: a name that changes breaks their files."""
    save_weights(model(), tmp_path / "a.safetensors", about={"from": "a test"})
    block = "encoder.blocks.0"
    assert {name: x.shape for name, x in load_file(tmp_path / "a.safetensors").items()} == {
        "embedding.tokens": (9, 8), "embedding.learned": (8, 8), "encoder.norm.scale": (8,), "encoder.norm.bias": (8,),
        "head.layers.0.kernel": (8, 12), "head.layers.0.bias": (12,),
        "head.layers.2.kernel": (12, 3), "head.layers.2.bias": (3,),
        **{f"{block}.{norm}_norm.{part}": (8,) for norm in ("mixer", "mlp") for part in ("scale", "bias")},
        **{f"{block}.mixer.{name}.kernel": (8, 8) for name in ("q", "k", "v", "out")},
        **{f"{block}.mixer.{name}.bias": (8,) for name in ("q", "k", "v", "out")},
        f"{block}.mlp.up.kernel": (8, 12), f"{block}.mlp.up.bias": (12,),
        f"{block}.mlp.down.kernel": (12, 8), f"{block}.mlp.down.bias": (8,),
    }  # fmt: skip
    with safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["from"]) == "a test"


@pytest.mark.parametrize("options", [{}, {"linear": Monarch}, {"linear": Ternary}, {"mixer": S4D}])
def test_what_is_saved_is_read_back(options, tmp_path):
    saved, path = model(**options), tmp_path / "a.safetensors"
    save_weights(saved, path)
    for read in (model(1, **options), nnx.eval_shape(lambda: model(1, **options))):
        load_weights(read, path)
        jax.tree.map(np.testing.assert_array_equal, arrays(read), arrays(saved))


def test_a_packed_layer_and_a_random_stream(tmp_path):
    """Codes are whole numbers and stay so; the state of a stream is no weight."""

    class Mine(nnx.Module):
        def __init__(self, seed):
            self.layer = Ternary(8, 4, rngs=nnx.Rngs(seed)).pack()
            self.noise = nnx.Rngs(seed)

    path, one, other = tmp_path / "a.safetensors", Mine(0), Mine(1)
    save_weights(one, path, dtype="bfloat16")
    found = load_file(path)
    assert not [name for name in found if name.startswith("noise")] and found["layer.codes"].dtype == np.uint8
    load_weights(other, path)
    np.testing.assert_array_equal(other.layer.codes[...], one.layer.codes[...])


def test_bfloat16_is_the_nearest_and_comes_back_as_float32(tmp_path):
    saved, read, path = model(), model(1), tmp_path / "a.safetensors"
    save_weights(saved, path, dtype="bfloat16")
    load_weights(read, path)
    for ours, theirs in zip(jax.tree.leaves(arrays(read)), jax.tree.leaves(arrays(saved))):
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, theirs.astype(jnp.bfloat16).astype(np.float32))


def test_what_is_transposed_in_memory_is_saved_as_it_is(tmp_path):
    made, path = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), tmp_path / "a.safetensors"
    kernel = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(3, 2))
    made.kernel.set_value(kernel)
    save_weights(made, path)
    np.testing.assert_array_equal(load_file(path)["kernel"], kernel)


def test_what_does_not_fit_is_one_line_and_changes_nothing(tmp_path):
    path, read = tmp_path / "a.safetensors", model(1)
    before = arrays(read)
    save_weights(model(), path)
    good = load_file(path)
    bias, kernel = "head.layers.2.bias", "head.layers.2.kernel"
    for changed, line in [
        ({name: x for name, x in good.items() if name != bias}, r"does not fit: it has no head.layers.2.bias$"),
        (good | {"more.bias": good[bias]}, "does not fit: it has more.bias, for which there is no place here$"),
        (good | {kernel: good[kernel].T}, r"2.kernel is float32\[3, 12\] in it and float32\[12, 3\] here$"),
        (good | {bias: np.ones(3, np.int32)}, r"2.bias is int32\[3\] in it and float32\[3\] here$"),
        (good | {bias: np.full(3, np.nan, np.float32)}, r"2.bias has numbers that are not finite$"),
        ({"x": good[bias]}, r"it has no .*; it has no .*; it has no .*; and 22 more$"),
    ]:
        save_file({name: np.ascontiguousarray(x) for name, x in changed.items()}, path)
        with pytest.raises(ValueError, match=line) as error:
            load_weights(read, path)
        assert "\n" not in str(error.value) and str(error.value).startswith(str(path))
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be read"):
        load_weights(read, path)
    with pytest.raises(ValueError, match="there is no file"):
        load_weights(read, tmp_path / "b.safetensors")
    jax.tree.map(np.testing.assert_array_equal, arrays(read), before)


def test_what_cannot_be_saved_is_one_line_and_the_old_file_stays(tmp_path, monkeypatch):
    path, made = tmp_path / "a.safetensors", model()
    save_weights(made, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"a.npz does not end in .safetensors"):
        save_weights(made, tmp_path / "a.npz")
    with pytest.raises(ValueError, match="dtype is 'float16': choose one of float32, bfloat16"):
        save_weights(made, path, dtype="float16")
    made.head.layers[2].bias.set_value(jnp.array([1, jnp.inf, 0]))
    with pytest.raises(ValueError, match=r"head.layers.2.bias is not finite in float32"):
        save_weights(made, path)
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]
    monkeypatch.setattr("efficient_tx.models.weights.write", lambda path, content: path.write_bytes(content[1:]))
    with pytest.raises(OSError, match="comes back with other bytes than were written"):
        save_weights(model(), path)
