"""Bert: published checkpoints give the formula's hidden states and embeddings, or one line that says why not."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from efficient_tx.attention import Skyformer, Softmax
from efficient_tx.models import Block, Classifier, Encoder
from efficient_tx.models.pretrained import is_published, load_pretrained, pretrained_bert
from tests.support import published_berts as published

IDS, SEGMENTS, MASK = published.texts()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return published.save(tmp_path_factory.mktemp("published") / "bert")


@pytest.fixture(scope="module")
def model(folder):
    return pretrained_bert(folder)


@pytest.fixture
def other():
    """A model of the sizes in the file, with a head."""
    return published.bert(rngs=nnx.Rngs(1))


def expected(segments=SEGMENTS):
    """The hidden states of each text without its padding."""
    return [published.hidden(published.tensors(), ids[mask], s[mask]) for ids, s, mask in zip(IDS, segments, MASK)]


@pytest.mark.quick
def test_hidden_states_are_the_formulas(model):
    x, _ = model.encode(IDS, MASK, None, segments=SEGMENTS)
    for row, mask, states in zip(np.asarray(x), MASK, expected()):
        np.testing.assert_allclose(row[mask], states, atol=1e-5)  # float32, states of order 1


@pytest.mark.quick
def test_embeddings_are_the_unit_means_over_real_tokens(model):
    embeddings = np.asarray(model.embed(IDS, mask=MASK))
    for row, states in zip(embeddings, expected(np.zeros_like(SEGMENTS))):
        mean = states.mean(axis=0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)  # float32
    longer = np.pad(IDS, ((0, 0), (0, 3)), constant_values=published.VOCAB + 5)
    np.testing.assert_allclose(model.embed(longer, mask=np.pad(MASK, ((0, 0), (0, 3)))), embeddings, atol=1e-6)
    assert (np.asarray(model.embed(IDS, mask=np.zeros_like(MASK))) == 0).all()


@pytest.mark.quick
def test_all_sizes_and_options_are_those_of_the_checkpoint(model):
    here = published.bert(num_classes=0, rngs=nnx.Rngs(0))
    assert jax.tree.map(np.shape, nnx.state(model)) == jax.tree.map(np.shape, nnx.state(here))
    with pytest.raises(ValueError, match="num_classes=0 has no logits"):
        model(IDS)
    with pytest.raises(ValueError, match=r"layers.*at least 1"):
        published.bert(layers=0, rngs=nnx.Rngs(0))


def test_another_mixer_keeps_the_projections_and_a_head_is_drawn(folder, model):
    mine = pretrained_bert(folder, mixers=[Skyformer, Softmax], num_classes=3, max_len=7)
    np.testing.assert_array_equal(mine.encoder.blocks[0].mixer.q.kernel, model.encoder.blocks[0].mixer.q.kernel)
    np.testing.assert_array_equal(mine.embedding.learned, model.embedding.learned[:7])
    assert mine(IDS, mask=MASK).shape == (3, 3) and np.isfinite(mine(IDS, mask=MASK)).all()
    assert isinstance(mine.encoder.blocks[0].mixer, Skyformer)


@pytest.mark.quick
def test_the_report_names_what_has_no_place_and_what_differs(folder, other):
    file = folder / "model.safetensors"
    before = np.asarray(other.head.kernel)
    assert load_pretrained(other, folder) == [
        f"parameters of {file}, a checkpoint of BERT",
        "  head.bias is not there: it stays as initialised",
        "  head.kernel is not there: it stays as initialised",
        "  pooler.dense.bias has no place here",
        "  pooler.dense.weight has no place here",
    ]
    np.testing.assert_array_equal(other.head.kernel, before)
    options = {"mlp": "gelu", "max_len": 8, "norm_epsilon": 1e-6, "causal": True}
    lines = load_pretrained(published.bert(**options, rngs=nnx.Rngs(0)), file)
    assert [line.split(":")[0] for line in lines[1:5]] == [
        "  BERT has mlp=gelu_erf, here it is gelu",
        "  BERT has norm_epsilon=0.001, here it is 1e-06",
        "  BERT has causal=False, here it is True",
        "  of its 10 positions the first 8 are taken",
    ]


def first_names(named):
    """The names of the first checkpoints, which had those of TensorFlow; under the prefix of a model with a head."""
    pairs = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
    renamed = {}
    for name, x in named.items():
        for new, old in pairs:
            name = name.replace(new, old)
        renamed[f"bert.{name}"] = x
    return renamed | {
        "cls.predictions.bias": np.ones(published.VOCAB, np.float32),
        "classifier.weight": np.ones((2, published.WIDTH), np.float32),
        "bert.embeddings.position_ids": np.arange(published.PLACES)[None],
    }


@pytest.mark.quick
def test_older_names_and_models_with_heads(tmp_path, model):
    old = pretrained_bert(published.save(tmp_path / "old", first_names(published.tensors())))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(old), nnx.state(model))


def without(name):
    return {key: x for key, x in published.tensors().items() if not key.startswith(name)}


def more(name, shape=(published.WIDTH,)):
    return published.tensors() | {name: np.ones(shape, np.float32)}


LAYER = "encoder.layer.1."


@pytest.mark.parametrize(
    ("named", "config", "message"),
    [
        (without("embeddings.word"), {}, "is no checkpoint of a BERT: it has no embeddings.word_embeddings.weight"),
        (without("embeddings.position"), {}, "embedding.learned is not in .*: a part of the checkpoint is missing"),
        (without("embeddings.token_type"), {}, "embedding.segments is not in "),
        (without("embeddings.LayerNorm.bias"), {}, "embedding.norm.bias is not in "),
        (without(LAYER), {}, "has weights of 1 blocks, and here are 2"),
        (without(f"{LAYER}attention.self.key.weight"), {}, "encoder.blocks.1.mixer.k.kernel is not in "),
        (without(f"{LAYER}intermediate"), {}, "encoder.blocks.1.mlp.up.kernel is not in "),
        (more("encoder.layer.2.output.dense.bias"), {}, "has weights of 3 blocks, and here are 2"),
        (
            more(f"{LAYER}attention.self.distance_embedding.weight"),
            {},
            "distance_embedding.weight: this Bert has no such",
        ),
        (
            more(f"{LAYER}crossattention.self.query.weight"),
            {},
            "crossattention.self.query.weight: this Bert has no such",
        ),
        (more("bert.embeddings.LayerNorm.gamma"), {}, "bert.embeddings.LayerNorm.gamma: this Bert has no such part"),
        (more("embeddings.LayerNorm.gamma"), {}, "LayerNorm.* is there twice in "),
        (
            more("embeddings.word_embeddings.weight", (31, 12)),
            {},
            r"embedding.tokens is \(31, 12\) in .*\(30, 12\) here",
        ),
        (more(f"{LAYER}output.dense.bias", (1, 12)), {}, "output.dense.bias has the shape .*: it should have 1 axes"),
        (more("embeddings.position_embeddings.weight", (9, 12)), {}, "max_len is 10, and .* has 9 positions"),
        (None, {"model_type": "roberta"}, "model_type is 'roberta' in .*config.json: this is a Bert"),
        (None, {"is_decoder": True}, "is_decoder is true in "),
        (None, {"num_attention_heads": 4}, "num_attention_heads is 4 in .*, and here are 3 heads"),
        (None, {"hidden_act": "relu"}, "hidden_act is 'relu' in "),
        (None, {"layer_norm_eps": "small"}, "config.json cannot be read: layer_norm_eps is 'small'"),
    ],
)
@pytest.mark.quick
def test_what_would_be_another_model_is_one_line(tmp_path, other, named, config, message):
    folder = published.save(tmp_path / "bert", named, published.CONFIG | config)
    before = nnx.state(other)
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(other, folder)
    assert "\n" not in str(error.value)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(other), before)


@pytest.mark.quick
def test_what_cannot_be_built_is_one_line(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no model.safetensors and no model.safetensors.index.json$"):
        pretrained_bert(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"there is no file .*nothing"):
        pretrained_bert(tmp_path / "nothing")
    with pytest.raises(ValueError, match="says no num_attention_heads"):
        pretrained_bert(published.save(tmp_path / "silent", config=None))
    with pytest.raises(ValueError, match=r"embedding\.segments is not in "):
        pretrained_bert(published.save(tmp_path / "cut", without("embeddings.token_type")))
    pre_norm = published.bert(post_norm=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="post_norm is False"):
        load_pretrained(pre_norm, folder)
    plain = Classifier(num_classes=2, vocab_size=5, max_len=4, mixers=[Softmax], rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="Classifier has no published checkpoints here"):
        load_pretrained(plain, folder)
    assert is_published(folder) and is_published("any.safetensors") and not is_published(tmp_path / "empty")


@pytest.mark.quick
def test_segments_belong_to_models_with_segments():
    plain = Classifier(num_classes=2, vocab_size=9, max_len=7, mixers=[Softmax], rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="segments are given, and this model has none"):
        plain.encode(IDS % 9, MASK, None, segments=SEGMENTS)
    with pytest.raises(ValueError, match="use 'last'"):
        published.bert(causal=True, pool="cls", rngs=nnx.Rngs(0))


def test_the_first_token_can_be_the_embedding(folder):
    model = pretrained_bert(folder, pool="cls")
    first = np.array([states[0] for states in expected(np.zeros_like(SEGMENTS))])
    np.testing.assert_allclose(
        model.embed(IDS, mask=MASK),
        first / np.linalg.norm(first, axis=1, keepdims=True),
        atol=1e-5,  # float32
    )


def test_a_post_norm_block_is_its_formula():
    rngs, mixer = nnx.Rngs(0), partial(Softmax, heads=2)
    block = Block(8, mixer=mixer, mlp_features=12, post_norm=True, rngs=rngs)
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    y = block.mixer_norm(x + block.mixer(x))
    np.testing.assert_allclose(block(x), block.mlp_norm(y + block.mlp(y)), atol=1e-5)  # float32
    encoder = Encoder(8, layers=2, mixers=[mixer], mlp_features=12, post_norm=True, rngs=rngs)
    assert encoder.norm is None
    np.testing.assert_allclose(encoder(x), encoder.blocks[1](encoder.blocks[0](x)), atol=1e-6)  # float32


def test_post_norm_decodes_as_it_reads():
    mixers = [partial(Softmax, heads=2, causal=True)]
    encoder = Encoder(8, layers=2, mixers=mixers, mlp_features=12, post_norm=True, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    y, state = encoder.prefill(x[:, :4], max_len=5)
    last, _ = encoder.step(x[:, 4], state)
    np.testing.assert_allclose(np.concatenate([y, last[:, None]], axis=1), encoder(x), atol=1e-5)  # float32


def test_training_draws_dropout_by_example(model):
    drawn = published.bert(dropout=0.5, rngs=nnx.Rngs(0))
    keys = jax.random.split(jax.random.key(0), 3)
    both = drawn(IDS, mask=MASK, key=keys)
    np.testing.assert_allclose(both[1:2], drawn(IDS[1:2], mask=MASK[1:2], key=keys[1:2]), atol=1e-5)  # float32
    assert np.abs(both - drawn(IDS, mask=MASK)).max() > 1e-3


@pytest.mark.quick
def test_shards_in_a_folder(tmp_path, model):
    named = published.tensors()
    parts = [dict(list(named.items())[::2]), dict(list(named.items())[1::2])]
    files = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for part, file in zip(parts, files):
        save_file(part, tmp_path / file)
    places = {name: file for part, file in zip(parts, files) for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (tmp_path / "config.json").write_text(json.dumps(published.CONFIG))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(pretrained_bert(tmp_path)), nnx.state(model))
