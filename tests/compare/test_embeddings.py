"""Embeddings of two encoders: agreement by ranks counted here, and a probe by least squares."""

import numpy as np
import pytest
from flax import nnx

from efficient_tx.compare.embeddings import agreement, embed, linear_probe
from tests.support import published_berts


def drawn(seed, shape=(12, 5)):
    return np.random.default_rng(seed).normal(size=shape)


def cosine(x, y):
    return x @ y / np.sqrt((x @ x) * (y @ y))


def ranks(x):
    """Of each number: how many are smaller, and half of those that are equal."""
    return np.array([(x < a).sum() + (x == a).sum() / 2 for a in x])


@pytest.mark.quick
def test_agreement_is_counted_by_hand():
    one, two = drawn(0), drawn(0) + drawn(1)
    found = agreement(one, two)
    cosines = [cosine(x, y) for x, y in zip(one, two)]
    pairs = [(i, j) for i in range(12) for j in range(i)]
    similar = [ranks(np.array([cosine(x[i], x[j]) for i, j in pairs])) for x in (one, two)]
    assert found.pairs == 66
    np.testing.assert_allclose(found[:2], [np.mean(cosines), np.min(cosines)], atol=1e-12)  # float64
    np.testing.assert_allclose(found.rank_correlation, np.corrcoef(*similar)[0, 1], atol=1e-12)
    assert 0.2 < found.rank_correlation < 0.95
    assert str(agreement(one, one)) == "cosine 1.0000, lowest 1.0000; rank correlation of 66 pairs 1.0000"


@pytest.mark.quick
def test_a_rotation_keeps_the_ranks_and_not_the_cosines():
    one = drawn(0)
    rotation = np.linalg.qr(drawn(1, (5, 5)))[0]
    found = agreement(one, 3 * one @ rotation)
    assert found.rank_correlation == pytest.approx(1) and found.cosine < 0.9
    assert agreement(one, -one).cosine == pytest.approx(-1)


@pytest.mark.quick
def test_embeddings_without_an_answer():
    one = drawn(0)
    assert np.isnan(agreement(one, np.ones_like(one)).rank_correlation)
    for other, message in [
        (np.zeros_like(one), "the embedding of sentence 0 is zero or not finite"),
        (np.where(np.arange(12)[:, None] == 7, np.nan, one), "the embedding of sentence 7 is zero or not finite"),
        (one[:5], r"embeddings of shape \(12, 5\) and \(5, 5\)"),
        (one[:, :3], r"embeddings of shape \(12, 5\) and \(12, 3\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            agreement(one, other)
    with pytest.raises(ValueError, match="three sentences at least"):
        agreement(one[:2], one[:2])


@pytest.mark.quick
def test_the_probe_is_a_ridge_regression():
    x, labels = drawn(0, (40, 5)), np.arange(40) % 3
    x[np.arange(40), labels] += 1.5
    train, test = x[:25], x[25:]
    penalty = 0.1
    mean = train.mean(0)
    ridge = np.sqrt(penalty * 25 * (train - mean).var(0).mean()) * np.eye(5)
    targets = np.eye(3)[labels[:25]]
    weights = np.linalg.lstsq(
        np.concatenate([train - mean, ridge]),
        np.concatenate([targets - targets.mean(0), np.zeros((5, 3))]),
        rcond=None,
    )[0]
    answers = ((test - mean) @ weights + targets.mean(0)).argmax(1)
    expected = (answers == labels[25:]).mean()
    assert linear_probe(train, labels[:25], test, labels[25:], penalty=penalty) == expected
    assert 0.5 < expected < 1
    assert linear_probe(train, labels[:25], train, answers_of(train, mean, weights, targets), penalty=penalty) == 1
    assert linear_probe(np.ones((4, 2)), np.array([0, 1, 1, 1]), np.ones((2, 2)), np.array([1, 0])) == 0.5


def answers_of(x, mean, weights, targets):
    return ((x - mean) @ weights + targets.mean(0)).argmax(1)


@pytest.mark.quick
def test_what_does_not_fit_the_probe_is_one_line():
    x, labels = drawn(0), np.arange(12) % 2
    for arguments, options, message in [
        ((x, labels[:3], x, labels), {}, r"shape \(12, 5\) with labels of shape \(3,\)"),
        ((x, labels, x[:, :2], labels), {}, r"shape \(12, 2\)"),
        ((x[:0], labels[:0], x, labels), {}, r"shape \(0, 5\)"),
        ((np.where(x > 1, np.inf, x), labels, x, labels), {}, "an embedding is not finite"),
        ((x, labels, x, labels), {"penalty": 0.0}, "penalty is 0.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_probe(*arguments, **options)


def test_many_sentences_are_those_of_one_call():
    """In other batches and without most of their padding."""
    model = published_berts.bert(max_len=70, num_classes=0, rngs=nnx.Rngs(0))
    generator = np.random.default_rng(0)
    lengths = np.array([70, 3, 40, 64, 1, 0, 33])
    inputs = generator.integers(0, published_berts.VOCAB, (7, 70)).astype(np.int32)
    mask = np.arange(70) < lengths[:, None]
    found = embed(model, inputs, mask, batch_size=3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, model.embed(inputs, mask=mask), atol=1e-5)  # float32, other groupings of sums
    for wrong in ((inputs, mask[:3]), (inputs[:0], mask[:0])):
        with pytest.raises(ValueError, match="do not fit"):
            embed(model, *wrong)
