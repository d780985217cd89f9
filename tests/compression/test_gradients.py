"""Gradients of layers, and the methods that work on them, against plain gradients and against what is best."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efficient_tx.compression import compress
from efficient_tx.compression import gradients as gradients_module
from efficient_tx.compression.gradients import Gradients, as_dense, in_groups, in_shares
from efficient_tx.compression.mfac import best_of_four, surgeon
from efficient_tx.compression.model import bias_of, dense, kernel_of, put, select
from efficient_tx.compression.statistics import shared_out
from efficient_tx.config.methods import named_method
from efficient_tx.linear import Dense, Monarch, Sparse
from efficient_tx.linear.replacement import find
from tests.support.small import batches, loss, model, output

rng = np.random.default_rng(0)


@pytest.mark.quick
@pytest.mark.parametrize(("sizes", "count"), [([8] * 6, 12), ([8] * 6, 4), ([8, 6, 5], 7), ([3], 9), ([4, 4], 8)])
def test_every_row_has_a_part_in_one_gradient(sizes, count):
    shares = list(in_shares(sizes, count))
    assert len(shares) == min(count, sum(sizes)) and all(shares)
    rows = [(number, row) for parts in shares for number, part in parts for row in range(part.start, part.stop)]
    assert rows == [(number, row) for number, size in enumerate(sizes) for row in range(size)]
    for number in range(len(sizes)):  # one program for each size of a part
        assert len({part.stop - part.start for parts in shares for batch, part in parts if batch == number}) == 1


@pytest.mark.quick
def test_groups_stay_within_the_memory():
    sizes = {"a": 3, "b": 3, "c": 9, "d": 1, "e": 4, "f": 2}
    assert list(in_groups(sizes, 7)) == [("a", "b"), ("c",), ("d", "e", "f")]


def test_gradients_are_those_of_the_model_for_its_weights():
    made = model()
    layers = select(made, "blocks.1")
    # The last batch is smaller, and so are its parts.
    given = [*batches()[1:], {name: array[:3] for name, array in batches()[0].items()}]
    gathered = Gradients(made, layers, loss, given)
    shares = list(in_shares([8] * 5 + [3], 5))
    assert len({rows.stop - rows.start for _, rows in shares[-1]}) > 1

    plain = nnx.jit(nnx.grad(loss))

    def of(path, parts):
        some = [{name: array[rows] for name, array in given[number].items()} for number, rows in parts]
        means = [find(plain(made, batch), path)["kernel"][...] for batch in some]
        return np.average(means, axis=0, weights=[len(batch["label"]) for batch in some])

    stacks = dict(gathered.stacks(5))
    assert list(stacks) == [layer.path for layer in layers]
    squares = gathered.squares(5)
    for path in (layers[0].path, layers[-1].path):
        expected = np.stack([of(path, parts) for parts in shares])
        assert np.abs(expected).max() > 1e-4
        # float32 through two blocks.
        np.testing.assert_allclose(stacks[path], expected, atol=1e-6 * np.abs(expected).max() * 10)
        np.testing.assert_allclose(squares[path], np.mean(np.float64(expected) ** 2, axis=0), rtol=1e-3, atol=1e-12)


def test_gradients_of_rows_on_several_devices_are_those_on_one(monkeypatch):
    made = model()
    layers = select(made, "blocks.1.mlp")

    def found():
        rows = shared_out(batches()[0])["inputs"]
        return len(rows.sharding.device_set), dict(Gradients(made, layers, loss, batches()).stacks(6))

    four, spread = found()
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    one, alone = found()
    assert (four, one) == (4, 1)
    for path, stack in spread.items():
        # float32 sums in another order.
        np.testing.assert_allclose(stack, alone[path], atol=1e-5 * np.abs(alone[path]).max())


def test_all_gradients_are_there_whatever_the_memory(monkeypatch):
    """The published loop leaves the last of the m gradients at zero."""
    made = model()
    gathered = Gradients(made, select(made, "blocks.1.mlp"), loss, batches())
    at_once = dict(gathered.stacks(8))
    monkeypatch.setattr(gradients_module, "MOST_BYTES", 1)
    for path, stack in gathered.stacks(8):
        assert len(stack) == 8 and (np.abs(stack).max((1, 2)) > 0).all()
        np.testing.assert_allclose(stack, at_once[path], atol=1e-7)


def test_a_layer_of_another_structure_has_the_gradients_of_its_weight():
    """Of the model in which it is dense."""
    made, other = model(linear=partial(Monarch, blocks=2)), model(linear=partial(Monarch, blocks=2))
    (layer,) = select(made, "blocks.1.mlp.up")
    put(other, layer.path, dense(kernel_of(layer.module), bias_of(layer.module), as_dense(layer.module)))
    ((_, stack),) = Gradients(made, [layer], loss, batches()).stacks(3)
    ((_, expected),) = Gradients(other, select(other, "blocks.1.mlp.up"), loss, batches()).stacks(3)
    np.testing.assert_allclose(stack, expected, atol=1e-7)


def test_what_cannot_be_is_one_line_and_changes_nothing():
    made = model()
    before = jax.tree.map(np.asarray, nnx.state(made))

    def broken(made, batch):
        return loss(made, batch) * jnp.nan

    cases = [
        ({"batches": batches()}, "mfac needs gradients: give compress(..., loss=), the loss of the task"),
        ({"loss": loss}, "there are no calibration data"),
        ({"loss": broken, "batches": batches()}, "encoder.blocks.0.mlp.down has gradients that are not finite"),
    ]
    for options, line in cases:
        with pytest.raises(ValueError) as error:
            compress(made, named_method("mfac"), 0.5, where="mlp", **options)
        assert str(error.value).startswith(line) and "\n" not in str(error.value)
    for one, two in zip(jax.tree.leaves(before), jax.tree.leaves(nnx.state(made)), strict=True):
        np.testing.assert_array_equal(one, two)
    with pytest.raises(ValueError, match=r"cannot meet it: its smallest layers take 0\.5"):
        compress(made, named_method("mfac(pattern='2:4')"), 0.5, where="mlp", loss=loss, batches=batches())


# The surgeon's quadratic model.


def quadratic(rows=5, columns=4, m=7, damping=1e-2):
    """A weight, gradients of it, and the Fisher matrix over its entries, along the input axis first."""
    draws = np.random.default_rng(3)
    kernel, stack = draws.normal(size=(rows, columns)), draws.normal(size=(m, rows, columns))
    flat = stack.swapaxes(1, 2).reshape(m, -1)
    return kernel, stack, damping * np.eye(rows * columns) + flat.T @ flat / m


@pytest.mark.quick
def test_one_weight_goes_as_the_constrained_optimum_says():
    """min ½ δᵀ H δ with w_q + δ_q = 0, by its Lagrange equations; the score is the minimum."""
    kernel, stack, fisher = quadratic()
    now = surgeon(kernel, stack, 1e-2, None)
    for row, column in [(0, 0), (3, 1), (4, 3)]:
        place = column * 5 + row
        system = np.block([[fisher, np.eye(20)[:, [place]]], [np.eye(20)[[place]], np.zeros((1, 1))]])
        move = np.linalg.solve(system, np.append(np.zeros(20), -kernel[row, column]))[:20]
        gone = np.zeros((5, 4), bool)
        gone[row, column] = True
        after = now.without(gone)
        np.testing.assert_allclose(after, kernel + move.reshape(4, 5).T, atol=1e-9)
        assert abs(after[row, column]) < 1e-9
        assert now.scores[row, column] == pytest.approx(move @ fisher @ move / 2, rel=1e-9)


@pytest.mark.quick
@pytest.mark.parametrize("block", [1, 3, 5, 8, 20, 128])
def test_blocks_of_the_fisher_matrix(block, monkeypatch):
    """Also in parts, and where the last block is shorter."""
    kernel, stack, fisher = quadratic()
    places = np.arange(20) // block
    blocked = np.where(places[:, None] == places, fisher, 0)
    monkeypatch.setattr("efficient_tx.compression.mfac.CHUNK", 8 * block * 7 * 2)
    now = surgeon(kernel, stack, 1e-2, block)
    np.testing.assert_allclose(now.diagonal, np.diag(np.linalg.inv(blocked)).reshape(4, 5).T, rtol=1e-9)
    x = rng.normal(size=(5, 4))
    np.testing.assert_allclose(now.times(x), np.linalg.solve(blocked, x.T.ravel()).reshape(4, 5).T, atol=1e-8)


@pytest.mark.parametrize("pattern", ["top", "2:4"])
def test_without_gradients_it_is_pruning_by_magnitude(pattern):
    """Of all layers together: the published code makes such a mask, and uses another."""
    made, before = model(), model()
    method, budget = named_method(f"mfac(pattern={pattern!r}, recomputations=3)"), 0.6

    def flat(made, batch):
        return 0.0 * loss(made, batch)

    done = compress(made, method, budget, where="mlp", batches=batches(), loss=flat)
    kernels = {change.path: kernel_of(find(before, change.path)) for change in done.changes}
    every = np.sort(np.abs(np.concatenate([kernel.ravel() for kernel in kernels.values()])))
    counts = 0
    for change in done.changes:
        layer, size = find(made, change.path), np.abs(kernels[change.path])
        assert type(layer) is Sparse and layer.pattern == pattern
        there = kernel_of(layer) != 0
        np.testing.assert_array_equal(kernel_of(layer), np.where(there, kernels[change.path], 0))
        assert there.sum() == layer.kept
        if pattern == "2:4":
            np.testing.assert_array_equal(there, best_of_four(size, 2))
            assert (there.reshape(-1, 4, there.shape[1]).sum(1) == 2).all()
        else:
            counts += layer.kept
    if pattern == "top":
        threshold = every[-counts]
        for change in done.changes:
            there = kernel_of(find(made, change.path)) != 0
            np.testing.assert_array_equal(there, np.abs(kernels[change.path]) >= threshold)


@pytest.mark.quick
def test_the_best_of_four():
    scores = rng.normal(size=(11, 3))
    for count in (1, 2, 3):
        kept = best_of_four(scores, count)
        for column in range(3):
            for start in range(0, 11, 4):
                group = scores[start : start + 4, column]
                expected = set(np.argsort(-group)[:count])
                assert set(np.flatnonzero(kept[start : start + 4, column])) == expected
    np.testing.assert_array_equal(best_of_four(np.zeros((4, 1)), 2).ravel(), [True, True, False, False])


@pytest.mark.parametrize("name", ["mfac(recomputations=1)", "wlra", "wlra(weights_rank=2)"])
def test_bfloat16_layers_stay_bfloat16(name):
    made = model(linear=partial(Dense, param_dtype=jnp.bfloat16), dtype=jnp.bfloat16)
    done = compress(made, named_method(name), 0.6, where="mlp", batches=batches(), loss=loss)
    assert done.after <= 0.6 * done.before
    for change in done.changes:
        layer = find(made, change.path)
        (factor, *_) = layer.factors()
        assert getattr(layer, factor).dtype == jnp.bfloat16 and layer.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["wlra", pytest.param("mfac(recomputations=1)+eora", marks=pytest.mark.slow)])
def test_gated_mlps_and_layers_of_other_structures(name):
    """Three layers in an MLP, and weights that are products."""
    made = model(mlp="swiglu", linear=partial(Monarch, blocks=2), features=32)
    done = compress(made, named_method(name), 0.7, batches=batches(), loss=loss)
    assert done.after <= 0.7 * done.before and np.isfinite(output(made)).all()


@pytest.mark.slow
def test_the_surgeon_beats_magnitude_in_the_loss():
    """Of a trained model at 0.4 of the bytes; the labels follow from the first two tokens."""
    some = [dict(batch, label=batch["inputs"][:, :2].sum(1) % 3) for batch in batches()]

    def trained():
        made = model()
        optimizer = nnx.Optimizer(made, optax.adam(3e-3), wrt=nnx.Param)

        @nnx.jit
        def step(made, optimizer, batch):
            optimizer.update(made, nnx.grad(loss)(made, batch))

        for _ in range(60):
            for batch in some:
                step(made, optimizer, {name: jnp.asarray(array) for name, array in batch.items()})
        return made

    made = trained()
    graphdef, state = nnx.split(made)
    losses = {}
    for name in ("mfac(recomputations=4)", "sparse"):
        one = nnx.merge(graphdef, state)
        compress(one, named_method(name), 0.4, batches=some, loss=loss)
        losses[name] = float(np.mean([loss(one, {n: jnp.asarray(a) for n, a in batch.items()}) for batch in some]))
    assert losses["mfac(recomputations=4)"] < losses["sparse"] - 0.1
