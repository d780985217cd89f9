"""transformers' own models onto ours: equal logits or tokens, of drawn weights and of MiniLM's own."""

import numpy as np
import pytest

from efficient_tx.data.wordpiece import WordPiece
from efficient_tx.models.pretrained import load_pretrained, pretrained_bert
from tests.support.fetched import fetched
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


BERT = {
    "vocab_size": 30, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20,
    "max_position_embeddings": 10, "initializer_range": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", ["BertModel", "BertForSequenceClassification", "BertForMaskedLM"])
@pytest.mark.parametrize("more", [{}, {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}], ids=["", "other options"])
def test_hidden_states_of_texts_with_padding_are_those_of_transformers(tmp_path, name, more):
    transformers, torch = (installed(name) for name in ("transformers", "torch"))
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    reference = kind(kind.config_class(**BERT, **more)).eval()
    generator = np.random.default_rng(0)
    ids, segments = generator.integers(0, 30, (3, 7)), generator.integers(0, 2, (3, 7))
    mask = np.arange(7) < np.array([[7], [4], [2]])
    given = {"input_ids": ids, "token_type_ids": segments, "attention_mask": mask.astype(int)}
    with torch.no_grad():
        encoder = reference if name == "BertModel" else reference.bert
        expected = encoder(**{key: torch.from_numpy(x) for key, x in given.items()}).last_hidden_state.numpy()
    reference.save_pretrained(tmp_path)
    x, _ = pretrained_bert(tmp_path).encode(ids.astype(np.int32), mask, None, segments=segments.astype(np.int32))
    close(np.asarray(x)[mask], expected[mask])


SENTENCES = [
    "A cat sits on the mat.", "Déjà vu in Zürich: 3.14 €, unaffable; 東京 \U0001f600", "", "Stocks fell. " * 100,
    "  The quick\tbrown fox\njumps over the lazy dog  ",
]  # fmt: skip


def test_minilm_gives_the_ids_and_embeddings_of_transformers():
    transformers, torch = (installed(name) for name in ("transformers", "torch"))
    folder = fetched("minilm") / "minilm"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(SENTENCES, padding=True, truncation=True, max_length=128, return_tensors="pt")
    for file in ("tokenizer.json", "vocab.txt"):
        inputs, mask = WordPiece(folder / file, max_len=128).batch(SENTENCES)
        np.testing.assert_array_equal(inputs, given["input_ids"])
        np.testing.assert_array_equal(mask, given["attention_mask"])
    with torch.no_grad():
        states = transformers.AutoModel.from_pretrained(folder).eval()(**given).last_hidden_state
    real = given["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((states * real).sum(1) / real.sum(1)).numpy()
    model = pretrained_bert(folder)
    close(np.asarray(model.encode(inputs, mask, None)[0])[mask], states.numpy()[mask])
    np.testing.assert_allclose(model.embed(inputs, mask=mask), expected, atol=1e-5)  # a hundredth of a feature
