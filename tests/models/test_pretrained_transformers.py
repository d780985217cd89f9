"""transformers' own models, with drawn weights, onto ours: equal logits or tokens, from both layouts of their names."""

import numpy as np
import pytest

from efficient_tx.models.pretrained import load_pretrained
from tests.support.packages import installed
from tests.support.published_vits import CLASSES, HEADS, HF, HIDDEN, LAYERS, PATCH, SIDE, WIDTH, close, images, vit

pytestmark = [pytest.mark.slow, pytest.mark.torch]

SIZES = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "image_size": SIDE,
    "patch_size": PATCH,
}  # fmt: skip
VIT = SIZES | {"intermediate_size": HIDDEN, "num_labels": CLASSES}
DINO = SIZES | {"mlp_ratio": 2}
DINOV2 = {"mlp": "gelu_erf", "layer_scale": 1.0, "mlp_features": 2 * WIDTH}
NO_HEAD = [f"  head.{leaf} is not there: it stays as initialised" for leaf in ("bias", "kernel")]
MASK = ["  embeddings.mask_token has no place here"]


def published(name, sizes, folder, *, height=SIDE, width=SIDE):
    """Writes a model of transformers, under both layouts of names, to two folders; returns its output for `images`."""
    transformers, torch, safetensors = (installed(name) for name in ("transformers", "torch", "safetensors.torch"))
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    reference = kind(kind.config_class(**sizes)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
        out = reference(pixel_values=torch.from_numpy(images(height, width)).permute(0, 3, 1, 2))
    for layout in ("save_pretrained", "state_dict"):
        reference.save_pretrained(folder / layout)
    file = folder / "state_dict" / "model.safetensors"
    before = file.read_bytes()
    safetensors.save_file(reference.state_dict(), file)
    assert file.read_bytes() != before  # since transformers 5
    return (out.logits if "logits" in out else out.last_hidden_state).numpy()


@pytest.mark.parametrize(
    ("name", "sizes", "options", "lines"),
    [
        ("ViTForImageClassification", VIT, HF, []),
        ("ViTForImageClassification", VIT | {"hidden_act": "gelu_new"}, HF | {"mlp": "gelu"}, []),
        ("ViTModel", VIT, HF | {"representation": WIDTH}, NO_HEAD),
        ("ViTMSNForImageClassification", VIT, HF | {"norm_epsilon": 1e-6}, []),
        ("IJepaForImageClassification", VIT, HF | {"pool": "mean"}, []),
        ("Dinov2Model", DINO, DINOV2, NO_HEAD + MASK),
        # 2/3 · 24, and in the file a multiple of 8 of that: 16
        ("Dinov2Model", DINO | {"use_swiglu_ffn": True}, DINOV2 | {"mlp": "swiglu"}, NO_HEAD + MASK),
    ],
)
def test_logits_or_tokens_are_those_of_transformers(tmp_path, name, sizes, options, lines):
    expected = published(name, sizes, tmp_path)
    for layout in ("save_pretrained", "state_dict"):
        model = vit(**options)
        assert load_pretrained(model, tmp_path / layout / "model.safetensors")[1:] == lines
        close(model.encode(images()) if expected.ndim == 3 else model(images()), expected)


def test_a_rectangular_image(tmp_path):
    """3 × 5 patches and a class token, as many positions as 4 × 4."""
    sizes = VIT | {"image_size": (12, 20)}
    expected = published("ViTForImageClassification", sizes, tmp_path, height=12, width=20)
    for layout in ("save_pretrained", "state_dict"):
        model = vit(**HF, image_shape=(12, 20, 3))
        assert len(load_pretrained(model, tmp_path / layout / "model.safetensors")) == 1
        close(model(images(12, 20)), expected)


def test_shards_as_transformers_saves_them(tmp_path):
    transformers = installed("transformers")
    reference = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT))
    reference.save_pretrained(tmp_path / "whole")
    reference.save_pretrained(tmp_path / "shards", max_shard_size=3000)
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2
    whole, parts = vit(**HF), vit(**HF)
    load_pretrained(whole, tmp_path / "whole" / "model.safetensors")
    for name in ("model.safetensors.index.json", files[1]):
        assert len(load_pretrained(parts, tmp_path / "shards" / name)) == 1
        np.testing.assert_array_equal(parts(images()), whole(images()))


@pytest.mark.parametrize(
    ("name", "sizes", "options", "message"),
    [
        ("ViTForImageClassification", VIT | {"hidden_act": "relu"}, HF, "hidden_act is 'relu'"),
        ("ViTForImageClassification", VIT | {"hidden_act": "quick_gelu"}, HF, "hidden_act is 'quick_gelu'"),
        ("ViTForImageClassification", VIT | {"num_attention_heads": 3}, HF, "num_attention_heads is 3"),
        ("DeiTForImageClassification", VIT, HF, "deit.embeddings.distillation_token"),
        ("Dinov2WithRegistersModel", DINO, DINOV2, "embeddings.register_tokens: a token more"),
        ("Dinov2ForImageClassification", DINO | {"num_labels": CLASSES}, DINOV2, "reads 24 features"),
        ("Dinov2Model", DINO, DINOV2 | {"layer_scale": None}, "the option layer_scale=1.0"),
        ("Dinov2Model", DINO | {"use_swiglu_ffn": True}, DINOV2, "the option mlp=swiglu"),
        ("BeitForImageClassification", VIT, HF, "is no checkpoint of a ViT"),
        ("CLIPVisionModel", VIT, HF, "is no checkpoint of a ViT"),
    ],
)
def test_what_this_vit_cannot_compute_is_refused(tmp_path, name, sizes, options, message):
    transformers = installed("transformers")
    kind = getattr(transformers, name)
    kind(kind.config_class(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_pretrained(vit(**options), tmp_path / "model.safetensors")
