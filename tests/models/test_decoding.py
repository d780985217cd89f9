"""Models of tokens that decode: logits of ids one by one are those of the causal forward pass."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import GLA, Softmax
from efficient_tx.models import Classifier, TokenClassifier

VOCAB, LENGTH, FIRST = 11, 9, (5, 2)


def model(cls=TokenClassifier, **options):
    sizes = {"vocab_size": VOCAB, "max_len": LENGTH, "features": 16, "mlp_features": 16, "dropout": 0.5}
    sizes |= {"mixers": [Softmax, GLA], "causal": True}
    return cls(num_classes=VOCAB, rngs=nnx.Rngs(0), **sizes | options)


def ids():
    return np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH)).astype(np.int32)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rope", "none"])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.first(1)
def test_prompts_of_two_lengths_and_the_ids_after_them(positions, prefix):
    decoder = model(positions=positions, prefix=prefix)
    text, real = ids(), np.arange(max(FIRST)) < np.array(FIRST)[:, None]
    prompt = np.where(real, text[:, : max(FIRST)], 99)  # ids of padding mean nothing
    logits, state = decoder.prefill(prompt, mask=real)
    rows = [[logits[b, t] for t in range(n)] for b, n in enumerate(FIRST)]
    step = nnx.jit(lambda decoder, ids, state: decoder.step(ids, state))
    for t in range(LENGTH - max(FIRST)):
        following = np.array([text[b, n + t] for b, n in enumerate(FIRST)])
        logits, state = step(decoder, following, state)
        assert logits.shape == (2, VOCAB) and logits.dtype == jnp.float32
        for b in range(2):
            rows[b].append(logits[b])
    expected = decoder(text)
    for b, n in enumerate(FIRST):
        np.testing.assert_allclose(rows[b], expected[b, : n + LENGTH - max(FIRST)], atol=1e-5)  # float32 sums


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.slow
def test_from_an_empty_state_and_in_parts(prefix):
    decoder = model(prefix=prefix)
    text, state, rows = ids(), decoder.init_state(2), []
    for part in (text[:, :4], text[:, 4:4], text[:, 4:]):
        logits, state = decoder.prefill(part, state=state)
        rows.append(logits)
    np.testing.assert_allclose(np.concatenate(rows, axis=1), decoder(text), atol=1e-5)
    assert state.count.tolist() == [LENGTH, LENGTH]


def test_beyond_the_last_position_or_room_it_is_not_a_number():
    for decoder, room in ((model(mixers=[GLA]), None), (model(positions="none"), 4), (model(prefix=1), 4)):
        text = ids()
        _, state = decoder.prefill(text[:, : room or LENGTH], max_len=room)
        assert np.isnan(decoder.step(text[:, 0], state)[0]).all()


def test_other_models_give_the_vectors_they_pool():
    decoder, text = model(Classifier, pool="last"), ids()
    vectors, state = decoder.prefill(text[:, :-1])
    last, _ = decoder.step(text[:, -1], state)
    assert vectors.shape == (2, LENGTH - 1, 16)
    np.testing.assert_allclose(decoder.head(last), decoder(text), atol=1e-5)


@pytest.mark.quick
def test_what_cannot_decode_or_belongs_to_others_is_one_line():
    with pytest.raises(ValueError, match="Softmax cannot decode: it is not causal"):
        model(causal=False).prefill(ids())
    _, state = model().prefill(ids()[:1])
    with pytest.raises(ValueError, match="and the state is of 1 sequences: give one of 2"):
        model().step(jnp.zeros(2, jnp.int32), state)
